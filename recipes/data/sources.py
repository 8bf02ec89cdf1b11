"""What may stand under `data:`: files, folders, packages, samples, hub data sets, alone or as a weighted list."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from onegpu.adapters import DataError, RecipeError, Unavailable
from onegpu.adapters.sources import in_package

from .formats import Record, check_data, read_records

__all__ = ["Origin", "Source", "locate", "locate_all", "sources_of"]

HUB = re.compile(r"hub:(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^@#]+))?(@(?P<revision>[^#]+))?(#(?P<split>.+))?")


class Source(BaseModel):
    """One of several places that rows are taken from."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    source: str
    """A file, a folder with a folder of texts for each class, `package:NAME/path`, `sample:NAME`, or
    `hub:ID:CONFIG@REVISION#SPLIT`, where CONFIG and SPLIT may be left out."""

    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """How often each row is seen an epoch: 2 is twice; 0.5 is half of the rows, others in every epoch."""


@dataclass(frozen=True)
class Origin:
    """A source that was found, and how it is read."""

    written: str
    name: str  # in the places of its rows
    digest: Callable[[], str]  # of its content
    records: Callable[[], Iterator[Record]]


def sources_of(data: str | Sequence[str | Source]) -> tuple[Source, ...]:
    """What is written under `data:` as sources; one that is only named has weight 1.

    Raises:
        RecipeError: an empty list.
    """
    listed = [data] if isinstance(data, str) else data
    if not listed:
        raise RecipeError("data: an empty list; name at least one source")
    return tuple(Source(source=item) if isinstance(item, str) else item for item in listed)


def locate_all(sources: Sequence[Source], *, folder: Path) -> list[Origin]:
    """Find every source. Two of one name are told apart in messages by the whole of what was written.

    Raises: see `locate`.
    """
    origins = [locate(source.source, folder=folder) for source in sources]
    names = [origin.name for origin in origins]
    return [replace(o, name=o.written) if names.count(o.name) > 1 else o for o in origins]


def locate(written: str, *, folder: Path) -> Origin:
    """Find a source; relative paths start at `folder`. A file is not read, and nothing is downloaded.

    Raises:
        RecipeError: no such file, an unknown format, a hub data set without a revision.
        DataError: an empty file, a folder without classes.
        Unavailable: a Python package that is not installed.
    """
    if written.startswith("sample:"):
        rows = cache(partial(_sample, written.removeprefix("sample:")))
        return Origin(written, written, lambda: _rows_digest(rows()), lambda: _numbered(rows()))
    if written.startswith("hub:"):
        return _hub(written)
    path = (
        in_package(written, "data", _files) if written.startswith("package:") else folder / Path(written).expanduser()
    )
    check_data(path, written)
    return Origin(written, path.name, partial(_content_digest, path), partial(read_records, path))


def _sample(name: str) -> list[dict[str, Any]]:
    from .samples import sample_rows  # opens an archive, perhaps downloads it

    rows: list[dict[str, Any]] = sample_rows(name)
    return rows


def _rows_digest(rows: Sequence[dict[str, Any]]) -> str:
    return hashlib.sha256("\n".join(json.dumps(row, sort_keys=True) for row in rows).encode()).hexdigest()


def _numbered(rows: Any) -> Iterator[Record]:
    return (Record(number, dict(row)) for number, row in enumerate(rows, 1))


def _content_digest(path: Path) -> str:
    """Of a file's bytes; of a folder, of the names and bytes of all files in it."""
    try:
        if not path.is_dir():
            return _file_digest(path)
        digest = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\n{_readable_digest(file)}\n".encode())
        return digest.hexdigest()
    except OSError as cause:
        raise DataError(f"{path.name} cannot be read: {cause.strerror}") from cause


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _readable_digest(path: Path) -> str:
    """One unreadable file in a folder is a row with a problem, not the end."""
    try:
        return _file_digest(path)
    except PermissionError:
        return "unreadable"


def _files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc"]


def _hub(written: str) -> Origin:
    parts = HUB.fullmatch(written)
    if parts is None:
        raise RecipeError(f"data {written!r}: a hub data set is written hub:ID:CONFIG@REVISION#SPLIT")
    if parts["revision"] is None:
        raise RecipeError(f"data {written!r}: a hub data set needs a revision: hub:{parts['id']}@REVISION")
    loaded = cache(partial(_load_from_hub, written, **parts.groupdict()))
    return Origin(written, written, lambda: _hub_digest(written, loaded()), lambda: _numbered(loaded()))


def _load_from_hub(written: str, *, id: str, config: str | None, revision: str, split: str | None) -> Any:
    import datasets

    try:
        with _no_progress_bars():
            return datasets.load_dataset(id, config, revision=revision, split=split or "train", keep_in_memory=False)
    except ConnectionError as cause:
        raise Unavailable(f"data {written!r}: the hub cannot be reached: {_first_line(cause)}") from cause
    except (OSError, ValueError, RuntimeError) as cause:
        raise DataError(f"data {written!r} cannot be loaded: {_first_line(cause)}") from cause


def _first_line(cause: Exception) -> str:
    return (str(cause).splitlines() or [type(cause).__name__])[0]


def _hub_digest(written: str, loaded: Any) -> str:
    """A revision may be a branch, which moves; so the digest is of what `datasets` keeps on disk, by content."""
    files = [_file_digest(Path(file["filename"])) for file in loaded.cache_files]
    return hashlib.sha256("\n".join([written, *files]).encode()).hexdigest()


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
