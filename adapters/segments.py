"""Attention over sequences that lie behind one another in one row, without padding and without seeing one another.

All that a layer does token by token runs over the row as it is. Attention alone puts each sequence (segment) into a row
of its own, lets the attention that the model had before look at them, and puts what comes out behind one another again:

    tokens            s s s a a a b b        one row, no padding: (1, tokens)
    segments          s s s                  beside one another, padded: (segments, longest)
                      s s s a a a            `a` and `b` go on from `s`, whose keys and values stand before theirs:
                      s s s b b              what many sequences begin with is computed once (a tree of any depth)

It enters through transformers' public attention registry. Keys that many segments look at get the sum of their
gradients in a fixed order, so that a run gives the same bytes again, on CUDA too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .drawn_masks import seed, share
from .frozen_linear import in_autocast
from .segment_attention import apart, attend_in_tiles, together
from .segment_layout import Segments, kept_of, tiles_of

__all__ = ["cannot_pack", "packed_attention", "segments_of"]

PACKED = {"sdpa": "onegpu_packed", "eager": "onegpu_packed_plain"}  # ours, by what the model had before
ATTENTIVE = {"full_attention", "sliding_attention"}  # as configurations call layers that see all before a token


def segments_of(lengths: Sequence[int], before: Sequence[int | None]) -> Segments:
    """Lay out segments that stand behind one another in a row.

    Args:
        lengths: tokens of each segment.
        before: the segment that each goes on from, one that stands before it; None where it begins anew.
    """
    ends = list(accumulate(lengths))
    seen: list[list[int]] = []  # tokens that each sees, its own last
    for end, n, b in zip(ends, lengths, before, strict=True):
        seen.append([*([] if b is None else seen[b]), *range(end - n, end)])
    first = [len(tokens) - n for tokens, n in zip(seen, lengths, strict=True)]  # keys in front of the segment's own
    rows, columns = max(lengths), max(map(len, seen))
    queries = [_filled(range(end - n, end), rows) for end, n in zip(ends, lengths, strict=True)]
    keys = [_filled(tokens, columns) for tokens in seen]
    readers: dict[int, list[int]] = {}
    for i, (tokens, ahead) in enumerate(zip(seen, first, strict=True)):
        for place, token in enumerate(tokens[:ahead]):
            readers.setdefault(token, []).append(i * columns + place)
    most = max(map(len, readers.values()), default=0)
    reading = [_filled(r, most, len(lengths) * columns) for r in readers.values()]
    tiles = tiles_of(lengths, first)
    return Segments(
        torch.tensor(queries),
        torch.tensor(keys),
        torch.tensor([i * rows + j for i, n in enumerate(lengths) for j in range(n)]),
        torch.tensor([i * columns + first[i] + j for i, n in enumerate(lengths) for j in range(n)]),
        torch.tensor(list(readers), dtype=torch.long),
        torch.tensor(reading) if reading else torch.zeros(0, 0, dtype=torch.long),
        torch.tensor([number for tile in tiles for number in tile]),  # no view: a compiler looks at what is viewed, too
        torch.zeros(kept_of(tiles, sum(lengths)), dtype=torch.bool),
        _seen(first, rows, columns) if any(first) else None,
    )


def _filled(items: Sequence[int], length: int, fill: int = 0) -> list[int]:
    return [*items, *[fill] * (length - len(items))]


def _seen(first: Sequence[int], rows: int, columns: int) -> Tensor:  # (segments, 1, rows, columns)
    last = torch.tensor(first)[:, None, None, None] + torch.arange(rows)[:, None]
    return torch.arange(columns) <= last


# --- in a model -------------------------------------------------------------------------------------------------------


def cannot_pack(model: nn.Module, longest: int) -> str:
    """Why a model's configuration does not let sequences lie in one row; "" where it does not say so.

    Only a trial shows that it does: see `onegpu.recipes.tasks.packing`.

    Args:
        longest: tokens of the longest sequence.
    """
    if not isinstance(model, PreTrainedModel):
        return "it is not a model of transformers"
    if not model._can_set_attn_implementation():
        return "its attention is not in the public registry"
    if model.config._attn_implementation not in PACKED:
        return f"its attention is `{model.config._attn_implementation}`"
    return _sees_less(model, longest)


def _sees_less(model: nn.Module, longest: int) -> str:
    """Why a token of this model may not see all that is before it, as its configuration says; "" where it says nothing.

    Args:
        longest: tokens of the longest sequence.
    """
    config: Any = getattr(model, "config", None)
    window = getattr(config, "sliding_window", None)
    if window is not None and window < longest:
        return f"its attention sees {window} tokens, and sequences have up to {longest}"
    if others := sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTIVE):
        return f"it has layers of another kind than attention: {', '.join(others)}"
    return ""


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Inside the block the model takes `segments=`, recomputed layers too; afterwards it has the attention it had."""
    assert isinstance(model, PreTrainedModel), type(model)
    before = model.config._attn_implementation
    if before in PACKED.values():
        yield
        return
    model.set_attn_implementation(PACKED[before])
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **kwargs: Any
) -> tuple[Tensor, None]:
    return _over_segments(_fused, module, query, key, value, **kwargs)


def _attend_plainly(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **kwargs: Any
) -> tuple[Tensor, None]:
    return _over_segments(_plain, module, query, key, value, **kwargs)


def _over_segments(
    attend: Any,
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, size)
    key: Tensor,  # (1, key-value heads, tokens, size)
    value: Tensor,
    *,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # (1, tokens, heads, size)
    if segments is None or query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError("the model does not hand on which tokens belong together")
    return attend(module, query[0], key[0], value[0], segments, **kwargs)[None], None


def _fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, s: Segments, **kwargs: Any
) -> Tensor:  # (tokens, heads, size)
    """Segments beside one another in torch's own attention."""
    none = s.shared[:0]
    found, _ = sdpa_attention_forward(
        module,
        _Apart.apply(query, s.queries, s.places, none, s.readers[:0]),  # type: ignore[no-untyped-call]
        _Apart.apply(key, s.keys, s.key_places, s.shared, s.readers),  # type: ignore[no-untyped-call]
        _Apart.apply(value, s.keys, s.key_places, s.shared, s.readers),  # type: ignore[no-untyped-call]
        s.seen,
        **kwargs,
    )  # (segments, longest, heads, size)
    return found.flatten(0, 1).index_select(0, s.places)


class _Apart(torch.autograd.Function):
    """Tokens of a row, (heads, tokens, size), as segments: (segments, heads, places, size)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, own: Tensor, shared: Tensor, readers: Tensor) -> Tensor:
        ctx.save_for_backward(index, own, shared, readers)
        return apart(x, index).transpose(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return together(grad.transpose(0, 1), *ctx.saved_tensors), None, None, None, None


def _plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    s: Segments,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Tensor:  # (tokens, heads, size)
    """softmax(Q Kᵀ · scaling) V in plain matrix products."""
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise ValueError("it changes attention scores in a way of its own")
    dropout = dropout if module.training else 0.0
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Where all of a base trains, in float32, rotated queries and keys come in that, and values in what is computed in.
    query, key, value = in_autocast(query), in_autocast(key), in_autocast(value)
    found: Tensor = attend_in_tiles(query, key, value, *s[:-1], seed(dropout), scaling, share(dropout))[0]
    return found


AttentionInterface.register(PACKED["sdpa"], _attend)
AttentionInterface.register(PACKED["eager"], _attend_plainly)
for _name in PACKED.values():
    AttentionMaskInterface.register(_name, lambda *args, **kwargs: None)  # the segments say it
