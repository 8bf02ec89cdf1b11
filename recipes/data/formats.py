"""Reads rows in the formats that people have them in, one at a time: a file may be larger than memory.

One line of a .jsonl file: {"text": "Ad sales boost Time Warner profit", "label": "business"}

What cannot be used of a file is a record with a problem and a line, so that whoever reads can count and list it; only
what makes the whole file unreadable is an error.
"""

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Never

from onegpu.adapters import DataError, RecipeError
from onegpu.adapters.errors import brief, nearest
from onegpu.adapters.files import there

__all__ = ["ENDINGS", "Record", "check_data", "read_records"]

LONGEST_FIELD = 2**31 - 1  # characters; Python's own limit of 131,072 is less than some articles have
PARQUET_BATCH = 1024  # rows


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file, or why there is none."""

    line: int  # where it begins, counted from 1; a row's number in formats that have no lines
    row: dict[str, Any] | None
    problem: str | None = None
    file: str = ""  # in a folder: the file within it


def check_data(path: Path, written: str) -> None:
    """See that a file or folder can be rows, without reading it.

    Raises:
        RecipeError: no such file, or an ending that is no format.
        DataError: an empty file, a folder without classes.
    """
    if there(path) and path.is_dir():
        if not any(file.suffix == ".txt" for folder in _classes(path) for file in _visible(folder)):
            holds = ", ".join(sorted(_readable(path))[:5])
            raise DataError(
                f"data {written!r}: a folder must hold a folder of .txt files for each class"
                f"{f'; it holds {holds}: name the file' if holds else ''}"
            )
        return
    if _ending(path) not in _READERS:
        raise RecipeError(
            f"data {written!r}: a file must end in {', '.join(ENDINGS)}, those of lines also in .gz (or name a folder "
            "with a folder of .txt files for each class, package:NAME/path, sample:NAME, hub:ID@REVISION)"
        )
    if not there(path) or not path.is_file():
        raise RecipeError(f"data {brief(written)}: no such file{nearest(path.name[:200], _readable(path.parent))}")
    if not path.stat().st_size:
        raise DataError(f"data {written!r}: the file is empty")


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file or folder that passed `check_data`, in a fixed order.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    reader = _class_folders if path.is_dir() else _READERS[_ending(path)]
    try:
        yield from reader(path)
    except (OSError, EOFError, zlib.error) as cause:  # the last two: of a damaged .gz
        raise DataError(f"{path.name} cannot be read: {cause}") from cause


def _ending(path: Path) -> str:
    return "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]).lower()


def _readable(folder: Path) -> list[str]:
    files = folder.glob("*") if there(folder) else ()
    return [path.name for path in files if path.is_file() and _ending(path) in _READERS]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, as bytes: a byte that is not UTF-8 spoils its own line only, and only a line end ends a line."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _json_lines(path: Path) -> Iterator[Record]:
    return (_json_record(number, line) for number, line in _lines(path) if line.strip())


def _json_record(number: int, line: bytes) -> Record:
    try:
        row = _DECODER.decode(line.decode())
    except UnicodeDecodeError:
        return Record(number, None, "not UTF-8")
    except json.JSONDecodeError as cause:
        return Record(number, None, f"not JSON: {cause.msg}")
    except ValueError as cause:
        return Record(number, None, f"not JSON: {cause}")
    except RecursionError:
        return Record(number, None, "not JSON that can be read: nested too deeply")
    return _object(number, row)


def _refuse(constant: str) -> Never:
    raise ValueError(f"{constant} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _object(number: int, row: Any) -> Record:
    if isinstance(row, dict):
        return Record(number, row)
    return Record(number, None, f"a row must be a JSON object, not {type(row).__name__}")


def _json_document(path: Path) -> Iterator[Record]:
    """The items of a document that is read whole: a list of objects, or an object that holds one such list."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as cause:
        raise DataError(f"{path.name} is not UTF-8: {cause}") from None
    except json.JSONDecodeError as cause:
        hint = "; a file with one object a line must end in .jsonl" if cause.msg == "Extra data" else ""
        raise DataError(f"{path.name}:{cause.lineno}: not JSON: {cause.msg}{hint}") from None
    except RecursionError:
        raise DataError(f"{path.name}: nested too deeply") from None
    for number, item in enumerate(_items(content, path), 1):
        try:
            json.dumps(item, allow_nan=False)
            yield _object(number, item)
        except ValueError:
            yield Record(number, None, "not JSON: NaN or infinity is no JSON number")


