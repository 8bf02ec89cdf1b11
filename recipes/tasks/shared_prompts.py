"""A prompt and both of its completions in one row, so that a model reads the prompt once instead of twice.

              prompt (to the right)   chosen (to the left)    rejected (to the left)
    row 1     ·  The capital of       Paris  <end>            Lyon  ,  I  think  <end>
    row 2     What is two plus two    4  <end>  ·             5  <end>  ·  ·  ·

A completion sees the prompt and itself. Both have the positions that follow the prompt, so the log-probabilities are
those of two sequences. Completions start in the same column in each row: few columns need logits.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from onegpu.adapters.segments import sees_less

from .contract import IGNORED, Batch, Predictions
from .conversations import common_length
from .output_head import Arithmetic, OutputHead, before_head
from .pairs import PairExample, collated
from .tokens import HiddenPredictions, causal_logits, selected, surprises

__all__ = ["cannot_share", "joined", "sequence_logps", "supervised_tokens"]

PADDING, PROMPT, CHOSEN, REJECTED = -1, 0, 1, 2  # what a token is part of
ROUNDING = 16  # units in the last place by which a log-probability may differ between two ways of computing it


def joined(pairs: Sequence[PairExample], pad: int) -> Batch:
    """Pairs as rows of prompt, chosen, rejected.

    Returns:
        `input_ids`, `position_ids`, `parts` (above) and `labels`: (pairs, tokens); `widths`: (3,) columns of the parts.
    """
    lengths = [_prompt_length(pair) for pair in pairs]
    prompts = [(pair.ids[:n], [IGNORED] * n) for pair, n in zip(pairs, lengths, strict=True)]
    chosen = [(pair.ids[n:], pair.labels[n:]) for pair, n in zip(pairs, lengths, strict=True)]
    rejected = [(pair.other_ids[n:], pair.other_labels[n:]) for pair, n in zip(pairs, lengths, strict=True)]
    widths = [max(len(ids) for ids, _ in part) for part in (prompts, chosen, rejected)]
    rows = []
    for n, *parts in zip(lengths, prompts, chosen, rejected, strict=True):
        cells: list[tuple[int, int, int, int]] = []  # token, position, part, label
        for number, ((ids, labels), width) in enumerate(zip(parts, widths, strict=True)):
            start = 0 if number == PROMPT else n
            real = [(t, start + i, number, label) for i, (t, label) in enumerate(zip(ids, labels, strict=True))]
            filling = [(pad, 0, PADDING, IGNORED)] * (width - len(ids))
            cells += filling + real if number == PROMPT else real + filling
        rows.append(cells)
    found = torch.tensor(rows).unbind(-1)
    names = ("input_ids", "position_ids", "parts", "labels")
    return dict(zip(names, found, strict=True)) | {"widths": torch.tensor(widths)}


def _prompt_length(pair: PairExample) -> int:
    """Tokens with which both begin, as long as nothing is supervised: the first supervised one is not among them."""
    first = min(_first_supervised(pair.labels), _first_supervised(pair.other_labels))
    return min(first, common_length(pair.ids, pair.other_ids))


def _first_supervised(labels: Sequence[int]) -> int:
    return next(i for i, label in enumerate(labels) if label != IGNORED)


def attention(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the attention scores: (rows, 1, tokens, tokens) of 0 and the smallest value.

    A token sees what is before it of the prompt and of its own part; padding sees itself, as a softmax needs something.
    """
    of, to = parts[:, :, None], parts[:, None, :]
    seen = ((to == PROMPT) | (to == of)) & (to != PADDING)
    own = torch.eye(parts.shape[1], dtype=torch.bool, device=parts.device)
    allowed = (seen & torch.ones_like(own).tril()) | own
    blocked = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=parts.device)
    return torch.where(allowed, torch.zeros_like(blocked), blocked)[:, None]


def sequence_logps(model: nn.Module, batch: Batch, arithmetic: Arithmetic | None = None) -> Tensor:
    """log π(y|x): the summed log-probability of the supervised tokens of each sequence, chosen ones first.

    Args:
        arithmetic: of the model's head, where it is known: then logits are made in chunks.

    Returns:
        (sequences,), float32.
    """
    if "parts" in batch:
        return _joined_logps(model, batch, arithmetic)
    return _row_sums(causal_logits(model, batch, arithmetic), batch["labels"][:, 1:])


