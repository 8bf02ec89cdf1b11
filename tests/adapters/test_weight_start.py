"""What holds for both adapters that start from factors of the weight."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from onegpu.adapters import StackError, attach, load, save
from onegpu.adapters.base import load_options
from onegpu.adapters.low_rank import matrix
from onegpu.adapters.specs import build
from onegpu.adapters.structure import modules
from onegpu.adapters.weight_start import AnchoredLinear

Fresh = Callable[..., PreTrainedModel]
Run = Callable[..., Tensor]
Noise = Callable[[Mapping[str, nn.Parameter]], None]
Gradients = Callable[..., dict[str, Tensor]]
AssertSame = Callable[..., None]

KINDS = ["pissa", "olora"]


def _layers(model: nn.Module) -> dict[str, AnchoredLinear]:
    return {path: module for path, module in modules(model) if isinstance(module, AnchoredLinear)}


def _in_peft(model: PreTrainedModel, kind: Any, targets: list[str], **settings: Any) -> Any:
    """Stock PEFT, which takes the start out of the weight."""
    return get_peft_model(model, LoraConfig(init_lora_weights=kind, target_modules=targets, **settings))


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize(
    ("kind", "name"), [("pissa", "plain"), ("pissa", "gpt2"), ("olora", "plain"), ("olora", "bert")]
)
def test_it_starts_and_trains_as_in_peft_which_changes_the_base(
    fresh: Fresh, run: Run, gradients: Gradients, assert_same: AssertSame, kind: str, name: str, stabilised: bool
) -> None:
    """PEFT's OLoRA is not asked about GPT-2, whose transposed weights it factors the wrong way round."""
    model = fresh(name)
    base = run(model)
    stack = attach(model, [{kind: {"rank": 4, "alpha": 6.0, "rank_stabilised": stabilised}}])
    targets = stack.attachments[0].resolved()["targets"]
    theirs = _in_peft(fresh(name), kind, targets, r=4, lora_alpha=6.0, use_rslora=stabilised)
    torch.testing.assert_close(run(theirs), base, atol=2e-6, rtol=0)
    named = {n: p for n, p in theirs.named_parameters() if ".lora_" in n and p.requires_grad}
    own = stack.attachments[0].trainable()
    pairs = {n: n.removeprefix("base_model.model.").replace(".default.weight", f".{kind}") for n in named}
    assert sorted(pairs.values()) == sorted(own)
    starts = {path: layer.lora_B @ layer.lora_A for path, layer in _layers(model).items()}
    with torch.no_grad():
        for path, start in starts.items():
            a, b = (named[f"base_model.model.{path}.lora_{role}.default.weight"] for role in "AB")
            torch.testing.assert_close(start, b @ a, atol=1e-5, rtol=0)
        generator = torch.Generator().manual_seed(2)
        for theirs_name, ours_name in pairs.items():  # signs are free: go on from the same factors
            own[ours_name].copy_(named[theirs_name])
            moved = torch.randn(own[ours_name].shape, generator=generator) * 0.05
            own[ours_name].add_(moved)
            named[theirs_name].add_(moved)
    torch.testing.assert_close(run(model), run(theirs), atol=1e-5, rtol=0)
    assert (run(model) - base).abs().max() > 0.01
    found = gradients(theirs, named)
    assert_same(gradients(model, own), {pairs[n]: grad for n, grad in found.items()}, tolerance=1e-4)


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_a_plain_lora_of_twice_the_rank_and_the_same_scale(
    fresh: Fresh, tmp_path: Path, noise: Noise, kind: str, stabilised: bool
) -> None:
    model = fresh("plain")
    stack = attach(model, [{kind: {"rank": 4, "alpha": 6.0, "rank_stabilised": stabilised}}])
    noise(stack.trainable())
    save(stack, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    config = stack.attachments[0].peft_config() or {}
    assert config["r"] == 8
    assert "init_lora_weights" not in config
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if stabilised else config["r"])
    assert len(_layers(model)) == 14
    for path, layer in _layers(model).items():
        a, b = (tensors[f"base_model.model.{path}.lora_{role}.weight"] for role in "AB")
        assert (a.shape[0], b.shape[1]) == (8, 8)
        torch.testing.assert_close(scale * b @ a, layer.delta(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_one_has_all_four_factors_and_goes_on_training_alike(
    fresh: Fresh, tmp_path: Path, noise: Noise, gradients: Gradients, kind: str
) -> None:
    model = fresh("plain")
    stack = attach(model, [kind])
    noise(stack.trainable())
    save(stack, tmp_path / "a")
    again = load(fresh("plain"), tmp_path / "a")
    for path, layer in _layers(again.model).items():
        theirs = _layers(model)[path]
        for name in ("lora_A", "lora_B", "start_A", "start_B"):
            assert torch.equal(getattr(layer, name), getattr(theirs, name))
            assert getattr(layer, name).any()
    found = gradients(again.model, again.trainable())
    expected = gradients(model, stack.trainable())
    assert expected
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_loading_decomposes_nothing(
    fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, kind: str
) -> None:
    stack = attach(fresh("plain"), [kind])
    save(stack, tmp_path / "a")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loading must not need a decomposition")

    for name in ("svd", "qr"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    again = load(fresh("plain"), tmp_path / "a")
    assert torch.equal(run(again.model), run(stack.model))


@pytest.mark.parametrize("kind", KINDS)
def test_under_dropout_the_start_is_dropped_with_the_update(fresh: Fresh, run: Run, kind: str) -> None:
    model = fresh("plain")
    before = run(model)
    attach(model, [{kind: {"dropout": 0.5}}])
    assert torch.equal(run(model.train()), before)


@pytest.mark.parametrize("kind", KINDS)
def test_neither_a_nor_b_may_rest(fresh: Fresh, gradients: Gradients, kind: str) -> None:
    stack = attach(fresh("plain"), [kind])
    assert stack.attachments[0].may_rest() == frozenset()
    found = gradients(stack.model, stack.trainable())
    assert found.keys() == stack.trainable().keys()
    assert all(grad.any() for grad in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_base_starts_from_its_dequantised_weight(fresh: Fresh, kind: str) -> None:
    """At full rank, and a scale of one, the start is all of it."""
    model = fresh("plain", "nf4")
    attach(model, ["nf4", {kind: {"rank": 32, "alpha": 32.0, "targets": ["q_proj"]}}])
    assert len(_layers(model)) == 2
    for layer in _layers(model).values():
        start = layer.start_B @ layer.start_A
        torch.testing.assert_close(start, matrix(layer), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_a_weight_does_not_have_is_refused_before_weights_are_read(
    tiny: dict[str, Path], kind: str
) -> None:
    stack = build([{kind: {"rank": 17, "targets": ["q_proj", "k_proj"]}}])
    with pytest.raises(StackError, match=r"rank 17 is more than the 16 that model\.layers\.0\.self_attn\.k_proj has"):
        load_options(str(tiny["plain"]), stack, kind="causal-lm", precision="fp32")
