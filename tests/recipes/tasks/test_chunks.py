"""Losses in chunks are those of all logits at once, in value and gradient, and take the memory of one chunk."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onegpu.recipes.tasks.chunks import FEWEST, CrossEntropy, Divergence, over_chunks

WIDTH, VOCABULARY = 24, 50
CHUNK = FEWEST * VOCABULARY  # of sixteen tokens
COUNTS = [0, 1, FEWEST, FEWEST + 1, 3 * FEWEST - 2]  # none, one, a whole chunk, a tail of one, a longer tail


def _head(*, trains: bool, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias).requires_grad_(trains)
    return head.to(dtype)


def _hidden(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(2)
    return (2 * torch.randn(count, WIDTH)).to(dtype).requires_grad_()


def _gradients(losses: Tensor, hidden: Tensor, head: nn.Module) -> list[Tensor]:
    """Of losses that count unlike, as those of preferences do."""
    weights = torch.linspace(-1, 2, max(1, len(losses)))[: len(losses)]
    wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    return list(torch.autograd.grad((losses * weights).sum(), wanted))


def _near(ours: Tensor, theirs: Tensor, rounding: float = 1e-5) -> None:
    assert ours.dtype == theirs.dtype
    largest = float(theirs.abs().max()) if len(theirs) else 0.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding * max(largest, 1e-3))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("count", COUNTS)
def test_cross_entropy_is_that_of_all_logits(count: int, trains: bool, smoothing: float) -> None:
    head, hidden = _head(trains=trains), _hidden(count)
    targets = torch.arange(count) % VOCABULARY
    found = over_chunks(head, hidden, CrossEntropy(targets, smoothing), chunk=CHUNK)
    logits = head(hidden)
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    _near(found[:, 0], losses)
    _near(found[:, 1].detach(), F.cross_entropy(logits, targets, reduction="none").detach())
    assert found[:, 2].tolist() == (logits.argmax(-1) == targets).tolist()
    for ours, theirs in zip(_gradients(found[:, 0], hidden, head), _gradients(losses, hidden, head), strict=True):
        _near(ours, theirs)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("columns", [VOCABULARY - 3, VOCABULARY, VOCABULARY + 3])
def test_divergence_is_that_of_all_logits(columns: int, trains: bool) -> None:
    head, hidden = _head(trains=trains), _hidden(COUNTS[-1])
    teacher = 3 * torch.randn(len(hidden), columns)
    found = over_chunks(head, hidden, Divergence(teacher, 1.7), chunk=CHUNK)[:, 0]
    shared = min(columns, VOCABULARY)
    theirs, ours = (t[:, :shared].div(1.7).log_softmax(-1) for t in (teacher, head(hidden)))
    losses = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    _near(found, losses)
    for one, other in zip(_gradients(found, hidden, head), _gradients(losses, hidden, head), strict=True):
        _near(one, other)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_rounding(dtype: torch.dtype, trains: bool) -> None:
    head, hidden = _head(trains=trains, dtype=dtype), _hidden(COUNTS[-1], dtype)
    targets = torch.arange(len(hidden)) % VOCABULARY
    found = over_chunks(head, hidden, CrossEntropy(targets), chunk=CHUNK)
    losses = F.cross_entropy(head(hidden).float(), targets, reduction="none")
    _near(found[:, 0], losses, 1e-5)
    for ours, theirs in zip(_gradients(found[:, 0], hidden, head), _gradients(losses, hidden, head), strict=True):
        _near(ours.float(), theirs.float(), 4 * torch.finfo(dtype).eps)


def test_what_a_scaler_enlarges_is_not_lost_in_half_precision() -> None:
    """A gradient that float16 has no number for, until it is multiplied."""
    head, hidden = _head(trains=False, dtype=torch.float16, bias=False), _hidden(4, torch.float16)
    with torch.no_grad():
        head.weight[1:] *= 1e-4  # nothing but token 0 has a direction ...
    hidden = (hidden.detach().float() / hidden.detach().float().norm() * 0.1).half().requires_grad_()
    with torch.no_grad():
        head.weight[0] *= 1e-3
    targets = torch.ones(4, dtype=torch.long)
    scale = 2.0**14

    def gradient(losses: Tensor) -> Tensor:
        found: Tensor = torch.autograd.grad(losses.sum() * scale, hidden)[0]
        return found.float()

    ours = gradient(over_chunks(head, hidden, CrossEntropy(targets))[:, 0])
    theirs = gradient(F.cross_entropy(head(hidden).float(), targets, reduction="none"))
    assert theirs.abs().max() > 0
    _near(ours, theirs, 4 * torch.finfo(torch.float16).eps)


def test_nothing_is_kept_for_a_gradient_that_nobody_wants() -> None:
    hidden, targets = _hidden(20).detach(), torch.zeros(20, dtype=torch.long)
    assert not over_chunks(_head(trains=False), hidden, CrossEntropy(targets)).requires_grad
    with torch.no_grad():
        found = over_chunks(_head(trains=True), _hidden(20), CrossEntropy(targets))
    assert not found.requires_grad


def test_an_adapter_that_hangs_on_a_hook_of_the_head_is_trained() -> None:
    """Its tensors are not among the head's parameters."""
    head, hidden = _head(trains=False), _hidden(20)
    gain = nn.Parameter(torch.linspace(0.5, 1.5, VOCABULARY))
    head.register_forward_hook(lambda module, args, output: output * gain)
    targets = torch.arange(20)
    found = over_chunks(head, hidden, CrossEntropy(targets), chunk=CHUNK)[:, 0]
    losses = F.cross_entropy(head(hidden), targets, reduction="none")
    for one, other in zip(
        torch.autograd.grad(found.sum(), [hidden, gain]),
        torch.autograd.grad(losses.sum(), [hidden, gain]),
        strict=True,
    ):
        _near(one, other)


