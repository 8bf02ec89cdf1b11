"""`distillation` against closed forms: its loss is weight · T² · KL + (1 - weight) · the task's own."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from onegpu.adapters import PluginError, RecipeError
from onegpu.recipes import parse_recipe
from onegpu.recipes.tasks import Example, Predictions, Reader, Task, chunks
from onegpu.recipes.tasks.distillation import Distillation, divergence

Row = dict[str, Any]

LABELS = ["money", "sports", "weather"]
TAGS = ["O", "B-ANIMAL", "I-ANIMAL"]
CASES: dict[str, Row] = {
    "tokens": {"chat": {"label_smoothing": 0.1}},
    "tokens in chunks": {"chat": {"label_smoothing": 0.1}},
    "tags": {"tagging": {"supervise": "all"}},
    "class": {"classification": {"label_smoothing": 0.1}},
    "weighted class": {"classification": {"class_weight": {"money": 2.0, "weather": 0.5}}},
    "classes": {"classification": {"predict": "classes"}},
    "number": {"classification": {"predict": "number"}},
}


def _task(spec: Any, **settings: Any) -> Distillation:
    return Distillation(data="rows.jsonl", task=spec, **{"teacher": "base", **settings})


class Case:
    """A task with a student, a teacher that differs from it, and ten examples."""

    def __init__(self, task: Distillation, models: Sequence[PreTrainedModel], rows: Sequence[Row], reader: Reader):
        self.task = task
        self.student, self.teacher = models
        self.examples = [example for i, row in enumerate(rows) for example in task.encode(i, row, reader)]

    def in_chunks(self) -> "Case":
        """The same, as the student's head allows it."""
        found, remark = self.task.suited(self.student, self.examples[0], longest=64, pad=0, packing=False)
        assert isinstance(found, Distillation)
        assert found is not self.task
        assert "at once" not in remark
        self.task = found
        return self

    def window(self, size: int) -> tuple[float, Tensor]:
        """Loss and gradient of all examples in batches of a size, through the verbs as the loop calls them."""
        self.student.zero_grad()
        weight = total = 0.0
        for start in range(0, len(self.examples), size):
            batch = self.task.collate(self.examples[start : start + size], 0)
            with torch.no_grad():
                batch |= self.task.refer(self.teacher, batch)
            objective = self.task.objective(self.student, batch)
            objective.total.backward()
            weight, total = weight + objective.weight, total + objective.total.item()
        return total / weight, gradient(self.student) / weight

    def logits(self, model: nn.Module) -> Tensor:
        """Of the whole window in one batch, where something is supervised; found by transformers alone."""
        batch = self.task.collate(self.examples, 0)
        names = {"input_ids", "attention_mask"}
        logits: Tensor = model(**{name: batch[name] for name in names}).logits
        if logits.ndim == 2:
            return logits
        labels = batch["labels"]
        if self.task.model_kind() == "causal-lm":
            labels, logits = labels[:, 1:], logits[:, :-1]
        return logits[labels != -100]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 1)


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def case(chat_base: Path, class_base: Path, rows: list[Row], texts: list[Row], reader: Reader) -> Callable[..., Case]:
    """`case("tokens", weight=0.5)`: the case of that name."""

    def build(name: str, **settings: Any) -> Case:
        task = _task(CASES[name], **settings)
        if name.startswith("tokens"):
            found = Case(task, _two(AutoModelForCausalLM, chat_base), rows, reader)
            return found.in_chunks() if name == "tokens in chunks" else found
        tokenizer = AutoTokenizer.from_pretrained(class_base)
        if name == "tags":
            tagged = [{"tokens": (w := r["text"].split()), "tags": [TAGS[i % 3] for i in range(len(w))]} for r in texts]
            models = _two(AutoModelForTokenClassification, class_base, num_labels=3)
            return Case(task, models, tagged, Reader(tokenizer, 64, labels=TAGS))
        wanted: list[Any] = [row["label"] for row in texts]
        if name == "classes":
            wanted = [[*{label, LABELS[0]}] for label in wanted]
        if name == "number":
            wanted = [i / 3 for i in range(len(texts))]
        labelled = [row | {"label": label} for row, label in zip(texts, wanted, strict=True)]
        labels = task.labels(labelled)
        assert labels is not None
        weights = task.class_weights(labelled, labels)
        models = _two(AutoModelForSequenceClassification, class_base, num_labels=len(labels))
        return Case(task, models, labelled, Reader(tokenizer, 64, labels=labels, class_weights=weights))

    return build


