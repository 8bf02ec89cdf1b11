from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from onegpu.adapters import ArtefactError
from onegpu.adapters.untrusted import DEEPEST, inside, read_json, read_tensors


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A snapshot as the hub's cache keeps one: its files are links to `blobs/`."""
    snapshot = tmp_path / "models--someone--model" / "snapshots" / "abc"
    (snapshot / "sub").mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    (snapshot.parents[1] / "blobs" / "123").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/123")
    (snapshot / "sub" / "config.json").symlink_to("../../../blobs/123")
    return snapshot


def test_links_of_the_hubs_cache_are_followed(hub_cache: Path) -> None:
    assert read_json(inside(hub_cache, "config.json")) == {"a": 1}
    assert read_json(inside(hub_cache / "sub", "config.json")) == {"a": 1}


def test_blobs_that_are_a_link_themselves_are_not(hub_cache: Path, tmp_path: Path) -> None:
    blobs = hub_cache.parents[1] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match="lies outside the artefact"):
        inside(hub_cache, "config.json")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "link", "sub/../../secret"])
def test_nothing_leads_out_of_a_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "link").symlink_to("../secret")
    with pytest.raises(ArtefactError, match="lies outside the artefact"):
        inside(tmp_path / "folder", name)


def test_a_folder_that_is_itself_a_link_is_as_good_as_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.json").write_text("{}")
    (tmp_path / "link").symlink_to("folder")
    assert read_json(inside(tmp_path / "link", "a.json")) == {}


@pytest.mark.parametrize(("depth", "fine"), [(DEEPEST, True), (DEEPEST + 1, False), (10_000, False)])
def test_json_is_read_to_a_depth(depth: int, fine: bool, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}")
    if fine:
        assert read_json(tmp_path / "a.json")
    else:
        with pytest.raises(ArtefactError, match="nested too deeply"):
            read_json(tmp_path / "a.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_good_tensors_are_read_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    given = {"ü": torch.arange(6).reshape(2, 3).to(dtype), "empty": torch.zeros(0, 3).to(dtype)}
    save_file(given, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = read_tensors(tmp_path / "a.safetensors")
    assert found.keys() == given.keys()
    assert all(torch.equal(found[key], given[key]) for key in given)


def test_a_file_of_tensors_is_not_read_before_it_is_looked_at(tmp_path: Path) -> None:
    """Half a terabyte of nothing, which no machine here could hold."""
    size = 2**39
    header = b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    try:
        assert read_tensors(tmp_path / "a.safetensors")["a"].shape == (size,)
    except ArtefactError as error:  # where not even the addresses are to be had
        assert "is damaged" in str(error)  # noqa: PT017
