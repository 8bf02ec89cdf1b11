import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from pydantic import ValidationError

from onegpu.adapters import DataError, OnegpuError, RecipeError, Unavailable
from onegpu.recipes.data import sources
from onegpu.recipes.data.sources import Origin, Source, locate, locate_all, sources_of

pytestmark = pytest.mark.usefixtures("cache")

File = Callable[..., Path]


def _rows(origin: Origin) -> list[Any]:
    return [record.row for record in origin.records()]


def test_one_name_is_a_source_and_so_is_each_of_a_list() -> None:
    assert sources_of("a.jsonl") == (Source(source="a.jsonl", weight=1.0),)
    assert sources_of(["a.jsonl", Source(source="b.jsonl", weight=2)]) == (
        Source(source="a.jsonl"),
        Source(source="b.jsonl", weight=2.0),
    )
    with pytest.raises(RecipeError, match="empty list"):
        sources_of([])


@pytest.mark.parametrize(
    "content",
    [
        {"source": "a", "weight": 0},
        {"source": "a", "weight": -1.0},
        {"source": "a", "weight": float("inf")},
        {"source": "a", "weight": "2"},
        {"source": "a", "wieght": 2},
        {"weight": 2},
        {"source": 3},
    ],
    ids=str,
)
def test_a_source_is_strict(content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Source.model_validate(content)


def test_a_file_starts_at_the_folder_of_the_recipe(file: File, tmp_path: Path) -> None:
    path = file("data/a.jsonl", '{"text": "a"}\n')
    for written in ("data/a.jsonl", str(path)):
        origin = locate(written, folder=tmp_path)
        assert (origin.written, origin.name, _rows(origin)) == (written, "a.jsonl", [{"text": "a"}])


def test_two_files_of_one_name_are_told_apart(file: File, tmp_path: Path) -> None:
    for name in ("a/rows.jsonl", "b/rows.jsonl", "c.jsonl"):
        file(name, "{}\n")
    origins = locate_all(sources_of(["a/rows.jsonl", "c.jsonl", "b/rows.jsonl"]), folder=tmp_path)
    assert [origin.name for origin in origins] == ["a/rows.jsonl", "c.jsonl", "b/rows.jsonl"]


def test_the_digest_is_of_the_content(file: File, tmp_path: Path) -> None:
    first = locate(str(file("a.jsonl", "{}\n")), folder=tmp_path).digest()
    assert locate(str(file("b.jsonl", "{}\n")), folder=tmp_path).digest() == first
    assert locate(str(file("b.jsonl", "{}\n\n")), folder=tmp_path).digest() != first


def test_the_digest_of_a_folder_is_of_names_and_contents(file: File, tmp_path: Path) -> None:
    file("t/a/1.txt", "one")
    digests = [locate("t", folder=tmp_path).digest() for _ in range(2)]
    (tmp_path / "t" / "a" / "1.txt").rename(tmp_path / "t" / "a" / "2.txt")
    digests.append(locate("t", folder=tmp_path).digest())
    (tmp_path / "t" / "a" / "2.txt").write_text("two")
    digests.append(locate("t", folder=tmp_path).digest())
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.fixture
def package(file: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package with a file of rows; importing it is an error."""
    file("site/rows_of_test/__init__.py", "raise RuntimeError('imported')")
    file("site/rows_of_test/data/train.jsonl", '{"text": "a"}\n')
    file("site/secret.jsonl", "{}\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return "rows_of_test"


def test_a_file_of_a_package_is_found_without_importing_it(package: str, tmp_path: Path) -> None:
    origin = locate(f"package:{package}/data/train.jsonl", folder=tmp_path)
    assert (origin.name, _rows(origin)) == ("train.jsonl", [{"text": "a"}])
    assert package not in sys.modules


@pytest.mark.parametrize(
    ("written", "told", "code"),
    [
        ("package:{}/data/trian.jsonl", "no 'data/trian.jsonl'; did you mean 'data/train.jsonl'?", 2),
        ("package:{}/../secret.jsonl", "the path leaves the package", 2),
        ("package:no_such_package/a.jsonl", "try `pip install --no-deps no-such-package`", 3),
        ("package:os.path/a.jsonl", "not installed", 3),
        ("package:{}/__init__.py", "a file must end in", 2),
    ],
)
def test_what_a_package_does_not_have_is_refused(
    package: str, tmp_path: Path, written: str, told: str, code: int
) -> None:
    with pytest.raises(OnegpuError) as caught:
        locate(written.format(package), folder=tmp_path)
    assert told in str(caught.value)
    assert caught.value.exit_code == code


def test_a_sample_is_read_when_it_is_asked_for_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def sample(name: str) -> list[dict[str, Any]]:
        asked.append(name)
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setattr(sources, "_sample", sample)
    origin = locate("sample:tiny", folder=tmp_path)
    assert asked == []
    assert len(origin.digest()) == 64
    assert [(r.line, r.row) for r in origin.records()] == [(1, {"text": "a"}), (2, {"text": "b"})]
    assert asked == ["tiny"]


@pytest.fixture
def hub(file: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub whose every data set is a file here, read by the real library; collects what was asked for."""
    path = file("hub.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    asked: list[tuple[Any, ...]] = []
    load = datasets.load_dataset

    def load_dataset(name: str, config: str | None, *, revision: str, split: str, keep_in_memory: bool) -> Any:
        asked.append((name, config, revision, split))
        assert datasets.are_progress_bars_disabled()
        return load("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "hf"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("hub:me/set@v1", ("me/set", None, "v1", "train")),
        ("hub:set@refs/pr/1#test[:10%]", ("set", None, "refs/pr/1", "test[:10%]")),
        ("hub:me/set:de-en@0a1b#validation", ("me/set", "de-en", "0a1b", "validation")),
    ],
)
def test_a_hub_data_set_is_loaded_when_it_is_asked_for(
    hub: list[tuple[Any, ...]], tmp_path: Path, written: str, asked: tuple[Any, ...]
) -> None:
    origin = locate(written, folder=tmp_path)
    assert hub == []
    digest = origin.digest()
    assert _rows(origin) == [{"text": "a"}, {"text": "b"}]
    assert hub == [asked]
    assert digest == locate(written, folder=tmp_path).digest() != locate(f"{written}s", folder=tmp_path).digest()


def test_a_hub_data_set_that_moved_has_another_digest(hub: list[tuple[Any, ...]], file: File, tmp_path: Path) -> None:
    before = locate("hub:me/set@main", folder=tmp_path).digest()
    file("hub.jsonl", '{"text": "c"}\n')
    assert locate("hub:me/set@main", folder=tmp_path).digest() != before


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("hub:me/set", "needs a revision: hub:me/set@REVISION"),
        ("hub:me/set#test", "needs a revision"),
        ("hub:", "is written hub:ID:CONFIG@REVISION#SPLIT"),
        ("hub:a/b/c@v1", "is written hub:"),
    ],
)
def test_a_hub_data_set_that_is_not_pinned_is_refused(tmp_path: Path, written: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        locate(written, folder=tmp_path)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("cause", "error"), [(ConnectionError("no way"), Unavailable), (ValueError("no way\nmore"), DataError)]
)
def test_a_hub_data_set_that_cannot_be_loaded_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: Exception, error: type[Exception]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise cause

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(error, match=r"data 'hub:me/set@v1'.*: no way$"):
        locate("hub:me/set@v1", folder=tmp_path).digest()
