from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from onegpu.adapters import RecipeError, TargetError, attach, build, rates

Fresh = Callable[..., PreTrainedModel]

HALF: dict[str, Any] = {"layerwise-lr": {"decay": 0.5}}


def _multipliers(model: PreTrainedModel, stack: Sequence[Any]) -> dict[str, float]:
    return {name: rate.multiplier for name, rate in rates(attach(model, stack)).items()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "plain",
            {
                "lm_head.weight": 1.0,
                "model.norm.weight": 1.0,
                "model.layers.1.self_attn.q_proj.weight": 0.5,
                "model.layers.1.input_layernorm.weight": 0.5,
                "model.layers.0.mlp.down_proj.weight": 0.25,
                "model.embed_tokens.weight": 0.125,
            },
        ),
        (
            "bert",
            {
                "classifier.weight": 1.0,
                "classifier.bias": 1.0,
                "bert.pooler.dense.weight": 1.0,
                "bert.encoder.layer.1.attention.self.query.weight": 0.5,
                "bert.encoder.layer.0.output.LayerNorm.bias": 0.25,
                "bert.embeddings.word_embeddings.weight": 0.125,
                "bert.embeddings.LayerNorm.weight": 0.125,
            },
        ),
    ],
)
def test_rates_decay_from_the_head_down_to_the_embeddings(fresh: Fresh, name: str, expected: dict[str, float]) -> None:
    model = fresh(name)
    found = _multipliers(model, ["full", HALF])
    assert found.keys() == dict(model.named_parameters()).keys()
    assert {tensor: found[tensor] for tensor in expected} == expected
    assert set(found.values()) == {1.0, 0.5, 0.25, 0.125}


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_an_adapters_tensors_have_the_rate_of_the_layer_they_change(fresh: Fresh, kind: str) -> None:
    found = _multipliers(fresh("plain"), [kind, HALF])
    assert found
    assert all(rate == (0.5 if ".layers.1." in name else 0.25) for name, rate in found.items())


@pytest.mark.parametrize("stack", [["lora"], ["prefix"], ["lora", "prefix"], ["full"], []])
def test_every_trainable_tensor_has_exactly_one_rate(fresh: Fresh, stack: list[str]) -> None:
    attached = attach(fresh("bert"), [*stack, HALF])
    assert attached.rates().keys() == attached.trainable().keys()
    assert len({id(p) for p in attached.trainable().values()}) == len(attached.trainable())


def test_without_it_all_tensors_have_the_full_rate(fresh: Fresh) -> None:
    assert set(_multipliers(fresh("plain"), ["lora"]).values()) == {1.0}


def test_two_of_them_multiply(fresh: Fresh) -> None:
    again = {"layerwise-lr": {"decay": 0.1, "name": "again"}}
    found = _multipliers(fresh("plain"), ["lora", HALF, again])
    assert sorted(set(found.values())) == pytest.approx([0.25 * 0.01, 0.5 * 0.1])


def test_an_override_replaces_the_layers_own_rate(fresh: Fresh) -> None:
    override = {"layerwise-lr": {"decay": 0.5, "overrides": {"*.lora_B.*": 4.0, "model.layers.0.*q_proj.lora_A*": 2.0}}}
    found = _multipliers(fresh("plain"), [{"lora": {"targets": ["q_proj"]}}, override])
    assert found == {
        "model.layers.0.self_attn.q_proj.lora_A.lora": 2.0,
        "model.layers.0.self_attn.q_proj.lora_B.lora": 4.0,
        "model.layers.1.self_attn.q_proj.lora_A.lora": 0.5,
        "model.layers.1.self_attn.q_proj.lora_B.lora": 4.0,
    }


def test_an_override_that_matches_nothing_is_an_error_with_a_suggestion(fresh: Fresh) -> None:
    override = {"layerwise-lr": {"overrides": {"classifier.weigth": 2.0}}}
    with pytest.raises(
        TargetError, match=r"'classifier.weigth' matches no trainable tensor; did you mean 'classifier.w"
    ):
        rates(attach(fresh("bert"), [override]))


def test_weight_decay_is_left_as_it_was_and_spares_vectors(fresh: Fresh) -> None:
    found = rates(attach(fresh("bert"), ["full", HALF]), weight_decay=0.1)
    assert found["classifier.weight"].weight_decay == 0.1
    assert found["classifier.bias"].weight_decay == 0.0
    assert found["bert.embeddings.LayerNorm.weight"].weight_decay == 0.0


def test_an_optimiser_really_moves_layers_by_their_rates(llama: PreTrainedModel, ids: Tensor) -> None:
    stack = attach(llama, ["full", HALF])
    found, parameters = stack.rates(), stack.trainable()
    groups = [{"params": [p], "lr": 0.1 * found[name].multiplier} for name, p in parameters.items()]
    before = {name: p.detach().clone() for name, p in parameters.items()}
    llama(input_ids=ids).logits.square().sum().backward()
    torch.optim.SGD(groups).step()
    for name, p in parameters.items():
        assert p.grad is not None
        torch.testing.assert_close(before[name] - p, 0.1 * found[name].multiplier * p.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("decay", [0, 1.5, -1])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(RecipeError, match=r"adapters\[0\].layerwise-lr.decay: must be"):
        build([{"layerwise-lr": {"decay": decay}}])


@pytest.mark.parametrize("multiplier", [0.0, -1.0, float("inf"), float("nan")])
def test_a_multiplier_that_trains_nothing_or_away_from_the_goal_is_refused(multiplier: float) -> None:
    with pytest.raises(RecipeError, match=r"adapters\[0\]\.layerwise-lr\.overrides\.\*: must be"):
        build([{"layerwise-lr": {"overrides": {"*": multiplier}}}])
