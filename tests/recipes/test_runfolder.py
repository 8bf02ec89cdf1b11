import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from onegpu.adapters import RecipeError, StorageError
from onegpu.recipes.runfolder import RunFolder

RECIPE = "adapters:\n- lora:\n    name: a\n    rank: 2\n- lora:\n    name: b\n    rank: 4\n"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    """An open run folder."""
    folder = RunFolder(tmp_path / "deep/run")
    folder.open(RECIPE, resume=False)
    yield folder
    folder.release()


def test_opening_makes_the_folder_and_keeps_the_recipe(folder: RunFolder) -> None:
    assert folder.recipe.read_text("utf-8") == RECIPE


def test_checking_writes_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").check(RECIPE, resume=False)
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path) -> None:
    RunFolder(tmp_path).check(RECIPE, resume=False)


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_killed_before_its_recipe_was_whole_is_as_good_as_none(resume: bool, tmp_path: Path) -> None:
    for name in (".lock", ".recipe.yaml.x.partial"):
        (tmp_path / name).touch()
    folder = RunFolder(tmp_path)
    assert folder.check(RECIPE, resume=resume) == []
    folder.open(RECIPE, resume=resume)
    folder.rewind(0)
    folder.release()
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "metrics.jsonl"}


def test_a_file_beside_what_a_killed_run_left_is_somebody_s(tmp_path: Path) -> None:
    for name in (".recipe.yaml.x.partial", "mine.partial"):
        (tmp_path / name).touch()
    with pytest.raises(RecipeError, match="exists already"):
        RunFolder(tmp_path).check(RECIPE, resume=False)


def test_a_finished_run_loses_what_a_killed_process_left(tmp_path: Path) -> None:
    for name in (".lock", ".recipe.yaml.x.partial", "recipe.yaml"):
        (tmp_path / name).touch()
    RunFolder(tmp_path).tidy()
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_the_lock_of_a_process_that_is_at_work_stays(folder: RunFolder) -> None:
    RunFolder(folder.path).tidy()
    with pytest.raises(RecipeError, match="another process"):
        RunFolder(folder.path).lock()


def test_a_folder_in_use_is_refused_unless_resumed(folder: RunFolder) -> None:
    with pytest.raises(RecipeError, match=r"exists already; give another folder with -o, or go on with --resume"):
        folder.open(RECIPE, resume=False)
    folder.open(RECIPE, resume=True)


@pytest.mark.parametrize("resume", [True, False])
def test_what_is_no_run_is_refused(resume: bool, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RecipeError, match="exists already" if not resume else "not the folder of a run"):
        RunFolder(tmp_path).check(RECIPE, resume=resume)


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    for resume in (True, False):
        with pytest.raises(RecipeError):
            RunFolder(tmp_path / "run").check(RECIPE, resume=resume)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (RECIPE.replace("rank: 2", "rank: 3"), ["adapters.0.lora.rank: 2 -> 3"]),
        (RECIPE + "base: x\n", ['base: (not there) -> "x"']),
        (
            RECIPE.replace("rank: 2", "rank: 0").replace("rank: 4", "rank: 2").replace("rank: 0", "rank: 4"),
            ["adapters.0.lora.rank: 2 -> 4", "adapters.1.lora.rank: 4 -> 2"],
        ),
    ],
    ids=["a value", "a key", "two values changed places"],
)
def test_another_recipe_is_refused_and_the_change_named(folder: RunFolder, changed: str, told: list[str]) -> None:
    with pytest.raises(RecipeError, match="another recipe") as caught:
        folder.check(changed, resume=True)
    for line in told:
        assert line in str(caught.value)


def test_checkpoints_are_the_complete_ones_newest_first(folder: RunFolder) -> None:
    assert folder.newest_first() == []
    for name in ("step-000009", "step-000010", ".step-000011.partial"):
        (folder.checkpoints / name).mkdir(parents=True)
    assert folder.newest_first() == [folder.checkpoint(10), folder.checkpoint(9)]


def test_all_but_two_checkpoints_are_dropped(folder: RunFolder) -> None:
    for step in (2, 4, 10):
        folder.checkpoint(step).mkdir(parents=True)
    folder.drop_old_checkpoints()
    assert sorted(folder.checkpoints.iterdir()) == [folder.checkpoint(4), folder.checkpoint(10)]


def test_records_are_read_back_without_a_broken_last_line(folder: RunFolder) -> None:
    folder.record(step=1, loss=0.1)
    folder.record(step=2, loss=0.2)
    with folder.metrics.open("a") as file:
        file.write('{"step": 3')
    assert list(folder.records()) == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}]


@pytest.mark.parametrize(("step", "kept"), [(2, [0, 1, 2, 2]), (1, [0, 1]), (0, []), (9, [0, 1, 2, 2, 3])])
def test_rewinding_forgets_what_will_be_done_again(folder: RunFolder, step: int, kept: list[int]) -> None:
    for number in (0, 1, 2, 2, 3):
        folder.record(step=number)
    folder.rewind(step)
    assert [record["step"] for record in folder.records()] == kept


