"""Conversations, and pairs of a better and a worse answer.

One row: {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
Of pairs: {"prompt": "When light speeds up it is more likely to", "chosen": " bend", "rejected": " stay straight"}
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from .archives import Archive
from .choosing import Row, undisputed

__all__ = ["chitchat", "chitchat_short", "logiqa", "quartz", "quartz_preference"]

QUARTZ = "evals/registry/data/quartz/samples.jsonl"
LOGIQA = "evals/registry/data/logiqa/logiqa.jsonl"
OPTIONS = re.compile(r"(.+?)\s*\n\s*A:\s*(.+?)\s*\n\s*B:\s*(.+?)\s*", re.DOTALL)  # question, first, second


def chitchat(archive: Archive) -> Iterator[Row]:
    """Whole conversations."""
    return ({"messages": turns} for turns in _dialogues(archive) if turns)


def chitchat_short(archive: Archive) -> Iterator[Row]:
    """The first four turns, where they are between 80 and 240 characters long."""
    for turns in _dialogues(archive):
        first = turns[:4]
        length = sum(len(turn["content"]) for turn in first)
        if len(first) == 4 and 80 <= length <= 240 and all(turn["content"] for turn in first):
            yield {"messages": first}


def _dialogues(archive: Archive) -> Iterator[list[dict[str, str]]]:
    """Conversations between two people: who opens is the user, who replies the assistant."""
    for conversation in json.loads(archive.text("chitchat_dataset/dataset.json")).values():
        turns = []
        for number, block in enumerate(conversation["messages"]):
            text = "\n".join(message["text"].strip() for message in block)
            turns.append({"role": "assistant" if number % 2 else "user", "content": text})
        yield turns[: len(turns) // 2 * 2]  # end with a reply


def quartz(archive: Archive) -> Iterator[Row]:
    """Multiple-choice questions on qualitative physics; the answer is a letter."""
    return _answered(archive, QUARTZ)


def logiqa(archive: Archive) -> Iterator[Row]:
    """A passage, a question and four options; the answer is a letter. The package has every question twice."""
    return _answered(archive, LOGIQA)


def _answered(archive: Archive, member: str) -> Iterator[Row]:
    for sample in archive.objects(member):
        yield {"messages": [*sample["input"], _reply(sample["ideal"])]}


def quartz_preference(archive: Archive) -> list[Row]:
    """The right option against the wrong one in words, without the questions that the package answers both ways."""
    questions = undisputed(archive.objects(QUARTZ), lambda sample: json.dumps(sample["input"]))
    return [_pair(sample["input"][-1]["content"], sample["ideal"]) for sample in questions]


def _pair(asked: str, right: str) -> Row:
    found = OPTIONS.fullmatch(asked)
    if found is None or right not in ("A", "B"):
        raise ValueError(f"a question with the options A and B and one of them as its answer, not {asked!r}: {right!r}")
    question, first, second = found.groups()
    chosen, rejected = (first, second) if right == "A" else (second, first)
    return {"prompt": question, "chosen": f" {chosen}", "rejected": f" {rejected}"}


def _reply(content: Any) -> dict[str, str]:
    if not isinstance(content, str):
        raise TypeError(f"an answer is text, not {content!r}")
    return {"role": "assistant", "content": content}
