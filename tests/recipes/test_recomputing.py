"""Gradient checkpointing as recipes ask for it."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from onegpu.adapters import RecipeError
from onegpu.recipes.recomputing import recompute
from onegpu.recipes.schema import Checkpointing


@pytest.fixture
def model() -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 11}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=5, **sizes))


def _recomputed(model: Any) -> list[int]:
    return [number for number, layer in enumerate(model.model.layers) if layer.gradient_checkpointing]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, []),
        (Checkpointing(), [0, 1, 2, 3, 4]),
        (Checkpointing(every=2), [0, 2, 4]),
        (Checkpointing(every=9), [0]),
    ],
)
def test_as_many_layers_recompute_as_are_asked_for(
    asked: Checkpointing | None, expected: list[int], model: PreTrainedModel
) -> None:
    assert recompute(model, asked) == ""
    assert _recomputed(model) == expected


def test_what_is_at_the_host_already_is_not_offloaded(model: PreTrainedModel) -> None:
    assert "nothing is offloaded" in recompute(model, Checkpointing(offload=True))
    assert _recomputed(model) == [0, 1, 2, 3, 4]
    model.train()
    model(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()


def test_what_is_on_an_accelerator_is_offloaded(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(model, "activation_checkpointing_enable", lambda _, **settings: given.update(settings))
    assert recompute(model, Checkpointing(every=3, offload=True)) == ""
    assert given == {"every_n_layers": 3, "offload": True}


@pytest.mark.gpu
def test_offloaded_activations_give_the_same_gradients(model: PreTrainedModel) -> None:
    tokens = torch.tensor([[1, 2, 3, 4]], device="cuda")
    model.to("cuda").train()  # type: ignore[arg-type]
    found = []
    for asked in (None, Checkpointing(offload=True)):
        recompute(model, asked)
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_model_that_cannot_says_so(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(RecipeError, match="LlamaForCausalLM does not support activation checkpointing"):
        recompute(model, Checkpointing())
