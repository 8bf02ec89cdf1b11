"""Heads that can be applied in pieces give what the whole model gives; the others are found out, and named."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from onegpu.adapters import Stack, attach
from onegpu.recipes.tasks import chunks
from onegpu.recipes.tasks.contract import IGNORED, Batch, model_inputs
from onegpu.recipes.tasks.output_head import Arithmetic, OutputHead, before_head, find_head
from onegpu.recipes.tasks.tokens import causal_logits, own_logits, token_objective

VOCABULARY = 70
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0}
STILL: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
CAUSAL: dict[str, Callable[[], PreTrainedModel]] = {
    "plain": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "capped": lambda: Gemma2ForCausalLM(Gemma2Config(**LLAMA, **UNTIED, head_dim=8, final_logit_softcapping=3.0)),
    "multiplied": lambda: CohereForCausalLM(CohereConfig(**LLAMA | ENDS, **UNTIED, logit_scale=0.3)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**LLAMA, logits_scaling=7.0)),
    "transposed": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, **STILL, **ENDS)
    ),
}
ADAPTERS: dict[str, list[Any]] = {
    "none on the head": [{"lora": {"rank": 4, "targets": "all-linear"}}],
    "lora on the head": [{"lora": {"rank": 4, "targets": ["lm_head", "q_proj"]}}],
    "tokens": [{"trainable-tokens": {"tokens": [5, 9, 11]}}],
    "vectors in front": [{"prompt-tuning": {"num_virtual_tokens": 4}}, {"lora": {"rank": 4}}],
    "prefix": [{"prefix": {"length": 4}}],
    "all": ["full"],
}


CANNOT = {
    ("tied", "lora on the head"),  # it would pull the two apart
    ("transposed", "lora on the head"),  # its linears have other names
    ("capped", "prefix"),  # its attention has a soft cap
}
PAIRS = [(name, adapters) for name in CAUSAL for adapters in ADAPTERS if (name, adapters) not in CANNOT]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sixteen tokens, so that there are several and a tail."""
    monkeypatch.setattr(chunks, "CHUNK", chunks.FEWEST * VOCABULARY)


@pytest.fixture
def batch() -> Batch:
    """Three rows: an answer at the end, everything, a single token."""
    ids = torch.randint(3, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, :9] = labels[2] = IGNORED
    labels[2, 5] = 7
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _attached(model: PreTrainedModel, adapters: list[Any], noise: Callable[..., None]) -> Stack:
    model.requires_grad_(False).eval()
    stack = attach(model, adapters)
    if adapters != ["full"]:
        noise(stack.trainable())
    return stack


def _taken(total: Tensor, trainable: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    total.backward()
    found = {name: p.grad.clone() for name, p in trainable.items() if p.grad is not None}
    for parameter in trainable.values():
        parameter.grad = None
    assert found
    return found


def _assert_same(ours: Any, theirs: Any, trainable: Mapping[str, nn.Parameter], rounding: float = 1e-5) -> None:
    torch.testing.assert_close(ours.total, theirs.total, rtol=rounding, atol=0)
    assert ours.weight == theirs.weight
    ((right, tokens, nats),), ((other_right, other_tokens, other_nats),) = ours.outcomes(), theirs.outcomes()
    assert (right, tokens) == (other_right, other_tokens)
    assert nats == pytest.approx(other_nats, rel=rounding)
    one, other = _taken(ours.total, trainable), _taken(theirs.total, trainable)
    assert one.keys() == other.keys()
    largest = max(float(tensor.abs().max()) for tensor in other.values())
    for name in one:
        floor = (0.05 if name.endswith("k_proj.bias") else 0.01) * largest  # a key's bias has rounding only
        atol = rounding * max(float(other[name].abs().max()), floor)
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("name", "adapters"), PAIRS)
def test_value_and_every_gradient_are_those_of_all_logits_at_once(
    name: str, adapters: str, smoothing: float, batch: Batch, noise: Callable[..., None]
) -> None:
    stack = _attached(CAUSAL[name](), ADAPTERS[adapters], noise)
    found = find_head(stack.model, model_inputs(batch))
    assert isinstance(found, Arithmetic), found
    assert (found.cap, found.scale != 1) == (3.0 if name == "capped" else None, name in ("multiplied", "divided"))
    if "front" not in adapters:
        stack.root.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        stack.root.train()
    ours = token_objective(causal_logits(stack.model, batch, found), smoothing)
    theirs = token_objective(causal_logits(stack.model, batch), smoothing)
    _assert_same(ours, theirs, stack.trainable())


def _bert() -> PreTrainedModel:
    return BertForMaskedLM(BertConfig(**SIZES, intermediate_size=64, max_position_embeddings=64, initializer_range=0.3))


def _t5(*, tied: bool) -> PreTrainedModel:
    sizes: dict[str, Any] = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    sizes |= {"vocab_size": VOCABULARY, "tie_word_embeddings": tied, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**sizes))


def _bart() -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "init_std": 0.3,
    }
    heads: dict[str, Any] = {
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    }
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads, max_position_embeddings=64))
    model.final_logits_bias.copy_(torch.linspace(-2, 2, VOCABULARY))
    return model


OWN: dict[str, Callable[[], PreTrainedModel]] = {
    "masked tokens, a bias in the head": _bert,
    "encoder and decoder, tied and scaled": lambda: _t5(tied=True),
    "encoder and decoder": lambda: _t5(tied=False),
    "encoder and decoder, a bias behind the head": _bart,
}


