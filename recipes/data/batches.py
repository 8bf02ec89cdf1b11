"""Which examples an optimiser step sees, and how they are cut into forward passes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..tasks.contract import Example
from .order import epoch_length, epoch_order

__all__ = ["Cut", "Plan", "micro_batches", "resolve_cut"]

TOKENS_PER_PASS = 4096  # what `micro_batch: auto` aims at; tokens of one forward pass, padding included


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


@dataclass(frozen=True)
class Cut:
    """How a window is cut into forward passes."""

    examples: int  # most of them in one pass
    tokens: int | None = None  # most of them in one pass, padding included; no bound when left out
    packed: bool = False  # rows are packed, so that there is no padding

    def __call__(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Forward passes, longest examples first: little padding, and memory runs out at once or never."""
        return packs(examples, self) if self.packed else micro_batches(examples, self.examples, self.tokens)


def micro_batches(examples: Sequence[Example], size: int, tokens: int | None = None) -> list[list[Example]]:
    """Examples of like length together: up to `size`, or as many as make up to `tokens` when padded."""
    chunks: list[list[Example]] = []
    for example in _longest_first(examples):
        # The first of a chunk is its longest.
        full = not chunks or len(chunks[-1]) == size
        if full or (tokens is not None and (len(chunks[-1]) + 1) * chunks[-1][0].size > tokens):
            chunks.append([])
        chunks[-1].append(example)
    return chunks


def packs(examples: Sequence[Example], cut: Cut) -> list[list[Example]]:
    """As few packs as best-fit finds: each example goes where it leaves least room. One too long for any is alone."""
    found: list[list[Example]] = []
    for example in _longest_first(examples):
        fitting = [pack for pack in found if len(pack) < cut.examples and _fits(pack, example, cut.tokens)]
        if fitting:
            max(fitting, key=_tokens).append(example)
        else:
            found.append([example])
    return found


def _fits(pack: Sequence[Example], example: Example, tokens: int | None) -> bool:
    return tokens is None or _tokens(pack) + example.size <= tokens


def _tokens(pack: Sequence[Example]) -> int:
    return sum(example.size for example in pack)


def _longest_first(examples: Sequence[Example]) -> list[Example]:
    return sorted(examples, key=lambda example: (-example.size, example.row))


def resolve_cut(micro_batch: int | str, tokens: int | None, *, effective_batch: int, longest: int, packed: bool) -> Cut:
    """What the settings come to.

    Args:
        micro_batch: examples, or `auto` for as many as make 4,096 tokens.
        tokens: what a pass may hold instead.
        longest: tokens of the longest example.
    """
    if tokens is not None:
        return Cut(effective_batch, tokens, packed)
    if isinstance(micro_batch, int):
        return Cut(min(micro_batch, effective_batch), packed=packed)
    if packed:
        return Cut(effective_batch, TOKENS_PER_PASS, packed)
    return Cut(max(1, min(TOKENS_PER_PASS // longest, effective_batch)))
