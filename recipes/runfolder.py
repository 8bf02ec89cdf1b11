"""The folder of a run. This file alone knows the names in it.

recipe.yaml          the recipe as resolved
adapter/             the result
metrics.jsonl        one object per optimiser step and per evaluation
checkpoints/step-NNNNNN/   to resume from
checkpoints/best-NNNNNN/   the adapter of the best evaluation
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from difflib import unified_diff
from pathlib import Path
from typing import Any

from onegpu.adapters import RecipeError
from onegpu.adapters.files import write_text

__all__ = ["RunFolder", "adapter_folder"]

KEPT_CHECKPOINTS = 2


class RunFolder:
    """Paths and records of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.adapter = self.path / "adapter"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the result was written, which happens last."""
        return (self.adapter / "manifest.json").is_file()

    def open(self, recipe: str, *, resume: bool) -> None:
        """Make the folder, or check that it holds a run of the same recipe to resume.

        Raises:
            RecipeError: the folder is in use, or its run has another recipe.
        """
        self.check(recipe, resume=resume)
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.recipe, recipe)

    def check(self, recipe: str, *, resume: bool) -> None:
        """`open` without writing."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not resume:
            raise RecipeError(f"{self.path} exists already; give another folder with -o, or go on with --resume")
        if not self.recipe.is_file():
            raise RecipeError(f"{self.path} is not the folder of a run: it has no recipe.yaml")
        changed = _changed_lines(self.recipe.read_text("utf-8"), recipe)
        if changed:
            raise RecipeError(
                f"{self.path} holds a run of another recipe, so it cannot be resumed with this one:\n{changed}"
            )

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.checkpoints / f"step-{step:06d}"

    def latest_checkpoint(self) -> Path | None:
        """The last complete one; a half-written one has another name."""
        return max(self.checkpoints.glob("step-*"), default=None)

    def best(self, step: int) -> Path:
        """Where the adapter of an evaluation lies that was the best so far."""
        return self.checkpoints / f"best-{step:06d}"

    def drop_old_checkpoints(self) -> None:
        """Keep the last two, and of the best adapters those that a run resumed from either would want."""
        steps = sorted(self.checkpoints.glob("step-*"))
        for old in steps[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)
        bests = sorted(self.checkpoints.glob("best-*"))
        before = [best for best in bests if _number(best) <= min(map(_number, steps[-KEPT_CHECKPOINTS:]))]
        for old in before[:-1]:
            shutil.rmtree(old)

    def record(self, **values: Any) -> None:
        """Append one line to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def records(self) -> Iterator[Mapping[str, Any]]:
        """The recorded lines, without a last one that was cut off."""
        if self.metrics.is_file():
            for line in self.metrics.read_text("utf-8").splitlines():
                try:
                    yield json.loads(line)
                except ValueError:
                    return

    def rewind(self, step: int) -> None:
        """Forget what was recorded after `step`, which will be done again: from 0 on, the first evaluation too."""
        kept = [record for record in self.records() if record["step"] <= step and step > 0]
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))


def adapter_folder(folder: Path) -> Path:
    """The adapter folder that is meant by the folder of a run, or by itself."""
    run = RunFolder(folder)
    return run.adapter if run.adapter.is_dir() else folder


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _changed_lines(before: str, after: str) -> str:
    lines = list(unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0))[2:]  # without its headers
    return "\n".join([f"  {line[0]} {line[1:].strip()}" for line in lines if line[0] in "+-"][:10])
