"""Losses over tokens: the logits of supervised positions, and nothing else of a vocabulary's width.

Where a model's output embeddings can be applied to hidden states in pieces (output_head.py), not even these are there
at once: a chunk of tokens has logits, then the next one (chunks.py).
"""

import inspect
import math
from collections.abc import Sequence
from typing import Self

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.nn import functional as F

from .chunks import CrossEntropy, Measure, over_chunks
from .contract import IGNORED, Batch, Example, Objective, Predictions, Task, model_inputs
from .output_head import Arithmetic, OutputHead, before_head, find_head

__all__ = [
    "HiddenPredictions",
    "TokenTask",
    "at_once",
    "causal_logits",
    "own_logits",
    "selected",
    "sequence_logps",
    "supervised_tokens",
    "surprises",
    "targets_of",
    "token_objective",
    "token_scores",
]

LARGEST_EXPONENT = 700.0  # of a perplexity that a float can hold


class HiddenPredictions(Predictions):
    """Hidden states where something is supervised. Their logits are made for who asks, all at once or in chunks."""

    def __init__(self, hidden: Tensor, head: OutputHead, labels: Tensor) -> None:
        """Args:
        hidden: (batch, positions, hidden).
        labels: (batch, positions), IGNORED where nothing is supervised.
        """
        supervised = labels != IGNORED
        self.hidden: Tensor  # (supervised, hidden)
        self.head: OutputHead
        found = {"hidden": hidden[supervised], "head": head}
        vars(self).update(found, targets=labels[supervised], rows=supervised.nonzero()[:, 0])

    @property
    def logits(self) -> Tensor:
        """(supervised, vocabulary), float32."""
        return self.head(self.hidden).float()

    def over(self, measure: Measure) -> Tensor:  # (supervised, columns)
        """What is found of the logits, a chunk at a time."""
        return over_chunks(self.head, self.hidden, measure)


class TokenTask(Task):
    """A task over tokens of a vocabulary, whose logits are made in chunks where its model allows it."""

    _arithmetic: Arithmetic | None = PrivateAttr(default=None)  # None: not tried, or all logits are made at once

    def suited(self, model: nn.Module, example: Example, *, longest: int, pad: int, packing: bool) -> tuple[Self, str]:
        """Makes logits in chunks where this model's can be."""
        found = find_head(model, self.reads(model, self.collate([example], pad)))
        if not isinstance(found, Arithmetic):
            return self, at_once(found)
        task = self.model_copy()
        task._arithmetic = found
        return task, ""

    def reads(self, model: nn.Module, batch: Batch) -> Batch:
        """What of a batch goes into the model."""
        return model_inputs(batch)


def at_once(reason: str) -> str:
    """The line about a model whose logits cannot be made in chunks."""
    return f"all logits of a batch are made at once: {reason}"


def causal_logits(model: nn.Module, batch: Batch, arithmetic: Arithmetic | None = None) -> Predictions:
    """Of a causal model: the prediction for the token after each position.

    Args:
        batch: the model's inputs, and what `targets_of` asks for.
        arithmetic: of the model's head, where it is known: then no logits are made yet.
    """
    targets = targets_of(batch)
    inputs = model_inputs(batch) | {"use_cache": False}
    if arithmetic is not None:
        return HiddenPredictions(before_head(model, inputs), OutputHead.of(model, arithmetic), targets)
    positions = (targets != IGNORED).any(0).nonzero().squeeze(1)  # where any row has a target: (kept,)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, logits_to_keep=positions).logits  # (batch, kept, vocabulary)
    else:
        logits = model(**inputs).logits[:, positions]
    return selected(logits, targets[:, positions])


def targets_of(batch: Batch) -> Tensor:  # (batch, tokens)
    """What a causal model is to say after each token, IGNORED where nothing is supervised.

    Args:
        batch: `targets`, or `labels` of the tokens themselves, (batch, tokens).
    """
    return batch["targets"] if "targets" in batch else F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)


