"""The order in which an epoch sees the examples, from sources of unequal weight: seeded, equal in every process."""

import hashlib
from collections.abc import Sequence
from math import floor

import numpy as np
import torch

__all__ = ["epoch_length", "epoch_order"]


def epoch_order(sources: Sequence[int] | np.ndarray, weights: Sequence[float], *, seed: int, epoch: int) -> list[int]:
    """Numbers of the examples that an epoch sees, in order.

    A weight of 2 sees each example of its source twice an epoch; one of 2.5 sees each twice and half of them a third
    time, others in every epoch. Every epoch is equally long, so that a step's examples follow from its number.

    Args:
        sources: the source of each example.
        weights: of each source, above 0.
    """
    drawn = torch.from_numpy(_drawn(np.asarray(sources, dtype=np.int64), weights, seed, epoch))
    shuffled = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    order: list[int] = drawn[shuffled].tolist()
    return order


def epoch_length(sources: Sequence[int] | np.ndarray, weights: Sequence[float]) -> int:
    """How many examples `epoch_order` gives."""
    sizes = np.bincount(np.asarray(sources, dtype=np.int64), minlength=len(weights)).tolist()
    copies = map(_copies, sizes, weights)
    return sum(size * whole + more for size, (whole, more) in zip(sizes, copies, strict=True))


def _copies(size: int, weight: float) -> tuple[int, int]:
    """How often every example is seen, and how many are seen once more; a source is never lost to rounding."""
    if not size:
        return 0, 0
    whole = floor(weight)
    more = floor((weight - whole) * size + 0.5)
    return whole, more if whole else max(1, more)


def _drawn(sources: np.ndarray, weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:  # (seen an epoch,)
    """The examples of an epoch, in the order of the data."""
    drawn = [np.empty(0, dtype=np.int64)]
    for source, weight in enumerate(weights):
        own = np.flatnonzero(sources == source)
        whole, more = _copies(len(own), weight)
        drawn += [np.repeat(own, whole), own[_some(len(own), more, f"{seed}/{source}", epoch)]]
    return np.sort(np.concatenate(drawn), kind="stable")


def _some(size: int, count: int, seed: str, epoch: int) -> np.ndarray:  # (count,)
    """Different numbers below `size`: slices of one permutation while it lasts, so that the next epoch sees others."""
    if not count:
        return np.empty(0, dtype=np.int64)
    cycle, turn = divmod(epoch, size // count)
    number = int.from_bytes(hashlib.sha256(f"{seed}/{cycle}".encode()).digest()[:7], "big")
    shuffled = torch.randperm(size, generator=torch.Generator().manual_seed(number)).numpy()
    some: np.ndarray = shuffled[turn * count : (turn + 1) * count]
    return some
