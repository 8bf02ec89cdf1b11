"""From a loaded recipe to a proved adapter folder: preflight, base, adapters, loop, artefact, round trip."""

import gc
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, set_seed

from onegpu.adapters import OnegpuError, ProofFailed, RecipeError, Stack, artefact, attach, load, load_base
from onegpu.adapters.base import footprint, load_options
from onegpu.adapters.contract import LoadOptions
from onegpu.adapters.device import Hardware, compute_dtype, detect, grad_scaler
from onegpu.adapters.files import write_json
from onegpu.adapters.fingerprint import differences, fingerprint
from onegpu.adapters.sources import Source, locate

from .batches import Plan, resolve_micro_batch
from .checkpoints import read_checkpoint
from .dataset import Dataset, Split, describe, encode, split_rows
from .display import Display, human_bytes
from .loading import Loaded
from .optimisers import Group, groups_of, make_optimizer, make_schedule
from .proofs import Probe, round_trip
from .runfolder import RunFolder
from .tasks import Labels, Reader
from .training import Session, train

__all__ = ["Job", "Outcome", "make_reader", "preflight", "run"]


@dataclass(frozen=True)
class Job:
    """A recipe whose every part was found and checked; no weight was read."""

    loaded: Loaded
    source: Source
    place: str  # what transformers loads from
    hardware: Hardware
    options: LoadOptions
    split: Split
    reader: Reader
    dataset: Dataset

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        settings = self.loaded.recipe.train
        plan = Plan(len(self.dataset.train), settings.effective_batch, settings.seed)
        return settings.steps or (settings.epochs or 1) * plan.windows_per_epoch

    @property
    def pad(self) -> int:
        """Fills up short rows; masked, so any id will do where the tokenizer has none."""
        tokenizer = self.reader.tokenizer
        return int(next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0))

    def load_base(self) -> PreTrainedModel:
        """Read the base as the recipe wants it."""
        recipe = self.loaded.recipe
        model = load_base(
            self.source,
            self.loaded.stack,
            kind=self.loaded.task.kind,
            labels=self.reader.labels,
            precision=recipe.train.precision,
            seed=recipe.train.seed,
            hardware=self.hardware,
        )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.pad
        return model


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    adapter: Path
    before: dict[str, float]  # held-out scores of the base
    after: dict[str, float]
    demonstrations: list[tuple[str, str]] = field(default_factory=list)  # (question, answer) before, after
    round_trip_error: float = 0.0


def preflight(loaded: Loaded) -> Job:
    """Find and check everything that a run needs before any weight is read.

    Raises:
        RecipeError, DataError: something in the recipe or its data is wrong.
        Unavailable: a package, a device or a precision is missing.
    """
    recipe, task = loaded.recipe, ("task", loaded.task_name)
    hardware = detect()
    with loaded.place("train", "precision"):
        compute_dtype(recipe.train.precision, hardware)
    with loaded.place("base"):
        source = locate(recipe.base, revision=recipe.revision, beside=loaded.folder)
    with loaded.place("revision"):
        if recipe.revision is not None and source.place is not None:
            raise RecipeError("only a hub id has revisions, and the base is a file or a folder: leave `revision` out")
    if recipe.adapter is not None:
        with loaded.place("adapter"):
            artefact.read(recipe.adapter)
    split = split_rows(loaded)
    with loaded.place("base"):
        place = source.materialise()
    kind, precision = loaded.task.kind, recipe.train.precision
    try:
        options = load_options(
            place, loaded.stack, kind=kind, precision=precision, hardware=hardware, revision=source.revision
        )
    except OnegpuError as error:
        with loaded.place("base" if isinstance(error, RecipeError) else "adapters"):
            raise
    reader = make_reader(place, loaded, split.labels)
    with loaded.place(*task):
        dataset = encode(loaded.task, split, reader)
    return Job(loaded, source, place, hardware, options, split, reader, dataset)


def make_reader(place: str, loaded: Loaded, labels: Labels) -> Reader:
    """The tokenizer of a base, its stop tokens, and the longest example that recipe and model allow."""
    revision, task = loaded.recipe.revision, loaded.task
    with loaded.place("base"):
        tokenizer = _tokenizer(place, loaded)
    occupied = sum(named.adapter.positions() for named in loaded.stack)
    most = AutoConfig.from_pretrained(place, revision=revision).get_text_config().max_position_embeddings - occupied
    with loaded.place("task", loaded.task_name, "max_length"):
        if task.max_length is not None and task.max_length > most:
            raise RecipeError(f"max_length is {task.max_length}, and the model has room for {most} tokens")
    limit = task.max_length or min(most, tokenizer.model_max_length)
    return Reader(tokenizer, limit, frozenset(_stops(place, revision, tokenizer)), labels)


