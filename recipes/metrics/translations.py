"""Scores of translations, by sacrebleu: numbers that can be compared with published ones."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Literal, get_args

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from onegpu.adapters import DataError, RecipeError
from onegpu.adapters.errors import nearest

from .pairs import References, reference_lists

__all__ = ["Tokeniser", "translation_scores"]

Tokeniser = Literal["13a", "zh", "char"]
"""How BLEU finds words: `13a` at spaces and punctuation, `zh` for Chinese, `char` for any script without spaces."""


def translation_scores(
    predictions: Sequence[str], references: References, *, tokeniser: Tokeniser = "13a"
) -> dict[str, float]:
    """BLEU (https://aclanthology.org/P02-1040) and chrF (https://aclanthology.org/W15-3049) of a whole corpus.

    Args:
        predictions: one translation per text.
        references: the right translation of each, or several.
        tokeniser: for BLEU; chrF compares characters and needs none.

    Returns:
        bleu and chrf, in sacrebleu's 0 to 100.

    Raises:
        DataError: no predictions, not as many references, a text without any.
        RecipeError: no such tokeniser.
    """
    if tokeniser not in get_args(Tokeniser):
        raise RecipeError(f"no tokeniser {tokeniser!r}{nearest(tokeniser, get_args(Tokeniser))}")
    valid = reference_lists(predictions, references)
    if [] in valid:
        raise DataError(f"text {valid.index([])} has no reference translation")
    columns = list(zip_longest(*valid))  # (references, texts), None where a text has fewer; sacrebleu leaves it out
    bleu = BLEU(
        tokenize=tokeniser, force=True
    )  # else it logs a guess at each evaluation, about answers that end in " ."
    return {
        "bleu": float(bleu.corpus_score(predictions, columns).score),
        "chrf": float(CHRF().corpus_score(predictions, columns).score),
    }
