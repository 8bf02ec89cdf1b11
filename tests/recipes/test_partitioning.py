"""What a compiled layer keeps: nothing that element-wise kernels find again, and the same gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn import functional as F

from onegpu.recipes.partitioning import Partitioner

TOKENS, SIZE, INNER, RANK = 24, 32, 64, 2


def _layer(x: Tensor, gate: Tensor, up: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A norm, and a gated linear whose inputs a backward pass needs for the gradients of A and B."""
    normed = F.rms_norm(x, (SIZE,))
    return (F.silu(normed @ gate) * (normed @ up + normed @ a)) @ b


def _ran(partition: Callable[..., Any]) -> tuple[list[Tensor], list[int]]:
    """Output and gradients, and how many numbers each tensor has that is kept beside the inputs."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, SIZE), (SIZE, INNER), (SIZE, INNER), (SIZE, INNER), (INNER, RANK)]
    x, gate, up, a, b = (torch.randn(shape, generator=generator) for shape in shapes)
    learned = [tensor.requires_grad_() for tensor in (x, a, b)]
    given = {tensor.data_ptr() for tensor in (x, gate, up, a, b)}
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.extend([tensor.numel()] * (tensor.data_ptr() not in given))
        return tensor

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), partition_fn=partition)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = torch.compile(_layer, backend=backend)(x, gate, up, a, b)
    return [y, *torch.autograd.grad(y.square().sum(), learned)], kept


@pytest.fixture
def usual() -> Callable[..., Any]:
    """Torch's own division."""
    return lambda graph, inputs, **more: min_cut_rematerialization_partition(graph, inputs, **more)


def test_what_is_found_again_without_a_product_is_not_kept(usual: Callable[..., Any]) -> None:
    expected, before = _ran(usual)
    found, kept = _ran(Partitioner())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    # The two products that go into the gate, and not what comes out of it; the statistics of the norm, not its output.
    assert sorted(kept) == [TOKENS, TOKENS * INNER, TOKENS * INNER]
    assert sorted(before) == [TOKENS, TOKENS * SIZE, *[TOKENS * INNER] * 3]


def test_the_compilers_cache_tells_it_from_others() -> None:
    assert Partitioner().uuid() == Partitioner().uuid() is not None
