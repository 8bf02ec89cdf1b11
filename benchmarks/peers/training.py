"""Cases 1 to 5 and 11 to 16 in the plain libraries: what is trained, on which tokens, in which steps.

Each function is a case: its first line says what a user does, and what it returns is what was observed.
"""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from . import tiny
from .tiny import QUIET, apart, lora, model, padded, scratch, tokenised, tokenizer, watch


def _arguments(**settings: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=scratch(), **(QUIET | {"max_steps": 3, "learning_rate": 0.01} | settings))


def _trainer(of: Any, **settings: Any) -> Trainer:
    return Trainer(model=of, args=_arguments(**settings), train_dataset=tokenised(), data_collator=padded)


def _sft(of: Any, rows: Any = None, **settings: Any) -> SFTTrainer:
    config = SFTConfig(output_dir=scratch(), **(QUIET | {"max_steps": 2, "max_length": 256} | settings))
    return SFTTrainer(model=of, args=config, train_dataset=rows or tiny.rows(), processing_class=tokenizer())


def case_01_frozen() -> str:
    """`PeftModel.from_pretrained` without `is_trainable`, then `Trainer.train()`"""
    trainer = _trainer(tiny.loaded(tiny.saved()))
    return watch(trainer.train).said()


def case_01_cut_off() -> str:
    """one block's output is detached, `Trainer` with LoRA, 3 steps"""
    wrapped = lora()
    wrapped.get_submodule("base_model.model.model.layers.0.mlp").register_forward_hook(lambda m, x, y: y.detach())
    start = {n: p.detach().clone() for n, p in wrapped.named_parameters() if p.requires_grad}
    seen = watch(_trainer(wrapped).train)
    still = [n for n, p in wrapped.named_parameters() if n in start and torch.equal(p, start[n])]
    return f"{seen.said()}; {len(still)} of {len(start)} tensors did not move"


def case_02_no_tags() -> str:
    """trl, `assistant_only_loss=True`, a chat template without generation tags"""
    return watch(lambda: _sft(lora(), assistant_only_loss=True).train()).said("assistant", "mask", "template")


def case_02_cut() -> str:
    """trl, `max_length=30`, prompts and completions; the answers of two rows of four begin later"""
    questions = ("hi", "one?", "say something much longer now, please", "and again say something longer now")
    pairs = [{"prompt": f"{question} ", "completion": "all right."} for question in questions]
    seen = watch(lambda: _sft(lora(), tiny.Dataset.from_list(pairs), max_length=30))
    if seen.error is not None:
        return seen.said()
    left = sum(len(batch["input_ids"]) for batch in seen.result.get_train_dataloader())
    return f"{seen.said('truncat', 'mask', 'length', 'drop')}; trains on {left} of 4 rows"


def case_03_collator() -> str:
    """`DataCollatorForLanguageModeling(mlm=False)`, padding token == end token"""
    batch = DataCollatorForLanguageModeling(tokenizer(), mlm=False)(
        [{"input_ids": row["input_ids"]} for row in tokenised()]
    )
    ends = (batch["input_ids"] == tiny.END) & batch["attention_mask"].bool()
    lost = (batch["labels"][ends] == -100).float().mean().item()
    return f"{lost:.0%} of the ends of turns are masked"


def case_03_trl() -> str:
    """trl, padding token == end token"""
    seen = watch(lambda: _sft(lora()))
    batch = next(iter(seen.result.get_train_dataloader()))
    ends = (batch["input_ids"] == tiny.END) & batch["attention_mask"].bool()
    lost = (batch["labels"][ends] == -100).float().mean().item()
    return f"{lost:.0%} of the ends of turns are masked; {seen.said('eos', 'pad')}"


def case_04_twice() -> str:
    """a conversation rendered to text, and the text tokenised with the defaults; both add `<s>`"""
    from tokenizers import processors
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tiny.folder())
    own.bos_token, own.chat_template = "<s>", "{{ bos_token }}" + tiny.TEMPLATE
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    messages = tiny.rows()[0]["messages"]
    seen = watch(lambda: own(own.apply_chat_template(messages, tokenize=False))["input_ids"])
    together = list(own.apply_chat_template(messages)["input_ids"])
    return f"{seen.result.count(2)} begin tokens, {seen.said()}; with `tokenize=True` {together.count(2)}"


