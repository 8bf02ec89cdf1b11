"""Preference against trl's own trainers, on the same sequences and the same weights: losses, gradients and rewards."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from onegpu.adapters import attach
from onegpu.adapters.stack import Stack
from onegpu.recipes.tasks import Batch, Reader, RowProblem
from onegpu.recipes.tasks.chat import answer
from onegpu.recipes.tasks.preference import JudgedExample, Preference
from onegpu.recipes.tasks.tokens import sequence_logps

IGNORED, PAD = -100, 1
QUIET: dict[str, Any] = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
TEXTS = [
    ("Capital of France?", " Paris.", " It may be Lyon."),
    ("2 + 2 =", " 4", " 5, I am quite sure"),
    ("Sun or rain?", " Rain, for a week", " Sun"),
    ("Say", " something", " nothing"),
    ("A longer question about the cat", " The cat", " No"),
    ("Q", " A", " An answer of many words"),
    ("Count", " 1 2 3", " 3 2 1 0"),
]
PAIRS = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in TEXTS]


def _says(text: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


TALKS = [{"prompt": _says(p, "user"), "chosen": _says(c), "rejected": _says(r)} for p, c, r in TEXTS]


def _task(**settings: Any) -> Preference:
    return Preference(data="rows.jsonl", **settings)


def _encode(task: Preference, rows: Sequence[Any], reader: Reader) -> list[JudgedExample]:
    return [example for number, row in enumerate(rows) for example in task.encode(number, row, reader)]


@dataclass
class Learner:
    """The tiny chat base with a LoRA that is not at its start."""

    model: PreTrainedModel
    stack: Stack
    base: PreTrainedModel  # the same weights, without adapters

    def batches(self, task: Preference, examples: Sequence[JudgedExample], size: int) -> list[Batch]:
        """As the loop makes them: prepared, cut, with what the reference and the survey say."""
        window = sorted(task.prepare(examples, 0), key=lambda example: -len(example.ids))
        chunks = [window[start : start + size] for start in range(0, len(window), size)]
        batches = [batch | self._refer(task, batch) for batch in (task.collate(chunk, PAD) for chunk in chunks)]
        if not task.surveys():
            return batches
        with torch.no_grad():
            found = torch.stack([task.survey(self.model, batch) for batch in batches]).sum(0)
        assert found.shape == (task.surveys(),)
        assert found.dtype == torch.float64
        return [batch | {"window": found} for batch in batches]

    def _refer(self, task: Preference, batch: Batch) -> Batch:
        if not task.refers():
            return {}
        with self.stack.base_only(), torch.no_grad():
            return task.refer(self.model, batch)

    def loss(self, task: Preference, examples: Sequence[JudgedExample], size: int = 99) -> tuple[Tensor, list[Any]]:
        """The loss of a window, with gradients, and what an evaluation collects."""
        objectives = [task.objective(self.model, batch) for batch in self.batches(task, examples, size)]
        outcomes = [outcome for objective in objectives for outcome in objective.outcomes()]
        total = torch.stack([objective.total for objective in objectives]).sum()
        return total / sum(objective.weight for objective in objectives), outcomes

    def gradients(self, loss: Tensor) -> Tensor:
        """Of every tensor of the LoRA, in one vector."""
        found = torch.autograd.grad(loss, list(self.stack.trainable().values()))
        vector = torch.cat([gradient.flatten() for gradient in found])
        assert vector.abs().max() > 1e-4
        return vector

    def equal(self, ours: Tensor, reference: Tensor) -> None:
        """The same loss and the same gradients."""
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(self.gradients(ours), self.gradients(reference), rtol=1e-4, atol=1e-6)


@pytest.fixture
def learner(chat_base: Path) -> Learner:
    model, base = (AutoModelForCausalLM.from_pretrained(chat_base).eval() for _ in range(2))
    stack = attach(model, [{"lora": {"rank": 4}}])
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in stack.trainable().values():
            tensor.normal_(0, 0.1)
    return Learner(model, stack, base)


# --- equal to trl -----------------------------------------------------------------------------------------------------


@pytest.fixture
def trl_batch(tmp_path: Path) -> Callable[..., dict[str, Tensor]]:
    """What trl's trainers take, from our examples: `trl_batch(examples)`."""

    def build(examples: Sequence[JudgedExample]) -> dict[str, Tensor]:
        batch = _task().collate(examples, PAD)
        mask = (batch["labels"] != IGNORED).long()
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "completion_mask": mask}

    return build


