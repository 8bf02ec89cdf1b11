"""A killed run loses nothing: real processes, killed by SIGKILL, and what they leave is resumed to the same bytes."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from onegpu.recipes import Loaded

PROGRAM = Path(__file__).with_name("killed_runs.py")
UNALIKE = {"seconds", "peak_memory"}  # of two runs that are otherwise equal
KILLED, INTERRUPTED = 9, 130 << 8  # wait statuses
# Rank 64 makes tensors of 4,096 elements, which the 8-bit optimiser does keep in 8 bits.
LORA = {"lora": {"rank": 64, "dropout": 0.1}}
BEST = {"best": {"metric": "loss"}, "evaluate_every": 1, "learning_rate": 0.3, "schedule": "constant"}
TRAIN = {"steps": 10, "effective_batch": 3, "micro_batch": 2, "schedule": "linear", "checkpoint_every": 2}

Recipe = Callable[..., Loaded]
Kills = Sequence[Sequence[Any]]


def _kill_and_resume(root: Path, jobs: Mapping[str, tuple[Loaded, Kills]]) -> None:
    """Leave in `root/NAME` the finished runs `straight` and, one for each list of kills, `run-000` ..."""
    for name, (loaded, _) in jobs.items():
        (root / name).mkdir(parents=True)
        (root / name / "recipe.yaml").write_text(loaded.as_yaml(), "utf-8")
    written = [{"root": str(root / name), "kills": kills} for name, (_, kills) in jobs.items()]
    (root / "jobs.json").write_text(json.dumps(written))
    command = [sys.executable, str(PROGRAM), str(root / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) == sum(len(kills) + 1 for _, kills in jobs.values())
    for outcome in outcomes:
        *before, last = outcome["statuses"]
        assert last == 0, (outcome, done.stderr)
        assert set(before) <= {KILLED, INTERRUPTED, 0}, (outcome, done.stderr)
        if before and isinstance(outcome["kills"][0], int):  # there is such an operation, or nothing is shown
            assert before[0] == KILLED, outcome


def _content(folder: Path) -> dict[str, Any]:
    """Every file of a run: its bytes; of the metrics, what does not depend on the clock."""
    found: dict[str, Any] = {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
    lines = [json.loads(line) for line in found["metrics.jsonl"].decode().splitlines()]
    found["metrics.jsonl"] = [{k: v for k, v in line.items() if k not in UNALIKE} for line in lines]
    return found


def _order(root: Path, name: str) -> dict[int, list[int]]:
    """Which examples each step saw; of steps that were done twice, both times the same."""
    seen: dict[int, list[int]] = {}
    for line in (root / f"{name}.order").read_text().splitlines():
        step, examples = json.loads(line)
        assert seen.setdefault(step, examples) == examples
    return seen


def _same(root: Path) -> int:
    """Every run came to what the one did that was not killed; returns how many there were."""
    straight, order = _content(root / "straight"), _order(root, "straight")
    assert "adapter/adapter_model.safetensors" in straight or "adapter/lora/adapter_model.safetensors" in straight
    runs = sorted(path for path in root.glob("run-*") if path.is_dir())
    for run in runs:
        found = _content(run)
        assert found.keys() == straight.keys(), run
        assert [name for name in straight if found[name] != straight[name]] == [], run
        assert _order(root, run.name) == order, run
    return len(runs)


# Eight rows to train on, three a step: steps 1 to 3 are epoch 0, 3 is its short window, 4 the first of epoch 1.
CASES: dict[str, tuple[list[Any], dict[str, Any], int]] = {
    "in epoch 0": ([LORA], {}, 2),
    "on an epoch edge": ([LORA], {"checkpoint_every": 3}, 4),
    "mid-epoch": ([LORA], {"checkpoint_every": 4}, 5),
    "accumulation, nf4 and groups": (["nf4", LORA, {"layerwise-lr": {"decay": 0.5}}], {"micro_batch": 1}, 5),
    "8-bit optimiser": ([LORA], {"optimizer": "adamw-8bit", "weight_decay": 0.01}, 5),
    "best checkpoint": ([LORA], BEST, 7),
    "full": (["full"], {"optimizer": "adamw"}, 5),
    "prefix and lora": ([LORA, {"prefix": {"length": 3}}], {}, 5),
}


FIRST = 20  # instants of a run, each of which kills one: until it has a recipe, hardly anything is as it will be
SHORT = TRAIN | BEST | {"steps": 4}  # checkpoints at every other step, the last too, and keeps its best adapter


def _short(chat_recipe: Recipe) -> Loaded:
    return chat_recipe([{"lora": {"rank": 2, "dropout": 0.1}}], task={"evaluation": 0.2}, train=SHORT)


def _instants(count: int) -> list[list[str]]:
    """Runs that are killed, most of them once, at operations spread over the whole run, the last ones among them."""
    chance = random.Random(count)
    shares = [(number + chance.random()) / count for number in range(count - 1)] + [1.0]
    again = [[f"share {chance.random()}"] if number % 4 == 3 else [] for number in range(count)]
    return [[f"share {share}", *more] for share, more in zip(shares, again, strict=True)]


def test_ten_steps_are_four_and_a_kill_and_six_and_a_kill_at_any_instant_loses_nothing(
    chat_recipe: Recipe, tmp_path: Path
) -> None:
    jobs: dict[str, tuple[Loaded, Kills]] = {
        name: (chat_recipe(stack, task={"evaluation": 0.2}, train=TRAIN | train), [[f"step {step}"]])
        for name, (stack, train, step) in CASES.items()
    }
    jobs["asked"] = _short(chat_recipe), [["asked 2"], ["asked 4", "step 4"]]
    jobs["instants"] = _short(chat_recipe), [[6], *_instants(8)]  # 6: the recipe is being written
    _kill_and_resume(tmp_path, jobs)
    assert {name: _same(tmp_path / name) for name in jobs} == {name: len(kills) for name, (_, kills) in jobs.items()}


@pytest.mark.slow
def test_a_run_killed_at_any_of_130_instants_is_resumed_to_the_same_bytes(chat_recipe: Recipe, tmp_path: Path) -> None:
    beginning: list[list[Any]] = [[number] for number in range(1, FIRST + 1)]
    by_clock = [[round(0.05 * number, 2)] for number in range(1, 21)]
    kills: Kills = [*beginning, *_instants(110 - FIRST), *by_clock]
    _kill_and_resume(tmp_path, {"short": (_short(chat_recipe), kills)})
    assert int((tmp_path / "short/straight.operations").read_text()) > 100
    assert _same(tmp_path / "short") == 130


TWO_PROCESSES = """
import os, signal, sys
import torch
from onegpu.recipes import cli, training

