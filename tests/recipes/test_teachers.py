"""Whole runs with a teacher: one that another run trained, and the base itself."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn

from onegpu.adapters import ArtefactError, Interrupted, OnegpuError, RecipeError, StackError
from onegpu.recipes import Loaded, Outcome, parse_recipe, preflight, run as run_recipe, running, teachers, training
from onegpu.recipes.chatting import open_chat
from onegpu.recipes.display import Display
from onegpu.recipes.evaluating import evaluate_folder
from onegpu.recipes.runfolder import RunFolder
from onegpu.recipes.teachers import Teacher

Row = dict[str, Any]
Recipe = Callable[..., Loaded]
Run = Callable[..., Outcome]
Tensors = Callable[[Path], dict[str, Tensor]]

LoadedTeachers = list[tuple[nn.Module, dict[str, Tensor]]]

LORA = {"lora": {"rank": 4}}


WORDS = ["the", "a", "cat", "dog", "sun", "rain", "goal", "ball", "stocks", "rise", "fall", "bank", "team", "wins"]
TEXTS = [" ".join(WORDS[(3 * i + k) % 14] for k in range(2 + i % 5)) for i in range(10)]
ROWS: dict[str, list[Row]] = {
    "chat": [
        {"messages": [{"role": "user", "content": text[:5]}, {"role": "assistant", "content": text}]} for text in TEXTS
    ],
    "classification": [{"text": text, "label": ["weather", "sports", "money"][i % 3]} for i, text in enumerate(TEXTS)],
}


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory, chat_base: Path, class_base: Path) -> Callable[..., Row]:
    """`content("chat", {"chat": {}}, [LORA], steps=3)`: a recipe over the tiny base of a task and its ten rows."""
    bases, folder = {"chat": chat_base, "classification": class_base}, tmp_path_factory.mktemp("rows")
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def build(rows: str, task: str, settings: Row, stack: Sequence[Any], **train: Any) -> Row:
        shared = {"data": str(folder / f"{rows}.jsonl"), "evaluation": 0.2}
        once = {"steps": 3, "effective_batch": 4, "precision": "fp32", "learning_rate": 0.01}
        return {
            "base": str(bases[rows]),
            "adapters": list(stack),
            "task": {task: shared | settings},
            "train": once | train,
        }

    return build


def _parsed(content: Row) -> Loaded:
    return parse_recipe(yaml.safe_dump(content), name="recipe.yaml", folder=Path.cwd())


@pytest.fixture
def distilled(content: Callable[..., Row]) -> Recipe:
    """`distilled("chat", teacher=folder)`: a recipe that distils this task."""

    def load(task: str, *, teacher: Path | str, stack: Any = (LORA,), train: Any = None, **settings: Any) -> Loaded:
        return _parsed(
            content(task, "distillation", {"task": task, "teacher": str(teacher), **settings}, stack, **(train or {}))
        )

    return load


@pytest.fixture(scope="module")
def trained(content: Callable[..., Row], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`trained("chat")`: the folder of a run to learn from, the same at every call."""
    root = tmp_path_factory.mktemp("teachers")

    def train(task: str, *stack: Any) -> Path:
        folder = root / f"{task}-{len(stack)}"
        if not folder.exists():
            loaded = _parsed(content(task, task, {}, stack or (LORA,), steps=6, learning_rate=0.05))
            run_recipe(loaded, folder, display=Display(quiet=True))
        return folder

    return train


