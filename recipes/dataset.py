"""From rows to examples: split, tokenise, and the data proof."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from onegpu.adapters import TASKS, DataError, RecipeError
from onegpu.adapters.isolation import answerable
from onegpu.adapters.registry import entry_of

from .loading import Loaded
from .rows import Rows, canonical, read_rows
from .tasks import Example, Labels, Reader, Row, RowProblem, Task

__all__ = ["Dataset", "Split", "encode", "split_rows"]

DROPPED_SHARE = 0.05  # more unusable rows than that are a mistake, not noise


@dataclass(frozen=True)
class Split:
    """Rows for training and for evaluation, by their number in the data; no row is on both sides."""

    train: Mapping[int, Row]
    evaluation: Mapping[int, Row]
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
    task = loaded.task
    with loaded.place("task", loaded.task_name, "data"):
        rows = _read(task.data, loaded, limit=task.limit)
    with loaded.place("task", loaded.task_name, "evaluation"):
        train, held_out = _sides(rows, loaded)
    with loaded.place("task", loaded.task_name, "data"):
        if not train:
            raise DataError(f"data {task.data!r}: no row is left to train on")
        return Split(train, held_out, task.labels(list(train.values())), rows.fingerprint, task.data)


def _read(written: str, loaded: Loaded, limit: int | None = None) -> Rows:
    task = loaded.task
    return read_rows(written, folder=loaded.folder, needs=task.needs, columns=task.columns, limit=limit)


def _sides(rows: Rows, loaded: Loaded) -> tuple[dict[int, Row], dict[int, Row]]:
    evaluation = loaded.task.evaluation
    if not isinstance(evaluation, str):
        return _by_share(rows, evaluation, loaded.recipe.train.seed)
    held_out = [] if evaluation == "none" else _read(evaluation, loaded).rows
    known = set(map(canonical, held_out))
    train: dict[int, Row] = {n: row for n, row in enumerate(rows.rows) if canonical(row) not in known}
    return train, dict(enumerate(held_out))


def _by_share(rows: Rows, share: float, seed: int) -> tuple[dict[int, Row], dict[int, Row]]:
    if not 0 < share < 1:
        raise RecipeError(f"evaluation: a share lies between 0 and 1, not {share}; or name a file, or `none`")
    first = {canonical(row): number for number, row in reversed(list(enumerate(rows.rows)))}
    unique = sorted(first, key=first.__getitem__)
    random.Random(seed).shuffle(unique)
    held_out = set(unique[: max(1, round(share * len(unique)))])
    train: dict[int, Row] = {n: row for n, row in enumerate(rows.rows) if canonical(row) not in held_out}
    return train, {number: rows.rows[number] for number in sorted(first[row] for row in held_out)}


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


def _encoded(task: Task, rows: Mapping[int, Row], reader: Reader, dropped: dict[str, list[int]]) -> Iterator[Example]:
    entry = entry_of(TASKS, type(task))
    for number, row in rows.items():
        try:
            with answerable("task", entry, f"encode (row {number})", passing=RowProblem):
                example = task.encode(number, row, reader)
            yield example
        except RowProblem as problem:
            dropped.setdefault(str(problem), []).append(number)


def describe(dropped: dict[str, list[int]]) -> str:
    """Why rows were dropped, and which, most frequent reason first."""
    reasons = Counter({reason: len(numbers) for reason, numbers in dropped.items()}).most_common(5)
    return "; ".join(
        f"{reason} (row {', '.join(map(str, dropped[reason][:5]))}{', ...' if count > 5 else ''})"
        for reason, count in reasons
    )