@pytest.fixture
def trl_dpo(learner: Learner, reader: Reader, tmp_path: Path) -> Callable[..., Any]:
    def build(**settings: Any) -> Any:
        arguments = DPOConfig(output_dir=str(tmp_path), **QUIET, **settings)
        # Without a reference of its own, trl would load one by the path of the base.
        return DPOTrainer(
            learner.model,
            ref_model=learner.base,
            args=arguments,
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=reader.tokenizer,
        )

    return build


@pytest.mark.parametrize(
    ("loss", "theirs", "settings"),
    [
        ("dpo", "sigmoid", {"beta": 0.3}),
        ("dpo", "sigmoid", {}),
        ("ipo", "ipo", {"beta": 0.5}),
        ("hinge", "hinge", {"beta": 0.2}),
        ("robust", "robust", {"beta": 0.3, "label_smoothing": 0.2}),
    ],
)
def test_losses_with_a_reference_equal_those_of_trl(
    learner: Learner, reader: Reader, trl_dpo: Any, trl_batch: Any, loss: str, theirs: str, settings: dict[str, float]
) -> None:
    task = _task(loss=loss, **settings)
    examples = _encode(task, [*PAIRS[:4], *TALKS[4:]], reader)
    trainer = trl_dpo(loss_type=[theirs], **settings)
    reference = trainer.compute_loss(learner.model, trl_batch(examples))
    ours, outcomes = learner.loss(task, examples)
    learner.equal(ours, reference)
    if loss != "ipo":  # trl shows sums there, and compares means
        scores, shown = task.scores(outcomes, [], reader), trainer._metrics["eval"]
        assert scores["accuracy"] == pytest.approx(shown["rewards/accuracies"][0])
        assert scores["margin"] == pytest.approx(shown["rewards/margins"][0], rel=1e-4)
        assert scores["chosen_reward"] == pytest.approx(shown["rewards/chosen"][0], rel=1e-4)
        assert scores["rejected_reward"] == pytest.approx(shown["rewards/rejected"][0], rel=1e-4)


def test_texts_become_the_tokens_that_trl_makes_of_them(reader: Reader, trl_dpo: Any, trl_batch: Any) -> None:
    trainer = trl_dpo()
    theirs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(PAIRS))])
    ours = trl_batch(_encode(_task(), PAIRS, reader))
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def _cpo_batch(task: Preference, examples: Sequence[JudgedExample]) -> dict[str, Any]:
    """As trl's CPO and ORPO trainers take it."""
    batch = task.collate(examples, PAD)
    return {
        f"{side}_{name}": batch[name].chunk(2)[half]
        for half, side in enumerate(("chosen", "rejected"))
        for name in ("input_ids", "attention_mask", "labels")
    }


@pytest.fixture
def trl_cpo(learner: Learner, reader: Reader, tmp_path: Path) -> Callable[..., Any]:
    def build(trainer: Any, arguments: Any, **settings: Any) -> Any:
        made = arguments(output_dir=str(tmp_path), max_length=256, **QUIET, **settings)
        rows = Dataset.from_list(PAIRS)
        built = trainer(learner.model, args=made, train_dataset=rows, processing_class=reader.tokenizer)
        learner.model.eval()
        return built

    return build


