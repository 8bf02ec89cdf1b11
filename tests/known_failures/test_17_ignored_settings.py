"""17. A misspelt or unknown setting is silently ignored.

Met: `quantizaton: 4bit` trains in full precision; a renamed option falls back to its default; `2e-5` is a text; a value
is checked and read by nobody.

Here: unknown keys are errors at every level, with line and nearest name, exit code 2, all at once; numbers are numbers
in any notation; `onegpu show` prints every effective value; every setting is read in a run.

Also: tests/recipes/test_loading.py (every leaf key, misspelt and misplaced), tests/recipes/test_every_setting.py (each
setting is read, and each of training changes a run), tests/recipes/test_every_task_setting.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from onegpu.adapters import get
from onegpu.recipes import Loaded, Outcome

Written = Callable[..., str]
MISSPELT = [
    ("train:", "trian:", "did you mean 'train'"),
    ("learning_rate:", "learning_rte:", "did you mean 'learning_rate'"),
    ("evaluation:", "evalution:", "did you mean 'evaluation'"),
    ("rank:", "rnak:", "did you mean 'rank'"),
]
PLUGINS = [("lora:", "lorra:", "did you mean 'lora'"), ("chat:", "caht:", "did you mean 'chat'")]  # may be missing here


@pytest.mark.parametrize(("right", "wrong", "hint"), [*MISSPELT, *PLUGINS])
def test_a_misspelt_key_ends_the_command_with_its_line(
    right: str, wrong: str, hint: str, written: Written, onegpu: Any, tmp_path: Path
) -> None:
    text = written()
    assert text.count(right) == 1
    (tmp_path / "recipe.yaml").write_text(text.replace(right, wrong), "utf-8")
    line = text[: text.index(right)].count("\n") + 1
    code, _, errors = onegpu("run", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"))
    setting = (right, wrong, hint) in MISSPELT
    assert code == (2 if setting else 3)
    assert hint in errors
    assert f"recipe.yaml:{line}" in errors or not setting  # what is no plugin is told at the line of its section
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_all_misspelt_keys_are_told_at_once(written: Written, onegpu: Any, tmp_path: Path) -> None:
    text = written()
    for right, wrong, _ in MISSPELT[1:]:
        text = text.replace(right, wrong)
    (tmp_path / "recipe.yaml").write_text(text, "utf-8")
    code, _, errors = onegpu("show", str(tmp_path / "recipe.yaml"))
    assert code == 2
    assert [hint for _, _, hint in MISSPELT[1:] if hint not in errors] == []


def test_a_number_is_a_number_and_every_value_is_shown(written: Written, onegpu: Any, tmp_path: Path) -> None:
    text = written().replace("learning_rate: 0.01", "learning_rate: 2e-5")
    assert isinstance(yaml.safe_load(text)["train"]["learning_rate"], str)  # what YAML 1.1 makes of it
    (tmp_path / "recipe.yaml").write_text(text, "utf-8")
    code, shown, _ = onegpu("show", str(tmp_path / "recipe.yaml"), "--json")
    resolved = json.loads(shown)
    assert code == 0
    assert resolved["train"]["learning_rate"] == 2e-5
    assert resolved["train"]["schedule"] == "cosine"
    ((name, settings),) = resolved["adapters"][0].items()
    assert name == "lora"
    assert settings.keys() == get("lora").model_fields.keys()
    assert (settings["rank"], settings["dropout"], settings["targets"]) == (4, 0.0, "all-linear")


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("train", {"learning_rate": 0.02}),
        ("train", {"clip": 0.01}),
        ("task", {"supervise": "last"}),
        ("task", {"label_smoothing": 0.1}),
    ],
    ids=str,
)
def test_one_setting_makes_another_manifest_and_another_adapter(
    section: str, change: dict[str, Any], recipe: Callable[..., Loaded], run: Callable[..., Outcome]
) -> None:
    plain = run(recipe(train={"optimizer": "sgd"}), "plain").adapter
    sections: dict[str, Any] = {"train": {"optimizer": "sgd"}}
    sections[section] = sections.get(section, {}) | change
    changed = run(recipe(**sections), "changed").adapter
    for name in ("manifest.json", "adapter_model.safetensors"):
        assert (plain / name).read_bytes() != (changed / name).read_bytes(), name
