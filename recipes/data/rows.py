"""Rows of one or several sources, mapped to what a task needs, and kept on disk: they may be larger than memory."""

import datetime
import decimal
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from onegpu.adapters import DataError
from onegpu.adapters.errors import nearest

from ..tasks.contract import RowProblem
from .columns import ColumnMap, column_map
from .formats import Record
from .kept import Facts, Kept, keep
from .sources import Origin, Source, locate_all, sources_of

__all__ = ["DROPPED_SHARE", "Rows", "describe", "digest_of", "read_rows"]

READING = 1  # raise it when the same file is to be read as other rows: what was kept before is then left alone
DROPPED_SHARE = 0.05  # more unusable rows than that are a mistake, not noise
COLUMNS_TOLD = 50  # names of columns that a message can choose from

SCHEMA = pa.schema({"source": pa.int32(), "place": pa.string(), "digest": pa.string(), "row": pa.string()})


class Rows(Sequence[dict[str, Any]]):
    """Rows by their number, with where they came from and what they are, by content."""

    def __init__(self, written: str, weights: Sequence[float], kept: Kept) -> None:
        self.written = written
        self.weights = tuple(weights)  # (sources,)
        self._kept = kept

    @property
    def fingerprint(self) -> str:
        """Digest of the rows in order."""
        return str(self._kept.facts["fingerprint"])

    @property
    def problems(self) -> dict[str, list[str]]:
        """Why rows could not be used -> their places."""
        return {reason: list(places) for reason, places in self._kept.facts["problems"].items()}

    def place(self, number: int) -> str:
        """Where a row is written: `train.jsonl:12`."""
        return str(self._kept.row(number)["place"])

    def of(self, number: int) -> int:
        """Which of the sources a row came from, counted from 0."""
        return int(self._kept.row(number)["source"])

    @cached_property
    def sources(self) -> np.ndarray:  # (rows,) int32
        """Which of the sources each row came from."""
        return np.concatenate([np.empty(0, np.int32), *(chunk.to_numpy() for chunk in self._kept.column("source"))])

    @cached_property
    def digests(self) -> np.ndarray:  # (rows,) of 32 bytes
        """A digest of each row; equal rows have equal ones."""
        chunks = (np.array(chunk.to_pylist(), "S32") for chunk in self._kept.column("digest"))
        return np.concatenate([np.empty(0, "S32"), *chunks])

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, number: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, number: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        return json.loads(self._kept.row(number)["row"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (json.loads(text.as_py()) for chunk in self._kept.column("row") for text in chunk)


def read_rows(
    data: str | Sequence[str | Source],
    *,
    folder: Path,
    needs: Sequence[str],
    optional: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    broken: float = DROPPED_SHARE,
) -> Rows:
    """Read rows and map their columns; the second time, they are found in the cache.

    Args:
        data: one source, or several; see `Source`.
        folder: where relative paths start.
        needs: the task's columns.
        optional: columns that it uses where a row has them.
        columns: what they are made from, where that differs; see `column_map`.
        limit: take the first so many usable rows of each source.
        broken: the share of the rows that may be unusable.

    Raises:
        RecipeError: no such file or sample, an unknown format, a mapping that cannot be.
        DataError: no rows, a column that no row has, a file that cannot be read, too many unusable rows.
        Unavailable: a package or the hub, where a source needs one.
    """
    sources = sources_of(data)
    mapping = column_map(columns or {}, needs=needs, optional=optional)
    origins = locate_all(sources, folder=folder)
    key = {
        "reading": READING,
        "sources": [[origin.name, origin.digest()] for origin in origins],
        "needs": list(needs),
        "optional": list(optional),
        "columns": dict(columns or {}),
        "limit": limit,
    }
    kept = keep("rows", key, SCHEMA, _Reading(origins, mapping, limit))
    written = ", ".join(source.source for source in sources)
    _refuse_broken(kept.facts["counts"], [source.source for source in sources], kept.facts["problems"], broken)
    return Rows(written, [source.weight for source in sources], kept)


def _refuse_broken(
    counts: Sequence[Sequence[int]], written: Sequence[str], problems: Mapping[str, Sequence[str]], share: float
) -> None:
    """`counts` is (usable, broken) of each source."""
    for (usable, unusable), source in zip(counts, written, strict=True):
        if not usable:
            told = (
                f": {unusable} of {unusable} rows cannot be used: {describe(problems)}" if unusable else " has no rows"
            )
            raise DataError(f"data {source!r}{told}")
    total, unusable = sum(map(sum, counts)), sum(pair[1] for pair in counts)
    if unusable > share * total:
        told = f"{unusable} of {total} rows cannot be used: {describe(problems)}"
        raise DataError(f"data {', '.join(written)!r}: {told}")


def describe(problems: Mapping[str, Sequence[object]]) -> str:
    """Why rows cannot be used, and the first five places of each reason, most frequent reason first."""
    reasons = sorted(problems, key=lambda reason: (-len(problems[reason]), reason))
    told = [f"{r} ({', '.join(map(str, problems[r][:5]))}{', ...' if len(problems[r]) > 5 else ''})" for r in reasons]
    return "; ".join(told[:5]) + ("; ..." if len(told) > 5 else "")


def digest_of(row: Mapping[str, Any]) -> str:
    """Equal for equal rows, in whatever order their columns are."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class _Reading:
    """One pass over the sources: what is kept, and what is counted on the way."""

    def __init__(self, origins: Sequence[Origin], mapping: ColumnMap, limit: int | None) -> None:
        self.origins, self.mapping, self.limit = origins, mapping, limit
        self.problems: dict[str, list[str]] = {}
        self.counts: list[list[int]] = []  # (usable, broken) of each source
        self.fingerprint = hashlib.sha256()

    def rows(self) -> Iterator[dict[str, Any]]:
        for number, origin in enumerate(self.origins):
            for row in self._of(origin):
                self.fingerprint.update(row["digest"].encode())
                yield {"source": number, **row}

    def facts(self) -> Facts:
        return {"problems": self.problems, "counts": self.counts, "fingerprint": self.fingerprint.hexdigest()[:24]}

    def _of(self, origin: Origin) -> Iterator[dict[str, Any]]:
        count, seen = [0, 0], _Columns(self.mapping.declared)
        self.counts.append(count)
        for record in origin.records():
            place = f"{origin.name}/{record.file}" if record.file else f"{origin.name}:{record.line}"
            try:
                yield {"place": place, **_stored(_mapped(record, seen, self.mapping))}
                count[0] += 1
            except RowProblem as problem:
                self.problems.setdefault(str(problem), []).append(place)
                count[1] += 1
            if count[0] == self.limit:
                break
        else:
            seen.refuse_missing(origin.written)


class _Columns:
    """Which columns rows have, until all that are wanted were seen."""

    def __init__(self, wanted: frozenset[str]) -> None:
        self.missing = set(wanted)
        self.there: dict[str, None] = {}

    def see(self, row: Mapping[str, Any]) -> None:
        if self.missing:
            self.missing.difference_update(row)
            if len(self.there) < COLUMNS_TOLD:
                self.there.update(dict.fromkeys(map(str, row)))

    def refuse_missing(self, written: str) -> None:
        """A column that not one row has is a mapping that is missing, not noise."""
        if self.missing and self.there:
            first = min(self.missing)
            raise DataError(
                f"data {written!r}: no column {first!r} (it has: {', '.join(self.there)})"
                f"{nearest(first, self.there, list_all=False)}; map it under `columns:` in the task"
            )


def _mapped(record: Record, seen: _Columns, mapping: ColumnMap) -> dict[str, Any]:
    if record.row is None:
        raise RowProblem(record.problem)
    seen.see(record.row)
    return mapping.map_row(record.row)


def _stored(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as JSON, its columns in the order they have: a chat template may print a nested object as it stands."""
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain)
        text.encode()
    except UnicodeEncodeError:
        raise RowProblem("half of a surrogate pair: not text") from None
    except RowProblem:
        raise
    except RecursionError:
        raise RowProblem("nested too deeply") from None
    except ValueError:
        raise RowProblem("NaN or infinity is no JSON number") from None
    return {"digest": digest_of(row), "row": text}


def _plain(value: Any) -> str:
    """What Parquet and hub data sets hold beyond JSON, as text."""
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    raise RowProblem(f"a value of type {type(value).__name__} is neither text, number, list nor object")
