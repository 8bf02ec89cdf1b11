"""Losses over a vocabulary, a chunk of tokens at a time: logits of all tokens never exist.

Shapes: hidden: (tokens, hidden), logits: (rows, vocabulary) of a chunk, values: (tokens, columns).

A *measure* looks at the logits of a chunk and gives a loss for each row, in the first column, beside plain numbers for
evaluations in the others. It writes the gradient of each loss over the logits, so that one buffer does for both.

Where the output embeddings are frozen, the gradient over the hidden states is computed with the loss, while the logits
are there: (tokens, hidden) is kept, and multiplied by what comes in. Where they train, the chunk is computed again in
the backward pass (torch's checkpoint), and autograd finds their gradients.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

__all__ = ["CHUNK", "CrossEntropy", "Divergence", "Measure", "over_chunks"]

CHUNK = 2**24  # logits of a chunk: 64 MiB in float32
FEWEST = 16  # tokens of a chunk, however large the vocabulary is

Head = Callable[[Tensor], Tensor]  # (rows, hidden) -> (rows, vocabulary)


class Measure(Protocol):
    """What is found of the logits of a chunk."""

    def __call__(self, logits: Tensor, rows: slice, *, gradient: bool) -> Tensor:
        """(rows, columns): losses, then plain numbers. Overwrites the logits, with d loss / d logits if `gradient`.

        Args:
            logits: float32.
            rows: which tokens they are of.
        """


class CrossEntropy:
    """The loss of each token; then its cross-entropy without smoothing in nats, and 1 where it has the largest logit.

    With smoothing ε, ε of the target is spread over the vocabulary: (1 - ε) · -log p(target) + ε · mean(-log p).
    """

    def __init__(self, targets: Tensor, smoothing: float = 0.0) -> None:
        self.targets, self.smoothing = targets, smoothing

    def __call__(self, logits: Tensor, rows: slice, *, gradient: bool) -> Tensor:
        targets, share = self.targets[rows, None], self.smoothing
        largest, best = logits.max(-1, keepdim=True)
        logits -= largest
        right = logits.gather(-1, targets)
        mean = logits.mean(-1, keepdim=True) if share else right
        total = logits.exp_().sum(-1, keepdim=True)
        nats = total.log() - right
        losses = nats + share * (right - mean) if share else nats
        if gradient:
            logits /= total
            if share:
                logits -= share / logits.shape[-1]
            logits.scatter_add_(-1, targets, torch.full_like(right, share - 1))
        return torch.cat([losses, nats, (best == targets).to(nats)], -1)


class Divergence:
    """KL(teacher ∥ student) of each token at a temperature; columns behind the shorter table are left out."""

    def __init__(self, teacher: Tensor, temperature: float) -> None:
        self.teacher, self.temperature = teacher, temperature  # teacher: (tokens, its vocabulary)

    def __call__(self, logits: Tensor, rows: slice, *, gradient: bool) -> Tensor:
        shared = min(self.teacher.shape[-1], logits.shape[-1])
        theirs = (self.teacher[rows, :shared].float() / self.temperature).log_softmax(-1)
        ours = (logits[:, :shared] / self.temperature).log_softmax(-1)
        said = theirs.exp()
        apart: Tensor = torch.linalg.vecdot(said, theirs.sub_(ours))[:, None]
        if gradient:
            logits[:, shared:] = 0
            torch.sub(ours.exp_(), said, out=logits[:, :shared]).div_(self.temperature)
        return apart


def over_chunks(head: Head, hidden: Tensor, measure: Measure, *, chunk: int | None = None) -> Tensor:
    """Values of all tokens: (tokens, columns) float32, of which the first has a gradient.

    Args:
        chunk: how many logits may be there at once; CHUNK when left out.
    """
    none = head(hidden[:0].detach())  # (0, vocabulary): no work, and all there is to know of the logits
    step = max(FEWEST, (chunk or CHUNK) // max(1, none.shape[-1]))
    pieces = [slice(start, start + step) for start in range(0, max(1, len(hidden)), step)]
    if not torch.is_grad_enabled() or not (hidden.requires_grad or none.requires_grad):
        return torch.cat([measure(head(hidden[rows]).float(), rows, gradient=False) for rows in pieces])
    # Half precision has too few small numbers for a gradient that no scaler has enlarged yet.
    if none.requires_grad or none.dtype == torch.float16:
        again = partial(checkpoint, partial(_measured, head, measure), use_reentrant=False)
        return torch.cat([again(hidden[rows], rows) for rows in pieces])
    gradient = torch.empty_like(hidden)
    values = torch.cat(list(_ready(head, hidden.detach(), measure, pieces, gradient)))
    found: Tensor = _Ready.apply(hidden, values, gradient)  # type: ignore[no-untyped-call]
    return found


def _own(logits: Tensor) -> Tensor:
    """Logits in float32 that may be written to."""
    return logits.detach().to(torch.float32, copy=True)


def _ready(head: Head, hidden: Tensor, measure: Measure, pieces: list[slice], gradient: Tensor) -> Iterator[Tensor]:
    """Values of each piece, while its part of the gradient is written."""
    for rows in pieces:
        part = hidden[rows].requires_grad_()
        logits = head(part)
        over = _own(logits)
        yield measure(over, rows, gradient=True)
        with torch.autocast(hidden.device.type, enabled=False):
            (gradient[rows],) = torch.autograd.grad(logits, part, over.to(logits.dtype))


def _measured(head: Head, measure: Measure, hidden: Tensor, rows: slice) -> Tensor:
    found: Tensor = _Measured.apply(head(hidden), measure, rows)  # type: ignore[no-untyped-call]
    return found


class _Ready(torch.autograd.Function):
    """Values whose gradient over the hidden states was computed with them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (incoming[:, :1] * gradient).to(gradient.dtype), None, None


class _Measured(torch.autograd.Function):
    """Values of one chunk, whose gradient over the logits was computed with them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, measure: Measure, rows: slice) -> Tensor:
        gradient = _own(logits)
        values = measure(gradient, rows, gradient=True)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (incoming[:, :1] * gradient).to(ctx.dtype), None, None
