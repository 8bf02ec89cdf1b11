"""Malformed adapter folders, ours and stock PEFT's: refused in a message, or loaded; the model is left as it was."""

import json
import shutil
import struct
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from onegpu.adapters import OnegpuError, load, load_base
from onegpu.adapters.errors import printable

TENSORS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"
LONGEST = 1500
PEFT = {
    "lora": LoraConfig(target_modules=["q_proj"], r=2),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def run_folder(bases: dict[str, str], data_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of two adapters wrote."""
    from onegpu.recipes import parse_recipe, run
    from onegpu.recipes.display import Display

    root = tmp_path_factory.mktemp("artefacts")
    content = {
        "base": bases["llama"],
        "adapters": [{"lora": {"rank": 2}}, {"prefix": {"length": 2}}, "layerwise-lr"],
        "task": {"chat": {"data": data_files["chat"], "evaluation": 0.3}},
        "train": {"steps": 3, "effective_batch": 2, "precision": "fp32", "learning_rate": 0.5},
    }
    run(parse_recipe(yaml.safe_dump(content), name="r", folder=root), root / "run", display=Display(quiet=True))
    return root / "run"


@pytest.fixture(scope="module")
def folders(run_folder: Path, bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Good adapter folders of several kinds."""
    root = tmp_path_factory.mktemp("stock")
    for name, config in PEFT.items():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(bases["llama"]), config)
        model.save_pretrained(str(root / name))
    return [run_folder / "adapter", run_folder / "adapter", *(root / name for name in PEFT)]


@pytest.fixture
def judge(
    folders: list[Path], bases: dict[str, str], tally: Counter[str], first_time: Callable[..., bool]
) -> Callable[..., None]:
    """Loads a folder onto one resident model."""
    model = load_base(bases["llama"], precision="fp32")
    names = [name for name, _ in model.named_modules()]

    def attempt(folder: Path) -> OnegpuError | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load(model, folder).detach()
            except OnegpuError as error:
                return error
        return None

    def give(folder: Path, *spoilt: str) -> None:
        if not first_time(*((path.relative_to(folder), path.read_bytes()) for path in _files(folder))):
            return
        error = attempt(folder)
        tally[f"exit {error.exit_code}" if error else "loaded"] += 1
        tally.update(f"refused with {name}" for name in spoilt if error)
        assert error is None or error.exit_code in (2, 3)
        assert len(printable(str(error))) <= LONGEST
        assert [name for name, _ in model.named_modules()] == names

    for folder in folders:
        give(folder)
    assert tally == {"loaded": len(set(folders))}  # they are good before they are spoilt
    tally.clear()
    return give


def _spoil_header(content: bytes, draw: Any, spoil: Any) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(spoil(draw, json.loads(content[8 : 8 + length]))).encode()
    told = draw(st.sampled_from((len(header), len(header), len(header), length, 0, 2**63, len(content))))
    return struct.pack("<Q", told) + header + content[8 + length :]


def _spoil_file(file: Path, draw: Any, spoil: Any, spoil_bytes: Any) -> None:
    content = file.read_bytes()
    way = draw(st.sampled_from(("structure", "structure", "structure", "bytes", "gone")))
    if way == "gone":
        file.unlink()
    elif way == "bytes":
        file.write_bytes(spoil_bytes(draw, content))
    elif file.name == TENSORS:
        file.write_bytes(_spoil_header(content, draw, spoil))
    else:
        file.write_text(json.dumps(spoil(draw, json.loads(content))))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.name in (TENSORS, CONFIG, MANIFEST))


def _check(judge: Any, folders: Any, tmp_path: Path, spoil: Any, spoil_bytes: Any, data: st.DataObject) -> None:
    to = tmp_path / "spoilt"
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(data.draw(st.sampled_from(folders)), to)
    chosen = data.draw(st.sets(st.sampled_from(_files(to)), min_size=1, max_size=2).map(sorted))
    for file in chosen:
        _spoil_file(file, data.draw, spoil, spoil_bytes)
    judge(to, *{file.name for file in chosen})


@settings(max_examples=60)
@given(data=st.data())
def test_a_malformed_folder_is_a_message(
    judge: Any, folders: Any, tmp_path: Path, spoil: Any, spoil_bytes: Any, data: st.DataObject
) -> None:
    _check(judge, folders, tmp_path, spoil, spoil_bytes, data)


@pytest.mark.fuzz
def test_two_thousand_malformed_folders(
    judge: Any, folders: Any, tmp_path: Path, spoil: Any, spoil_bytes: Any, tally: Counter[str]
) -> None:
    @settings(max_examples=6_000)
    @given(data=st.data())
    def each(data: st.DataObject) -> None:
        _check(judge, folders, tmp_path, spoil, spoil_bytes, data)

    each()
    print(f"\nadapter folders: {dict(tally)}")
    assert tally["exit 2"] + tally["exit 3"] >= 2_000, tally
    for name in (TENSORS, CONFIG, MANIFEST):
        assert tally[f"refused with {name}"] >= 500, tally


def _check_commands(command: Any, run_folder: Path, tmp_path: Path, spoil: Any, spoil_bytes: Any, data: Any) -> None:
    """A run folder whose manifest, configuration, tensors or recipe are spoilt, under the commands that use one."""
    to = tmp_path / "spoilt"
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run_folder, to)
    if data.draw(st.booleans()):
        file = data.draw(st.sampled_from(sorted((to / "adapter").rglob("*.json"))))
        _spoil_file(file, data.draw, spoil, spoil_bytes)
    else:
        content = spoil(data.draw, yaml.safe_load((to / "recipe.yaml").read_text()))
        (to / "recipe.yaml").write_bytes(yaml.safe_dump(content).encode("utf-8", "surrogatepass"))
    target = str(to / data.draw(st.sampled_from(("", "adapter"))))
    command(*data.draw(st.sampled_from((("evaluate", target), ("chat", target, "-m", "hi", "--tokens", "2")))))


@settings(max_examples=12)
@given(data=st.data())
def test_commands_on_a_malformed_run_are_a_message(
    command: Any, run_folder: Path, tmp_path: Path, spoil: Any, spoil_bytes: Any, data: st.DataObject
) -> None:
    _check_commands(command, run_folder, tmp_path, spoil, spoil_bytes, data)


@pytest.mark.fuzz
def test_hundreds_of_commands_on_malformed_runs(
    command: Any, run_folder: Path, tmp_path: Path, spoil: Any, spoil_bytes: Any
) -> None:
    @settings(max_examples=400)
    @given(data=st.data())
    def each(data: st.DataObject) -> None:
        _check_commands(command, run_folder, tmp_path, spoil, spoil_bytes, data)

    each()
