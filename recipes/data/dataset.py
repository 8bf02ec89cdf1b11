"""From a recipe to examples: read, split, tokenise, and the data proof."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from onegpu.adapters import TASKS, DataError, OnegpuError
from onegpu.adapters.errors import noted, together
from onegpu.adapters.isolation import answerable
from onegpu.adapters.registry import entry_of

from ..loading import Loaded
from ..tasks.beginnings import begin_token, refuse_second_beginning
from ..tasks.contract import Example, Labels, Reader, RowProblem, Task
from .examples import SUPERVISED, Examples, Unusable, key_parts, store_examples
from .rows import Rows, describe, read_rows
from .splits import Split, split

__all__ = ["SIDES", "Dataset", "Gathered", "Trained", "encode", "gather"]

SIDES = ("train", "evaluation", "test")


@dataclass(frozen=True)
class Trained:
    """What a head was trained to tell apart."""

    labels: Labels
    class_weights: Sequence[float] | None = None


@dataclass(frozen=True)
class Gathered:
    """The rows of a recipe, and which of them are for what."""

    rows: Rows
    own: Mapping[str, Rows]  # a held-out side that has rows of its own
    split: Split
    labels: Labels
    class_weights: Sequence[float] | None  # one per label

    def side(self, name: str) -> tuple[Rows, list[int]]:
        """Rows of a side, as numbers into them."""
        return self.own.get(name, self.rows), getattr(self.split, name)

    @property
    def read(self) -> Sequence[Rows]:
        """All rows that were read."""
        return (self.rows, *self.own.values())


@dataclass(frozen=True)
class Dataset:
    """Tokenised examples, and what was found out while making them."""

    train: Examples[Example]
    evaluation: Examples[Example]
    test: Examples[Example]
    dropped: dict[str, list[str]]  # why rows cannot be used -> their places
    duplicates: dict[str, int]  # what was found -> rows
    limit: int

    @cached_property
    def sides(self) -> dict[str, Examples[Example]]:
        """The three, by name."""
        return {"train": self.train, "evaluation": self.evaluation, "test": self.test}

    @property
    def longest(self) -> int:
        """Tokens of the longest example of any side."""
        return int(max(side.lengths.max() for side in self.sides.values() if len(side)))

    def report(self) -> dict[str, Any]:
        """For the manifest. Lengths are those of the training examples before any was cut."""
        cut = self.train.column("cut")
        lengths, supervised = np.sort(self.train.lengths + cut), np.sort(self.train.column(SUPERVISED))
        return {
            **{f"{name}_examples": len(examples) for name, examples in self.sides.items()},
            **{f"{name}_rows": examples.rows for name, examples in self.sides.items()},
            **{f"{name}_cut": int((examples.column("cut") > 0).sum()) for name, examples in self.sides.items()},
            "tokens": self.train.tokens,
            "supervised": self.train.supervised,
            **{f"length_{name}": int(lengths[at]) for name, at in _quantiles(len(lengths)).items()},
            **{f"supervised_{name}": int(supervised[at]) for name, at in _quantiles(len(lengths)).items()},
            "supervised_histogram": _histogram(supervised),
            "limit": self.limit,
            "cut_share": float((cut > 0).mean()),
            "dropped": self.dropped,
            "duplicates": self.duplicates,
        }


def _quantiles(count: int) -> dict[str, int]:
    """Where the middle, the 95th percentile and the largest of so many sorted values are."""
    return {"p50": count // 2, "p95": int(count * 0.95), "max": -1}


def _histogram(counts: np.ndarray) -> dict[str, int]:  # (examples,) int64, none below 1
    """How many examples have 1, 2-3, 4-7, ... supervised tokens."""
    powers = np.floor(np.log2(np.maximum(counts, 1))).astype(int)
    names = {p: f"{2**p}-{2 ** (p + 1) - 1}" if p else "1" for p in range(powers.max() + 1)}
    return {name: int((powers == p).sum()) for p, name in names.items() if (powers == p).any()}


def gather(loaded: Loaded, trained: Trained | None = None) -> Gathered:
    """Read the rows of a recipe and split them. Equal rows land on one side, so that nothing evaluated was trained on.

    Args:
        trained: the classes of a head that was trained before; found in the training rows when left out.

    Raises:
        RecipeError, DataError: see `read_rows` and `split`.
    """
    task, at = loaded.task, ("task", loaded.task_name)
    faults: list[OnegpuError] = []
    rows = None
    with noted(faults), loaded.place(*at, "data"):
        rows = _read(loaded, task.data, limit=task.limit)
    sides: dict[str, float | Rows | None] = {}
    for name in SIDES[1:]:
        with noted(faults), loaded.place(*at, name):
            sides[name] = _held_out(loaded, getattr(task, name))
    if rows is None or faults:
        raise together(faults)
    with loaded.place(*at, "evaluation"):
        cut = split(
            rows,
            evaluation=sides["evaluation"],
            test=sides["test"],
            seed=loaded.recipe.train.seed,
            stratify=_strata(task, rows),
        )
    with loaded.place(*at, "data"):
        if not cut.train:
            raise DataError(f"data {rows.written!r}: no row is left to train on")
        own = {name: side for name, side in sides.items() if isinstance(side, Rows)}
        found = trained or _classes(loaded, rows, cut)
        return Gathered(rows, own, cut, found.labels, found.class_weights)


def _strata(task: Task, rows: Rows) -> list[str] | None:
    """The stratum of each row; None for a task that has none, which need not read its rows for it."""
    if type(task).stratum is Task.stratum:
        return None
    strata = [task.stratum(row) for row in rows]
    return [str(name) for name in strata] if any(name is not None for name in strata) else None


def _classes(loaded: Loaded, rows: Rows, cut: Split) -> Trained:
    task = loaded.task
    with answerable(loaded.task_name, entry_of(TASKS, type(task)), "labels"):
        labels = task.labels(rows[number] for number in cut.train)
        return Trained(labels, task.class_weights((rows[number] for number in cut.train), labels) if labels else None)


def _read(loaded: Loaded, data: Any, limit: int | None = None) -> Rows:
    task, traits = loaded.task, loaded.task.traits()
    return read_rows(
        data,
        folder=loaded.folder,
        needs=traits.needs,
        optional=traits.optional,
        columns=task.columns,
        limit=limit,
        broken=task.tolerate,
    )


def _held_out(loaded: Loaded, written: float | str) -> float | Rows | None:
    if not isinstance(written, str):
        return written
    return None if written == "none" else _read(loaded, written)


def encode(loaded: Loaded, gathered: Gathered, reader: Reader) -> Dataset:
    """Tokenise every side. The data proof: something is supervised, and hardly any row is unusable.

    Raises:
        DataError: more rows are unusable than the recipe tolerates (they are listed), or none is usable.
    """
    task = loaded.task
    sides = {name: _encoded_side(loaded, gathered, reader, name) for name in SIDES}
    dropped: dict[str, list[str]] = {}
    for rows in gathered.read:
        for reason, places in rows.problems.items():
            dropped.setdefault(reason, []).extend(places)
    broken = sum(map(len, dropped.values()))
    for name, examples in sides.items():
        rows, _ = gathered.side(name)
        for reason, numbers in examples.dropped.items():
            dropped.setdefault(reason, []).extend(rows.place(number) for number in numbers)
    unusable, total = sum(map(len, dropped.values())), broken + sum(len(gathered.side(name)[1]) for name in SIDES)
    if not len(sides["train"]) or unusable > task.tolerate * total:
        written = ", ".join(repr(rows.written) for rows in gathered.read)
        raise DataError(f"data {written}: {unusable} of {total} rows cannot be used: {describe(dropped)}")
    for name in SIDES[1:]:
        if gathered.side(name)[1] and not len(sides[name]):
            raise DataError(f"{name}: no row of it can be used: {describe(sides[name].dropped)}")
    return Dataset(sides["train"], sides["evaluation"], sides["test"], dropped, gathered.split.duplicates, reader.limit)


def _encoded_side(loaded: Loaded, gathered: Gathered, reader: Reader, name: str) -> Examples[Example]:
    rows, numbers = gathered.side(name)
    task, traits = loaded.task, loaded.task.traits()
    key = key_parts(
        tokenizer=reader.tokenizer,
        task_name=loaded.task_name,
        task=task,
        masks=traits.version,
        max_length=reader.limit,
        labels=reader.labels,
        rows=rows.fingerprint,
        numbers=numbers,
    )
    entry = entry_of(TASKS, type(task))
    key |= {"stops": sorted(reader.stops), "class_weights": list(reader.class_weights or ())}
    key |= {"plugin": [entry.distribution, entry.version] if entry else None}
    return store_examples(key, traits.example, _made(loaded, rows, numbers, reader))


def _made(loaded: Loaded, rows: Rows, numbers: Sequence[int], reader: Reader) -> Iterator[Example | Unusable]:
    task, begin = loaded.task, begin_token(reader.tokenizer)
    entry = entry_of(TASKS, type(task))
    for number in numbers:
        try:
            with answerable("task", entry, f"encode ({rows.place(number)})", passing=RowProblem):
                made = task.encode(number, rows[number], reader)
            for example in made:
                refuse_second_beginning(example.sequences, begin, reader.tokenizer)
            yield from made
        except RowProblem as problem:
            yield Unusable(number, str(problem))
        except DataError as error:
            raise DataError(f"{rows.place(number)}: {error}") from error
