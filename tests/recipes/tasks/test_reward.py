"""Reward models against trl's own trainer, on the same sequences and the same weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import processors
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from trl import RewardConfig, RewardTrainer

from onegpu.adapters import DataError, attach
from onegpu.adapters.stack import Stack
from onegpu.recipes.tasks import Reader, RowProblem
from onegpu.recipes.tasks.reward import Reward, RewardExample

PAD = 1  # which is the end token too
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
    ("Q", " A", " An answer of many words"),
]
PAIRS = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in TEXTS]
MARGINS = [row | {"margin": margin} for row, margin in zip(PAIRS, (0.5, 0.0, 2, 1.25, 0.1), strict=True)]


def _says(text: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


TALKS = [{"prompt": _says(p, "user"), "chosen": _says(c), "rejected": _says(r)} for p, c, r in TEXTS]


def _task(**settings: Any) -> Reward:
    return Reward(data="rows.jsonl", **settings)


def _encode(task: Reward, rows: Sequence[Any], reader: Reader) -> list[RewardExample]:
    return [example for number, row in enumerate(rows) for example in task.encode(number, row, reader)]


def _loss(
    task: Reward, model: PreTrainedModel, examples: Sequence[RewardExample], size: int = 99
) -> tuple[Tensor, list[Any]]:
    chunks = [examples[start : start + size] for start in range(0, len(examples), size)]
    objectives = [task.objective(model, task.collate(chunk, PAD)) for chunk in chunks]
    outcomes = [outcome for objective in objectives for outcome in objective.outcomes()]
    total = torch.stack([objective.total for objective in objectives]).sum()
    return total / sum(objective.weight for objective in objectives), outcomes


def _gradients(loss: Tensor, stack: Stack) -> Tensor:
    """Of the LoRA and the head, in one vector."""
    found = torch.autograd.grad(loss, list(stack.trainable().values()))
    vector = torch.cat([gradient.flatten() for gradient in found])
    assert vector.abs().max() > 1e-4
    return vector


def _attached(base: Path) -> tuple[PreTrainedModel, Stack]:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).eval()
    if model.config.pad_token_id is None:
        model.config.pad_token_id = PAD
    stack = attach(model, [{"lora": {"rank": 4}}])
    assert any("score" in name or "classifier" in name for name in stack.trainable())
    with torch.no_grad():
        for tensor in stack.trainable().values():
            tensor.normal_(0, 0.3)
    return model, stack


@pytest.fixture
def rewarding(chat_base: Path) -> tuple[PreTrainedModel, Stack]:
    """The tiny chat base with one output, and a LoRA that is not at its start."""
    return _attached(chat_base)


@pytest.fixture
def trl(rewarding: tuple[PreTrainedModel, Stack], reader: Reader, tmp_path: Path) -> Callable[..., Any]:
    def build(rows: Sequence[Any], **settings: Any) -> tuple[Any, dict[str, Tensor]]:
        trainer: Any = RewardTrainer(
            rewarding[0],
            args=RewardConfig(output_dir=str(tmp_path), **QUIET, **settings),
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=reader.tokenizer,
        )
        rewarding[0].eval()
        names = ("chosen_ids", "rejected_ids", "margin")
        kept = [{k: v for k, v in row.items() if k in names} for row in trainer.train_dataset]
        return trainer, trainer.data_collator(kept)

    return build


# --- equal to trl -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "settings", "theirs"),
    [
        (PAIRS, {}, {}),
        (MARGINS, {}, {}),
        (PAIRS, {"centre": 0.3}, {"center_rewards_coefficient": 0.3}),
        (MARGINS, {"centre": 0.01}, {"center_rewards_coefficient": 0.01}),
    ],
)
def test_loss_gradients_and_scores_equal_those_of_trl(
    rewarding: tuple[PreTrainedModel, Stack],
    reader: Reader,
    trl: Any,
    rows: list[Any],
    settings: dict[str, float],
    theirs: dict[str, float],
) -> None:
    model, stack = rewarding
    task = _task(**settings)
    trainer, batch = trl(rows, **theirs)
    ours, outcomes = _loss(task, model, _encode(task, rows, reader))
    reference = trainer.compute_loss(model, batch)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(_gradients(ours, stack), _gradients(reference, stack), rtol=1e-4, atol=1e-6)
    scores, shown = task.scores(outcomes, [], reader), trainer._metrics["eval"]
    assert scores["accuracy"] == pytest.approx(shown["accuracy"][0])
    assert scores["margin"] == pytest.approx(shown["margin"][0], rel=1e-4)
    mean = (scores["chosen_reward"] + scores["rejected_reward"]) / 2
    assert mean == pytest.approx(shown["mean_reward"][0], rel=1e-4)


def test_the_split_into_batches_changes_nothing(rewarding: tuple[PreTrainedModel, Stack], reader: Reader) -> None:
    model, stack = rewarding
    task = _task(centre=0.1)
    examples = _encode(task, [*MARGINS, *TALKS], reader)
    whole, outcomes = _loss(task, model, examples)
    gradients, scores = _gradients(whole, stack), task.scores(outcomes, [], reader)
    assert task.directions(None).keys() == {*scores, "loss"} > {*task.measures()}
    for size in (1, 2, 7):
        loss, parts = _loss(task, model, examples, size)
        torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
        # Of the whole gradient: single values are sums in which larger ones cancel, and round as the processor adds.
        assert (_gradients(loss, stack) - gradients).norm() <= 1e-5 * gradients.norm()
        assert task.scores(parts, [], reader) == pytest.approx(scores, rel=1e-4)
        assert all(type(value) is float for outcome in parts for value in outcome)


def test_a_reward_is_the_same_beside_longer_sequences(rewarding: tuple[PreTrainedModel, Stack], reader: Reader) -> None:
    """The padding is the end token, with which every sequence ends."""
    task = _task()
    examples = _encode(task, TALKS, reader)
    _, outcomes = _loss(task, rewarding[0], examples)
    for example, found in zip(examples, outcomes, strict=True):
        alone = [rewarding[0](input_ids=torch.tensor([ids])).logits.item() for ids in (example.ids, example.other_ids)]
        assert found == pytest.approx(alone, rel=1e-4)


@pytest.fixture
def words(class_base: Path) -> Any:
    """The encoder's tokenizer, which writes two texts as BERT does."""
    tokenizer = AutoTokenizer.from_pretrained(class_base)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def test_an_encoder_can_learn_rewards(class_base: Path, words: Any) -> None:
    model, stack = _attached(class_base)
    task, reader = _task(), Reader(words, 64)
    rows = [
        {"prompt": "the cat", "chosen": "a dog wins again", "rejected": "rain"},
        {"prompt": "the ball and the team", "chosen": "goal", "rejected": "stocks fall"},
    ]
    examples = _encode(task, rows, reader)
    assert _gradients(_loss(task, model, examples)[0], stack).isfinite().all()
    for row, example in zip(rows, examples, strict=True):
        assert example.ids == reader.tokenizer(row["prompt"], row["chosen"])["input_ids"]
        assert example.other_ids == reader.tokenizer(row["prompt"], row["rejected"])["input_ids"]


