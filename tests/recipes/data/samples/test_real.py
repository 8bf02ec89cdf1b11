"""The real packages, about 105 MB, downloaded into the user's cache where they are not there yet."""

import json
from itertools import pairwise
from typing import Any

import pytest

from onegpu.recipes.data.samples import SAMPLES, sample_rows

Row = dict[str, Any]

COUNTS = {
    "chitchat": 4012,
    "chitchat-short": 1604,
    "quartz": 3860,
    "logiqa": 677,
    "quartz-preference": 3828,
    "sarcasm": 28498,
    "topics": 2092,
    "chinese-sentiment": 17363,
    "finance-entities": 1141,
    "addresses": 1488,
    "chinese-entities": 18994,
    "populations": 497,
    "interface-de": 1457,
    "interface-zh": 2950,
    "headlines": 2092,
}
CLASSES = {
    "sarcasm": {"sarcastic", "sincere"},
    "topics": {"business", "entertainment", "politics", "sports", "tech"},
    "chinese-sentiment": {"pos", "neg"},
    "finance-entities": {"PER", "ORG", "LOC"},
    "chinese-entities": {"PER", "ORG", "LOC"},
}


def _check_conversation(row: Row) -> None:
    assert set(row) == {"messages"}
    _check_messages(row["messages"])
    assert row["messages"][-1]["role"] == "assistant"


def _check_messages(messages: list[dict[str, str]]) -> None:
    assert messages
    for message in messages:
        assert set(message) == {"role", "content"}
        assert message["role"] in {"system", "user", "assistant"}
        assert isinstance(message["content"], str)


def _check_pair(row: Row) -> None:
    assert set(row) == {"prompt", "chosen", "rejected"}
    assert all(text.strip() for text in row.values())
    assert "A:" not in row["prompt"]
    assert row["chosen"] != row["rejected"]


def _check_labelled(row: Row) -> None:
    assert set(row) == {"text", "label"}
    assert row["text"].strip()


def _check_tagged(row: Row) -> None:
    assert set(row) == {"tokens", "tags"}
    assert len(row["tokens"]) == len(row["tags"]) > 0
    assert all(token and not any(map(str.isspace, token)) for token in row["tokens"])
    for before, tag in pairwise(["O", *row["tags"]]):
        assert tag == "O" or tag[:2] in {"B-", "I-"}
        assert not tag.startswith("I-") or before[2:] == tag[2:]


def _check_answered(row: Row) -> None:
    assert set(row) == {"question", "context", "answers"}
    texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
    assert len(texts) == len(starts) > 0
    for text, start in zip(texts, starts, strict=True):
        assert text.strip() == text != ""
        assert row["context"][start : start + len(text)] == text


def _check_translated(row: Row) -> None:
    assert set(row) == {"source", "target"}
    assert row["source"].strip() == row["source"] != ""
    assert row["target"].strip() == row["target"] != ""
    assert row["target"] not in {row["source"], ""}


def _check_summary(row: Row) -> None:
    _check_translated(row)
    assert row["target"] not in row["source"]
    assert "\n" not in row["target"]
    assert "Â" not in row["source"] + row["target"]


CHECKS = (
    dict.fromkeys(("chitchat", "chitchat-short", "quartz", "logiqa"), _check_conversation)
    | dict.fromkeys(("sarcasm", "topics", "chinese-sentiment"), _check_labelled)
    | dict.fromkeys(("finance-entities", "addresses", "chinese-entities"), _check_tagged)
    | dict.fromkeys(("interface-de", "interface-zh"), _check_translated)
    | {"quartz-preference": _check_pair, "populations": _check_answered, "headlines": _check_summary}
)


def _classes(rows: list[Row]) -> set[str]:
    """Classes, or kinds of spans, of rows that have any."""
    return {row["label"] for row in rows if "label" in row} | {
        tag[2:] for row in rows for tag in row.get("tags", ()) if tag != "O"
    }


def test_every_sample_is_counted_and_checked_below() -> None:
    assert set(COUNTS) == set(CHECKS) == set(SAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_the_real_rows_are_as_promised(name: str) -> None:
    rows = sample_rows(name)
    assert len(rows) == len({json.dumps(row, sort_keys=True) for row in rows}) == COUNTS[name]
    for row in rows:
        CHECKS[name](row)
    assert _classes(rows[:100]) == _classes(rows) >= CLASSES.get(name, set())
    assert len(_classes(rows)) == (29 if name == "addresses" else len(CLASSES.get(name, ())))
