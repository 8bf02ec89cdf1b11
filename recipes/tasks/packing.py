"""Sequences behind one another in one row instead of padded to one length; what many begin with stands there once.

    padded    <s> Be kind . Hi        </s>          packed    <s> Be kind .  Hi </s>  Who are you </s>
              <s> Be kind . Who are you </s>                  0   1  2    3  4  5     4   5   6   7      positions

Packed, a model computes no padding, and `<s> Be kind .` once: for each of its tokens it is the same in both rows, as
they see nothing but what is before them. Losses and gradients are those of the padded rows up to rounding.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Self

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from onegpu.adapters.segments import cannot_pack, packed_attention, segments_of

from .contract import IGNORED, SEGMENTS, Batch, Example, attention_mask, model_inputs, padded
from .conversations import common_length
from .tokens import TokenTask

__all__ = ["PackedTask", "packed_batch", "token_batch"]

LEAST_SHARED = 8  # tokens with which sequences must begin to be worth a segment of their own
TRIED = 64  # tokens of an example that a trial takes
ROUNDING = 16  # units in the last place by which logits may differ between two ways of computing them


class PackedTask(TokenTask):
    """A task of causal models whose examples have a label for each token."""

    packing: bool = True
    """Rows stand behind one another instead of padded, and what several begin with is computed once, where the model's
    attention allows it."""

    _packed: bool = PrivateAttr(default=False)
    _shares: bool = PrivateAttr(default=False)

    def causal(self) -> bool:
        """Whether a token's label is predicted from what is before it; other sequences cannot be packed."""
        return True

    @property
    def packs(self) -> bool:
        return self._packed

    def suited(self, model: nn.Module, example: Example, *, longest: int, pad: int, packing: bool) -> tuple[Self, str]:
        """Packs where this model can."""
        task, remark = super().suited(model, example, longest=longest, pad=pad, packing=packing)
        if not self.packing or not self.causal():
            return task, remark
        reason = cannot_pack(model, longest) if packing else "an adapter or a teacher would mix what is in a row"
        reason = reason or _tried(model, example, pad)
        if reason:
            return task, _together(f"rows are padded to one length, not packed: {reason}", remark)
        shares = not _draws(model, example, pad)
        what = "rows are packed" + ", and what several begin with is read once" * shares
        return task._packing(shares), _together(what, remark)

    def _packing(self, shares: bool) -> Self:
        task = self.model_copy()
        task._packed, task._shares = True, shares
        return task

    def collate(self, examples: Sequence[Example], pad: int) -> Batch:
        return packed_batch(examples, shares=self._shares) if self._packed else token_batch(examples, pad)

    def at_work(self, model: nn.Module) -> AbstractContextManager[None]:
        return packed_attention(model) if self._packed else nullcontext()


def _together(*remarks: str) -> str:
    return "; ".join(remark for remark in remarks if remark)


def token_batch(examples: Sequence[Example], pad: int) -> Batch:
    """Examples with a label for each token, padded on the right: (batch, longest) each."""
    return {
        "input_ids": padded([e.ids for e in examples], pad),
        "attention_mask": attention_mask(examples),
        "labels": padded([e.labels for e in examples], IGNORED),
    }


# --- the row ----------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """What stands in one segment."""

    ids: Sequence[int]
    labels: Sequence[int]
    start: int = 0  # position of its first token
    before: int | None = None  # the segment it goes on from


def packed_batch(examples: Sequence[Example], *, shares: bool) -> Batch:
    """Examples with a label for each token, and none at their first one, in one row.

    Returns:
        `input_ids`, `position_ids`, `labels`: (1, tokens); and where segments are: `onegpu.adapters.segments`.
    """
    parts = _parts(examples) if shares else [Part(e.ids, e.labels) for e in examples]
    places = segments_of([len(part.ids) for part in parts], [part.before for part in parts])._asdict()
    return {
        "input_ids": torch.tensor([[token for part in parts for token in part.ids]]),
        "position_ids": torch.tensor([[part.start + i for part in parts for i in range(len(part.ids))]]),
        "labels": torch.tensor([[label for part in parts for label in part.labels]]),
    } | {SEGMENTS[name]: tensor for name, tensor in places.items() if tensor is not None}


