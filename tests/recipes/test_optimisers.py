from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from onegpu.adapters import Rate, RecipeError, Stack, attach, load_base
from onegpu.recipes import Loaded, Outcome, Train, run as run_loudly
from onegpu.recipes.optimisers import groups_of, lay_alike, make_optimizer, make_schedule, unreached_peak, warmup_steps
from onegpu.recipes.optimizer_state import check, flatten
from onegpu.recipes.schema import Schedule

DECAY = 0.5
LORA = {"lora": {"rank": 4}}


@pytest.fixture
def layerwise(chat_base: Path) -> Callable[..., Stack]:
    """`layerwise("full")`: the tiny Llama with an adapter and rates that halve from layer to layer."""

    def build(adapter: Any, weight_decay: float = 0.0) -> Stack:
        model = load_base(str(chat_base), precision="fp32")
        return attach(model, [adapter, {"layerwise-lr": {"decay": DECAY}}])

    return build


def _optimizer(train: Train, stack: Stack) -> torch.optim.Optimizer:
    trainable = stack.trainable()
    return make_optimizer(train, groups_of(trainable, stack.rates(train.weight_decay)), trainable)


def _measured(stack: Stack, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Update divided by gradient of every tensor, over one step with gradients of one."""
    before = {name: p.detach().clone().double() for name, p in stack.trainable().items()}
    for parameter in stack.trainable().values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        name: ((before[name] - p.detach().double()) / torch.ones_like(p)).mean().item()
        for name, p in stack.trainable().items()
    }


def _by_layer(measured: Mapping[str, float]) -> list[float]:
    """The one rate of each layer, the lowest layer first."""
    layers: list[float] = []
    for layer in range(2):
        rates = [rate for name, rate in measured.items() if f"layers.{layer}." in name]
        assert rates
        assert max(rates) == pytest.approx(min(rates), rel=1e-4)
        layers.append(rates[0])
    return layers


@pytest.mark.parametrize("adapter", [LORA, "full", {"prefix": {"length": 3}}], ids=["lora", "full", "prefix"])
def test_each_layer_moves_by_its_share_of_the_one_above_at_every_time_of_the_schedule(
    layerwise: Callable[..., Stack], adapter: Any
) -> None:
    stack = layerwise(adapter)
    train = Train(optimizer="sgd", learning_rate=1.0, schedule="cosine", warmup=2)
    optimizer = _optimizer(train, stack)
    schedule = make_schedule(train, optimizer, steps=10)
    seen = []
    for _ in range(8):
        rate = float(schedule.get_last_lr()[0])
        lower, upper = _by_layer(_measured(stack, optimizer))
        if rate:
            assert lower / upper == pytest.approx(DECAY, rel=1e-4)
            seen.append(round(upper, 6))
        schedule.step()
    assert len(set(seen)) > 4  # the schedule did move


def test_a_head_has_the_full_rate_and_embeddings_the_lowest(layerwise: Callable[..., Stack]) -> None:
    stack = layerwise("full")
    measured = _measured(stack, _optimizer(Train(optimizer="sgd", learning_rate=1.0), stack))
    assert measured["model.norm.weight"] == pytest.approx(1.0, rel=1e-4)
    assert measured["model.embed_tokens.weight"] == pytest.approx(DECAY**3, rel=1e-4)


def test_layers_keep_their_ratio_through_the_loop_too(
    chat_recipe: Callable[..., Loaded],
    run: Callable[..., Outcome],
    metrics: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    train = {"steps": 6, "schedule": "linear", "warmup": 2, "learning_rate": 0.01}
    run(chat_recipe([LORA, {"layerwise-lr": {"decay": DECAY}}], train=train))
    rates = [line["learning_rates"] for line in metrics(tmp_path / "out")]
    assert len(rates) == 6
    assert rates[0] == [0.0, 0.0]
    assert len({tuple(step) for step in rates}) > 3
    for lower, upper in rates[1:]:
        assert lower / upper == pytest.approx(DECAY, rel=1e-6)


@pytest.mark.parametrize("name", get_args(Schedule))
def test_every_schedule_multiplies_all_groups_alike(layerwise: Callable[..., Stack], name: Any) -> None:
    stack = layerwise(LORA)
    train = Train(learning_rate=0.1, schedule=name, warmup=0 if name == "constant" else 3)
    schedule = make_schedule(train, _optimizer(train, stack), steps=20)
    first = None
    for _ in range(20):
        rates = [float(rate) for rate in schedule.get_last_lr()]
        first = first or rates
        assert max(rates) <= 0.1
        assert rates[0] == pytest.approx(DECAY * rates[1], rel=1e-9)
        schedule.optimizer.step()
        schedule.step()
    assert name == "constant" or first == [0.0, 0.0]


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 0), (0.1, 10), (0.03, 3), (5, 5), (1, 1)])
def test_warm_up_is_a_share_or_a_number_of_steps(warmup: float | int, steps: int) -> None:
    assert warmup_steps(Train(warmup=warmup), 100) == steps


def test_equal_rates_form_one_group_and_every_tensor_is_in_exactly_one() -> None:
    trainable = {name: nn.Parameter(torch.ones(size)) for name, size in (("a", 2), ("b", 3), ("c", 4))}
    slow = Rate(multiplier=0.5)
    groups = groups_of(trainable, {"a": slow, "b": Rate(), "c": slow})
    assert [(group.names, group.elements) for group in groups] == [(("a", "c"), 6), (("b",), 3)]
    assert groups[0].row(0.1) == {
        "tensors": 2,
        "elements": 6,
        "learning_rate": 0.05,
        "weight_decay": 0.0,
        "example": "a",
    }


@pytest.mark.parametrize("name", ["sgd", "adamw", "adamw-8bit"])
def test_the_optimiser_steps_every_tensor_with_its_own_rate_and_decay(name: Any) -> None:
    trainable = {"a": nn.Parameter(torch.ones(8, 8)), "b": nn.Parameter(torch.ones(8))}
    rates = {"a": Rate(multiplier=0.5, weight_decay=0.1), "b": Rate()}
    train = Train(optimizer=name, learning_rate=0.01)
    optimizer = make_optimizer(train, groups_of(trainable, rates), trainable)
    assert [(g["names"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (["a"], 0.005, 0.1),
        (["b"], 0.01, 0.0),
    ]


@pytest.mark.parametrize("name", ["sgd", "adamw", "adamw-8bit"])
def test_weight_decay_shrinks_what_has_no_gradient_by_its_own_rate(name: Any) -> None:
    parameter = nn.Parameter(torch.full((8, 8), 2.0))
    train = Train(optimizer=name, learning_rate=0.5)
    groups = groups_of({"a": parameter}, {"a": Rate(multiplier=0.5, weight_decay=0.2)})
    optimizer = make_optimizer(train, groups, {"a": parameter})
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(parameter, torch.full((8, 8), 2.0 * (1 - 0.25 * 0.2)), rtol=1e-5)


@pytest.mark.parametrize("transposed", ["gradient", "parameter"])
def test_a_fused_step_pairs_what_belongs_together(transposed: str) -> None:
    """However gradient and parameter lie in memory, as by the formula of Adam's first step."""
    values, gradient = torch.randn(4, 3), torch.randn(3, 4).t()
    parameter = nn.Parameter(values.t().contiguous().t() if transposed == "parameter" else values.clone())
    parameter.grad = gradient if transposed == "gradient" else gradient.contiguous()
    assert parameter.grad.stride() != parameter.stride()
    optimizer = make_optimizer(
        Train(learning_rate=0.1), groups_of({"a": parameter}, {"a": Rate(weight_decay=0.0)}), {"a": parameter}
    )
    lay_alike([parameter])
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), values - 0.1 * gradient.sign(), rtol=1e-5, atol=1e-5)