def _two(kind: Any, place: Path, **extra: Any) -> list[PreTrainedModel]:
    """A student and, from it by some noise, a teacher."""
    torch.manual_seed(0)
    student = kind.from_pretrained(place, **extra).eval()
    teacher = kind.from_pretrained(place, **extra).eval()
    teacher.load_state_dict(student.state_dict())
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return [student, teacher]


def _apart(name: str, teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher ∥ student) of each place by torch, or the squared difference: (supervised,)."""
    if name == "number":
        return (teacher - student).square().sum(-1)
    theirs, ours = teacher / temperature, student / temperature
    if name == "classes":
        distributions = (torch.distributions.Bernoulli(logits=logits) for logits in (theirs, ours))
        return temperature**2 * torch.distributions.kl_divergence(*distributions).sum(-1)
    kl = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True)
    return temperature**2 * kl.sum(-1)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_and_its_gradient_are_those_of_the_paper(name: str, case: Callable[..., Case]) -> None:
    found = case(name, temperature=3.0, weight=0.3)
    loss, slope = found.window(10)
    own = found.task.inner
    found.student.zero_grad()
    batch = found.task.collate(found.examples, 0)
    objective = own.objective(found.student, batch)
    with torch.no_grad():
        teacher = found.logits(found.teacher)
    each = _apart(name, teacher, found.logits(found.student), 3.0)
    if name == "weighted class":
        each = each * batch["weights"]
    expected = 0.3 * each.sum() / objective.weight + 0.7 * objective.total / objective.weight
    expected.backward()
    assert each.sum() / objective.weight > 1e-3
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(slope, gradient(found.student), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_any_split_of_a_window_has_one_loss_and_one_gradient(name: str, case: Callable[..., Case]) -> None:
    found = case(name)
    loss, slope = found.window(10)
    for size in (1, 2, 7):
        other, again = found.window(size)
        assert other == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(again, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_with_weight_zero_it_is_the_task_itself(name: str, case: Callable[..., Case]) -> None:
    found = case(name, weight=0.0)
    loss, slope = found.window(10)
    found.student.zero_grad()
    objective = found.task.inner.objective(found.student, found.task.collate(found.examples, 0))
    objective.total.backward()
    assert loss == objective.total.item() / objective.weight
    assert torch.equal(slope, gradient(found.student) / objective.weight)


@pytest.mark.parametrize("name", CASES)
def test_with_weight_one_only_the_teacher_is_heard(name: str, case: Callable[..., Case]) -> None:
    found = case(name, weight=1.0)
    assert found.window(10)[0] > 1e-3
    found.teacher.load_state_dict(found.student.state_dict())
    loss, slope = found.window(10)
    assert loss == pytest.approx(0, abs=1e-6)
    assert slope.abs().max() < 1e-5


def test_the_teacher_says_something_of_supervised_places_only(case: Callable[..., Case]) -> None:
    found = case("tokens")
    batch = found.task.collate(found.examples, 0)
    said = found.task.refer(found.teacher, batch)["teacher"]
    assert said.shape == (sum(example.supervised for example in found.examples), 258)
    assert said.shape[0] < batch["labels"].numel() / 3


def test_the_student_has_logits_of_a_chunk_only(case: Callable[..., Case], live_tensors: Callable[..., Any]) -> None:
    found = case("tokens in chunks")
    batch = found.task.collate(found.examples, 0)
    with torch.no_grad():
        batch |= found.task.refer(found.teacher, batch)
    assert len(batch["teacher"]) > 3 * chunks.FEWEST
    with live_tensors(width=258) as live:
        found.task.objective(found.student, batch).total.backward()
    assert live.widest == chunks.FEWEST * 258


def test_what_is_behind_the_shorter_of_two_vocabularies_is_left_out() -> None:
    long, short = torch.randn(4, 7), torch.randn(4, 5)

    def apart(teacher: Tensor, student: Tensor) -> Tensor:
        return divergence(teacher, Predictions(student, torch.zeros(4), torch.zeros(4)), 2.0)

    assert torch.equal(apart(long, short), apart(long[:, :5], short))
    assert torch.equal(apart(short, long), apart(short, long[:, :5]))


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["chat", {"chat": None}, {"chat": {}}])
def test_the_inner_task_is_written_out_whole(spec: Any) -> None:
    task = _task(spec, max_length=32)
    assert task.task["chat"]["supervise"] == "assistant"
    assert task.task["chat"].keys() & Task.model_fields.keys() == set()
    assert (task.inner.max_length, task.inner.data) == (32, "rows.jsonl")
    assert Distillation(**task.model_dump()) == task


def test_what_examples_follow_from_is_that_of_the_inner_task(class_base: Path) -> None:
    chat, classes = _task("chat"), _task("classification")
    for task in (chat, classes):
        inner = task.inner
        assert task.traits() == inner.traits()
        assert (task.model_kind(), task.measures()) == (inner.model_kind(), inner.measures())
    assert chat.traits().version == chat.inner.version > 1
    smooth = _task({"classification": {"too_long": "drop"}})
    assert smooth.model_dump() != classes.model_dump()


def _refusal(task: str, folder: Path = Path()) -> str:
    text = f"base: x\nadapters: [lora]\ntask:\n  distillation:\n    data: rows.jsonl\n    teacher: base\n{task}"
    with pytest.raises((RecipeError, PluginError)) as caught:
        parse_recipe(text, name="recipe.yaml", folder=folder)
    return str(caught.value)


@pytest.mark.parametrize("name", ["reward", "preference", "question-answering", "distillation"])
def test_a_task_without_logits_for_each_label_is_refused(name: str) -> None:
    told = _refusal(f"    task: {name}\n")
    assert told.startswith("recipe.yaml:7: task.distillation.task: ")
    assert "choose one of chat, classification, completion, language-modelling, sequence-to-sequence, tagging" in told


def test_a_task_that_does_not_exist_is_refused_with_the_nearest() -> None:
    assert "did you mean 'classification'?" in _refusal("    task: clasification\n")


def test_every_fault_of_the_inner_task_is_told_with_its_place() -> None:
    told = _refusal(
        "    task:\n      classification:\n        class_wight: balanced\n        data: rows\n        predict: all\n"
    )
    lines = told.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["recipe.yaml:10", "task.distillation.task.classification.data"],
        ["recipe.yaml:11", "task.distillation.task.classification.predict"],
        ["recipe.yaml:9", "task.distillation.task.classification.class_wight"],
    ]
    assert "belongs under `distillation`" in lines[0]
    assert "must be 'class', 'classes' or 'number', not 'all'" in lines[1]
    assert "did you mean 'class_weight'?" in lines[2]


@pytest.mark.parametrize("spec", [[3], {"chat": {}, "tagging": {}}, 3])
def test_a_task_is_a_name_or_one_name_with_its_settings(spec: Any) -> None:
    assert "task.distillation.task: write a name, or one name with its settings" in _refusal(f"    task: {spec}\n")


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", 0), ("temperature", ".inf"), ("weight", 1.5), ("weight", -1)]
)
def test_a_number_that_cannot_be_is_refused(key: str, value: Any) -> None:
    assert f"task.distillation.{key}: " in _refusal(f"    task: chat\n    {key}: {value}\n")


def test_a_relative_teacher_starts_at_the_folder_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for written, meant in (("base", "base"), ("./base", str(tmp_path / "base"))):
        text = f"base: x\nadapters: [lora]\ntask: {{distillation: {{data: r, task: chat, teacher: {written}}}}}"
        task = cast(Distillation, parse_recipe(text, name="r.yaml", folder=tmp_path).task)
        assert task.teacher == meant
        assert task.teacher_folder() == (None if written == "base" else meant)


def test_examples_are_delegated(case: Callable[..., Case]) -> None:
    found = case("class")
    assert all(isinstance(example, found.task.traits().example) for example in found.examples)
    assert found.task.traits().example is not Example
