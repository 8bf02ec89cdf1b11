import re
import string
from collections import Counter

import numpy
import pytest

from onegpu.adapters import DataError
from onegpu.recipes.metrics.answers import answer_scores, exact_match, token_f1


def _squad_normal(text: str) -> str:
    """The normalisation of SQuAD's own evaluation: lower case, punctuation, articles, white space, in this order."""
    bare = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _squad_f1(predicted: str, true: str) -> float:
    """F1 from precision and recall, as SQuAD's own evaluation has it."""
    ours, theirs = _squad_normal(predicted).split(), _squad_normal(true).split()
    same = sum((Counter(ours) & Counter(theirs)).values())
    if not ours or not theirs:
        return float(ours == theirs)
    if not same:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


def test_english_is_scored_as_squad_does() -> None:
    random = numpy.random.default_rng(0)
    words = [
        "The",
        "a",
        "U.S.",
        "cat's",
        "CAT",
        "well-known",
        "$5,000",
        "an",
        "in\n1999",
        "(x)",
        "--",
        "theatre",
        "5000",
        "1+1",
        "11",
        "11°",
    ]
    texts = [" ".join(random.choice(words, random.integers(0, 6))) for _ in range(300)]
    scores = []
    for predicted, *valid in zip(texts, texts[1:], texts[2:], strict=False):
        normal = [_squad_normal(one) for one in valid]
        assert exact_match(predicted, valid) == float(_squad_normal(predicted) in normal)
        scores.append(token_f1(predicted, valid))
        assert scores[-1] == pytest.approx(max(_squad_f1(predicted, one) for one in valid))
    assert 0.1 < sum(scores) / len(scores) < 0.9


@pytest.mark.parametrize(
    ("predicted", "references", "exact", "f1"),
    [
        ("The  Eiffel Tower.", "eiffel tower", 1, 1),
        ("in the Eiffel Tower", "Eiffel Tower", 0, 4 / 5),
        ("Theatre", "the atre", 0, 0),  # an article is a whole word
        ("cat cat dog", "cat bird", 0, 2 / 5),  # a word counts as often as both have it
        ("Paris", ["Lyon", "Paris", "Paris, France"], 1, 1),
        ("Paris France", ["Lyon", "Paris"], 0, 2 / 3),  # the nearest answer
        ("", "", 1, 1),
        ("", [], 1, 1),
        ("the", "", 1, 1),  # nothing is left of it
        ("Paris", [], 0, 0),
        ("Paris", "", 0, 0),
        ("", "Paris", 0, 0),
        ("北京。", "北京", 1, 1),
        ("北京 大学", "北京大学", 1, 1),
        ("在北京大学", "北京大学", 0, 8 / 9),
        ("東京タワー", "京都タワー", 0, 4 / 5),
        ("«Москва»", "москва", 1, 1),
        ("caf\u00e9", "cafe\u0301", 1, 1),
        ("20 °C", "20", 0, 2 / 3),
    ],
)
def test_answers_scored_by_hand(predicted: str, references: str | list[str], exact: float, f1: float) -> None:
    assert exact_match(predicted, references) == exact
    assert token_f1(predicted, references) == pytest.approx(f1)


def test_scores_are_means_over_questions() -> None:
    found = answer_scores(["Paris", "in Rome", "", "x"], ["Paris", ["Rome", "Roma"], [], ("y", "z")])
    assert found == pytest.approx({"exact_match": 2 / 4, "token_f1": (1 + 2 / 3 + 1 + 0) / 4})


def test_nothing_and_unequal_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="no texts to score"):
        answer_scores([], [])
    with pytest.raises(DataError, match="1 predicted texts cannot be scored against 2"):
        answer_scores(["a"], ["a", "b"])
