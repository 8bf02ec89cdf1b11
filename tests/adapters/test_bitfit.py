from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from onegpu.adapters import RecipeError, StackError, TargetError, attach, build, load, load_base, save
from onegpu.adapters.base import load_options
from onegpu.adapters.bitfit import ShiftedModule
from onegpu.adapters.fingerprints import differences, fingerprint
from onegpu.adapters.structure import modules

Fresh = Callable[..., PreTrainedModel]
Run = Callable[..., Tensor]
Noise = Callable[[Mapping[str, nn.Parameter]], None]
Gradients = Callable[..., dict[str, Tensor]]
AssertSame = Callable[..., None]


@pytest.fixture
def biased(fresh: Fresh, tmp_path: Path) -> Callable[..., PreTrainedModel]:
    """`fresh`, which also knows a Llama whose attention has biases; all biases are away from zero."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")

    def make(name: str, *adapters: Any, **options: Any) -> PreTrainedModel:
        if name == "llama":
            model = load_base(str(tmp_path / "llama"), adapters, **({"precision": "fp32"} | options))
        else:
            model = fresh(name, *adapters, **options)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith(".bias"):
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model

    return make


def _real(model: nn.Module, heads: tuple[str, ...] = ("classifier.",)) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if n.endswith(".bias") and not n.startswith(heads)}


@pytest.mark.parametrize("packing", [[], ["nf4"]], ids=["float", "nf4"])
@pytest.mark.parametrize(("name", "count"), [("bert", 18), ("gpt2", 13), ("llama", 8)])
def test_it_is_training_the_real_biases(
    biased: Fresh,
    run: Run,
    gradients: Gradients,
    assert_same: AssertSame,
    name: str,
    count: int,
    packing: list[str],
) -> None:
    reference, model = biased(name, *packing), biased(name, *packing)
    real = _real(reference)
    stack = attach(model, [*packing, "bitfit"])
    (own,) = (attachment.trainable() for attachment in stack.attachments)
    assert {f"{n}.bitfit" for n in real} == own.keys()
    assert len(own) == count
    for parameter in real.values():
        parameter.requires_grad_(True)
    before = run(model)
    for parameter_name in sorted(real):  # the same move on both sides
        generator = torch.Generator().manual_seed(len(parameter_name))
        move = torch.randn(real[parameter_name].shape, generator=generator) * 0.1
        with torch.no_grad():
            real[parameter_name].add_(move)
            own[f"{parameter_name}.bitfit"].add_(move)
    torch.testing.assert_close(run(model), run(reference), atol=2e-6, rtol=0)
    assert (run(model) - before).abs().max() > 0.01
    theirs = {f"{n}.bitfit": grad for n, grad in gradients(reference, real).items()}
    ours = gradients(model, own)
    # A key's bias shifts all scores of a query alike, so its true gradient is zero and only rounding is seen.
    zero = {n for n in ours if ".key.bias" in n}
    assert all(ours[n].abs().max() < 1e-5 for n in zero)
    assert_same(*({n: g for n, g in side.items() if n not in zero} for side in (ours, theirs)), tolerance=1e-5)


@pytest.mark.parametrize("packing", [[], ["nf4"], ["int8"]], ids=["float", "nf4", "int8"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fresh_off_and_detached_it_is_the_base_to_the_bit(
    biased: Fresh, run: Run, noise: Noise, name: str, packing: list[str], precision: str
) -> None:
    model = biased(name, *packing, precision=precision)
    reference, names = run(model), list(dict(model.named_modules()))
    before = fingerprint(model)
    stack = attach(model, [*packing, "bitfit"])
    with stack.base_only():
        base = run(model)
    assert torch.equal(run(model), base)
    noise(stack.attachments[0].trainable())
    assert not torch.equal(run(model), base)
    with stack.base_only():
        assert torch.equal(run(model), base)
    assert differences(before, model) == ([], [])
    stack.detach()
    assert torch.equal(run(model), reference)
    assert list(dict(model.named_modules())) == names


@pytest.mark.parametrize("packing", [[], ["nf4"], ["int8"]], ids=["float", "nf4", "int8"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_it_is_saved_loaded_and_merged_into_packed_bases_too(
    biased: Fresh, run: Run, noise: Noise, tmp_path: Path, name: str, packing: list[str]
) -> None:
    stack = attach(biased(name, *packing), [*packing, "bitfit"])
    noise(stack.trainable())
    save(stack, tmp_path / "a")
    again = load(biased(name, *packing), tmp_path / "a")
    expected = run(stack.model)
    assert torch.equal(run(again.model), expected)
    again.attachments[0].merge()
    torch.testing.assert_close(run(again.model), expected, atol=1e-6, rtol=0)
    assert not any(isinstance(m, ShiftedModule) for m in again.model.modules())


def test_a_merge_into_bf16_adds_in_float32_and_rounds_once(biased: Fresh, noise: Noise) -> None:
    model = biased("gpt2", precision="bf16")
    stack = attach(model, ["bitfit"])
    noise(stack.trainable())
    sums = {
        path: m.base.get_parameter("bias").float() + m.shift.detach()
        for path, m in modules(model)
        if isinstance(m, ShiftedModule)
    }
    stack.attachments[0].merge()
    assert len(sums) == 13
    for path, expected in sums.items():
        assert torch.equal(model.get_parameter(f"{path}.bias"), expected.bfloat16())


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        (["ln_1", "c_fc"], {"ln_1", "mlp.c_fc"}),
        ("*.h.0.ln_?", {"ln_1", "ln_2"}),
    ],
)
def test_targets_choose_among_what_has_a_bias(biased: Fresh, targets: Any, expected: set[str]) -> None:
    stack = attach(biased("gpt2"), [{"bitfit": {"targets": targets}}])
    chosen = stack.attachments[0].resolved()["targets"]
    assert {path.partition("h.0.")[2] for path in chosen if ".h.0." in path} == expected
    assert stack.trainable().keys() == {f"{path}.bias.bitfit" for path in chosen}


def test_gradient_checkpointing_gives_the_same_gradients(
    biased: Fresh, noise: Noise, gradients: Gradients, assert_same: AssertSame
) -> None:
    model = biased("llama", "nf4").train()
    stack = attach(model, ["nf4", {"bitfit": {"targets": ["q_proj", "v_proj", "o_proj"]}}])
    noise(stack.trainable())
    plain = gradients(model, stack.trainable())
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_same(gradients(model, stack.trainable()), plain)


def test_two_of_them_and_a_lora_add_up_and_merge_one_by_one(biased: Fresh, run: Run, noise: Noise) -> None:
    model = biased("gpt2")
    specs: list[Any] = [
        {"bitfit": {"name": "a"}},
        {"dora": {"targets": ["c_fc"]}},
        {"bitfit": {"name": "b", "targets": ["c_fc"]}},
    ]
    stack = attach(model, specs)
    noise(stack.trainable())
    together = run(model)
    for attachment in reversed(stack.attachments):
        attachment.merge()
        torch.testing.assert_close(run(model), together, atol=2e-6, rtol=0)
    assert not any(isinstance(m, ShiftedModule) for m in model.modules())


def test_it_is_trained_in_float32_with_a_rate_per_layer(biased: Fresh) -> None:
    stack = attach(biased("gpt2", precision="bf16"), ["bitfit", {"layerwise-lr": {"decay": 0.5}}])
    assert {p.dtype for p in stack.trainable().values()} == {torch.float32}
    found = {name: rate.multiplier for name, rate in stack.rates().items()}
    assert found["transformer.ln_f.bias.bitfit"] == 1.0
    assert found["transformer.h.0.mlp.c_fc.bias.bitfit"] == 0.25


def test_a_model_without_biases_is_refused_before_it_is_read(tiny: dict[str, Path]) -> None:
    with pytest.raises(StackError, match="LlamaForCausalLM was made without any: use lora"):
        load_options(str(tiny["plain"]), build(["bitfit"]), kind="causal-lm", precision="fp32")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["c_fk"], "'c_fk' matches nothing with a bias; did you mean 'c_fc'"),
        (["c_fc", "wte"], "'wte' matches nothing with a bias"),
        ([], "targets"),
    ],
)
def test_a_target_without_a_bias_is_refused(biased: Fresh, targets: list[str], message: str) -> None:
    with pytest.raises((TargetError, RecipeError), match=message):
        attach(biased("gpt2"), [{"bitfit": {"targets": targets}}])


def test_a_head_is_no_target(biased: Fresh) -> None:
    with pytest.raises(TargetError, match="'classifier' matches nothing with a bias"):
        attach(biased("bert"), [{"bitfit": {"targets": ["classifier"]}}])


def test_a_module_that_adds_its_bias_elsewhere_is_refused_by_all_and_can_be_left_out(biased: Fresh) -> None:
    model = biased("gpt2")
    assert isinstance(model, GPT2LMHeadModel)
    model.transformer.add_module("mixer", nn.Conv1d(2, 2, 1))
    with pytest.raises(TargetError, match=r"transformer\.mixer is a Conv1d: list the targets by name"):
        attach(model, ["bitfit"])
    assert attach(model, [{"bitfit": {"targets": "all-linear"}}]).trainable()


def test_peft_cannot_read_it_and_the_file_says_so(biased: Fresh) -> None:
    (attachment,) = attach(biased("gpt2"), ["bitfit"]).attachments
    assert attachment.peft_config() is None
    assert attachment.adapter.capabilities.because("peft_readable")
