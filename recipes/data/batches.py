"""Which examples an optimiser step sees, and how they are cut into forward passes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..tasks.contract import Example
from .order import epoch_length, epoch_order

__all__ = ["Plan", "micro_batches", "resolve_micro_batch"]

TOKENS_PER_PASS = 4096  # what `micro_batch: auto` aims at; padded tokens of one forward pass


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of examples: each epoch is shuffled anew and cut into windows of `effective_batch`.

    A step's window follows from its number alone, so a resumed run sees exactly the examples it would have seen.
    """

    sources: np.ndarray  # (examples,): which source each comes from
    weights: tuple[float, ...]  # of each source
    effective_batch: int
    seed: int

    @property
    def examples(self) -> int:
        """Examples that an epoch sees."""
        return epoch_length(self.sources, self.weights)

    @property
    def windows_per_epoch(self) -> int:
        """Optimiser steps an epoch, the short tail included."""
        return -(-self.examples // self.effective_batch)

    def window(self, step: int) -> list[int]:
        """Indices of the examples of optimiser step `step`, counted from 0."""
        epoch, place = divmod(step, self.windows_per_epoch)
        return self._order(epoch)[place * self.effective_batch : (place + 1) * self.effective_batch]

    def window_seed(self, step: int) -> int:
        """Seed of what is drawn for the examples of a step."""
        return self.seed * 1_000_003 + step

    def epoch(self, step: int) -> float:
        """How many passes over the data are done after `step` steps."""
        whole, place = divmod(step, self.windows_per_epoch)
        return whole + min(place * self.effective_batch / self.examples, 1.0)

    @lru_cache(maxsize=2)  # noqa: B019 (there is one plan a run)
    def _order(self, epoch: int) -> list[int]:
        return epoch_order(self.sources, self.weights, seed=self.seed, epoch=epoch)


def micro_batches(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Cut a window into forward passes, longest first: little padding, and memory runs out at once or never."""
    ordered = sorted(examples, key=lambda example: (-example.size, example.row))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def resolve_micro_batch(micro_batch: int | str, effective_batch: int, longest: int) -> int:
    """Examples per forward pass; `auto` takes as many as make 4,096 padded tokens."""
    wanted = TOKENS_PER_PASS // longest if isinstance(micro_batch, str) else micro_batch
    return max(1, min(wanted, effective_batch))
