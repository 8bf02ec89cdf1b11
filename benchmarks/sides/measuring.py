"""What every side of `speed.py` is told, and how it measures itself.

Python's own library and torch only: each side runs in an environment of its own.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__all__ = ["DTYPES", "LONGEST", "Told", "now", "peak", "play", "resident", "told"]

LONGEST = 512  # tokens of a row
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Told:
    """What all sides have in common; `prepare.py` writes it."""

    place: Path  # a folder of this comparison
    model: str  # folder of the base, as transformers reads it
    base: int  # bytes of its tensors
    data: str
    tokens: int  # of all steps
    steps: int
    precision: str  # fp32, bf16
    effective: int  # rows a step
    micro: int  # rows a pass, of those that do not pack
    rank: int
    alpha: int
    rate: float  # at the first step; it falls to zero in a line

    @property
    def start(self) -> Path:
        """The adapter that all sides start from, as PEFT writes it."""
        return self.place / "start"

    def rows(self) -> list[dict[str, list[int]]]:
        """`input_ids` and `labels` of each row, in the order of the steps."""
        found: list[dict[str, list[int]]] = json.loads((self.place / "rows.json").read_text("utf-8"))
        return found


def told(place: Path) -> Told:
    """What `prepare.py` wrote."""
    return Told(place=place, **json.loads((place / "told.json").read_text("utf-8")))


def play(side: Callable[..., dict[str, Any]], *packages: str) -> None:
    """Run a side: `python SIDE.py PLACE [SETTINGS]`; what it found is left in PLACE, with the versions of packages.

    Args:
        side: called with `Told`, and the settings as keywords; returns the `seconds` and `losses` of each step and the
            `peak` of memory, up to the end of the last step, above what was held before the model.
    """
    place, settings = Path(sys.argv[1]), json.loads((sys.argv[2:] or ["{}"])[0])
    found = side(told(place), **settings)
    found["versions"] = {name: version(name) for name in ("torch", *packages)}
    (place / "found.json").write_text(json.dumps(found), "utf-8")


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def resident() -> int:
    """Bytes that are held now: of the device, or on a CPU of this process."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Bytes that were held at most."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