def _tokenizer(place: str, loaded: Loaded) -> Any:
    base = loaded.recipe.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=loaded.recipe.revision)
    except (OSError, ValueError) as cause:
        reason = str(cause).strip().splitlines()[0]
        raise RecipeError(f"base {base!r} has no tokenizer that can be read: {reason}") from cause
    if loaded.task.kind == "causal-lm" and tokenizer.chat_template is None:
        raise RecipeError(f"base {base!r} has no chat template, so conversations cannot be rendered for it")
    return tokenizer


def _stops(place: str, revision: str | None, tokenizer: Any) -> set[int]:
    """Tokens at which generation ends: the tokenizer's, and those of the model's generation settings."""
    found = {tokenizer.eos_token_id}
    try:
        configured = GenerationConfig.from_pretrained(place, revision=revision or "main").eos_token_id
        found |= set(configured) if isinstance(configured, list) else {configured}
    except OSError:
        pass  # a base without generation settings has only its tokenizer's
    return found - {None}


def run(loaded: Loaded, out: Path, *, resume: bool = False, display: Display | None = None) -> Outcome | None:
    """Train, prove, save. Returns None when `resume` finds the run finished.

    Raises:
        InvalidInput, Unavailable: before anything is written.
        ProofFailed: what was written is kept aside and named.
        Interrupted: by the user; a checkpoint was written.
    """
    began = time.perf_counter()
    folder = RunFolder(out)
    folder.check(loaded.as_yaml(), resume=resume)
    if resume and folder.finished:
        return None
    job = preflight(loaded)
    accelerator = Accelerator(cpu=job.hardware.kind == "cpu", mixed_precision="no")
    display = display or Display(quiet=not accelerator.is_main_process)
    _describe(job, display)
    outcome = _train_and_prove(job, folder, accelerator, display, resume=resume)
    _report(outcome, display, time.perf_counter() - began)
    return outcome


def _train_and_prove(
    job: Job, folder: RunFolder, accelerator: Accelerator, display: Display, *, resume: bool
) -> Outcome:
    model = job.load_base()
    _describe_base(model, display)
    demonstrate = _demonstrator(job)
    before = demonstrate(model)
    session, save = _session(job, model, folder, accelerator, display, resume=resume)
    del model
    if accelerator.is_main_process:
        folder.open(job.loaded.as_yaml(), resume=resume)
        folder.rewind(session.step)
    accelerator.wait_for_everyone()
    verdict = train(session)
    display.line("trained", verdict)
    demonstrations = [d for d in (before, demonstrate(session.model)) if d is not None]
    probe = Probe.of(session.model, job.dataset.train[0].ids)
    unproved = folder.adapter.with_name("adapter-unproved")
    scores = session.scores or [{}]
    if accelerator.is_main_process:
        save(unproved)
    del session, save
    gc.collect()  # the training state goes before a second base comes
    error = 0.0
    if accelerator.is_main_process:
        error = _prove(job, unproved, probe)
        os.replace(unproved, folder.adapter)
    accelerator.wait_for_everyone()
    return Outcome(folder.adapter, scores[0], scores[-1], demonstrations, error)


def _session(
    job: Job, model: PreTrainedModel, folder: RunFolder, accelerator: Accelerator, display: Display, *, resume: bool
) -> tuple[Session, Callable[[Path], None]]:
    """Attach, build the optimiser, and restore a checkpoint where there is one."""
    settings = job.loaded.recipe.train
    set_seed(settings.seed)
    base = fingerprint(model)
    stack = attach(model, job.loaded.stack, seed=settings.seed, tokenizer=job.reader.tokenizer)
    if job.loaded.recipe.adapter is not None:
        with job.loaded.place("adapter"):
            _continue_from(job, stack, job.loaded.recipe.adapter)
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trainable = stack.trainable()
    groups = groups_of(trainable, stack.rates(settings.weight_decay))
    optimizer = make_optimizer(settings, groups, trainable)
    dtype = job.options.autocast or job.options.dtype
    session = Session(
        settings=settings,
        task=job.loaded.task,
        stack=stack,
        base=base,
        examples=job.dataset.train,
        held_out=job.dataset.evaluation,
        pad=job.pad,
        steps=job.steps,
        micro_batch=resolve_micro_batch(settings.micro_batch, settings.effective_batch, job.dataset.longest),
        autocast=torch.autocast(job.hardware.kind, dtype=dtype, enabled=job.options.autocast is not None),
        optimizer=optimizer,
        schedule=make_schedule(settings, optimizer, job.steps),
        scaler=grad_scaler(dtype, job.options.device),
        accelerator=accelerator,
        folder=folder,
        display=display,
        save_adapter=lambda place: save(place),
    )
    facts = _facts(job, [group.row(settings.learning_rate) for group in groups])

    def save(place: Path) -> None:
        run_facts = facts | {"steps": session.step, "scores": session.scores[-1] if session.scores else {}}
        artefact.save(stack, place, source=job.source.written, revision=job.source.revision, base=base, run=run_facts)

    _describe_groups(groups, settings.learning_rate, display)
    _restore(session, facts["data"], resume=resume)
    return session, save


