"""Where a run goes on: from its newest checkpoint that is whole, in what it began with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onegpu.adapters import RecipeError, Unavailable, artefact
from onegpu.adapters.files import damage
from onegpu.adapters.fingerprints import Fingerprint

from .checkpoints import environment, read_state, restore
from .runfolder import RunFolder
from .training import Session

__all__ = ["go_on"]

FLAG = "--accept-changes"
CONTENT = {  # what a run reads beside its recipe, by where the manifest has it
    "data": "the rows",
    "labels": "the classes",
    "class_weights": "the weights of the classes",
    "stop_tokens": "the tokens that end an answer",
    "compiled": "whether steps run compiled",
}


def go_on(session: Session, facts: Mapping[str, Any], *, changed: Sequence[str], accept_changes: bool) -> None:
    """Restore a session from the newest checkpoint that is whole; without any it stays at step 0.

    Args:
        facts: what the manifest says of this run.
        changed: settings that differ from those that the run began with, and were accepted.
        accept_changes: go on although the result will not be that of an uninterrupted run; its manifest says so.

    Raises:
        RecipeError: rows, tokenizer, base or optimiser are others than the run began with, or its steps are behind it.
        Unavailable: versions, kind of device, or number of threads are; bits would differ.
    """
    folder, state = _usable(session)
    if folder is None:
        if session.folder.recipe.is_file():
            session.display.line("resumed", "from the start, as there is no checkpoint to use")
        return
    progress = state["progress"]
    if progress["step"] > session.steps:
        raise RecipeError(f"the run did {progress['step']} steps already, and the recipe asks for {session.steps}")
    others = _other_content(folder, session.base, facts)
    if others and not accept_changes:
        raise RecipeError(
            f"{' and '.join(others)} changed since {folder} was written, so it cannot be resumed exactly; {FLAG} goes "
            "on all the same, and the manifest will say so"
        )
    machine = _other_machine(state["environment"], environment(session.accelerator.num_processes, session.stack))
    if machine and not accept_changes:
        raise Unavailable(
            f"{folder} cannot be resumed exactly here: "
            + "; ".join(f"{name} was {before} and is {now}" for name, before, now in machine)
            + f". Run it where it began, or add {FLAG}: its bits will be others, and the manifest will say so"
        )
    restore(
        folder,
        state,
        stack=session.stack,
        optimizer=session.optimizer,
        schedule=session.schedule,
        scaler=session.scaler,
        process=session.accelerator.process_index,
    )
    session.resume(progress)
    here = [*changed, *others, *(f"{name}: {before} -> {now}" for name, before, now in machine)]
    session.changes += [{"step": session.step, "changed": here}] if here else []
    session.display.line("resumed", f"after step {session.step}")
    for change in here:
        session.display.line("changed", change)


def _usable(session: Session) -> tuple[Path | None, dict[str, Any]]:
    """The newest checkpoint that is as it was written, with what it says; damaged ones are named."""
    for checkpoint in session.folder.newest_first():
        fault = damage(checkpoint)
        if fault is None:
            state = read_state(checkpoint, session.stack)
            _check_progress(session, checkpoint, state["progress"])
            fault = _fault_of_best(session.folder, state["progress"]["selection"]["step"])
            if fault is None:
                return checkpoint, state
        aside = session.folder.set_aside(checkpoint).name
        session.display.line("damaged", f"{checkpoint}: {fault}; set aside as {aside}, the one before it is used")
    return None, {}


def _check_progress(session: Session, checkpoint: Path, progress: Mapping[str, Any]) -> None:
    """What it says must be true of a checkpoint by that name, and of the recipe.

    Raises:
        RecipeError: it is not, although its checksums hold: somebody made it so.
    """
    if checkpoint != session.folder.checkpoint(progress["step"]):
        raise RecipeError(f"{checkpoint} says that it was written after step {progress['step']}")
    selection, metric = progress["selection"], session.selection.metric
    if metric and selection["step"] is not None and metric not in selection["scores"]:
        raise RecipeError(f"{checkpoint} has no score {metric!r} of step {selection['step']}, which it says was best")


def _fault_of_best(folder: RunFolder, step: int | None) -> str | None:
    """What is wrong with the best adapter so far, which a run that goes on needs."""
    fault = damage(folder.best(step)) if step is not None else None
    return f"it needs {folder.best(step).name}, and there {fault}" if fault and step is not None else None


def _other_content(checkpoint: Path, base: Fingerprint, facts: Mapping[str, Any]) -> list[str]:
    manifest = artefact.read(checkpoint / "adapter").manifest
    found = [what for key, what in CONTENT.items() if manifest.run.get(key) != facts.get(key)]
    found += [f"the tokenizer ({kind})" for kind in _other_parts(manifest.run.get("tokenizer"), facts["tokenizer"])]
    return found + (["the base"] if manifest.base.fingerprint != base else [])


def _other_parts(before: Any, now: Any) -> list[str]:
    """What of two tokenizers differs, by the digests of their parts."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else ["all of it"]
    return [
        str(kind).replace("_", " ") for kind in sorted(before.keys() | now.keys()) if before.get(kind) != now.get(kind)
    ]


def _other_machine(before: Mapping[str, Any], here: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, before.get(name), now) for name, now in here.items() if before.get(name) != now]
