"""Malformed recipes, up to where weights would be read: a message and its exit code, and nothing is written."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from onegpu.adapters import Unavailable
from onegpu.recipes.jobs import Job

LIBRARY = Path(__file__).parents[2] / "recipes" / "library"
Command = Callable[..., Any]

INSERTS = [
    *(
        b"\xff",
        b"\x00",
        b"\t",
        b"\r\n",
        b"\xef\xbb\xbf",
        b": ",
        b"- ",
        b"{",
        b"[",
        b"'",
        b'"',
        b"#",
        b"|\n",
        b"&a ",
        b"*a ",
    ),
    *(b"!!python/object/apply:os.system ['touch executed']", b"!!int x", b"!!timestamp 9999-99-99", b"2001-99-99"),
    *(
        b"!!binary x",
        b"!!set {a}",
        b"? a\n",
        b"<<: *a\n",
        b"%YAML 9.9\n---\n",
        b"---\n",
        b"...\n",
        b"!!float q",
        b"1:99:99",
    ),
    *(
        b"!!bool q",
        b"!!null q",
        b"!!omap [a]",
        b"!!int ''",
        b"&a [*a]",
        b"\xc2\x85",
        b"\xed\xa0\x80",
        b"0x",
        b"1e999999",
    ),
]
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


@pytest.fixture
def documents(bases: dict[str, str], data_files: dict[str, str]) -> list[dict[str, Any]]:
    """The packaged recipes, over tiny bases and rows."""
    found = []
    for path in sorted(LIBRARY.glob("*.yaml")):
        content = yaml.safe_load(path.read_text("utf-8"))
        ((task, given_settings),) = content["task"].items()
        encodes = task in ("tagging", "question-answering", "classification")
        kept = {
            key: value for key, value in given_settings.items() if key not in ("columns", "max_length", "test", "limit")
        }
        content |= {"base": bases["bert" if encodes else "llama"], "revision": None}
        content["task"] = {task: kept | {"data": data_files[task], "evaluation": 0.3}}
        found.append(content)
    assert len(found) > 10
    return found


@pytest.fixture
def judge(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tally: Counter[str],
    first_time: Callable[..., bool],
) -> Callable[[str, bytes], None]:
    """Gives a recipe to the command line; where it is found right, the run stops before weights are read."""

    def stop(self: Job) -> Any:
        raise Unavailable("everything before weights is right")

    monkeypatch.setattr(Job, "load_base", stop)
    monkeypatch.chdir(tmp_path)
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"

    def give(verb: str, content: bytes) -> None:
        if not first_time(content):
            return
        recipe.write_bytes(content)
        verdict = command(*([verb, str(recipe)] + (["-o", str(out)] if verb == "run" else [])))
        assert not out.exists()
        assert {path.name for path in tmp_path.iterdir()} <= {"recipe.yaml", "cache"}
        right = verdict.code == 0 or "everything before weights is right" in verdict.message
        tally["right" if right else f"exit {verdict.code}"] += 1

    return give


def _spoilt(data: st.DataObject, documents: list[dict[str, Any]], spoil: Callable[..., Any]) -> bytes:
    content = spoil(data.draw, data.draw(st.sampled_from(documents)))
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
    if data.draw(st.integers(0, 3)):
        return text
    place = data.draw(st.integers(0, len(text)))
    if data.draw(st.booleans()):
        return text[:place] + data.draw(st.sampled_from(INSERTS) | st.binary(max_size=8)) + text[place:]
    return text[:place] + text[data.draw(st.integers(place, len(text))) :]


def _check(judge: Any, documents: Any, spoil: Any, data: st.DataObject) -> None:
    verb = data.draw(st.sampled_from(("run", "run", "data", "show")))
    judge(verb, _spoilt(data, documents, spoil))


def test_the_recipes_are_right_before_they_are_spoilt(
    judge: Any, documents: list[dict[str, Any]], tally: Counter[str]
) -> None:
    for content in documents:
        judge("run", yaml.safe_dump(content).encode())
    assert tally["right"] >= len(documents) - 1, tally  # the one with a teacher has none here


@settings(max_examples=150)
@given(data=st.data())
def test_a_malformed_recipe_is_a_message(judge: Any, documents: Any, spoil: Any, data: st.DataObject) -> None:
    _check(judge, documents, spoil, data)


@pytest.mark.fuzz
def test_ten_thousand_malformed_recipes(judge: Any, documents: Any, spoil: Any, tally: Counter[str]) -> None:
    @settings(max_examples=17_000)
    @given(data=st.data())
    def each(data: st.DataObject) -> None:
        _check(judge, documents, spoil, data)

    each()
    print(f"\nrecipes: {dict(tally)}")
    assert tally.total() - tally["right"] >= 10_000, tally


@pytest.mark.parametrize(
    "content",
    [
        LAUGHS,
        "&a [*a]",
        "a: &a {b: *a}",
        "[" * 5000,
        "a: " * 2000,
        "? " * 3000,
        "x: " + "9" * 5000,
        "{" * 3000,
        "- " * 3000,
        "",
    ],
    ids=["laughs", "circle", "circle in a key", "lists", "keys", "questions", "digits", "braces", "dashes", "nothing"],
)
def test_a_document_that_blows_up_is_a_message(judge: Any, content: str, tally: Counter[str]) -> None:
    judge("show", content.encode())
    assert tally == {"exit 2": 1}


@pytest.mark.parametrize("insert", INSERTS, ids=repr)
def test_odd_pieces_of_yaml_are_messages(judge: Any, insert: bytes, tally: Counter[str]) -> None:
    for text in (b"base: " + insert, insert + b"\nbase: x", b"base: x\ntask: {chat: {data: " + insert + b"}}"):
        judge("show", text)
    assert tally == {"exit 2": 3}
