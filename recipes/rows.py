"""Reads rows as people have them: JSONL, CSV, Parquet, a hub data set, or a sample."""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onegpu.adapters import DataError, RecipeError

from .samples import sample_rows

__all__ = ["Rows", "read_rows"]

LONGEST_FIELD = 2**31 - 1  # characters; Python's own limit of 131,072 is less than some articles have


@dataclass(frozen=True)
class Rows:
    """Rows with where they came from and what they are, by content."""

    written: str
    rows: list[dict[str, Any]]

    @property
    def fingerprint(self) -> str:
        """Digest of the rows in order."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(canonical(row).encode())
        return digest.hexdigest()[:24]


def canonical(row: Mapping[str, Any]) -> str:
    """A row as text that is equal for equal rows."""
    return json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)


def read_rows(
    written: str, *, folder: Path, needs: Sequence[str], columns: Mapping[str, str], limit: int | None = None
) -> Rows:
    """Read rows and check that they have the needed columns.

    Args:
        written: a file (relative ones start at `folder`), `sample:NAME`, or `hub:ID@REVISION`.
        needs: the task's columns.
        columns: what they are called in the data, where that differs.

    Raises:
        RecipeError: no such file or sample, an unknown format.
        DataError: a line that cannot be read, no rows, a missing column.
    """
    unknown = [name for name in columns if name not in needs]
    if unknown:
        raise RecipeError(f"columns: the task has no column {unknown[0]!r} (valid: {', '.join(needs)})")
    rows = _read(written, folder)[:limit]
    if not rows:
        raise DataError(f"data {written!r} has no rows")
    names = {need: columns.get(need, need) for need in needs}
    for number, row in enumerate(rows):
        lacking = [name for name in names.values() if name not in row]
        if lacking:
            have = ", ".join(map(str, row)) or "none"
            raise DataError(
                f"data {written!r}, row {number}: no column {lacking[0]!r} (it has: {have}); "
                "map it under `columns:` in the task"
            )
    return Rows(written, [{need: row[name] for need, name in names.items()} for row in rows])


def _read(written: str, folder: Path) -> list[dict[str, Any]]:
    if written.startswith("sample:"):
        return sample_rows(written.removeprefix("sample:"))
    if written.startswith("hub:"):
        return _hub(written)
    path = folder / Path(written).expanduser()
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise RecipeError(
            f"data {written!r}: a file must end in {', '.join(readers)} (or use sample:NAME, hub:ID@REVISION)"
        )
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix in readers)[:5]
        raise RecipeError(f"data {written!r}: no such file{'; there: ' + ', '.join(near) if near else ''}")
    return readers[path.suffix](path)


def _jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):  # splitlines would also cut at U+2028 within a string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as cause:
            raise DataError(f"{path.name}:{number}: not JSON: {cause}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path.name}:{number}: a row must be a JSON object, not {type(row).__name__}")
        rows.append(row)
    return rows


def _csv(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.DictReader(io.StringIO(_text(path)))
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise DataError(f"{path.name}:{reader.line_num}: not as many fields as the header has")
        rows.append(dict(row))
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise DataError(f"{path.name} is not UTF-8: {cause}") from None


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as cause:
        raise DataError(f"{path.name} cannot be read as Parquet: {cause}") from None
    return rows


def _hub(written: str) -> list[dict[str, Any]]:
    name, _, revision = written.removeprefix("hub:").partition("@")
    if not revision:
        raise RecipeError(f"data {written!r}: a hub data set needs a revision: hub:{name}@REVISION")
    import datasets

    try:
        return list(datasets.load_dataset(name, revision=revision, split="train"))
    except (OSError, ValueError) as cause:
        raise DataError(f"data {written!r} cannot be loaded: {str(cause).splitlines()[0]}") from cause