def _joined_logps(model: nn.Module, batch: Batch, arithmetic: Arithmetic | None) -> Tensor:  # (2 · pairs,) float32
    prompt, chosen, rejected = batch["widths"].tolist()
    # The last column of the prompt predicts the first token of both; the last of a part predicts nothing.
    start, between, end = prompt - 1, prompt + chosen - 1, prompt + chosen + rejected - 1
    kept = [*range(start, between), *range(between + 1, end)]
    inputs = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "attention_mask": attention(batch["parts"], _dtype(model)),
        "use_cache": False,
    }
    if arithmetic is None:
        columns = torch.tensor(kept, device=batch["input_ids"].device)
        said = model(**inputs, logits_to_keep=columns).logits  # (pairs, kept, vocabulary)
    else:
        said = before_head(model, inputs)[:, kept]  # (pairs, kept, hidden)
    labels = batch["labels"]
    first = said[:, :chosen], labels[:, prompt : prompt + chosen]
    second = torch.cat([said[:, :1], said[:, chosen:]], 1), labels[:, prompt + chosen :]
    head = None if arithmetic is None else OutputHead.of(model, arithmetic)
    return torch.cat([_row_sums(_found(part, wanted, head), wanted) for part, wanted in (first, second)])


def _found(said: Tensor, labels: Tensor, head: OutputHead | None) -> Predictions:
    return selected(said, labels) if head is None else HiddenPredictions(said, head, labels)


def _row_sums(found: Predictions, labels: Tensor) -> Tensor:
    """Summed log-probability of each row's labels.

    Args:
        found: of the supervised labels, row by row.
        labels: (rows, tokens), IGNORED where nothing is supervised.
    """
    supervised = labels != IGNORED
    logps = -surprises(found)
    # The supervised tokens come row by row. Not index_add, whose sums differ from run to run on CUDA.
    return torch.zeros_like(supervised, dtype=logps.dtype).masked_scatter(supervised, logps).sum(1)


def supervised_tokens(batch: Batch) -> Tensor:  # (sequences,)
    """How many tokens each log-probability sums."""
    supervised = batch["labels"] != IGNORED
    if "parts" not in batch:
        return supervised.sum(1)
    return torch.cat([(supervised & (batch["parts"] == part)).sum(1) for part in (CHOSEN, REJECTED)])


# --- where it is possible ---------------------------------------------------------------------------------------------


def cannot_share(model: nn.Module, pair: PairExample, longest: int, pad: int) -> str:
    """Why this model cannot read a prompt once for two completions; "" where it can.

    A trial in evaluation mode decides: no completion changes the other's log-probability by a bit, and both are those
    of two sequences up to rounding. What a trial of one pair cannot show, the configuration must say: that its layers
    attend to all that is before a token.

    Args:
        longest: tokens of the longest row.
    """
    if reason := sees_less(model, longest):
        return reason
    try:
        with torch.no_grad():
            return _trial(model, pair, pad)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as cause:
        return f"it does not take such a row: {cause}"


def _trial(model: nn.Module, pair: PairExample, pad: int) -> str:
    def said(batch: Batch) -> Tensor:
        device = next(model.parameters()).device
        return sequence_logps(model, {name: tensor.to(device) for name, tensor in batch.items()})

    together = said(joined([pair], pad))
    start = _prompt_length(pair)
    taken = {pair.ids[start], pair.other_ids[start]}
    token = next(i for i in range(3) if i not in taken)
    other_chosen = replace(pair, ids=[*pair.ids[:start], *[token] * (len(pair.ids) - start)])
    other_rejected = replace(pair, other_ids=[*pair.other_ids[:start], *[token] * (len(pair.other_ids) - start)])
    if said(joined([other_rejected], pad))[0] != together[0] or said(joined([other_chosen], pad))[1] != together[1]:
        return "one completion sees the other"
    sequences = ([pair.ids, pair.other_ids], [pair.labels, pair.other_labels])
    apart = said(collated(*sequences, pad))
    rounding = max(1e-4, ROUNDING * torch.finfo(_dtype(model)).eps)
    if not torch.allclose(together, apart, rtol=rounding, atol=rounding):
        return "the log-probabilities differ from those of two sequences"
    return ""


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
