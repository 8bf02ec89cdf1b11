"""Losses of preference, as functions of the log-probabilities of whole completions.

y_w, y_l     the chosen and the rejected completion of a prompt x; |y| its tokens
π, π_ref     the model that is trained, and the base without adapters
s_w, s_l     what a loss compares of both, see `compared`; d = s_w - s_l; β · s is called the reward
σ            the logistic function; ε label smoothing: the share of pairs that are labelled the wrong way round
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["READS", "Loss", "Strengths", "compared", "kto_loss", "needs_reference", "pair_loss"]

Loss = Literal["dpo", "ipo", "hinge", "robust", "simpo", "orpo", "cpo", "kto"]

REFERENCE = {"dpo", "ipo", "hinge", "robust", "kto"}  # compare with π_ref
PER_TOKEN = {"ipo", "simpo", "orpo"}  # compare means over tokens, so length does not count
LIKELIHOOD = {"cpo", "orpo"}  # add the mean negative log-likelihood of the chosen tokens

OF_PAIRS = {"packing"}
READS: dict[str, set[str]] = {
    "dpo": OF_PAIRS | {"label_smoothing"},
    "ipo": OF_PAIRS,
    "hinge": OF_PAIRS,
    "robust": OF_PAIRS | {"label_smoothing"},
    "simpo": OF_PAIRS | {"label_smoothing", "gamma"},
    "orpo": OF_PAIRS,
    "cpo": OF_PAIRS | {"label_smoothing"},
    "kto": {"desirable_weight", "undesirable_weight"},
}
"""Which settings a loss reads beside `beta`."""


@dataclass(frozen=True)
class Strengths:
    """The numbers in the equations."""

    beta: float
    label_smoothing: float = 0.0
    gamma: float = 0.0


def needs_reference(loss: Loss) -> bool:
    """Whether π_ref is in its equation."""
    return loss in REFERENCE


def compared(loss: Loss, logps: Tensor, reference: Tensor | None, tokens: Tensor) -> Tensor:  # (sequences,)
    """s of each sequence: log π(y|x), minus log π_ref(y|x) with a reference, divided by |y| for ipo, simpo and orpo.

    Args:
        logps: (sequences,) log π(y|x).
        reference: (sequences,) log π_ref(y|x), for a loss that needs it.
        tokens: (sequences,) |y|.
    """
    if loss in REFERENCE:
        assert reference is not None
        logps = logps - reference
    return logps / tokens.clamp(min=1) if loss in PER_TOKEN else logps


def pair_loss(loss: Loss, scores: tuple[Tensor, Tensor], likelihood: Tensor, strengths: Strengths) -> Tensor:
    """The loss of each pair: (pairs,).

    Args:
        scores: s_w and s_l, (pairs,) each.
        likelihood: (pairs,) mean log-probability of the chosen tokens.
    """
    value = _PAIRS[loss](*scores, strengths)
    return value - likelihood if loss in LIKELIHOOD else value


def _dpo(chosen: Tensor, rejected: Tensor, by: Strengths) -> Tensor:
    """-(1-ε) log σ(βd) - ε log σ(-βd): equation 7 of https://arxiv.org/abs/2305.18290; with ε, the conservative form
    of https://ericmitchell.ai/cdpo.pdf. CPO has the same, without a reference: equation 3 of
    https://arxiv.org/abs/2401.08417, and there the likelihood of the chosen is added.
    """
    return _logistic(by.beta * (chosen - rejected), by.label_smoothing)


def _robust(chosen: Tensor, rejected: Tensor, by: Strengths) -> Tensor:
    """(-(1-ε) log σ(βd) + ε log σ(-βd)) / (1 - 2ε): rDPO of https://arxiv.org/abs/2403.00409."""
    margin, flipped = by.beta * (chosen - rejected), by.label_smoothing
    return (flipped * F.logsigmoid(-margin) - (1 - flipped) * F.logsigmoid(margin)) / (1 - 2 * flipped)


def _ipo(chosen: Tensor, rejected: Tensor, by: Strengths) -> Tensor:
    """(d - 1/(2β))²: equation 17 of https://arxiv.org/abs/2310.12036, where β is τ. Here s is the mean over tokens,
    which the paper does not say and its authors confirmed.
    """
    return (chosen - rejected - 1 / (2 * by.beta)) ** 2


def _hinge(chosen: Tensor, rejected: Tensor, by: Strengths) -> Tensor:
    """max(0, 1 - βd): the normalised SLiC of https://arxiv.org/abs/2309.06657."""
    return F.relu(1 - by.beta * (chosen - rejected))


def _simpo(chosen: Tensor, rejected: Tensor, by: Strengths) -> Tensor:
    """-log σ(βd - γ): equation 6 of https://arxiv.org/abs/2405.14734, no reference."""
    return _logistic(by.beta * (chosen - rejected) - by.gamma, by.label_smoothing)


def _orpo(chosen: Tensor, rejected: Tensor, by: Strengths) -> Tensor:
    """-β log σ(log odds_w - log odds_l), odds = p / (1 - p), p = exp(s): equations 6 and 7 of
    https://arxiv.org/abs/2403.07691, where β is λ; the likelihood of the chosen is added.
    """
    return -by.beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


_PAIRS: dict[str, Callable[[Tensor, Tensor, Strengths], Tensor]] = {
    "dpo": _dpo,
    "cpo": _dpo,
    "robust": _robust,
    "ipo": _ipo,
    "hinge": _hinge,
    "simpo": _simpo,
    "orpo": _orpo,
}
assert {*_PAIRS, "kto"} == set(get_args(Loss))


def kto_loss(scores: Tensor, desirable: Tensor, baseline: Tensor, beta: float) -> Tensor:
    """1 - σ(β(s - z)) of a desirable completion, 1 - σ(β(z - s)) of an undesirable one: equation 7 of
    https://arxiv.org/abs/2402.01306.

    Args:
        scores: (sequences,) s.
        desirable: (sequences,) bool.
        baseline: scalar z >= 0, an estimate of KL(π, π_ref); no gradient.
    """
    gain = beta * (scores - baseline)
    return 1 - torch.sigmoid(torch.where(desirable, gain, -gain))


def _logistic(margin: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, exact near both ends."""
    # A completion of which the model is certain rounds to log p = 0, whose odds are infinite and have no gradient.
    below = mean.clamp(max=-torch.finfo(mean.dtype).eps)
    half = -0.6931471805599453
    # Both branches get values that they can take, since the gradient of the one not taken is multiplied by 0, not left.
    rest = torch.where(
        below < half,
        torch.log1p(-torch.exp(below.clamp(max=half))),
        torch.log(-torch.expm1(below.clamp(min=half))),
    )
    return below - rest
