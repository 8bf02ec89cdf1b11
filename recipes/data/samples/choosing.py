"""Which rows of a package become a sample, and in which order."""

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable
from typing import Any

__all__ = ["Row", "every_class_first", "first_each", "mixed", "undisputed", "unique"]

Row = dict[str, Any]


def unique(rows: Iterable[Row]) -> list[Row]:
    """Each row once, at its first place."""
    return first_each(rows, _written)


def first_each(rows: Iterable[Row], question: Callable[[Row], Hashable]) -> list[Row]:
    """Of rows that ask the same, the first."""
    found: dict[Hashable, Row] = {}
    for row in rows:
        found.setdefault(question(row), row)
    return list(found.values())


def undisputed(rows: Iterable[Row], question: Callable[[Row], Hashable]) -> list[Row]:
    """Each row once, without those that ask the same and answer differently: nothing can be learnt from them."""
    once = unique(rows)
    asked: dict[Hashable, int] = {}
    for row in once:
        asked[question(row)] = asked.get(question(row), 0) + 1
    return [row for row in once if asked[question(row)] == 1]


def mixed(rows: Iterable[Row]) -> list[Row]:
    """Rows in an order that has nothing to do with that of the package, and is the same everywhere."""
    return sorted(rows, key=lambda row: hashlib.sha256(_written(row).encode()).digest())


def every_class_first(rows: Iterable[Row], classes: Callable[[Row], Iterable[str]]) -> list[Row]:
    """Rows that show a class for the first time before all others, so that the first hundred have even rare ones."""
    seen: set[str] = set()
    first: list[Row] = []
    others: list[Row] = []
    for row in rows:
        shown = set(classes(row))
        (others if shown <= seen else first).append(row)
        seen |= shown
    return first + others


def _written(row: Row) -> str:
    return json.dumps(row, sort_keys=True)
