from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from onegpu.adapters import attach, save
from onegpu.adapters.dora import DoRALinear
from onegpu.adapters.structure import modules

Fresh = Callable[..., PreTrainedModel]
Run = Callable[..., Tensor]
Noise = Callable[[Mapping[str, nn.Parameter]], None]
Gradients = Callable[..., dict[str, Tensor]]
AssertSame = Callable[..., None]


def _their_name(name: str) -> str:
    """`...q_proj.lora_B.default.weight` and `...lora_magnitude_vector.default.weight` as we call them."""
    return name.removeprefix("base_model.model.").replace(".default.weight", ".dora")


@pytest.mark.parametrize("packing", [[], ["nf4"]], ids=["float", "nf4"])
@pytest.mark.parametrize("config", [{}, {"rank": 3, "alpha": 7.0, "rank_stabilised": True}], ids=["default", "scaled"])
@pytest.mark.parametrize("name", ["plain", "gpt2", "bert"])
def test_outputs_and_gradients_are_those_of_peft(
    fresh: Fresh,
    tmp_path: Path,
    noise: Noise,
    run: Run,
    gradients: Gradients,
    assert_same: AssertSame,
    name: str,
    config: dict[str, Any],
    packing: list[str],
) -> None:
    """GPT-2's linears store their weight transposed and have biases, as BERT's do."""
    stack = attach(fresh(name, *packing), [*packing, {"dora": config}])
    noise(stack.trainable())
    save(stack, tmp_path / "a")
    theirs = PeftModel.from_pretrained(fresh(name, *packing), str(tmp_path / "a"), is_trainable=True)
    torch.testing.assert_close(run(stack.model), run(theirs), atol=1e-6, rtol=0)
    named = {_their_name(n): p for n, p in theirs.named_parameters() if p.requires_grad and ".lora_" in n}
    (own,) = (attachment.trainable() for attachment in stack.attachments)
    assert len(named) == len(own) > 0
    assert_same(gradients(stack.model, own), gradients(theirs, named), tolerance=1e-5)


def test_under_dropout_it_is_peft_too(
    fresh: Fresh, tmp_path: Path, noise: Noise, gradients: Gradients, assert_same: AssertSame
) -> None:
    """The base's part, too, is then of the dropped inputs; the same random numbers drop the same ones."""
    stack = attach(fresh("gpt2"), [{"dora": {"dropout": 0.5, "targets": ["c_fc"]}}])
    noise(stack.trainable())
    save(stack, tmp_path / "a")
    theirs = PeftModel.from_pretrained(fresh("gpt2"), str(tmp_path / "a"), is_trainable=True)
    found = []
    for model in (stack.model, theirs):
        named = {_their_name(n): p for n, p in theirs.named_parameters() if p.requires_grad}
        for module in model.modules():  # the base's own dropout would draw in between
            module.training = isinstance(module, (DoRALinear, nn.Dropout)) or type(module).__module__.startswith("peft")
            if isinstance(module, nn.Dropout) and module.p != 0.5:
                module.training = False
        torch.manual_seed(5)
        found.append(gradients(model, stack.trainable() if model is stack.model else named))
    assert_same(found[0], found[1], tolerance=1e-5)


def test_the_update_is_the_equation_of_the_paper(fresh: Fresh, noise: Noise) -> None:
    model = fresh("plain")
    stack = attach(model, [{"dora": {"rank": 4, "alpha": 6.0}}])
    noise(stack.trainable())
    layer = dict(modules(model))["model.layers.0.mlp.up_proj"]
    assert isinstance(layer, DoRALinear)
    x = torch.randn(3, 32)
    w = layer.base.get_parameter("weight") + 6.0 / 4 * layer.lora_B @ layer.lora_A
    expected = F.linear(x, layer.lora_magnitude_vector[:, None] * w / w.norm(dim=1, keepdim=True))
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=0)


def test_the_norm_is_a_constant_to_the_gradient(fresh: Fresh, noise: Noise) -> None:
    model = fresh("plain")
    stack = attach(model, [{"dora": {"rank": 4, "targets": ["up_proj"]}}])
    noise(stack.trainable())
    layer = dict(modules(model))["model.layers.0.mlp.up_proj"]
    assert isinstance(layer, DoRALinear)
    x, scale = torch.randn(3, 32), 2.0
    layer(x).square().sum().backward()
    w = layer.base.get_parameter("weight") + scale * layer.lora_B @ layer.lora_A
    for constant in (True, False):
        norm = w.norm(dim=1, keepdim=True)
        y = F.linear(x, layer.lora_magnitude_vector[:, None] * w / (norm.detach() if constant else norm))
        (expected,) = torch.autograd.grad(y.square().sum(), layer.lora_B, retain_graph=True)
        assert layer.lora_B.grad is not None
        assert torch.allclose(layer.lora_B.grad, expected, atol=1e-4) is constant


def test_the_magnitude_starts_as_the_norm_of_each_row(fresh: Fresh) -> None:
    model = fresh("gpt2")
    stack = attach(model, ["dora"])
    lengths = {path: layer.lora_magnitude_vector for path, layer in modules(model) if isinstance(layer, DoRALinear)}
    assert lengths["transformer.h.0.attn.c_attn"].shape == (96,)
    for path, length in lengths.items():
        weight = model.get_parameter(f"{path}.base.weight")  # (in, out) in GPT-2
        torch.testing.assert_close(length.detach(), weight.norm(dim=0))
    magnitudes = {name for name in stack.trainable() if ".lora_magnitude_vector." in name}
    assert len(magnitudes) == len(lengths)
    assert not magnitudes & stack.attachments[0].roles().keys()


def test_the_file_has_the_keys_of_peft(fresh: Fresh) -> None:
    (attachment,) = attach(fresh("plain"), [{"dora": {"targets": ["v_proj"]}}]).attachments
    path = "base_model.model.model.layers.0.self_attn.v_proj"
    assert [key for key in attachment.tensors() if ".layers.0." in key] == [
        f"{path}.lora_A.weight",
        f"{path}.lora_B.weight",
        f"{path}.lora_magnitude_vector",
    ]
    assert (attachment.peft_config() or {})["use_dora"] is True
