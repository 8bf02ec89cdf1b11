"""What every side of `speed.py` is told, and how it measures itself.

Python's own library only: each side runs in an environment of its own.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["LONGEST", "Told", "play", "resident"]

LONGEST = 512  # tokens of a row


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


def play(side: Callable[..., dict[str, Any]]) -> None:
    """Run a side: `python SIDE.py PLACE [SETTINGS]`; what it found is left in PLACE.

    Args:
        side: called with `Told`, and the settings as keywords; returns the `seconds` and `losses` of each step and the
            `peak` of memory above what the process held before the model.
    """
    place, settings = Path(sys.argv[1]), json.loads((sys.argv[2:] or ["{}"])[0])
    found = side(told(place), **settings)
    (place / "found.json").write_text(json.dumps(found), "utf-8")


def resident() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Bytes that it held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
