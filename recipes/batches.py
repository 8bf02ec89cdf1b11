"""Which examples an optimiser step sees, and how they are cut into forward passes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from .tasks import Example

__all__ = ["Plan", "micro_batches", "resolve_micro_batch"]

TOKENS_PER_PASS = 4096  # what `micro_batch: auto` aims at; padded tokens of one forward pass


@dataclass(frozen=True)
class Plan:
    """The order of examples: one permutation an epoch, cut into windows of `effective_batch`; the last may be short.

    A step's window follows from its number alone, so a resumed run sees exactly the examples it would have seen.
    """

    examples: int
    effective_batch: int
    seed: int

    @property
    def windows_per_epoch(self) -> int:
        """Optimiser steps an epoch, the short tail included."""
        return -(-self.examples // self.effective_batch)

    def window(self, step: int) -> list[int]:
        """Indices of the examples of optimiser step `step`, counted from 0."""
        epoch, place = divmod(step, self.windows_per_epoch)
        order = _permutation(self.examples, self.seed, epoch)
        return order[place * self.effective_batch : (place + 1) * self.effective_batch]

    def epoch(self, step: int) -> float:
        """How many passes over the data are done after `step` steps."""
        whole, place = divmod(step, self.windows_per_epoch)
        return whole + min(place * self.effective_batch / self.examples, 1.0)


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def micro_batches(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Cut a window into forward passes, longest first: little padding, and memory runs out at once or never."""
    ordered = sorted(examples, key=lambda example: (-len(example.ids), example.row))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def resolve_micro_batch(micro_batch: int | str, effective_batch: int, longest: int) -> int:
    """Examples per forward pass; `auto` takes as many as make 4,096 padded tokens."""
    wanted = TOKENS_PER_PASS // longest if isinstance(micro_batch, str) else micro_batch
    return max(1, min(wanted, effective_batch))