def _gradients(of: Any, **settings: Any) -> dict[str, torch.Tensor]:
    """What the optimiser is given in the last step, with the rows in their order."""
    found: dict[str, torch.Tensor] = {}

    def look(optimizer: Any, args: Any, kwargs: Any) -> None:
        found.update({n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None})

    handle = register_optimizer_step_pre_hook(look)
    try:
        _trainer(of, **({"max_grad_norm": 0.0, "train_sampling_strategy": "sequential"} | settings)).train()
    finally:
        handle.remove()
    return found


def _splits(make: Any, data: Any = None) -> str:
    whole = _gradients(make(), per_device_train_batch_size=10, max_steps=1)
    parts = []
    for size, steps in ((5, 2), (2, 5), (1, 10), (4, 3)):
        cut = _gradients(make(), per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1)
        parts.append(f"{size}x{steps}: {apart(cut, whole):.1g}")
    return "gradients against one batch of 10 differ by " + ", ".join(parts) + " of their norm"


def case_05_causal() -> str:
    """`Trainer`, LoRA, 10 ragged rows in one step, batch x accumulation"""
    return _splits(lora)


def case_05_classifier() -> str:
    """the same with a classifier, trained on 4 + 4 + 2 rows"""
    rows = tokenised().add_column("label", [n % 3 for n in range(10)]).remove_columns("labels")

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = padded([e | {"labels": e["input_ids"]} for e in examples])
        return batch | {"labels": torch.tensor([e["label"] for e in examples])}

    def taken(size: int, steps: int) -> dict[str, torch.Tensor]:
        of = AutoModelForSequenceClassification.from_pretrained(tiny.folder(), num_labels=3, dtype=torch.float32)
        of.score.weight.data = 0.1 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        found: dict[str, torch.Tensor] = {}
        handle = register_optimizer_step_pre_hook(
            lambda *_: found.update({n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None})
        )
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        try:
            Trainer(
                model=of,
                args=_arguments(max_grad_norm=0.0, train_sampling_strategy="sequential", **settings),
                train_dataset=rows,
                data_collator=collate,
            ).train()
        finally:
            handle.remove()
        return found

    whole, cut = taken(10, 1), taken(4, 3)
    lengths = [sum(float(t.double().square().sum()) for t in g.values()) ** 0.5 for g in (cut, whole)]
    return (
        f"the gradient differs from that of one batch of 10 by {apart(cut, whole):.2g} of its norm, and is "
        f"{lengths[0] / lengths[1]:.1f} times as long"
    )


def case_11_typo() -> str:
    """PEFT, `target_modules=["q_proj", "v_porj"]`"""
    seen = watch(lambda: get_peft_model(model(), LoraConfig(target_modules=["q_proj", "v_porj"])))
    return seen.said()


def case_11_pattern() -> str:
    """PEFT, `rank_pattern={"^q_proj": 16}`"""
    seen = watch(
        lambda: get_peft_model(model(), LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"^q_proj": 16}))
    )
    ranks = {m.r["default"] for m in seen.result.modules() if hasattr(m, "r")}
    return f"{seen.said('pattern')}; the rank is {', '.join(map(str, ranks))}"


def case_12_packing() -> str:
    """trl, `packing=True`, attention that is not FlashAttention"""
    said, leaks = "", []
    for attention in ("sdpa", "eager"):
        seen = watch(lambda attention=attention: _sft(lora(model(attn_implementation=attention)), packing=True))
        if seen.error is not None:
            return seen.said()
        said = seen.said("packing", "attention", "contamination")
        batch = next(iter(seen.result.get_train_dataloader()))
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "position_ids", "attention_mask")}
        of = seen.result.model
        before = tiny.logits(of, **inputs)
        starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
        changed = inputs["input_ids"].clone()
        changed[0, 2] = 20 if changed[0, 2] != 20 else 21
        after = tiny.logits(of, **(inputs | {"input_ids": changed}))
        second = slice(starts[1], starts[2])
        leaks.append(f"{attention} {(after - before)[0, second].abs().max():.1g}")
    return f"{said}; changing a token of the first row moves logits of the second by: {', '.join(leaks)}"


