"""`distillation`: a task learned from its rows and from what a teacher says of them (https://arxiv.org/abs/1503.02531).

    task:
      distillation:
        data: reviews.csv                                    # what all tasks share stands here
        task: {classification: {class_weight: balanced}}     # what the student learns, with its own settings
        teacher: runs/large                                  # a run or adapter folder, or `base`
        temperature: 2.0
        weight: 0.5

One row: as the task inside has it, {"text": "Ad sales boost Time Warner profit", "label": "business"}

The loss at each supervised place is

    weight · T² · KL(teacher ∥ student) + (1 - weight) · the task's own loss

where both speak at temperature T: softmax(logits / T), or for any number of classes sigmoid(logits / T) of each. T²
keeps the gradient of the first term from shrinking as T grows (section 2.1 of the paper). A predicted number has no
temperature: its term is the squared difference.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from pydantic import Field, PrivateAttr, ValidationError, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from torch import Tensor, nn
from torch.nn import functional as F

from onegpu.adapters import TASKS, PluginError, RecipeError
from onegpu.adapters.base import Kind
from onegpu.adapters.isolation import answerable
from onegpu.adapters.registry import entries, find, load
from onegpu.adapters.specs import split
from onegpu.adapters.validation import Fault, faults

from .chunks import Divergence
from .contract import (
    Batch,
    Direction,
    Example,
    Labels,
    Objective,
    Predictions,
    PredictiveTask,
    Reader,
    Row,
    Task,
    Traits,
)
from .tokens import HiddenPredictions

__all__ = ["BASE", "Distillation", "divergence"]

BASE = "base"  # as the teacher: the base without its adapters
SHARED = frozenset(Task.model_fields)  # settings that stand outside the inner task


class Distillation(Task):
    """Fine-tune on rows and on a teacher's logits at once; for any task of tokens, tags, classes or numbers."""

    api = 1

    task: dict[str, Any]
    """What the student learns: a task's name, or its name with its own settings; `data` and the like stand outside."""

    teacher: str
    """A run or adapter folder whose model is the teacher; or `base`, the base without its adapters (but with the head
    that is trained, where there is one)."""

    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """Logits are divided by it: above 1, what the teacher finds unlikely counts more."""

    weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the teacher's term; the rest is the task's own loss."""

    _inner: PredictiveTask = PrivateAttr()  # as the student is trained on it
    _untried: PredictiveTask = PrivateAttr()  # as any model can say what it predicts, such as the teacher

    @field_validator("task", mode="before", json_schema_input_type=str | dict[str, Any])
    @classmethod
    def _whole(cls, spec: Any) -> dict[str, Any]:
        """The inner task with every setting of its own written out."""
        try:
            name, settings = split(spec, "task")
        except RecipeError as error:
            raise ValueError(str(error).partition(": ")[2].rpartition(", not ")[0]) from None
        inner = _built(name, settings, {"data": "rows"})
        return {name: inner.model_dump(exclude=set(SHARED))}

    def model_post_init(self, context: Any) -> None:
        ((name, settings),) = self.task.items()
        self._inner = self._untried = _built(name, settings, {shared: getattr(self, shared) for shared in SHARED})

    @property
    def inner(self) -> PredictiveTask:
        """What the student learns. Settings that all tasks share are never read from it, only from outside."""
        return self._inner

    # --- the distillation ---------------------------------------------------------------------------------------------

    def refers(self) -> bool:
        return True

    def teacher_folder(self) -> str | None:
        return None if self.teacher == BASE else self.teacher

    def refer(self, model: nn.Module, batch: Batch) -> Batch:
        """`teacher`: (supervised, outputs) logits, in the order in which the student's are judged."""
        return {"teacher": self._untried.predictions(model, batch).logits}

    def objective(self, model: nn.Module, batch: Batch) -> Objective:
        """The two terms as sums over the same places; the weight is that of the inner task."""
        found = self.inner.predictions(model, batch)
        own = self.inner.judge(found, batch)
        apart = divergence(batch["teacher"], found, self.temperature)
        scale = 1.0 if found.meaning == "number" else self.temperature**2
        total = self.weight * scale * apart + (1 - self.weight) * own.total
        return Objective(total, own.weight, own.outcomes)

    # --- all else is the inner task's ---------------------------------------------------------------------------------

    @classmethod
    def facts(cls) -> dict[str, Any]:
        return dict.fromkeys(("model", "columns", "own head"), "as the task inside")

    def traits(self) -> Traits:
        inner = self.inner.traits()
        return inner._replace(paths=inner.paths if self.teacher == BASE else (*inner.paths, "teacher"))

    def model_kind(self) -> Kind:
        return self.inner.model_kind()

    def measures(self) -> dict[str, Direction]:
        return self.inner.measures()

    def directions(self, labels: Labels) -> dict[str, Direction]:
        return self.inner.directions(labels)

    def labels(self, rows: Iterable[Row]) -> Labels:
        return self.inner.labels(rows)

    def class_weights(self, rows: Iterable[Row], labels: Sequence[str]) -> Sequence[float] | None:
        return self.inner.class_weights(rows, labels)

    def stratum(self, row: Row) -> str | None:
        return self.inner.stratum(row)

    def check(self, reader: Reader) -> None:
        self.inner.check(reader)

    def encode(self, number: int, row: Row, reader: Reader) -> Sequence[Example]:
        return self.inner.encode(number, row, reader)

    def suited(self, model: nn.Module, example: Example, *, longest: int, pad: int, packing: bool) -> tuple[Task, str]:
        """As the inner task is; packed where teacher and student are one model."""
        packing = packing and self.teacher == BASE
        inner, remark = self.inner.suited(model, example, longest=longest, pad=pad, packing=packing)
        assert isinstance(inner, PredictiveTask), type(inner)
        task = self.model_copy()
        task._inner = inner
        return task, remark

    @property
    def packs(self) -> bool:
        return self.inner.packs

    def at_work(self, model: nn.Module) -> AbstractContextManager[None]:
        return self.inner.at_work(model)

    def prepare(self, window: Sequence[Example], seed: int) -> Sequence[Example]:
        return self.inner.prepare(window, seed)

    def collate(self, examples: Sequence[Example], pad: int) -> Batch:
        return self.inner.collate(examples, pad)

    def answer(self, model: nn.Module, examples: Sequence[Example], reader: Reader) -> Sequence[Any]:
        return self.inner.answer(model, examples, reader)

    def scores(self, outcomes: Sequence[Any], answers: Sequence[Any], reader: Reader) -> dict[str, float]:
        return self.inner.scores(outcomes, answers, reader)

    def details(self, outcomes: Sequence[Any], answers: Sequence[Any], reader: Reader) -> dict[str, Any]:
        return self.inner.details(outcomes, answers, reader)

    def demonstrate(self, model: nn.Module, reader: Reader, row: Row) -> tuple[str, str] | None:
        return self.inner.demonstrate(model, reader, row)

    def classes_of(self, example: Example) -> Sequence[int]:
        return self.inner.classes_of(example)

    def explain(self, example: Example, reader: Reader) -> list[tuple[str, str | None]]:
        return self.inner.explain(example, reader)

    def probe(self, example: Example, tokens: int) -> dict[str, list[int]]:
        return self.inner.probe(example, tokens)