@pytest.mark.parametrize("mode", ["frozen", "trained", "evaluation"])
@pytest.mark.parametrize("name", ["cross-entropy", "divergence"])
def test_nothing_is_larger_than_a_chunk(name: str, mode: str, live_tensors: Callable[..., Any]) -> None:
    head, hidden = _head(trains=mode == "trained"), _hidden(100)
    measure = (
        CrossEntropy(torch.arange(100) % VOCABULARY, 0.1)
        if name == "cross-entropy"
        else Divergence(torch.randn(100, VOCABULARY), 2.0)
    )
    with live_tensors(width=VOCABULARY) as live, torch.set_grad_enabled(mode != "evaluation"):
        found = over_chunks(head, hidden, measure, chunk=CHUNK)[:, 0].sum()
        if mode != "evaluation":
            found.backward()
    assert live.widest == CHUNK
    with live_tensors(width=VOCABULARY) as live:
        head(hidden)
    assert live.widest == 100 * VOCABULARY


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_memory_does_not_grow_with_the_vocabulary(train: bool, live_tensors: Callable[..., Any]) -> None:
    peaks, dense = [], []
    for vocabulary in (4096, 8192, 16384, 32768, 65536):
        head, hidden = nn.Linear(WIDTH, vocabulary, bias=False).requires_grad_(False), _hidden(512)
        targets = torch.arange(512)

        def peak(losses: Callable[[], Tensor], width: int = vocabulary) -> int:
            with live_tensors(width=width) as live, torch.set_grad_enabled(train):
                total = losses().sum()
                if train:
                    total.backward()
            return int(live.peak)

        peaks.append(peak(lambda: over_chunks(head, hidden, CrossEntropy(targets), chunk=2**20)[:, 0]))  # noqa: B023
        dense.append(peak(lambda: F.cross_entropy(head(hidden), targets)))  # noqa: B023
    assert max(peaks) <= 1.1 * min(peaks)
    assert dense[-1] > 10 * dense[0] > 0
    assert max(peaks) < 4 * 2**20 * 4 < dense[-1] / 10
