import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from onegpu.adapters import RecipeError, Stack, StackError, TargetError, attach, build, save
from onegpu.adapters.lora import LoRA
from onegpu.adapters.low_rank import LowRankLinear
from onegpu.adapters.structure import linears, modules

Fresh = Callable[..., PreTrainedModel]
Run = Callable[..., Tensor]
Noise = Callable[[Mapping[str, nn.Parameter]], None]
Gradients = Callable[..., dict[str, Tensor]]
AssertSame = Callable[..., None]

# Every setting that changes what is computed.
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "alpha": {"rank": 3, "alpha": 7.0},
    "rank-stabilised": {"rank": 4, "alpha": 6.0, "rank_stabilised": True},
    "names": {"rank": 2, "targets": ["q_proj", "down_proj"]},
    "patterns": {"rank": 2, "targets": ["*.layers.1.*v_proj", "lm_head"]},
}


def _layers(model: nn.Module) -> dict[str, LowRankLinear]:
    return {path: module for path, module in modules(model) if isinstance(module, LowRankLinear)}


def _in_peft(stack: Stack, folder: Path, base: nn.Module) -> Any:
    save(stack, folder)
    return PeftModel.from_pretrained(base, str(folder), is_trainable=True)


def _compare_with_peft(
    stack: Stack, theirs: Any, gradients: Gradients, run: Run, assert_same: AssertSame, **inputs: Any
) -> None:
    torch.testing.assert_close(run(stack.model, **inputs), run(theirs, **inputs), atol=1e-6, rtol=0)
    ours = gradients(stack.model, stack.trainable(), **inputs)
    named = {
        name.removeprefix("base_model.model.").replace(".default.weight", ".lora"): p
        for name, p in theirs.named_parameters()
        if p.requires_grad and ".lora_" in name
    }
    found = gradients(theirs, named, **inputs)
    # Two layers of rounding: either is up to 2e-6 from the same model in float64, and they round in other places.
    assert_same({name: ours[name] for name in found}, found, tolerance=3e-6)
    assert {name for name in ours if ".lora_" in name} == found.keys()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("name", ["plain", "wide-heads"])
def test_outputs_and_gradients_are_those_of_peft(
    fresh: Fresh,
    tmp_path: Path,
    noise: Noise,
    gradients: Gradients,
    run: Run,
    assert_same: AssertSame,
    name: str,
    config: dict[str, Any],
) -> None:
    stack = attach(fresh(name), [{"lora": config}])
    noise(stack.trainable())
    theirs = _in_peft(stack, tmp_path / "a", fresh(name))
    _compare_with_peft(stack, theirs, gradients, run, assert_same)


@pytest.mark.parametrize("name", ["gpt2", "tied", "bert", "roberta"])
def test_other_architectures_equal_peft_too(
    fresh: Fresh, tmp_path: Path, noise: Noise, gradients: Gradients, run: Run, assert_same: AssertSame, name: str
) -> None:
    """GPT-2's linears store their weight transposed; the two encoders have a trained head beside."""
    stack = attach(fresh(name), ["lora"])
    noise(stack.trainable())
    theirs = _in_peft(stack, tmp_path / "a", fresh(name))
    _compare_with_peft(stack, theirs, gradients, run, assert_same)


@pytest.mark.parametrize("name", ["plain", "gpt2", "bert"])
def test_what_is_saved_loads_in_stock_peft_on_a_stock_model(
    fresh: Fresh, tiny: dict[str, Path], tmp_path: Path, noise: Noise, run: Run, name: str
) -> None:
    stack = attach(fresh(name), ["lora"])
    noise(stack.trainable())
    save(stack, tmp_path / "adapter")
    auto = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    base = auto.from_pretrained(tiny[name])
    before = run(base)
    theirs = run(PeftModel.from_pretrained(base, str(tmp_path / "adapter")))
    torch.testing.assert_close(theirs, run(stack.model), atol=1e-6, rtol=0)
    assert (theirs - before).abs().max() > 0.01


def test_two_of_them_load_in_stock_peft_by_subfolder(fresh: Fresh, tmp_path: Path, noise: Noise, run: Run) -> None:
    model = fresh("plain")
    specs: list[Any] = [
        {"lora": {"name": "a", "targets": ["q_proj"]}},
        {"lora": {"name": "b", "targets": ["v_proj"], "rank": 2}},
    ]
    stack = attach(model, specs)
    noise(stack.trainable())
    save(stack, tmp_path / "adapter")
    first, second = stack.attachments
    for on, off in ((first, second), (second, first)):
        off.enabled(False)
        theirs = PeftModel.from_pretrained(fresh("plain"), str(tmp_path / "adapter"), subfolder=on.name)
        torch.testing.assert_close(run(theirs), run(model), atol=1e-6, rtol=0)
        off.enabled(True)


