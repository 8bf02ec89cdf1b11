"""Cases 17 to 22 and 28 to 30 in the plain libraries: settings, caches, memory, prefixes, and methods from outside.

Each function is a case: its first line says what a user does, and what it returns is what was observed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model, prepare_model_for_kbit_training
from peft.utils import register_peft_method
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from trl import DatasetMixtureConfig, ModelConfig, SFTConfig, SFTTrainer, TrlParser
from trl.scripts.utils import ScriptArguments

from . import tiny
from .tiny import QUIET, apart, logits, lora, model, padded, scratch, tokenised, tokenizer, watch

VOCABULARY = 64


def case_17_python() -> str:
    """trl, `SFTConfig(learning_rte=1e-4)`; PEFT, `LoraConfig(rnk=8)`"""
    first = watch(lambda: SFTConfig(output_dir=scratch(), learning_rte=1e-4))
    second = watch(lambda: LoraConfig(rnk=8))
    return f"{first.said()}; {second.said()}"


def case_17_yaml() -> str:
    """trl's command line, a YAML file with `learning_rte: 1e-4`"""
    return _parsed("learning_rte: 1.0e-4\n")


def case_17_number() -> str:
    """trl's command line, `learning_rate: 2e-5` in the file, which YAML reads as text"""
    return _parsed("learning_rate: 2e-5\n")


def _parsed(text: str) -> str:
    file = Path(scratch()) / "config.yaml"
    file.write_text(f"output_dir: {scratch()}\nuse_cpu: true\n{text}", "utf-8")
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
    seen = watch(lambda: parser.parse_args_and_config(["--config", str(file)]))
    if seen.error is not None:
        return seen.said()
    return f"{seen.said('learning')}; the rate is {seen.result[1].learning_rate!r}"


def case_17_model() -> str:
    """transformers, `from_pretrained(..., rope_theta=5e5)`, as before version 5"""
    seen = watch(lambda: AutoModelForCausalLM.from_pretrained(tiny.folder(), rope_theta=5e5, dtype=torch.float32))
    if seen.error is not None:
        return seen.said()
    same = torch.equal(logits(seen.result), logits(model()))
    return f"{seen.said('rope')}; the logits are {'those without it' if same else 'others'}"


def case_18_template() -> str:
    """`datasets.map` over a function that uses the tokenizer, whose chat template changes between two calls"""
    own = type(tokenizer()).from_pretrained(tiny.folder())
    file = Path(scratch()) / "rows.jsonl"
    tiny.rows().to_json(str(file))

    def mapped() -> list[int]:
        rows = tiny.Dataset.from_json(str(file))
        return list(rows.map(lambda row: {"ids": own.apply_chat_template(row["messages"])["input_ids"]})[0]["ids"])

    before = mapped()
    own.chat_template = own.chat_template.replace("<|im_end|>", "!<|im_end|>")
    after = mapped()
    return f"the tokens are {'those of the old template' if before == after else 'new'}"


def case_19_long() -> str:
    """trl, conversations above the default `max_length` (1,024 tokens)"""
    words = "all right: this one is longer. " * 60
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": words}]
    rows = tiny.Dataset.from_list([{"messages": talk}] * 4)
    config = SFTConfig(output_dir=scratch(), **QUIET)
    seen = watch(lambda: SFTTrainer(model=lora(), args=config, train_dataset=rows, processing_class=tokenizer()))
    if seen.error is not None:
        return seen.said()
    batch = next(iter(seen.result.get_train_dataloader()))
    whole = len(tokenizer().apply_chat_template(talk)["input_ids"])
    return f"{seen.said('truncat', 'max_length')}; of {whole} tokens a row {batch['input_ids'].shape[1]} are left"


def case_20_logits() -> str:
    """trl, a batch of 4 conversations of which only the answers are learned (prompts and completions)"""
    pairs = zip(tiny.QUESTIONS, tiny.ANSWERS, strict=True)
    rows = tiny.Dataset.from_list([{"prompt": f"{q} " * 4, "completion": a} for q, a in pairs])
    wrapped = lora()
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "max_length": 256}
    config = SFTConfig(output_dir=scratch(), **(QUIET | settings))
    trainer = SFTTrainer(model=wrapped, args=config, train_dataset=rows, processing_class=tokenizer())
    found: list[str] = []

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if logits is None:
            found.append(f"the loss comes without a tensor of logits (`{type(output).__name__}`)")
        else:
            supervised = int((kwargs["labels"] != -100).sum())
            found.append(f"logits for {logits.numel() // VOCABULARY} positions, of which {supervised} carry loss")

    wrapped.register_forward_hook(look, with_kwargs=True)
    seen = watch(trainer.train)
    return found[0] if found else seen.said()


