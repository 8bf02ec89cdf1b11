"""A prompt read once for two completions: the numbers of two sequences, or a reason why not."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from onegpu.adapters import attach
from onegpu.recipes.tasks import Batch, chunks
from onegpu.recipes.tasks.output_head import Arithmetic
from onegpu.recipes.tasks.pairs import PairExample, collated
from onegpu.recipes.tasks.preference import JudgedExample, Preference
from onegpu.recipes.tasks.shared_prompts import attention, cannot_share, joined, sequence_logps, supervised_tokens

IGNORED, PAD = -100, 0
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LLAMA = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA),
    "tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "head_dim": LlamaConfig(**LLAMA, head_dim=16),
    "qwen3": Qwen3Config(**LLAMA, head_dim=8),
    "gemma": GemmaConfig(**LLAMA, head_dim=8),
    "neox": GPTNeoXConfig(**SIZES, intermediate_size=64),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64),
}


def _model(config: PreTrainedConfig, attention: str = "eager") -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    return model


def _pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> JudgedExample:
    """Supervised are the completions, but for tokens above 50, as of a tool between two turns."""
    blank = [IGNORED] * len(prompt)
    labels, others = ([*blank, *(token if token <= 50 else IGNORED for token in said)] for said in (chosen, rejected))
    return JudgedExample(0, [*prompt, *chosen], labels, 0, [*prompt, *rejected], others)


PAIRS = [
    _pair([1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12]),
    _pair([13], [14, 15, 16, 17], [18]),
    _pair([19, 20, 21], [22, 23], [22, 24]),  # a supervised token in common
    _pair([25, 26], [27, 55, 56, 28], [27, 55, 57, 29, 30]),  # turns of a tool
]


def _apart(pairs: Sequence[PairExample]) -> Batch:
    return collated(
        [p.ids for p in pairs] + [p.other_ids for p in pairs],
        [p.labels for p in pairs] + [p.other_labels for p in pairs],
        PAD,
    )


def _weighted(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """The log-probabilities, and the gradient of a sum in which each counts differently."""
    logps = sequence_logps(model, batch)
    loss = (logps * torch.linspace(-1, 1, len(logps))).sum()
    found = torch.autograd.grad(loss, list(model.parameters()))
    return logps, torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_numbers_and_gradients_are_those_of_two_sequences(name: str, implementation: str) -> None:
    model = _model(CONFIGS[name], implementation)
    assert cannot_share(model, PAIRS[0], 20, PAD) == ""
    (together, gradient), (apart, expected) = (_weighted(model, batch) for batch in (joined(PAIRS, PAD), _apart(PAIRS)))
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    assert expected.norm() > 1e-2
    assert (gradient - expected).norm() / expected.norm() < 1e-5


def test_the_prompt_is_there_once() -> None:
    batch = joined(PAIRS[:2], PAD)
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 10, 11, 12],
        [0, 0, 0, 0, 0, 0, 13, 14, 15, 16, 17, 18, 0, 0],
    ]
    assert batch["position_ids"].tolist()[0] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 7, 8, 9]
    assert batch["widths"].tolist() == [7, 4, 3]
    assert supervised_tokens(batch).tolist() == [2, 4, 3, 1] == supervised_tokens(_apart(PAIRS[:2])).tolist()


def test_what_a_token_sees() -> None:
    parts = torch.tensor([[-1, 0, 0, 1, 1, -1, 2]])
    seen = attention(parts, torch.float32)[0, 0] == 0
    sees = [row.nonzero().flatten().tolist() for row in seen]
    assert sees == [[0], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 5], [1, 2, 6]]


def test_bf16() -> None:
    model = _model(CONFIGS["llama"]).bfloat16()
    assert cannot_share(model, PAIRS[0], 20, PAD) == ""


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64), "does not take such a row"),
        (MistralConfig(**LLAMA, sliding_window=16), "sees 16 tokens, and sequences have up to 20"),
    ],
    ids=["positions in the mask", "window"],
)
def test_where_it_cannot_be_there_is_a_reason(config: PreTrainedConfig, reason: str) -> None:
    assert reason in cannot_share(_model(config), PAIRS[0], 20, PAD)


class Around(torch.nn.Module):
    """A model that goes wrong in its own way."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config


def test_a_model_that_counts_positions_itself_is_found() -> None:
    class Counting(Around):
        def forward(self, position_ids: Tensor | None = None, **rest: Any) -> Any:
            return self.model(**rest)

    reason = cannot_share(Counting(_model(CONFIGS["gpt2"])), PAIRS[0], 20, PAD)
    assert reason == "the log-probabilities differ from those of two sequences"


