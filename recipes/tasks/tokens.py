"""Losses over tokens: the logits of supervised positions, and nothing else of a vocabulary's width."""

import inspect
import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from .contract import IGNORED, Batch, Objective, Predictions, model_inputs

__all__ = ["causal_logits", "own_logits", "token_objective", "token_scores"]

LARGEST_EXPONENT = 700.0  # of a perplexity that a float can hold


def causal_logits(model: nn.Module, batch: Batch) -> Predictions:
    """Of a causal model: the prediction for the token after each position.

    Args:
        batch: `labels` (batch, tokens) beside the model's inputs, with IGNORED where nothing is supervised.
    """
    targets = batch["labels"][:, 1:]  # (batch, tokens - 1): the token after each position
    positions = (targets != IGNORED).any(0).nonzero().squeeze(1)  # where any row has a target: (kept,)
    inputs = model_inputs(batch) | {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, logits_to_keep=positions).logits  # (batch, kept, vocabulary)
    else:
        logits = model(**inputs).logits[:, positions]
    return _selected(logits, targets[:, positions])


def own_logits(model: nn.Module, batch: Batch) -> Predictions:
    """Of a model whose logits at a position are about that position: masked tokens, a decoder given its inputs."""
    return _selected(model(**model_inputs(batch)).logits, batch["labels"])


def _selected(logits: Tensor, targets: Tensor) -> Predictions:
    supervised = targets != IGNORED  # (batch, kept)
    # Only what carries loss is widened to float32.
    return Predictions(logits[supervised].float(), targets[supervised], supervised.nonzero()[:, 0])


def token_objective(found: Predictions, label_smoothing: float = 0.0) -> Objective:
    """Summed cross-entropy; the weight is the number of supervised tokens.

    The outcome is (tokens with the largest logit, tokens, their summed cross-entropy without smoothing, in nats).
    """
    loss = F.cross_entropy(found.logits, found.targets, reduction="sum", label_smoothing=label_smoothing)

    def outcomes() -> Sequence[tuple[int, int, float]]:
        logits = found.logits.detach()
        surprise = F.cross_entropy(logits, found.targets, reduction="none").double().sum()
        return [(int((logits.argmax(-1) == found.targets).sum()), len(found.targets), float(surprise))]

    return Objective(loss, float(len(found.targets)), outcomes)


def token_scores(outcomes: Sequence[tuple[int, int, float]]) -> dict[str, float]:
    """token_accuracy: the share of supervised tokens that have the largest logit; perplexity: e^(nats per token)."""
    right, tokens, nats = (sum(values) for values in zip(*outcomes, strict=True))
    # Cut off where a float overflows: a model that diverged is reported, instead of ending its run.
    return {"token_accuracy": right / tokens, "perplexity": math.exp(min(nats / tokens, LARGEST_EXPONENT))}
