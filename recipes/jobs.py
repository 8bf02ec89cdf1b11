"""A job: everything that a run needs, found and checked before any weight is read."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from onegpu.adapters import TASKS, OnegpuError, RecipeError, Stack, Unavailable, artefact, load_base
from onegpu.adapters.base import any_skeleton, choose_attention, refuse_foreign_packing, settled, skeleton_of
from onegpu.adapters.contract import LoadOptions
from onegpu.adapters.device import Attention, Hardware, compute_dtype, detect
from onegpu.adapters.errors import brief, noted, together
from onegpu.adapters.files import there
from onegpu.adapters.isolation import answerable
from onegpu.adapters.pretrained import read_config, read_tokenizer, readable
from onegpu.adapters.registry import entry_of
from onegpu.adapters.sources import Source, locate
from onegpu.adapters.specs import Named
from onegpu.adapters.structure import family
from onegpu.adapters.target_table import Target, count_targets

from .data.batches import Plan, resolve_cut
from .data.dataset import Dataset, Gathered, Trained, encode, gather
from .evaluation import Evaluator, evaluating
from .facts import check_tokenizer, facts_of
from .loading import Loaded
from .selection import choose, of_one_class
from .tasks import Labels, Reader
from .teachers import Teacher, find_teacher, referring

__all__ = ["Job", "make_reader", "preflight", "target_rows"]


@dataclass(frozen=True)
class Job:
    """A recipe whose every part was found and checked; no weight was read."""

    loaded: Loaded
    source: Source
    place: str  # what transformers loads from
    hardware: Hardware
    options: LoadOptions
    targets: Sequence[Target]
    gathered: Gathered
    reader: Reader
    dataset: Dataset
    teacher: Teacher | None
    tokenizer_mismatch: Sequence[str] = ()  # how that of the adapter that is continued differs, where allowed

    @cached_property
    def plan(self) -> Plan:
        """Which examples each step sees."""
        settings, rows = self.loaded.recipe.train, self.gathered.rows
        sources = rows.sources[self.dataset.train.column("row")]
        return Plan(sources, rows.weights, settings.effective_batch, settings.seed)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        settings = self.loaded.recipe.train
        return settings.steps or (settings.epochs or 1) * self.plan.windows_per_epoch

    @property
    def pad(self) -> int:
        """Fills up short rows; masked, so any id will do where the tokenizer has none."""
        tokenizer = self.reader.tokenizer
        return int(next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0))

    def evaluator(self, stack: Stack) -> tuple[Evaluator, str]:
        """What scores a stack, with the task as its model can be trained on it, and a line about that.

        A teacher is loaded now, where the task has one.
        """
        settings, dtype = self.loaded.recipe.train, self.options.autocast
        autocast = torch.autocast(self.hardware.kind, dtype=dtype or self.options.dtype, enabled=dtype is not None)
        packing = all(named.adapter.capabilities.packing for named in stack.named)
        with evaluating(stack.model), autocast:
            task, remark = self.loaded.task.suited(
                stack.model, self.dataset.train[0], longest=self.dataset.longest, pad=self.pad, packing=packing
            )
        evaluator = Evaluator(
            task=task,
            reader=self.reader,
            pad=self.pad,
            cut=resolve_cut(
                settings.micro_batch,
                settings.tokens_per_micro_batch,
                effective_batch=settings.effective_batch,
                longest=self.dataset.longest,
                packed=task.packs,
            ),
            window=settings.effective_batch,
            autocast=autocast,
            refer=referring(task, self.teacher, stack, autocast, pad=self.pad, hardware=self.hardware),
        )
        return evaluator, remark

    def load_base(self) -> PreTrainedModel:
        """Read the base as the recipe wants it."""
        recipe = self.loaded.recipe
        model = load_base(
            self.source,
            self.loaded.stack,
            kind=self.loaded.task.model_kind(),
            labels=self.reader.labels,
            precision=recipe.train.precision,
            attention=recipe.train.attention,
            seed=recipe.train.seed,
            hardware=self.hardware,
        )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.pad
        return model


def preflight(loaded: Loaded, *, trained: Trained | None = None) -> Job:
    """Find and check everything that a run needs before any weight is read; every fault is told at once.

    Args:
        trained: the classes of a head that was trained before; found in the training rows when left out.

    Raises:
        RecipeError, DataError, TargetError, StackError: something in the recipe or its data is wrong.
        Unavailable: a package, a device or a precision is missing.
    """
    found = [loaded.fault] if loaded.fault is not None else []
    hardware = detect()
    source = _source(loaded, found)
    _check_settings(loaded, hardware, found)
    gathered = None
    with noted(found):
        gathered = gather(loaded, trained)
    class_known = False
    with noted(found), loaded.place("train", "best"):
        if gathered is not None and of_one_class(loaded.recipe.train.best):
            choose(loaded.recipe.train.best, loaded.task.directions(gathered.labels))
            class_known = bool(gathered.labels)
    if source is None or (found and not source.ready):  # converting a base takes minutes: not for a run that cannot be
        raise together(found)
    with loaded.place("base"):
        place = source.materialise()
    fit = _fit(loaded, place, source.revision, hardware, found)
    if gathered is None:
        raise together(found)
    reader = teacher = dataset = None
    mismatch: Sequence[str] = ()
    with noted(found):
        reader = make_reader(place, loaded, gathered.labels, gathered.class_weights)
        mismatch = _check_continued(loaded, reader)
        teacher = find_teacher(loaded, reader, hardware)
    with noted(found), loaded.place("task", loaded.task_name):
        # Tokenising takes its time: not for a recipe that will be written anew.
        dataset = encode(loaded, gathered, reader) if reader and loaded.fault is None else None
    with noted(found), loaded.place("train", "best"):
        if class_known and dataset is not None and len(dataset.evaluation) and reader is not None:
            _check_class(loaded, dataset, reader)
    if found or fit is None or reader is None or dataset is None:
        raise together(found)
    if teacher is not None:
        with loaded.place("task", loaded.task_name, "max_length"):
            teacher.refuse_longer(min(dataset.longest, reader.limit))
    options, skeleton = fit
    with loaded.place("adapters"):
        targets = count_targets(skeleton, loaded.stack, reader.tokenizer)
    return Job(loaded, source, place, hardware, options, targets, gathered, reader, dataset, teacher, mismatch)


def _check_class(loaded: Loaded, dataset: Dataset, reader: Reader) -> None:
    """A class of which nothing is held out has a score that never changes."""
    task, best, labels = loaded.task, loaded.recipe.train.best, reader.labels or ()
    with answerable(loaded.task_name, entry_of(TASKS, type(task)), "classes_of"):
        held = {labels[number] for example in dataset.evaluation for number in task.classes_of(example)}
    if best is not None and best.metric not in task.directions(sorted(held)):
        raise RecipeError(f"metric: no row that is held out has what {best.metric!r} is about")


def _check_continued(loaded: Loaded, reader: Reader) -> list[str]:
    """A saved adapter goes on with the tokens that it was trained with; what differs is returned, where allowed."""
    folder = loaded.recipe.adapter
    if folder is None:
        return []
    with loaded.place("adapter"):
        facts = facts_of(folder, artefact.read(folder).manifest)
        return check_tokenizer(folder, facts, reader.tokenizer, allow=loaded.allow_base_mismatch)


def target_rows(loaded: Loaded) -> list[Target]:
    """What the targets of a recipe come to on its base; nothing of its data is read, and no base is converted.

    Raises:
        OnegpuError: the base is not at hand, or the stack cannot work on it.
    """
    with loaded.place("base"):
        source = locate(loaded.recipe.base, revision=loaded.recipe.revision, beside=loaded.folder)
        if not source.ready:
            raise Unavailable("the base is converted when it is used first, which has not been yet")
        place = source.materialise()
        skeleton = skeleton_of(place, loaded.task.model_kind(), source.revision)
        tokenizer = _tokenizer(place, loaded)
    with loaded.place("adapters"):
        return count_targets(skeleton, loaded.stack, tokenizer)


def _source(loaded: Loaded, found: list[OnegpuError]) -> Source | None:
    recipe, source = loaded.recipe, None
    with noted(found), loaded.place("base"):
        source = locate(recipe.base, revision=recipe.revision, beside=loaded.folder)
    with noted(found), loaded.place("revision"):
        if recipe.revision is not None and source is not None and source.place is not None:
            raise RecipeError("only a hub id has revisions, and the base is a file or a folder: leave `revision` out")
    return source


def _check_settings(loaded: Loaded, hardware: Hardware, found: list[OnegpuError]) -> None:
    """What can be told from the recipe, its task and the machine alone."""
    recipe, task = loaded.recipe, loaded.task
    with noted(found), loaded.place("train", "precision"):
        compute_dtype(recipe.train.precision, hardware)
    with noted(found), loaded.place("adapter"):
        if recipe.adapter is not None:
            facts_of(recipe.adapter, artefact.read(recipe.adapter).manifest)
    with noted(found), loaded.place("train", "best"):
        if recipe.train.best is not None and not of_one_class(recipe.train.best):
            choose(recipe.train.best, task.directions(None))
        if recipe.train.best is not None and task.evaluation == "none":
            raise RecipeError("best: nothing is held out to choose by, as `evaluation` is `none`")
    given, least = recipe.train.effective_batch, task.smallest_batch()
    with noted(found), loaded.place("train", "effective_batch"):
        if given < least:
            raise RecipeError(f"effective_batch is {given}, and {loaded.task_name} needs at least {least} a step")


def _fit(
    loaded: Loaded, place: str, revision: str | None, hardware: Hardware, found: list[OnegpuError]
) -> tuple[LoadOptions, PreTrainedModel] | None:
    """What the stack makes of the base, and the base without weights; None where something was found to be wrong."""
    settings, kind, skeleton = loaded.recipe.train, loaded.task.model_kind(), None
    dtype = torch.float32
    with suppress(Unavailable):  # told already
        dtype = compute_dtype(settings.precision, hardware)
    with noted(found), loaded.place("base"):
        skeleton = skeleton_of(place, kind, revision)
        refuse_foreign_packing(skeleton, place, loaded.stack)
        _refuse_encoder(loaded, skeleton)
    usable = skeleton or any_skeleton(place, revision)  # of a base of another kind, too, the targets can be checked
    if usable is None:  # nothing more can be told of a base that cannot be read
        raise together(found)
    checkpointing = settings.gradient_checkpointing is not None
    attention: Attention = "auto"
    with noted(found), loaded.place("train", "attention"):
        choose_attention(usable, settings.attention)
        attention = settings.attention
    with noted(found):
        options = settled(
            usable,
            loaded.stack,
            dtype=dtype,
            attention=attention,
            hardware=hardware,
            checkpointing=checkpointing,
            at=lambda index: loaded.place("adapters", index),
        )
        return options, usable
    return None


def _refuse_encoder(loaded: Loaded, skeleton: PreTrainedModel) -> None:
    """transformers makes a causal model of an encoder, which then looks at the very tokens that it is to predict."""
    if loaded.task.model_kind() == "causal-lm" and family(skeleton)[0] == "encoders":
        raise RecipeError(
            f"base {loaded.recipe.base!r} is a model that only encodes ({type(skeleton).__name__}), and "
            f"{loaded.task_name} needs one that writes"
        )


def make_reader(place: str, loaded: Loaded, labels: Labels, class_weights: Sequence[float] | None = None) -> Reader:
    """The tokenizer of a base, its stop tokens, and the longest example that recipe and model allow."""
    revision, task = loaded.recipe.revision, loaded.task
    with loaded.place("base"):
        tokenizer = _tokenizer(place, loaded)
    occupied = sum(map(_positions, loaded.stack))
    config = read_config(place, revision).get_text_config()
    # Models with relative positions (T5) state no bound; there the tokenizer's is the only one.
    most = getattr(config, "max_position_embeddings", tokenizer.model_max_length) - occupied
    with loaded.place("task", loaded.task_name, "max_length"):
        if task.max_length is not None and task.max_length > most:
            raise RecipeError(f"max_length is {task.max_length}, and the model has room for {most} tokens")
    limit = task.max_length or min(most, tokenizer.model_max_length)
    reader = Reader(tokenizer, limit, frozenset(_stops(place, revision, tokenizer)), labels, class_weights)
    with loaded.place("base"):
        task.check(reader)
    return reader


def _positions(named: Named) -> int:
    with answerable(named.name, named.entry, "positions"):
        return named.adapter.positions()


def _tokenizer(place: str, loaded: Loaded) -> Any:
    base = loaded.recipe.base
    with readable(f"base {base!r} has no tokenizer that can be read"):
        tokenizer = read_tokenizer(place, loaded.recipe.revision)
    if len(tokenizer) == 0:  # what transformers makes up where there are no tokenizer files
        raise RecipeError(f"base {base!r} has no tokenizer files")
    return tokenizer


def _stops(place: str, revision: str | None, tokenizer: Any) -> set[int]:
    """Tokens at which generation ends: the tokenizer's, and those of the model's generation settings."""
    found = {tokenizer.eos_token_id}
    settings = Path(place, GENERATION_CONFIG_NAME)
    with readable(f"{settings} cannot be read"):
        try:
            configured = GenerationConfig.from_pretrained(place, revision=revision or "main").eos_token_id
        except OSError:
            if there(settings):
                raise
            configured = None  # a base without generation settings has only its tokenizer's
        found |= set(configured) if isinstance(configured, list) else {configured}
        if wrong := [token for token in found - {None} if not isinstance(token, int)]:
            raise ValueError(f"eos_token_id is {brief(wrong[0])}, and must be a number")
    return found - {None}
