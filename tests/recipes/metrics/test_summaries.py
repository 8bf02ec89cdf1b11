import numpy
import pytest
from rouge_score.rouge_scorer import RougeScorer

from onegpu.adapters import DataError
from onegpu.recipes.metrics.summaries import summary_scores

pytestmark = pytest.mark.filterwarnings("error")

KINDS = ["rouge1", "rouge2", "rougeL"]


def _texts(seed: int) -> list[str]:
    random = numpy.random.default_rng(seed)
    words = ["The", "cat,", "sat", "on", "a_mat", "don't", "1,000", "dogs!", "\n", "well-known"]
    return [" ".join(random.choice(words, random.integers(1, 25))) for _ in range(30)]


def test_on_ascii_the_scores_are_those_of_rouge_score() -> None:
    predictions, first, second = map(_texts, range(3))
    scorer = RougeScorer(KINDS)
    one = summary_scores(predictions, first)
    several = [list(pair) for pair in zip(first, second, strict=True)]
    two = summary_scores(predictions, several)
    for found, references in ((one, [[text] for text in first]), (two, several)):
        scores = [scorer.score_multi(*pair) for pair in zip(references, predictions, strict=True)]
        expected = {kind: numpy.mean([score[kind].fmeasure for score in scores]) for kind in KINDS}
        assert found == pytest.approx(expected, rel=1e-12)
        assert all(0 < score < 1 and type(score) is float for score in found.values())
    assert all(two[kind] > one[kind] for kind in KINDS)


def test_scores_computed_by_hand() -> None:
    # 3 of 4 and 3 words, 1 of 3 and 2 pairs, "cat ... mat" in order
    found = summary_scores(["cat mat sat here"], ["sat: CAT mat"])
    assert found == pytest.approx({"rouge1": 6 / 7, "rouge2": 2 / 5, "rougeL": 4 / 7})


def test_chinese_is_compared_by_characters() -> None:
    predicted, true = (
        "今天天气好。",
        "今天，天气很好",
    )  # 5 and 6 characters; 今天 天天 天气 气好 and 今天 天天 天气 气很 很好
    assert RougeScorer(["rouge1"]).score(true, predicted)["rouge1"].fmeasure == 0  # rouge-score itself drops them all
    found = summary_scores([predicted], [true])
    assert found == pytest.approx({"rouge1": 10 / 11, "rouge2": 6 / 9, "rougeL": 10 / 11})


def test_letters_outside_ascii_are_part_of_their_words() -> None:
    assert summary_scores(["Köln über alles"], ["koln uber alles"])["rouge1"] == pytest.approx(1 / 3)
    assert summary_scores(["МОСКВА"], ["москва"])["rouge1"] == 1.0


def test_scores_are_means_over_texts() -> None:
    assert summary_scores(["a b", "", "x"], ["a b", "a b", ["y", "z"]])["rouge1"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("predicted", "true"), [("", "a cat"), ("a cat", ""), ("", ""), ("...", "a cat")])
def test_empty_texts_are_scored_quietly(predicted: str, true: str) -> None:
    assert summary_scores([predicted], [true]) == dict.fromkeys(KINDS, 0.0)


def test_what_cannot_be_scored_is_told() -> None:
    with pytest.raises(DataError, match="no texts to score"):
        summary_scores([], [])
    with pytest.raises(DataError, match="1 predicted texts cannot be scored against 2"):
        summary_scores(["a"], ["a", "b"])
    with pytest.raises(DataError, match="text 0 has no reference summary"):
        summary_scores(["a"], [[]])
