import string

import numpy
import pytest
from rouge_score import tokenize

from onegpu.recipes.metrics.scripts import split_unspaced, words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The U.S. state_of 2024-25!", ["the", "u", "s", "state", "of", "2024", "25"]),
        ("Grüße, Ёлка", ["grüße", "ёлка"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # vowel signs are marks, no letters
        ("한국어 문장", ["한국어", "문장"]),
        ("今天，天气 ok。", ["今", "天", "天", "气", "ok"]),
        ("東京タワーは佐々木", list("東京タワーは佐々木")),
        ("𠮷𠮷", ["𠮷", "𠮷"]),  # outside the basic plane
        ("กขค", ["ก", "ข", "ค"]),
        ("e\u0301te\u0301", ["\u00e9t\u00e9"]),  # the same letter, composed
        ("🙂 … !", []),
        ("", []),
    ],
)
def test_words_of_many_scripts(text: str, found: list[str]) -> None:
    assert words(text) == found


def test_on_ascii_the_words_are_those_of_rouge_score() -> None:
    random = numpy.random.default_rng(0)
    for _ in range(200):
        text = "".join(random.choice(list(string.printable), 40))
        assert words(text) == tokenize.tokenize(text, None)


def test_splitting_keeps_everything_but_spaces() -> None:
    assert split_unspaced("C++ 用 C, fast") == ["C++", "用", "C,", "fast"]
