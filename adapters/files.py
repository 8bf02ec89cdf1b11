"""Writing so that a reader never sees half a file: a temporary name, flushed to disk, then renamed.

A folder that is to be trusted after a crash is sealed: `checksums.json` in it has digest and size of every other file.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import ArtefactError, StorageError, printable
from .untrusted import read_json

__all__ = [
    "atomic_folder",
    "cache_folder",
    "damage",
    "discard",
    "flush",
    "leftovers",
    "move",
    "seal",
    "storage",
    "sweep",
    "there",
    "write_json",
    "write_text",
]

PARTIAL = ".partial"  # how temporary names end, so that what a killed process left can be told from all else
SEAL = "checksums.json"
LONGEST = 200  # characters of a name in a message
REFUSALS = {  # what a disk, a folder or a process says that can take no more
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EMFILE, errno.ENFILE),
}


@contextmanager
def storage(path: Path, done: str = "written") -> Iterator[None]:
    """Turn what the disk, the folder or the limits of the process refuse inside the block into one clear message.

    Raises:
        StorageError: `path` was not written, or what else was to be `done` with it, and why.
    """
    try:
        yield
    except (OSError, SafetensorError) as cause:
        code = _code(cause)
        if code not in REFUSALS:
            raise
        named = getattr(cause, "filename", None)
        where = f" ({named})" if named and str(named) != str(path) else ""
        raise StorageError(f"{path} was not {done}: {os.strerror(code)}{where}") from cause


def _code(cause: Exception) -> int | None:
    if isinstance(cause, OSError):
        return cause.errno
    found = re.search(r"\(os error (\d+)\)", str(cause))  # how the library of safetensors reports one
    return int(found[1]) if found else None


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing.

    Raises:
        StorageError: the disk is full, or the folder may not be written.
    """
    with storage(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
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
        flush(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people and programs: sorted, indented, non-finite numbers refused."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name beside `target`; it takes its place only when the block ends well.

    Raises:
        StorageError: the disk is full, or the folder may not be written.
    """
    with storage(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=PARTIAL))
        try:
            yield temporary
            for path in sorted(temporary.rglob("*")):
                os.chmod(path, 0o755 if path.is_dir() else 0o644)
                flush(path)
            os.chmod(temporary, 0o755)
            flush(temporary)
            move(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def move(source: Path, target: Path) -> None:
    """Rename a folder; what stood there is moved aside first and removed last, so that one of the two is always whole.

    Raises:
        StorageError: the folder may not be written.
    """
    with storage(target):
        if not os.path.lexists(target):  # a link that leads nowhere is something, too
            os.rename(source, target)
        else:
            aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=PARTIAL)) / "old"
            os.rename(target, aside)
            os.rename(source, target)
            shutil.rmtree(aside.parent, ignore_errors=True)
        flush(target.parent)


def discard(folder: Path) -> None:
    """Remove a folder so that nothing ever looks at half of it: it loses its name first.

    Raises:
        StorageError: the folder around it may not be written; it is as it was.
    """
    with storage(folder, "removed"):
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=PARTIAL)) / "old"
        os.rename(folder, aside)
        shutil.rmtree(aside.parent, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a process that was killed while writing into this folder left behind.

    Raises:
        StorageError: the folder may not be written.
    """
    for path in leftovers(folder):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with storage(path, "removed"):
                path.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """What lies in a folder under a temporary name: half of something, for nobody to read."""
    return sorted(folder.glob(f".*{PARTIAL}"))


def seal(folder: Path) -> None:
    """Write down the digest and the size of every file in a folder, as read back, for `damage`."""
    write_json(folder / SEAL, {name: _digest(path) for name, path in _files(folder).items()})


def damage(folder: Path) -> str | None:
    """How a sealed folder differs from what was sealed; None when it does not.

    Nothing is followed out of the folder, and nothing waited for: a link or a pipe in it is damage.

    Raises:
        StorageError: it cannot be told, for instance as too many files are open.
    """
    try:
        texts = _irregular(folder) or _differences(_sealed(folder), _files(folder))
    except FileNotFoundError as cause:
        return f"{printable(Path(cause.filename).name)} is missing"
    except ArtefactError:
        return f"{SEAL} is damaged"
    except OSError as cause:
        if cause.errno == errno.EIO:  # the disk itself
            return f"it cannot be read: {cause}"
        raise StorageError(f"{folder} cannot be checked: {cause}") from cause
    return printable("; ".join(text[:LONGEST] for text in texts[:3])) or None


def _irregular(folder: Path) -> list[str]:
    """What is neither a file nor a folder, for `damage`."""
    if folder.is_symlink():
        return ["it is a link"]
    if folder.exists() and not folder.is_dir():
        return ["it is not a folder"]
    return [
        f"{path.relative_to(folder).as_posix()} is {'a link' if path.is_symlink() else 'not a file'}"
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not (path.is_file() or path.is_dir())
    ]


def _sealed(folder: Path) -> dict[str, Any]:
    (folder / SEAL).stat()  # FileNotFoundError
    try:
        return read_json(folder / SEAL)
    except ArtefactError as cause:
        if isinstance(cause.__cause__, OSError):  # the machine, not the file
            raise cause.__cause__ from None
        raise


def _differences(sealed: dict[str, Any], found: dict[str, Path]) -> list[str]:
    """A file of another size is not read: it may be larger than anybody has time for."""
    texts = [f"{name} is missing" for name in sorted(sealed.keys() - found.keys())]
    texts += [f"{name} does not belong there" for name in sorted(found.keys() - sealed.keys())]
    for name, path in found.items():
        size = str(sealed.get(name)).rpartition(" ")[2]
        if name in sealed and (size != str(path.stat().st_size) or sealed[name] != _digest(path)):
            texts.append(f"{name} has other bytes")
    return texts


def _files(folder: Path) -> dict[str, Path]:
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    found.pop(SEAL, None)
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()} {path.stat().st_size}"


def flush(path: Path) -> None:
    """Have the disk hold what a file, or the list of names in a folder, has come to."""
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


def there(path: Path) -> bool:
    """Whether a path leads to something; one that no file can have, or that may not be looked at, leads nowhere."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
