"""The loop: accumulate a window, step, evaluate, checkpoint. Flat, ours, readable from top to bottom.

The gradient of a step is that of (sum of all losses in the window) / (weight of the window), whatever the split into
micro-batches or processes, and also in the short window at the end of an epoch.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from onegpu.adapters import ArtefactError, DeviceError, Interrupted, ProofFailed, Stack, artefact
from onegpu.adapters.device import peak_memory
from onegpu.adapters.files import atomic_folder, damage, move, seal
from onegpu.adapters.fingerprints import Fingerprint

from .checkpoints import random_states, write_checkpoint
from .compiling import Compilation
from .data.batches import Plan
from .display import Display
from .evaluation import Evaluator, on_device, shown, surveyed
from .optimisers import lay_alike
from .proofs import Untrained, explain_cut, explain_non_finite, first_bad_gradient, frozen_base
from .references import References
from .runfolder import RunFolder
from .schema import Train
from .selection import Selection
from .step_proof import StepProof
from .stopping import asked_to_stop
from .tasks import Batch, Example, Objective, Task

__all__ = ["Session", "keep_best", "train"]


@dataclass
class Session:
    """Everything live that the loop works on."""

    settings: Train
    task: Task
    stack: Stack
    base: Fingerprint
    examples: Sequence[Example]
    held_out: Sequence[Example]
    plan: Plan
    steps: int
    evaluator: Evaluator
    optimizer: Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    accelerator: Accelerator
    folder: RunFolder
    display: Display
    save_adapter: Callable[[Path], None]
    prove: Callable[[Path], object]  # that a saved adapter is the one that is trained
    selection: Selection
    compilation: Compilation = field(default_factory=Compilation)
    step: int = 0  # optimiser steps done
    scores: list[dict[str, float]] = field(default_factory=list)  # one per evaluation, the first with the adapter off
    test: dict[str, float] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)  # what a resumed run went on in spite of
    proof: StepProof = field(init=False)  # made at once: a stack that is not what it declares must not start
    references: References = field(init=False)  # what the reference model said
    verdict: str = ""  # of the step proof, once the last step is done
    best_restored: bool = False  # the stack holds the adapter of the best evaluation again, not that of the last step

    def __post_init__(self) -> None:
        self.proof = StepProof(self.stack, self.optimizer, lambda total: self.accelerator.reduce(total, "sum"))
        again, refer = self.steps > self.plan.windows_per_epoch, self.evaluator.refer
        self.references = References(self.task, refer, examples=len(self.examples), again=again)

    @property
    def kept_step(self) -> int:
        """The step after which the adapter was what it is now."""
        return self.selection.step or 0 if self.best_restored else self.step

    @property
    def kept_scores(self) -> dict[str, float]:
        """Its scores, or the last ones before it."""
        return self.selection.scores if self.best_restored else (self.scores or [{}])[-1]

    @property
    def model(self) -> nn.Module:
        """What is called."""
        return self.stack.model

    def window(self, step: int) -> Sequence[Example]:
        """The examples of a step, counted from 0, as the task wants them for it."""
        return self.task.prepare([self.examples[i] for i in self.plan.window(step)], self.plan.window_seed(step))

    def progress(self) -> dict[str, Any]:
        """Where the run stands, for a checkpoint."""
        found = {"step": self.step, "scores": self.scores, "selection": self.selection.state(), "changes": self.changes}
        return copy.deepcopy(found | {"proof": self.proof.state()})

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Stand where a checkpoint says."""
        self.step, self.scores, self.changes = progress["step"], progress["scores"], progress["changes"]
        self.selection = self.selection.resumed(progress["selection"])
        self.proof.resume(progress["proof"])


