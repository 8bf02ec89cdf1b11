"""What holds for every adapter of the low-rank family; what is particular to one is in its own file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from onegpu.adapters import RecipeError, StackError, attach, build, get, load, save
from onegpu.adapters.base import load_options
from onegpu.adapters.fingerprints import differences, fingerprint
from onegpu.adapters.low_rank import LowRank, LowRankLinear, matrix
from onegpu.adapters.registry import ADAPTERS, entries
from onegpu.adapters.structure import linears, modules

Fresh = Callable[..., PreTrainedModel]
Run = Callable[..., Tensor]
Noise = Callable[[Mapping[str, nn.Parameter]], None]
Gradients = Callable[..., dict[str, Tensor]]
AssertSame = Callable[..., None]

FAMILY = ["dora", "loftq", "lora", "olora", "pissa"]
NOTHING_LOST = ("loftq", "float")
ON_FLOAT_BASES = [kind for kind in FAMILY if kind != "loftq"]
PACKINGS = {"float": [], "nf4": ["nf4"], "int8": ["int8"]}


def _layers(model: nn.Module) -> dict[str, LowRankLinear]:
    return {path: module for path, module in modules(model) if isinstance(module, LowRankLinear)}


def test_the_family_is_all_here() -> None:
    ours = [e.name for e in entries(ADAPTERS) if e.distribution == "onegpu"]
    assert sorted(name for name in ours if issubclass(get(name), LowRank)) == FAMILY


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS.keys())
@pytest.mark.parametrize("name", ["plain", "gpt2", "bert"])
@pytest.mark.parametrize("kind", ON_FLOAT_BASES)
def test_a_fresh_one_changes_no_bit_in_any_precision(
    fresh: Fresh, run: Run, name: str, packing: list[str], kind: str
) -> None:
    for precision in ("fp32", "bf16"):
        model = fresh(name, *packing, precision=precision)
        stack = attach(model, [*packing, kind])
        with stack.base_only():
            before = run(model)
        assert len(_layers(model)) > 0
        assert torch.equal(run(model), before)


@pytest.mark.parametrize("kind", FAMILY)
def test_off_and_detached_it_is_the_base_to_the_bit(fresh: Fresh, run: Run, noise: Noise, kind: str) -> None:
    model = fresh("plain", "nf4")
    before, print_before, names = run(model), fingerprint(model), list(dict(model.named_modules()))
    stack = attach(model, ["nf4", kind])
    noise(stack.trainable())
    trained = run(model)
    assert (trained - before).abs().max() > 0.01
    with stack.base_only():
        assert torch.equal(run(model), before)
    assert torch.equal(run(model), trained)
    assert differences(print_before, model) == ([], [])
    stack.detach()
    assert torch.equal(run(model), before)
    assert list(dict(model.named_modules())) == names


@pytest.mark.parametrize("kind", FAMILY)
def test_training_moves_every_tensor_and_no_byte_of_the_base(
    fresh: Fresh, train: Callable[..., None], kind: str
) -> None:
    model = fresh("plain", "nf4")
    before = fingerprint(model)
    stack = attach(model, ["nf4", kind])
    start = {name: p.detach().clone() for name, p in stack.trainable().items()}
    train(stack)
    assert start
    assert [name for name, p in stack.trainable().items() if torch.equal(p, start[name])] == []
    assert differences(before, model) == ([], [])


@pytest.mark.parametrize("name", ["plain", "gpt2", "bert"])
@pytest.mark.parametrize(
    ("kind", "packing"),
    [
        pytest.param(kind, PACKINGS[p], id=f"{kind}-{p}")
        for kind in FAMILY
        for p in PACKINGS
        if (kind, p) != NOTHING_LOST
    ],
)
def test_saved_it_gives_the_same_logits_here_and_in_stock_peft(
    fresh: Fresh, tmp_path: Path, noise: Noise, run: Run, name: str, kind: str, packing: list[str]
) -> None:
    config = {"rank": 4, "alpha": 6.0, "rank_stabilised": True}
    stack = attach(fresh(name, *packing), [*packing, {kind: config}])
    noise(stack.trainable())
    save(stack, tmp_path / "a")
    expected = run(stack.model)
    again = fresh(name, *packing)
    before = run(again)
    load(again, tmp_path / "a")
    assert torch.equal(run(again), expected)
    theirs = PeftModel.from_pretrained(fresh(name, *packing), str(tmp_path / "a"))
    torch.testing.assert_close(run(theirs), expected, atol=2e-6, rtol=0)
    assert (expected - before).abs().max() > 0.01


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(
    fresh: Fresh, noise: Noise, gradients: Gradients, assert_same: AssertSame, kind: str, reentrant: bool
) -> None:
    model = fresh("plain", "nf4").train()
    stack = attach(model, ["nf4", kind])
    noise(stack.trainable())
    plain = gradients(model, stack.trainable())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(gradients(model, stack.trainable()), plain)


@pytest.mark.parametrize("kind", FAMILY)
def test_on_a_bf16_base_it_is_trained_in_float32(
    fresh: Fresh, run: Run, noise: Noise, gradients: Gradients, kind: str
) -> None:
    model = fresh("plain", "nf4", precision="bf16")
    stack = attach(model, ["nf4", kind])
    noise(stack.trainable())
    found = gradients(model, stack.trainable())
    assert run(model).dtype is torch.bfloat16
    assert {p.dtype for p in stack.trainable().values()} == {torch.float32}
    assert found.keys() == stack.trainable().keys()
    assert all(grad.any() for grad in found.values())


@pytest.mark.parametrize("name", ["plain", "gpt2"])
@pytest.mark.parametrize("kind", ON_FLOAT_BASES)
def test_merged_equals_unmerged(fresh: Fresh, run: Run, noise: Noise, kind: str, name: str) -> None:
    model = fresh(name)
    stack = attach(model, [kind])
    noise(stack.trainable())
    unmerged = run(model)
    stack.attachments[0].merge()
    assert not _layers(model)
    torch.testing.assert_close(run(model), unmerged, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", FAMILY)
def test_a_merge_into_a_packed_base_is_refused(fresh: Fresh, run: Run, noise: Noise, kind: str) -> None:
    model = fresh("plain", "nf4")
    stack = attach(model, ["nf4", kind])
    noise(stack.trainable())
    before = run(model)
    with pytest.raises(StackError, match=r"model\.layers\.0\.self_attn\.q_proj is packed"):
        stack.attachments[0].merge()
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("kind", ON_FLOAT_BASES)
def test_two_on_the_same_linears_add_up_whatever_the_order(fresh: Fresh, run: Run, noise: Noise, kind: str) -> None:
    outputs = []
    for names in (("a", "b"), ("b", "a")):
        model = fresh("plain")
        stacks = {n: attach(model, [{"lora" if n == "a" else kind: {"name": n, "targets": ["o_proj"]}}]) for n in names}
        for name in ("a", "b"):
            noise(stacks[name].trainable())
        outputs.append(run(model))
        for name in ("a", "b"):
            with stacks[name].base_only():
                assert (run(model) - outputs[-1]).abs().max() > 1e-3
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-6, rtol=0)


def test_nothing_is_merged_beneath_an_adapter_that_depends_on_the_weight(fresh: Fresh, run: Run, noise: Noise) -> None:
    """DoRA divides by the norm of the weight as it is: what is merged into that first would change it."""
    model = fresh("plain")
    stack = attach(model, ["lora", {"dora": {"targets": ["q_proj"]}}])
    noise(stack.trainable())
    unmerged = run(model)
    lora, dora = stack.attachments
    with pytest.raises(StackError, match=r"lora: another adapter on model\.layers\.0\.self_attn\.q_proj depends"):
        lora.merge()
    assert torch.equal(run(model), unmerged)
    dora.merge()
    lora.merge()
    torch.testing.assert_close(run(model), unmerged, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", FAMILY)
def test_roles_name_every_a_and_b(fresh: Fresh, kind: str) -> None:
    stack = attach(fresh("plain", "nf4"), ["nf4", {kind: {"name": "x"}}])
    roles = stack.attachments[0].roles()
    linear_count = 14
    assert sorted(roles.values()) == ["A"] * linear_count + ["B"] * linear_count
    assert roles.keys() <= stack.trainable().keys()
    assert {stack.trainable()[name].shape[0] for name, role in roles.items() if role == "A"} == {16}
    assert {stack.trainable()[name].shape[1] for name, role in roles.items() if role == "B"} == {16}


@pytest.mark.parametrize("kind", FAMILY)
def test_a_whole_stack_trains_every_tensor_of_it(fresh: Fresh, train: Callable[..., None], kind: str) -> None:
    specs: list[Any] = [
        "nf4",
        {kind: {"rank": 4}},
        {"prefix": {"length": 2}},
        {"layerwise-lr": {"decay": 0.5}},
        "lora-plus",
    ]
    stack = attach(fresh("plain", "nf4"), specs)
    start = {name: p.detach().clone() for name, p in stack.trainable().items()}
    train(stack)
    assert [name for name, p in stack.trainable().items() if torch.equal(p, start[name])] == []
    first = "model.layers.0.self_attn.q_proj.lora_"
    assert {stack.rates()[f"{first}{role}.{kind}"].multiplier for role in "AB"} == {0.25, 4.0}


@pytest.mark.parametrize("kind", FAMILY)
def test_its_cost_is_what_attaching_it_adds(fresh: Fresh, kind: str) -> None:
    layout = fresh("plain").config
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(layout)
    (named,) = build([{kind: {"rank": 4}}])
    cost = named.adapter.cost(skeleton)
    model = fresh("plain", "nf4")
    stack = attach(model, ["nf4", {kind: {"rank": 4}}])
    elements = sum(p.numel() for p in stack.trainable().values())
    anchors = sum(b.nbytes for m in _layers(model).values() for b in m.buffers(recurse=False))
    assert (cost.weights, cost.gradients, cost.optimizer) == (4 * elements + anchors, 4 * elements, 8 * elements)
    assert not _layers(skeleton)


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS.keys())
@pytest.mark.parametrize("name", ["plain", "gpt2"])
def test_the_matrix_of_a_linear_is_what_it_multiplies_by(fresh: Fresh, name: str, packing: list[str]) -> None:
    for linear in linears(fresh(name, *packing)).values():
        w = matrix(linear)
        x = torch.eye(w.shape[1])
        zero = torch.zeros(1, w.shape[1])
        torch.testing.assert_close((linear(x) - linear(zero)).T, w, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize(
    ("config", "place"), [({"rank": 0}, "rank"), ({"alpha": 0.0}, "alpha"), ({"dropout": 1.0}, "dropout")]
)
def test_a_setting_outside_its_range_is_refused(kind: str, config: dict[str, Any], place: str) -> None:
    with pytest.raises(RecipeError, match=rf"adapters\[0\]\.{kind}\.{place}: "):
        build([{kind: config}])


@pytest.mark.parametrize("kind", FAMILY)
def test_a_target_that_matches_nothing_is_refused_before_weights_are_read(tiny: dict[str, Path], kind: str) -> None:
    stack = build(["nf4", {kind: {"targets": ["q_porj"]}}])
    with pytest.raises(ValueError, match="did you mean 'q_proj'"):
        load_options(str(tiny["plain"]), stack, kind="causal-lm", precision="fp32")