torch.set_num_threads(1)
asked, real = sys.argv.pop(1), training._accumulate

def accumulate(s, *args):
    if f"{os.environ['RANK']} {s.step + 1}" == asked:
        signal.raise_signal(signal.SIGTERM)
    return real(s, *args)

training._accumulate = accumulate
cli.main()
"""


@pytest.mark.slow
def test_two_processes_of_one_run_stop_together_and_go_on(chat_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(_short(chat_recipe).as_yaml(), "utf-8")
    (tmp_path / "go.py").write_text(TWO_PROCESSES, "utf-8")

    def launch(name: str, asked: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += ["go.py", asked, "run", "recipe.yaml", "-o", name, *options]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert launch("straight", "nobody").returncode == 0
    stopped = launch("run-000", "1 3")  # only the second process is asked
    assert stopped.returncode != 0
    assert stopped.stderr.count("onegpu: interrupted after step 3") == 2, stopped.stderr[-3000:]
    assert (tmp_path / "run-000/checkpoints/step-000003").is_dir()
    assert not (tmp_path / "run-000/.lock").exists()
    resumed = launch("run-000", "nobody", "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    straight, found = _content(tmp_path / "straight"), _content(tmp_path / "run-000")
    assert [name for name in straight if name in found and found[name] != straight[name]] == []
    # The second checkpoint, and the best adapter that it may need, made room for the one written when it was stopped.
    assert straight.keys() - found.keys() <= {name for name in straight if "-000002" in name}
