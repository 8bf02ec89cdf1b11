"""Which rows are trained on, evaluated on, and tested on. Equal rows are never on two sides."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onegpu.adapters import DataError, RecipeError

from .rows import Rows

__all__ = ["Split", "split"]

Side = float | Rows | None


@dataclass(frozen=True)
class Split:
    """Numbers of rows. A held-out side that is a share counts in the data; one with rows of its own, in those."""

    train: list[int]
    evaluation: list[int]
    test: list[int]
    duplicates: dict[str, int] = field(default_factory=dict)  # what was found -> how many rows


def split(
    rows: Rows, *, evaluation: Side, test: Side = None, seed: int, stratify: Sequence[str] | None = None
) -> Split:
    """Split the rows of `data:`.

    A share is of the different rows: one of each is held out, its copies are left out of training. Rows that are held
    out as data of their own are not trained on, and a row of `test` is not evaluated on either. Evaluation is cut from
    the beginning of the shuffled rows and test from their end, so that changing one does not move the other.

    Args:
        evaluation: a share, rows of their own, or None for none.
        test: the same.
        stratify: the class of each row; one with rows enough is on every side, in proportion within one row.

    Raises:
        RecipeError: a share that is none, or shares that leave nothing to train on.
        DataError: no row is left on a side.
    """
    wanted = {"evaluation": evaluation, "test": test}
    shares = _shares(wanted)
    own = {name: side for name, side in wanted.items() if isinstance(side, Rows)}
    first, copy_of = _different(rows.digests)
    held = np.isin(rows.digests[first], [digest for side in own.values() for digest in np.unique(side.digests)])
    classes = None if stratify is None else [stratify[number] for number in first]
    cut = _cut(_shuffled_without(held, seed), shares, classes)
    held[[number for numbers in cut.values() for number in numbers]] = True
    sides = {name: sorted(first[numbers].tolist()) for name, numbers in cut.items()}
    sides["train"] = np.flatnonzero(~held[copy_of]).tolist()
    duplicates = {
        "within train": len(sides["train"]) - int((~held).sum()),
        "train rows also held out, removed": len(rows) - sum(map(len, sides.values())),
    }
    return _checked(_with_own(sides, own, duplicates), wanted)


def _shares(wanted: Mapping[str, Side]) -> dict[str, float]:
    shares = {name: side for name, side in wanted.items() if side is not None and not isinstance(side, Rows)}
    for name, share in shares.items():
        if not 0 < share < 1:
            raise RecipeError(f"{name}: a share lies between 0 and 1, not {share}; or name a file, or `none`")
    if sum(shares.values()) >= 1:
        raise RecipeError(f"{' and '.join(shares)}: shares of {sum(shares.values()):g} leave nothing to train on")
    return shares


def _different(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each kind, in order; and for each row, which kind it is."""
    _, index, inverse = np.unique(digests, return_index=True, return_inverse=True)
    kinds = np.argsort(index)
    place = np.empty_like(kinds)
    place[kinds] = np.arange(len(kinds))
    return index[kinds], place[inverse]


def _shuffled_without(held: np.ndarray, seed: int) -> list[int]:
    """Shuffled before some are left out, so that what is left keeps its order."""
    order = list(range(len(held)))
    random.Random(seed).shuffle(order)
    return [number for number in order if not held[number]]


def _cut(order: Sequence[int], shares: Mapping[str, float], classes: Sequence[str] | None) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for number in order:
        groups.setdefault("" if classes is None else classes[number], []).append(number)
    sides: dict[str, list[int]] = {name: [] for name in shares}
    for group in groups.values():
        counts = _counts(len(group), shares) if classes is None else _class_counts(len(group), shares)
        for name, count in counts.items():
            sides[name] += group[:count] if name == "evaluation" else group[len(group) - count :]
    return sides


def _counts(size: int, shares: Mapping[str, float]) -> dict[str, int]:
    counts = {name: max(1, round(share * size)) for name, share in shares.items()}
    if sum(counts.values()) >= size:
        told = ", ".join(f"{name}: {shares[name]:g}" for name in counts)
        raise DataError(f"{told}: of {size} different rows, no row is left to train on")
    return counts


def _class_counts(size: int, shares: Mapping[str, float]) -> dict[str, int]:
    """One row stays for training, and each side gets one, first come first served where they are not enough."""
    counts, left = {}, size - 1
    for later, (name, share) in zip(reversed(range(len(shares))), shares.items(), strict=True):
        room = max(left - later, min(left, 1))
        counts[name] = min(room, max(1, round(share * size)))
        left -= counts[name]
    return counts


def _with_own(sides: dict[str, list[int]], own: Mapping[str, Rows], duplicates: dict[str, int]) -> Split:
    """Adds the sides that have rows of their own; what is tested on is not evaluated on."""
    sides |= {name: list(range(len(side))) for name, side in own.items()}
    if len(own) == 2:
        known = np.isin(own["evaluation"].digests, own["test"].digests)
        sides["evaluation"] = np.flatnonzero(~known).tolist()
        duplicates["evaluation rows also in test, removed"] = int(known.sum())
    return Split(sides["train"], sides.get("evaluation", []), sides.get("test", []), duplicates)


def _checked(found: Split, wanted: Mapping[str, Side]) -> Split:
    if not found.train:
        raise DataError("no row is left to train on: all are held out")
    for name, numbers in (("evaluation", found.evaluation), ("test", found.test)):
        if wanted[name] is not None and not numbers:
            raise DataError(f"{name}: no row is left for it: too few of each class, or all are in the test rows")
    return found
