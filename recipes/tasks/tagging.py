"""`tagging`: a tag for every word: names, places, parts of an address, parts of speech.

    scheme: bio      {"tokens": ["Ada", "Lovelace", "saw", "Rome"], "tags": ["B-PER", "I-PER", "O", "B-LOC"]}
    scheme: plain    {"tokens": ["Ada", "Lovelace", "saw", "Rome"], "tags": ["PER", "PER", "O", "LOC"]}
    Chinese          {"tokens": ["他", "在", "北", "京"], "tags": ["O", "O", "B-LOC", "I-LOC"]}

A word that the tokenizer cuts into pieces is judged by its first piece. Rows above `max_length` are read in windows
that overlap, and each word is judged in the window where it has most context, in training as in evaluation. Scores are
over all words of the rows: one of which the tokenizer makes nothing counts as predicted "O".
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F

from onegpu.adapters import DataError, RecipeError

from ..metrics.entities import as_bio, entity_scores, is_bio
from ..metrics.scripts import UNSPACED
from .contract import (
    IGNORED,
    Batch,
    Direction,
    Example,
    Labels,
    Objective,
    Predictions,
    PredictiveTask,
    Reader,
    Row,
    RowProblem,
    attention_mask,
    padded,
)
from .lengths import OVERLAP, refuse_too_long
from .tokens import own_logits

__all__ = ["Tagging", "TaggingExample"]

OUTSIDE = "O"
NOWHERE = -1  # the place of a word of which the tokenizer makes nothing, and the tag predicted for it


@dataclass(frozen=True)
class TaggingExample(Example):
    """A row, or one window of it; three lists say of the words that are judged in this window:"""

    words: list[int] = field(default_factory=list)  # their numbers in the row
    places: list[int] = field(default_factory=list)  # where in `ids` the first piece of each stands, or NOWHERE
    tags: list[int] = field(default_factory=list)  # the true tag of each


class Outcome(NamedTuple):
    """What an evaluation keeps of an example."""

    row: int
    words: list[int]
    true: list[int]
    predicted: list[int]


class Pieces(NamedTuple):
    """A row as the tokenizer has it."""

    before: list[int]  # special tokens
    words: dict[int, list[int]]  # number of a word -> its tokens, in order; without those that have none
    after: list[int]


class Tagging(PredictiveTask):
    """Fine-tune a tagger; the head is trained and saved with the adapter."""

    api = 1
    kind = "token-classification"
    example = TaggingExample
    has_head = True
    needs = ("tokens", "tags")

    scheme: Literal["bio", "plain"] = "bio"
    """How tags are written: `bio` (B-PER, I-PER, O), or `plain` (PER, O), where a run of one tag is one entity."""

    supervise: Literal["first", "all"] = "first"
    """The loss is on the first piece of each word, or on all of them."""

    too_long: Literal["error", "drop", "window"] = "window"
    """What to do with a row above `max_length`."""

    def measures(self) -> dict[str, Direction]:
        return {"f1": "higher", "precision": "higher", "recall": "higher", "accuracy": "higher"}

    def directions(self, labels: Labels) -> dict[str, Direction]:
        names = ["macro_f1", *(f"f1.{name}" for name in self._types(labels or ()))]
        return super().directions(labels) | dict.fromkeys(names, "higher")

    # --- before training ----------------------------------------------------------------------------------------------

    def labels(self, rows: Iterable[Row]) -> Labels:
        """The tags of the rows, "O" first, the others sorted: the order of the head's outputs."""
        found: set[str] = set()
        for row in rows:
            with suppress(RowProblem):
                found.update(_tagged(row)[1])
        names = sorted(found, key=lambda tag: (tag != OUTSIDE, tag))
        self._check_scheme(names)
        if len(names) < 2:
            alone = repr(names[0]) if names else "nothing"
            raise DataError(f"tagging needs at least two tags, and every word of every row says {alone}")
        return names

    def _check_scheme(self, names: Sequence[str]) -> None:
        if self.scheme == "bio" and not is_bio(names):
            wrong = next(name for name in names if not is_bio([name]))
            raise DataError(
                f"the tag {wrong!r} is neither 'O' nor begins with 'B-' or 'I-': set `scheme: plain` for plain tags"
            )
        if self.scheme == "plain" and set(names) - {OUTSIDE} and is_bio(names):
            raise DataError(f"all tags are BIO tags, such as {names[-1]!r}: set `scheme: bio`")

    def encode(self, number: int, row: Row, reader: Reader) -> Sequence[TaggingExample]:
        texts, names = _tagged(row)
        tags = _numbered(names, reader.labels or ())
        pieces = _pieces(reader.tokenizer, texts)
        framing = len(pieces.before) + len(pieces.after)
        length = framing + sum(map(len, pieces.words.values()))
        refuse_too_long(length, reader.limit, self.too_long, ("error", "drop", "window"))
        room = reader.limit - framing
        if room < 1:
            raise RecipeError(f"max_length is {reader.limit}, and special tokens leave no room for a word")
        # No window has room for a longer word; its first piece, which is judged, stays.
        fitting = pieces._replace(words={word: ids[:room] for word, ids in pieces.words.items()})
        cut = length - framing - sum(map(len, fitting.words.values()))
        windows = _windows(fitting.words, room)
        lost = [word for word in range(len(texts)) if word not in fitting.words]
        first, *others = [self._window(number, fitting, window, tags) for window in windows]
        return [_with_lost(first, lost, tags, cut), *others]

    def _window(self, number: int, pieces: Pieces, window: Mapping[int, bool], tags: Sequence[int]) -> TaggingExample:
        """One window; of its words, those marked True are judged here."""
        ids, labels, places = [*pieces.before], [IGNORED] * len(pieces.before), []
        for word, judged in window.items():
            piece = pieces.words[word]
            if judged:
                places.append(len(ids))
            supervised = len(piece) if self.supervise == "all" else 1
            ids += piece
            labels += [tags[word] if judged and i < supervised else IGNORED for i in range(len(piece))]
        words = [word for word, judged in window.items() if judged]
        return TaggingExample(
            row=number,
            ids=[*ids, *pieces.after],
            labels=[*labels, *[IGNORED] * len(pieces.after)],
            words=words,
            places=places,
            tags=[tags[word] for word in words],
        )

    # --- a step -------------------------------------------------------------------------------------------------------

    def collate(self, examples: Sequence[Example], pad: int) -> Batch:
        windows = cast("Sequence[TaggingExample]", examples)
        return {
            "input_ids": padded([window.ids for window in windows], pad),
            "attention_mask": attention_mask(windows),
            "labels": padded([window.labels for window in windows], IGNORED),
            # Of the judged words, for evaluation: (batch, most words), filled up with IGNORED.
            "rows": torch.tensor([window.row for window in windows]),  # (batch,)
            "words": padded([window.words for window in windows], IGNORED),
            "places": padded([window.places for window in windows], IGNORED),
            "tags": padded([window.tags for window in windows], IGNORED),
        }

    def predictions(self, model: nn.Module, batch: Batch) -> Predictions:
        return own_logits(model, batch)

    def judge(self, found: Predictions, batch: Batch) -> Objective:
        """Summed cross-entropy of the supervised pieces, in float32; the weight is how many there are."""
        loss = F.cross_entropy(found.logits, found.targets, reduction="sum")

        def outcomes() -> Sequence[Outcome]:
            labels = batch["labels"]  # (batch, tokens)
            columns = (batch[name].tolist() for name in ("rows", "words", "places", "tags"))
            # Every judged word has its first piece supervised, so nobody looks at the other places.
            said = labels.masked_scatter(labels != IGNORED, found.logits.detach().argmax(-1)).tolist()
            return [_outcome(*parts) for parts in zip(*columns, said, strict=True)]

        return Objective(loss, float(len(found.targets)), outcomes)

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def explain(self, example: Example, reader: Reader) -> list[tuple[str, str | None]]:
        assert isinstance(example, TaggingExample)
        assert reader.labels is not None
        starts = {place: tag for place, tag in zip(example.places, example.tags, strict=True) if place != NOWHERE}
        edges = [0, *sorted(starts), len(example.ids)]
        cut = [(start, reader.tokenizer.decode(example.ids[start:end])) for start, end in pairwise(edges)]
        return [(f"{text} ", reader.labels[starts[start]] if start in starts else None) for start, text in cut if text]

    def scores(self, outcomes: Sequence[Any], answers: Sequence[Any], reader: Reader) -> dict[str, float]:
        """Of whole entities, over all words of the rows; see `entity_scores`. A type that occurs nowhere has 0.0."""
        rows: dict[int, dict[int, tuple[int, int]]] = defaultdict(dict)  # row -> word -> (true, predicted)
        for outcome in outcomes:
            pairs = zip(outcome.true, outcome.predicted, strict=True)
            rows[outcome.row].update(zip(outcome.words, pairs, strict=True))
        sentences = [[words[word] for word in sorted(words)] for _, words in sorted(rows.items())]
        true = [self._named([tag for tag, _ in words], reader) for words in sentences]
        predicted = [self._named([tag for _, tag in words], reader) for words in sentences]
        return {f"f1.{name}": 0.0 for name in self._types(reader.labels or ())} | entity_scores(true, predicted)

    def _types(self, labels: Sequence[str]) -> list[str]:
        """The kinds of entities among the tags."""
        tags = [tag for tag in labels if tag != OUTSIDE]
        return list(dict.fromkeys(tag[2:] for tag in tags)) if self.scheme == "bio" else tags

    def _named(self, tags: Sequence[int], reader: Reader) -> list[str]:
        names = [OUTSIDE if tag == NOWHERE else (reader.labels or ())[tag] for tag in tags]
        return names if self.scheme == "bio" else as_bio(names)


