import math
import re

import numpy
import pytest
from scipy import stats
from sklearn.metrics import mean_absolute_error, mean_squared_error

from onegpu.adapters import DataError
from onegpu.recipes.metrics.numbers import number_scores

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("seed", range(3))
def test_the_scores_are_those_of_the_libraries(seed: int) -> None:
    random = numpy.random.default_rng(seed)
    true = random.integers(0, 6, 50).astype(float)  # with ties
    predicted = true + random.normal(0, 2, 50)
    found = number_scores(true.tolist(), predicted.tolist())
    expected = {
        "pearson": stats.pearsonr(true, predicted).statistic,
        "spearman": stats.spearmanr(true, predicted).statistic,
        "mean_absolute_error": mean_absolute_error(true, predicted),
        "mean_squared_error": mean_squared_error(true, predicted),
    }
    assert found == pytest.approx(expected, rel=1e-12)
    assert all(type(value) is float for value in found.values())


def test_scores_computed_by_hand() -> None:
    found = number_scores([1, 2, 3], [1, 4, 3])
    assert found == pytest.approx(
        {
            "pearson": 2 / math.sqrt(2 * 14 / 3),
            "spearman": 0.5,
            "mean_absolute_error": 2 / 3,
            "mean_squared_error": 4 / 3,
        }
    )


def test_rising_together_is_enough_for_spearman_only() -> None:
    found = number_scores([1, 2, 3, 4], [1, 10, 100, 1000])
    assert found["spearman"] == pytest.approx(1.0)
    assert 0 < found["pearson"] < 0.95
    assert number_scores([1, 2, 3], [-1, -2, -3])["pearson"] == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("true", "predicted"), [([1, 2, 3], [0.1, 0.1, 0.1]), ([2, 2], [1, 3]), ([1], [2]), ([0, 0], [0, 0])]
)
def test_a_constant_side_correlates_with_nothing(true: list[float], predicted: list[float]) -> None:
    found = number_scores(true, predicted)
    assert (found["pearson"], found["spearman"]) == (0.0, 0.0)
    assert found["mean_absolute_error"] == pytest.approx(mean_absolute_error(true, predicted))


@pytest.mark.parametrize("predicted", [[1, 1 + 1e-15, 1 + 2e-15], [1e-310, 2e-310, 3e-310], [1e150, -1e150, 1e150]])
def test_extreme_numbers_are_scored_quietly(predicted: list[float]) -> None:
    found = number_scores([1, 2, 3], predicted)
    assert all(map(math.isfinite, found.values()))
    assert all(abs(found[name]) <= 1 + 1e-9 for name in ("pearson", "spearman"))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1e200])
def test_what_is_no_number_is_named(wrong: float) -> None:
    with pytest.raises(DataError, match=re.escape(f"predicted number 1 is {wrong}: not finite")):
        number_scores([1, 2], [1, wrong])
    with pytest.raises(DataError, match="true number 0 is"):
        number_scores([wrong, 2], [1, 2])


def test_nothing_and_unequal_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="no numbers to score"):
        number_scores([], [])
    with pytest.raises(DataError, match="1 predicted numbers cannot be scored against 2"):
        number_scores([1, 2], [1])
