"""18. Rows that were tokenised before are used although something changed.

Met: the key of a cache lacks the chat template, the length, or the code that makes masks. A changed recipe trains on
what an old one made, and "0 rows processed" looks good.

Here: a key is made of the content of rows, tokenizer and template, every setting of the task, and the version of the
code that makes masks; counts and a digest lie beside what is kept, and a folder that does not match is made anew.

Also: tests/recipes/data/test_examples.py, tests/recipes/data/test_rows.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onegpu.recipes import Loaded, preflight
from onegpu.recipes.tasks.chat import Chat

Recipe = Callable[..., Loaded]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Loaded], int]:
    """How many rows are tokenised for a recipe."""
    count = 0
    real = Chat.encode

    def counted(self: Chat, *args: Any) -> Any:
        nonlocal count
        count += 1
        return real(self, *args)

    monkeypatch.setattr(Chat, "encode", counted)

    def rows_of(loaded: Loaded) -> int:
        nonlocal count
        count = 0
        preflight(loaded)
        return count

    return rows_of


def test_nothing_is_tokenised_twice(recipe: Recipe, encoded: Callable[[Loaded], int]) -> None:
    assert encoded(recipe()) == 10
    assert encoded(recipe()) == 0
    assert encoded(recipe(["dora"], train={"learning_rate": 1e-5})) == 0  # no matter to rows


def test_whatever_the_tokens_follow_from_makes_them_anew(
    recipe: Recipe,
    encoded: Callable[[Loaded], int],
    templated: Callable[[str], Path],
    rows: list[dict[str, Any]],
    write_rows: Callable[..., Path],
    bases: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert encoded(recipe()) == 10
    template = (bases["plain"] / "chat_template.jinja").read_text("utf-8")
    assert encoded(recipe(base=templated(template))) == 0  # the same template at another place
    assert encoded(recipe(base=templated(template.replace("{% endfor %}", " {% endfor %}")))) == 10
    assert encoded(recipe(task={"max_length": 255})) == 10
    assert encoded(recipe(task={"supervise": "last"})) == 10
    rows[3]["messages"][1]["content"] += "!"
    assert encoded(recipe(task={"data": str(write_rows(rows, "changed.jsonl"))})) == 10
    monkeypatch.setattr(Chat, "version", Chat.version + 1)
    assert encoded(recipe()) == 10


@pytest.mark.parametrize("file", ["rows.arrow", "facts.json"])
def test_what_was_damaged_is_made_anew(
    file: str, recipe: Recipe, encoded: Callable[[Loaded], int], cache: Path
) -> None:
    expected = list(preflight(recipe()).dataset.train)
    (kept,) = {path.parent for path in (cache / "examples").rglob("rows.arrow") if path.stat().st_size > 2000}
    content = bytearray((kept / file).read_bytes())
    content[len(content) // 2] ^= 1
    (kept / file).write_bytes(content)
    assert encoded(recipe()) == 10
    assert list(preflight(recipe()).dataset.train) == expected
