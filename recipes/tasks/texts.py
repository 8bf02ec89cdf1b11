"""Text to token ids: every task that reads plain text does it here, for training and for generation alike."""

from collections.abc import Sequence
from typing import Any

from onegpu.adapters import DataError

from .contract import Row, RowProblem

__all__ = ["around", "end_of", "read_text", "token_ids"]

SAMPLE = "a"  # any text: only what a tokenizer puts around it is wanted


def read_text(row: Row, column: str) -> str:
    """The text in a column.

    Raises:
        RowProblem: it is no text, or empty.
    """
    text = row[column]
    if not isinstance(text, str):
        raise RowProblem(f"`{column}` is not a text")
    if not text.strip():
        raise RowProblem(f"`{column}` is empty")
    return text


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text alone, without any that the tokenizer puts around it."""
    # Lengths are checked by the tasks; the tokenizer's own warning would be about texts that are cut afterwards.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer itself puts before and after a text, such as [CLS] and [SEP], or only <s>."""
    bare = token_ids(tokenizer, SAMPLE)
    whole: Sequence[int] = tokenizer(SAMPLE)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if list(whole[start : start + len(bare)]) == bare:
            return list(whole[:start]), list(whole[start + len(bare) :])
    return [], []


def end_of(tokenizer: Any) -> int:
    """The token that ends a text.

    Raises:
        DataError: the tokenizer has none, so that a model trained on it would not learn to stop.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the base's tokenizer has no end token, so the model would not learn to stop: set its eos_token"
        )
    return int(tokenizer.eos_token_id)