def _tagged(row: Row) -> tuple[list[str], list[str]]:
    """Words and tags of a row; tags may be numbers."""
    words, tags = row["tokens"], row["tags"]
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise RowProblem("`tokens` is no list of words")
    if not isinstance(tags, list) or not all(isinstance(tag, str | int) for tag in tags):
        raise RowProblem("`tags` is no list of tags")
    if not words:
        raise RowProblem("no words")
    if len(words) != len(tags):
        raise RowProblem("not as many tags as words")
    return words, list(map(str, tags))


def _numbered(tags: Sequence[str], labels: Sequence[str]) -> list[int]:
    numbers = {name: number for number, name in enumerate(labels)}
    for tag in tags:
        if tag not in numbers:
            raise RowProblem(f"its tag {tag!r} is not among the training rows'")
    return [numbers[tag] for tag in tags]


def _pieces(tokenizer: Any, words: Sequence[str]) -> Pieces:
    if not tokenizer.is_fast:
        raise RecipeError("tagging needs a fast tokenizer, which tells the word of each token; this base has none")
    encoded = tokenizer(_spaced(words), is_split_into_words=True, verbose=False)
    ids, owners = encoded["input_ids"], encoded.word_ids()  # per token: the number of its word, None for a special one
    owned = [i for i, owner in enumerate(owners) if owner is not None]
    if not owned:
        raise RowProblem("words of which the tokenizer makes nothing")
    found: dict[int, list[int]] = defaultdict(list)
    for i in owned:
        found[owners[i]].append(ids[i])
    return Pieces(ids[: owned[0]], dict(found), ids[owned[-1] + 1 :])


