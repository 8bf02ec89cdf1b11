"""`reward`: a model that gives a completion one number, larger for the better of two.

One row: {"prompt": [{"role": "user", "content": "Capital of France?"}], "chosen": [{"role": "assistant", "content":
"Paris."}], "rejected": [{"role": "assistant", "content": "Lyon."}], "margin": 1.0}, the margin being optional. Texts
in place of messages, and whole conversations: see pairs.py.

The model is a sequence classifier with one output, whose head is trained and saved with the adapter.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from onegpu.adapters import DataError

from .contract import (
    IGNORED,
    Batch,
    Direction,
    Example,
    Labels,
    Objective,
    Reader,
    Row,
    RowProblem,
    Task,
    attention_mask,
    model_inputs,
    padded,
)
from .pairs import Continued, PairExample, Said, continued, fitted, pair_scores, read_pair, reward_directions
from .texts import token_ids

__all__ = ["Reward", "RewardExample"]


@dataclass(frozen=True)
class RewardExample(PairExample):
    """The chosen sequence and the rejected one. Its one label says that there is one comparison."""

    margin: float = 0.0  # by how much the chosen is better


class Reward(Task):
    """Train a reward model on pairs (Bradley and Terry)."""

    api = 1
    version: ClassVar[int] = 2
    kind = "sequence-classification"
    has_head = True
    example = RewardExample
    needs = ("chosen", "rejected")
    optional = ("prompt", "margin", "tools")

    centre: float = Field(default=0.0, ge=0)
    """Coefficient of (reward of the chosen + reward of the rejected)², which keeps rewards near 0; 0.01 is usual."""

    too_long: Literal["error", "drop", "cut-left"] = "error"
    """What to do above `max_length`; `cut-left` cuts the prompt from its left, never a completion."""

    def measures(self) -> dict[str, Direction]:
        """How often the chosen has the larger reward, and by how much."""
        return {"accuracy": "higher", "margin": "higher", "loss": "lower"}

    def directions(self, labels: Labels) -> dict[str, Direction]:
        return super().directions(labels) | reward_directions("chosen", "rejected")

    def labels(self, rows: Iterable[Row]) -> Labels:
        """One output."""
        return ["reward"]

    def encode(self, number: int, row: Row, reader: Reader) -> Sequence[RewardExample]:
        prompt, chosen, rejected = read_pair(row)
        both = [_sequence(prompt, completion, reader) for completion in (chosen, rejected)]
        (first, second), cut = fitted(both, reader, self.too_long)
        return [RewardExample(number, first.ids, [0], cut, second.ids, margin=_margin(row))]

    def collate(self, examples: Sequence[Example], pad: int) -> Batch:
        """(2 · batch, tokens): the chosen ones, then the rejected; `margin` (batch,)."""
        assert all(isinstance(example, RewardExample) for example in examples)
        pairs = [example for example in examples if isinstance(example, RewardExample)]
        sequences = [*(Example(e.row, e.ids, []) for e in pairs), *(Example(e.row, e.other_ids, []) for e in pairs)]
        return {
            "input_ids": padded([sequence.ids for sequence in sequences], pad),
            "attention_mask": attention_mask(sequences),
            "margin": torch.tensor([e.margin for e in pairs]),
        }

    def objective(self, model: nn.Module, batch: Batch) -> Objective:
        """-log σ(r_w - r_l - margin) + centre · (r_w + r_l)², summed over the pairs; the weight is how many there are.

        Equation 2 of https://arxiv.org/abs/2307.09288, and equation 2 of https://arxiv.org/abs/2312.09244 for `centre`.
        """
        rewards = model(**model_inputs(batch)).logits.float().squeeze(-1)  # (2 · batch,)
        chosen, rejected = rewards.chunk(2)
        losses = -F.logsigmoid(chosen - rejected - batch["margin"]) + self.centre * (chosen + rejected) ** 2

        def outcomes() -> Sequence[tuple[float, float]]:
            return list(zip(chosen.detach().tolist(), rejected.detach().tolist(), strict=True))

        return Objective(losses.sum(), float(len(losses)), outcomes)

    def scores(self, outcomes: Sequence[Any], answers: Sequence[Any], reader: Reader) -> dict[str, float]:
        return pair_scores(outcomes)

    def classes_of(self, example: Example) -> Sequence[int]:
        """None: its one output is no class."""
        return ()

    def explain(self, example: Example, reader: Reader) -> list[tuple[str, str | None]]:
        assert isinstance(example, RewardExample)
        both = ((example.ids, "chosen"), (example.other_ids, "rejected"))
        return [(reader.tokenizer.decode(ids), mark) for ids, mark in both]


def _sequence(prompt: Said, completion: Said, reader: Reader) -> Continued:
    """Rendered by the chat template, or as plain texts; for an encoder, texts are a pair as its tokenizer writes it."""
    tokenizer = reader.tokenizer
    if tokenizer.cls_token_id is None or not isinstance(prompt, str) or not isinstance(completion, str):
        return continued(prompt, completion, reader)
    ids = list(tokenizer(prompt, completion)["input_ids"])
    inner = token_ids(tokenizer, prompt)
    lead = int(ids[:1] == [tokenizer.cls_token_id])
    if ids[lead : lead + len(inner)] != inner:
        raise DataError("the tokenizer writes a text in another way where a second one follows: use messages")
    return Continued(ids, [IGNORED] * len(ids), lead + len(inner), lead)


def _margin(row: Row) -> float:
    margin = row.get("margin")
    try:
        found = 0.0 if margin is None else float(margin)  # numbers of a .csv file are texts
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(margin, bool) or not math.isfinite(found):
        raise RowProblem("`margin` must be a number")
    return found