def test_the_prompt_of_an_encoder_is_cut_after_its_first_token(words: Any) -> None:
    row = {"prompt": "the cat and the dog", "chosen": "a goal", "rejected": "again"}
    whole = words(row["prompt"], row["chosen"])["input_ids"]
    (example,) = _task(too_long="cut-left").encode(0, row, Reader(words, len(whole) - 3))
    assert example.ids == whole[:1] + whole[4:]
    assert words.decode(example.other_ids) == "[CLS] the dog [SEP] again [SEP]"
    assert example.cut == 3


# --- rows -------------------------------------------------------------------------------------------------------------


def test_one_output_is_asked_for() -> None:
    assert _task().labels(PAIRS) == ["reward"]
    assert (_task().kind, _task().has_head) == ("sequence-classification", True)


def test_an_example_is_one_comparison_and_no_class(reader: Reader) -> None:
    (example,) = _task().encode(3, MARGINS[2], reader)
    assert (example.row, example.supervised, example.margin) == (3, 1, 2.0)
    assert example.size == len(example.ids) + len(example.other_ids)
    assert list(_task().classes_of(example)) == []
    assert _task().explain(example, reader) == [
        ("Sun or rain? Rain, for a week<|im_end|>", "chosen"),
        ("Sun or rain? Sun<|im_end|>", "rejected"),
    ]


@pytest.mark.parametrize("margin", ["much", True, float("nan"), float("inf"), [1.0]])
def test_a_margin_that_is_no_number_is_a_problem(reader: Reader, margin: Any) -> None:
    with pytest.raises(RowProblem, match="`margin` must be a number"):
        _task().encode(0, PAIRS[0] | {"margin": margin}, reader)


@pytest.mark.parametrize(("margin", "read"), [("0.5", 0.5), (2, 2.0), (None, 0.0)])
def test_margins_are_read_as_numbers(reader: Reader, margin: Any, read: float) -> None:
    assert _task().encode(0, PAIRS[0] | {"margin": margin}, reader)[0].margin == read


def test_a_pair_too_long_is_refused_dropped_or_cut(reader: Reader) -> None:
    short = replace(reader, limit=12)
    with pytest.raises(DataError, match="24 tokens"):
        _task().encode(0, PAIRS[3] | {"prompt": "A long prompt"}, short)
    with pytest.raises(RowProblem, match="too long"):
        _task(too_long="drop").encode(0, PAIRS[3], short)
    (example,) = _task(too_long="cut-left").encode(0, PAIRS[3], short)
    assert reader.tokenizer.decode(example.ids) == "y something<|im_end|>"
