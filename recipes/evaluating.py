"""`onegpu evaluate`: scores of a saved adapter, on the rows that its run held out or on others."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from onegpu.adapters import ArtefactError, RecipeError, artefact, load
from onegpu.adapters.manifest import Manifest

from .data.dataset import Trained
from .data.examples import Examples
from .evaluation import shown
from .facts import Facts, check_tokenizer, facts_of
from .jobs import Job, preflight
from .loading import Loaded, load_recipe, parse_recipe
from .runfolder import RunFolder, adapter_folder
from .tasks import Example

__all__ = ["Evaluated", "evaluate_folder"]


class Evaluated(NamedTuple):
    """What a saved adapter scores."""

    what: str  # the rows
    rows: int
    base: dict[str, float]  # without the adapter; empty where it cannot be switched off
    adapter: dict[str, float]
    details: dict[str, Any]
    shown: list[str]  # the scores that a reader looks at
    dropped: dict[str, list[str]]  # why rows that were given cannot be used -> their places


def evaluate_folder(
    folder: Path, *, data: str | None = None, compare: bool = True, allow_base_mismatch: bool = False
) -> Evaluated:
    """Score the adapter of a run folder, or an adapter folder.

    Args:
        data: rows to score on; those that the run held out when left out (`test` where there are some).
        compare: score the base without the adapter too.
        allow_base_mismatch: go on although the base or its tokenizer are not those that it was trained on.

    Raises:
        ArtefactError: not an adapter folder, or one without a run in its manifest.
        RecipeError, DataError: nothing is held out, or the rows cannot be used.
    """
    adapter = adapter_folder(folder)
    manifest = artefact.read(adapter).manifest
    facts = facts_of(adapter, manifest)
    loaded = _recipe(folder, RunFolder(folder), manifest, facts, data)
    job = preflight(loaded, trained=Trained(facts.labels, facts.class_weights))
    check_tokenizer(adapter, facts, job.reader.tokenizer, allow=allow_base_mismatch)
    examples, what = _examples(job, data)
    dropped = job.dataset.dropped if data is not None else {}
    model = job.load_base()
    stack = load(model, adapter, allow_base_mismatch=allow_base_mismatch)
    evaluator, _ = job.evaluator(stack)
    base: dict[str, float] = {}
    if compare and all(named.adapter.capabilities.base_frozen for named in stack.named):
        with stack.base_only():
            base = evaluator(stack.model, examples).scores
    found = evaluator(stack.model, examples, details=True)
    read = shown(loaded.task, found.scores)
    return Evaluated(what, examples.rows, base, found.scores, found.details, read, dropped)


def _examples(job: Job, data: str | None) -> tuple[Examples[Example], str]:
    """All rows that were given, or those that are held out."""
    sides = [(job.dataset.test, "test rows"), (job.dataset.evaluation, "held-out rows")]
    if data is not None:
        return job.dataset.train, data
    for examples, what in sides:
        if len(examples):
            return examples, what
    raise RecipeError("the run held no rows out: name some with --data")


def _recipe(folder: Path, run: RunFolder, manifest: Manifest, facts: Facts, data: str | None) -> Loaded:
    """The recipe of the run, over other rows where they are given."""
    content = (
        load_recipe(str(run.recipe)).resolved() if run.recipe.is_file() else _from_manifest(folder, manifest, facts)
    )
    if data is not None:
        for settings in content["task"].values():
            settings |= {"data": data, "evaluation": "none", "test": "none", "limit": None}
    content["adapter"] = None  # what the run continued from is part of its result
    content["train"]["best"] = None  # nothing is chosen
    return parse_recipe(yaml.safe_dump(content), name=str(folder), folder=Path.cwd())


def _from_manifest(folder: Path, manifest: Manifest, facts: Facts) -> dict[str, Any]:
    """A recipe from what an adapter folder says of its run."""
    if manifest.base.source is None or not facts.task or facts.train is None:
        raise ArtefactError(f"{folder} does not say what it was trained on: it was not written by a run")
    return {
        "base": manifest.base.source,
        "revision": manifest.base.revision,
        "adapters": artefact.specs(manifest),
        "task": {name: dict(settings) for name, settings in facts.task.items()},
        "train": {**facts.train, "precision": manifest.base.precision},
    }
