"""Evaluation that leaves no trace: sums over examples, independent of how they are batched."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onegpu.adapters import Stack

from .data.batches import Cut
from .tasks import Batch, Example, Objective, Reader, Task

__all__ = ["Evaluator", "Finding", "evaluating", "on_device", "plainly", "reference", "shown", "surveyed"]

Refer = Callable[[Batch], Batch]  # what the reference model says of a batch


@dataclass(frozen=True)
class Finding:
    """What an evaluation came to."""

    scores: dict[str, float]
    details: dict[str, Any]  # what does not fit into a number, as JSON


@dataclass(frozen=True)
class Evaluator:
    """Everything that an evaluation needs beside the model and the examples."""

    task: Task
    reader: Reader
    pad: int
    cut: Cut  # a window into forward passes
    window: int  # examples that are prepared and surveyed together, as a step of training does
    autocast: torch.autocast
    refer: Refer

    def __call__(self, model: nn.Module, examples: Sequence[Example], *, details: bool = False) -> Finding:
        """Loss and the task's scores over all examples; the model's mode and the random state are left as they were.

        Only plain values are kept of a batch, never logits, so memory hardly grows with the number of examples.
        """
        total, weight = 0.0, 0.0
        outcomes: list[Any] = []
        with evaluating(model), torch.random.fork_rng(), self.autocast:
            for objective in self._objectives(model, examples):
                total += objective.total.item()
                weight += objective.weight
                outcomes += objective.outcomes()
            answers = self.task.answer(model, examples, self.reader)
        scores = {"loss": total / weight, **self.task.scores(outcomes, answers, self.reader)}
        return Finding(scores, self.task.details(outcomes, answers, self.reader) if details else {})

    def _objectives(self, model: nn.Module, examples: Sequence[Example]) -> Iterator[Objective]:
        device = next(model.parameters()).device
        for start in range(0, len(examples), self.window):
            window = self.task.prepare(examples[start : start + self.window], start)
            batches = (self.task.collate(chunk, self.pad) for chunk in self.cut(window))
            ready = (batch | self.refer(batch) for batch in (on_device(batch, device) for batch in batches))
            for batch in surveyed(self.task, model, ready, autocast=self.autocast):
                with self.task.at_work(model):
                    objective = self.task.objective(model, batch)
                yield objective


def surveyed(
    task: Task,
    model: nn.Module,
    batches: Iterator[Batch],
    *,
    autocast: torch.autocast,
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> Iterator[Batch]:
    """The batches of a window, each with the statistics of the whole window where the task wants them.

    Args:
        reduce: adds up what several processes found.
    """
    if not task.surveys():
        yield from batches
        return
    held = list(batches)  # they pass through the model twice
    total = torch.zeros(task.surveys(), dtype=torch.float64, device=next(model.parameters()).device)
    with evaluating(model), autocast, task.at_work(model):
        for batch in held:
            total += task.survey(model, batch)
    total = reduce(total)
    for batch in held:
        yield batch | {"window": total}


def reference(task: Task, stack: Stack, autocast: torch.autocast) -> Refer:
    """What the base without its adapters says of a batch, where the task wants to know."""

    def refer(batch: Batch) -> Batch:
        if not task.refers():
            return {}
        with stack.base_only(), evaluating(stack.model), autocast, task.at_work(stack.model):
            return task.refer(stack.model, batch)

    return refer


def plainly() -> AbstractContextManager[object]:
    """Layers that are compiled for training run as they are inside the block, where hooks see their modules."""
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradient and evaluation mode inside the block; afterwards each module is in the mode it was in.

    Layers that are compiled for training run as they are.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), plainly():
            yield
    finally:
        for module in training:
            module.training = True


def shown(task: Task, scores: Mapping[str, float]) -> list[str]:
    """The scores that a reader looks at: the loss, and those that the task names."""
    return [name for name in dict.fromkeys(("loss", *task.measures())) if name in scores]


def on_device(batch: Mapping[str, Tensor], device: torch.device) -> Batch:
    """A batch on the device that computes it."""
    return {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
