"""The code in the documentation runs."""

import dataclasses
import importlib.metadata
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedModel

from onegpu.adapters import Adapter, Attachment, Capabilities, Context, attach, load, registry, save
from onegpu.recipes import Train, packaged_recipes
from onegpu.recipes.data.samples import SAMPLES
from onegpu.recipes.tasks import Task, get_task

ROOT = Path(__file__).parent.parent


def code_block(document: str, before: str) -> str:
    """The first Python block of a document after some text."""
    text = (ROOT / document).read_text("utf-8").partition(before)[2]
    match = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert match, f"{document} has no Python block after {before!r}"
    return match.group(1)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The adapter of the README as an installed plugin called `gain`."""
    module = ModuleType("my_package")
    monkeypatch.setitem(sys.modules, "my_package", module)
    exec(code_block("README.md", "<!-- an adapter -->"), module.__dict__)
    real = importlib.metadata.entry_points
    point = EntryPoint("gain", "my_package:Gain", "onegpu.adapters")

    def with_gain(**which: Any) -> Any:
        found = real(**which)
        return [*found, point] if which.get("group") == "onegpu.adapters" else found

    monkeypatch.setattr(importlib.metadata, "entry_points", with_gain)
    registry.entry_of.cache_clear()
    yield module
    registry.entry_of.cache_clear()


def test_the_adapter_in_the_readme_trains_saves_and_loads(
    published: ModuleType,
    llama: PreTrainedModel,
    ids: torch.Tensor,
    noise: Callable[[Any], None],
    tmp_path: Path,
) -> None:
    before = llama(ids).logits
    stack = attach(llama, [{"gain": {"targets": ["down_proj", "o_proj"]}}, {"layerwise-lr": {"decay": 0.5}}])
    assert torch.equal(llama(ids).logits, before)
    llama(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in stack.trainable().values())
    assert sorted({rate.multiplier for rate in stack.rates().values()}) == [0.25, 0.5]
    noise(stack.trainable())
    trained = llama(ids).logits
    save(stack, tmp_path / "adapter")
    stack.detach()
    assert torch.equal(llama(ids).logits, before)
    load(llama, tmp_path / "adapter")
    assert torch.equal(llama(ids).logits, trained)


def test_an_author_needs_less_than_sixty_lines(author_files: dict[str, str]) -> None:
    assert sorted(author_files) == ["onegpu_bottleneck.py", "pyproject.toml", "tests/test_bottleneck.py"]
    lines = [line for text in author_files.values() for line in text.splitlines() if line.strip()]
    assert len(lines) < 60


def test_the_page_for_authors_names_all_that_one_can_declare_and_override() -> None:
    page = (ROOT / "docs" / "write-an-adapter.md").read_text("utf-8")
    capabilities = {field.name for field in dataclasses.fields(Capabilities)} - {"reasons"}
    context = {field.name for field in dataclasses.fields(Context)}
    assert [name for name in capabilities | context if f"`{name}`" not in page] == []
    for contract in (Adapter, Attachment):
        verbs = [name for name, value in vars(contract).items() if _overridable(name, value)]
        assert len(verbs) >= 7
        assert [verb for verb in verbs if f"`{verb}(" not in page] == []


def _overridable(name: str, value: Any) -> bool:
    return not name.startswith("_") and isinstance(value, (FunctionType, classmethod))


def test_the_code_in_the_python_page_runs(
    worded: Path, peft_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "python.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    for block in blocks:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*was saved by PEFT|.*activation_checkpointing")
            exec(block.replace('"BASE"', repr(str(worded))).replace('"PEFT-FOLDER"', repr(str(peft_folder))), names)
    written = ("ADAPTER", "ADAPTER-FOR-PEFT", "RUNS/adapter-2")
    assert [name for name in written if not (tmp_path / name / "manifest.json").is_file()] == []
    stock, ours = (load_file(folder / "adapter_model.safetensors") for folder in (peft_folder, tmp_path / written[1]))
    assert ours.keys() == stock.keys()
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(worded), tmp_path / written[1])


def test_the_settings_page_names_every_setting_of_train_and_its_default() -> None:
    shown = _settings_shown("docs/recipes.md", "## train")
    assert shown.keys() == Train.model_fields.keys()
    for name, default in Train().model_dump().items():  # as recipes are written
        if name not in ("steps", "epochs"):  # their default is a sentence
            assert shown[name] == _as_yaml(default), name


def test_the_settings_page_names_every_setting_that_tasks_share_and_its_default() -> None:
    shown = _settings_shown("docs/recipes.md", "Settings that all tasks share:")
    assert shown.keys() == Task.model_fields.keys()
    needed = {name for name, field in Task.model_fields.items() if field.is_required()}
    assert shown == {n: "" if n in needed else _as_yaml(field.default) for n, field in Task.model_fields.items()}


def test_the_page_of_tasks_describes_each_with_all_its_settings_and_scores() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text("utf-8")
    common = page.partition("\n## ")[0]
    ours = [entry.name for entry in registry.entries(registry.TASKS) if entry.distribution == registry.OURS]
    assert len(ours) >= 10
    for name in ours:
        task, section = get_task(name), page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert section, f"docs/tasks.md has no section on {name}"
        own = task.model_fields.keys() - Task.model_fields.keys()
        assert [setting for setting in own if f"`{setting}" not in section + common] == [], name
        (row,) = [line for line in common.splitlines() if line.startswith(f"| `{name}` | ") and "loss" not in line[:20]]
        if name != "distillation":
            example = task.model_validate({"data": "rows.csv"})
            scores = example.measures().keys() - {"loss"}
            assert [score for score in scores if f"`{score}`" not in row and "as `chat`" not in row] == [], name
            assert [score for score in example.directions(None) if f"`{score}`" not in common] == [], name


def test_the_settings_page_names_every_sample_and_recipe() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    ours = [packaged.name for packaged in packaged_recipes() if packaged.origin == registry.OURS]
    assert ours
    assert [name for name in (*ours, *SAMPLES) if f"`{name}`" not in page] == []


def _settings_shown(document: str, before: str) -> dict[str, str]:
    """Name and default of each setting in the first table after some text."""
    text = (ROOT / document).read_text("utf-8").partition(before)[2]
    table = text.partition("| --- ")[2].partition("\n\n")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    return {name: row[2].strip() for row in rows for name in re.findall(r"`(\w+)`", row[1])}


def _as_yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    return {2e-4: "2e-4", 0.0: "0"}.get(value, str(value)) if isinstance(value, float) else str(value)