def train(s: Session) -> str:
    """Run the remaining steps; returns the verdict of the step proof.

    Raises:
        ProofFailed: a loss or gradient is not finite, a tensor was not trained, or the base changed.
        Interrupted: after the step during which the user asked to stop.
        DeviceError: the device ran out of memory.
    """
    proof = s.proof
    trainable = s.stack.trainable()
    if s.step == 0:
        with s.stack.base_only():
            _evaluate(s)
    if 0 < s.step < s.steps and not s.selection.exhausted:
        _remember(s)
    s.model.train()
    base_seen, untrained = False, Untrained.of(s.stack)
    with asked_to_stop() as asked, s.display.training(s.steps, s.step) as bar:
        while s.step < s.steps and not s.selection.exhausted:
            began = time.perf_counter()
            for attachment in s.stack.attachments:
                attachment.before_step(s.step)
            window = s.window(s.step)
            loss, weight = _accumulate(s, window, trainable)
            for attachment in s.stack.attachments:
                attachment.after_backward(s.step)
            lay_alike(trainable.values())
            norm = _clip(s, trainable)
            rates = [float(rate) for rate in s.schedule.get_last_lr()]
            proof.before_step(max(rates) if math.isfinite(norm) else 0.0)  # fp16 passes over a step that overflowed
            s.scaler.step(s.optimizer)
            s.scaler.update()
            proof.after_step()
            for attachment in s.stack.attachments:
                attachment.after_step(s.step)
            if proof.judged and not base_seen:
                base_seen = True
                frozen_base(s.stack, s.base)  # once in a process: it reads every byte of the base
                untrained.check(s.stack)
            s.schedule.step()
            s.optimizer.zero_grad()
            s.step += 1
            record = {
                "step": s.step,
                "epoch": round(s.plan.epoch(s.step), 6),
                "loss": loss,
                "learning_rate": max(rates),
                "learning_rates": rates,
                "grad_norm": norm if math.isfinite(norm) else None,
                "tokens": sum(example.size for example in window),
                "supervised_tokens": weight,
                "seconds": time.perf_counter() - began,
                "peak_memory": peak_memory(s.accelerator.device),
            }
            if s.accelerator.is_main_process:
                s.folder.record(**record)
            bar.advance(record)
            if _due(s.settings.evaluate_every, s.step) and s.step < s.steps:
                _evaluate(s)
            stop = _anyone(s, asked)
            if stop or _due(s.settings.checkpoint_every, s.step):
                _checkpoint(s)
            if stop:
                raise Interrupted(_interrupted(s))
        before = s.progress()
        if not s.selection.exhausted:
            _evaluate(s)
        frozen_base(s.stack, s.base)
        untrained.check(s.stack)
        if _anyone(s, asked):
            _checkpoint(s, before)  # the last evaluation will be done again, and changes nothing
            raise Interrupted(_interrupted(s))
    return proof.verdict()


def _remember(s: Session) -> None:
    """In a run that goes on, hear again what the reference model had said by then, in the same batches."""
    if not s.references.complete:
        s.display.line("reference", "is asked again what it had said")
    for step in range(s.step):
        if s.references.complete:
            break
        for _ in _referred(s, s.window(step)):
            pass


def _anyone(s: Session, asked: Sequence[int]) -> bool:
    """Whether the user asked any process to stop: a signal reaches them at different times, and they stop together."""
    if s.accelerator.num_processes == 1:
        return bool(asked)
    return bool(s.accelerator.reduce(torch.tensor(len(asked), device=s.accelerator.device), "sum").item())


def _interrupted(s: Session) -> str:
    return f"interrupted after step {s.step}; go on with --resume"


def _accumulate(s: Session, window: Sequence[Example], trainable: dict[str, nn.Parameter]) -> tuple[float, float]:
    """Leave the gradient of the window in `.grad`; returns (loss, weight) of the whole window."""
    world = s.accelerator.num_processes
    total = torch.zeros(2, dtype=torch.float64)  # loss, weight
    s.proof.before_loss()
    for batch in _batches(s, window):
        try:
            with s.compilation(watched=s.proof.watches), s.task.at_work(s.model):
                with s.evaluator.autocast:
                    objective = s.task.objective(s.model, batch)
                _check_finite(s, objective, batch)
                s.scaler.scale(objective.total).backward()
        except torch.OutOfMemoryError as cause:
            raise DeviceError(_out_of_memory(batch, packed=s.task.packs)) from cause
        total += torch.tensor([objective.total.item(), objective.weight], dtype=torch.float64)
    total = s.accelerator.reduce(total.to(s.accelerator.device), "sum").cpu()
    loss, weight = total.tolist()
    s.proof.after_loss()
    for attachment in s.stack.attachments:
        if (penalty := attachment.penalty()) is not None:  # once per step, so it is weighted like the whole window
            s.scaler.scale(penalty * (weight / world)).backward()
    for parameter in trainable.values():
        if world > 1 and parameter.requires_grad:  # the others are frozen in this step, on every process
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = s.accelerator.reduce(parameter.grad, "sum")
        if parameter.grad is not None:
            parameter.grad /= weight
    return loss / weight, weight


def _batches(s: Session, window: Sequence[Example]) -> Iterator[Batch]:
    """This process's share of a window, with what the reference model and the whole window say of each batch."""
    return surveyed(
        s.task,
        s.model,
        _referred(s, window),
        autocast=s.evaluator.autocast,
        reduce=lambda total: s.accelerator.reduce(total, "sum"),
    )


def _referred(s: Session, window: Sequence[Example]) -> Iterator[Batch]:
    """This process's share of a window, with what the reference model says of each batch."""
    chunks = s.evaluator.cut(window)
    for chunk in chunks[s.accelerator.process_index :: s.accelerator.num_processes]:
        yield s.references(chunk, on_device(s.task.collate(chunk, s.evaluator.pad), s.accelerator.device))


def _check_finite(s: Session, objective: Objective, batch: Batch) -> None:
    if not torch.isfinite(objective.total):
        where = explain_non_finite(s.stack, s.task, batch)
        raise ProofFailed(f"step {s.step + 1}: the loss is {objective.total.item()}, {where}")
    if not objective.total.requires_grad:
        where = explain_cut(s.stack, s.task, batch)
        raise ProofFailed(f"step {s.step + 1}: the loss depends on nothing that is trained, {where}")


