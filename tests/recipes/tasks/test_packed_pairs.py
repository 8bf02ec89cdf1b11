"""Pairs in one row, their prompt read once: the numbers of two sequences, or a reason why not."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from onegpu.adapters import attach, segments
from onegpu.recipes.tasks import Batch, chunks
from onegpu.recipes.tasks.output_head import Arithmetic
from onegpu.recipes.tasks.preference import JudgedExample, Preference
from onegpu.recipes.tasks.tokens import sequence_logps, supervised_tokens

Build = Callable[..., PreTrainedModel]
IGNORED, PAD = -100, 0
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LLAMA = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}
PLAIN = Preference(data="rows.jsonl")


def _pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> JudgedExample:
    """Supervised are the completions, but for tokens above 50, as of a tool between two turns."""
    blank = [IGNORED] * len(prompt)
    labels, others = ([*blank, *(token if token <= 50 else IGNORED for token in said)] for said in (chosen, rejected))
    return JudgedExample(0, [*prompt, *chosen], labels, 0, [*prompt, *rejected], others)


LONG, LONGER = list(range(1, 12)), list(range(1, 21))
PAIRS = [
    _pair(LONG, [28, 29], [30, 31, 32]),
    _pair([33], [34, 35, 36, 37], [38]),  # a prompt that is shorter than what is worth sharing
    _pair(LONGER, [42, 43], [42, 44]),  # begins as the first one does; a supervised token in common
    _pair(list(range(45, 31, -1)), [47, 55, 56, 48], [47, 55, 57, 49, 50]),  # turns of a tool
]


def _suited(model: PreTrainedModel, *, longest: int = 22, packing: bool = True, **settings: Any) -> tuple[Any, str]:
    task = Preference(data="rows.jsonl", **settings)
    return task.suited(model, PAIRS[0], longest=longest, pad=PAD, packing=packing)


def _weighted(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """The log-probabilities, and the gradient of a sum in which each counts differently."""
    logps = sequence_logps(model, batch)
    loss = (logps * torch.linspace(-1, 1, len(logps))).sum()
    found = torch.autograd.grad(loss, list(model.parameters()))
    return logps, torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_numbers_and_gradients_are_those_of_two_sequences(
    architecture: PreTrainedConfig, implementation: str, causal_model: Build
) -> None:
    model = causal_model(architecture, implementation)
    task, _ = _suited(model)
    apart, expected = _weighted(model, PLAIN.collate(PAIRS, PAD))
    assert expected.norm() > 1e-2
    for shares in (True, False):
        task._shares = shares
        with task.at_work(model):
            together, gradient = _weighted(model, task.collate(PAIRS, PAD))
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
        assert (gradient - expected).norm() / expected.norm() < 1e-5


def test_a_prompt_is_there_once_but_for_its_last_token(causal_model: Build) -> None:
    """That token predicts the first one of each completion; the last one of a completion predicts nothing."""
    task, remark = _suited(causal_model())
    assert remark == "rows are packed, and what several begin with is read once"
    batch, apart = task.collate(PAIRS[:2], PAD), PLAIN.collate(PAIRS[:2], PAD)
    # What others go on from, then that which sees few tokens.
    expected = [*range(1, 11), 33, 33, 34, 35, 36, 11, 28, *[PAD] * 12, 11, 30, 31]
    assert batch["input_ids"].tolist() == [expected]
    assert batch["sequences"].tolist() == [[-1] * 10 + [3] + [1] * 4 + [0] * 2 + [-1] * 12 + [2] * 3]
    assert supervised_tokens(batch).tolist() == [2, 4, 3, 1] == supervised_tokens(apart).tolist()


def test_dropout_of_a_prompt_is_that_of_both_completions_and_of_no_other_pair(causal_model: Build) -> None:
    model = causal_model()
    attach(model, [{"lora": {"rank": 4, "dropout": 0.5}}])
    task, remark = _suited(model)
    assert remark == "rows are packed, and what several begin with is read once"
    shared = (task.collate([PAIRS[0], PAIRS[2]], PAD)["input_ids"] == 1).sum()
    assert shared == 2  # the first token of a prompt that both pairs begin with


def test_with_dropout_the_trial_shares_as_pairs_do(monkeypatch: pytest.MonkeyPatch, causal_model: Build) -> None:
    model = causal_model(attention="sdpa")
    attach(model, [{"lora": {"rank": 4, "dropout": 0.5}}])
    monkeypatch.setattr(segments, "_seen", lambda first, rows, columns: torch.ones(len(first), 1, rows, columns).bool())
    _, remark = _suited(model)
    assert "not packed" in remark


@pytest.mark.parametrize("loss", ["dpo", "ipo", "hinge", "robust", "simpo", "orpo", "cpo"])
def test_every_loss_of_pairs_is_the_same(loss: Any, causal_model: Build) -> None:
    model = causal_model()
    stack = attach(model, [{"lora": {"rank": 4}}])
    for tensor in stack.trainable().values():
        torch.nn.init.normal_(tensor, std=0.1)
    smoothing: dict[str, Any] = {"label_smoothing": 0.1} if loss == "robust" else {}
    plain = Preference(data="rows.jsonl", loss=loss, **smoothing)
    quick, _ = _suited(model, loss=loss, **smoothing)
    assert (quick.packs, plain.packs) == (True, False)
    found = []
    for task in (plain, quick):
        batch = task.collate(PAIRS, PAD)
        with task.at_work(model):
            with stack.base_only(), torch.no_grad():
                batch |= task.refer(model, batch)
            objective = task.objective(model, batch)
            gradient = torch.autograd.grad(objective.total, list(stack.trainable().values()))
        found.append((objective.total, objective.weight, torch.cat([g.flatten() for g in gradient])))
    (loss_a, weight_a, a), (loss_b, weight_b, b) = found
    torch.testing.assert_close(loss_a, loss_b, rtol=1e-5, atol=1e-6)
    assert weight_a == weight_b
    assert (a - b).norm() / a.norm() < 1e-4


@pytest.mark.parametrize(
    ("config", "settings", "remark"),
    [
        (LlamaConfig(**LLAMA), {"packing": False}, "an adapter or a teacher would mix what is in a row"),
        (MistralConfig(**LLAMA, sliding_window=16), {}, "its attention sees 16 tokens, and sequences have up to 22"),
    ],
    ids=["adapter", "window"],
)
def test_where_it_cannot_be_there_is_a_reason(
    config: PreTrainedConfig, settings: Any, remark: str, causal_model: Build
) -> None:
    task, found = _suited(causal_model(config), **settings)
    assert "sequences" not in task.collate(PAIRS, PAD)
    assert found == f"rows are padded to one length, not packed: {remark}"


@pytest.mark.parametrize("settings", [{"packing": False}, {"loss": "kto"}], ids=["a recipe", "kto"])
def test_it_can_be_done_without(settings: Any, causal_model: Build) -> None:
    task = Preference(data="rows.jsonl", **settings)
    same, remark = task.suited(causal_model(), PAIRS[0], longest=22, pad=PAD, packing=True)
    assert (same.packs, remark) == (False, "")
    assert "sequences" not in same.collate(PAIRS, PAD)


@pytest.mark.parametrize(("loss", "packing"), [("dpo", True), ("dpo", False), ("kto", True)])
def test_where_the_head_is_not_known_all_logits_are_made_at_once(loss: Any, packing: bool, causal_model: Build) -> None:
    """A head that adds something behind the output embeddings."""
    model: Any = causal_model()
    model.register_forward_hook(lambda module, args, output: output | {"logits": output.logits + 1})
    task = Preference(data="rows.jsonl", loss=loss, packing=packing)
    _, remark = task.suited(model, PAIRS[0], longest=22, pad=PAD, packing=True)
    assert "all logits of a batch are made at once: it changes what its output embeddings give" in remark
    assert ("rows are packed" in remark) == (packing and loss == "dpo")


def test_log_probabilities_in_chunks_are_those_of_all_logits(
    live_tensors: Any, monkeypatch: Any, causal_model: Build
) -> None:
    """Of packed pairs and of padded ones, in value and gradient; nothing is larger than a chunk."""
    monkeypatch.setattr(chunks, "CHUNK", 1)
    model = causal_model(LlamaConfig(**LLAMA | {"vocab_size": 70}))  # as wide as nothing else
    stack = attach(model, [{"lora": {"rank": 4}}])
    for tensor in stack.trainable().values():
        torch.nn.init.normal_(tensor, std=0.1)
    for task in (_suited(model)[0], PLAIN):
        batch, found = task.collate(PAIRS * 4, PAD), []
        for arithmetic in (None, Arithmetic()):
            with live_tensors(width=70) as live, task.at_work(model):
                logps = sequence_logps(model, batch, arithmetic)
                gradient = torch.autograd.grad(logps.square().sum(), list(stack.trainable().values()))
            found.append((logps, torch.cat([g.flatten() for g in gradient])))
        torch.testing.assert_close(*(logps for logps, _ in found), rtol=1e-5, atol=1e-5)
        (_, dense), (_, chunked) = found
        assert (chunked - dense).norm() <= 1e-5 * dense.norm()
        assert live.widest == chunks.FEWEST * 70