def _parts(examples: Sequence[Example]) -> list[Part]:
    """Each beginning that several examples share, behind it what is left of each; examples without one as they are."""
    groups: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        groups.setdefault(tuple(example.ids[:LEAST_SHARED]), []).append(example)
    parts: list[Part] = []
    for group in groups.values():
        length = _shared_length(group)
        if length < LEAST_SHARED:
            parts += [Part(e.ids, e.labels) for e in group]
            continue
        root = len(parts)
        parts.append(Part(group[0].ids[:length], [IGNORED] * length))
        parts += [Part(e.ids[length:], e.labels[length:], length, root) for e in group]
    return parts


def _shared_length(group: Sequence[Example]) -> int:
    """Tokens with which all of several examples begin.

    Nothing that is shared is supervised, nor the token after it: its prediction comes from a token that is shared.
    """
    if len(group) < 2:
        return 0
    first = group[0]
    common = min(common_length(first.ids, other.ids) for other in group[1:])
    return min(common, *(_first_supervised(example) - 1 for example in group))


def _first_supervised(example: Example) -> int:
    return next((i for i, label in enumerate(example.labels) if label != IGNORED), len(example.labels))


# --- where it is possible ---------------------------------------------------------------------------------------------


def _tried(model: nn.Module, example: Example, pad: int) -> str:
    """Why this model cannot have several sequences in a row; "" where it can.

    A trial decides: no sequence changes another's logits by a bit, and both have those that they have alone up to
    rounding, in rows that begin alike and in rows that do not.
    """
    ids = list(example.ids[:TRIED])
    half = len(ids) // 2
    first, other = _unlabelled(ids), _unlabelled([*ids[:half], *reversed(ids[half:]), *ids[:1]])
    try:
        with torch.no_grad():
            return _compared(model, first, other, pad)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as cause:
        return f"it does not take such a row: {str(cause).splitlines()[0]}"


def _compared(model: nn.Module, first: Example, other: Example, pad: int) -> str:
    alone = [_logits(model, token_batch([example], pad))[0] for example in (first, other)]
    rounding = max(1e-4, ROUNDING * torch.finfo(alone[0].dtype).eps)
    for shares in (False, True):
        found = _of_two(model, first, other, shares)
        for mine, expected in zip(found, alone, strict=True):
            if (mine - expected).abs().max() > rounding * expected.abs().max():
                return "the logits are not those of sequences by themselves"
        beside = _of_two(model, _changed(first), other, shares)[1], _of_two(model, first, _changed(other), shares)[0]
        if not (torch.equal(beside[0], found[1]) and torch.equal(beside[1], found[0])):
            return "one sequence sees another"
    return ""


def _of_two(model: nn.Module, first: Example, other: Example, shares: bool) -> tuple[Tensor, Tensor]:
    """The logits of two sequences in one row, as if each stood alone: (tokens, vocabulary) each."""
    together = _logits(model, packed_batch([first, other], shares=shares))[0]
    shared = _shared_length([first, other]) if shares else 0
    shared = shared if shared >= LEAST_SHARED else 0
    return together[: first.size], torch.cat([together[:shared], together[first.size :]])


def _unlabelled(ids: Sequence[int]) -> Example:
    return Example(0, list(ids), [IGNORED] * len(ids))


def _changed(example: Example) -> Example:
    """Another token at its end."""
    last = next(token for token in example.ids if token != example.ids[-1]) if len(set(example.ids)) > 1 else 0
    return _unlabelled([*example.ids[:-1], last])


def _draws(model: nn.Module, example: Example, pad: int) -> bool:
    """Whether training draws something at random, such as dropout: then each sequence has to have its own."""
    batch = token_batch([_unlabelled(example.ids[:TRIED])], pad)
    with torch.no_grad(), torch.random.fork_rng():
        model.train()
        try:
            first, second = _logits(model, batch), _logits(model, batch)
        finally:
            model.eval()
    return not torch.equal(first, second)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """(rows, tokens, vocabulary)."""
    device = next(model.parameters()).device
    inputs = model_inputs({name: tensor.to(device) for name, tensor in batch.items()}) | {"use_cache": False}
    attention: Callable[[nn.Module], AbstractContextManager[None]]
    attention = packed_attention if "segments" in inputs else lambda _: nullcontext()
    with attention(model):
        found: Tensor = model(**inputs).logits
    return found