def test_a_step_that_was_passed_over_leaves_no_state() -> None:
    """In fp16 a fused optimiser is called on a step that overflowed, too, and begins a state at step 0."""
    parameter = nn.Parameter(torch.ones(4))
    optimizer = make_optimizer(Train(), groups_of({"a": parameter}, {"a": Rate()}), {"a": parameter})
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (float("inf"), 1.0):
        scaler.scale(parameter.sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        tensors, values = flatten(optimizer)
        check(optimizer, tensors, values, 1)
        assert bool(tensors) == (factor == 1.0)


def test_small_tensors_keep_their_state_in_32_bits() -> None:
    trainable = {"small": nn.Parameter(torch.ones(4095)), "large": nn.Parameter(torch.ones(4096))}
    rates = dict.fromkeys(trainable, Rate())
    optimizer = make_optimizer(Train(optimizer="adamw-8bit"), groups_of(trainable, rates), trainable)
    for parameter in trainable.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def state(name: str) -> Tensor:
        found: Tensor = optimizer.state[trainable[name]]["state1"]
        return found

    assert (state("small").dtype, state("large").dtype) == (torch.float32, torch.uint8)


@pytest.mark.parametrize("multiplier", [0.0, -1.0, 1e60, float("nan")])
def test_a_rate_that_trains_nothing_is_refused_whoever_made_it(multiplier: float) -> None:
    trainable = {"a": nn.Parameter(torch.ones(2))}
    train = Train()
    with pytest.raises(RecipeError, match=r"the rate of a comes to .*, which trains nothing"):
        make_optimizer(train, groups_of(trainable, {"a": Rate(multiplier=multiplier)}), trainable)


@pytest.mark.parametrize(("warmup", "told"), [(3, ""), (4, "7.5e-03"), (10, "3.0e-03"), (0, ""), (0.99, "7.5e-03")])
def test_a_warm_up_that_is_not_over_in_time_is_told_with_the_highest_rate(warmup: float | int, told: str) -> None:
    text = unreached_peak(Train(warmup=warmup, learning_rate=0.01), 4)
    assert bool(text) == bool(told)
    assert told in text


def test_a_run_tells_of_it(
    chat_recipe: Callable[..., Loaded], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_loudly(chat_recipe(train={"steps": 2, "warmup": 4}), tmp_path / "out")
    assert "the warm-up of 4 steps ends after the run of 2: the highest rate is 2.5e-03" in capsys.readouterr().out
