"""The folder of a run. This file alone knows the names in it.

recipe.yaml          the recipe as resolved
adapter/             the result; adapter-unproved/ until it was loaded again and compared
metrics.jsonl        one object per optimiser step and per evaluation
checkpoints/step-NNNNNN/      to resume from
checkpoints/best-NNNNNN/      the adapter of the best evaluation
checkpoints/unproved-NNNNNN/  a checkpoint that is not compared yet, or was found not to be what was trained
checkpoints/damaged-NNNNNN/   one that was found damaged when the run was resumed
.lock                while a process works on the run
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from onegpu.adapters import RecipeError, StorageError
from onegpu.adapters.files import discard, flush, leftovers, move, storage, sweep, there, write_text

from .document import LARGEST, read_document

__all__ = ["RunFolder", "adapter_folder"]

KEPT_CHECKPOINTS = 2  # so that there is one before a newest that turns out to be damaged
LONGEST = 2**20  # bytes of a line of metrics
HARMLESS = {"train.checkpoint_every"}  # settings that change nothing of what is computed


class RunFolder:
    """Paths and records of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.adapter = self.path / "adapter"
        self.unproved_adapter = self.path / "adapter-unproved"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self._lock = FileLock(self.path / ".lock", blocking=False)

    @property
    def finished(self) -> bool:
        """Whether the result was written, which happens last."""
        return (self.adapter / "manifest.json").is_file()

    def open(self, recipe: str, *, resume: bool, accept_changes: bool = False) -> None:
        """Make the folder, or check that it holds a run of the same recipe to resume; no other process has it then.

        Raises:
            RecipeError: the folder is in use, or its run has another recipe.
            StorageError: it cannot be written.
        """
        with storage(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self.lock()
        self.check(recipe, resume=resume, accept_changes=accept_changes)
        write_text(self.recipe, recipe)

    def lock(self) -> None:
        """Keep other processes out of a folder that exists, until `release` or until this process ends in any way.

        Raises:
            RecipeError: another process has it.
        """
        if self._lock.is_locked or not self.path.is_dir():
            return
        try:
            with storage(self.path):
                self._lock.acquire()
        except Timeout:
            raise RecipeError(
                f"another process is working on the run in {self.path}: wait for it, or stop it"
            ) from None

    def release(self) -> None:
        """Let other processes in again; no lock is left in the folder."""
        if self._lock.is_locked:
            with suppress(OSError):  # a disk that became read-only: the lock goes all the same, its name stays
                Path(self._lock.lock_file).unlink()  # while it is held: nobody can have it by that name
            self._lock.release()

    def tidy(self) -> None:
        """Remove what a process that was killed in its very last instants left in a finished run, if nobody has it."""
        if not Path(self._lock.lock_file).exists() and not leftovers(self.path):
            return
        with suppress(RecipeError, StorageError):  # another process is at its end, or the disk is read-only now
            self.lock()
            sweep(self.path)
            sweep(self.checkpoints)
        self.release()

    def check(self, recipe: str, *, resume: bool, accept_changes: bool = False) -> list[str]:
        """`open` without writing.

        Returns:
            What is accepted: each setting that differs from the run's, as `key: old -> new`.
        """
        self._refuse_unwritable()
        if not self._begun():
            return []
        if not resume:
            raise RecipeError(f"{self.path} exists already; give another folder with -o, or go on with --resume")
        if not self.recipe.is_file():
            raise RecipeError(f"{self.path} is not the folder of a run: it has no recipe.yaml")
        if there(self.checkpoints) and not self.checkpoints.is_dir():
            raise RecipeError(f"{self.checkpoints} is not a folder: nothing can be resumed from it, or written there")
        changed = _changes(self._recipe_of_the_run(), read_document(recipe, "the recipe").content)
        if changed and not accept_changes:
            raise RecipeError(
                f"{self.path} holds a run of another recipe:\n"
                + "".join(f"  {change}\n" for change in changed)
                + "Give another folder with -o, or go on all the same with --accept-changes: the manifest will say so"
            )
        return changed

    def _begun(self) -> bool:
        """Whether there is anything; a process that was killed before its first file was whole leaves nothing."""
        if not self.path.is_dir():
            return self.path.exists()
        killed = {path.name for path in leftovers(self.path)}
        return not set(os.listdir(self.path)) - killed <= {".lock"}

    def _refuse_unwritable(self) -> None:
        """Before hours of training, and without writing anything."""
        nearest = next(path for path in (self.path, *self.path.absolute().parents) if there(path))
        if not nearest.is_dir() and nearest != self.path:
            raise StorageError(f"{self.path} cannot be made: {nearest} is a file")
        if not os.access(nearest, os.W_OK):
            raise StorageError(f"{self.path} cannot be written: {nearest} is read-only for you")

    def _recipe_of_the_run(self) -> Any:
        """What it began with; somebody else may have written it, so it is read as any recipe is."""
        try:
            if self.recipe.stat().st_size > LARGEST:
                raise ValueError("no recipe is so large")
            return read_document(self.recipe.read_text("utf-8"), str(self.recipe)).content
        except (ValueError, RecipeError):
            raise RecipeError(f"{self.recipe} is damaged, so nobody can tell what the run was: start another") from None

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.checkpoints / f"step-{step:06d}"

    def unproved(self, step: int) -> Path:
        """Where it lies until it is proved."""
        return self.checkpoints / f"unproved-{step:06d}"

    def _numbered(self, kind: str) -> list[Path]:
        """The folders of a kind by their step; one that somebody put there under a name of his own is left alone."""
        found = [path for path in self.checkpoints.glob(f"{kind}-*") if path.name.removeprefix(f"{kind}-").isdecimal()]
        return sorted(found, key=_number)

    def newest_first(self) -> list[Path]:
        """The checkpoints; a half-written one has another name."""
        return self._numbered("step")[::-1]

    def best(self, step: int) -> Path:
        """Where the adapter of an evaluation lies that was the best so far, within a sealed folder."""
        return self.checkpoints / f"best-{step:06d}"

    def drop_old_checkpoints(self) -> None:
        """Keep the last two, and of the best adapters those that a run resumed from either would want."""
        steps = self._numbered("step")
        for old in steps[:-KEPT_CHECKPOINTS]:
            discard(old)
        bests = self._numbered("best")
        before = [best for best in bests if _number(best) <= min(map(_number, steps[-KEPT_CHECKPOINTS:]))]
        for old in before[:-1]:
            discard(old)

    def record(self, **values: Any) -> None:
        """Append one line to the metrics.

        Raises:
            StorageError: the disk is full; what was cut off is forgotten when the run is resumed.
        """
        with storage(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def flush_records(self) -> None:
        """Have the disk hold the metrics, before a checkpoint says that they are there."""
        with storage(self.metrics):
            flush(self.metrics)

    def records(self) -> Iterator[Mapping[str, Any]]:
        """The recorded lines that can be read: all but one that was cut off when the process was killed."""
        if self.metrics.is_file():
            with self.metrics.open("rb") as file:
                while line := file.readline(LONGEST):
                    if len(line) == LONGEST:
                        return  # nothing that was recorded is so long: whatever it is, it need not end
                    try:
                        record = json.loads(line)
                    except (ValueError, RecursionError):
                        continue
                    if isinstance(record, dict) and isinstance(record.get("step"), int):
                        yield record

    def rewind(self, step: int, evaluations: int = 0) -> None:
        """Forget what came after `step` and so many evaluations, which will be done again: from 0 on, everything.

        Checkpoints after it, which were found damaged, are set aside.
        """
        records = list(self.records()) if step else []
        scored = [record for record in records if "evaluation" in record][:evaluations]  # the last step has one, too
        kept = [
            record for record in records if record["step"] <= step and ("evaluation" not in record or record in scored)
        ]
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        for folder in (self.path, self.checkpoints):
            sweep(folder)
        for unproved in self._numbered("unproved"):
            discard(unproved)
        for best in self._numbered("best"):
            if _number(best) > step:
                discard(best)
        for damaged in self.newest_first():
            if _number(damaged) > step:
                move(damaged, self.set_aside(damaged))

    def set_aside(self, checkpoint: Path) -> Path:
        """Where a damaged checkpoint goes."""
        return self.checkpoints / f"damaged-{_number(checkpoint):06d}"


def adapter_folder(folder: Path) -> Path:
    """The adapter folder that is meant by the folder of a run, of a checkpoint, or by itself."""
    run = RunFolder(folder)
    return run.adapter if there(run.adapter) else folder


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _changes(before: Any, after: Any) -> list[str]:
    """Each setting that differs and matters, as `key: old -> new`."""
    old, new = _leaves(before), _leaves(after)
    return [
        f"{key}: {_shown(old, key)} -> {_shown(new, key)}"
        for key in {**old, **new}
        if key not in HARMLESS and (key not in old or key not in new or old[key] != new[key])
    ]


def _leaves(content: Any, path: str = "") -> dict[str, Any]:
    """Every plain value of a recipe by its path, such as `adapters.0.lora.rank`."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else None
    if items is None or not content:
        return {path: content}
    return {p: v for k, inner in items for p, v in _leaves(inner, f"{path}.{k}".lstrip(".")).items()}


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    return json.dumps(leaves[key], default=str, ensure_ascii=False) if key in leaves else "(not there)"
