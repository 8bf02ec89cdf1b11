"""The real loop: its gradient never depends on how a window is cut."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from onegpu.adapters import DeviceError, Interrupted, Stack, attach, save
from onegpu.adapters.fingerprints import Fingerprint
from onegpu.recipes import Loaded, Outcome, preflight, proofs, training
from onegpu.recipes.training import Session

LORA = {"lora": {"rank": 4}}
PREFIX = {"prefix": {"length": 3}}
STACKS: dict[str, list[Any]] = {
    "lora": [LORA],
    "prefix": [PREFIX],
    "lora with layer-wise rates": [LORA, {"layerwise-lr": {"decay": 0.5}}],
    "full": ["full"],
    "lora and prefix": [LORA, PREFIX],
    "lora on int8": ["int8", LORA],
    "lora on nf4": ["nf4", LORA],
    "lora on fp4": ["fp4", LORA],
}
# The update is the gradient times a power of two, which loses nothing.
EXACT = {"optimizer": "sgd", "learning_rate": 1.0, "clip": None, "schedule": "constant", "checkpoint_every": None}
# Where the values to start from are large beside their gradient, more of it survives the addition.
RATES = {"prefix": 64.0, "full": 4.0}
TOLERANCE = 1e-6

Tensors = dict[str, Tensor]
Recipe = Callable[..., Loaded]
Run = Callable[..., Outcome]


def _start(loaded: Loaded, saved_tensors: Callable[[Path], Tensors], folder: Path) -> Tensors:
    """The tensors of a fresh adapter, as they would be saved."""
    job = preflight(loaded)
    model = job.load_base()
    stack = attach(model, loaded.stack, seed=loaded.recipe.train.seed, tokenizer=job.reader.tokenizer)
    save(stack, folder)
    return saved_tensors(folder)


def _update(after: Tensors, start: Tensors) -> Tensors:
    assert after.keys() == start.keys()
    return {name: after[name].double() - start[name].double() for name in start}


def _distance(ours: Tensors, theirs: Tensors) -> float:
    """Norm of the difference of two updates, over the norm of one."""
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[name] - theirs[name]).square().sum()) for name in ours)
    norm = sum(float(theirs[name].square().sum()) for name in ours)
    assert norm > 0
    return float((difference / norm) ** 0.5)


@pytest.fixture
def updates(
    run: Run, saved_tensors: Callable[[Path], Tensors], metrics: Callable[[Path], list[dict[str, Any]]], tmp_path: Path
) -> Callable[..., list[tuple[Tensors, list[float]]]]:
    """`updates(recipe, stack, [{...}, {...}])`: (update, logged losses) of a run with each of these settings."""

    count = itertools.count()

    def of(recipe: Recipe, stack: list[Any], variants: list[dict[str, Any]]) -> list[tuple[Tensors, list[float]]]:
        start = _start(recipe(stack), saved_tensors, tmp_path / f"start-{next(count)}")
        found = []
        for settings in variants:
            name = f"run-{next(count)}"
            outcome = run(recipe(stack, train=EXACT | settings), name)
            losses = [line["loss"] for line in metrics(tmp_path / name)]
            found.append((_update(saved_tensors(outcome.adapter), start), losses))
        return found

    return of


Updates = Callable[..., list[tuple[Tensors, list[float]]]]


def _assert_all_the_same(found: list[tuple[Tensors, list[float]]], tolerance: float = TOLERANCE) -> None:
    expected, losses = found[0]
    assert len(found) > 1
    for update, logged in found[1:]:
        assert _distance(update, expected) <= tolerance
        assert logged == pytest.approx(losses, rel=tolerance)


@pytest.mark.parametrize("stack", STACKS)
def test_the_gradient_of_a_window_does_not_depend_on_its_split(
    stack: str, chat_recipe: Recipe, updates: Updates
) -> None:
    settings = {"steps": 1, "effective_batch": 10, "learning_rate": RATES.get(stack, 1.0)}
    _assert_all_the_same(updates(chat_recipe, STACKS[stack], [settings | {"micro_batch": n} for n in (10, 5, 2, 1)]))


@pytest.mark.parametrize("stack", STACKS)
def test_a_ragged_split_and_the_short_window_at_the_end_count_as_they_should(
    stack: str, chat_recipe: Recipe, updates: Updates
) -> None:
    # Ten rows make windows of 4, 4 and 2; a rate this small keeps the later gradients from magnifying rounding.
    rate = 0.125 * RATES.get(stack, 1.0)
    settings = {"epochs": 1, "steps": None, "effective_batch": 4, "learning_rate": rate}
    found = updates(chat_recipe, STACKS[stack], [settings | {"micro_batch": n} for n in (4, 3)])
    assert [len(losses) for _, losses in found] == [3, 3]
    # Of a base that trains itself, the second and third step go on from what was rounded in all of its weights.
    _assert_all_the_same(found, 2 * TOLERANCE if stack == "full" else TOLERANCE)


@pytest.mark.parametrize("stack", ["lora", "full"])
def test_a_classifier_does_not_depend_on_the_split_either(stack: str, class_recipe: Recipe, updates: Updates) -> None:
    rate = 0.125 * RATES.get(stack, 1.0)
    settings = {"epochs": 1, "steps": None, "effective_batch": 4, "learning_rate": rate}
    _assert_all_the_same(updates(class_recipe, STACKS[stack], [settings | {"micro_batch": n} for n in (4, 3)]))


def test_the_loop_does_what_a_few_plain_lines_do(
    chat_recipe: Recipe, updates: Updates, saved_tensors: Callable[[Path], Tensors], tmp_path: Path
) -> None:
    settings = {"epochs": 1, "steps": None, "effective_batch": 4, "micro_batch": 3, "learning_rate": 0.5}
    ((update, losses),) = updates(chat_recipe, [LORA], [settings])
    loaded = chat_recipe([LORA])
    job = preflight(loaded)
    stack = attach(job.load_base(), loaded.stack, seed=0)
    trainable = stack.trainable()
    begin = {name: p.detach().clone() for name, p in trainable.items()}
    expected = []
    for step in range(3):
        batch = job.loaded.task.collate([job.dataset.train[i] for i in job.plan.window(step)], 1)
        logits = stack.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
        gradients = torch.autograd.grad(loss, list(trainable.values()))
        with torch.no_grad():
            for parameter, gradient in zip(trainable.values(), gradients, strict=True):
                parameter.sub_(0.5 * gradient)
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=TOLERANCE)
    plain = {
        ".:base_model.model." + name.removesuffix(".lora") + ".weight": (p.detach() - begin[name]).double()
        for name, p in trainable.items()
    }
    # Packed and fused, three steps round in other places than these.
    assert _distance(update, plain) <= 3 * TOLERANCE


def test_layers_are_stepped_by_their_share_of_one_gradient(chat_recipe: Recipe, updates: Updates) -> None:
    settings = {"steps": 1, "effective_batch": 10}
    ((plain, _),) = updates(chat_recipe, [LORA], [settings])
    ((scaled, _),) = updates(chat_recipe, [LORA, {"layerwise-lr": {"decay": 0.5}}], [settings])
    shares = {0: 0.25, 1: 0.5}
    for layer, share in shares.items():
        moved = [name for name in plain if f"layers.{layer}." in name and "lora_B" in name]
        assert moved
        for name in moved:
            assert (scaled[name] - share * plain[name]).norm() <= TOLERANCE * plain[name].norm()


TWO_PROCESSES = """
import sys
from pathlib import Path

