"""From rows to examples: split, tokenise, and the data proof."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from onegpu.adapters import DataError, RecipeError

from .loading import Loaded
from .rows import Rows, canonical, read_rows
from .tasks import Example, Labels, Reader, Row, RowProblem, Task

__all__ = ["Dataset", "Split", "encode", "split_rows"]

DROPPED_SHARE = 0.05  # more unusable rows than that are a mistake, not noise


@dataclass(frozen=True)
class Split:
    """Rows for training and for evaluation; no row is on both sides."""

    train: Sequence[Row]
    evaluation: Sequence[Row]
    labels: Labels
    fingerprint: str
    written: str


@dataclass(frozen=True)
class Dataset:
    """Tokenised examples, and what was found out while making them."""

    train: list[Example]
    evaluation: list[Example]
    dropped: dict[str, list[int]]  # reason -> row numbers

    @property
    def supervised(self) -> int:
        """Supervised tokens (or labels) of the training side."""
        return sum(example.supervised for example in self.train)

    @property
    def tokens(self) -> int:
        """Tokens of the training side."""
        return sum(len(example.ids) for example in self.train)

    @property
    def longest(self) -> int:
        """Tokens of the longest example of either side."""
        return max(len(example.ids) for example in (*self.train, *self.evaluation))

    def report(self) -> dict[str, Any]:
        """For the manifest."""
        lengths = sorted(len(example.ids) for example in self.train)
        return {
            "train_rows": len(self.train),
            "evaluation_rows": len(self.evaluation),
            "tokens": self.tokens,
            "supervised": self.supervised,
            "length_p50": lengths[len(lengths) // 2],
            "length_p95": lengths[int(len(lengths) * 0.95)],
            "length_max": lengths[-1],
            "dropped": self.dropped,
        }


def split_rows(loaded: Loaded) -> Split:
    """Read the rows of a recipe and split them. Equal rows land on one side, so that nothing evaluated was trained on.

    Raises:
        RecipeError, DataError: see `read_rows`; or a side of the split is empty.
    """
    task, seed = loaded.task, loaded.recipe.train.seed
    rows = _read(task.data, loaded, limit=task.limit)
    if isinstance(task.evaluation, str):
        held_out: Sequence[Row] = [] if task.evaluation == "none" else _read(task.evaluation, loaded).rows
        known = {canonical(row) for row in held_out}
        train: Sequence[Row] = [row for row in rows.rows if canonical(row) not in known]
    else:
        train, held_out = _by_share(rows, task.evaluation, seed)
    if not train:
        raise DataError(f"data {task.data!r}: no row is left to train on")
    return Split(train, held_out, task.labels(train), rows.fingerprint, task.data)


def _read(written: str, loaded: Loaded, limit: int | None = None) -> Rows:
    task = loaded.task
    return read_rows(written, folder=loaded.folder, needs=task.needs, columns=task.columns, limit=limit)


def _by_share(rows: Rows, share: float, seed: int) -> tuple[Sequence[Row], Sequence[Row]]:
    if not 0 < share < 1:
        raise RecipeError(f"evaluation: a share lies between 0 and 1, not {share}; or name a file, or `none`")
    unique = list(dict.fromkeys(map(canonical, rows.rows)))
    random.Random(seed).shuffle(unique)
    held_out = set(unique[: max(1, round(share * len(unique)))])
    train = [row for row in rows.rows if canonical(row) not in held_out]
    evaluation = {canonical(row): row for row in rows.rows if canonical(row) in held_out}
    return train, list(evaluation.values())


def encode(task: Task, split: Split, reader: Reader) -> Dataset:
    """Tokenise both sides. The data proof: something is supervised, and hardly any row is unusable.

    Raises:
        DataError: more than 5 % of the rows are unusable (they are listed), or none is usable.
    """
    dropped: dict[str, list[int]] = {}
    train = list(_encoded(task, split.train, reader, dropped))
    evaluation = list(_encoded(task, split.evaluation, reader, dropped))
    count = sum(map(len, dropped.values()))
    total = len(split.train) + len(split.evaluation)
    if not train or count > DROPPED_SHARE * total:
        raise DataError(f"data {split.written!r}: {count} of {total} rows cannot be used: {describe(dropped)}")
    return Dataset(train, evaluation, dropped)


def _encoded(task: Task, rows: Sequence[Row], reader: Reader, dropped: dict[str, list[int]]) -> Iterator[Example]:
    for number, row in enumerate(rows):
        try:
            yield task.encode(number, row, reader)
        except RowProblem as problem:
            dropped.setdefault(str(problem), []).append(number)


def describe(dropped: dict[str, list[int]]) -> str:
    """Why rows were dropped, and which, most frequent reason first."""
    reasons = Counter({reason: len(numbers) for reason, numbers in dropped.items()}).most_common(5)
    return "; ".join(
        f"{reason} (row {', '.join(map(str, dropped[reason][:5]))}{', ...' if count > 5 else ''})"
        for reason, count in reasons
    )
