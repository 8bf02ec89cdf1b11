"""Masks that follow from a seed."""

import pytest
import torch

from onegpu.adapters.drawn_masks import kept, seed, share


@pytest.mark.parametrize("shape", [(300, 301), (7,), (0, 5), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seed_always_gives_the_same_mask(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    like, number = torch.empty(shape, dtype=dtype), torch.tensor(7)
    state = torch.get_rng_state()
    mask = kept(like, number, 2**14)
    assert torch.equal(mask, kept(like, number, 2**14))
    assert torch.equal(torch.get_rng_state(), state)
    assert mask.dtype is dtype
    assert mask.shape == shape
    assert set(mask.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("dropout", [1e-4, 0.1, 0.5, 0.999])
def test_a_mask_drops_the_share_that_was_asked_for(dropout: float) -> None:
    """Within five standard deviations, in the whole and in each row and column; neighbours know nothing of another."""
    mask = kept(torch.empty(1000, 1000), torch.tensor(3), share(dropout))
    assert abs(share(dropout) / 2**16 - dropout) <= 2**-17
    spread, dropout = (dropout * (1 - dropout)) ** 0.5, share(dropout) / 2**16
    assert abs(1 - mask.mean() - dropout) <= 5 * spread / 1000 + 1e-9
    for dim in (0, 1):
        assert (1 - mask.mean(dim) - dropout).abs().max() <= 5 * spread / 1000**0.5 + 0.01
    centred = mask - mask.mean()
    for neighbour in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(2, 1)):
        assert (centred * neighbour).mean().abs() <= 5 * spread**2 / 1000 + 1e-9


def test_without_dropout_nothing_is_drawn() -> None:
    state = torch.get_rng_state()
    assert seed(0.0) is None
    assert share(0.0) == 0
    assert torch.equal(torch.get_rng_state(), state)
