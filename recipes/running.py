"""From a loaded recipe to a proved adapter folder: preflight, base, adapters, loop, artefact, round trip."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from onegpu.adapters import OnegpuError, ProofFailed, RecipeError, Stack, StorageError, artefact, attach, load
from onegpu.adapters.base import footprint
from onegpu.adapters.device import grad_scaler
from onegpu.adapters.files import move, write_json
from onegpu.adapters.fingerprints import fingerprint
from onegpu.adapters.fitting import check_base

from .compiling import Compilation, Watched, compile_layers, tried_on, watching
from .data.batches import micro_batches
from .display import Display, human_bytes
from .evaluation import on_device, shown, surveyed
from .facts import facts_of
from .jobs import Job, preflight
from .loading import Loaded
from .optimisers import Group, groups_of, make_optimizer, make_schedule, unreached_peak
from .proofs import Probe, round_trip
from .recomputing import recompute
from .resident_proof import ResidentProof
from .resuming import go_on
from .runfolder import RunFolder
from .selection import choose
from .showing import lengths_line, rows_line, target_lines, unusable_lines
from .tasks import Task, model_inputs
from .tokenizers import tokenizer_digest
from .training import Session, keep_best, train

__all__ = ["Outcome", "run"]

SAMPLED = 16  # rows that an adapter may look at before it starts
PROBE_TOKENS = 16
SHOWN_GROUPS = 8  # a table of more would push everything else off the screen


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    adapter: Path
    before: dict[str, float]  # held-out scores of the base
    after: dict[str, float]
    test: dict[str, float] = field(default_factory=dict)  # of rows that were looked at only once, at the end
    demonstrations: list[tuple[str, str]] = field(default_factory=list)  # (question, answer) before, after
    round_trip_error: float = 0.0


class Resuming(NamedTuple):
    """How a run that was begun before goes on."""

    changed: list[str]  # settings of the recipe, as `key: old -> new`
    accept_changes: bool


def run(
    loaded: Loaded, out: Path, *, resume: bool = False, accept_changes: bool = False, display: Display | None = None
) -> Outcome | None:
    """Train, prove, save. Returns None when `resume` finds the run finished.

    Args:
        accept_changes: resume although recipe, rows, versions or threads are others than the run began with; what
            changed goes into the manifest.

    Raises:
        InvalidInput, Unavailable: before anything is written.
        StorageError: something could not be written; what was saved before is as it was.
        ProofFailed: what was written is kept aside and named.
        Interrupted: by the user; a checkpoint was written.
    """
    began = time.perf_counter()
    if loaded.fault is not None:
        preflight(loaded)  # raises it, with everything else that is wrong
    folder = RunFolder(out)
    resuming = Resuming(folder.check(loaded.as_yaml(), resume=resume, accept_changes=accept_changes), accept_changes)
    if resume and folder.finished:
        folder.tidy()
        return None
    job = preflight(loaded)
    accelerator = Accelerator(cpu=job.hardware.kind == "cpu", mixed_precision="no")
    display = display or Display(quiet=not accelerator.is_main_process)
    _describe(job, display)
    try:
        if accelerator.is_main_process:
            folder.lock()
        outcome = _train_and_prove(job, folder, accelerator, display, resuming if resume else None, began)
    except StorageError as cause:
        hint = "; what was saved before is as it was: go on with --resume" if folder.recipe.is_file() else ""
        raise StorageError(f"{cause}{hint}") from cause
    finally:
        folder.release()
    _report(outcome, job.loaded.task, display, time.perf_counter() - began)
    return outcome


def _train_and_prove(
    job: Job, folder: RunFolder, accelerator: Accelerator, display: Display, resuming: Resuming | None, began: float
) -> Outcome:
    model = job.load_base()
    _describe_base(model, display)
    demonstrate = _demonstrator(job)
    before = demonstrate(model)
    session, save = _session(job, model, folder, accelerator, display, resuming)
    del model
    if accelerator.is_main_process:
        accept = resuming is not None and resuming.accept_changes
        folder.open(job.loaded.as_yaml(), resume=resuming is not None, accept_changes=accept)
        folder.rewind(session.step, len(session.scores))
    accelerator.wait_for_everyone()
    display.line("ready", f"after {time.perf_counter() - began:.1f} s")
    session.verdict = train(session)
    display.line("trained", session.verdict)
    keep_best(session)
    after, test = session.kept_scores, _tested(session, job)
    demonstrations = [d for d in (before, demonstrate(session.model)) if d is not None]
    probe = Probe.of(session.model, job.loaded.task.probe(job.dataset.train[0], PROBE_TOKENS))
    before_training = (session.scores or [{}])[0]
    if accelerator.is_main_process:
        save(folder.unproved_adapter)
        _confirm(session, folder.unproved_adapter)
    del session, save
    gc.collect()  # the training state goes before a second base comes
    error = 0.0
    if accelerator.is_main_process:
        error = _prove(job, folder.unproved_adapter, probe)
        move(folder.unproved_adapter, folder.adapter)
    accelerator.wait_for_everyone()
    return Outcome(folder.adapter, before_training, after, test, demonstrations, error)


def _tested(session: Session, job: Job) -> dict[str, float]:
    """Scores on the test rows, which nothing was chosen by."""
    if not job.dataset.test:
        return {}
    scores = session.test = session.evaluator(session.model, job.dataset.test).scores
    return scores


def _session(
    job: Job,
    model: PreTrainedModel,
    folder: RunFolder,
    accelerator: Accelerator,
    display: Display,
    resuming: Resuming | None = None,
) -> tuple[Session, Callable[[Path], None]]:
    """Attach, build the optimiser, and restore a checkpoint where there is one."""
    settings = job.loaded.recipe.train
    set_seed(settings.seed)
    base, parameters = fingerprint(model), footprint(model).parameters
    untouched = ResidentProof.untouched_base(model, job.loaded.stack)
    stack = attach(
        model, job.loaded.stack, seed=settings.seed, tokenizer=job.reader.tokenizer, samples=_samples(job, model.device)
    )
    if job.loaded.recipe.adapter is not None:
        with job.loaded.place("adapter"):
            _continue_from(job, stack, job.loaded.recipe.adapter)
    not_offloaded = recompute(model, settings.gradient_checkpointing)
    trainable = stack.trainable()
    groups = groups_of(trainable, stack.rates(settings.weight_decay))
    optimizer = make_optimizer(settings, groups, trainable)
    dtype = job.options.autocast or job.options.dtype
    evaluator, remark = job.evaluator(stack)
    session = Session(
        settings=settings,
        task=evaluator.task,
        stack=stack,
        base=base,
        examples=job.dataset.train,
        held_out=job.dataset.evaluation,
        plan=job.plan,
        steps=job.steps,
        evaluator=evaluator,
        selection=choose(settings.best, job.loaded.task.directions(job.reader.labels) if settings.best else {}),
        optimizer=optimizer,
        schedule=make_schedule(settings, optimizer, job.steps),
        scaler=grad_scaler(dtype, job.options.device),
        accelerator=accelerator,
        folder=folder,
        display=display,
        save_adapter=lambda place: save(place),
        prove=ResidentProof(stack, untouched, job.loaded.task.probe(job.dataset.train[0], PROBE_TOKENS)),
    )
    facts = _facts(job, [group.row(settings.learning_rate) for group in groups]) | {"parameters": parameters}

    def save(place: Path) -> None:
        run_facts = facts | {"steps": session.kept_step, "scores": session.kept_scores, "test": session.test}
        run_facts |= {"changes": session.changes} if session.changes else {}
        run_facts |= {"step_proof": session.verdict} if session.verdict else {}
        artefact.save(stack, place, source=job.source.written, revision=job.source.revision, base=base, run=run_facts)

    trained = sum(group.elements for group in groups)
    display.line("trains", f"{trained:,} of {parameters:,} parameters ({trained / parameters:.2%})")
    _describe_groups(groups, settings.learning_rate, display)
    if settings.compile:
        session.compilation = _compiled(session, dtype)
        facts["compiled"] = session.compilation.on
    for text in (remark, not_offloaded, session.compilation.line(), unreached_peak(settings, job.steps)):
        if text:
            display.line("note", text)
    if resuming is not None:
        go_on(session, facts, changed=resuming.changed, accept_changes=resuming.accept_changes)
    return session, save


def _compiled(session: Session, dtype: torch.dtype) -> Compilation:
    """Compiled on rows of the first window of all, in a run that goes on, too: the same kernels give the same bytes."""
    s = session
    chunk = tried_on(s.window(0), s.evaluator.cut)
    batch = on_device(s.task.collate(chunk, s.evaluator.pad), s.accelerator.device)
    (batch,) = surveyed(s.task, s.model, iter([batch | s.evaluator.refer(batch)]), autocast=s.evaluator.autocast)

    def step() -> Watched:
        with s.task.at_work(s.model):
            with watching(s.stack) as watched, s.evaluator.autocast:
                s.task.objective(s.model, batch)
            watched.look_back(s.stack)
            return watched

    return compile_layers(s.stack, step, dtype)


def _samples(job: Job, device: torch.device) -> list[dict[str, Tensor]]:
    """A few inputs of the run, for adapters that start from data."""
    rows = job.dataset.train[:SAMPLED]
    batches = [on_device(job.loaded.task.collate(chunk, job.pad), device) for chunk in micro_batches(rows, 1)]
    return [model_inputs(batch) for batch in batches]


def _continue_from(job: Job, stack: Stack, folder: str) -> None:
    """Give the stack the values of a saved adapter, whose base and classes must be these."""
    saved = artefact.read(folder)
    mismatch = check_base(saved, stack.root, allow=job.loaded.allow_base_mismatch)
    stack.base_mismatch = saved.manifest.base_mismatch + mismatch + list(job.tokenizer_mismatch)
    labels, before = list(job.reader.labels or ()), facts_of(folder, saved.manifest).labels or []
    if before != labels:
        raise RecipeError(f"{folder} was trained on the classes {before}, and these are {labels}")
    artefact.fill(stack, folder)


def _facts(job: Job, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """What the manifest says about the run. No times, and files by their names only: equal runs write equal bytes."""
    settings = job.loaded.recipe.train
    return {
        "task": {job.loaded.task_name: _without_folders(job.loaded.task.model_dump())},
        "train": settings.model_dump(),
        "data": {
            "fingerprint": job.gathered.rows.fingerprint,
            **{f"{name}_fingerprint": rows.fingerprint for name, rows in job.gathered.own.items()},
            **job.dataset.report(),
        },
        "labels": list(job.reader.labels) if job.reader.labels else None,
        "class_weights": list(job.reader.class_weights) if job.reader.class_weights else None,
        "groups": groups,
        "tokenizer": tokenizer_digest(job.reader.tokenizer),
        "stop_tokens": sorted(job.reader.stops),
        "threads": torch.get_num_threads(),
    }


def _without_folders(value: Any) -> Any:
    """Settings with files by their names only, also inside lists of sources."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _confirm(session: Session, folder: Path) -> None:
    """What was written is what was trained, bit for bit: a probe of a few tokens does not use every value."""
    try:
        artefact.confirm(session.stack, folder)
    except OnegpuError as cause:
        raise ProofFailed(f"round trip: {cause} (kept aside as {folder})") from cause


