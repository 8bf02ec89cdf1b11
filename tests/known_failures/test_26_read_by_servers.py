"""26. An adapter is refused or misread by the programs that serve models.

Met: servers know plain LoRA with one scale; others refuse heads, magnitudes and biases, or load a file and apply
nothing.

Here: what is saved of LoRA has the keys and the scale of PEFT's format, which servers read; what PEFT cannot read says
so in the folder instead of looking readable.

Not yet: `onegpu export` for a named server, checked before training; lowering to plain LoRA.

Also: tests/adapters/test_lora.py, docs/adapters.md (PEFT reads it)
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from onegpu.adapters import attach, save

Fresh = Callable[..., PreTrainedModel]
PLAIN = re.compile(r"base_model\.model\..*\.lora_[AB]\.weight")


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("variant", ["plain", "tied", "wide-heads"])
def test_the_file_is_plain_lora_and_its_scale_is_in_the_configuration(
    variant: str, stabilised: bool, fresh: Fresh, noise: Callable[[Any], None], tmp_path: Path
) -> None:
    model = fresh(variant)
    stack = attach(model, [{"lora": {"rank": 4, "alpha": 10, "rank_stabilised": stabilised}}])
    noise(stack.trainable())
    save(stack, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7
    assert [key for key in tensors if not PLAIN.fullmatch(key)] == []
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text("utf-8"))
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    base = fresh(variant)
    stack.merge()
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        a, b = (tensors[f"base_model.model.{path}.lora_{which}.weight"] for which in "AB")
        delta = model.get_parameter(f"{path}.weight") - base.get_parameter(f"{path}.weight")
        assert torch.allclose(delta, scale * (b @ a), atol=1e-6)


def test_what_peft_does_not_know_does_not_look_as_if_it_did(fresh: Fresh, tmp_path: Path) -> None:
    save(attach(fresh(), ["full"]), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text("utf-8"))
    assert config["peft_type"] is None
    assert "PeftModel" not in (tmp_path / "adapter/README.md").read_text("utf-8")
