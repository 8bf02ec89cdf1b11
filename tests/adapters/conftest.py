"""What the tests of adapters share: fresh copies of tiny models, and how they are run and trained."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from onegpu.adapters import Stack, load_base

CLASSIFIERS = {"bert", "roberta"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On matrices this small, threads wait for one another longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(saved_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of all tiny models: the shared ones, a GPT-2 (its linears are Conv1D) and a RoBERTa (other positions)."""
    root = tmp_path_factory.mktemp("more-models")
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    ).save_pretrained(root / "gpt2")
    RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            id2label=dict(enumerate("abc")),
        )
    ).save_pretrained(root / "roberta")
    return saved_models | {path.name: path for path in root.iterdir()}


@pytest.fixture
def fresh(tiny: dict[str, Path]) -> Callable[..., PreTrainedModel]:
    """`fresh("plain", "nf4", precision="bf16")`: a new instance, float32 unless told, loaded as a user would."""

    def load(name: str, *adapters: Any, **options: Any) -> PreTrainedModel:
        kind = "sequence-classification" if name in CLASSIFIERS else "causal-lm"
        return load_base(str(tiny[name]), adapters, **({"kind": kind, "precision": "fp32"} | options))

    return load


@pytest.fixture
def run(ids: Tensor) -> Callable[..., Tensor]:
    """The logits of a model for the shared token ids, without gradients."""

    def logits(model: nn.Module, **inputs: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**({"input_ids": ids} | inputs)).logits
        return found

    return logits


@pytest.fixture
def gradients(ids: Tensor) -> Callable[..., dict[str, Tensor]]:
    """Gradients of the summed log-probability of class 0: any architecture has it, and it is of the order of one."""

    def take(model: nn.Module, parameters: Mapping[str, nn.Parameter], **inputs: Any) -> dict[str, Tensor]:
        for parameter in parameters.values():
            parameter.grad = None
        logits = model(**({"input_ids": ids} | inputs)).logits
        logits.float().log_softmax(-1)[..., 0].sum().backward()
        return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}

    return take


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Two sets of tensors are the same by name, each but for rounding: 1e-6 of its norm."""

    def check(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
        assert ours.keys() == theirs.keys()
        assert ours
        for name, expected in theirs.items():
            norm = expected.float().norm()
            assert norm > 0, f"{name} is zero, so that equality would say nothing"
            assert (ours[name].float() - expected.float()).norm() <= tolerance * norm, name

    return check


@pytest.fixture
def train(ids: Tensor) -> Callable[..., None]:
    """A few optimiser steps on the shared token ids."""

    def steps(stack: Stack, count: int = 3) -> None:
        optimizer = torch.optim.AdamW(list(stack.trainable().values()), lr=0.01)
        stack.model.train()
        for _ in range(count):
            optimizer.zero_grad()
            stack.model(input_ids=ids).logits.float().log_softmax(-1)[..., 0].sum().backward()
            optimizer.step()
        stack.model.eval()

    return steps