def _spaced(words: Sequence[str]) -> list[str]:
    """Words with the space before them that a text would have.

    A tokenizer of bytes (GPT-2's) has other tokens for the beginning of a word than for its middle, and would read
    words without spaces as one; to all others a space says nothing. Scripts without spaces get none.
    """
    spaced = list(words[:1])
    for before, word in pairwise(words):
        joined = not word or UNSPACED.search(before[-1:]) or UNSPACED.search(word[:1])
        spaced.append(word if joined else f" {word}")
    return spaced


def _windows(words: Mapping[int, Sequence[int]], room: int) -> list[dict[int, bool]]:
    """Windows of at most `room` tokens over a row: in each, its words, and whether they are judged there."""
    numbers, lengths = list(words), [len(ids) for ids in words.values()]
    spans = _spans(lengths, room)
    ends = [0, *accumulate(lengths)]  # tokens before each word
    judged: dict[int, tuple[int, int]] = {}  # word -> (its context there in tokens, the span where it is judged)
    for which, span in enumerate(spans):
        for i in span:
            context = min(ends[i] - ends[span.start], ends[span.stop] - ends[i + 1])
            if i not in judged or context > judged[i][0]:
                judged[i] = (context, which)
    marked = [{numbers[i]: judged[i][1] == which for i in span} for which, span in enumerate(spans)]
    return [window for window in marked if any(window.values())]


def _spans(lengths: Sequence[int], room: int) -> list[range]:
    """Runs of words that fit into `room` tokens; each repeats about a quarter of the one before it, for context."""
    spans, start = [], 0
    while True:
        stop, used = start, 0
        while stop < len(lengths) and used + lengths[stop] <= room:
            used += lengths[stop]
            stop += 1
        spans.append(range(start, stop))
        if stop == len(lengths):
            return spans
        # What is repeated leaves room for the word that comes next, so that each window has a new one.
        left = min(room // OVERLAP, room - lengths[stop])
        start = stop
        while lengths[start - 1] <= left:
            start -= 1
            left -= lengths[start]


def _with_lost(first: TaggingExample, lost: Sequence[int], tags: Sequence[int], cut: int) -> TaggingExample:
    """The first window of a row, with the words that have no tokens, and the tokens that were cut."""
    return TaggingExample(
        row=first.row,
        ids=first.ids,
        labels=first.labels,
        cut=cut,
        words=[*first.words, *lost],
        places=[*first.places, *[NOWHERE] * len(lost)],
        tags=[*first.tags, *[tags[word] for word in lost]],
    )


def _outcome(row: int, words: list[int], places: list[int], tags: list[int], said: Sequence[int]) -> Outcome:
    """Of one example; `said` is what is predicted for each of its tokens."""
    count = sum(word != IGNORED for word in words)
    predicted = [NOWHERE if place == NOWHERE else said[place] for place in places[:count]]
    return Outcome(row, words[:count], tags[:count], predicted)
