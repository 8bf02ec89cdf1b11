"""`language-modelling`: go on learning a language, or a subject, from plain text.

One row: {"text": "Ad sales boost Time Warner profit. Quarterly profits at the media giant jumped 76% to $1.13bn ..."}

A causal model learns each next token; an encoder learns the tokens that are hidden from it, as BERT did
(https://arxiv.org/abs/1810.04805, section 3.1): of the hidden ones 80 % are written over with the mask token, 10 % with
a random token, 10 % stay as they are, and all of them are to be found.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, cast

from pydantic import Field, model_validator
from torch import nn

from onegpu.adapters import RecipeError
from onegpu.adapters.base import Kind

from .causal import pieces
from .contract import (
    IGNORED,
    Batch,
    Direction,
    Example,
    Objective,
    Predictions,
    PredictiveTask,
    Reader,
    Row,
    RowProblem,
    TooLong,
)
from .lengths import fit, refuse_too_long
from .packing import PackedTask
from .texts import around, end_of, read_text, token_ids
from .tokens import causal_logits, own_logits, token_objective, token_scores

__all__ = ["LanguageModelling", "MaskableExample"]

POLICIES: tuple[TooLong, ...] = ("error", "drop", "cut-left", "cut-right", "window")
MASKED, RANDOM = 0.8, 0.1  # of the hidden tokens; the rest stay as they are


@dataclass(frozen=True)
class MaskableExample(Example):
    """Text of which tokens may be hidden: those that have a label."""

    mask: int = 0  # the mask token
    vocabulary: int = 0  # how many tokens there are to draw a random one from


class LanguageModelling(PackedTask, PredictiveTask):
    """Train on plain text."""

    api = 1
    kind = "causal-lm"
    example = MaskableExample
    needs = ("text",)

    predict: Literal["next", "masked"] = "next"
    """Each next token (causal models), or tokens that are hidden (encoders)."""

    masked_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens that are hidden, drawn anew each time; at least one. Only read by `predict: masked`."""

    too_long: TooLong = "window"
    """What to do with a text above `max_length`; windows overlap by a quarter, and learn each token once."""

    @model_validator(mode="after")
    def _masks(self) -> Self:
        if self.predict == "next" and self.masked_share != type(self).model_fields["masked_share"].default:
            raise ValueError("`masked_share` is for `predict: masked`; `predict: next` would ignore it")
        return self

    def model_kind(self) -> Kind:
        return "causal-lm" if self.predict == "next" else "masked-lm"

    def measures(self) -> dict[str, Direction]:
        return {"perplexity": "lower", "token_accuracy": "higher", "loss": "lower"}

    def encode(self, number: int, row: Row, reader: Reader) -> Sequence[Example]:
        text = token_ids(reader.tokenizer, read_text(row, "text"))
        if self.predict == "next":
            return self._causal(number, text, reader)
        return self._maskable(number, text, reader)

    def _causal(self, number: int, text: list[int], reader: Reader) -> Sequence[Example]:
        """A text between the beginning token, where the tokenizer adds one, and the end token."""
        before, _ = around(reader.tokenizer)
        end = end_of(reader.tokenizer)
        ids = [*before * (text[: len(before)] != before), *text, *[end] * (text[-1:] != [end])]
        found = pieces(number, ids, ids, reader, self.too_long, POLICIES)
        return [MaskableExample(number, *piece) for piece in found]

    def _maskable(self, number: int, text: list[int], reader: Reader) -> Sequence[Example]:
        """Windows of a text, each between the tokenizer's special tokens; a label marks what may be hidden."""
        tokenizer = reader.tokenizer
        if tokenizer.mask_token_id is None:
            raise RecipeError("the base's tokenizer has no mask token: use `predict: next`, or an encoder as the base")
        before, after = around(tokenizer)
        extra = len(before) + len(after)
        room = reader.limit - extra
        if room < 2:
            raise RecipeError(f"max_length is {reader.limit}, which leaves no room between special tokens: raise it")
        refuse_too_long(len(text) + extra, reader.limit, self.too_long, POLICIES)
        special = set(tokenizer.all_special_ids)
        labels = [IGNORED if token in special else token for token in text]
        examples = [
            MaskableExample(
                number,
                [*before, *ids, *after],
                [*[IGNORED] * len(before), *own, *[IGNORED] * len(after)],
                cut,
                tokenizer.mask_token_id,
                len(tokenizer),
            )
            for ids, own, cut in fit(text, labels, room, self.too_long)
        ]
        useful = [example for example in examples if example.supervised]
        if not useful:
            raise RowProblem("no token that could be hidden")
        return useful

    def prepare(self, window: Sequence[Example], seed: int) -> Sequence[Example]:
        if self.predict == "next":
            return window
        # One generator per place in the window: what is hidden does not depend on how the window is batched.
        return [
            hide(example, self.masked_share, random.Random(f"{seed} {place}"))
            for place, example in enumerate(cast(Sequence[MaskableExample], window))
        ]

    def packable(self) -> bool:
        return self.predict == "next"

    def predictions(self, model: nn.Module, batch: Batch) -> Predictions:
        return (causal_logits if self.predict == "next" else own_logits)(model, batch, self._arithmetic)

    def judge(self, found: Predictions, batch: Batch) -> Objective:
        """Summed cross-entropy of the next, or the hidden, tokens; the weight is how many there are."""
        return token_objective(found)

    def scores(self, outcomes: Sequence[Any], answers: Sequence[Any], reader: Reader) -> dict[str, float]:
        """Accuracy and perplexity over next, or hidden, tokens; the two perplexities cannot be compared."""
        return token_scores(outcomes)


def hide(example: MaskableExample, share: float, draw: random.Random) -> MaskableExample:
    """The example with a share of its tokens hidden, and only those labelled."""
    places = [place for place, label in enumerate(example.labels) if label != IGNORED]
    ids, labels = list(example.ids), [IGNORED] * len(example.ids)
    for place in draw.sample(places, max(1, round(share * len(places)))):
        labels[place] = ids[place]
        chance = draw.random()
        if chance < MASKED:
            ids[place] = example.mask
        elif chance < MASKED + RANDOM:
            ids[place] = draw.randrange(example.vocabulary)
    return replace(example, ids=ids, labels=labels)
