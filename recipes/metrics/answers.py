"""Scores of short answers to questions, as SQuAD defines them (https://arxiv.org/abs/1606.05250, section 6.1).

Answers are compared without case, punctuation, English articles and spacing: "The Eiffel Tower." is "eiffel tower".
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from unicodedata import category, normalize

from .pairs import References, reference_lists
from .scripts import split_unspaced

__all__ = ["answer_scores", "exact_match", "token_f1"]

ARTICLES = re.compile(r"\b(a|an|the)\b")


def answer_scores(predictions: Sequence[str], references: References) -> dict[str, float]:
    """The means of `exact_match` and `token_f1` over all questions, from 0 to 1.

    Raises:
        DataError: no predictions, or not as many references.
    """
    pairs = list(zip(predictions, reference_lists(predictions, references), strict=True))
    return {
        "exact_match": sum(exact_match(predicted, valid) for predicted, valid in pairs) / len(pairs),
        "token_f1": sum(token_f1(predicted, valid) for predicted, valid in pairs) / len(pairs),
    }


def exact_match(predicted: str, references: str | Sequence[str]) -> float:
    """1.0 if the prediction is one of the valid answers, else 0.0.

    No valid answer at all, or the empty one, says that the question cannot be answered: only an empty prediction is
    right (https://arxiv.org/abs/1806.03822).
    """
    return float(_answer_words(predicted) in map(_answer_words, _valid(references)))


def token_f1(predicted: str, references: str | Sequence[str]) -> float:
    """F1 of the words that prediction and answer share, for the valid answer nearest to it; 0 to 1.

    A word counts as often as both have it. In scripts without spaces between words (Chinese, Japanese, Thai, Lao,
    Khmer, Burmese) every character is a word. An empty prediction is as in `exact_match`.
    """
    words = _answer_words(predicted)
    return max(_shared(words, _answer_words(one)) for one in _valid(references))


def _valid(references: str | Sequence[str]) -> Sequence[str]:
    return [references] if isinstance(references, str) else references or [""]


def _shared(predicted: list[str], true: list[str]) -> float:
    """F1 = 2 * shared / (predicted + true), counted in words."""
    if not predicted or not true:
        return float(predicted == true)
    return 2 * (Counter(predicted) & Counter(true)).total() / (len(predicted) + len(true))


def _answer_words(text: str) -> list[str]:
    lower = normalize("NFC", text.lower())
    kept = "".join(character for character in lower if not _is_punctuation(character))
    return split_unspaced(ARTICLES.sub(" ", kept))


def _is_punctuation(character: str) -> bool:
    """SQuAD's ASCII punctuation, and what is punctuation elsewhere, as in MLQA (https://arxiv.org/abs/1910.07475)."""
    return character in string.punctuation or category(character).startswith("P")