@pytest.mark.parametrize(("smoothing", "settings"), [(0.0, {}), (0.1, {"beta": 1.5, "gamma": 0.3})])
def test_simpo_equals_that_of_trl(
    learner: Learner, reader: Reader, trl_cpo: Any, smoothing: float, settings: dict[str, float]
) -> None:
    task = _task(loss="simpo", label_smoothing=smoothing, **settings)
    beta, gamma = settings.get("beta", 2.0), settings.get("gamma", 1.0)
    trainer = trl_cpo(
        # trl adds the likelihood of the chosen unless it is told not to.
        *(CPOTrainer, CPOConfig),
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=beta,
        simpo_gamma=gamma,
        label_smoothing=smoothing,
    )
    examples = _encode(task, [*PAIRS, *TALKS], reader)
    reference, shown = trainer.get_batch_loss_metrics(learner.model, _cpo_batch(task, examples))
    ours, outcomes = learner.loss(task, examples)
    learner.equal(ours, reference)
    scores = task.scores(outcomes, [], reader)
    assert scores["accuracy"] == pytest.approx(shown["rewards/accuracies"])
    assert scores["margin"] == pytest.approx(shown["rewards/margins"], rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cpo_equals_that_of_trl_pair_by_pair(learner: Learner, reader: Reader, trl_cpo: Any, smoothing: float) -> None:
    """In a batch of several pairs, trl takes the mean of the likelihood over all tokens, so it depends on the split."""
    task = _task(loss="cpo", beta=0.2, label_smoothing=smoothing)
    trainer = trl_cpo(CPOTrainer, CPOConfig, beta=0.2, cpo_alpha=1.0, label_smoothing=smoothing)
    examples = _encode(task, [*PAIRS, *TALKS], reader)
    each = [trainer.get_batch_loss_metrics(learner.model, _cpo_batch(task, [one]))[0] for one in examples]
    learner.equal(learner.loss(task, examples)[0], torch.stack(each).mean())


def test_orpo_equals_that_of_trl_pair_by_pair(learner: Learner, reader: Reader, trl_cpo: Any) -> None:
    """trl's likelihood is of the prompt as well; a prompt of one token has none."""
    task = _task(loss="orpo", beta=0.4)
    trainer = trl_cpo(ORPOTrainer, ORPOConfig, beta=0.4)
    examples = _encode(task, [row | {"prompt": "Q"} for row in PAIRS], reader)
    each = [trainer.get_batch_loss_metrics(learner.model, _cpo_batch(task, [one]))[0] for one in examples]
    learner.equal(learner.loss(task, examples)[0], torch.stack(each).mean())


def test_orpo_of_a_completion_that_is_certain_has_a_gradient() -> None:
    from onegpu.recipes.tasks.preference_losses import Strengths, pair_loss

    for chosen, rejected in ((0.0, -1e-9), (-1e-9, 0.0), (-80.0, 0.0), (-0.6931472, -0.6931471)):
        pair = tuple(torch.tensor([value], requires_grad=True) for value in (chosen, rejected))
        loss = pair_loss("orpo", (pair[0], pair[1]), pair[0], Strengths(0.1)).sum()
        for gradient in torch.autograd.grad(loss, pair):
            assert torch.isfinite(gradient).all()


def test_smoothed_dpo_is_the_mean_of_both_orders(learner: Learner, reader: Reader) -> None:
    task = _task(loss="dpo", label_smoothing=0.2)
    examples = _encode(task, PAIRS, reader)
    flipped = [
        replace(e, ids=e.other_ids, labels=e.other_labels, other_ids=e.ids, other_labels=e.labels) for e in examples
    ]
    right, wrong = (learner.loss(_task(), which)[0] for which in (examples, flipped))
    learner.equal(learner.loss(task, examples)[0], 0.8 * right + 0.2 * wrong)


# --- KTO --------------------------------------------------------------------------------------------------------------

JUDGED = [{"prompt": p, "completion": r if i % 3 == 1 else c, "label": i % 3 != 1} for i, (p, c, r) in enumerate(TEXTS)]


@pytest.fixture
def trl_kto(learner: Learner, reader: Reader, tmp_path: Path) -> Callable[..., Any]:
    def build(rows: Sequence[Any], **settings: Any) -> tuple[Any, dict[str, Tensor]]:
        arguments = KTOConfig(output_dir=str(tmp_path), per_device_train_batch_size=len(rows), **QUIET, **settings)
        trainer: Any = KTOTrainer(
            learner.model,
            ref_model=learner.base,
            args=arguments,
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=reader.tokenizer,
        )
        return trainer, trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])

    return build


