"""Scores of entities in tagged sentences, by seqeval.

A sentence: ["O", "B-PER", "I-PER", "O", "B-LOC"]. An entity counts as found where its type and its extent are right.
"""

import re
from collections.abc import Sequence
from itertools import groupby

from seqeval.metrics.sequence_labeling import accuracy_score, get_entities, precision_recall_fscore_support

from onegpu.adapters import DataError

from .pairs import check_pairs

__all__ = ["as_bio", "entity_scores", "is_bio"]

TAG = re.compile(r"O|[BIES]-.+", re.DOTALL)


def entity_scores(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of entities over all sentences, read as conlleval does: an I- that continues nothing begins an entity.

    Without any entity, predicted or true, every score but the accuracy is 0.0.

    Args:
        true: the tags of each sentence, with B- and I- (E- and S- are understood); see `as_bio` for plain ones.
        predicted: the same, as predicted.

    Returns:
        precision, recall, f1 (over all entities), macro_f1 (the mean over the types that occur in `true` or
        `predicted`), f1.TYPE for each of these, and accuracy (the share of right tags); all from 0 to 1.

    Raises:
        DataError: no sentences or no tags, unequal lengths, a tag of another scheme.
    """
    true, predicted = [list(tags) for tags in true], [list(tags) for tags in predicted]
    _check_sentences(true, predicted)
    found = {entity[0] for entity in (*get_entities(true), *get_entities(predicted))}
    micro = precision_recall_fscore_support(true, predicted, average="micro", zero_division=0)[:3]
    by_type = precision_recall_fscore_support(true, predicted, average=None, zero_division=0)[2]
    return {
        **{name: float(score) for name, score in zip(("precision", "recall", "f1"), micro, strict=True)},
        "macro_f1": float(sum(by_type) / max(len(by_type), 1)),
        "accuracy": float(accuracy_score(true, predicted)),
        **{f"f1.{name}": float(score) for name, score in zip(sorted(found), by_type, strict=True)},
    }


def is_bio(tags: Sequence[str]) -> bool:
    """Whether every tag is "O", or says with B- or I- (E- or S-) where in an entity of which type it stands."""
    return all(map(TAG.fullmatch, tags))


def as_bio(tags: Sequence[str]) -> list[str]:
    """Plain tags as B- and I- tags, "O" as it is: each run of one tag is one entity.

    Two entities of one type that touch cannot be told apart in plain tags; they become one.
    """
    runs = [(tag, len(list(run))) for tag, run in groupby(tags)]
    return [one for tag, length in runs for one in _entity(tag, length)]


def _entity(tag: str, length: int) -> list[str]:
    return ["O"] * length if tag == "O" else [f"B-{tag}", *[f"I-{tag}"] * (length - 1)]


def _check_sentences(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> None:
    check_pairs(true, predicted, what="sentences")
    for number, (tags, others) in enumerate(zip(true, predicted, strict=True)):
        if len(tags) != len(others):
            raise DataError(f"sentence {number}: {len(others)} predicted tags, {len(tags)} true ones")
        wrong = [tag for tag in (*tags, *others) if not is_bio([tag])]
        if wrong:
            raise DataError(f"sentence {number}: {wrong[0]!r} is neither 'O' nor begins with 'B-' or 'I-' (see as_bio)")
    if not any(map(len, true)):
        raise DataError("no tags to score: every sentence is empty")
