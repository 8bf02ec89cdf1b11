"""What a run says while it runs: lines, and a progress bar on a terminal."""

import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["Display", "human_bytes"]

LABEL_WIDTH = 10
LINES_WITHOUT_TERMINAL = 10  # progress lines of a run whose output goes to a file


class Display:
    """Speaks for one process; only the main one is given a voice."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=False)
        self._progress: Progress | None = None

    def line(self, label: str, text: str) -> None:
        """One fact: a label in a column of its own, then text; a terminal wraps it beside the label."""
        parts = text.splitlines() or [""]
        if self.console.is_terminal:
            width = max(20, self.console.width - LABEL_WIDTH)
            parts = [wrapped for part in parts for wrapped in textwrap.wrap(part, width) or [""]]
        body = f"\n{'':<{LABEL_WIDTH}}".join(parts)
        self.console.print(f"[bold]{escape(f'{label:<{LABEL_WIDTH}}')}[/bold]{escape(body)}", soft_wrap=True)

    @contextmanager
    def training(self, steps: int, done: int) -> Iterator["Steps"]:
        """A bar with loss, learning rate, tokens a second and time left."""
        if not self.console.is_terminal:
            yield Steps(self, steps, None, None)
            return
        columns = (
            BarColumn(None),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=self.console, expand=True, refresh_per_second=2) as progress:
            yield Steps(self, steps, progress, progress.add_task("", total=steps, completed=done))


class Steps:
    """Progress through the steps of a run."""

    def __init__(self, display: Display, steps: int, progress: Progress | None, task: TaskID | None) -> None:
        self._display = display
        self._steps = steps
        self._progress = progress
        self._task = task

    def advance(self, record: Mapping[str, Any]) -> None:
        """Show the record of a step."""
        speed = record["tokens"] / max(record["seconds"], 1e-9)
        text = f"loss {record['loss']:.4f}  lr {record['learning_rate']:.1e}  {speed:,.0f} tok/s"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=record["step"], description=text)
        elif record["step"] % max(1, self._steps // LINES_WITHOUT_TERMINAL) == 0 or record["step"] == self._steps:
            left = (self._steps - record["step"]) * record["seconds"]
            self._display.line(f"step {record['step']}", f"{text}  {left:.0f} s left")


def human_bytes(count: float) -> str:
    """Bytes in the unit that a reader expects, powers of ten."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