def test_the_update_is_scale_times_b_times_a(fresh: Fresh, noise: Noise) -> None:
    """The equation of the paper, by hand."""
    model = fresh("plain")
    stack = attach(model, [{"lora": {"rank": 4, "alpha": 6.0}}])
    noise(stack.trainable())
    layer = _layers(model)["model.layers.0.mlp.up_proj"]
    x = torch.randn(3, 32)
    expected = F.linear(x, layer.base.get_parameter("weight") + 6.0 / 4 * layer.lora_B @ layer.lora_A)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"rank": 8}, 2.0),
        ({"rank": 8, "alpha": 8.0}, 1.0),
        ({"rank": 16, "alpha": 8.0, "rank_stabilised": True}, 2.0),
        ({"rank": 16, "rank_stabilised": True}, 8.0),
    ],
)
def test_the_scale_follows_alpha_and_rank(config: dict[str, Any], scale: float) -> None:
    assert LoRA(**config).scale == pytest.approx(scale)


@pytest.mark.parametrize("packing", [[], ["int8"], ["nf4"]], ids=["float", "int8", "nf4"])
@pytest.mark.parametrize("name", ["plain", "tied", "wide-heads", "gpt2", "bert"])
def test_a_fresh_one_changes_no_bit(fresh: Fresh, run: Run, name: str, packing: list[str]) -> None:
    model = fresh(name, *packing)
    before = run(model)
    stack = attach(model, [*packing, "lora"])
    assert stack.trainable()
    assert torch.equal(run(model), before)


def test_a_starts_as_torch_starts_a_linear_and_b_at_zero(llama: PreTrainedModel) -> None:
    attach(llama, ["lora"])
    for layer in _layers(llama).values():
        bound = 1 / math.sqrt(layer.lora_A.shape[1])
        assert not layer.lora_B.any()
        assert 0.8 * bound < layer.lora_A.abs().max() <= bound


def test_the_same_seed_gives_the_same_bytes_and_another_others(fresh: Fresh) -> None:
    def start(seed: int) -> Tensor:
        stack = attach(fresh("plain"), ["lora"], seed=seed)
        return torch.cat([p.detach().flatten() for p in stack.trainable().values()])

    first = start(7)
    torch.manual_seed(99)  # the state of the program must not matter
    assert torch.equal(start(7), first)
    assert not torch.equal(start(8), first)


