"""Tiny causal models whose rows can be packed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LLAMA = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}
NO_DROPOUT: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA),
    "tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "head_dim": LlamaConfig(**LLAMA, head_dim=16),
    "qwen3": Qwen3Config(**LLAMA, head_dim=8),
    "gemma": GemmaConfig(**LLAMA, head_dim=8),
    "neox": GPTNeoXConfig(**SIZES, intermediate_size=64),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, **NO_DROPOUT),
}


@pytest.fixture(params=CONFIGS)
def architecture(request: pytest.FixtureRequest) -> PreTrainedConfig:
    """Each architecture that is packed."""
    return CONFIGS[request.param]


@pytest.fixture
def causal_model() -> Callable[..., PreTrainedModel]:
    """`causal_model(attention="eager")`: the Llama of these sizes, or the model of a configuration; always the same."""

    def build(config: PreTrainedConfig = CONFIGS["llama"], attention: str = "sdpa") -> PreTrainedModel:
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        return model

    return build
