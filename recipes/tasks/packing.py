"""Sequences behind one another in one row instead of padded to one length; what many begin with stands there once.

    padded    <s> Be kind . Hi        </s>          packed    <s> Be kind .  Hi  Who are you
              <s> Be kind . Who are you </s>                  0   1  2    3  4   4   5   6      positions

Packed, a model computes no padding, and `<s> Be kind .` once: for each of its tokens it is the same in both rows, as
they see nothing but what is before them. Nor does it compute the last token that is learned, and what is behind it:
nothing that is learned follows from them. Losses and gradients are those of the padded rows up to rounding.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Self

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from onegpu.adapters.segments import cannot_pack, packed_attention, segments_of

from .chunks import CHUNK
from .contract import IGNORED, SEGMENTS, Batch, Example, attention_mask, model_inputs, padded
from .conversations import common_length
from .tokens import TokenTask

__all__ = ["PackedTask", "packed_batch", "token_batch"]

LEAST_SHARED = 8  # tokens with which sequences must begin to be worth a segment of their own
MULTIPLE = 32  # of tokens in a row
TRIED = 64  # tokens of an example that a trial takes; fewer where the logits of both sequences would be above a chunk
ROUNDING = 16  # units in the last place by which logits may differ between two ways of computing them


class PackedTask(TokenTask):
    """A task of causal models whose sequences have a label for each token."""

    packing: bool = True
    """Rows stand behind one another instead of padded, and what several begin with is computed once, where the model's
    attention allows it."""

    _packed: bool = PrivateAttr(default=False)
    _shares: bool = PrivateAttr(default=False)

    def packable(self) -> bool:
        """Whether its sequences may lie in one row: not where a token is predicted from what is behind it, too."""
        return True

    def groups(self, examples: int, shares: bool) -> Sequence[Sequence[int]]:
        """Which sequences of a batch may have a beginning in common.

        Args:
            shares: whether those of any two examples may; not where each has to have dropout of its own.
        """
        return [range(examples)] if shares else [[number] for number in range(examples)]

    @property
    def packs(self) -> bool:
        return self._packed

    def suited(self, model: nn.Module, example: Example, *, longest: int, pad: int, packing: bool) -> tuple[Self, str]:
        """Packs where this model can."""
        task, remark = super().suited(model, example, longest=longest, pad=pad, packing=packing)
        if not self.packing or not self.packable():
            return task, remark
        reason = cannot_pack(model, longest) if packing else "an adapter or a teacher would mix what is in a row"
        within = self._has_groups(shares=False)
        shares, reason = (False, reason) if reason else Trial.of(example, _tried(model)).of_model(model, pad, within)
        if reason:
            return task, _together(f"rows are padded to one length, not packed: {reason}", remark)
        what = "rows are packed" + ", and what several begin with is read once" * self._has_groups(shares)
        return task._packing(shares), _together(what, remark)

    def _has_groups(self, shares: bool) -> bool:
        """Whether anything is shared."""
        return any(len(group) > 1 for group in self.groups(2, shares))

    def _packing(self, shares: bool) -> Self:
        task = self.model_copy()
        task._packed, task._shares = True, shares
        return task

    def collate(self, examples: Sequence[Example], pad: int) -> Batch:
        return self.rows(examples, len(examples), pad)

    def rows(self, sequences: Sequence[Example], examples: int, pad: int) -> Batch:
        """The sequences of so many examples, packed or padded."""
        if not self._packed:
            return token_batch(sequences, pad)
        return packed_batch(sequences, self.groups(examples, self._shares), fill=pad)

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
    targets: Sequence[int]  # what is to be said after each
    start: int = 0  # position of its first token
    before: int | None = None  # the segment it goes on from
    sequence: int = -1  # whose rest it is; of what is shared and of filling, nobody's


def packed_batch(sequences: Sequence[Example], groups: Sequence[Sequence[int]], *, fill: int | None = None) -> Batch:
    """Sequences with a label for each token, and none at their first one, in one row.

    Args:
        groups: the numbers of those that share what they begin with, so that it stands there once.
        fill: a token that fills the row up to a multiple of 32, as a sequence of its own. Products of a size that a
            processor's library has not met yet take it a millisecond to prepare, and memory to remember.

    Returns:
        `input_ids`, `position_ids`, `targets` (what is to be said after each token) and `sequences` (the number of its
        own): (1, tokens); `supervised`: (sequences,) tokens; and where segments are: `onegpu.adapters.segments`.
    """
    parts = _parts(sequences, groups)
    if fill is not None and (short := -sum(len(part.ids) for part in parts) % MULTIPLE):
        parts.append(Part([fill] * short, [IGNORED] * short))
    parts = _by_length(parts)
    places = segments_of([len(part.ids) for part in parts], [part.before for part in parts])._asdict()
    return {
        "input_ids": torch.tensor([[token for part in parts for token in part.ids]]),
        "position_ids": torch.tensor([[part.start + i for part in parts for i in range(len(part.ids))]]),
        "targets": torch.tensor([[target for part in parts for target in part.targets]]),
        "sequences": torch.tensor([[part.sequence for part in parts for _ in part.ids]]),
        "supervised": torch.tensor([sequence.supervised for sequence in sequences]),
    } | {SEGMENTS[name]: tensor for name, tensor in places.items() if tensor is not None}


def _parts(sequences: Sequence[Example], groups: Sequence[Sequence[int]]) -> list[Part]:
    """Beginnings that several share, then what goes on from them: a tree, level by level."""
    parts: list[Part] = []
    waiting: deque[tuple[Sequence[int], int, int | None]] = deque((group, 0, None) for group in groups)
    while waiting:
        group, start, before = waiting.popleft()
        for alike in _alike(sequences, group, start):
            sharing = [number for number in alike if _shareable(sequences[number]) - start >= LEAST_SHARED]
            if len(sharing) > 1:
                ids, end = sequences[sharing[0]].ids, _shared_end([sequences[number] for number in sharing])
                waiting.append((sharing, end, len(parts)))
                parts.append(Part(ids[start:end], [IGNORED] * (end - start), start, before))
            for number in alike:
                if number not in sharing or len(sharing) == 1:
                    parts.append(_rest(sequences[number], start)._replace(before=before, sequence=number))
    return parts


def _rest(sequence: Example, start: int) -> Part:
    """What of a sequence goes on from a token, up to the last one after which something is to be said."""
    labels = sequence.labels
    end = max((i for i, label in enumerate(labels) if label != IGNORED), default=0) or len(labels)
    return Part(sequence.ids[start:end], [*labels[start + 1 : end + 1], IGNORED][: end - start], start)


def _by_length(parts: Sequence[Part]) -> list[Part]:
    """Beginnings first; then parts that see about as many tokens beside one another: attention needs little padding."""
    begun = {part.before for part in parts}

    def place(number: int) -> tuple[bool, int, int]:
        tokens = len(parts[number].ids)
        return number not in begun, parts[number].start + tokens, tokens

    order = sorted(range(len(parts)), key=place)
    places = {number: place for place, number in enumerate(order)}
    before = [None if part.before is None else places[part.before] for part in parts]
    return [parts[number]._replace(before=before[number]) for number in order]


def _alike(sequences: Sequence[Example], numbers: Sequence[int], start: int) -> Iterable[list[int]]:
    """Those of some sequences that go on in the same way."""
    found: dict[tuple[int, ...], list[int]] = {}
    for number in numbers:
        found.setdefault(tuple(sequences[number].ids[start : start + LEAST_SHARED]), []).append(number)
    return found.values()


def _shared_end(group: Sequence[Example]) -> int:
    """Tokens with which all of several sequences begin, as far as these can be shared."""
    common = min(common_length(group[0].ids, other.ids) for other in group[1:])
    return min(common, *map(_shareable, group))


def _shareable(sequence: Example) -> int:
    """Its first tokens that others may begin with, too.

    None of them is supervised, nor the token after them: its prediction comes from the last one.
    """
    return next((i for i, label in enumerate(sequence.labels) if label != IGNORED), len(sequence.labels)) - 1


# --- where it is possible ---------------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """Two sequences that begin alike, to try on a model."""

    first: Example
    other: Example

    @classmethod
    def of(cls, example: Example, tokens: int) -> Self:
        # A short example is repeated, so that there is a beginning to share.
        ids = (list(example.ids) * -(-2 * LEAST_SHARED // len(example.ids)))[:tokens]
        half = len(ids) // 2
        return cls(_unlabelled(ids), _unlabelled([*ids[:half], *reversed(ids[half:]), *ids[:1]]))

    def of_model(self, model: nn.Module, pad: int, within: bool) -> tuple[bool, str]:
        """Whether what any two examples begin with can be shared, and why this model cannot pack at all; "" if it can.

        No sequence may change another's logits by a bit, and both must have those that they have alone up to rounding.
        Dropout and its kin draw for each token: there each example has to have its own.

        Args:
            within: the sequences of one example share what they begin with in any case.
        """
        try:
            with torch.no_grad():
                alone = self._alone(model, pad)
                shares = not self._draws(model, pad, alone)
                return shares, self._fault(model, alone, shares or within)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as cause:
            return False, f"it does not take such a row: {str(cause).splitlines()[0]}"

    def _alone(self, model: nn.Module, pad: int) -> Tensor:  # (2, longest, vocabulary)
        return _logits(model, token_batch(self, pad))

    def _draws(self, model: nn.Module, pad: int, alone: Tensor) -> bool:
        """Whether training draws at random, which shows in the logits or, while an adapter adds nothing, only in this:
        the next number drawn is another one.
        """
        device = alone.device
        with torch.random.fork_rng():
            model.train()
            try:
                torch.manual_seed(0)
                training = self._alone(model, pad)
                behind = torch.rand(1), torch.rand(1, device=device)
                torch.manual_seed(0)
                return not torch.equal(alone, training) or behind != (torch.rand(1), torch.rand(1, device=device))
            finally:
                model.eval()

    def _fault(self, model: nn.Module, alone: Tensor, shares: bool) -> str:
        together = self._together(model, shares)
        rounding = max(1e-4, ROUNDING * torch.finfo(alone.dtype).eps)
        for mine, expected in zip(together, alone, strict=True):
            expected = expected[: len(mine)]  # behind it is padding
            if (mine - expected).abs().max() > rounding * expected.abs().max():
                return "the logits are not those of sequences by themselves"
        other = self._replace(first=_changed(self.first))._together(model, shares)[1]
        first = self._replace(other=_changed(self.other))._together(model, shares)[0]
        apart = torch.equal(first, together[0]) and torch.equal(other, together[1])
        return "" if apart else "one sequence sees another"

    def _together(self, model: nn.Module, shares: bool) -> tuple[Tensor, Tensor]:
        """The logits of both in one row, as if each stood alone: (tokens, vocabulary) each."""
        found = _logits(model, packed_batch(self, [[0, 1]] if shares else [[0], [1]]))[0]
        length = _shared_end(self) if shares else 0
        length = length if length >= LEAST_SHARED else 0
        size = self.first.size
        return found[:size], torch.cat([found[:length], found[size:]])


def _tried(model: nn.Module) -> int:
    """How many tokens a trial on this model takes; enough to have a beginning that can be shared."""
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", None) or 1)
    return max(2 * LEAST_SHARED, min(TRIED, CHUNK // (2 * vocabulary)))


def _unlabelled(ids: Sequence[int]) -> Example:
    return Example(0, list(ids), [IGNORED] * len(ids))


def _changed(example: Example) -> Example:
    """Another token at its end."""
    last = next(token for token in example.ids if token != example.ids[-1]) if len(set(example.ids)) > 1 else 0
    return _unlabelled([*example.ids[:-1], last])


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """(rows, tokens, vocabulary)."""
    device = next(model.parameters()).device
    inputs = model_inputs({name: tensor.to(device) for name, tensor in batch.items()}) | {"use_cache": False}
    attention: Callable[[nn.Module], AbstractContextManager[None]]
    attention = packed_attention if "segments" in inputs else lambda _: nullcontext()
    with attention(model):
        found: Tensor = model(**inputs).logits
    return found
