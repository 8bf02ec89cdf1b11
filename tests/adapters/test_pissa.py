from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from onegpu.adapters import RecipeError, attach, build
from onegpu.adapters.low_rank import matrix
from onegpu.adapters.pissa import PiSSA
from onegpu.adapters.structure import modules
from onegpu.adapters.weight_start import AnchoredLinear

Fresh = Callable[..., PreTrainedModel]


def test_the_start_is_the_best_fit_of_its_rank_to_the_weight(fresh: Fresh) -> None:
    """Eckart-Young: what is left of W has exactly the singular values beyond the rank."""
    model = fresh("gpt2")
    attach(model, [{"pissa": {"rank": 4, "alpha": 6.0}}])
    layers = [m for _, m in modules(model) if isinstance(m, AnchoredLinear)]
    assert len(layers) == 8
    for layer in layers:
        w = matrix(layer)
        left = torch.linalg.matrix_norm(w - 6.0 / 4 * layer.start_B @ layer.start_A)
        torch.testing.assert_close(left, torch.linalg.svdvals(w)[4:].norm(), atol=1e-5, rtol=1e-5)


def test_a_and_b_share_the_singular_values_equally(fresh: Fresh) -> None:
    w = torch.randn(12, 8)
    a, b = PiSSA(rank=3, alpha=6.0).factors(w, torch.Generator())
    s = torch.linalg.svdvals(w)[:3] / 2.0
    torch.testing.assert_close(a @ a.T, torch.diag(s), atol=1e-5, rtol=0)
    torch.testing.assert_close(b.T @ b, torch.diag(s), atol=1e-5, rtol=0)


def test_the_randomised_decomposition_is_near_the_exact_one_and_seeded() -> None:
    w = torch.randn(40, 6) @ torch.randn(6, 30) + 0.01 * torch.randn(40, 30)
    exact, fast = PiSSA(rank=6), PiSSA(rank=6, iterations=4)

    def start(adapter: PiSSA, seed: int) -> torch.Tensor:
        a, b = adapter.factors(w, torch.Generator().manual_seed(seed))
        return adapter.scale * b @ a

    state = torch.get_rng_state()
    torch.testing.assert_close(start(fast, 0), start(exact, 0), atol=0.01, rtol=0)
    assert torch.equal(start(fast, 0), start(fast, 0))
    assert not torch.equal(start(fast, 0), start(fast, 1))
    assert torch.equal(torch.get_rng_state(), state)


def test_fewer_than_one_iteration_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"adapters\[0\]\.pissa\.iterations: "):
        build([{"pissa": {"iterations": 0}}])
