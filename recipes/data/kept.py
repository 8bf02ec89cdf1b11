"""Keeps rows and examples on disk as Arrow batches that are mapped into memory: written once, checked at every use.

A folder of the cache holds `rows.arrow` (a stream that `datasets.Dataset.from_file` reads, too) and `facts.json`: what
the key was made of, how many rows there are, the digest of the file, and what else was counted while writing. A folder
that does not agree with itself is written anew.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from filelock import FileLock

from onegpu.adapters.files import atomic_folder, cache_folder, write_json

__all__ = ["Content", "Kept", "keep"]

BATCH = 512  # rows; all that is in memory while writing

Facts = dict[str, Any]


class Content(Protocol):
    """What is to be written: rows, and facts that are known after the last one. Neither is asked for on a hit."""

    def rows(self) -> Iterator[dict[str, Any]]: ...

    def facts(self) -> Facts: ...


@dataclass(frozen=True)
class Kept:
    """Rows on disk; one is read in some microseconds, whatever their number."""

    facts: Facts
    batches: list[pa.RecordBatch]
    starts: np.ndarray  # (batches,) number of each batch's first row

    def __len__(self) -> int:
        return int(self.facts["rows"])

    def row(self, number: int) -> dict[str, Any]:
        """One row by its number, counted from 0, or from the end if negative.

        Raises:
            IndexError: there is none.
        """
        at = range(len(self))[number]
        batch = int(np.searchsorted(self.starts, at, side="right")) - 1
        (row,) = self.batches[batch].slice(at - int(self.starts[batch]), 1).to_pylist()
        found: dict[str, Any] = row
        return found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.batches:
            yield from batch.to_pylist()

    def column(self, name: str) -> Iterator[pa.Array]:
        """A column, batch by batch, without reading the others."""
        return (batch.column(name) for batch in self.batches)


def keep(kind: str, key: Mapping[str, Any], schema: pa.Schema, content: Content) -> Kept:
    """The rows kept under this key; written from `content` where they are not there, or damaged.

    Args:
        kind: the folder within the cache.
        key: all that the rows follow from, as JSON.
    """
    parts = json.loads(json.dumps(key))
    folder = cache_folder() / kind / _digest(parts)[:32]
    found = _opened(folder, parts)
    if found is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # who waits for another process then finds its rows
            found = _opened(folder, parts) or _written(folder, parts, schema, content)
    return found


def _written(folder: Path, parts: Facts, schema: pa.Schema, content: Content) -> Kept:
    with atomic_folder(folder) as partial:
        file = partial / "rows.arrow"
        count = _write(file, schema, content.rows())
        facts = {**content.facts(), "key": parts, "rows": count, "file_sha256": _file_digest(file)}
        write_json(partial / "facts.json", facts | {"facts_sha256": _digest(facts)})
    found = _opened(folder, parts)
    assert found is not None
    return found


def _write(file: Path, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> int:
    count, remaining = 0, iter(rows)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(islice(remaining, BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
            count += len(batch)
    return count


def _opened(folder: Path, parts: Facts) -> Kept | None:
    """What the folder holds, or None where it is not there, not whole, or of another key."""
    try:
        facts = json.loads((folder / "facts.json").read_text("utf-8"))
        sealed = _digest({name: value for name, value in facts.items() if name != "facts_sha256"})
        if (facts["facts_sha256"], facts["key"]) != (sealed, parts):
            return None
        if _file_digest(folder / "rows.arrow") != facts["file_sha256"]:
            return None
        batches = pa.ipc.open_stream(pa.memory_map(str(folder / "rows.arrow"))).read_all().to_batches()
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # missing, or no facts of ours; Arrow's are both
        return None
    starts = np.cumsum([0, *(batch.num_rows for batch in batches)])[:-1]
    return Kept(facts, batches, starts)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
