"""13. Resuming is not going on.

Met: after an interruption the order of the rows is drawn anew, rates restart, random states are missing, a group takes
another group's decay. The loss jumps, rows are repeated or left out.

Here: a checkpoint holds all that the next step depends on, and a resumed run writes the bytes of one that was never
interrupted; another recipe, other rows, versions or threads are refused with the difference, unless
`--accept-changes` says to go on, which the manifest then says too.

Also: tests/recipes/test_resume.py, tests/recipes/test_resuming.py, tests/recipes/test_every_task.py
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onegpu.adapters import RecipeError
from onegpu.recipes import Loaded, Outcome, training

Metrics = Callable[[Path], list[dict[str, Any]]]
# Dropout, accumulation with a short window (10 rows: 3, 3, 3 and 1), groups with rates of their own.
STACK = [{"lora": {"rank": 4, "dropout": 0.1}}, {"layerwise-lr": {"decay": 0.5}}]
TRAIN: dict[str, Any] = {"steps": 10, "effective_batch": 3, "micro_batch": 1, "weight_decay": 0.1, "warmup": 2}
TIMED = ("seconds", "peak_memory")
# Where the process ends, and the checkpoint that it goes on from: in epoch 0, on the edge of an epoch, in epoch 1.
PLACES = {"first epoch": (3, 2), "edge": (5, 4), "second epoch": (7, 6)}


def _settings(optimizer: str) -> dict[str, Any]:
    return TRAIN | {"optimizer": optimizer, "checkpoint_every": 2, "evaluate_every": None}


@pytest.fixture(scope="module")
def straight() -> dict[str, tuple[dict[str, bytes], list[dict[str, Any]]]]:
    """What the run without an interruption wrote, by optimiser; filled by the first test that needs it."""
    return {}


def _written(folder: Path, metrics: Metrics) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    places = [folder / "adapter", folder / "checkpoints"]
    files = {str(p.relative_to(folder)): p.read_bytes() for at in places for p in at.rglob("*") if p.is_file()}
    assert len(files) > 8
    return files, [{k: v for k, v in line.items() if k not in TIMED} for line in metrics(folder)]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
@pytest.mark.parametrize("place", PLACES)
def test_an_interrupted_run_ends_as_one_in_one_go(
    place: str,
    optimizer: str,
    recipe: Callable[..., Loaded],
    run: Callable[..., Outcome],
    metrics: Metrics,
    tmp_path: Path,
    straight: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = recipe(STACK, train=_settings(optimizer))
    real, seen = training._accumulate, []
    stop_after, resumed_from = PLACES[place]

    def killed(s: Any, window: Any, trainable: Any) -> Any:
        seen.append((s.step, [example.ids for example in window]))
        if s.step == stop_after:
            raise SystemError("killed")
        return real(s, window, trainable)

    monkeypatch.setattr(training, "_accumulate", killed)
    with pytest.raises(SystemError, match="killed"):
        run(loaded)
    first, stop_after = dict(seen[:-1]), -1
    seen.clear()
    run(loaded, resume=True)
    again = dict(seen)
    assert list(again) == list(range(resumed_from, 10))
    found = _written(tmp_path / "out", metrics)
    if optimizer not in straight:
        shutil.rmtree(tmp_path / "out")  # the same place: its name is in messages only, but let nothing depend on it
        seen.clear()
        run(loaded)
        straight[optimizer] = (_written(tmp_path / "out", metrics), dict(seen))
    expected, order = straight[optimizer]
    assert first | again == order
    assert found[1] == expected[1]
    assert {n for n in found[0].keys() | expected[0].keys() if found[0].get(n) != expected[0].get(n)} == set()


def test_another_recipe_or_other_rows_are_refused_with_the_difference(
    recipe: Callable[..., Loaded], run: Callable[..., Outcome], rows: list[Any], write_rows: Callable[..., Path]
) -> None:
    data = str(write_rows(rows, "own.jsonl"))
    train = {"steps": 2, "checkpoint_every": 1}
    run(recipe(task={"data": data}, train=train))
    with pytest.raises(RecipeError) as caught:
        run(recipe(task={"data": data}, train=train | {"learning_rate": 0.02}), resume=True)
    assert "train.learning_rate: 0.01 -> 0.02" in str(caught.value)
