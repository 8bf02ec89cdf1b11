from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from onegpu.adapters import attach
from onegpu.adapters.fingerprints import differences, fingerprint
from onegpu.adapters.frozen_linear import FrozenLinear

Fresh = Callable[..., PreTrainedModel]


def _perturb(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[5] += 0.01


def test_the_same_base_has_the_same_fingerprint(fresh: Fresh) -> None:
    assert fingerprint(fresh("plain")) == fingerprint(fresh("plain"))


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_one_changed_value_is_noticed_and_its_tensor_named(fresh: Fresh, name: str) -> None:
    stored, model = fingerprint(fresh("plain")), fresh("plain")
    _perturb(model, name)
    assert differences(stored, model) == ([f"{name} has other values"], [])


def test_another_configuration_is_noticed_though_all_tensors_agree(fresh: Fresh) -> None:
    stored, model = fingerprint(fresh("plain")), fresh("plain")
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5e5}
    assert differences(stored, model) == (["its configuration differs"], [])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_cache", False),
        ("_name_or_path", "elsewhere"),
        ("pad_token_id", 3),
        ("eos_token_id", 3),
        ("id2label", {0: "a", 1: "b"}),
    ],
)
def test_how_a_model_is_run_or_labelled_is_no_content(fresh: Fresh, key: str, value: Any) -> None:
    stored, model = fingerprint(fresh("plain")), fresh("plain")
    setattr(model.config, key, value)
    assert differences(stored, model) == ([], [])


@pytest.mark.parametrize("stack", [["lora"], ["prefix"], ["lora", "prefix"]])
@pytest.mark.parametrize("name", ["plain", "bert"])
def test_adapters_and_heads_are_no_part_of_it(fresh: Fresh, name: str, stack: list[str]) -> None:
    stored, model = fingerprint(fresh(name)), fresh(name)
    attached = attach(model, stack)
    with torch.no_grad():
        for parameter in attached.trainable().values():
            parameter.add_(1)
    assert fingerprint(model) == stored


def test_heads_are_left_out(fresh: Fresh) -> None:
    assert not [name for name in fingerprint(fresh("bert")).tensors if name.startswith("classifier")]


def test_tied_tensors_count_once(fresh: Fresh) -> None:
    tied, plain = fingerprint(fresh("tied")).tensors, fingerprint(fresh("plain")).tensors
    assert plain.keys() - tied.keys() == {"lm_head.weight"}


@pytest.mark.parametrize(("stored", "live"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_another_precision_of_the_same_base_is_the_same_base(fresh: Fresh, stored: str, live: str) -> None:
    assert differences(fingerprint(fresh("plain", precision=stored)), fresh("plain", precision=live)) == ([], [])


def test_another_base_is_noticed_across_precisions(fresh: Fresh) -> None:
    stored, model = fingerprint(fresh("plain")), fresh("plain", precision="bf16")
    _perturb(model, "model.norm.weight")
    assert differences(stored, model)[0] == ["model.norm.weight has other values"]


@pytest.mark.parametrize("packing", ["int8", "nf4", "fp4"])
def test_packed_and_float_tensors_are_skipped_and_the_others_compared(fresh: Fresh, packing: str) -> None:
    faults, skipped = differences(fingerprint(fresh("plain")), fresh("plain", packing))
    assert faults == []
    assert len(skipped) == 14
    assert all(name.endswith("_proj.weight") for name in skipped)


def test_another_base_is_noticed_across_packings(fresh: Fresh) -> None:
    stored, model = fingerprint(fresh("plain", "nf4")), fresh("plain", "int8")
    _perturb(model, "model.norm.weight")
    assert differences(stored, model)[0] == ["model.norm.weight has other values"]


@pytest.mark.parametrize("packing", ["int8", "nf4"])
def test_one_packed_byte_is_noticed(fresh: Fresh, packing: str) -> None:
    stored, model = fingerprint(fresh("plain", packing)), fresh("plain", packing)
    assert differences(stored, model) == ([], [])
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, FrozenLinear)
    layer.packed.get_buffer("values").view(-1)[3] += 1
    assert differences(stored, model) == (["model.layers.0.mlp.up_proj.weight has other values"], [])


def test_a_bare_backbone_is_another_model(fresh: Fresh) -> None:
    faults, _ = differences(fingerprint(fresh("plain")), fresh("plain").base_model)
    assert "it lacks model.norm.weight" in faults
    assert "it adds norm.weight" in faults


def test_another_shape_with_the_same_bytes_is_another_tensor() -> None:
    wide, tall = nn.Linear(2, 8, bias=False), nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        tall.weight.copy_(wide.weight.view(2, 8))
    assert differences(fingerprint(wide), tall)[0] == ["weight has other values"]


def test_a_half_precision_copy_of_the_base_is_the_same_base_and_another_one_is_not(llama: PreTrainedModel) -> None:
    stored = fingerprint(llama)
    llama.half()
    assert differences(stored, llama) == ([], [])
    with torch.no_grad():
        next(llama.parameters()).mul_(1.1)
    assert differences(stored, llama)[0]


def test_weights_packed_from_two_precisions_are_not_compared(fresh: Callable[..., PreTrainedModel]) -> None:
    faults, skipped = differences(fingerprint(fresh("plain", "nf4")), fresh("plain", "nf4", precision="bf16"))
    assert not faults
    assert skipped
