"""The contract between the loop and a task.

A task turns rows into examples, examples into batches, and a batch into a *sum* of losses and the *weight* that the sum
is divided by. The loop adds up both over a whole window, so the split into micro-batches never changes the gradient.

    labels, class_weights   once, from the training rows
    encode                  a row to examples
    prepare                 the examples of a window, as they are this time (masks drawn anew)
    collate                 examples to a batch
    at_work                 around what follows, for each batch
    refer                   what the reference model says of it (preference, distillation)
    survey                  sums over the window that the loss of each batch needs (KTO)
    objective               the loss, and what evaluation collects
    answer, scores          evaluation: by generation, and what all of it comes to
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from onegpu.adapters.base import Kind
from onegpu.adapters.segment_layout import Segments

from ..data.sources import Source

__all__ = [
    "Batch",
    "Direction",
    "Example",
    "Labels",
    "Objective",
    "Predictions",
    "PredictiveTask",
    "Reader",
    "Row",
    "RowProblem",
    "Task",
    "TooLong",
    "Traits",
    "model_inputs",
]

Row = Mapping[str, Any]
Batch = dict[str, Tensor]
Labels = Sequence[str] | None
Direction = Literal["higher", "lower"]
TooLong = Literal["error", "drop", "cut-left", "cut-right", "window"]
Meaning = Literal["class", "classes", "number"]

IGNORED = -100  # a label that carries no loss; torch's own convention
INPUTS = (
    *("input_ids", "attention_mask", "position_ids", "token_type_ids"),
    *("decoder_input_ids", "decoder_attention_mask"),
)
SEGMENTS = {name: f"segment_{name}" for name in Segments._fields}  # in a batch that is packed


class RowProblem(ValueError):
    """A row that cannot be used, and why. It is counted, listed, and above a share refused."""


@dataclass(frozen=True)
class Example:
    """One row, or one window of a long row, tokenised. A task may add fields: numbers, texts, and lists of them."""

    row: int  # its number in the data, for messages
    ids: list[int]
    labels: list[int]  # one per token with IGNORED where nothing is supervised; or classes
    cut: int = 0  # tokens of the row that were left out because it is too long

    @property
    def supervised(self) -> int:
        """How many labels carry loss."""
        return sum(label != IGNORED for label in self.labels)

    @property
    def sequences(self) -> Sequence[Sequence[int]]:
        """What the model reads, each by itself."""
        return (self.ids,)

    @property
    def size(self) -> int:
        """Tokens that pass through the model."""
        return len(self.ids)


@dataclass(frozen=True)
class Reader:
    """What a row is read with."""

    tokenizer: Any
    limit: int  # longest example, in tokens
    stops: frozenset[int] = frozenset()  # tokens at which generation ends
    labels: Labels = None
    class_weights: Sequence[float] | None = None  # one per label


@dataclass(frozen=True)
class Objective:
    """The loss of a batch as a sum, what to divide it by, and what an evaluation collects of it."""

    total: Tensor  # scalar, with gradient
    weight: float
    outcomes: Callable[[], Sequence[Any]] = tuple  # plain values, never logits; only called by evaluations


@dataclass(frozen=True)
class Predictions:
    """What a model says wherever something is supervised, and what is right."""

    logits: Tensor  # (supervised, outputs), float32
    targets: Tensor  # (supervised,); (supervised, outputs) of 0 and 1 where any number of classes is right
    rows: Tensor  # (supervised,): the row of the batch that each belongs to
    meaning: Meaning = "class"  # one of the outputs (softmax), each by itself (sigmoid), or the only output is a number
    weights: Tensor | None = None  # (supervised,): what each counts; all alike when left out


class Traits(NamedTuple):
    """What the rest of the code must know of a task, once its settings are."""

    example: type[Example]
    version: int
    has_head: bool
    needs: tuple[str, ...]
    optional: tuple[str, ...]
    paths: tuple[str, ...]  # settings that may be paths; relative ones start at the recipe's folder


class Task(BaseModel, ABC):
    """Base class of all tasks: its fields are the settings under `task:` in a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    api: ClassVar[int] = 0  # each task states the level it was written for
    kind: ClassVar[Kind]  # of model; see also `model_kind`
    example: ClassVar[type[Example]] = Example  # what `encode` makes
    version: ClassVar[int] = 1  # of what `encode` does: a change of it makes stored examples stale
    has_head: ClassVar[bool] = False  # brings a head of its own that is trained
    needs: ClassVar[tuple[str, ...]]  # columns of a row
    optional: ClassVar[tuple[str, ...]] = ()  # columns that are used where they are there

    data: str | list[Source]
    """A file, a folder of texts per class, `sample:NAME`, `package:NAME/path`, `hub:ID@REVISION`; or several."""

    evaluation: float | str = 0.1
    """What is held out to watch the training: a share of the rows, rows of its own (as under `data`), or `none`."""

    test: float | str = "none"
    """What is scored once, at the end: a share of the rows, rows of its own (as under `data`), or `none`."""

    limit: int | None = Field(default=None, ge=1)
    """Use the first so many rows only."""

    columns: dict[str, str] = {}
    """Names of columns in the data, where they differ: `{text: headline}`; or templates: `{prompt: "Say: {text}"}`."""

    tolerate: float = Field(default=0.05, ge=0, lt=1)
    """Share of rows that may be unusable. They are counted and listed; more is an error."""

    max_length: int | None = Field(default=None, ge=2)
    """Longest example in tokens; what the model can take when left out."""

    # --- what it is ---------------------------------------------------------------------------------------------------

    @classmethod
    def facts(cls) -> dict[str, Any]:
        """What `onegpu tasks` says of the task, before any setting is known."""
        return {"model": cls.kind, "columns": ", ".join(cls.needs), "own head": cls.has_head}

    def traits(self) -> Traits:
        """What is declared above; for a task whose settings decide it, too. Read this, not the declarations."""
        paths = ("data", "evaluation", "test")
        return Traits(self.example, self.version, self.has_head, self.needs, self.optional, paths)

    # --- before training ----------------------------------------------------------------------------------------------

    def model_kind(self) -> Kind:
        """Which head the base has; for a task whose settings decide it."""
        return self.kind

    def measures(self) -> dict[str, Direction]:
        """The scores that a reader looks at, most important first, and which way is better."""
        return {"loss": "lower"}

    def directions(self, labels: Labels) -> dict[str, Direction]:
        """Every score of an evaluation by which a run may be judged, and which way is better; `measures` come first.

        Args:
            labels: names of the classes, for a task that scores each; None where they are not known yet.
        """
        return {**self.measures(), "loss": "lower"}

    def labels(self, rows: Iterable[Row]) -> Labels:
        """Names of the classes, for a task that has them."""
        return None

    def class_weights(self, rows: Iterable[Row], labels: Sequence[str]) -> Sequence[float] | None:
        """What each class counts in the loss; None for all alike."""
        return None

    def stratum(self, row: Row) -> str | None:
        """What a split keeps in proportion, such as the class."""
        return None

    def smallest_batch(self) -> int:
        """How many examples a step needs at least."""
        return 1

    def check(self, reader: Reader) -> None:
        """Refuse a base whose tokenizer cannot do what the task needs.

        Raises:
            RecipeError: it cannot; the message says what is missing.
        """

    @abstractmethod
    def encode(self, number: int, row: Row, reader: Reader) -> Sequence[Example]:
        """Tokenise one row, into several examples where it is cut into windows; `number` is for messages.

        Raises:
            RowProblem: the row cannot be used; it is dropped and listed.
            DataError: the data set cannot be used.
        """

    # --- a step -------------------------------------------------------------------------------------------------------

    def suited(
        self, model: nn.Module, example: Example, *, longest: int, pad: int, packing: bool
    ) -> tuple["Task", str]:
        """The task as this model is trained on it, and a line about it, for one that is quicker on some models.

        Called once, with the adapters attached and in evaluation mode. What it computes must not depend on it but for
        rounding.

        Args:
            example: one to try.
            longest: tokens of the longest one.
            packing: whether every adapter keeps apart what is packed into one row.
        """
        return self, ""

    @property
    def packs(self) -> bool:
        """Whether its batches are rows of as many examples as fit, without padding."""
        return False

    def at_work(self, model: nn.Module) -> AbstractContextManager[None]:
        """Entered around the forward and the backward pass of a batch, for a task that changes how a model attends."""
        return nullcontext()

    def prepare(self, window: Sequence[Example], seed: int) -> Sequence[Example]:
        """The examples of a window as they are trained on this time; `seed` is the window's own."""
        return window

    @abstractmethod
    def collate(self, examples: Sequence[Example], pad: int) -> Batch:
        """Examples padded on the right to one batch."""

    def refers(self) -> bool:
        """Whether its loss needs `refer`."""
        return False

    def teacher_folder(self) -> str | None:
        """The run or adapter folder of the reference model; None where it is the base without adapters."""
        return None

    def refer(self, model: nn.Module, batch: Batch) -> Batch:
        """What the reference model (the base without adapters, or a teacher) says; joined to the batch. No gradient."""
        return {}

    def refers_once(self) -> bool:
        """Whether that is the same in every batch: then it is asked in the first epoch, and remembered for the others.

        A row makes one example then, and `refer` gives float32 tensors of (k · batch,) numbers: those of example i of
        the batch are number i, i + batch, and so on.
        """
        return False

    def surveys(self) -> int:
        """How many statistics of the whole window its loss needs."""
        return 0

    def survey(self, model: nn.Module, batch: Batch) -> Tensor:  # (statistics,) float64
        """Sums that are added up over the whole window and joined to each of its batches as `window`. No gradient."""
        raise NotImplementedError

    @abstractmethod
    def objective(self, model: nn.Module, batch: Batch) -> Objective:
        """Run the model on a batch."""

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def answer(self, model: nn.Module, examples: Sequence[Example], reader: Reader) -> Sequence[Any]:
        """What the model generates for held-out examples, for a task that is scored by it."""
        return ()

    def scores(self, outcomes: Sequence[Any], answers: Sequence[Any], reader: Reader) -> dict[str, float]:
        """Scores of an evaluation, from the outcomes of its batches and from `answer`."""
        return {}

    def details(self, outcomes: Sequence[Any], answers: Sequence[Any], reader: Reader) -> dict[str, Any]:
        """What does not fit into a number (a confusion matrix), as JSON."""
        return {}

    def demonstrate(self, model: nn.Module, reader: Reader, row: Row) -> tuple[str, str] | None:
        """(question, answer) for people to look at, or None."""
        return None

    def classes_of(self, example: Example) -> Sequence[int]:
        """The classes that an example teaches, by number, for a task that has labels.

        They are counted, and a run is judged by the score of a class only where held-out rows have it.
        """
        return [label for label in example.labels if label != IGNORED]

    def explain(self, example: Example, reader: Reader) -> list[tuple[str, str | None]]:
        """An example as text for people: pieces, each with what is learned of it; None for context only.

        What is learned is the text itself where nothing else is said of it, as "".
        """
        if len(example.labels) != len(example.ids):
            classes = [(reader.labels or ())[label] for label in self.classes_of(example)]
            return [(reader.tokenizer.decode(example.ids), ", ".join(classes) or None)]
        runs = itertools.groupby(zip(example.ids, example.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
        return [(reader.tokenizer.decode([i for i, _ in run]), "" if learned else None) for learned, run in runs]

    def probe(self, example: Example, tokens: int) -> dict[str, list[int]]:
        """A short input of the model made from an example, to compare models by their logits."""
        return {"input_ids": example.ids[:tokens]}


class PredictiveTask(Task):
    """A task whose loss follows from the logits where something is supervised, so that they can be learned from.

    In place of `objective`, it defines `predictions` and `judge`.
    """

    @abstractmethod
    def predictions(self, model: nn.Module, batch: Batch) -> Predictions:
        """Run the model on a batch."""

    @abstractmethod
    def judge(self, found: Predictions, batch: Batch) -> Objective:
        """The loss of what the model says; its weight is the sum of what the predictions count, or a multiple."""

    def objective(self, model: nn.Module, batch: Batch) -> Objective:
        return self.judge(self.predictions(model, batch), batch)


def model_inputs(batch: Batch) -> dict[str, Any]:
    """The part of a batch that goes into the model; of a packed one also which tokens belong together."""
    inputs: dict[str, Any] = {name: batch[name] for name in INPUTS if name in batch}
    if SEGMENTS["queries"] in batch:
        inputs["segments"] = Segments(*(batch.get(name) for name in SEGMENTS.values()))  # type: ignore[arg-type]
    return inputs


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:  # (batch, longest)
    """Sequences of unequal length as one tensor, filled on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def attention_mask(examples: Sequence[Example]) -> Tensor:  # (batch, longest)
    """1 for a token, 0 for padding; by length, since a padding id may also be a real token's."""
    return padded([[1] * len(example.ids) for example in examples], 0)