def _prove(job: Job, folder: Path, probe: Probe) -> float:
    """Load what was written onto a fresh base and compare; the measured error goes into the manifest."""
    fresh = job.load_base()
    try:
        load(fresh, folder)
        error = round_trip(probe, fresh)
    except OnegpuError as cause:
        raise ProofFailed(f"{cause} (kept aside as {folder})") from cause
    manifest = artefact.read(folder).manifest
    proved = manifest.model_copy(update={"run": manifest.run | {"probe": probe.summary(error)}})
    write_json(folder / artefact.MANIFEST, proved.model_dump())
    return error


def _demonstrator(job: Job) -> Callable[[Any], tuple[str, str] | None]:
    """Shows the model's answer to the first usable row that is held out, where the task has answers."""
    rows, _ = job.gathered.side("evaluation")
    first = [rows[example.row] for example in job.dataset.evaluation[:1]]
    return lambda model: job.loaded.task.demonstrate(model, job.reader, first[0]) if first else None


def _describe(job: Job, display: Display) -> None:
    report = job.dataset.report()
    what = f"{report['supervised']:,} of {report['tokens']:,} tokens supervised"
    if job.reader.labels is not None:
        what = f"{len(job.reader.labels)} classes"
    display.line("recipe", job.loaded.name)
    display.line("data", f"{job.gathered.rows.written}: {rows_line(report)}; {what}")
    display.line("lengths", lengths_line(report))
    for text in target_lines(job.targets):
        display.line("targets", text)
    for text in unusable_lines(report["dropped"]):
        display.line("dropped", text)
    for what, count in report["duplicates"].items():
        if count:
            display.line("doubles", f"{what}: {count:,}")
    for named in job.loaded.stack:
        if not named.adapter.capabilities.row_by_row:
            why = named.adapter.capabilities.because("row_by_row")
            display.line("note", f"with {named.name} the result depends on train.micro_batch{why}")


