import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest

from onegpu.adapters import RecipeError, StorageError
from onegpu.recipes import scaffold
from onegpu.recipes.scaffold import FILES, TEMPLATES, new_adapter

Command = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text("utf-8") for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("written", "name", "module", "class_name"),
    [
        ("my-gate", "my-gate", "my_gate", "MyGate"),
        ("My_Gate", "my-gate", "my_gate", "MyGate"),
        ("gate", "gate", "gate", "Gate"),
        ("gate2--x", "gate2-x", "gate2_x", "Gate2X"),
    ],
)
def test_names_of_package_module_and_class_come_from_one(
    written: str, name: str, module: str, class_name: str, tmp_path: Path
) -> None:
    assert new_adapter(written) == Path(name)
    content = _content(tmp_path / name)
    own = {f"{module}.py", f"tests/test_{module}.py"}
    assert content.keys() == {"pyproject.toml", "README.md", ".gitignore", "LICENSE"} | own
    project = tomllib.loads(content["pyproject.toml"])
    assert project["project"]["name"] == name
    assert project["project"]["entry-points"]["onegpu.adapters"] == {name: f"{module}:{class_name}"}
    assert project["project"]["dependencies"] == ["onegpu>=0.1"]
    assert project["tool"]["setuptools"]["py-modules"] == [module]
    classes = [node.name for node in ast.parse(content[f"{module}.py"]).body if isinstance(node, ast.ClassDef)]
    assert classes == [class_name, f"{class_name}Attachment"]
    assert f'adapter = "{name}"' in content[f"tests/test_{module}.py"]
    assert not [text for text in content.values() if "$" in text]


RUFF = ["ruff", "check", "--isolated", "--line-length=120", "--select=E,F,W,I,B,UP,PT,RET", "package"]
MYPY = ["mypy", "--strict", "--explicit-package-bases", "package/my_gate.py"]


@pytest.mark.parametrize("command", [RUFF, pytest.param(MYPY, marks=pytest.mark.slow)], ids=["ruff", "mypy"])
def test_what_is_written_is_as_clean_as_our_own_code(command: list[str], tmp_path: Path) -> None:
    new_adapter("my-gate", tmp_path / "package")
    environment = os.environ | {"MYPYPATH": str(ROOT / ".imports")}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("package")] == []
    assert not done.stderr


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lora", "an adapter 'lora' is installed already, by onegpu"),
        ("LoRA", "an adapter 'lora' is installed already, by onegpu"),
        ("layerwise_lr", "an adapter 'layerwise-lr' is installed already, by onegpu"),
        ("class", "a word of the language Python"),
        ("none", "a word of the language Python"),
        ("json", "Python's standard library"),
        ("Random", "Python's standard library"),
        ("torch", "a module 'torch' is installed already"),
        ("onegpu", "a module 'onegpu' is installed already"),
        ("setup", "means something else"),
        ("tests", "means something else"),
        ("adapter", "the class would be called Adapter"),
        ("attachment", "the class would be called Attachment"),
        ("3d", "begin with a letter"),
        ("-x", "begin with a letter"),
        ("a.b", "begin with a letter"),
        ("a b", "begin with a letter"),
        ("../up", "begin with a letter"),
        ("größe", "begin with a letter"),
        ("x-", "begin with a letter"),
        ("", "begin with a letter"),
    ],
)
def test_a_name_that_would_be_in_the_way_is_refused(name: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^[^\n]*$") as caught:
        new_adapter(name)
    assert told in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_an_installed_plugin_is_refused(declare: Callable[..., None], onegpu: Command) -> None:
    declare("onegpu.adapters", "toy", "onegpu_no_such_module:Toy")
    code, out, err = onegpu("new-adapter", "toy")
    assert (code, out) == (2, "")
    assert err == "onegpu: an adapter 'toy' is installed already, by other 1.0\n"


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert new_adapter("my-gate", tmp_path / "empty").is_dir()
    before = _content(tmp_path / "empty")
    with pytest.raises(RecipeError, match="is not empty"):
        new_adapter("my-door", tmp_path / "empty")
    assert _content(tmp_path / "empty") == before
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="is a file"):
        new_adapter("my-door", tmp_path / "file")
    with pytest.raises(RecipeError, match=r"/file is a file"):
        new_adapter("my-door", tmp_path / "file" / "below")


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_text

    def full(path: Path, text: str, *args: str) -> int:
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        return real(path, text, *args)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match="my-gate was not written: No space left on device"):
        new_adapter("my-gate")
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_to_do_next(onegpu: Command, tmp_path: Path) -> None:
    code, out, err = onegpu("new-adapter", "my-gate", "-o", "a folder")
    assert (code, err) == (0, "")
    assert "cd 'a folder'\n  pip install -e '.[test]'\n  pytest\n" in out
    assert (tmp_path / "a folder" / "my_gate.py").is_file()


def test_every_template_is_used_and_is_in_the_wheel() -> None:
    assert {path.name for path in TEMPLATES.iterdir()} == set(FILES)
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    inside = Path(scaffold.__file__).parent
    for path in TEMPLATES.iterdir():
        assert any(fnmatch(str(path.relative_to(inside)), pattern) for pattern in shipped["onegpu.recipes"])