@pytest.fixture
def copied(trained: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`copied("chat", run={})`: its adapter, with another manifest."""

    def copy(task: str, **changes: Any) -> Path:
        folder = shutil.copytree(trained(task) / "adapter", tmp_path / "copied")
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        for key, change in changes.items():
            manifest[key] = manifest[key] | change if change else {}
        (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
        return folder

    return copy


@pytest.fixture
def loaded_teachers(monkeypatch: pytest.MonkeyPatch) -> LoadedTeachers:
    """Every teacher that a run loads, and all tensors that it had."""
    found: LoadedTeachers = []
    real = Teacher.load

    def load(self: Teacher, **options: Any) -> nn.Module:
        model = real(self, **options)
        found.append((model, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
        return model

    monkeypatch.setattr(Teacher, "load", load)
    return found


# --- what is learned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["chat", "classification"])
def test_a_student_comes_closer_to_its_teacher_which_stays_what_it_is(
    task: str, trained: Callable[..., Path], distilled: Recipe, run: Run, loaded_teachers: LoadedTeachers
) -> None:
    folder = trained(task)
    train = {"steps": 20, "learning_rate": 0.02}
    outcome = run(distilled(task, teacher=folder, weight=1.0, train=train))
    assert outcome.after["loss"] < 0.5 * outcome.before["loss"]
    ((teacher, before),) = loaded_teachers
    after = teacher.state_dict()
    assert any("lora_" in name for name in before)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(module.training for module in teacher.modules())
    parameters = list(teacher.parameters())
    assert parameters
    assert all(p.grad is None and not p.requires_grad for p in parameters)


@pytest.mark.parametrize("task", ["chat", "classification"])
def test_a_student_that_goes_on_from_its_teacher_has_nothing_to_learn(
    task: str, trained: Callable[..., Path], distilled: Recipe, tmp_path: Path
) -> None:
    teacher = trained(task) / "adapter"
    recipe = distilled(task, teacher=teacher, weight=1.0).resolved()
    session, _ = _session_of(_parsed(recipe | {"adapter": str(teacher)}), tmp_path)
    with torch.no_grad():
        scores = session.evaluator(session.model, session.held_out).scores
    assert scores["loss"] == pytest.approx(0, abs=1e-5)


def _session_of(loaded: Loaded, folder: Path) -> Any:
    job = preflight(loaded)
    return running._session(
        job, job.load_base(), RunFolder(folder / "unwritten"), Accelerator(cpu=True), Display(quiet=True)
    )


def test_without_the_teacher_s_weight_the_run_is_that_of_the_task(
    trained: Callable[..., Path], distilled: Recipe, content: Callable[..., Row], run: Run, saved_tensors: Tensors
) -> None:
    teacher = trained("chat")
    # Dropout draws from torch's generator, which a teacher must not touch.
    stack = [{"lora": {"rank": 4, "dropout": 0.2}}]
    # Beside a teacher of its own rows are padded, and masks have the shape of what they drop.
    alone = run(_parsed(content("chat", "chat", {"packing": False}, stack)), "alone")
    beside = run(distilled("chat", stack=stack, teacher=teacher, weight=0.0), "beside")
    one, other = saved_tensors(alone.adapter), saved_tensors(beside.adapter)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert beside.after == alone.after


@pytest.mark.parametrize("task", ["chat", "classification"])
def test_the_base_as_the_teacher_holds_the_student_back(
    task: str, distilled: Recipe, run: Run, loaded_teachers: LoadedTeachers, saved_tensors: Tensors
) -> None:
    train = {"steps": 12, "optimizer": "sgd", "learning_rate": 0.5}
    free, held = (run(distilled(task, teacher="base", weight=w, train=train), str(w)) for w in (0.0, 0.9))
    assert loaded_teachers == []  # no second model

    def moved(outcome: Outcome) -> float:
        return sum(float(t.norm()) for name, t in saved_tensors(outcome.adapter).items() if "lora_B" in name)

    assert moved(held) < 0.7 * moved(free)


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["folder", "base"])
def test_a_resumed_run_is_the_run_itself(
    teacher: str,
    trained: Callable[..., Path],
    distilled: Recipe,
    run: Run,
    folder_bytes: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = trained("classification") if teacher == "folder" else teacher
    train = {"steps": 4, "checkpoint_every": 2, "evaluate_every": 2}
    loaded = distilled("classification", stack=[{"lora": {"rank": 4, "dropout": 0.2}}], teacher=named, train=train)
    straight = run(loaded, "straight")
    real = training._checkpoint

    def stop(session: Any) -> None:
        real(session)
        raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(training, "_checkpoint", stop)
        with pytest.raises(Interrupted):
            run(loaded, "resumed")
    resumed = run(loaded, "resumed", resume=True)
    assert folder_bytes(resumed.adapter) == folder_bytes(straight.adapter)
    assert resumed.after == straight.after


def test_what_was_distilled_can_be_evaluated_and_talked_to(
    trained: Callable[..., Path], distilled: Recipe, run: Run, tmp_path: Path
) -> None:
    outcome = run(distilled("chat", teacher=trained("chat")))
    again = evaluate_folder(tmp_path / "out")
    assert again.adapter == pytest.approx(outcome.after)
    assert again.base == pytest.approx(outcome.before)
    assert isinstance(open_chat(tmp_path / "out", 3)("Hi"), str)


def test_a_teacher_may_have_a_stack_of_its_own(trained: Callable[..., Path], distilled: Recipe, run: Run) -> None:
    teacher = trained("chat", "nf4", LORA, {"prefix": {"length": 3}})
    assert run(distilled("chat", teacher=teacher)).after["loss"] > 0


# --- wrong teachers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, run: Run) -> Callable[[Loaded, str], str]:
    """`refusal(loaded, "teacher")`: what a run says that is refused at this key before any weight is read."""

    def refused(loaded: Loaded, key: str) -> str:
        def unwanted(*_: Any, **__: Any) -> Any:
            raise AssertionError("a base was read")

        with monkeypatch.context() as patch:
            patch.setattr("onegpu.recipes.jobs.load_base", unwanted)
            patch.setattr(teachers, "load_base", unwanted)
            with pytest.raises(OnegpuError) as caught:
                run(loaded, "refused")
        place = loaded.places[("adapters",) if key == "adapters" else ("task", "distillation", key)]
        assert str(caught.value).startswith(f"{place}: ")
        assert isinstance(caught.value, (RecipeError, ArtefactError, StackError))
        return str(caught.value)

    return refused


def test_a_teacher_with_other_classes_is_refused_by_both(
    copied: Callable[..., Path], distilled: Recipe, refusal: Callable[[Loaded, str], str]
) -> None:
    teacher = copied("classification", run={"labels": ["sports", "money", "weather"]})
    told = refusal(distilled("classification", teacher=teacher), "teacher")
    assert "classes ['sports', 'money', 'weather'], and the student's are ['money', 'sports', 'weather']" in told


def test_a_teacher_with_another_vocabulary_is_refused_by_both(
    trained: Callable[..., Path],
    distilled: Recipe,
    refusal: Callable[[Loaded, str], str],
    chat_base: Path,
    class_base: Path,
) -> None:
    told = refusal(distilled("chat", teacher=trained("classification")), "teacher")
    assert f"{class_base} has another vocabulary than that of {chat_base}" in told


def test_what_is_no_run_is_no_teacher(
    copied: Callable[..., Path], distilled: Recipe, refusal: Callable[[Loaded, str], str]
) -> None:
    assert "is not an adapter folder" in refusal(distilled("chat", teacher="nowhere"), "teacher")
    assert "was not written by a run" in refusal(distilled("chat", teacher=copied("chat", run={})), "teacher")


def test_a_teacher_without_room_for_the_examples_is_refused(
    copied: Callable[..., Path],
    distilled: Recipe,
    refusal: Callable[[Loaded, str], str],
    chat_base: Path,
    tmp_path: Path,
) -> None:
    short = shutil.copytree(chat_base, tmp_path / "short")
    config = json.loads((short / "config.json").read_text("utf-8"))
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}), "utf-8")
    loaded = distilled("chat", teacher=copied("chat", base={"source": str(short)}), max_length=256)
    assert "has room for 32: set max_length to 32 or less" in refusal(loaded, "max_length")


def test_a_base_that_is_trained_is_no_reference(
    distilled: Recipe, refusal: Callable[[Loaded, str], str], trained: Callable[..., Path], run: Run
) -> None:
    told = refusal(distilled("chat", stack=["full"], teacher="base"), "adapters")
    assert "full trains the base itself, so distillation has no base to compare with" in told
    run(distilled("chat", stack=["full"], teacher=trained("chat")))
