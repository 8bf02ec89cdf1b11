"""What the tests of samples share: small packages made here, and an empty cache to put them in."""

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onegpu.recipes.data.samples import SAMPLES, sample_rows
from onegpu.recipes.data.samples.archives import Package

Row = dict[str, Any]
Members = Mapping[str, bytes | str]
Pack = Callable[[Path, Members], Package]

WHEEL, SOURCE = "tiny-1.0-py3-none-any.whl", "tiny-1.0.tar.gz"


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the user, except for tests of the real packages; pip is set up for no index."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("ONEGPU_CACHE", str(tmp_path / "cache"))
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "cache"


@pytest.fixture
def pack() -> Pack:
    """`pack(path, {member: content})`: writes a wheel or a source archive, after its name, and pins it."""

    def write(path: Path, members: Members) -> Package:
        contents = {name: text.encode() if isinstance(text, str) else text for name, text in members.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        (_wheel if path.suffix == ".whl" else _source_archive)(path, contents)
        return Package("tiny", "1.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest())

    return write


def _wheel(path: Path, contents: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in contents.items():
            wheel.writestr(name, content)


def _source_archive(path: Path, contents: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as source:
        for name, content in contents.items():
            entry = tarfile.TarInfo(f"tiny-1.0/{name}")
            entry.size = len(content)
            source.addfile(entry, io.BytesIO(content))


@pytest.fixture
def offer(cache: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Row]]:
    """`offer("quartz", {member: content})`: the rows of a sample, its packages replaced by ones with these members."""

    def rows(name: str, *contents: Members) -> list[Row]:
        packages = []
        for number, (package, members) in enumerate(zip(SAMPLES[name].packages, contents, strict=True)):
            unpinned = Package(f"tiny{number}", "1.0", WHEEL if package.file.endswith(".whl") else SOURCE, "")
            packages.append(replace(unpinned, sha256=pack(unpinned.path, members).sha256))
        monkeypatch.setitem(SAMPLES, name, replace(SAMPLES[name], packages=tuple(packages)))
        return sample_rows(name)

    return rows
