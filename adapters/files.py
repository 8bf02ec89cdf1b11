"""Writing so that a reader never sees half a file: a temporary name, flushed to disk, then renamed."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["atomic_folder", "cache_folder", "write_json", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people and programs: sorted, indented, non-finite numbers refused."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name beside `target`; it takes its place only when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            os.chmod(path, 0o755 if path.is_dir() else 0o644)
            _flush(path)
        os.chmod(temporary, 0o755)
        _flush(temporary)
        _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename; what stood there is moved aside first and removed last, so that one of the two always exists whole."""
    if not target.exists():
        os.rename(temporary, target)
    else:
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.")) / "old"
        os.rename(target, aside)
        os.rename(temporary, target)
        shutil.rmtree(aside.parent, ignore_errors=True)
    _flush(target.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder() -> Path:
    """Where converted bases and sample rows are kept: $ONEGPU_CACHE, else the user's cache folder."""
    chosen = os.environ.get("ONEGPU_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(home) / "onegpu"
