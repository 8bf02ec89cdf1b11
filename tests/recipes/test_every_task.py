"""Every task through the real loop: exact accumulation, exact resume, scores that do not depend on the batch size."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import BertConfig, BertForPreTraining, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from onegpu.adapters import Interrupted, attach
from onegpu.adapters.registry import TASKS, entries
from onegpu.recipes import Loaded, Outcome, parse_recipe, preflight, training
from onegpu.recipes.data.batches import Cut
from onegpu.recipes.evaluation import Evaluator, reference
from onegpu.recipes.tasks import Task

Row = dict[str, Any]
Jsonl = Callable[..., Path]
Run = Callable[..., Outcome]
Tensors = dict[str, Tensor]

WORDS = ["the", "a", "cat", "dog", "sun", "rain", "goal", "ball", "stocks", "rise", "fall", "bank", "team", "wins"]
TALKS = [(f"Is it {WORDS[i]}?", f"It is {WORDS[-i]} {WORDS[(3 * i) % 14]}"[: 6 + i]) for i in range(1, 11)]


def _text(i: int) -> str:
    return " ".join(WORDS[(3 * i + k) % len(WORDS)] for k in range(2 + i % 5))


def _pair(i: int) -> Row:
    asked, said = TALKS[i]
    return {"prompt": asked, "chosen": said, "rejected": TALKS[(i + 3) % 10][1][::-1]}


def _context(i: int) -> Row:
    words = _text(i).split()
    start = len(words[0]) + 1
    answers = {"text": [words[1]], "answer_start": [start]} if i % 4 else {"text": [], "answer_start": []}
    return {"question": f"which {WORDS[i]}", "context": " ".join(words), "answers": answers}


COMPLETIONS = [{"prompt": asked, "completion": said} for asked, said in TALKS]
CHATS = [
    {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]} for asked, said in TALKS
]
TEXTS: list[Row] = [{"text": _text(i), "label": ["weather", "sports", "money"][i % 3]} for i in range(10)]
TAGGED = [
    {"tokens": _text(i).split(), "tags": [("O", "B-X", "I-X")[k % 3] for k in range(2 + i % 5)]} for i in range(10)
]
# name -> (base, task, settings, rows)
CASES: dict[str, tuple[str, str, Row, list[Row]]] = {
    "chat": ("llama", "chat", {"metrics": ["token-f1"], "answer_tokens": 4}, CHATS),
    "completion": ("llama", "completion", {"metrics": ["exact-match"], "answer_tokens": 4}, COMPLETIONS),
    "next tokens": ("llama", "language-modelling", {"max_length": 12}, TEXTS),
    "masked tokens": ("bert", "language-modelling", {"predict": "masked"}, TEXTS),
    "class": ("bert", "classification", {"class_weight": "balanced", "label_smoothing": 0.1}, TEXTS),
    "classes": (
        "bert",
        "classification",
        {"predict": "classes"},
        [row | {"label": [row["label"], "long"] if len(row["text"]) > 15 else [row["label"]]} for row in TEXTS],
    ),
    "number": (
        "bert",
        "classification",
        {"predict": "number"},
        [row | {"label": i / 3} for i, row in enumerate(TEXTS)],
    ),
    "class of a decoder": ("llama", "classification", {}, TEXTS),
    "tagging": ("bert", "tagging", {"max_length": 6}, TAGGED),
    "question-answering": ("bert", "question-answering", {"max_length": 9}, [_context(i) for i in range(10)]),
    "sequence-to-sequence": (
        "t5",
        "sequence-to-sequence",
        {"columns": {"source": "prompt", "target": "completion"}, "metrics": ["chrf"], "answer_tokens": 4},
        COMPLETIONS,
    ),
    "dpo": ("llama", "preference", {"loss": "dpo"}, [_pair(i) for i in range(10)]),
    "orpo": ("llama", "preference", {"loss": "orpo"}, [_pair(i) for i in range(10)]),
    "kto": (
        "llama",
        "preference",
        {"loss": "kto"},
        [row | {"label": i % 2 == 0} for i, row in enumerate(COMPLETIONS)],
    ),
    "reward": ("llama", "reward", {}, [_pair(i) for i in range(10)]),
    "distilled tokens": ("llama", "distillation", {"task": "chat", "teacher": "base"}, CHATS),
    "distilled classes": ("bert", "distillation", {"task": "classification", "teacher": "base"}, TEXTS),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, chat_base: Path, class_base: Path) -> dict[str, Path]:
    """Tiny bases by kind, each with its tokenizer."""
    torch.manual_seed(0)
    words = PreTrainedTokenizerFast.from_pretrained(class_base)
    words.add_special_tokens({"mask_token": "[MASK]"})
    bert = tmp_path_factory.mktemp("bert")
    config = BertConfig.from_pretrained(class_base, vocab_size=len(words))
    BertForPreTraining(config).save_pretrained(bert)
    words.save_pretrained(bert)
    letters = PreTrainedTokenizerFast.from_pretrained(chat_base)
    t5 = tmp_path_factory.mktemp("t5")
    T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(letters),
            d_model=32,
            d_ff=64,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=1,  # type: ignore[call-arg]
            pad_token_id=1,
            eos_token_id=1,
        )
    ).save_pretrained(t5)
    letters.save_pretrained(t5)
    return {"llama": chat_base, "bert": bert, "t5": t5}


@pytest.fixture(params=CASES)
def recipe(
    request: pytest.FixtureRequest, bases: dict[str, Path], jsonl: Jsonl, tmp_path: Path
) -> Callable[..., Loaded]:
    """`recipe(steps=3)`: a recipe of each task in turn, with these settings of `train:`."""
    base, task, settings, rows = CASES[request.param]
    data = jsonl(rows)

    def load(**train: Any) -> Loaded:
        content = {
            "base": str(bases[base]),
            "adapters": [{"lora": {"rank": 2}}],
            "task": {task: {"data": str(data), "evaluation": 0.3, **settings}},
            "train": {"steps": 2, "effective_batch": 7, "precision": "fp32", "learning_rate": 0.01, **train},
        }
        return parse_recipe(yaml.safe_dump(content), name="recipe.yaml", folder=tmp_path)

    return load


def test_every_task_of_ours_is_here() -> None:
    ours = {entry.name for entry in entries(TASKS) if entry.distribution == "onegpu"}
    assert ours
    assert ours == {task for _, task, _, _ in CASES.values()}


def test_the_split_into_micro_batches_changes_no_gradient(
    recipe: Callable[..., Loaded], run: Run, saved_tensors: Callable[[Path], Tensors]
) -> None:
    once = {"optimizer": "sgd", "steps": 1, "clip": None, "schedule": "constant", "learning_rate": 1.0}
    found = [saved_tensors(run(recipe(**once, micro_batch=size), f"by-{size}").adapter) for size in (7, 3, 1)]
    # B starts at zero, so after one step of plain descent with a rate of 1 it is the gradient.
    gradients = [
        torch.cat([t.flatten() for name, t in sorted(tensors.items()) if "lora_B" in name]) for tensors in found
    ]
    assert gradients[0].norm() > 1e-3
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() / gradients[0].norm() < 3e-6


def test_a_resumed_run_is_the_run_itself(
    recipe: Callable[..., Loaded],
    run: Run,
    folder_bytes: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # Three steps of five examples over about seven: the second is in the middle of an epoch.
    loaded = recipe(steps=3, effective_batch=5, checkpoint_every=1, evaluate_every=1, best={"metric": "loss"})
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
    lines = [(tmp_path / name / "metrics.jsonl").read_text("utf-8").splitlines() for name in ("straight", "resumed")]
    for one, other in zip(*lines, strict=True):
        differing = {key for key, value in json.loads(one).items() if json.loads(other)[key] != value}
        assert differing <= {"seconds", "peak_memory"}


def test_scores_do_not_depend_on_the_batch_size(recipe: Callable[..., Loaded]) -> None:
    job = preflight(recipe())
    task = job.loaded.task
    stack = attach(job.load_base(), job.loaded.stack)
    with torch.no_grad():
        for parameter in stack.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    autocast = torch.autocast("cpu", enabled=False)
    evaluator = Evaluator(
        task=task,
        reader=job.reader,
        pad=job.pad,
        cut=Cut(1),
        window=7,
        autocast=autocast,
        refer=reference(task, stack, autocast),
    )
    examples = [*job.dataset.train, *job.dataset.evaluation]
    first = evaluator(stack.model, examples, details=True)
    assert list(task.directions(job.reader.labels))[: len(task.measures())] == list(task.measures())
    assert first.scores.keys() == task.directions(job.reader.labels).keys()
    json.dumps(first.details)
    for size in (2, 7):
        again = replace(evaluator, cut=Cut(size))(stack.model, examples, details=True)
        assert again.scores == pytest.approx(first.scores, rel=1e-5, abs=1e-6)


# Settings that matter only where others are given: name of a case -> more of its settings.
MORE: dict[str, Row] = {
    "chat": {"metrics": ["bleu"], "bleu_tokeniser": "char"},
    "completion": {"metrics": ["bleu"], "bleu_tokeniser": "char"},
    "sequence-to-sequence": {"metrics": ["bleu"], "bleu_tokeniser": "char"},
}


def test_a_run_reads_every_setting_of_every_task(
    bases: dict[str, Path], jsonl: Jsonl, run: Run, tmp_path: Path, reading: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEGPU_CACHE", str(tmp_path / "cache"))  # examples that are kept there read no settings
    found: dict[type[Task], set[str]] = {}
    for name, (base, task, settings, rows) in CASES.items():
        content = {
            "base": str(bases[base]),
            "adapters": [{"lora": {"rank": 2}}],
            "task": {task: {"data": str(jsonl(rows)), "evaluation": 0.3, **settings, **MORE.get(name, {})}},
            "train": {"steps": 1, "effective_batch": 4, "precision": "fp32"},
        }
        loaded = parse_recipe(yaml.safe_dump(content), name="recipe.yaml", folder=tmp_path)
        kind = type(loaded.task)
        with reading(kind) as read:
            run(loaded, name.replace(" ", "-"))
        found[kind] = found.get(kind, set()) | read[kind]
    unread = {kind.__name__: sorted(set(kind.model_fields) - read) for kind, read in found.items()}
    # The task inside a distillation was made of its setting when the recipe was read.
    assert {name: fields for name, fields in unread.items() if fields} == {"Distillation": ["task"]}