def _continue_from(job: Job, stack: Stack, folder: str) -> None:
    """Give the stack the values of a saved adapter, whose base and classes must be these."""
    manifest = artefact.read(folder).manifest
    faults, _ = differences(manifest.base.fingerprint, stack.model)
    if faults:
        raise RecipeError(f"{folder} was trained on another base: {faults[0]}")
    labels, before = list(job.reader.labels or ()), manifest.run.get("labels") or []
    if before != labels:
        raise RecipeError(f"{folder} was trained on the classes {before}, and these are {labels}")
    artefact.fill(stack, folder)


def _restore(session: Session, data: dict[str, Any], *, resume: bool) -> None:
    checkpoint = session.folder.latest_checkpoint() if resume else None
    if checkpoint is not None:
        if artefact.read(checkpoint / "adapter").manifest.run["data"] != data:
            raise RecipeError(f"the rows have changed since {checkpoint} was written, so it cannot be resumed")
        progress = read_checkpoint(
            checkpoint,
            stack=session.stack,
            optimizer=session.optimizer,
            schedule=session.schedule,
            scaler=session.scaler,
        )
        session.step, session.scores = progress["step"], progress["scores"]
        session.display.line("resumed", f"after step {session.step}")


def _facts(job: Job, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """What the manifest says about the run. No times and no paths: equal runs write equal bytes."""
    settings = job.loaded.recipe.train
    return {
        "task": {job.loaded.task_name: job.loaded.task.model_dump()},
        "train": settings.model_dump(),
        "data": {"fingerprint": job.split.fingerprint, **job.dataset.report()},
        "labels": list(job.reader.labels) if job.reader.labels else None,
        "groups": groups,
        "tokenizer": _tokenizer_digest(job.reader.tokenizer),
        "stop_tokens": sorted(job.reader.stops),
        "threads": torch.get_num_threads(),
    }


def _tokenizer_digest(tokenizer: Any) -> dict[str, str]:
    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    vocabulary = sorted(tokenizer.get_vocab().items())
    return {"vocabulary": digest(repr(vocabulary)), "chat_template": digest(str(tokenizer.chat_template))}


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
    rows = [job.split.evaluation[example.row] for example in job.dataset.evaluation[:1]]
    return lambda model: job.loaded.task.demonstrate(model, job.reader, rows[0]) if rows else None


def _describe(job: Job, display: Display) -> None:
    data, task = job.dataset, job.loaded.task
    what = f"{data.supervised:,} of {data.tokens:,} tokens supervised"
    if job.reader.labels is not None:
        what = f"{len(job.reader.labels)} classes"
    display.line("recipe", job.loaded.name)
    display.line("data", f"{len(data.train):,} rows of {task.data}, {len(data.evaluation):,} held out; {what}")
    if data.dropped:
        display.line("dropped", describe(data.dropped))


def _describe_base(model: PreTrainedModel, display: Display) -> None:
    size = footprint(model)
    text = f"{human_bytes(size.total)} on {model.device}"
    if size.packed:
        text += f"; packed linears {human_bytes(size.packed)} ({human_bytes(size.packed_as_bf16)} in bf16)"
    display.line("base", text)


def _describe_groups(groups: list[Group], learning_rate: float, display: Display) -> None:
    """The groups as a table: every trainable tensor is in exactly one."""
    for group in groups:
        row = group.row(learning_rate)
        display.line(
            "group",
            f"{row['tensors']:>4} tensors {row['elements']:>11,} parameters  lr {row['learning_rate']:.2e}  "
            f"decay {row['weight_decay']:g}",
        )


def _report(outcome: Outcome, display: Display, seconds: float) -> None:
    for name, value in outcome.after.items():
        display.line("held-out", f"{name} {outcome.before[name]:.4f} before, {value:.4f} after")
    for when, (question, text) in zip(("before", "after"), outcome.demonstrations, strict=False):
        if when == "before":
            display.line("question", question)
        display.line(when, text)
    size = sum(path.stat().st_size for path in outcome.adapter.rglob("*") if path.is_file())
    display.line("adapter", f"{outcome.adapter} ({human_bytes(size)})")
    display.line(
        "proved", f"reloaded on a fresh base, logits differ by {outcome.round_trip_error:.1g}; {seconds:.0f} s in all"
    )
