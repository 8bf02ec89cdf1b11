"""15. Rates by group or layer, LoRA+, warm-up: accepted, and ignored.

Met: a value is stored and read by nobody, a group is found by parts of names and stays empty, a schedule flattens all
groups, a constant one has no warm-up. Nothing says so.

Here: adapters multiply rates tensor by tensor, each tensor is in exactly one group, one schedule multiplies them all;
the table of groups is printed and in the manifest; what matches nothing, or would be ignored, is an error.

Also: tests/recipes/test_optimisers.py, tests/adapters/test_layerwise_lr.py, tests/adapters/test_lora_plus.py
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from onegpu.adapters import RecipeError, TargetError
from onegpu.recipes import Loaded, Outcome

Recipe = Callable[..., Loaded]
SGD = {"optimizer": "sgd", "steps": 1, "clip": None, "schedule": "constant"}
LORA, LAYERED = {"lora": {"rank": 4}}, {"layerwise-lr": {"decay": 0.5}}


@pytest.fixture
def moves(run: Callable[..., Outcome]) -> Callable[[Loaded], dict[str, float]]:
    """How far each tensor goes in one step, over its gradient: its rate, as measured."""

    def measure(loaded: Loaded) -> dict[str, float]:
        before: dict[str, Tensor] = {}
        found: dict[str, float] = {}

        def look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            before.update({n: p.detach().clone() for n, p in _named(optimizer)})

        def compare(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for name, parameter in _named(optimizer):
                assert parameter.grad is not None
                if parameter.grad.any():
                    found[name] = float((parameter - before[name]).norm() / parameter.grad.norm())

        handles = register_optimizer_step_pre_hook(look), register_optimizer_step_post_hook(compare)
        try:
            run(loaded)
        finally:
            for handle in handles:
                handle.remove()
        assert found
        return found

    return measure


def _named(optimizer: Optimizer) -> list[tuple[str, Any]]:
    return [pair for g in optimizer.param_groups for pair in zip(g["names"], g["params"], strict=True)]


def test_a_layer_moves_by_its_share_of_the_one_above(recipe: Recipe, moves: Callable[..., dict[str, float]]) -> None:
    found = moves(recipe([LORA, LAYERED], train=SGD | {"learning_rate": 0.5}))
    for layer, rate in ((1, 0.25), (0, 0.125)):  # the head's is 0.5
        measured = [value for name, value in found.items() if f".layers.{layer}." in name]
        assert len(measured) == 7
        assert measured == pytest.approx([rate] * 7, rel=1e-4)


def test_b_moves_by_its_multiple_of_a(recipe: Recipe, run: Callable[..., Outcome]) -> None:
    facts = run(recipe([LORA, {"lora-plus": {"ratio": 16}}], train={"learning_rate": 1e-3})).adapter
    groups = json.loads((facts / "manifest.json").read_text("utf-8"))["run"]["groups"]
    assert [(g["tensors"], g["learning_rate"]) for g in groups] == [(14, 1e-3), (14, 16e-3)]


def test_on_embeddings_nothing_is_sped_up_in_silence(recipe: Recipe, run: Callable[..., Outcome]) -> None:
    """What trains of an embedding declares no B, whatever it is called; LoRA on one is refused."""
    rows, plus = {"trainable-tokens": {"tokens": [5, 6], "name": "lora_B"}}, {"lora-plus": {"ratio": 16}}
    with pytest.raises(TargetError, match="nothing in this stack has a B to speed up"):
        run(recipe([rows, plus]), "alone")
    run_facts = json.loads((run(recipe([LORA, rows, plus])).adapter / "manifest.json").read_text("utf-8"))["run"]
    assert [(g["tensors"], g["learning_rate"]) for g in run_facts["groups"]] == [(14 + 1, 0.01), (14, 0.16)]
    with pytest.raises(TargetError, match="embed_tokens"):
        run(recipe([{"lora": {"targets": ["embed_tokens"]}}, plus]), "on it")


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_schedule_keeps_the_ratio_of_all_groups_and_logs_them(
    schedule: str, recipe: Recipe, run: Callable[..., Outcome], metrics: Any, tmp_path: Path
) -> None:
    run(recipe([LORA, LAYERED], train={"steps": 5, "schedule": schedule, "warmup": 2, "learning_rate": 0.01}))
    rates = [line["learning_rates"] for line in metrics(tmp_path / "out")]
    assert len(rates) == 5
    assert rates[0] == [0.0, 0.0]  # warm-up is not ignored
    assert {round(max(both) / min(both), 9) for both in rates if max(both)} == {2.0}
    assert math.isclose(max(map(max, rates)), 0.005)


def test_a_rule_that_matches_nothing_is_an_error(recipe: Recipe, run: Callable[..., Outcome]) -> None:
    with pytest.raises(TargetError, match=r"override '\*lora_C\*' matches no trainable tensor"):
        run(recipe([LORA, {"layerwise-lr": {"overrides": {"*lora_C*": 2.0}}}]))
    with pytest.raises(TargetError, match="nothing in this stack has a B to speed up"):
        run(recipe([{"prefix": {"length": 2}}, "lora-plus"]), "other")


def test_a_setting_that_would_be_ignored_is_refused(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="`constant` would ignore `warmup`; use `constant_with_warmup`"):
        recipe(train={"schedule": "constant", "warmup": 10})


def test_which_tensors_have_8_bit_moments_can_be_seen(
    recipe: Recipe, run: Callable[..., Outcome], tmp_path: Path, tensors: Callable[[Path], dict[str, Tensor]]
) -> None:
    big = {"lora": {"rank": 128, "targets": ["q_proj"]}}  # 128 x 32 = 4,096 elements each
    small = {"lora": {"rank": 4, "targets": ["v_proj"], "name": "small"}}
    run(recipe([big, small], train={"steps": 2, "optimizer": "adamw-8bit", "checkpoint_every": 1}))
    state = tensors(tmp_path / "out/checkpoints/step-000001")
    kinds = {key.partition(":")[2]: str(t.dtype) for key, t in state.items() if key.endswith("/state1")}
    assert len(kinds) == 8
    assert {dtype for name, dtype in kinds.items() if ".small" in name} == {"torch.float32"}
    assert {dtype for name, dtype in kinds.items() if ".small" not in name} == {"torch.uint8"}
