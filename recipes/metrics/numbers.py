"""Scores of predicted numbers, by SciPy."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy
from scipy import stats

from onegpu.adapters import DataError

from .pairs import check_pairs

__all__ = ["number_scores"]

LARGEST = 1e150  # the square of a larger difference is infinite in float64


def number_scores(true: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """How near predicted numbers are to the true ones, and whether they rise and fall together.

    Where one side has the same value throughout (a single pair included), no correlation is defined; it is 0.0 then,
    as for a prediction that says nothing.

    Returns:
        pearson and spearman (-1 to 1), mean_absolute_error (in units of the numbers), mean_squared_error (in their
        square).

    Raises:
        DataError: nothing to score, unequal lengths, a number that is not finite or beyond 1e150.
    """
    check_pairs(true, predicted, what="numbers")
    x, y = _finite(true, "true"), _finite(predicted, "predicted")
    return {
        "pearson": _correlation(stats.pearsonr, x, y),
        "spearman": _correlation(stats.spearmanr, x, y),
        "mean_absolute_error": float(abs(x - y).mean()),
        "mean_squared_error": float(((x - y) ** 2).mean()),
    }


def _finite(numbers: Sequence[float], what: str) -> Any:  # (numbers,) float64
    array = numpy.asarray(numbers, numpy.float64)
    wrong = numpy.flatnonzero(~(abs(array) <= LARGEST))  # so written, NaN is among them
    if len(wrong):
        raise DataError(f"{what} number {wrong[0]} is {array[wrong[0]]}: not finite, or beyond {LARGEST:g}")
    return array


def _correlation(correlate: Callable[[Any, Any], Any], x: Any, y: Any) -> float:
    if (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    with warnings.catch_warnings():
        # Of values that differ in their last digits only: the early predictions of many a model.
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        return float(correlate(x, y).statistic)
