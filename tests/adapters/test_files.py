import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from onegpu.adapters import StorageError
from onegpu.adapters.files import (
    atomic_folder,
    cache_folder,
    damage,
    discard,
    move,
    seal,
    sweep,
    write_json,
    write_text,
)


def _fail(*args: object) -> None:
    raise OSError("disk full")


def _full(*args: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_text_is_written_whole_and_readable_by_others(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "grün")
    assert (tmp_path / "a.txt").read_text("utf-8") == "grün"
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, broken, _fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(tmp_path / "a.txt", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old"}


def test_json_is_sorted_so_that_equal_contents_are_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": "é"})
    write_json(tmp_path / "b.json", {"a": "é", "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert "é" in (tmp_path / "a.json").read_text("utf-8")


def test_json_without_meaning_is_refused_before_the_old_file_is_touched(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_a_folder_appears_only_when_its_block_ends_well(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "adapter"
    with atomic_folder(target) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["adapter"]


def test_a_failed_block_leaves_the_old_folder_and_no_rubbish(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with atomic_folder(target) as partial:
        (partial / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as partial:  # noqa: PT012  # the block is tested
        (partial / "a").write_text("new")
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    for name in ("old", "new"):
        with atomic_folder(target) as partial:
            (partial / name).touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(("place", "broken"), [(tempfile, "mkdtemp"), (os, "rename")], ids=["mkdtemp", "rename"])
def test_a_folder_that_cannot_be_removed_is_named_and_whole(
    place: Any, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/a").touch()
    monkeypatch.setattr(place, broken, _full)
    with pytest.raises(StorageError, match="old was not removed: No space left on device"):
        discard(tmp_path / "old")
    assert (tmp_path / "old/a").is_file()


def test_what_a_killed_process_left_and_cannot_be_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".a.x.partial").touch()
    monkeypatch.setattr(os, "unlink", _full)
    with pytest.raises(StorageError, match=r"a\.x\.partial was not removed: No space left on device"):
        sweep(tmp_path)


def test_a_folder_can_be_read_by_others(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "adapter") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a").touch(mode=0o600)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"adapter": 0o755, "sub": 0o755, "a": 0o644}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ONEGPU_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/onegpu"),
        ({"HOME": "/home/me"}, "/home/me/.cache/onegpu"),
    ],
)
def test_the_cache_is_where_the_user_wants_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("ONEGPU_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A sealed folder with one file."""
    folder = tmp_path / "sealed"
    folder.mkdir()
    (folder / "a").write_text("content")
    seal(folder)
    assert damage(folder) is None
    return folder


@pytest.mark.parametrize(("name", "told"), [("a", "a has other bytes"), ("b", "b does not belong there")])
def test_a_file_of_another_size_is_damage_and_is_not_read(name: str, told: str, sealed: Path) -> None:
    with (sealed / name).open("wb") as file:
        file.truncate(2**42)  # a hole, which would take an hour to read
    assert damage(sealed) == told


def test_other_bytes_of_the_same_length_are_damage(sealed: Path) -> None:
    (sealed / "a").write_text("contend")
    assert damage(sealed) == "a has other bytes"


@pytest.mark.parametrize("value", [None, 7, "", "x 7", [], {}, "\ud800"], ids=repr)
def test_a_seal_that_is_none_is_damage(value: Any, sealed: Path) -> None:
    (sealed / "checksums.json").write_text(json.dumps({"a": value}))
    assert damage(sealed) in ("a has other bytes", "checksums.json is damaged")


def test_a_file_in_place_of_a_sealed_folder_is_damage(tmp_path: Path) -> None:
    (tmp_path / "sealed").touch()
    assert damage(tmp_path / "sealed") == "it is not a folder"


@pytest.mark.parametrize("to", ["nowhere", "target", "."])
def test_a_folder_takes_the_place_of_a_link_and_what_that_led_to_stays(to: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "target").symlink_to(to)
    move(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert not (tmp_path / "target").is_symlink()
