"""What the reference model says of examples: asked once of each, where it says the same in every batch."""

from collections.abc import Sequence

import torch

from .evaluation import Refer
from .tasks import Batch, Example, Task

__all__ = ["References"]


class References:
    """Answers of the reference model, by example; epochs after the first one find them here.

    An answer is remembered as it was given beside the others of its batch. A run that goes on asks in the same batches
    again, so that it has the same bits.
    """

    def __init__(self, task: Task, refer: Refer, *, examples: int, again: bool) -> None:
        """Args:
        examples: how many there are.
        again: whether the run sees one of them twice.
        """
        self.remembers = again and task.refers() and task.refers_once()
        self._refer, self._examples = refer, examples
        self._known: dict[int, dict[str, list[float]]] = {}

    @property
    def complete(self) -> bool:
        """Whether nothing is left to ask."""
        return not self.remembers or len(self._known) == self._examples

    def __call__(self, examples: Sequence[Example], batch: Batch) -> Batch:
        """A batch of these examples, with what the reference model says of it."""
        if not self.remembers:
            return batch | self._refer(batch)
        if all(example.row in self._known for example in examples):
            return batch | self._recalled(examples, batch)
        said = self._refer(batch)
        for i, example in enumerate(examples):
            self._known[example.row] = {name: answer[i :: len(examples)].tolist() for name, answer in said.items()}
        return batch | said

    def _recalled(self, examples: Sequence[Example], batch: Batch) -> Batch:
        known, device = [self._known[example.row] for example in examples], batch["input_ids"].device
        return {
            name: torch.tensor([own[name] for own in known], device=device).T.flatten()  # those of all, then the next
            for name in known[0]
        }
