"""Questions whose answers stand in a text, in the form of SQuAD (https://arxiv.org/abs/1606.05250).

One row: {"question": "Extract the Population Demographic information from the provided abstract.",
"context": "... in 37 healthy adults ...", "answers": {"text": ["healthy adults"], "answer_start": [10]}}
"""

from collections.abc import Iterator

from .archives import Archive
from .choosing import Row

__all__ = ["populations"]

POPULATIONS = "evals/registry/data/population_span_extraction/samples.jsonl"
INTRODUCTION = "In the abstract, population demographics are defined by the following spans: "


def populations(archive: Archive) -> Iterator[Row]:
    """Who took part in a clinical trial, by its abstract. Where several spans say it, each counts as an answer."""
    for sample in archive.objects(POPULATIONS):
        question, abstract = (message["content"] for message in sample["input"])
        yield {"question": question, "context": abstract, "answers": _answers(sample["ideal"], abstract)}


def _answers(ideal: str, context: str) -> dict[str, list[str] | list[int]]:
    texts = _quoted(ideal, context)
    starts: list[int] = []
    for text in texts:
        after = starts[-1] + 1 if starts else 0
        start = context.find(text, after)
        starts.append(start if start >= 0 else context.index(text))  # spans are mostly, not always, in order
    return {"text": texts, "answer_start": starts}


def _quoted(ideal: str, context: str) -> list[str]:
    """The spans of `...: 'one', 'other'`, without white space around them; one may hold quotes itself."""
    listed = ideal.removeprefix(INTRODUCTION)
    if listed == ideal or len(listed) < 3 or not listed[0] == listed[-1] == "'":
        raise ValueError(f"not a list of spans: {ideal!r}")
    whole = listed[1:-1]
    return [span.strip() for span in ([whole] if whole in context else whole.split("', '"))]
