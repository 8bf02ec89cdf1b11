"""The loop: accumulate a window, step, evaluate, checkpoint. Flat, ours, readable from top to bottom.

The gradient of a step is that of (sum of all losses in the window) / (weight of the window), whatever the split into
micro-batches or processes, and also in the short window at the end of an epoch.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from onegpu.adapters import DeviceError, Interrupted, ProofFailed, Stack
from onegpu.adapters.device import peak_memory
from onegpu.adapters.fingerprints import Fingerprint

from .batches import Plan, micro_batches
from .checkpoints import write_checkpoint
from .display import Display
from .evaluation import evaluate, on_device
from .proofs import StepProof, explain_non_finite, first_bad_gradient, frozen_base
from .runfolder import RunFolder
from .schema import Train
from .tasks import Example, Objective, Task

__all__ = ["Session", "train"]


@dataclass
class Session:
    """Everything live that the loop works on."""

    settings: Train
    task: Task
    stack: Stack
    base: Fingerprint
    examples: list[Example]
    held_out: list[Example]
    pad: int
    steps: int
    micro_batch: int
    autocast: torch.autocast
    optimizer: Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    accelerator: Accelerator
    folder: RunFolder
    display: Display
    save_adapter: Any  # (folder) -> None
    step: int = 0  # optimiser steps done
    scores: list[dict[str, float]] = field(default_factory=list)  # one per evaluation, the first with the adapter off

    @property
    def model(self) -> nn.Module:
        """What is called."""
        return self.stack.model


def train(s: Session) -> str:
    """Run the remaining steps; returns the verdict of the step proof.

    Raises:
        ProofFailed: a loss or gradient is not finite, a tensor was not trained, or the base changed.
        Interrupted: after the step during which the user asked to stop.
        DeviceError: the device ran out of memory.
    """
    plan = Plan(len(s.examples), s.settings.effective_batch, s.settings.seed)
    proof = StepProof(s.stack)
    trainable = s.stack.trainable()
    if s.step == 0:
        with s.stack.base_only():
            _evaluate(s)
    s.model.train()
    with _asked_to_stop() as asked, s.display.training(s.steps, s.step) as bar:
        while s.step < s.steps:
            began = time.perf_counter()
            for attachment in s.stack.attachments:
                attachment.before_step(s.step)
            window = [s.examples[i] for i in plan.window(s.step)]
            loss, weight = _accumulate(s, window, trainable)
            for attachment in s.stack.attachments:
                attachment.after_backward(s.step)
            norm = _clip(s, trainable)
            rates = [float(rate) for rate in s.schedule.get_last_lr()]
            judged = proof.judged
            proof.before_step(max(rates) if math.isfinite(norm) else 0.0)  # fp16 passes over a step that overflowed
            s.scaler.step(s.optimizer)
            s.scaler.update()
            proof.after_step()
            for attachment in s.stack.attachments:
                attachment.after_step(s.step)
            if proof.judged > judged == 0:
                frozen_base(s.stack, s.base)  # once: it reads every byte of the base
            s.schedule.step()
            s.optimizer.zero_grad()
            s.step += 1
            record = {
                "step": s.step,
                "epoch": round(plan.epoch(s.step), 6),
                "loss": loss,
                "learning_rate": max(rates),
                "learning_rates": rates,
                "grad_norm": norm if math.isfinite(norm) else None,
                "tokens": sum(len(example.ids) for example in window),
                "supervised_tokens": weight,
                "seconds": time.perf_counter() - began,
                "peak_memory": peak_memory(s.accelerator.device),
            }
            if s.accelerator.is_main_process:
                s.folder.record(**record)
            bar.advance(record)
            if _due(s.settings.evaluate_every, s.step) and s.step < s.steps:
                _evaluate(s)
            if asked or (_due(s.settings.checkpoint_every, s.step) and s.step < s.steps):
                _checkpoint(s)
            if asked:
                raise Interrupted(f"interrupted after step {s.step}; go on with --resume")
    _evaluate(s)
    frozen_base(s.stack, s.base)
    return proof.verdict()


def _accumulate(s: Session, window: list[Example], trainable: dict[str, nn.Parameter]) -> tuple[float, float]:
    """Leave the gradient of the window in `.grad`; returns (loss, weight) of the whole window."""
    world, rank = s.accelerator.num_processes, s.accelerator.process_index
    total = torch.zeros(2, dtype=torch.float64)  # loss, weight
    for chunk in micro_batches(window, s.micro_batch)[rank::world]:
        batch = on_device(s.task.collate(chunk, s.pad), s.accelerator.device)
        try:
            with s.autocast:
                objective = s.task.objective(s.model, batch)
            _check_finite(s, objective, batch)
            s.scaler.scale(objective.total).backward()
        except torch.OutOfMemoryError as cause:
            raise DeviceError(_out_of_memory(s, chunk)) from cause
        total += torch.tensor([objective.total.item(), objective.weight], dtype=torch.float64)
    total = s.accelerator.reduce(total.to(s.accelerator.device), "sum").cpu()
    loss, weight = total.tolist()
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


def _check_finite(s: Session, objective: Objective, batch: dict[str, Tensor]) -> None:
    if not torch.isfinite(objective.total):
        where = explain_non_finite(s.stack, s.task, batch)
        raise ProofFailed(f"step {s.step + 1}: the loss is {objective.total.item()}, {where}")


def _clip(s: Session, trainable: dict[str, nn.Parameter]) -> float:
    """Norm of the gradient before clipping, in true units."""
    s.scaler.unscale_(s.optimizer)
    if not s.scaler.is_enabled() and (bad := first_bad_gradient(trainable)):  # fp16 skips such a step by itself
        raise ProofFailed(f"step {s.step + 1}: the gradient of {bad} is not finite")
    limit = float("inf") if s.settings.clip is None else s.settings.clip
    return float(nn.utils.clip_grad_norm_(list(trainable.values()), limit))


def _evaluate(s: Session) -> None:
    if not s.held_out:
        return
    scores = evaluate(s.model, s.task, s.held_out, micro_batch=s.micro_batch, pad=s.pad, autocast=s.autocast)
    if not math.isfinite(scores["loss"]):
        batch = s.task.collate(micro_batches(s.held_out, s.micro_batch)[0], s.pad)
        where = explain_non_finite(s.stack, s.task, on_device(batch, s.accelerator.device))
        raise ProofFailed(f"step {s.step}: the held-out loss is {scores['loss']}, {where}")
    s.scores.append(scores)
    if s.accelerator.is_main_process:
        s.folder.record(step=s.step, evaluation=scores, adapter=s.step > 0)
    s.display.line(f"step {s.step}", "held-out " + "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))


def _checkpoint(s: Session) -> None:
    if s.accelerator.is_main_process:
        write_checkpoint(
            s.folder.checkpoint(s.step),
            stack=s.stack,
            save_adapter=s.save_adapter,
            optimizer=s.optimizer,
            schedule=s.schedule,
            scaler=s.scaler,
            progress={"step": s.step, "scores": s.scores},
        )
        s.folder.drop_old_checkpoints()
    s.accelerator.wait_for_everyone()


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _out_of_memory(s: Session, chunk: list[Example]) -> str:
    smaller = max(1, len(chunk) // 2)
    return (
        f"out of memory with {len(chunk)} examples of up to {len(chunk[0].ids)} tokens in one pass: "
        f"set train.micro_batch to {smaller} (the result stays the same), train.gradient_checkpointing to true, "
        "or a smaller max_length"
    )


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Becomes non-empty at the first Ctrl-C, so that the current step can end; the second one interrupts at once."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():  # only the main one may handle signals
        yield asked
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