@pytest.mark.parametrize(("rows", "positive"), [(JUDGED, False), (JUDGED, True), (JUDGED[:2], True)])
def test_kto_equals_that_of_trl_from_the_rows_on(
    learner: Learner, reader: Reader, trl_kto: Any, rows: list[Any], positive: bool
) -> None:
    """The window is trl's batch; with a baseline above 0, and with one that is clamped."""
    weights = {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    task = _task(loss="kto", **weights)
    examples = _encode(task, rows, reader)
    if positive:
        _learn_mismatched(learner, task, examples)
    assert (_baseline(learner, task, examples) > 0) == positive
    trainer, batch = trl_kto(rows, **weights)
    for size in (99, 2, 1):
        learner.equal(learner.loss(task, examples, size)[0], trainer.compute_loss(learner.model, batch))
    scores, shown = task.scores(learner.loss(task, examples)[1], [], reader), trainer._metrics["eval"]
    assert shown["kl"][0] == pytest.approx(max(0.0, _baseline(learner, task, examples)), rel=1e-4)
    assert scores["desirable_reward"] == pytest.approx(shown["rewards/chosen"][0], rel=1e-4)
    assert scores["undesirable_reward"] == pytest.approx(shown["rewards/rejected"][0], rel=1e-4)
    assert scores["margin"] == pytest.approx(shown["rewards/margins"][0], rel=1e-4)
    assert "accuracy" not in scores


def _baseline(learner: Learner, task: Preference, examples: Sequence[JudgedExample]) -> float:
    total, count = learner.batches(task, examples, 99)[0]["window"].tolist()
    assert count == len(examples)
    return float(total / count)


def _learn_mismatched(learner: Learner, task: Preference, examples: Sequence[JudgedExample]) -> None:
    """A few steps after which the model finds mismatched completions likelier than the base does."""
    judged = [e for e in task.prepare(examples, 0) if isinstance(e, JudgedExample)]
    others = task.collate([replace(e, ids=e.other_ids, labels=e.other_labels) for e in judged], PAD)
    tensors = list(learner.stack.trainable().values())
    for _ in range(20):
        steps = torch.autograd.grad(sequence_logps(learner.model, others).mean(), tensors)
        with torch.no_grad():
            for tensor, step in zip(tensors, steps, strict=True):
                tensor.add_(step, alpha=0.002)


def test_a_pair_is_two_examples_for_kto_and_gives_an_accuracy(learner: Learner, reader: Reader) -> None:
    task = _task(loss="kto")
    examples = _encode(task, [*PAIRS, *JUDGED], reader)
    assert [(e.row, e.desirable) for e in examples[:4]] == [(0, 1), (0, 0), (1, 1), (1, 0)]
    pairs = _encode(_task(), PAIRS, reader)
    assert [(e.ids, e.labels) for e in examples[1:14:2]] == [(e.other_ids, e.other_labels) for e in pairs]
    _, outcomes = learner.loss(task, examples)
    rewards = {(row, kind): reward for row, kind, reward in outcomes if row < len(PAIRS)}
    right = sum(rewards[row, True] > rewards[row, False] for row in range(len(PAIRS)))
    outcomes = [outcome for outcome in outcomes if outcome[0] < len(PAIRS)]
    assert task.scores(outcomes, [], reader)["accuracy"] == pytest.approx(right / len(PAIRS))


def test_the_baseline_is_of_completions_of_other_rows(reader: Reader) -> None:
    task = _task(loss="kto")
    examples = _encode(task, PAIRS[:3], reader)
    prepared = task.prepare(examples, 0)
    for one, (example, after) in enumerate(zip(examples, prepared, strict=True)):
        neighbour = examples[one - 2]  # by two, since a turn by one would give a prompt its own other completion
        assert neighbour.row != example.row
        assert isinstance(after, JudgedExample)
        assert (after.ids, after.labels) == (example.ids, example.labels)
        start, other = example.labels.count(IGNORED), neighbour.labels.count(IGNORED)
        assert after.other_ids == example.ids[:start] + neighbour.ids[other:]
        assert after.other_labels == [IGNORED] * start + neighbour.ids[other:]


def test_rows_that_meet_themselves_after_every_turn_are_left_out_of_the_baseline(reader: Reader) -> None:
    task = _task(loss="kto")
    two = _encode(task, JUDGED[:2], reader)
    prepared = task.prepare([two[0], two[0], two[0], two[1]], 0)
    met = [example.other_ids != [] for example in prepared if isinstance(example, JudgedExample)]
    assert met == [True, False, False, True]


def test_a_mismatched_sequence_is_not_longer_than_any_may_be(reader: Reader) -> None:
    task = _task(loss="kto")
    rows = [
        {"prompt": "a long prompt of a row", "completion": " a", "label": True},
        {"prompt": "b", "completion": " a long completion", "label": False},
    ]
    short = replace(reader, limit=25)
    first = task.prepare(_encode(task, rows, short), 0)[0]
    assert isinstance(first, JudgedExample)
    assert len(first.other_ids) == len(first.other_labels) == 25
    assert reader.tokenizer.decode(first.other_ids) == "a long prompt of a row a "


@pytest.mark.parametrize("rows", [JUDGED[:1], PAIRS[:1]])
def test_a_window_of_one_row_has_a_baseline_of_zero(learner: Learner, reader: Reader, rows: list[Any]) -> None:
    task = _task(loss="kto", beta=0.7)
    examples = _encode(task, rows, reader)
    batch = learner.batches(task, examples, 99)[0]
    assert batch["window"].tolist() == [0.0, 0.0]
    own = {name: batch[name].chunk(2)[0] for name in ("input_ids", "attention_mask", "labels")}
    scores = sequence_logps(learner.model, own) - sequence_logps(learner.base, own)
    wanted = 1 - torch.sigmoid(0.7 * torch.where(batch["desirable"].bool(), scores, -scores))
    learner.equal(learner.loss(task, examples)[0], wanted.mean())


# --- batches and scores -----------------------------------------------------------------------------------------------

ALL: dict[str, dict[str, Any]] = {
    "dpo": {},
    "ipo": {},
    "hinge": {},
    "robust": {"label_smoothing": 0.1},
    "simpo": {},
    "orpo": {},
    "cpo": {},
    "kto": {"undesirable_weight": 2.0},
}


@pytest.mark.parametrize("loss", ALL)
def test_the_split_into_batches_changes_nothing(learner: Learner, reader: Reader, loss: str) -> None:
    task = _task(loss=loss, **ALL[loss])
    examples = _encode(task, [*PAIRS, *TALKS], reader)
    whole, outcomes = learner.loss(task, examples)
    gradients, scores = learner.gradients(whole), task.scores(outcomes, [], reader)
    assert {*task.measures()} <= {*task.directions(None)} <= {*scores, "loss"}
    for size in (1, 2, 7):
        loss_of_parts, parts = learner.loss(task, examples, size)
        torch.testing.assert_close(loss_of_parts, whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(learner.gradients(loss_of_parts), gradients, rtol=1e-4, atol=1e-6)
        assert task.scores(parts, [], reader) == pytest.approx(scores, rel=1e-4, abs=1e-5)
        assert all(type(value) in (float, int, bool) for outcome in parts for value in outcome)


@pytest.mark.parametrize("loss", ALL)
def test_the_reference_is_asked_only_where_it_is_needed(learner: Learner, reader: Reader, loss: str) -> None:
    task = _task(loss=loss, **ALL[loss])
    batch = learner.batches(task, _encode(task, PAIRS, reader), 99)[0]
    assert ("reference" in batch) == task.refers() == (loss in ("dpo", "ipo", "hinge", "robust", "kto"))
    assert ("window" in batch) == bool(task.surveys()) == (loss == "kto")
    if task.refers():
        own = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        assert not batch["reference"].requires_grad
        torch.testing.assert_close(batch["reference"], sequence_logps(learner.base, own).detach())
        assert (batch["reference"] - sequence_logps(learner.model, own)).abs().min() > 1e-3


def test_log_probabilities_are_those_of_the_model_itself(learner: Learner, reader: Reader) -> None:
    batch = _task().collate(_encode(_task(), PAIRS, reader), PAD)
    found = sequence_logps(learner.model, batch)
    for row, logp in enumerate(found):
        length = int(batch["attention_mask"][row].sum())
        ids, labels = batch["input_ids"][row : row + 1, :length], batch["labels"][row : row + 1, :length]
        loss = learner.model(input_ids=ids, labels=labels).loss
        torch.testing.assert_close(logp, -loss * (labels != IGNORED).sum())


def test_only_positions_with_a_target_get_logits(learner: Learner, reader: Reader) -> None:
    shapes: list[Any] = []
    head = learner.model.lm_head.register_forward_hook(lambda _, inputs, output: shapes.append(output.shape))
    row = {"prompt": "A long prompt, of which nothing is learned", "chosen": " a", "rejected": " b"}
    learner.loss(_task(), _encode(_task(), [row], reader))
    head.remove()
    assert shapes == [(2, 3, 258)] * 2  # of the reference, and with the adapter: a space, a letter and the end


def test_a_kind_without_examples_has_the_reward_of_the_base(reader: Reader) -> None:
    scores = _task(loss="kto").scores([(0, True, 0.5), (1, True, 1.5)], [], reader)
    assert scores == {"margin": 1.0, "desirable_reward": 1.0, "undesirable_reward": 0.0}


def test_accuracy_counts_a_tie_as_wrong(reader: Reader) -> None:
    scores = _task().scores([(1.0, 0.0), (0.5, 0.5), (-1.0, 1.0), (2.0, -2.0)], [], reader)
    assert scores == {"accuracy": 0.5, "margin": 0.75, "chosen_reward": 0.625, "rejected_reward": -0.125}


# --- settings and rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"loss": "dpo", "gamma": 0.5}, "`gamma` is read by simpo and not by `loss: dpo`"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "`label_smoothing` is read by dpo, robust, simpo, cpo"),
        ({"loss": "simpo", "desirable_weight": 2.0}, "`desirable_weight` is read by kto"),
        ({"loss": "robust"}, "without `label_smoothing`"),
        ({"loss": "robust", "label_smoothing": 0.5}, "less than 0.5"),
        ({"beta": 0.0}, "greater than 0"),
        ({"loss": "sigmoid"}, "'dpo', 'ipo'"),
    ],
)
def test_a_setting_that_the_loss_does_not_read_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        _task(**settings)
    assert reason in str(caught.value)