def test_attaching_leaves_the_programs_random_numbers_alone(llama: PreTrainedModel) -> None:
    state = torch.get_rng_state()
    attach(llama, ["lora"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("packing", [[], ["nf4"]], ids=["float", "nf4"])
def test_detaching_restores_every_bit(fresh: Fresh, run: Run, noise: Noise, packing: list[str]) -> None:
    model = fresh("plain", *packing)
    before, names = run(model), list(dict(model.named_modules()))
    stack = attach(model, ["lora"])
    noise(stack.trainable())
    assert not torch.equal(run(model), before)
    stack.detach()
    assert torch.equal(run(model), before)
    assert list(dict(model.named_modules())) == names


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_on_the_same_linears_detach_in_either_order(
    fresh: Fresh, run: Run, noise: Noise, order: tuple[int, int]
) -> None:
    model = fresh("plain")
    before = run(model)
    stacks = [attach(model, [{"lora": {"name": name}}]) for name in ("a", "b")]
    alone = []
    for stack in stacks:
        noise(stack.trainable())
    for on, off in (stacks, reversed(stacks)):
        with off.base_only():
            assert on.trainable()
            alone.append(run(model))
    stays = 1 - order[0]
    stacks[order[0]].detach()
    assert torch.equal(run(model), alone[stays])
    assert all(p.requires_grad for p in stacks[stays].trainable().values())
    stacks[order[1]].detach()
    assert torch.equal(run(model), before)


def test_switched_off_it_is_the_base_to_the_bit(fresh: Fresh, run: Run, noise: Noise) -> None:
    model = fresh("plain")
    before = run(model)
    stack = attach(model, ["lora"])
    noise(stack.trainable())
    trained = run(model)
    with stack.base_only():
        assert torch.equal(run(model), before)
    assert torch.equal(run(model), trained)


@pytest.mark.parametrize("name", ["plain", "gpt2"])
@pytest.mark.parametrize("config", [{}, {"rank_stabilised": True, "rank": 4}], ids=["plain", "rank-stabilised"])
def test_merged_equals_unmerged(fresh: Fresh, run: Run, noise: Noise, name: str, config: dict[str, Any]) -> None:
    model = fresh(name)
    stack = attach(model, [{"lora": config}])
    noise(stack.trainable())
    unmerged = run(model)
    stack.attachments[0].merge()
    assert not _layers(model)
    torch.testing.assert_close(run(model), unmerged, atol=1e-6, rtol=0)


def test_merging_one_of_two_keeps_the_other(fresh: Fresh, run: Run, noise: Noise) -> None:
    model = fresh("plain")
    stack = attach(model, [{"lora": {"name": "a"}}, {"lora": {"name": "b", "targets": ["q_proj"]}}])
    noise(stack.trainable())
    unmerged = run(model)
    stack.attachments[0].merge()
    assert len(_layers(model)) == 2
    torch.testing.assert_close(run(model), unmerged, atol=1e-6, rtol=0)


def test_a_merge_into_bf16_adds_in_float32_and_rounds_once(fresh: Fresh, noise: Noise) -> None:
    model = fresh("plain", precision="bf16")
    stack = attach(model, ["lora"])
    noise(stack.trainable())
    sums = {path: layer.base.get_parameter("weight").float() + layer.delta() for path, layer in _layers(model).items()}
    stack.attachments[0].merge()
    assert sums
    for path, expected in sums.items():
        assert torch.equal(linears(model)[path].get_parameter("weight"), expected.bfloat16())


def test_a_merge_into_a_packed_base_is_refused_and_changes_nothing(fresh: Fresh, run: Run, noise: Noise) -> None:
    model = fresh("plain", "nf4")
    stack = attach(model, ["nf4", "lora"])
    noise(stack.trainable())
    before = run(model)
    with pytest.raises(StackError, match=r"model\.layers\.0\.self_attn\.q_proj is packed"):
        stack.attachments[0].merge()
    assert torch.equal(run(model), before)


def test_dropout_is_active_in_training_only(fresh: Fresh, run: Run, noise: Noise) -> None:
    model = fresh("plain")
    outputs = {}
    for dropout in (0.0, 0.5):
        stack = attach(model, [{"lora": {"dropout": dropout}}])
        noise(stack.trainable())
        assert not model.training
        outputs[dropout] = run(model)  # without a call of eval(): a loaded model is in evaluation mode
        assert torch.equal(run(model.eval()), outputs[dropout])
        model.train()
        assert torch.equal(run(model), run(model)) is (dropout == 0)
        model.eval()
        stack.detach()
    assert torch.equal(outputs[0.0], outputs[0.5])


def test_dropout_spares_the_base(llama: PreTrainedModel, run: Run) -> None:
    before = run(llama)
    attach(llama, [{"lora": {"dropout": 0.9}}])
    assert torch.equal(run(llama.train()), before)  # B is still zero


@pytest.mark.parametrize("packing", [[], ["nf4"], ["int8"]], ids=["float", "nf4", "int8"])
def test_on_a_bf16_base_it_is_trained_in_float32(
    fresh: Fresh, run: Run, noise: Noise, gradients: Gradients, packing: list[str]
) -> None:
    model = fresh("plain", *packing, precision="bf16")
    stack = attach(model, [*packing, "lora"])
    noise(stack.trainable())
    found = gradients(model, stack.trainable())
    assert run(model).dtype is torch.bfloat16
    assert {p.dtype for p in stack.trainable().values()} == {torch.float32}
    assert found.keys() == stack.trainable().keys()
    assert all(grad.dtype is torch.float32 and grad.any() for grad in found.values())


def test_only_a_may_rest_and_only_while_b_is_zero(llama: PreTrainedModel, noise: Noise) -> None:
    stack = attach(llama, [{"lora": {"targets": ["q_proj"], "name": "x"}}])
    (attachment,) = stack.attachments
    assert attachment.may_rest() == {f"model.layers.{i}.self_attn.q_proj.lora_A.x" for i in (0, 1)}
    noise(stack.trainable())
    assert attachment.may_rest() == set()


def test_what_targets_came_to_is_recorded(llama: PreTrainedModel) -> None:
    stack = attach(llama, [{"lora": {"targets": "*.self_attn.[qv]_proj", "rank": 4}}])
    assert stack.attachments[0].resolved() == {"targets": ["q_proj", "v_proj"], "scale": 2.0}


def test_a_target_that_matches_nothing_leaves_the_model_alone(llama: PreTrainedModel) -> None:
    before = list(dict(llama.named_modules()))
    with pytest.raises(TargetError, match="did you mean 'v_proj'"):
        attach(llama, [{"lora": {"targets": ["q_proj", "v_porj"]}}])
    assert list(dict(llama.named_modules())) == before


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 2.5}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"targets": 3}, "targets"),
        ({"name": "a.b"}, "name"),
        ({"name": ""}, "name"),
    ],
)
def test_a_setting_outside_its_range_is_refused(config: dict[str, Any], place: str) -> None:
    with pytest.raises(RecipeError, match=rf"adapters\[0\]\.lora\.{place}: ") as caught:
        build([{"lora": config}])
    assert caught.value.faults[0][0] == ("lora", place)
