import json
import random
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from onegpu.adapters import Interrupted, RecipeError, Unavailable
from onegpu.adapters.files import seal
from onegpu.recipes import Loaded, Outcome, run as run_recipe, training
from onegpu.recipes.training import Session

# Rank 64 makes tensors of 4,096 elements, which the 8-bit optimiser does keep in 8 bits.
LORA = {"lora": {"rank": 64, "dropout": 0.1}}
TRAIN = {
    "steps": 6,
    "effective_batch": 4,
    "micro_batch": 3,
    "schedule": "linear",
    "warmup": 2,
    "checkpoint_every": None,
}
UNALIKE = {"seconds", "peak_memory"}  # of two runs that are otherwise equal

Recipe = Callable[..., Loaded]
Run = Callable[..., Outcome]
Bytes = Callable[[Path], dict[str, bytes]]


def _at_step(step: int, do: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something while that step is being computed, once."""
    real = training._accumulate
    done: list[int] = []

    def accumulate(s: Session, *args: Any) -> tuple[float, float]:
        if s.step + 1 == step and not done:
            done.append(step)
            do()
        return real(s, *args)

    monkeypatch.setattr(training, "_accumulate", accumulate)


def _interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def _die() -> None:
    raise SystemError("the power went")


def _records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in UNALIKE} for line in lines]


@pytest.fixture
def recipes(chat_recipe: Recipe, class_recipe: Recipe) -> Mapping[str, Callable[..., Loaded]]:
    """Recipes by name, all with dropout, and with windows that do not divide the rows."""

    def chat(stack: list[Any], **train: Any) -> Loaded:
        return chat_recipe(stack, task={"evaluation": 0.2}, train=TRAIN | {"evaluate_every": 2} | train)

    return {
        "adamw": lambda **train: chat([LORA], **train),
        "adamw-8bit": lambda **train: chat([LORA], optimizer="adamw-8bit", weight_decay=0.01, **train),
        "nf4 and rates": lambda **train: chat(["nf4", LORA, {"layerwise-lr": {"decay": 0.5}}], **train),
        "classifier": lambda **train: class_recipe([LORA], task={"evaluation": 0.2}, train=TRAIN | train),
        "rows and rates": lambda **train: chat(
            ["nf4", "pissa", {"trainable-tokens": {"tokens": [5]}}, "lora-plus"], **train
        ),
        "lisa": lambda **train: chat([{"lisa": {"active": 1, "interval": 2}}], **train),
        "full classifier": lambda **train: class_recipe(["full"], train=TRAIN | train),
    }


# Eight training rows make two windows an epoch, ten make three: steps 2, 3 and 4 lie within, at and after an edge.
@pytest.mark.parametrize(
    ("name", "step"),
    [
        *(("adamw", 2), ("adamw", 3), ("adamw-8bit", 3), ("nf4 and rates", 3), ("classifier", 3)),
        *(("full classifier", 4), ("rows and rates", 3), ("lisa", 3), ("lisa", 4)),
    ],
)
def test_an_interrupted_and_resumed_run_equals_one_in_one_go(
    name: str,
    step: int,
    recipes: Mapping[str, Callable[..., Loaded]],
    run: Run,
    folder_bytes: Bytes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    straight = run(recipes[name](), "straight")
    _at_step(step, _interrupt, monkeypatch)
    with pytest.raises(Interrupted):
        run(recipes[name](), "resumed")
    torch.manual_seed(99)  # whatever the new process begins with
    resumed = run(recipes[name](), "resumed", resume=True)
    assert folder_bytes(resumed.adapter) == folder_bytes(straight.adapter)
    assert _records(tmp_path / "resumed") == _records(tmp_path / "straight")
    assert (resumed.before, resumed.after) == (straight.before, straight.after)


def test_every_source_of_random_numbers_goes_on(chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a task or an adapter of somebody's may draw from any."""
    loaded = chat_recipe([LORA], train=TRAIN)
    drawn: dict[int, list[float]] = {}
    real = training._accumulate

    def accumulate(s: Session, *args: Any) -> tuple[float, float]:
        drawn[s.step + 1] = [random.random(), float(numpy.random.rand()), torch.rand(1).item()]
        return real(s, *args)

    monkeypatch.setattr(training, "_accumulate", accumulate)
    run(loaded, "straight")
    straight = dict(drawn)
    drawn.clear()
    with monkeypatch.context() as patch:
        _at_step(3, _interrupt, patch)
        with pytest.raises(Interrupted):
            run(loaded, "resumed")
    random.seed(99), numpy.random.seed(99), torch.manual_seed(99)
    run(loaded, "resumed", resume=True)
    assert drawn == straight
    assert len({tuple(numbers) for numbers in drawn.values()}) == TRAIN["steps"]


def test_the_8_bit_state_was_in_8_bits(recipes: Mapping[str, Callable[..., Loaded]], run: Run, tmp_path: Path) -> None:
    run(recipes["adamw-8bit"](checkpoint_every=3))
    state = load_file(tmp_path / "out/checkpoints/step-000003/optimizer.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in state.values())


def test_a_run_that_died_goes_on_from_its_last_checkpoint(
    recipes: Mapping[str, Callable[..., Loaded]],
    run: Run,
    folder_bytes: Bytes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    straight = run(recipes["adamw"](checkpoint_every=2), "straight")
    _at_step(6, _die, monkeypatch)
    with pytest.raises(SystemError):
        run(recipes["adamw"](checkpoint_every=2), "resumed")
    with (tmp_path / "resumed/metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 6, "lo')  # cut off in the middle of a line
    (tmp_path / "resumed/checkpoints/.step-000006.tmp").mkdir()  # and of a checkpoint
    resumed = run(recipes["adamw"](checkpoint_every=2), "resumed", resume=True)
    assert folder_bytes(resumed.adapter) == folder_bytes(straight.adapter)
    assert _records(tmp_path / "resumed") == _records(tmp_path / "straight")


def test_a_run_that_died_before_any_checkpoint_begins_again(
    recipes: Mapping[str, Callable[..., Loaded]],
    run: Run,
    folder_bytes: Bytes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    straight = run(recipes["adamw"](), "straight")
    _at_step(4, _die, monkeypatch)
    with pytest.raises(SystemError):
        run(recipes["adamw"](), "resumed")
    resumed = run(recipes["adamw"](), "resumed", resume=True)
    assert folder_bytes(resumed.adapter) == folder_bytes(straight.adapter)
    assert _records(tmp_path / "resumed") == _records(tmp_path / "straight")


def test_resuming_what_never_began_begins(chat_recipe: Recipe, run: Run, folder_bytes: Bytes) -> None:
    resumed, straight = run(chat_recipe(), "resumed", resume=True), run(chat_recipe(), "straight")
    assert folder_bytes(resumed.adapter) == folder_bytes(straight.adapter)


def test_resuming_a_finished_run_does_nothing(
    chat_recipe: Recipe, run: Run, folder_bytes: Bytes, tmp_path: Path
) -> None:
    run(chat_recipe())
    before = folder_bytes(tmp_path / "out")
    for name in (".lock", ".manifest.json.x.partial"):  # of a process that was killed in its last instants
        (tmp_path / "out" / name).touch()
    assert run_recipe(chat_recipe(), tmp_path / "out", resume=True) is None
    assert folder_bytes(tmp_path / "out") == before


@pytest.fixture
def begun(chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of a run that was interrupted after its second step."""
    _at_step(2, _interrupt, monkeypatch)
    with pytest.raises(Interrupted):
        run(chat_recipe(train={"steps": 4}))
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"train": {"steps": 4, "learning_rate": 0.02}}, ["train.learning_rate: 0.01 -> 0.02"]),
        ({"train": {"steps": 5}}, ["train.steps: 4 -> 5"]),
        ({"train": {"steps": 4}, "adapters": [{"lora": {"rank": 5}}]}, ["adapters.0.lora.rank: 4 -> 5"]),
    ],
)
def test_a_changed_recipe_is_not_resumed_and_the_change_is_named(
    change: dict[str, Any], told: list[str], begun: Path, chat_recipe: Recipe, run: Run
) -> None:
    with pytest.raises(RecipeError, match="another recipe") as caught:
        run(chat_recipe(**change), resume=True)
    _, *lines, last = str(caught.value).splitlines()
    assert [line.strip() for line in lines] == told
    assert "--accept-changes" in last


def test_another_number_of_threads_is_refused_since_bits_would_differ(
    begun: Path, chat_recipe: Recipe, run: Run
) -> None:
    torch.set_num_threads(2)
    with pytest.raises(
        Unavailable, match=r"step-000002 cannot be resumed exactly here: threads was 1 and is 2"
    ) as caught:
        run(chat_recipe(train={"steps": 4}), resume=True)
    assert caught.value.exit_code == 3


def test_other_versions_are_refused(begun: Path, chat_recipe: Recipe, run: Run) -> None:
    state = begun / "checkpoints/step-000002/state.json"
    content = json.loads(state.read_text("utf-8"))
    content["environment"]["torch"] = "1.0"
    state.write_text(json.dumps(content), "utf-8")
    seal(state.parent)
    with pytest.raises(Unavailable, match=r"torch was 1\.0 and is "):
        run(chat_recipe(train={"steps": 4}), resume=True)


def test_nothing_in_a_run_folder_is_a_pickle(
    recipes: Mapping[str, Callable[..., Loaded]], run: Run, tmp_path: Path
) -> None:
    run(recipes["adamw-8bit"](checkpoint_every=2))
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".jsonl", ".yaml", ".md"}
    for path in files:
        assert not path.read_bytes().startswith((b"\x80", b"PK")), path
        if path.suffix == ".json":
            json.loads(path.read_text("utf-8"))


def test_other_data_is_not_resumed(
    chat_recipe: Recipe,
    run: Run,
    rows: list[dict[str, Any]],
    jsonl: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    loaded = chat_recipe(train={"steps": 4})
    _at_step(2, _interrupt, monkeypatch)
    with pytest.raises(Interrupted):
        run(loaded)
    shutil.copy(jsonl(rows[::-1], "others.jsonl"), str(loaded.task.data))
    with pytest.raises(RecipeError, match=r"the rows changed since .*step-000002 was written"):
        run(loaded, resume=True)