@pytest.mark.parametrize("loss", ALL)
def test_a_recipe_with_every_setting_written_out_is_read_again(loss: str) -> None:
    task = _task(loss=loss, **ALL[loss])
    assert Preference(**task.model_dump()) == task


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "completion": "A"}, "`label` must be true or false"),
        ({"prompt": "Q", "completion": "A", "label": "good"}, "`label` must be true or false"),
        ({"prompt": "Q", "completion": "A", "label": 2}, "`label` must be true or false"),
        ({"prompt": "Q", "label": True}, 'no "completion"'),
        ({"completion": "A", "label": True}, 'no "prompt"'),
        ({"prompt": _says("Q", "user"), "completion": "A", "label": True}, "both texts or both lists of messages"),
    ],
)
def test_a_row_that_cannot_be_judged_is_a_problem(reader: Reader, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowProblem, match=reason):
        _task(loss="kto").encode(0, row, reader)


@pytest.mark.parametrize("label", [True, 1, "true", "True", "1"])
def test_labels_of_a_csv_file_are_understood(reader: Reader, label: Any) -> None:
    (example,) = _task(loss="kto").encode(0, {"prompt": "Q", "completion": "A", "label": label}, reader)
    assert example.desirable == 1


def test_both_kinds_are_held_out(reader: Reader) -> None:
    task = _task(loss="kto")
    assert len({task.stratum(row) for row in JUDGED}) == 2
    assert {task.stratum(row) for row in PAIRS} == {None}


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_an_example_is_made_of_plain_values(reader: Reader, loss: str) -> None:
    """It is stored as a table of them."""
    for example in _encode(_task(loss=loss), [*PAIRS, *TALKS], reader):
        fields = asdict(example)
        assert JudgedExample(**fields) == example
        assert {type(value) for value in fields.values()} == {int, list}
        assert example.supervised == sum(label != IGNORED for label in example.labels + example.other_labels)
        assert example.size == len(example.ids + example.other_ids)


def test_an_example_shows_what_was_chosen_and_what_was_rejected(reader: Reader) -> None:
    pair, judged = _task().encode(0, PAIRS[0], reader)[0], _task(loss="kto").encode(0, JUDGED[1], reader)[0]
    question, answers = PAIRS[0]["prompt"], (PAIRS[0]["chosen"], PAIRS[0]["rejected"])
    (first, chosen), (second, rejected) = [
        (text + "<|im_end|>", mark) for text, mark in zip(answers, ("chosen", "rejected"), strict=True)
    ]
    assert _task().explain(pair, reader) == [(question, None), (first, chosen), (question, None), (second, rejected)]
    assert _task(loss="kto").explain(judged, reader)[-1][1] == "undesirable"


def test_a_question_is_answered_for_people_to_look_at(learner: Learner, reader: Reader) -> None:
    talk = answer(learner.model, reader, TALKS[0]["prompt"], 48)
    assert _task().demonstrate(learner.model, reader, TALKS[0]) == ("Capital of France?", talk)
    shown = _task().demonstrate(learner.model, reader, PAIRS[0])
    assert shown is not None
    assert shown[0] == "Capital of France?"
    assert shown[1] != talk
