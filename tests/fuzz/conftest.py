"""What the fuzz tests share: ways to spoil a document, tiny bases, and what may come of a command at all.

Each property runs twice: a small, fixed sample with all tests, and thousands of cases with `pytest -m fuzz`.
"""

import contextlib
import copy
import hashlib
import io
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings, strategies as st

from onegpu.recipes import cli

CODES = {0, 2, 3, 4, 130}
LONGEST = 1500  # characters of a message
CHATML = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 17, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**30)),
    *(0.0, -0.5, 0.5, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        " ",
        "a",
        "none",
        "null",
        "auto",
        "all-linear",
        "2e-4",
        "1_000",
        "nan",
        "-",
        "~",
        "../../..",
        "/",
        "/etc/passwd",
    ),
    *(
        "x" * 5000,
        "ünïcödé ☃ \U0001f600",
        "\u202e\u200b",
        "\x1b[31mred",
        "a\nb\n\tc",
        "\x07",
        "{",
        "{text}",
        "{a.b}",
        "%s",
    ),
    *("package:os/x", "package:onegpu/../..", "hub:someone/rows", "hub:someone/rows@main", "someone/model", "a + b"),
    *(
        "sample:no-such",
        "lora",
        "nf4",
        "prefix",
        "full",
        "chat",
        "classification",
        "bf16",
        "fp16",
        "adamw-8bit",
        "cosine",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        {"": None},
        [1, "a"],
        {"a": {"b": {"c": 1}}},
        ["q_proj"],
        {"lora": {}},
        {"lora": {"rank": 2}},
    ),
]


