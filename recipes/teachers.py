"""The reference model of a run: its own base without the adapters, or a teacher, a trained model beside it."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from onegpu.adapters import ArtefactError, RecipeError, Stack, StackError, artefact, build, load, load_base
from onegpu.adapters.base import Kind, load_options
from onegpu.adapters.device import Hardware
from onegpu.adapters.isolation import answerable
from onegpu.adapters.manifest import Manifest
from onegpu.adapters.pretrained import read_config
from onegpu.adapters.sources import Source, locate
from onegpu.adapters.specs import Named

from .evaluation import Refer, reference
from .loading import Loaded
from .runfolder import adapter_folder
from .tasks import Batch, Labels, Reader, Task
from .tokenizers import tokenizer_digest

__all__ = ["Teacher", "find_teacher", "referring"]

POSITIONS = "max_position_embeddings"


@dataclass(frozen=True)
class Teacher:
    """A trained model to learn from, found and checked; no weight of its base was read."""

    folder: Path
    manifest: Manifest
    source: Source
    kind: Kind
    labels: Labels
    room: int  # longest example, in tokens

    def refuse_longer(self, tokens: int) -> None:
        """Refuse examples that it cannot read.

        Raises:
            RecipeError: they are longer than its base allows.
        """
        if tokens > self.room:
            raise RecipeError(
                f"examples have up to {tokens} tokens, and the teacher {self.folder} has room for {self.room}: "
                f"set max_length to {self.room} or less"
            )

    def load(self, *, pad: int, hardware: Hardware) -> nn.Module:
        """The model: frozen, in evaluation mode, on the device of the run."""
        specs, precision = artefact.specs(self.manifest), self.manifest.base.precision
        with torch.random.fork_rng():  # an adapter may draw its start, and the student's dropout must not depend on it
            model = load_base(
                self.source, specs, kind=self.kind, labels=self.labels, precision=precision, hardware=hardware
            )
            if model.config.pad_token_id is None:
                model.config.pad_token_id = pad
            stack = load(model, self.folder)
        for parameter in (*model.parameters(), *stack.trainable().values()):
            parameter.requires_grad_(False)
        return stack.model.eval()


def find_teacher(loaded: Loaded, reader: Reader, hardware: Hardware) -> Teacher | None:
    """The teacher that the task names, if it names one.

    Raises:
        RecipeError: it reads other tokens, or names other classes.
        ArtefactError: it is no adapter folder that a run wrote.
        StackError: the base is to be the reference, and an adapter trains the base itself.
    """
    if not loaded.task.refers():
        return None
    folder = loaded.task.teacher_folder()
    if folder is None:
        _check_base(loaded)
        return None
    with loaded.place("task", loaded.task_name, "teacher"):
        return _checked(loaded, folder, reader, hardware)


def _check_base(loaded: Loaded) -> None:
    """Refuse to compare with a base that the run changes."""
    for named in loaded.stack:
        if not named.adapter.capabilities.base_frozen:
            with loaded.place("adapters"):
                raise StackError(
                    f"{named.name} trains the base itself, so {loaded.task_name} has no base to compare with"
                )


def _checked(loaded: Loaded, written: str, reader: Reader, hardware: Hardware) -> Teacher:
    folder = adapter_folder(loaded.folder / written)
    manifest = artefact.read(folder).manifest
    facts, kind = manifest.run, loaded.task.model_kind()
    tokenizer = facts.get("tokenizer")
    if manifest.base.source is None or not isinstance(tokenizer, dict) or "labels" not in facts:
        raise ArtefactError(f"{folder} does not say how it reads text: it was not written by a run")
    if tokenizer.get("vocabulary") != tokenizer_digest(reader.tokenizer)["vocabulary"]:
        raise RecipeError(
            f"the tokenizer of the teacher's base {manifest.base.source} has another vocabulary than that of "
            f"{loaded.recipe.base}: a student learns from a teacher with the same tokens"
        )
    theirs, ours = facts["labels"] or [], list(reader.labels or ())
    if theirs != ours:
        raise RecipeError(f"the teacher {folder} was trained on the classes {theirs}, and the student's are {ours}")
    source = locate(manifest.base.source, revision=manifest.base.revision)
    place, stack = source.materialise(), build(artefact.specs(manifest))
    load_options(
        place, stack, kind=kind, precision=manifest.base.precision, hardware=hardware, revision=source.revision
    )
    config = read_config(place, source.revision).get_text_config()
    room = getattr(config, POSITIONS, sys.maxsize) - sum(map(_positions, stack))
    return Teacher(folder, manifest, source, kind, reader.labels, room)


def _positions(named: Named) -> int:
    with answerable(named.name, named.entry, "positions"):
        return named.adapter.positions()


def referring(
    task: Task, teacher: Teacher | None, stack: Stack, autocast: torch.autocast, *, pad: int, hardware: Hardware
) -> Refer:
    """What the reference model says of a batch: the teacher, loaded now, or the base of the stack."""
    if teacher is None:
        return reference(task, stack, autocast)
    model = teacher.load(pad=pad, hardware=hardware)

    def refer(batch: Batch) -> Batch:
        with torch.no_grad(), torch.autocast(hardware.kind, enabled=False):  # in its own precision
            return task.refer(model, batch)

    return refer
