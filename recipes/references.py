"""What the reference model says of examples: asked once of each, where it says the same in every batch."""

from collections.abc import Sequence

import torch

from onegpu.adapters import PluginError

from .evaluation import Refer
from .tasks import Batch, Example, Task

__all__ = ["References"]


class References:
    """Answers of the reference model, by example; epochs after the first one find them here.

    An answer is remembered as it was given beside the others of its batch. A run that goes on asks in the same batches
    again, so that it has the same bits. Each process of several remembers what itself asked.
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
        self._remember(examples, said)
        return batch | said

    def _remember(self, examples: Sequence[Example], said: Batch) -> None:
        for name, answer in said.items():
            if answer.dim() != 1 or len(answer) % len(examples) or answer.dtype != torch.float32:
                raise PluginError(
                    f"the task says `refers_once`, and `refer` gives {list(answer.shape)} of {answer.dtype} as {name!r}"
                    f" for {len(examples)} examples: it must be so many float32 numbers, or a multiple"
                )
            for example, own in zip(examples, answer.view(-1, len(examples)).T.tolist(), strict=True):
                self._known.setdefault(example.row, {})[name] = own

    def _recalled(self, examples: Sequence[Example], batch: Batch) -> Batch:
        known, device = [self._known[example.row] for example in examples], batch["input_ids"].device
        return {
            name: torch.tensor([own[name] for own in known], device=device).T.flatten()  # those of all, then the next
            for name in known[0]
        }