def size(examples: int) -> settings:
    """How many cases, and nothing that depends on the machine."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )


settings.register_profile("sample", size(40))
settings.load_profile("sample")


class Verdict(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    message: str


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are kept between runs; here nobody needs them again."""
    monkeypatch.setenv("ONEGPU_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Verdict]:
    """`command("data", "recipe.yaml")`: the command line in this process, and what every outcome must be like."""

    def call(*arguments: str) -> Verdict:
        monkeypatch.setattr(sys, "argv", ["onegpu", *arguments])
        code: Any = 0
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                cli.main()
            except SystemExit as end:
                code = end.code or 0
        _, mark, message = f"\n{err.getvalue()}".partition("\nonegpu: ")
        assert code in CODES, (code, err.getvalue()[-2000:])
        assert "Traceback" not in err.getvalue()
        assert code == 0 or mark or "Usage" in err.getvalue(), err.getvalue()[-2000:]
        assert len(message) <= LONGEST, message
        assert all(character.isprintable() or character == "\n" for character in message), message
        return Verdict(code, out.getvalue(), message)

    return call


@pytest.fixture
def tally() -> Counter[str]:
    """What came of the cases, by exit code."""
    return Counter()


@pytest.fixture
def first_time() -> Callable[..., bool]:
    """`first_time(content)`: of five cases hypothesis draws one again, which shows nothing and counts for nothing."""
    seen: set[str] = set()

    def look(*parts: Any) -> bool:
        digest = hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()
        new = digest not in seen
        seen.add(digest)
        return new

    return look


def _paths(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    members = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in members:
        yield (*at, key)
        yield from _paths(value, (*at, key))


def _parent(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        content = content[key]
    return content


def _misspelt(draw: Callable[..., Any], text: str) -> str:
    place = draw(st.integers(0, max(len(text) - 1, 0)))
    way = draw(st.sampled_from(("drop", "double", "swap", "upper", "space")))
    if way == "drop":
        return text[:place] + text[place + 1 :]
    if way == "double":
        return text[:place] + text[place : place + 1] * 2 + text[place + 1 :]
    if way == "swap":
        return text[:place] + text[place : place + 2][::-1] + text[place + 2 :]
    return text.upper() if way == "upper" else f"{text} "


def _nested(depth: int, inner: Any) -> Any:
    for _ in range(depth):
        inner = [inner]
    return inner


def spoil(draw: Callable[..., Any], content: Any, most: int = 3) -> Any:
    """A copy of a document of lists and objects with one to `most` things wrong: keys, values, places, depth."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, most))):
        paths = list(_paths(content))
        if not paths:
            return content
        path = draw(st.sampled_from(paths))
        parent, key = _parent(content, path), path[-1]
        way = draw(st.sampled_from(("value", "value", "value", "misspell", "drop", "move", "wrap", "add", "deepen")))
        value = copy.deepcopy(parent[key])  # one object in two places could come to hold itself
        if way == "misspell" and isinstance(parent, dict) and isinstance(key, str):
            parent[_misspelt(draw, key)] = parent.pop(key)
        elif way == "misspell" and isinstance(value, str):
            parent[key] = _misspelt(draw, value)
        elif way == "drop":
            del parent[key]
        elif way == "move":
            others = [p for p in paths if p[: len(path)] != path and isinstance(_parent(content, p), dict)]
            if others:
                other = draw(st.sampled_from(others))
                target = _parent(content, other)
                del parent[key]
                target[str(key)] = value
        elif way == "wrap":
            parent[key] = draw(
                st.sampled_from(([value], {"a": value}, str(value)[:200], [value, copy.deepcopy(value)]))
            )
        elif way == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(("", "x", "name", "rank", "lr", "a.b", "ü", "1", "trust_remote_code")))] = value
        elif way == "deepen":
            parent[key] = _nested(draw(st.sampled_from((3, 30, 70))), value)
        else:
            parent[key] = draw(
                st.sampled_from(ODD).map(copy.deepcopy) | st.text(max_size=20) | st.integers() | st.floats()
            )
    return content


@pytest.fixture(name="spoil")
def _spoil() -> Callable[..., Any]:
    return spoil


@pytest.fixture
def spoil_bytes() -> Callable[..., bytes]:
    """`spoil_bytes(draw, content)`: bytes flipped, cut, doubled, inserted."""

    def change(draw: Callable[..., Any], content: bytes) -> bytes:
        for _ in range(draw(st.integers(1, 3))):
            place = draw(st.integers(0, len(content)))
            way = draw(st.sampled_from(("flip", "cut", "insert", "double", "zero")))
            if way == "flip" and place < len(content):
                content = content[:place] + bytes([content[place] ^ draw(st.integers(1, 255))]) + content[place + 1 :]
            elif way == "cut":
                content = content[:place]
            elif way == "insert":
                content = content[:place] + draw(st.binary(max_size=16)) + content[place:]
            elif way == "double":
                content = content[:place] + content[place : place + 64] + content[place:]
            else:
                content = content[:place] + bytes(8) + content[place + 8 :]
        return content

    return change


@pytest.fixture(scope="session")
def bases(worded: Path, saved_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A Llama that can chat and a BERT, with the same letters as tokens."""
    root = tmp_path_factory.mktemp("fuzz-bases")
    shutil.copytree(worded, root / "llama")
    (root / "llama" / "chat_template.jinja").write_text(CHATML)
    shutil.copytree(saved_models["bert"], root / "bert")
    for file in worded.glob("tokenizer*"):
        shutil.copy(file, root / "bert")
    return {name: str(root / name) for name in ("llama", "bert")}


ROWS: dict[str, list[dict[str, Any]]] = {
    "chat": [
        {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": f"so {i}"}]}
        for i in range(12)
    ],
    "completion": [{"prompt": f"one {i}", "completion": f"two {i}"} for i in range(12)],
    "language-modelling": [{"text": f"some words {i}"} for i in range(12)],
    "classification": [{"text": f"words {i}", "label": "ab"[i % 2]} for i in range(12)],
    "tagging": [{"tokens": ["a", "b", str(i)], "tags": ["O", "B-X", "I-X"]} for i in range(12)],
    "question-answering": [
        {"question": f"what {i}", "context": "a b c", "answers": {"text": ["b"], "answer_start": [2]}}
        for i in range(12)
    ],
    "sequence-to-sequence": [{"source": f"one {i}", "target": f"two {i}"} for i in range(12)],
    "preference": [{"prompt": f"p {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(12)],
    "reward": [{"prompt": f"p {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(12)],
    "distillation": [{"text": f"words {i}", "label": "ab"[i % 2]} for i in range(12)],
}


@pytest.fixture(scope="session")
def rows_of() -> dict[str, list[dict[str, Any]]]:
    """Twelve rows for each task."""
    return ROWS


@pytest.fixture(scope="session")
def data_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same as files."""
    root = tmp_path_factory.mktemp("fuzz-rows")
    for task, rows in ROWS.items():
        (root / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {task: str(root / f"{task}.jsonl") for task in ROWS}