def case_21_preparing() -> str:
    """PEFT, `prepare_model_for_kbit_training` of a 4-bit base in bf16"""
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = model("wider", dtype=torch.bfloat16, quantization_config=packing, device_map={"": "cpu"})
    before = base.get_memory_footprint()
    embeddings = base.get_input_embeddings().weight.dtype
    after = prepare_model_for_kbit_training(base).get_memory_footprint()
    now = base.get_input_embeddings().weight.dtype
    return f"{before:,} bytes become {after:,}; embeddings {embeddings} become {now}".replace("torch.", "")


def case_22_logits() -> str:
    """`Trainer.evaluate` with `compute_metrics`, 10 rows"""
    shapes: list[tuple[int, ...]] = []

    def compute(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {}

    arguments = TrainingArguments(output_dir=scratch(), **(QUIET | {"per_device_eval_batch_size": 2}))
    trainer = Trainer(model=lora(), args=arguments, data_collator=padded, compute_metrics=compute)
    trainer.evaluate(tokenised())
    kept = " x ".join(map(str, shapes[0]))
    return f"the logits of all rows are kept, {kept} (`preprocess_logits_for_metrics` can reduce them)"


def _prefix(variant: str, **options: Any) -> Any:
    base = model(variant)
    for name in options:
        getattr(base, name)()
    torch.manual_seed(0)
    return get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def case_28_heads() -> str:
    """PEFT, `PrefixTuningConfig` on grouped-query attention; with a head size that is not hidden / heads"""
    both = [watch(lambda v=variant: logits(_prefix(v))).said("shape") for variant in ("plain", "wide-heads")]
    return f"{both[0]}; {both[1]}"


def case_28_checkpointing() -> str:
    """PEFT, `PrefixTuningConfig`, gradient checkpointing switched on before; and after"""
    before = watch(lambda: _prefix("plain", gradient_checkpointing_enable=True))

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        wrapped = _prefix("plain")
        if checkpointing:
            wrapped.gradient_checkpointing_enable()
        wrapped.train()
        wrapped(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
        return {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None}

    expected = gradients(False)
    after = watch(lambda: gradients(True))
    if after.error is not None:
        return f"{before.said()}; {after.said()}"
    wrong = apart(after.result, expected) if after.result.keys() == expected.keys() else 1.0
    return f"{before.said()}; {after.said('checkpoint', 'cache')}, the gradient differs by {wrong:.1g} of its norm"


def case_28_lengths() -> str:
    """PEFT, `PromptTuningConfig`, logits of 7 tokens"""
    from peft import PromptTuningConfig

    wrapped = get_peft_model(model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    return f"logits of {logits(wrapped).shape[1]} positions"


def case_29_precision() -> str:
    """`TrainingArguments(fp16=True)` without a card"""
    seen = watch(lambda: TrainingArguments(output_dir=scratch(), **(QUIET | {"fp16": True})))
    if seen.error is not None:
        return seen.said()
    wrapped, dtypes = lora(), set[str]()
    layer = wrapped.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    layer.register_forward_hook(lambda m, x, y: dtypes.add(str(y.dtype).removeprefix("torch.")))
    arguments = seen.result
    arguments.max_steps = 1
    trained = watch(Trainer(model=wrapped, args=arguments, train_dataset=tokenised(), data_collator=padded).train)
    return f"{trained.said('fp16')}; linears compute in {', '.join(sorted(dtypes)) or 'nothing'}"


def case_30_outside() -> str:
    """PEFT, `register_peft_method` with a name of one's own, from another package"""

    @dataclass
    class GainConfig(LoraConfig):
        pass

    from peft.tuners.lora import LoraModel

    return watch(lambda: register_peft_method(name="gain", config_cls=GainConfig, model_cls=LoraModel)).said()
