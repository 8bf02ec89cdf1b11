"""2. No supervised tokens, or the wrong ones.

Met: a template without generation tags gives a mask of zeros, or of ones; an answer is cut off; the rendered prompt is
no prefix of the conversation. The loss is 0, or looks fine while prompts are learned.

Here: supervision is the difference between two renderings, by position; what is cut, empty or not a prefix is told with
its row, before weights are read; `onegpu data` shows what is learned.

Also: tests/recipes/tasks/test_chat.py, tests/recipes/data/test_dataset.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerFast

from onegpu.adapters import DataError
from onegpu.recipes import Loaded, preflight
from onegpu.recipes.tasks import Reader
from onegpu.recipes.tasks.chat import Chat

Rows = list[dict[str, Any]]
Recipe = Callable[..., Loaded]
# Like those of reasoning models, it takes earlier thoughts away as soon as another turn follows.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'].split('so ')[-1] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_exactly_the_answers_and_their_ends_are_supervised(recipe: Recipe, rows: Rows) -> None:
    job = preflight(recipe())
    assert "generation" not in job.reader.tokenizer.chat_template.replace("add_generation_prompt", "")
    assert len(job.dataset.train) == len(rows)
    for example in job.dataset.train:
        labels = [label for label in example.labels if label != -100]
        said = [m["content"] for m in rows[example.row]["messages"] if m["role"] == "assistant"]
        assert job.reader.tokenizer.decode(labels) == "".join(f"{text}<|im_end|>" for text in said)


def test_an_answer_beyond_the_longest_length_is_told_with_its_row(recipe: Recipe) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl.*\b5\b.*tokens, and max_length is 60"):
        preflight(recipe(task={"max_length": 60}))
    with pytest.raises(DataError, match=r"nothing supervised is left after cutting.*5"):
        preflight(recipe(task={"max_length": 20, "too_long": "cut-right"}))


def test_rows_without_an_answer_are_listed_and_too_many_are_refused(
    recipe: Recipe, rows: Rows, write_rows: Callable[..., Path]
) -> None:
    silent = {"messages": [{"role": "user", "content": "hello?"}]}
    data = write_rows([*rows, silent], "mixed.jsonl")
    dropped = preflight(recipe(task={"data": str(data), "tolerate": 0.1})).dataset.dropped
    assert list(dropped) == ["no assistant turn"]
    assert [place.rpartition(" ")[2].rpartition(":")[2] for place in dropped["no assistant turn"]] == ["11"]
    with pytest.raises(DataError, match="1 of 11 rows cannot be used: no assistant turn"):
        preflight(recipe(task={"data": str(data)}))
    with pytest.raises(DataError, match="10 of 10 rows cannot be used"):
        preflight(recipe(task={"data": str(write_rows([silent] * 10, "silent.jsonl")), "tolerate": 0.99}))


def test_a_tokenizer_that_gives_an_encoding_gives_the_same_mask(bases: dict[str, Path], rows: Rows) -> None:
    class Encoding(PreTrainedTokenizerFast):
        def __call__(self, *args: Any, **options: Any) -> BatchEncoding:
            return BatchEncoding(dict(super().__call__(*args, **options)) | {"more": [0, 0]})

    plain = AutoTokenizer.from_pretrained(bases["plain"])
    # The trap: the length of what this returns is how many keys it has, and not how many tokens.
    assert isinstance(plain.apply_chat_template(rows[0]["messages"]), BatchEncoding)
    readers = [Reader(each, 256, frozenset({1})) for each in (plain, Encoding.from_pretrained(bases["plain"]))]
    ours, theirs = ([Chat(data="rows").encode(n, row, reader) for n, row in enumerate(rows)] for reader in readers)
    assert ours == theirs


def test_a_template_that_rewrites_what_was_said_is_refused_with_the_token(
    recipe: Recipe, templated: Callable[[str], Path], write_rows: Callable[..., Path]
) -> None:
    said = [("user", "is it 1?"), ("assistant", "let me see so no"), ("user", "sure?"), ("assistant", "so yes")]
    data = write_rows([{"messages": [{"role": role, "content": text} for role, text in said]}] * 2, "thoughts.jsonl")
    base = templated(FORGETFUL)
    with pytest.raises(DataError, match=r"turn 1: the rendered prompt is not a prefix .* from token \d+ on"):
        preflight(recipe(base=base, task={"data": str(data)}))
    job = preflight(recipe(base=base, task={"data": str(data), "supervise": "last"}))
    assert job.dataset.train.supervised > 0