def divergence(teacher: Tensor, found: Predictions, temperature: float) -> Tensor:  # scalar
    """What separates student from teacher, summed over places: KL(teacher ∥ student), or a squared difference.

    Args:
        teacher: (supervised, outputs). Tables of one vocabulary may be padded to unlike lengths: what is behind the
            shorter one is no token, and is left out.
        found: what the student says.
    """
    if isinstance(found, HiddenPredictions):
        return found.over(Divergence(teacher, temperature))[:, 0].sum()
    shared = min(teacher.shape[-1], found.logits.shape[-1])
    theirs, ours = teacher[:, :shared] / temperature, found.logits[:, :shared] / temperature
    match found.meaning:
        case "class":
            theirs, ours = theirs.log_softmax(-1), ours.log_softmax(-1)
            apart = theirs.exp() * (theirs - ours)
        case "classes":
            chosen, left = (
                (sign * theirs).sigmoid() * (F.logsigmoid(sign * theirs) - F.logsigmoid(sign * ours))
                for sign in (1, -1)
            )
            apart = chosen + left
        case "number":
            apart = (teacher - found.logits) ** 2
    each = apart.sum(-1)  # (supervised,)
    return (each if found.weights is None else each * found.weights).sum()


def _built(name: str, settings: dict[str, Any], shared: dict[str, Any]) -> PredictiveTask:
    """The inner task.

    Raises:
        PluginError: no such task, or it cannot be taught.
        ValidationError: of its settings; each fault with its path from `task` on.
    """
    entry = find(TASKS, name)
    task_class: type[Task] = load(entry, Task)
    if not issubclass(task_class, PredictiveTask):
        raise ValueError(f"{name} has no logits for each label to learn from; choose one of {', '.join(_teachable())}")
    misplaced = [
        Fault((key,), f"unknown key; {key!r} belongs under `distillation`") for key in settings.keys() & SHARED
    ]
    wrong: list[Fault] = []
    try:
        with answerable(name, entry, "reading its settings", passing=ValidationError):
            inner = task_class.model_validate(settings | shared)
        if not misplaced:
            return inner
    except ValidationError as error:
        wrong = list(faults(error, task_class))
    raise ValidationError.from_exception_data(
        name,
        [
            InitErrorDetails(
                type=PydanticCustomError("inner", "{told}", {"told": fault.message}), loc=(name, *fault.path), input={}
            )
            for fault in sorted(misplaced) + wrong
        ],
    )


def _teachable() -> list[str]:
    """Tasks whose logits can be learned from."""
    names = []
    for entry in entries(TASKS):
        try:
            if issubclass(load(entry, Task), PredictiveTask):
                names.append(entry.name)
        except PluginError:
            continue  # a broken one is no choice
    return names