def _clip(s: Session, trainable: dict[str, nn.Parameter]) -> float:
    """Norm of the gradient before clipping, in true units."""
    s.scaler.unscale_(s.optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in trainable.values() if p.grad is not None])
    # It is finite only if every gradient is. In fp16, the scaler passes over a step that is not.
    if not s.scaler.is_enabled() and not torch.isfinite(norm) and (bad := first_bad_gradient(trainable)):
        raise ProofFailed(f"step {s.step + 1}: the gradient of {bad} is not finite")
    limit = float("inf") if s.settings.clip is None else s.settings.clip
    nn.utils.clip_grads_with_norm_(list(trainable.values()), limit, norm)
    return float(norm)


def _evaluate(s: Session) -> None:
    if not s.held_out:
        return
    scores = s.evaluator(s.model, s.held_out).scores
    if not math.isfinite(scores["loss"]):
        chunk = s.evaluator.cut(s.held_out[: s.evaluator.window])[0]
        batch = on_device(s.task.collate(chunk, s.evaluator.pad), s.accelerator.device)
        where = explain_non_finite(s.stack, s.task, batch | s.evaluator.refer(batch))
        raise ProofFailed(f"step {s.step}: the held-out loss is {scores['loss']}, {where}")
    s.selection.expect(scores)
    s.scores.append(scores)
    if s.accelerator.is_main_process:
        s.folder.record(step=s.step, evaluation=scores, adapter=s.step > 0)
    text = "  ".join(f"{name} {scores[name]:.4f}" for name in shown(s.task, scores))
    s.display.line(f"step {s.step}", f"held-out {text}")
    if s.step > 0 and s.selection.look(s.step, scores) and s.accelerator.is_main_process:
        _write_best(s)


def _write_best(s: Session) -> None:
    """Write the adapter as it is now, read it back, load it again; only then it is one to come back to."""
    unproved = s.folder.unproved(s.step)
    with atomic_folder(unproved) as partial:
        s.save_adapter(partial / "adapter")
        seal(partial)
    with _kept_aside(s, unproved):
        s.prove(unproved / "adapter")
    move(unproved, s.folder.best(s.step))


@contextmanager
def _kept_aside(s: Session, unproved: Path) -> Iterator[None]:
    """Say where it is what a proof inside the block found to be wrong."""
    try:
        yield
    except ProofFailed as cause:
        raise ProofFailed(f"step {s.step}: {cause} (kept aside as {unproved})") from cause


def keep_best(s: Session) -> None:
    """Go back to the adapter of the best evaluation, where the recipe wants it.

    Raises:
        ArtefactError: it was damaged since it was written.
        ProofFailed: what is live afterwards is not what was written.
    """
    if s.selection.step is None:
        return
    s.accelerator.wait_for_everyone()
    folder = s.folder.best(s.selection.step)
    if fault := damage(folder):
        raise ArtefactError(f"{folder} was damaged since it was written: {fault}. Go on with --resume")
    artefact.fill(s.stack, folder / "adapter")
    try:
        artefact.confirm(s.stack, folder / "adapter")
    except ArtefactError as cause:
        raise ProofFailed(f"the adapter of step {s.selection.step} did not come back as it was: {cause}") from cause
    ended = f"stopped after step {s.step}; " if s.selection.exhausted else ""
    s.display.line(
        "best",
        f"{ended}kept step {s.selection.step}: {s.selection.metric} {s.selection.scores[s.selection.metric]:.4f}",
    )
    s.best_restored = True


def _checkpoint(s: Session, progress: dict[str, Any] | None = None) -> None:
    """Write, read back, load again, compare; only then it is one to resume from."""
    states = random_states(s.accelerator)
    if s.accelerator.is_main_process:
        unproved = s.folder.unproved(s.step)
        s.folder.flush_records()
        with _kept_aside(s, unproved):
            write_checkpoint(
                unproved,
                stack=s.stack,
                save_adapter=s.save_adapter,
                optimizer=s.optimizer,
                scaler=s.scaler,
                states=states,
                progress=progress or s.progress(),
            )
            s.prove(unproved / "adapter")
        move(unproved, s.folder.checkpoint(s.step))
        s.folder.drop_old_checkpoints()
    s.accelerator.wait_for_everyone()


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _out_of_memory(batch: Batch, *, packed: bool) -> str:
    examples, tokens = batch["input_ids"].shape
    what, smaller = f"{examples} examples of up to {tokens} tokens", f"micro_batch to {max(1, examples // 2)}"
    if packed:
        what, smaller = f"{tokens} tokens", f"tokens_per_micro_batch to {max(1, tokens // 2)}"
    return (
        f"out of memory with {what} in one pass: set train.{smaller} (the result stays the same), "
        "train.gradient_checkpointing to true, or a smaller max_length"
    )