def _items(content: Any, path: Path) -> list[Any]:
    if isinstance(content, list):
        return content
    members = content if isinstance(content, dict) else {}
    lists = [value for value in members.values() if isinstance(value, list) and any(isinstance(i, dict) for i in value)]
    if len(lists) != 1:
        have = ", ".join(list(members)[:12]) or type(content).__name__
        raise DataError(
            f"{path.name} must be a list of objects, or an object with one list of objects (it has: {have})"
        )
    found: list[Any] = lists[0]
    return found


def _table(path: Path, *, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(LONGEST_FIELD)
    # Bytes that are not UTF-8 pass as surrogates, so that the row they are in can be told apart from its neighbours.
    lines = (line.decode("utf-8", "surrogateescape") for _, line in _lines(path))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)  # lenient, it takes an open quote to the file's end
    header = _header(path, reader)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as cause:
            yield Record(line, None, f"not a row of fields: {cause}")
            continue
        if fields:
            yield _fields(line, header, fields)


def _header(path: Path, reader: Any) -> list[str]:
    try:
        header: list[str] = next((fields for fields in reader if fields), [])
    except csv.Error as cause:
        raise DataError(f"{path.name}:1: the header cannot be read: {cause}") from None
    if not _is_text(*header):
        raise DataError(f"{path.name}:{reader.line_num}: the header is not UTF-8")
    if not any(name.strip() for name in header):
        raise DataError(f"{path.name}: there is no header: the first line must name the columns")
    _refuse_twins(path, header)
    return header


def _refuse_twins(path: Path, names: list[str]) -> None:
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise DataError(f"{path.name}: two columns have the name {twins[0]!r}")


def _fields(line: int, header: list[str], fields: list[str]) -> Record:
    if len(fields) != len(header):
        return Record(line, None, "not as many fields as the header has")
    if not _is_text(*fields):
        return Record(line, None, "not UTF-8")
    return Record(line, dict(zip(header, fields, strict=True)))


def _is_text(*fields: str) -> bool:
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _refuse_twins(path, file.schema_arrow.names)
            rows = (row for batch in file.iter_batches(batch_size=PARQUET_BATCH) for row in batch.to_pylist())
            yield from (Record(number, row) for number, row in enumerate(rows, 1))
    except pyarrow.ArrowException as cause:
        raise DataError(f"{path.name} cannot be read as Parquet: {cause}") from None


def _text_lines(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        if line.strip():
            try:
                yield Record(number, {"text": line.decode().rstrip("\r\n")})
            except UnicodeDecodeError:
                yield Record(number, None, "not UTF-8")


def _class_folders(path: Path) -> Iterator[Record]:
    """FOLDER/CLASS/*.txt; classes take turns, so that the first rows of a folder are of all classes."""
    files = [_visible(folder) for folder in _classes(path)]
    turns = [file for turn in zip_longest(*files) for file in turn if file is not None]
    return (_class_file(number, file) for number, file in enumerate(turns, 1))


def _classes(path: Path) -> list[Path]:
    return [folder for folder in _visible(path) if folder.is_dir()]


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _class_file(number: int, path: Path) -> Record:
    label, name = path.parent.name, f"{path.parent.name}/{path.name}"
    if path.suffix != ".txt":
        return Record(number, None, "not a .txt file", name)
    try:
        return Record(number, {"text": path.read_bytes().decode("utf-8-sig"), "label": label, "file": name}, None, name)
    except UnicodeDecodeError:
        return Record(number, None, "not UTF-8", name)
    except OSError as cause:
        return Record(number, None, f"cannot be read: {cause.strerror}", name)


_OF_LINES: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": partial(_table, delimiter=","),
    ".tsv": partial(_table, delimiter="\t"),
    ".txt": _text_lines,
}
_READERS = (
    _OF_LINES
    | {f"{ending}.gz": reader for ending, reader in _OF_LINES.items()}
    | {".json": _json_document, ".parquet": _parquet}
)
ENDINGS = (*_OF_LINES, ".json", ".parquet")
