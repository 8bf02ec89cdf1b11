import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from onegpu.recipes.data.examples import Examples, Unusable, key_parts, store_examples
from onegpu.recipes.tasks import Example

pytestmark = pytest.mark.usefixtures("cache")


@dataclass(frozen=True)
class Pair(Example):
    """An example with fields of every type that a task may add."""

    rejected: list[int] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    words: list[str] = dataclasses.field(default_factory=list)
    spans: list[list[int]] = dataclasses.field(default_factory=list)
    weight: float = 1.0
    text: str = ""
    desired: bool = True

    @property
    def size(self) -> int:
        return len(self.ids) + len(self.rejected)


class Settings(BaseModel):
    """What a task may be told."""

    data: str = "rows.jsonl"
    too_long: Literal["error", "drop"] = "error"
    ratio: float = 0.15


def _example(number: int) -> Example:
    ids = list(range(number % 50))
    return Example(number, ids, [-100] * (len(ids) // 2) + ids[len(ids) // 2 :], cut=number % 3)


def _pair(number: int) -> Pair:
    return Pair(
        number, [1, 2], [0], 0, [3] * (number % 4), [0.1, number / 3], ["ß", ""], [[1, 2], []], 0.5, "a\nb", False
    )


class Made:
    """Examples that are made one by one, counted; every tenth row gives none."""

    def __init__(self, make: Callable[[int], Any] = _example, count: int = 1300) -> None:
        self.make, self.count, self.done = make, count, 0

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.count):
            self.done += 1
            yield Unusable(number, "no text") if number % 10 == 9 else self.make(number)

    @property
    def expected(self) -> list[Any]:
        return [self.make(number) for number in range(self.count) if number % 10 != 9]


def test_examples_come_back_as_they_were_made() -> None:
    made = Made()
    examples = store_examples({"a": 1}, Example, made)
    assert len(examples) == 1170
    assert list(examples) == made.expected
    assert [examples[i] for i in (0, 700, -1)] == [made.expected[i] for i in (0, 700, -1)]
    assert examples[500:520] == made.expected[500:520]


def test_fields_of_every_type_come_back_exactly() -> None:
    made = Made(_pair, 30)
    examples = store_examples({}, Pair, made)
    assert list(examples) == made.expected
    assert type(examples[1]) is Pair
    assert [type(value) for value in dataclasses.astuple(examples[1])] == [
        type(value) for value in dataclasses.astuple(made.expected[1])
    ]


def test_what_was_counted_is_kept() -> None:
    made = Made()
    for _ in range(2):
        examples = store_examples({}, Example, made)
        assert examples.tokens == sum(len(e.ids) for e in made.expected)
        assert examples.supervised == sum(e.supervised for e in made.expected)
        assert examples.dropped == {"no text": list(range(9, 1300, 10))}
        assert examples.lengths.tolist() == [len(e.ids) for e in made.expected]
        assert examples.column("row").tolist() == [e.row for e in made.expected]
        assert examples.column("cut").tolist() == [e.cut for e in made.expected]


def test_lengths_are_what_the_example_calls_its_size() -> None:
    made = Made(_pair, 30)
    examples = store_examples({}, Pair, made)
    assert examples.lengths.tolist() == [2 + len(e.rejected) for e in made.expected]
    assert examples.tokens == examples.lengths.sum()


def test_no_examples_at_all_are_kept_as_well() -> None:
    examples: Examples[Example] = store_examples({}, Example, [Unusable(0, "empty")])
    assert (len(examples), list(examples), examples.lengths.tolist()) == (0, [], [])
    assert examples.dropped == {"empty": [0]}


def test_a_hit_makes_nothing() -> None:
    first, second = Made(), Made()
    store_examples({"a": [1, (2, 3)]}, Example, first)
    assert list(store_examples({"a": [1, [2, 3]]}, Example, second)) == first.expected
    assert (first.done, second.done) == (1300, 0)


def test_another_kind_of_example_is_another_key() -> None:
    made = Made(_pair, 30)
    store_examples({}, Example, Made(_example, 30))
    assert list(store_examples({}, Pair, made)) == made.expected


@pytest.mark.parametrize("name", ["rows.arrow", "facts.json"])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_damaged_file_is_made_anew(cache: Path, name: str, place: float) -> None:
    store_examples({}, Example, Made())
    (kept,) = cache.rglob(name)
    content = bytearray(kept.read_bytes())
    content[int(place * len(content))] ^= 1
    kept.write_bytes(content)
    again, third = Made(), Made()
    assert list(store_examples({}, Example, again)) == again.expected
    assert list(store_examples({}, Example, third)) == again.expected
    assert (again.done, third.done) == (1300, 0)


def test_the_facts_say_what_the_key_was_made_of(cache: Path) -> None:
    store_examples({"template": "{{ x }}"}, Example, Made())
    (facts,) = cache.rglob("facts.json")
    assert json.loads(facts.read_text())["key"]["template"] == "{{ x }}"


def test_a_failure_while_making_leaves_nothing(cache: Path) -> None:
    def failing() -> Iterator[Example]:
        yield _example(1)
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        store_examples({}, Example, failing())
    assert not list(cache.rglob("*.arrow"))


def test_a_field_that_cannot_be_kept_is_refused() -> None:
    @dataclass(frozen=True)
    class Odd(Example):
        extra: dict[str, int] = dataclasses.field(default_factory=dict)

    with pytest.raises(TypeError, match=r"Odd\.extra: dict\[str, int\] cannot be kept"):
        store_examples({}, Odd, [])


def test_a_token_that_does_not_fit_is_an_error_and_no_other_token() -> None:
    with pytest.raises((OverflowError, ValueError)):
        store_examples({}, Example, [Example(0, [2**31], [])])


# --- the key


@pytest.fixture
def own(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer that a test may change."""
    return _copy(tokenizer)


def _copy(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=tokenizer.chat_template,
    )


PARTS: dict[str, Any] = {
    "task_name": "chat",
    "masks": 1,
    "max_length": 256,
    "labels": None,
    "rows": "f0",
    "numbers": [0, 1, 2],
}


def _key(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    return key_parts(tokenizer=tokenizer, **(PARTS | {"task": Settings()} | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"task_name": "completion"},
        {"task": Settings(too_long="drop")},
        {"task": Settings(ratio=0.16)},
        {"masks": 2},
        {"max_length": 255},
        {"labels": ["a", "b"]},
        {"labels": ["b", "a"]},
        {"rows": "f1"},
        {"numbers": [0, 1]},
        {"numbers": [0, 2, 1]},
    ],
    ids=str,
)
def test_one_part_that_changes_makes_everything_anew(own: PreTrainedTokenizerFast, changes: dict[str, Any]) -> None:
    store_examples(_key(own, labels=["a"]), Example, Made())
    again = Made()
    store_examples(_key(own, **({"labels": ["a"]} | changes)), Example, again)
    assert again.done == 1300


def test_one_character_of_the_template_changes_the_key(own: PreTrainedTokenizerFast) -> None:
    before = _key(own)
    own.chat_template = str(own.chat_template) + " "
    assert _key(own) != before


def test_the_tokenizer_is_in_the_key_by_content(own: PreTrainedTokenizerFast) -> None:
    assert _key(own) == _key(_copy(own))
    for change in (
        lambda t: t.add_tokens(["new"]),
        lambda t: setattr(t, "pad_token", "a"),
        lambda t: setattr(t, "truncation_side", "left"),
        lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.Lowercase()),
    ):
        changed = _copy(own)
        change(changed)
        assert _key(changed) != _key(own)


def test_a_call_with_truncation_leaves_the_key_as_it_was(own: PreTrainedTokenizerFast) -> None:
    # It leaves truncation and padding behind in the tokenizer, and which call came last must not matter.
    before = _key(own)
    own(["a", "bcd"], truncation=True, max_length=2, padding=True)
    assert json.loads(own.backend_tokenizer.to_str())["truncation"] is not None
    assert _key(own) == before


def test_the_versions_that_tokenise_are_in_the_key(
    own: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _key(own)
    monkeypatch.setattr("onegpu.recipes.data.examples.version", lambda name: f"{name} of tomorrow")
    assert _key(own) != before


def test_a_second_process_finds_what_the_first_has_made(chat_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_base)
    made = store_examples(_key(tokenizer), Example, Made(count=30))
    code = (
        "import json, sys\n"
        "from transformers import AutoTokenizer\n"
        "from onegpu.recipes.data.examples import key_parts, store_examples\n"
        "from onegpu.recipes.tasks import Example, contract\n"
        "class Settings(contract.BaseModel):\n"
        "    data: str = 'rows.jsonl'\n"
        "    too_long: str = 'error'\n"
        "    ratio: float = 0.15\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "tokenizer('abc', truncation=True, max_length=2)\n"
        "def never():\n"
        "    raise AssertionError('made again')\n"
        "    yield\n"
        "key = key_parts(tokenizer=tokenizer, task=Settings(), **json.loads(sys.argv[2]))\n"
        "print(json.dumps([example.ids for example in store_examples(key, Example, never())]))\n"
    )
    command = [sys.executable, "-c", code, str(chat_base), json.dumps(PARTS)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(said) == [example.ids for example in made]
