from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import PreTrainedModel

from onegpu.adapters import RecipeError, TargetError, attach, build, rates

Fresh = Callable[..., PreTrainedModel]


def _multipliers(model: PreTrainedModel, *stack: Any) -> dict[str, float]:
    return {name: rate.multiplier for name, rate in rates(attach(model, stack)).items()}


def test_the_rates_are_those_of_pefts_optimiser(fresh: Fresh) -> None:
    found = _multipliers(fresh("gpt2"), "lora", {"lora-plus": {"ratio": 5.0}})
    theirs = get_peft_model(fresh("gpt2"), LoraConfig(target_modules="all-linear", fan_in_fan_out=True))
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=5.0)
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected: Mapping[str, float] = {
        name.removeprefix("base_model.model.").replace(".default.weight", ".lora"): rate_of[id(p)]
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert found == expected
    assert set(found.values()) == {1.0, 5.0}


@pytest.mark.parametrize("first", [True, False])
def test_it_multiplies_with_layerwise_rates_in_either_order(fresh: Fresh, first: bool) -> None:
    both: list[Any] = [{"layerwise-lr": {"decay": 0.5}}, "lora-plus"]
    found = _multipliers(fresh("plain"), {"lora": {"targets": ["q_proj"]}}, *(both if first else reversed(both)))
    assert found == {
        "model.layers.0.self_attn.q_proj.lora_A.lora": 0.25,
        "model.layers.0.self_attn.q_proj.lora_B.lora": 4.0,
        "model.layers.1.self_attn.q_proj.lora_A.lora": 0.5,
        "model.layers.1.self_attn.q_proj.lora_B.lora": 8.0,
    }


def test_only_what_is_declared_to_be_a_b_is_sped_up(fresh: Fresh) -> None:
    """Neither a head, nor a prefix, nor DoRA's magnitude, of whatever name and shape they are."""
    stack = [
        {"dora": {"name": "lora_B", "targets": ["query"]}},
        {"prefix": {"name": "B"}},
        {"lora-plus": {"ratio": 3.0}},
    ]
    found = _multipliers(fresh("bert"), *stack)
    faster = {name for name, rate in found.items() if rate != 1.0}
    assert faster == {f"bert.encoder.layer.{i}.attention.self.query.lora_B.lora_B" for i in (0, 1)}
    assert {found[name] for name in faster} == {3.0}
    assert {"classifier.weight"} < found.keys() - faster


def test_weight_decay_stays(fresh: Fresh) -> None:
    found = attach(fresh("plain"), ["lora", "lora-plus"]).rates(weight_decay=0.1)
    assert {rate.weight_decay for rate in found.values()} == {0.1}
    assert {rate.role for rate in found.values()} == {"A", "B"}


@pytest.mark.parametrize("stack", [["prefix"], ["full"]])
def test_a_stack_without_any_b_is_refused(fresh: Fresh, stack: list[str]) -> None:
    with pytest.raises(TargetError, match="nothing in this stack has a B"):
        rates(attach(fresh("plain"), [*stack, "lora-plus"]))


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("inf"), float("nan"), "16"])
def test_a_ratio_outside_its_range_is_refused(ratio: object) -> None:
    with pytest.raises(RecipeError, match=r"adapters\[0\]\.lora-plus\.ratio: "):
        build([{"lora-plus": {"ratio": ratio}}])