def own_logits(model: nn.Module, batch: Batch, arithmetic: Arithmetic | None = None) -> Predictions:
    """Of a model whose logits at a position are about that position: masked tokens, a decoder given its inputs."""
    inputs = model_inputs(batch)
    if arithmetic is not None:
        return HiddenPredictions(before_head(model, inputs), OutputHead.of(model, arithmetic), batch["labels"])
    return selected(model(**inputs).logits, batch["labels"])


def selected(logits: Tensor, targets: Tensor) -> Predictions:
    """What is supervised of logits (batch, kept, vocabulary) with targets (batch, kept)."""
    supervised = targets != IGNORED  # (batch, kept)
    # Only what carries loss is widened to float32.
    return Predictions(logits[supervised].float(), targets[supervised], supervised.nonzero()[:, 0])


def token_objective(found: Predictions, label_smoothing: float = 0.0) -> Objective:
    """Summed cross-entropy; the weight is the number of supervised tokens.

    The outcome is (tokens with the largest logit, tokens, their summed cross-entropy without smoothing, in nats).
    """
    if isinstance(found, HiddenPredictions):
        return _chunked(found, label_smoothing)
    loss = F.cross_entropy(found.logits, found.targets, reduction="sum", label_smoothing=label_smoothing)

    def outcomes() -> Sequence[tuple[int, int, float]]:
        logits = found.logits.detach()
        surprise = F.cross_entropy(logits, found.targets, reduction="none").double().sum()
        return [(int((logits.argmax(-1) == found.targets).sum()), len(found.targets), float(surprise))]

    return Objective(loss, float(len(found.targets)), outcomes)


def _chunked(found: HiddenPredictions, label_smoothing: float) -> Objective:
    losses, nats, right = found.over(CrossEntropy(found.targets, label_smoothing)).unbind(-1)

    def outcomes() -> Sequence[tuple[int, int, float]]:
        return [(int(right.sum()), len(found.targets), float(nats.detach().double().sum()))]

    return Objective(losses.sum(), float(len(found.targets)), outcomes)


def surprises(found: Predictions) -> Tensor:  # (supervised,)
    """-log p of each target."""
    if isinstance(found, HiddenPredictions):
        return found.over(CrossEntropy(found.targets))[:, 0]
    return F.cross_entropy(found.logits, found.targets, reduction="none")


def sequence_logps(model: nn.Module, batch: Batch, arithmetic: Arithmetic | None = None) -> Tensor:
    """log π(y|x): the summed log-probability of the supervised tokens of each sequence.

    Args:
        batch: sequences padded to one length, or packed into one row.
        arithmetic: of the model's head, where it is known: then logits are made in chunks.

    Returns:
        (sequences,), float32.
    """
    supervised = targets_of(batch) != IGNORED
    logps = -surprises(causal_logits(model, batch, arithmetic))  # (supervised,), row by row
    # Neither is index_add, whose sums differ from run to run on CUDA.
    if "sequences" not in batch:
        return torch.zeros_like(supervised, dtype=logps.dtype).masked_scatter(supervised, logps).sum(1)
    numbers = torch.arange(len(batch["supervised"]), device=supervised.device)
    own = batch["sequences"][supervised] == numbers[:, None]  # (sequences, supervised)
    return torch.where(own, logps, 0.0).sum(1)


def supervised_tokens(batch: Batch) -> Tensor:  # (sequences,)
    """How many tokens each log-probability sums."""
    return batch["supervised"] if "sequences" in batch else (batch["labels"] != IGNORED).sum(1)


def token_scores(outcomes: Sequence[tuple[int, int, float]]) -> dict[str, float]:
    """token_accuracy: the share of supervised tokens that have the largest logit; perplexity: e^(nats per token)."""
    right, tokens, nats = (sum(values) for values in zip(*outcomes, strict=True))
    # Cut off where a float overflows: a model that diverged is reported, instead of ending its run.
    return {"token_accuracy": right / tokens, "perplexity": math.exp(min(nats / tokens, LARGEST_EXPONENT))}
