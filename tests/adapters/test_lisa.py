from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from onegpu.adapters import RecipeError, Stack, StackError, attach, build
from onegpu.adapters.base import load_options
from onegpu.adapters.full import Full
from onegpu.adapters.lisa import LISA

LAYERS = 6
Fresh = Callable[..., PreTrainedModel]


@pytest.fixture
def deep() -> LlamaForCausalLM:
    """A Llama of six tiny layers."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2
        )
    )


def _awake(stack: Stack) -> set[int]:
    """Which layers have any, and then only, tensors that require gradients; counted from 1."""
    layers: dict[int, set[bool]] = {}
    for name, p in stack.trainable().items():
        if ".layers." in name:
            layers.setdefault(int(name.split(".")[2]) + 1, set()).add(p.requires_grad)
    assert all(len(states) == 1 for states in layers.values())
    return {index for index, states in layers.items() if states == {True}}


def _steps(stack: Stack, optimizer: torch.optim.Optimizer, ids: Tensor, first: int, last: int) -> None:
    for step in range(first, last):
        for attachment in stack.attachments:
            attachment.before_step(step)
        stack.model(input_ids=ids).logits.float().log_softmax(-1)[..., 0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_period_trains_its_layers_the_embeddings_and_the_head_and_nothing_else(
    deep: LlamaForCausalLM, ids: Tensor
) -> None:
    """One step equals one step of full training where it trains, and is no step at all elsewhere."""
    stack = attach(deep, [{"lisa": {"active": 2, "interval": 3}}], seed=4)
    optimizer = torch.optim.AdamW(list(stack.trainable().values()), lr=0.01, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in stack.trainable().items()}
    deep(input_ids=ids).logits.float().log_softmax(-1)[..., 0].sum().backward()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in stack.trainable().items()}
    optimizer.zero_grad()
    _steps(stack, optimizer, ids, 0, 1)
    awake = LISA(active=2, interval=3).drawn(LAYERS, 4, 0)
    assert _awake(stack) == awake
    reference = {name: torch.nn.Parameter(value.clone()) for name, value in before.items()}
    for name, parameter in reference.items():
        parameter.grad = grads[name]
    torch.optim.AdamW(list(reference.values()), lr=0.01, weight_decay=0.1).step()
    for name, p in stack.trainable().items():
        trained = ".layers." not in name or int(name.split(".")[2]) + 1 in awake
        torch.testing.assert_close(p, reference[name])
        assert torch.equal(p, before[name]) is not trained


def test_its_gradients_are_those_of_full_training(deep: LlamaForCausalLM, ids: Tensor) -> None:
    stack = attach(deep, ["full"])
    deep(input_ids=ids).logits.square().sum().backward()
    full = {name: p.grad.clone() for name, p in stack.trainable().items() if p.grad is not None}
    stack.detach()
    deep.zero_grad()
    stack = attach(deep, ["lisa"])
    deep(input_ids=ids).logits.square().sum().backward()
    found = {name: p.grad for name, p in stack.trainable().items() if p.grad is not None}
    assert found.keys() == {name for name, p in stack.trainable().items() if p.requires_grad}
    assert len(found) == 3 + 2 * 9
    for name, grad in found.items():
        torch.testing.assert_close(grad, full[name])


def test_what_is_drawn_is_a_function_of_seed_and_step() -> None:
    lisa = LISA(active=2, interval=5)
    draws = [lisa.drawn(LAYERS, 0, step) for step in range(100)]
    assert all(draws[step] == draws[step - step % 5] for step in range(100))
    assert all(len(drawn) == 2 and drawn <= set(range(1, LAYERS + 1)) for drawn in draws)
    assert draws == [lisa.drawn(LAYERS, 0, step) for step in range(100)]
    assert draws != [lisa.drawn(LAYERS, 1, step) for step in range(100)]
    assert len(set(draws)) > 5


def test_every_layer_has_the_same_chance() -> None:
    lisa = LISA(active=2, interval=1)
    counts = Counter(layer for step in range(3000) for layer in lisa.drawn(LAYERS, 0, step))
    assert counts.keys() == set(range(1, LAYERS + 1))
    assert all(abs(count - 1000) < 130 for count in counts.values())  # five standard deviations


def test_the_programs_random_numbers_are_left_alone(deep: LlamaForCausalLM) -> None:
    state = torch.get_rng_state()
    attach(deep, ["lisa"]).attachments[0].before_step(20)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resumed_run_is_the_run_in_one_go(ids: Tensor, deep: LlamaForCausalLM) -> None:
    """Also where the checkpoint lies within a period: nothing but tensors and the optimiser's state is carried over."""
    start = {name: value.clone() for name, value in deep.state_dict().items()}

    def begin() -> tuple[Stack, torch.optim.Optimizer]:
        model = LlamaForCausalLM(deep.config)
        model.load_state_dict(start)
        stack = attach(model, [{"lisa": {"active": 2, "interval": 3}}], seed=1)
        return stack, torch.optim.AdamW(list(stack.trainable().values()), lr=0.01)

    straight, optimizer = begin()
    _steps(straight, optimizer, ids, 0, 4)
    state = deepcopy(optimizer.state_dict())
    middle = {name: value.clone() for name, value in straight.attachments[0].tensors().items()}
    _steps(straight, optimizer, ids, 4, 8)
    resumed, optimizer = begin()
    resumed.attachments[0].load_tensors(middle)
    optimizer.load_state_dict(state)
    _steps(resumed, optimizer, ids, 4, 8)
    for name, p in straight.trainable().items():
        assert torch.equal(p, resumed.trainable()[name]), name


