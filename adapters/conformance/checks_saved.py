"""Checks of what is written: complete, strict, the same each time, enough to go on from, and readable elsewhere."""

import copy
import inspect
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import artefact
from ..errors import ArtefactError, StackError
from ..manifest import TENSORS
from ..stack import Stack
from . import tiny_models
from .case import Case, Declared, Loop, Snapshot, adapters_only, assert_equal, trained
from .fresh_process import logits_of_loaded, scratch

__all__ = ["peft_reads", "resuming", "saving", "several_saved", "strictness"]

READ_BY_PEFT = 1e-5  # of the largest logit


def saving(case: Case) -> None:
    """Loaded in a fresh process, what was saved gives the same outputs, bit for bit; saving twice, the same bytes."""
    stack = trained(case, case.start())
    expected = case.logits(stack.model)
    with scratch() as folder:
        artefact.save(stack, folder / "adapter")
        _assert_holds_exactly(stack, folder / "adapter")
        artefact.save(stack, folder / "again")
        for path in _files(folder / "adapter"):
            same = (folder / "adapter" / path).read_bytes() == (folder / "again" / path).read_bytes()
            assert same, f"saved twice, {path} has other bytes"
        loaded = logits_of_loaded(folder / "adapter", case.family, case.packs)
    assert_equal(loaded, expected, "loaded in a fresh process, it gives other outputs")


def _files(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]


def _tensor_file(folder: Path) -> Path:
    """The first file with tensors."""
    return next(folder / path for path in _files(folder) if path.name == TENSORS)


def _assert_holds_exactly(stack: Stack, folder: Path) -> None:
    carrier = next((a for a in stack.attachments if a.tensors()), None)
    assert carrier is not None, "tensors() is empty, so nothing that was trained is saved"
    expected = {**carrier.tensors(), **{f"{carrier.head_prefix}{name}": p for name, p in stack.heads.items()}}
    written = load_file(_tensor_file(folder))
    wrong = sorted(written.keys() ^ expected.keys())
    assert not wrong, f"{wrong[0]} is in only one of tensors() and the file"
    for key, tensor in expected.items():
        assert_equal(written[key], tensor.detach().contiguous(), f"{key} is not written as it is")


def strictness(case: Case) -> None:
    """A file with a tensor less, a tensor more, or a tensor by another name is refused, and the model left alone."""
    stack = trained(case, case.start(), 1)
    with scratch() as folder:
        artefact.save(stack, folder / "adapter")
        file = _tensor_file(folder / "adapter")
        whole = load_file(file)
        first, *others = whole.items()
        damaged: dict[str, Mapping[str, Tensor]] = {
            f"without {first[0]}": dict(others),
            "with one that is not its own": {**whole, "not.its.own": torch.zeros(1)},
            f"with {first[0]} under another name": {**dict(others), f"{first[0]}_renamed": first[1]},
        }
        model = case.load()
        before = Snapshot.of(model)
        for how, tensors in damaged.items():
            save_file(dict(tensors), file, metadata={"format": "pt"})
            _assert_refused(model, folder / "adapter", how)
            faults = before.differences(model)
            assert not faults, f"after refusing a file {how}, {faults[0]}"


def _assert_refused(model: torch.nn.Module, folder: Path, how: str) -> None:
    try:
        artefact.load(model, folder)
    except ArtefactError:
        return
    raise AssertionError(f"a file {how} is loaded all the same")


def resuming(case: Case) -> None:
    """Three steps, saved, loaded into a new process's worth of objects, and three more are six steps, bit for bit."""
    straight = Loop(case.start(), case.family)
    straight.run(3)
    first = Loop(case.start(), case.family)
    first.run(3)
    for name, tensor in first.stack.trainable().items():
        assert_equal(tensor, straight.stack.trainable()[name], f"two equal runs differ in {name}")
    second = Loop(case.start(), case.family)
    with scratch() as folder:
        artefact.save(first.stack, folder / "adapter")
        artefact.fill(second.stack, folder / "adapter")
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    for theirs, ours in zip(first.stack.attachments, second.stack.attachments, strict=True):
        ours.load_state(json.loads(json.dumps(theirs.state(), allow_nan=False)))
    second.done = first.done
    straight.run(3)
    second.run(3)
    resumed = second.stack.trainable()
    for name, tensor in straight.stack.trainable().items():
        assert_equal(resumed[name], tensor, f"after three steps, saving, resuming and three more, {name} differs")
    logits = case.logits(straight.stack.model)
    assert_equal(case.logits(second.stack.model), logits, "the resumed run gives other outputs")


def several_saved(case: Case) -> None:
    """Two instances of one stack are saved in a folder each, and come back as they were."""
    if not case.capabilities.base_frozen:
        raise Declared("it trains the base itself")
    try:
        stack = case.attach(case.load(), "first", "second")
    except StackError as refusal:
        raise Declared(str(refusal)) from None
    before = {name: p.detach().clone() for name, p in adapters_only(stack).items()}
    trained(case, stack)
    for attachment in stack.attachments:
        still = all(torch.equal(p, before[name]) for name, p in attachment.trainable().items())
        assert not still, f"{attachment.name!r} is not trained beside another instance"
    with scratch() as folder:
        artefact.save(stack, folder / "both")
        missing = [n for n in ("first", "second") if not (folder / "both" / n / TENSORS).is_file()]
        assert not missing, f"saving two instances writes no folder {missing[0]!r}"
        again = case.load()
        artefact.load(again, folder / "both")
    assert_equal(case.logits(again), case.logits(stack.model), "two instances saved and loaded give other outputs")


def peft_reads(case: Case) -> None:
    """Stock PEFT, given the folder and the base, computes the same logits."""
    stack = trained(case, case.start())
    expected = case.logits(stack.model)
    with scratch() as folder:
        artefact.save(stack, folder / "adapter")
        base = case.load()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it calls deprecated names of transformers
            read = peft.PeftModel.from_pretrained(base, str(_tensor_file(folder / "adapter").parent))
    inputs = tiny_models.batch(case.family)
    if "task_ids" in inspect.signature(read.forward).parameters:  # of methods for several tasks, there is one here
        inputs["task_ids"] = torch.zeros(len(tiny_models.ROWS), dtype=torch.long)
    found = tiny_models.logits(read, inputs)
    if found.ndim == 3:  # learned positions may have logits of their own, in front
        found = found[:, -expected.shape[1] :]
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= READ_BY_PEFT, (
        f"PEFT's logits differ by {error:.2g} of the largest one ({READ_BY_PEFT:g} is allowed)"
    )