def _describe_base(model: PreTrainedModel, display: Display) -> None:
    size = footprint(model)
    text = f"{human_bytes(size.total)} on {model.device}"
    if size.packed:
        text += f"; packed linears {human_bytes(size.packed)} ({human_bytes(size.packed_as_bf16)} in bf16)"
    display.line("base", text)


def _describe_groups(groups: list[Group], learning_rate: float, display: Display) -> None:
    """The groups as a table: every trainable tensor is in exactly one. Of many, the slowest and the fastest."""
    rows = [group.row(learning_rate) for group in groups]
    shown = rows if len(rows) <= SHOWN_GROUPS else sorted(rows, key=lambda row: float(row["learning_rate"]))
    for row in shown if shown is rows else (*shown[:2], *shown[-2:]):
        display.line(
            "group",
            f"{row['tensors']:>4} tensors {row['elements']:>11,} parameters  lr {row['learning_rate']:.2e}  "
            f"decay {row['weight_decay']:g}",
        )
    if shown is not rows:
        display.line("groups", f"{len(rows)} in all, these are the slowest and the fastest; manifest.json lists each")


def _report(outcome: Outcome, task: Task, display: Display, seconds: float) -> None:
    for name in shown(task, outcome.after):
        display.line("held-out", f"{name} {outcome.before[name]:.4f} before, {outcome.after[name]:.4f} after")
    for name in shown(task, outcome.test):
        display.line("test", f"{name} {outcome.test[name]:.4f}")
    for number, (question, text) in enumerate(outcome.demonstrations):
        if number == 0:
            display.line("question", question)
        display.line(("before", "after")[number], text)
    size = sum(path.stat().st_size for path in outcome.adapter.rglob("*") if path.is_file())
    display.line("adapter", f"{outcome.adapter} ({human_bytes(size)})")
    display.line(
        "proved", f"reloaded on a fresh base, logits differ by {outcome.round_trip_error:.1g}; {seconds:.0f} s in all"
    )
