from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from onegpu.adapters import attach
from onegpu.adapters.low_rank import matrix
from onegpu.adapters.olora import OLoRA
from onegpu.adapters.structure import modules
from onegpu.adapters.weight_start import AnchoredLinear


def test_b_starts_with_orthonormal_columns_that_span_the_first_of_the_weight(
    fresh: Callable[..., PreTrainedModel],
) -> None:
    model = fresh("gpt2")
    attach(model, [{"olora": {"rank": 4}}])
    layers = [m for _, m in modules(model) if isinstance(m, AnchoredLinear)]
    assert len(layers) == 8
    for layer in layers:
        torch.testing.assert_close(layer.start_B.T @ layer.start_B, torch.eye(4), atol=1e-5, rtol=0)
        # R is triangular: the first columns of W are made of the first columns of Q alone.
        torch.testing.assert_close((layer.start_B @ layer.start_A)[:, :4], matrix(layer)[:, :4], atol=1e-5, rtol=0)


def test_at_full_rank_the_factors_are_the_weight() -> None:
    w = torch.randn(9, 6)
    a, b = OLoRA(rank=6).factors(w, torch.Generator())
    torch.testing.assert_close(b @ a, w, atol=1e-5, rtol=0)