@pytest.mark.parametrize("adapters", [[{"lora": {"rank": 4}}], ["full"]], ids=["lora", "full"])
@pytest.mark.parametrize("name", OWN)
def test_so_are_those_of_other_models(name: str, adapters: list[Any], batch: Batch, noise: Callable[..., None]) -> None:
    stack = _attached(OWN[name](), adapters, noise)
    whole = batch if "masked" in name else batch | {"decoder_input_ids": batch["input_ids"].flip(1)}
    found = find_head(stack.model, model_inputs(whole))
    assert isinstance(found, Arithmetic), found
    assert found.biased == ("behind" in name)
    ours, theirs = (token_objective(own_logits(stack.model, whole, way)) for way in (found, None))
    _assert_same(ours, theirs, stack.trainable())


@pytest.mark.parametrize("adapters", ["none on the head", "lora on the head"])
def test_half_precision_is_within_its_rounding(adapters: str, batch: Batch, noise: Callable[..., None]) -> None:
    stack = _attached(CAUSAL["capped"]().bfloat16(), ADAPTERS[adapters], noise)
    found = find_head(stack.model, model_inputs(batch))
    assert isinstance(found, Arithmetic), found
    ours, theirs = (token_objective(causal_logits(stack.model, batch, way)) for way in (found, None))
    torch.testing.assert_close(ours.total, theirs.total, rtol=1e-2, atol=0)
    one, other = (_taken(objective.total, stack.trainable()) for objective in (ours, theirs))
    for name in one:
        assert (one[name] - other[name]).norm() <= 0.05 * other[name].norm(), name


def test_autocast_over_a_trained_base_is_within_its_rounding(batch: Batch, noise: Callable[..., None]) -> None:
    stack = _attached(CAUSAL["tied"](), ["full"], noise)
    with torch.autocast("cpu", torch.bfloat16):
        found = find_head(stack.model, model_inputs(batch))
        assert isinstance(found, Arithmetic), found
        ours, theirs = (token_objective(causal_logits(stack.model, batch, way)) for way in (found, None))
    torch.testing.assert_close(ours.total, theirs.total, rtol=1e-2, atol=0)
    one, other = (_taken(objective.total, stack.trainable()) for objective in (ours, theirs))
    for name in one:
        assert (one[name] - other[name]).norm() <= 0.05 * other[name].norm(), name


def test_an_adapter_in_front_of_the_head_is_applied_once(batch: Batch) -> None:
    """Also one that changes nothing when the trial is made."""
    model = CAUSAL["plain"]().requires_grad_(False).eval()
    gain = nn.Parameter(torch.ones(32))
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * gain,))
    found = find_head(model, model_inputs(batch))
    assert isinstance(found, Arithmetic), found
    with torch.no_grad():
        gain.copy_(torch.linspace(0.5, 2, 32))
    ours, theirs = (token_objective(causal_logits(model, batch, way)) for way in (found, None))
    _assert_same(ours, theirs, {"gain": gain})


# --- what cannot be done in pieces ------------------------------------------------------------------------------------


class _Behind(LlamaForCausalLM):
    """Changes its logits in a way that no configuration tells of."""

    change: Callable[[Tensor], Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


def _behind(change: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    model = _Behind(LlamaConfig(**LLAMA | {"initializer_range": 0.01}))
    model.change = change
    return model


class _Beside(LlamaForCausalLM):
    """Multiplies by the weight of its head without calling it."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        output.logits = output.last_hidden_state @ self.lm_head.weight.T
        return output


class _Flat(LlamaForCausalLM):
    """Gives its head the last hidden state only."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs | {"logits_to_keep": 1})


UNKNOWN: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    # Where the logits are so small, 30 · tanh(logits / 30) is the same but for the fifth digit.
    "a cap": (lambda: _behind(lambda logits: 30 * (logits / 30).tanh()), "a way that is not known"),
    "a scale": (lambda: _behind(lambda logits: 1.001 * logits), "a way that is not known"),
    "by position": (
        lambda: _behind(lambda logits: logits + torch.arange(20.0)[None, :, None]),
        "in pieces: The size of tensor",
    ),
    "a larger table": (lambda: _behind(lambda logits: logits[..., :-1]), "are not those of its output embeddings"),
    "head not called": (lambda: _Beside(LlamaConfig(**LLAMA)), "in pieces: not enough values"),
    "one position": (lambda: _Flat(LlamaConfig(**LLAMA)), "do not see the hidden state of each token"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_named(name: str, batch: Batch) -> None:
    build, reason = UNKNOWN[name]
    found = find_head(build().train(False), model_inputs(batch))
    assert isinstance(found, str)
    assert reason in found


def test_a_model_without_output_embeddings_is_named(bert: PreTrainedModel, batch: Batch) -> None:
    assert find_head(bert, model_inputs(batch)) == "it has no output embeddings"
    assert find_head(nn.Linear(2, 2), model_inputs(batch)) == "it has no output embeddings"


def test_the_model_itself_makes_no_logits(batch: Batch, live_tensors: Callable[..., Any]) -> None:
    model = CAUSAL["capped"]().eval()
    with live_tensors(width=VOCABULARY) as live:
        hidden = before_head(model, model_inputs(batch))
    assert live.widest == 0
    assert hidden.shape == (3, 20, 32)
    head = OutputHead.of(model, Arithmetic(cap=3.0))
    torch.testing.assert_close(head(hidden), model(**model_inputs(batch)).logits)
