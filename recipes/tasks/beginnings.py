"""The token that a text begins with: once, and at the beginning only, where the tokenizer begins texts with one."""

from collections.abc import Iterable, Sequence
from typing import Any

from onegpu.adapters import DataError, RecipeError

from .contract import RowProblem
from .conversations import render
from .texts import around

__all__ = ["begin_token", "check_begins", "refuse_second_beginning"]

SAMPLE = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


def begin_token(tokenizer: Any) -> int | None:
    """The token that every sequence may have once, at position 0.

    None where the tokenizer begins no text with it, or the chat template itself begins each turn with it (Llama 2).
    """
    before, _ = around(tokenizer)
    begin = tokenizer.bos_token_id
    if begin is None or before != [begin] or _repeats(tokenizer, begin):
        return None
    return int(begin)


def _repeats(tokenizer: Any, begin: int) -> bool:
    if tokenizer.chat_template is None:
        return False
    try:
        return render(tokenizer, SAMPLE).count(begin) > 1
    except RowProblem:  # a template that refuses the sample is judged by the rows
        return False


def check_begins(tokenizer: Any) -> None:
    """Check that a chat template begins a conversation as the tokenizer begins any other text.

    Raises:
        RecipeError: it leaves the beginning out, and the base has seen no text without one.
    """
    try:
        begin = begin_token(tokenizer)
        left_out = begin is not None and render(tokenizer, SAMPLE)[:1] != [begin]
    except (RowProblem, DataError):  # what a template refuses is told of the row that it refuses
        return
    if left_out:
        token = tokenizer.convert_ids_to_tokens(begin)
        raise RecipeError(
            f"the tokenizer of the base begins texts with {token!r}, and its chat template leaves that out: use a "
            "copy of the base whose chat template begins with {{ bos_token }}"
        )


def refuse_second_beginning(sequences: Iterable[Sequence[int]], begin: int | None, tokenizer: Any) -> None:
    """Refuse a row in which a text begins again, as when it holds the token as text; see `begin_token`.

    Raises:
        RowProblem: with the position of the token that should not be there.
    """
    for ids in sequences:
        if begin is not None and begin in ids[1:]:
            at = list(ids).index(begin, 1)
            token = tokenizer.convert_ids_to_tokens(begin)
            raise RowProblem(f"the token {token!r}, with which a text begins, stands inside it (at token {at})")