def case_13_rate() -> str:
    """`Trainer.train(resume_from_checkpoint=...)` with another learning rate than the run began with"""
    place = scratch()
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10, "lr_scheduler_type": "constant"}
    first = _trainer(lora(), **settings, learning_rate=0.01)
    first.args.output_dir = place
    first.args.max_steps = 4
    first.train()
    second = _trainer(lora(), **settings, learning_rate=0.002)
    seen = watch(lambda: second.train(resume_from_checkpoint=f"{place}/checkpoint-4"))
    used = {line["learning_rate"] for line in second.state.log_history if line.get("step", 0) > 4 and "loss" in line}
    return f"{seen.said('learning_rate', 'do not match', 'differ')}; steps 5 to 10 use {', '.join(map(str, used))}"


def case_13_bits() -> str:
    """`Trainer`, LoRA with dropout 0.1, batches of 3: 10 steps against 4, and 6 after resuming"""
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10, "per_device_train_batch_size": 3}
    place = scratch()
    straight = _trainer(lora(lora_dropout=0.1), **settings)
    straight.args.output_dir = place
    straight.train()
    resumed = _trainer(lora(lora_dropout=0.1), **settings)
    seen = watch(lambda: resumed.train(resume_from_checkpoint=f"{place}/checkpoint-4"))
    if seen.error is not None:
        return seen.said()
    ours, theirs = (
        {n: p.detach() for n, p in t.model.named_parameters() if p.requires_grad} for t in (resumed, straight)
    )
    return f"{seen.said('resume', 'checkpoint')}; adapters differ by {apart(ours, theirs):.1g} of their norm"


def case_14_infinite() -> str:
    """an infinite weight in the base, `Trainer` with LoRA, 3 steps"""
    base = model()
    with torch.no_grad():
        base.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = float("inf")
    wrapped = lora(base)
    trainer = _trainer(wrapped)
    seen = watch(trainer.train)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    bad = sum(not p.isfinite().all() for p in wrapped.parameters() if p.requires_grad)
    return f"{seen.said('nan', 'inf', 'finite')}; the logged losses are {losses}; {bad} tensors are not finite after it"


def case_14_half() -> str:
    """trl, a base in bf16, one step at 1e-5"""
    wrapped = lora(model(dtype=torch.bfloat16))
    start = {n: p.detach().clone() for n, p in wrapped.named_parameters() if p.requires_grad}
    trainer = _sft(wrapped, max_steps=1, learning_rate=1e-5, lr_scheduler_type="constant")
    trainer.train()
    now = dict(trainer.model.named_parameters())
    dtypes = {str(now[n].dtype).removeprefix("torch.") for n in start}
    moved = sum(int((now[n].float() != t.float()).sum()) for n, t in start.items()) / sum(
        t.numel() for t in start.values()
    )
    return f"the adapter is {'/'.join(dtypes)}; {moved:.0%} of its values move"


def case_15_warmup() -> str:
    """`lr_scheduler_type="constant"` with `warmup_steps=5`"""
    seen: Any = None

    def train() -> Any:
        trainer = _trainer(lora(), lr_scheduler_type="constant", warmup_steps=5)
        trainer.train()
        return trainer

    seen = watch(train)
    if seen.error is not None:
        return seen.said()
    rates = [line["learning_rate"] for line in seen.result.state.log_history if "loss" in line]
    return f"{seen.said('warmup')}; the rates are {rates}"


def case_16_batches() -> str:
    """`Trainer.evaluate`, ragged rows, batches of 1, 2 and 7"""
    wrapped, losses = lora(), []
    for size in (1, 2, 7):
        trainer = _trainer(wrapped, per_device_eval_batch_size=size)
        losses.append(trainer.evaluate(tokenised())["eval_loss"])
    return "the losses are " + ", ".join(f"{loss:.4f}" for loss in losses)


def case_16_packed_base() -> str:
    """a 4-bit base (bitsandbytes, bf16, this CPU), LoRA: the gradient before and after one evaluation"""
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    wrapped = lora(model("wider", dtype=torch.bfloat16, quantization_config=packing, device_map={"": "cpu"}))

    def gradients() -> dict[str, torch.Tensor]:
        wrapped.train()
        wrapped.zero_grad()
        wrapped(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
        return {n: p.grad.float().clone() for n, p in wrapped.named_parameters() if p.grad is not None}

    before = gradients()
    with torch.no_grad():
        wrapped.eval()
        wrapped(input_ids=tiny.ids())
    return f"they differ by {apart(gradients(), before):.0%} of the norm"