def test_an_evaluation_that_will_be_done_again_is_forgotten_and_no_step_is(folder: RunFolder) -> None:
    for step in (1, 2):
        folder.record(step=step, loss=0.1)
        folder.record(step=step, evaluation={"loss": 0.2})
    folder.rewind(2, evaluations=1)
    assert [(r["step"], "evaluation" in r) for r in folder.records()] == [(1, False), (1, True), (2, False)]


def test_rewinding_sets_damaged_checkpoints_aside_and_clears_what_a_killed_process_left(folder: RunFolder) -> None:
    names = ("step-000002", "step-000004", "best-000002", "best-000003", "unproved-000004", ".step-4.x.partial")
    for name in names:
        (folder.checkpoints / name).mkdir(parents=True)
    (folder.path / ".recipe.yaml.x.partial").touch()
    (folder.path / ".mine").touch()
    folder.rewind(2)
    left = {path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*")}
    kept = {f"checkpoints/{name}" for name in ("step-000002", "damaged-000004", "best-000002")}
    assert left == {"checkpoints", *kept, "metrics.jsonl", "recipe.yaml", ".mine", ".lock"}


def test_a_folder_has_one_process_at_a_time(folder: RunFolder) -> None:
    other = RunFolder(folder.path)
    with pytest.raises(RecipeError, match="another process is working on the run in"):
        other.lock()
    folder.release()
    assert [path.name for path in folder.path.iterdir()] == ["recipe.yaml"]
    other.lock()
    with pytest.raises(RecipeError, match="another process"):
        folder.open(RECIPE, resume=True)
    other.release()


def test_a_process_that_is_killed_leaves_no_lock_behind(folder: RunFolder) -> None:
    folder.release()
    program = (
        "import os, sys; from onegpu.recipes.runfolder import RunFolder\n"
        "run = RunFolder(sys.argv[1]); run.lock(); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(RecipeError, match="another process"):
            folder.lock()
        other.kill()
    folder.lock()
    folder.release()


@pytest.mark.parametrize("place", ["file/run", "file/deep/run"])
def test_a_folder_below_a_file_is_refused_before_anything_is_written(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file is a file") as caught:
        RunFolder(tmp_path / place).check(RECIPE, resume=False)
    assert caught.value.exit_code == 3


def test_a_damaged_recipe_of_a_run_is_named(folder: RunFolder) -> None:
    folder.recipe.write_bytes(b"adapters: [\xff")
    with pytest.raises(RecipeError, match=r"recipe.yaml is damaged"):
        folder.check(RECIPE, resume=True)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


def _holes(path: Path, size: int) -> None:
    """A file that claims to be large, and takes no room."""
    with path.open("wb") as file:
        file.truncate(size)


@pytest.mark.parametrize("text", [LAUGHS, "a: &a {b: *a}", "[" * 5000, "a: " * 2000, "[1]", "a: 2001-99-99"])
def test_a_recipe_of_a_run_that_grows_without_end_is_named(text: str, folder: RunFolder) -> None:
    folder.recipe.write_text(text)
    with pytest.raises(RecipeError, match=r"recipe.yaml is damaged"):
        folder.check(RECIPE, resume=True)


def test_a_recipe_of_a_run_that_is_far_too_large_is_not_read(folder: RunFolder) -> None:
    _holes(folder.recipe, 2**40)
    with pytest.raises(RecipeError, match=r"recipe.yaml is damaged"):
        folder.check(RECIPE, resume=True)


def test_metrics_that_have_no_end_are_read_up_to_there(folder: RunFolder) -> None:
    folder.record(step=1)
    with folder.metrics.open("ab") as file:
        file.truncate(2**40)
    assert list(folder.records()) == [{"step": 1}]
    folder.rewind(1)
    assert folder.metrics.read_text() == '{"step": 1}\n'


def test_a_file_in_place_of_the_checkpoints_is_refused_before_anything_is_computed(folder: RunFolder) -> None:
    folder.checkpoints.touch()
    with pytest.raises(RecipeError, match="checkpoints is not a folder"):
        folder.check(RECIPE, resume=True)


@pytest.mark.parametrize("link", [False, True])
def test_a_lock_that_is_no_file_is_one_message_and_what_it_leads_to_is_left_alone(link: bool, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run/.lock"
    lock.symlink_to(tmp_path / "outside") if link else lock.mkdir()
    with pytest.raises(StorageError, match=r"run was not written: (Is a directory|Too many levels of symbolic links)"):
        RunFolder(tmp_path / "run").lock()
    assert (tmp_path / "outside").read_text() == "mine"


def test_a_run_is_finished_when_its_manifest_is_there(folder: RunFolder) -> None:
    folder.adapter.mkdir()
    assert not folder.finished
    (folder.adapter / "manifest.json").touch()
    assert folder.finished