def test_layers_that_were_not_drawn_may_rest_and_lose_a_stale_gradient(deep: LlamaForCausalLM, ids: Tensor) -> None:
    lisa = LISA(active=2, interval=1)
    stack = attach(deep, [lisa], seed=0)
    (attachment,) = stack.attachments
    step = next(s for s in range(1, 50) if not lisa.drawn(LAYERS, 0, s) & lisa.drawn(LAYERS, 0, 0))
    deep(input_ids=ids).logits.sum().backward()
    attachment.before_step(step)
    deep(input_ids=ids)
    resting = attachment.may_rest()
    assert {int(name.split(".")[2]) + 1 for name in resting} == set(range(1, LAYERS + 1)) - lisa.drawn(LAYERS, 0, step)
    assert all(stack.trainable()[name].grad is None for name in resting)
    assert len(resting) == 4 * 9


def test_all_layers_are_full_training(deep: LlamaForCausalLM) -> None:
    stack = attach(deep, [{"lisa": {"active": LAYERS}}])
    assert _awake(stack) == set(range(1, LAYERS + 1))
    assert stack.attachments[0].may_rest() == frozenset()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(deep: LlamaForCausalLM, ids: Tensor, reentrant: bool) -> None:
    stack = attach(deep.train(), ["lisa"])
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            deep.gradient_checkpointing_enable({"use_reentrant": reentrant})
        deep.zero_grad()
        deep(input_ids=ids).logits.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in stack.trainable().items() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 3 + 2 * 9
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_its_cost_is_the_gradients_at_one_time_and_the_moments_of_all(deep: LlamaForCausalLM) -> None:
    full, lisa = Full().cost(deep), LISA(active=2).cost(deep)
    layer = sum(p.numel() for p in deep.model.layers[0].parameters())
    assert full.gradients - lisa.gradients == 4 * 4 * layer
    assert lisa.optimizer == full.optimizer == 8 * sum(p.numel() for p in deep.parameters())
    assert lisa.weights == 0
    stack = attach(deep, ["lisa"])
    assert lisa.gradients == 4 * sum(p.numel() for p in stack.trainable().values() if p.requires_grad)


def test_rates_go_by_layer_and_stay_while_layers_rest(deep: LlamaForCausalLM) -> None:
    stack = attach(deep, ["lisa", {"layerwise-lr": {"decay": 0.5}}])
    found = {name: rate.multiplier for name, rate in stack.rates().items()}
    assert found["lm_head.weight"] == 1.0
    assert found["model.layers.0.mlp.up_proj.weight"] == 0.5**LAYERS


def test_more_layers_than_there_are_is_refused_before_weights_are_read(tiny: dict[str, Path]) -> None:
    with pytest.raises(StackError, match="`active` is 3, and the model has 2 layers"):
        load_options(str(tiny["plain"]), build([{"lisa": {"active": 3}}]), kind="causal-lm", precision="fp32")


@pytest.mark.parametrize("config", [{"active": 0}, {"interval": 0}, {"interval": 2.5}])
def test_a_setting_outside_its_range_is_refused(config: dict[str, float]) -> None:
    (place,) = config
    with pytest.raises(RecipeError, match=rf"adapters\[0\]\.lisa\.{place}: "):
        build([{"lisa": config}])
