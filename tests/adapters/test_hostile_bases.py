"""A base is data: no code of its own is executed, and no pickle is read."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from onegpu.adapters import RecipeError, load_base

CODE = "from pathlib import Path\nPath({marker!r}).touch()\n"
CLASSES = {
    "AutoConfig": "hostile.Config",
    "AutoModelForCausalLM": "hostile.Model",
    "AutoTokenizer": ["hostile.T", None],
}


class Payload:
    """Unpickling one leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def base(worded: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`base(model_type="new")`: the worded Llama with code of its own, under a user who says yes to everything."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")

    def build(**config: Any) -> Path:
        folder = Path(shutil.copytree(worded, tmp_path / "base"))
        (folder / "hostile.py").write_text(CODE.format(marker=str(marker)))
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(CODE.format(marker=str(marker)))
        for name, change in (("config.json", {"auto_map": CLASSES} | config), ("tokenizer_config.json", {})):
            content = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(content | change))
        return folder

    return build


def test_a_model_that_needs_its_own_code_is_refused(base: Callable[..., Path], marker: Path) -> None:
    with pytest.raises(RecipeError, match=r"needs Python code of its own \(`auto_map` in its config.json\), .* never"):
        load_base(str(base(model_type="hostile")), precision="fp32")
    assert not marker.exists()


def test_a_model_that_transformers_knows_is_read_without_its_code(base: Callable[..., Path], marker: Path) -> None:
    folder = base()
    assert type(load_base(str(folder), precision="fp32")).__name__ == "LlamaForCausalLM"
    AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert not marker.exists()


def test_the_trap_works(base: Callable[..., Path], marker: Path) -> None:
    from transformers import AutoConfig

    with pytest.raises(AttributeError):  # executed, and without the class that was promised
        AutoConfig.from_pretrained(base(model_type="hostile"))
    assert marker.exists()


def test_weights_that_are_pickles_are_refused_before_they_are_read(worded: Path, tmp_path: Path, marker: Path) -> None:
    folder = Path(shutil.copytree(worded, tmp_path / "base"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(RecipeError, match=r"its weights are pickles \(pytorch_model.bin\), which are never read"):
        load_base(str(folder), precision="fp32")
    assert not marker.exists()


def test_pickles_beside_safetensors_are_passed_over(worded: Path, tmp_path: Path, marker: Path) -> None:
    folder = Path(shutil.copytree(worded, tmp_path / "base"))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    assert isinstance(load_base(str(folder), precision="fp32").get_parameter("lm_head.weight"), torch.Tensor)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"{}", bytes(100), None])
def test_damaged_weights_are_one_message(content: bytes | None, worded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(worded, tmp_path / "base"))
    (folder / "model.safetensors").unlink()
    if content is not None:
        (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(RecipeError, match=r"the weights of base .* cannot be read: "):
        load_base(str(folder), precision="fp32")
