import logging
import math
from typing import Any

import numpy
import pytest
import sacrebleu

from onegpu.adapters import DataError, RecipeError
from onegpu.recipes.metrics.translations import Tokeniser, translation_scores

pytestmark = pytest.mark.filterwarnings("error")

SENTENCES = {
    "13a": ["the", "cat,", "sat", "on", "a", "mat.", "dogs", "don't", "1,000", "mats!"],
    "zh": list("今天天气很好，我们去公园 OK。"),
    "char": list("今日は天気がいいから散歩しましょう。"),
}


def _texts(tokeniser: str, seed: int) -> list[str]:
    random = numpy.random.default_rng(seed)
    space = " " if tokeniser == "13a" else ""
    return [space.join(random.choice(SENTENCES[tokeniser], random.integers(3, 20))) for _ in range(30)]


@pytest.mark.parametrize("tokeniser", ["13a", "zh", "char"])
def test_the_scores_are_those_of_sacrebleu(tokeniser: Tokeniser) -> None:
    predictions, first, second = (_texts(tokeniser, seed) for seed in range(3))
    predictions[:10] = [text[: len(text) // 2] + " ." for text in first[:10]]
    one = translation_scores(predictions, first, tokeniser=tokeniser)
    two = translation_scores(predictions, list(zip(first, second, strict=True)), tokeniser=tokeniser)
    for found, streams in ((one, [first]), (two, [first, second])):
        assert found == {
            "bleu": sacrebleu.corpus_bleu(predictions, streams, tokenize=tokeniser).score,
            "chrf": sacrebleu.corpus_chrf(predictions, streams).score,
        }
        assert all(0 < score < 100 for score in found.values())
        assert all(type(score) is float for score in found.values())
    assert two["bleu"] > one["bleu"]


def test_texts_may_have_unequally_many_references() -> None:
    predictions, references = ["a b c d e", "f g h i j"], [["x y z", "a b c d e"], "f g h i k"]
    streams: Any = [["x y z", "f g h i k"], ["a b c d e", None]]
    expected = sacrebleu.corpus_bleu(predictions, streams).score
    assert translation_scores(predictions, references)["bleu"] == expected > 50


def test_bleu_computed_by_hand() -> None:
    # 6 of 7 words, 4 of 6 pairs, 2 of 5 triples, 1 of 4 fours; 7 words against 8
    found = translation_scores(["one two three four nine six seven"], ["one two three four five six seven eight"])
    expected = (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25 * math.exp(1 - 8 / 7)
    assert found["bleu"] == pytest.approx(100 * expected)


def test_the_same_text_is_a_perfect_translation() -> None:
    texts = ["the cat sat on the mat", "今天天气很好。"]
    assert translation_scores(texts, texts, tokeniser="zh") == pytest.approx({"bleu": 100, "chrf": 100})


def test_chinese_needs_its_tokeniser() -> None:
    predicted, true = ["今天天气很好啊"], ["今天天气很好"]
    assert translation_scores(predicted, true)["bleu"] < 1
    assert translation_scores(predicted, true, tokeniser="zh")["bleu"] > 50


@pytest.mark.parametrize(("predicted", "true"), [("", "the cat sat"), ("the cat sat", ""), ("", "")])
def test_empty_texts_are_scored_quietly(predicted: str, true: str) -> None:
    assert translation_scores([predicted], [true]) == {"bleu": 0.0, "chrf": 0.0}


def test_predictions_that_look_tokenised_are_scored_quietly(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        translation_scores(["a cat ."] * 100, ["a cat ."] * 100)
    assert not caplog.records


def test_what_cannot_be_scored_is_told() -> None:
    with pytest.raises(DataError, match="no texts to score"):
        translation_scores([], [])
    with pytest.raises(DataError, match="1 predicted texts cannot be scored against 2"):
        translation_scores(["a"], ["a", "b"])
    with pytest.raises(DataError, match="text 1 has no reference translation"):
        translation_scores(["a", "b"], ["a", []])
    tokeniser: Any = "zhh"
    with pytest.raises(RecipeError, match=r"no tokeniser 'zhh'; did you mean 'zh'\?"):
        translation_scores(["a"], ["a"], tokeniser=tokeniser)
