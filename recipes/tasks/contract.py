"""The contract between the loop and a task.

A task turns rows into examples, examples into batches, and a batch into a *sum* of losses and the *weight* that the sum
is divided by. The loop adds up both over a whole window, so the split into micro-batches never changes the gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from onegpu.adapters.base import Kind

__all__ = ["Batch", "Example", "Labels", "Objective", "Reader", "Row", "RowProblem", "Task"]

Row = Mapping[str, Any]
Batch = dict[str, Tensor]
Labels = Sequence[str] | None

IGNORED = -100  # a label that carries no loss; torch's own convention


class RowProblem(ValueError):
    """A row that cannot be used, and why. It is counted, listed, and above a share refused."""


@dataclass(frozen=True)
class Example:
    """One row, tokenised."""

    row: int  # its number in the data, for messages
    ids: list[int]
    labels: list[int]  # one per token with IGNORED where nothing is supervised, or a single class

    @property
    def supervised(self) -> int:
        """How many labels carry loss."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class Reader:
    """What a row is read with."""

    tokenizer: Any
    limit: int  # longest example, in tokens
    stops: frozenset[int] = frozenset()  # tokens at which generation ends
    labels: Labels = None


@dataclass(frozen=True)
class Objective:
    """The loss of a batch as a sum, what to divide it by, and what else was counted."""

    total: Tensor  # scalar, with gradient
    weight: float
    counts: dict[str, float] = field(default_factory=dict)


class Task(BaseModel, ABC):
    """Base class of all tasks: its fields are the settings under `task:` in a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    api: ClassVar[int] = 0  # each task states the level it was written for
    kind: ClassVar[Kind]  # of model
    has_head: ClassVar[bool] = False  # brings a head of its own that is trained
    needs: ClassVar[tuple[str, ...]]  # columns of a row
    better: ClassVar[tuple[str, str]] = ("loss", "lower")  # the score a reader looks at first

    data: str
    """A .jsonl, .csv or .parquet file, `sample:NAME`, or `hub:ID@REVISION`."""

    evaluation: float | str = Field(default=0.1)
    """A share of the rows, a file, or `none`."""

    limit: int | None = Field(default=None, ge=1)
    """Use the first so many rows only."""

    columns: dict[str, str] = {}
    """What the columns are called in the data, where they differ: `{text: headline}`."""

    max_length: int | None = Field(default=None, ge=2)
    """Longest example in tokens; what the model can take when left out."""

    def labels(self, rows: Sequence[Row]) -> Labels:
        """Names of the classes, for a task that has them."""
        return None

    @abstractmethod
    def encode(self, number: int, row: Row, reader: Reader) -> Example:
        """Tokenise one row; `number` is for messages.

        Raises:
            RowProblem: the row cannot be used; it is dropped and listed.
            DataError: the data set cannot be used.
        """

    @abstractmethod
    def collate(self, examples: Sequence[Example], pad: int) -> Batch:
        """Examples padded on the right to one batch."""

    @abstractmethod
    def objective(self, model: nn.Module, batch: Batch) -> Objective:
        """Run the model on a batch."""

    def scores(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Scores from counts that were added up over an evaluation."""
        return {}

    def demonstrate(self, model: nn.Module, reader: Reader, row: Row) -> tuple[str, str] | None:
        """(question, answer) for people to look at, or None."""
        return None


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:  # (batch, longest)
    """Sequences of unequal length as one tensor, filled on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def attention_mask(examples: Sequence[Example]) -> Tensor:  # (batch, longest)
    """1 for a token, 0 for padding; by length, since a padding id may also be a real token's."""
    return padded([[1] * len(example.ids) for example in examples], 0)
