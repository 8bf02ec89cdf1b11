"""7. The adapter "loads", and nothing is applied.

Met: keys that do not fit are passed over with a warning at most: the base was loaded by another class, a name contains
"lora" or "weight", a library renamed its modules. Outputs are those of the base, or of a new random adapter.

Here: the keys, shapes and dtypes of a folder are exactly those of the model, or each that is not is named and nothing
is attached; the manifest holds logits of the trained model to compare with.

Also: tests/adapters/test_artefact.py, tests/adapters/conformance/test_table.py (strictness)
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from onegpu.adapters import ArtefactError, attach, load, load_base, save
from onegpu.recipes import Loaded, Outcome

Fresh = Callable[..., PreTrainedModel]
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapter(fresh: Fresh, noise: Callable[[Any], None], tmp_path: Path) -> Path:
    """The folder of a LoRA that does something."""
    stack = attach(fresh(), ["lora"])
    noise(stack.trainable())
    save(stack, tmp_path / "adapter")
    return tmp_path / "adapter"


def _renamed(tensors: dict[str, Tensor]) -> None:
    tensors[KEY.replace("q_proj", "query")] = tensors.pop(KEY)


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], list[str]]] = {
    "renamed": (_renamed, [f"{KEY} is missing", f"{KEY.replace('q_proj', 'query')} is not expected"]),
    "dropped": (lambda tensors: tensors.pop(KEY), [f"{KEY} is missing"]),
    "added": (lambda tensors: tensors.update(new=torch.zeros(1)), ["new is not expected"]),
    "misshapen": (lambda tensors: tensors.update({KEY: torch.zeros(16, 8)}), [f"{KEY} is (16, 8) torch.float32, and"]),
    "half": (lambda tensors: tensors.update({KEY: tensors[KEY].half()}), ["torch.float16, and (16, 32) torch.float32"]),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_key_that_does_not_fit_is_named_and_nothing_is_attached(how: str, adapter: Path, fresh: Fresh) -> None:
    change, messages = CHANGES[how]
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    model = fresh()
    with pytest.raises(ArtefactError) as caught:
        load(model, adapter)
    assert [m for m in messages if m not in str(caught.value)] == []
    assert [name for name, _ in model.named_modules() if "lora" in name] == []


@pytest.mark.parametrize("allowed", [False, True])
def test_the_bare_backbone_is_another_model(allowed: bool, adapter: Path, bases: dict[str, Path]) -> None:
    backbone = AutoModel.from_pretrained(bases["plain"])
    with pytest.raises(ArtefactError, match=r"it lacks lm_head\.weight|base_model\.model\.layers\.0.* is missing"):
        load(backbone, adapter, allow_base_mismatch=allowed)
    assert [name for name, _ in backbone.named_modules() if "lora" in name] == []


def test_a_model_of_another_class_is_refused_with_both_classes(adapter: Path, bases: dict[str, Path]) -> None:
    with pytest.raises(ArtefactError) as caught:
        load(AutoModel.from_pretrained(bases["plain"]), adapter)
    assert [c for c in ("LlamaForCausalLM", "LlamaModel") if c not in str(caught.value)] == []


@pytest.mark.parametrize("name", ["lora", "weight", "default", "lora_A"])
def test_no_name_of_an_instance_gets_in_the_way_of_its_keys(
    name: str, fresh: Fresh, logits: Callable[..., Tensor], noise: Callable[[Any], None], tmp_path: Path
) -> None:
    model = fresh()
    stack = attach(model, [{"lora": {"name": name}}])
    noise(stack.trainable())
    save(stack, tmp_path / name)
    again = fresh()
    load(again, tmp_path / name)
    assert torch.equal(logits(again), logits(model))
    assert not torch.allclose(logits(again), logits(fresh()), atol=1e-3)


def test_what_was_trained_gives_the_logits_of_its_manifest(
    recipe: Callable[..., Loaded], run: Callable[..., Outcome], bases: dict[str, Path]
) -> None:
    adapter = run(recipe(train={"steps": 4, "learning_rate": 0.05})).adapter
    probe = json.loads((adapter / "manifest.json").read_text("utf-8"))["run"]["probe"]
    model = load_base(str(bases["plain"]), precision="fp32")
    inputs = {name: torch.tensor([ids]) for name, ids in probe["inputs"].items()}
    assert probe["round_trip_error"] == 0
    for applied in (False, True):
        if applied:
            load(model, adapter)
        with torch.no_grad():
            found = model(**inputs).logits[0, -1, probe["top"]]
        assert torch.allclose(found, torch.tensor(probe["logits"]), atol=1e-6) is applied
