"""Loads a saved adapter in a process that knows nothing of it, as its user would, and reports what it computes.

A process of our own, which has imported torch and transformers but no adapter, forks for each question: an answer takes
milliseconds, and nothing of the adapter's package is there but what loading the folder imports. Questions and answers
are lines of JSON; logits come back in a safetensors file.
"""

import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  # imported before any question, like all that is slow and no adapter's own
import peft  # noqa: F401
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import artefact
from ..specs import Spec
from . import tiny_models
from .tiny_models import Family

__all__ = ["logits_of_loaded", "scratch"]

START = f"import sys, json; sys.path[:] = json.loads(sys.argv[1]); import {__name__} as f; f.serve()"


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="onegpu-conformance-") as folder:
        yield Path(folder)


def logits_of_loaded(folder: Path, family: Family, stack: list[Spec]) -> Tensor:
    """What a fresh base with the adapter of a folder gives for all rows, computed in another process.

    Args:
        stack: what the base is read with; of the adapter, the other process is told the folder only.

    Raises:
        AssertionError: it could not be loaded there; with the reason.
    """
    with scratch() as place:
        question = {
            "folder": str(folder),
            "family": family,
            "base": tiny_models.place(family),
            "stack": stack,
            "threads": torch.get_num_threads(),
            "path": sys.path,
            "result": str(place / "logits"),
        }
        fault = _ask(question)
        assert not fault, f"it cannot be loaded in a fresh process: {fault}"
        return load_file(place / "logits")["logits"]


def _ask(question: Mapping[str, Any]) -> str:
    """What went wrong in the other process; empty for nothing."""
    server = _server() if _forks() else _started()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(question) + "\n")
    server.stdin.flush()
    line = server.stdout.readline()
    if not _forks():
        server.stdin.close()
        server.wait()
    assert line, "the process that loads what was saved has ended"
    answer: str = json.loads(line)
    return answer


@cache
def _server() -> "subprocess.Popen[str]":
    return _started()


def _started() -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", START, json.dumps(sys.path)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    weakref.finalize(server, _end, server)
    return server


def _end(server: "subprocess.Popen[str]") -> None:
    server.communicate()  # it ends with its input


def _forks() -> bool:
    return sys.platform != "win32"


def serve() -> None:
    """Answer questions until there are no more; each in a fork, where the system has forks."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed is not an answer
    for line in sys.stdin:
        fault = _in_a_fork(json.loads(line)) if _forks() else _answer(json.loads(line))
        answers.write(json.dumps(fault) + "\n")
        answers.flush()


def _in_a_fork(question: Mapping[str, Any]) -> str:
    result = Path(question["result"])
    child = os.fork()
    if child == 0:
        try:
            result.with_suffix(".fault").write_text(_answer(question), "utf-8")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    fault = result.with_suffix(".fault")
    return fault.read_text("utf-8") if fault.is_file() else "the process died"


def _answer(question: Mapping[str, Any]) -> str:
    sys.path[:] = question["path"]
    torch.set_num_threads(question["threads"])
    family: Family = question["family"]
    try:
        model = tiny_models.load(family, question["stack"], folder=question["base"])
        loaded = artefact.load(model, question["folder"])
        found = tiny_models.logits(loaded.model, tiny_models.batch(family))
        save_file({"logits": found.contiguous()}, question["result"])
    except Exception as cause:  # reported to the process that asked
        return f"{type(cause).__name__}: {cause}"
    return ""
