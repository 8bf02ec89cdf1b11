"""Scores of summaries, by rouge-score (https://aclanthology.org/W04-1013)."""

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer

from onegpu.adapters import DataError

from .pairs import References, reference_lists
from .scripts import words

__all__ = ["summary_scores"]

KINDS = ("rouge1", "rouge2", "rougeL")


def summary_scores(predictions: Sequence[str], references: References) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of summaries: the means of their F-measures, from 0 to 1 (papers multiply by 100).

    Words are not stemmed. On ASCII texts the words, and the scores, are those of rouge-score's own tokeniser; that one
    drops every other letter. Here they count, and in scripts without spaces every character is a word (see `words`).

    Args:
        predictions: one summary per text.
        references: the right summary of each, or several, of which the nearest counts.

    Raises:
        DataError: no predictions, not as many references, a text without any.
    """
    valid = reference_lists(predictions, references)
    if [] in valid:
        raise DataError(f"text {valid.index([])} has no reference summary")
    scorer = RougeScorer(KINDS, tokenizer=_Words())
    scores = [scorer.score_multi(several, one) for one, several in zip(predictions, valid, strict=True)]
    return {kind: float(sum(score[kind].fmeasure for score in scores) / len(scores)) for kind in KINDS}


class _Words:
    """What rouge-score asks of a tokeniser."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)