import torch

from onegpu.recipes import load_recipe, run

torch.set_num_threads(1)
run(load_recipe(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("adapter", [LORA, {"lisa": {"active": 1, "interval": 1}}], ids=["lora", "lisa"])
@pytest.mark.parametrize(
    "split", [{"micro_batch": 3}, {"micro_batch": 5, "effective_batch": 10, "steps": 1, "epochs": None}], ids=str
)
@pytest.mark.slow
def test_two_processes_step_as_one_does(
    split: dict[str, Any],
    adapter: dict[str, Any],
    chat_recipe: Recipe,
    updates: Updates,
    saved_tensors: Callable[[Path], Tensors],
    metrics: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    # Windows of 4, 4 and 2 rows in passes of 3: of the last one, the second process gets nothing.
    settings = {"epochs": 1, "steps": None, "effective_batch": 4, "learning_rate": 0.125} | split
    ((expected, losses),) = updates(chat_recipe, [adapter], [settings])
    recipe, script = tmp_path / "recipe.yaml", tmp_path / "go.py"
    recipe.write_text(chat_recipe([adapter], train=EXACT | settings).as_yaml(), "utf-8")
    script.write_text(TWO_PROCESSES, "utf-8")
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(script), str(recipe), str(tmp_path / "two")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    start = saved_tensors(tmp_path / "start-0")
    assert _distance(_update(saved_tensors(tmp_path / "two/adapter"), start), expected) <= TOLERANCE
    lines = metrics(tmp_path / "two")
    assert [line["step"] for line in lines] == list(range(1, len(losses) + 1))  # one process writes
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=TOLERANCE)


# --- clipping, records, cadence ---------------------------------------------------------------------------------------


def test_a_gradient_is_clipped_to_its_largest_norm(chat_recipe: Recipe, updates: Updates) -> None:
    settings = {"steps": 1, "effective_batch": 10}
    (plain, _), (clipped, _), (loose, _) = updates(
        chat_recipe, [LORA], [settings, settings | {"clip": 0.125}, settings | {"clip": 1000.0}]
    )
    norm = sum(float(value.square().sum()) for value in plain.values()) ** 0.5
    assert norm > 0.125
    assert _distance({name: value / norm * 0.125 for name, value in plain.items()}, clipped) <= 1e-4
    assert _distance(plain, loose) <= TOLERANCE


def test_gradient_checkpointing_changes_no_gradient(chat_recipe: Recipe, updates: Updates) -> None:
    settings = {"steps": 1, "effective_batch": 10}
    variants = [settings | {"gradient_checkpointing": on} for on in (False, True, {"every": 2}, {"offload": True})]
    _assert_all_the_same(updates(chat_recipe, ["nf4", LORA, PREFIX], variants))


def test_each_step_is_recorded_with_all_that_belongs_to_it(
    chat_recipe: Recipe, run: Run, metrics: Callable[[Path], list[dict[str, Any]]], tmp_path: Path
) -> None:
    loaded = chat_recipe(train={"steps": 4, "effective_batch": 4, "micro_batch": 3, "schedule": "linear"})
    run(loaded)
    lines = metrics(tmp_path / "out")
    job = preflight(loaded)
    dataset, plan = job.dataset, job.plan
    windows = [[dataset.train[i] for i in plan.window(step)] for step in range(4)]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["epoch"] for line in lines] == [0.4, 0.8, 1.0, 1.4]
    assert [line["tokens"] for line in lines] == [sum(len(e.ids) for e in window) for window in windows]
    assert [line["supervised_tokens"] for line in lines] == [sum(e.supervised for e in window) for window in windows]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    for line in lines:
        assert line["loss"] > 0
        assert line["grad_norm"] > 0
        assert line["seconds"] > 0
        assert line["peak_memory"] > 2**20


@pytest.mark.parametrize(
    ("every", "steps"), [(2, [0, 2, 4, 5]), (1, [0, 1, 2, 3, 4, 5]), (None, [0, 5]), (5, [0, 5]), (9, [0, 5])]
)
def test_evaluations_come_before_the_first_step_on_the_cadence_and_after_the_last(
    every: int | None,
    steps: list[int],
    chat_recipe: Recipe,
    run: Run,
    evaluations: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    outcome = run(chat_recipe(task={"evaluation": 0.2}, train={"steps": 5, "evaluate_every": every}))
    lines = evaluations(tmp_path / "out")
    assert [line["step"] for line in lines] == steps
    assert [line["adapter"] for line in lines] == [step > 0 for step in steps]
    assert (lines[0]["evaluation"], lines[-1]["evaluation"]) == (outcome.before, outcome.after)


@pytest.mark.parametrize(("every", "kept"), [(2, [2, 4]), (1, [4, 5]), (None, []), (5, [5])])
def test_checkpoints_come_on_their_cadence_and_the_last_two_are_kept(
    every: int | None, kept: list[int], chat_recipe: Recipe, run: Run, tmp_path: Path
) -> None:
    run(chat_recipe(train={"steps": 5, "checkpoint_every": every}))
    found = sorted(path.name for path in (tmp_path / "out/checkpoints").glob("*"))
    assert found == [f"step-{step:06d}" for step in kept]


def test_the_base_is_compared_once_at_the_start_and_once_at_the_end(
    chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It reads every byte of the base: once a step would cost more than the step.
    calls: list[int] = []
    real = proofs.frozen_base

    def count(stack: Stack, before: Fingerprint) -> None:
        calls.append(1)
        real(stack, before)

    monkeypatch.setattr(training, "frozen_base", count)
    for stack in ([PREFIX], [LORA]):
        calls.clear()
        run(chat_recipe(stack, train={"steps": 6}), next(iter(stack[0])))
        assert len(calls) == 2


# --- stopping ---------------------------------------------------------------------------------------------------------


def _interrupting(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while that step is being computed."""
    real = training._accumulate

    def accumulate(s: Session, *args: Any) -> tuple[float, float]:
        if s.step + 1 == step:
            signal.raise_signal(signal.SIGINT)
        return real(s, *args)

    monkeypatch.setattr(training, "_accumulate", accumulate)


def test_an_interrupted_run_ends_its_step_and_writes_a_checkpoint(
    chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _interrupting(2, monkeypatch)
    with pytest.raises(Interrupted, match=r"interrupted after step 2; .*--resume") as caught:
        run(chat_recipe(train={"steps": 5}))
    assert caught.value.exit_code == 130
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step-000002"]
    assert not (tmp_path / "out/adapter").exists()


def test_the_second_interrupt_stops_at_once(
    chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = training._accumulate

    def accumulate(s: Session, *args: Any) -> tuple[float, float]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return real(s, *args)

    monkeypatch.setattr(training, "_accumulate", accumulate)
    with pytest.raises(KeyboardInterrupt):
        run(chat_recipe(train={"steps": 5}))
    assert not (tmp_path / "out/checkpoints").exists()


def test_interrupts_mean_after_a_run_what_they_meant_before(chat_recipe: Recipe, run: Run) -> None:
    before = signal.getsignal(signal.SIGINT)
    run(chat_recipe(train={"steps": 1}))
    assert signal.getsignal(signal.SIGINT) is before


def test_running_out_of_memory_says_what_to_change(
    chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def objective(self: Any, model: Any, batch: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    loaded = chat_recipe(train={"effective_batch": 8, "micro_batch": 8})
    monkeypatch.setattr(type(loaded.task), "objective", objective)
    with pytest.raises(DeviceError, match=r"out of memory with 448 tokens .*set train\.tokens_per_micro_batch to 224"):
        run(loaded)
    loaded = chat_recipe(task={"packing": False}, train={"effective_batch": 8, "micro_batch": 8})
    with pytest.raises(DeviceError, match=r"out of memory with 8 examples .*set train\.micro_batch to 4"):
        run(loaded, "padded")


def test_metrics_are_one_json_object_a_line(chat_recipe: Recipe, run: Run, tmp_path: Path) -> None:
    run(chat_recipe(task={"evaluation": 0.2}))
    lines = (tmp_path / "out/metrics.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 4
    assert all(isinstance(json.loads(line), dict) for line in lines)