def test_a_model_whose_rows_leak_is_found() -> None:
    class Leaky(Around):
        """Adds the mean of the row to each of its tokens."""

        def forward(self, input_ids: Tensor, **rest: Any) -> Any:
            embedded = self.model.get_input_embeddings()(input_ids)
            return self.model(inputs_embeds=embedded + embedded.mean(1, keepdim=True), **rest)

    assert "sees the other" in cannot_share(Leaky(_model(CONFIGS["llama"])), PAIRS[0], 20, PAD)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "hinge", "robust", "simpo", "orpo", "cpo"])
def test_every_loss_of_pairs_is_the_same(loss: Any) -> None:
    model = _model(CONFIGS["llama"])
    stack = attach(model, [{"lora": {"rank": 4}}])
    for tensor in stack.trainable().values():
        torch.nn.init.normal_(tensor, std=0.1)
    smoothing: dict[str, Any] = {"label_smoothing": 0.1} if loss == "robust" else {}
    plain = Preference(data="rows.jsonl", loss=loss, **smoothing)
    quick, remark = plain.suited(model, PAIRS[0], longest=20, pad=PAD, packing=True)
    assert quick is not plain
    assert "once" in remark
    found = []
    for task in (plain, quick):
        batch = task.collate(PAIRS, PAD)
        with stack.base_only(), torch.no_grad():
            batch |= task.refer(model, batch)
        objective = task.objective(model, batch)
        gradient = torch.autograd.grad(objective.total, list(stack.trainable().values()))
        found.append((objective.total, objective.weight, torch.cat([g.flatten() for g in gradient])))
    (loss_a, weight_a, a), (loss_b, weight_b, b) = found
    torch.testing.assert_close(loss_a, loss_b, rtol=1e-5, atol=1e-6)
    assert weight_a == weight_b
    assert (a - b).norm() / a.norm() < 1e-4


def test_an_adapter_that_mixes_what_is_in_a_row_prevents_it() -> None:
    task = Preference(data="rows.jsonl")
    same, remark = task.suited(_model(CONFIGS["llama"]), PAIRS[0], longest=20, pad=PAD, packing=False)
    assert "parts" not in same.collate(PAIRS, PAD)
    assert remark == "each prompt is read twice, once for each completion: an adapter mixes what is in a row"


def test_a_recipe_can_do_without() -> None:
    task = Preference(data="rows.jsonl", share_prompt=False)
    same, remark = task.suited(_model(CONFIGS["llama"]), PAIRS[0], longest=20, pad=PAD, packing=True)
    assert "parts" not in same.collate(PAIRS, PAD)
    assert remark == ""


@pytest.mark.parametrize(("loss", "share_prompt"), [("dpo", True), ("dpo", False), ("kto", True)])
def test_where_the_head_is_not_known_all_logits_are_made_at_once(loss: Any, share_prompt: bool) -> None:
    """A head that adds something behind the output embeddings."""
    model: Any = _model(CONFIGS["llama"])
    model.register_forward_hook(lambda module, args, output: output | {"logits": output.logits + 1})
    task = Preference(data="rows.jsonl", loss=loss, share_prompt=share_prompt)
    _, remark = task.suited(model, PAIRS[0], longest=20, pad=PAD, packing=True)
    assert "all logits of a batch are made at once: it changes what its output embeddings give" in remark
    assert ("each prompt is read once" in remark) == (share_prompt and loss == "dpo")


def test_log_probabilities_in_chunks_are_those_of_all_logits(live_tensors: Any, monkeypatch: Any) -> None:
    """Of pairs in one row and in two, in value and gradient; nothing is larger than a chunk."""
    monkeypatch.setattr(chunks, "CHUNK", 1)
    model = _model(LlamaConfig(**LLAMA | {"vocab_size": 70}))  # as wide as nothing else
    stack = attach(model, [{"lora": {"rank": 4}}])
    for tensor in stack.trainable().values():
        torch.nn.init.normal_(tensor, std=0.1)
    sequences = (
        [e.ids for e in PAIRS] + [e.other_ids for e in PAIRS],
        [e.labels for e in PAIRS] + [e.other_labels for e in PAIRS],
    )
    for batch in (joined(PAIRS * 4, PAD), collated(sequences[0] * 4, sequences[1] * 4, PAD)):
        found = []
        for arithmetic in (None, Arithmetic()):
            with live_tensors(width=70) as live:
                logps = sequence_logps(model, batch, arithmetic)
                gradient = torch.autograd.grad(logps.square().sum(), list(stack.trainable().values()))
            found.append((logps, torch.cat([g.flatten() for g in gradient])))
        torch.testing.assert_close(*(logps for logps, _ in found), rtol=1e-5, atol=1e-5)
        (_, dense), (_, chunked) = found
        assert (chunked - dense).norm() <= 1e-5 * dense.norm()
        assert live.widest == chunks.FEWEST * 70
