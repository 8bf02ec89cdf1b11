"""LLaMA-Factory 0.9.5: its supervised fine-tuning with LoRA, on the rows as they are tokenised."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from clock import Clock
from datasets import Dataset
from llamafactory.train.tuner import run_exp
from measuring import DTYPES, LONGEST, Told, play, resident


def base(told: Told) -> Path:
    """The base with the precision in its configuration: without `bf16`, it computes in what it finds there."""
    folder = told.place / "llama-factory-base"
    if not folder.exists():
        folder.mkdir()
        for file in Path(told.model).iterdir():
            (folder / file.name).symlink_to(file)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").unlink()
        changed = config | {"dtype": str(DTYPES[told.precision]).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(changed), "utf-8")
    return folder


def side(told: Told) -> dict[str, Any]:
    """Seconds, losses and peak."""
    rows = told.place / "llama-factory-rows"
    if not rows.exists():
        Dataset.from_list([row | {"attention_mask": [1] * len(row["input_ids"])} for row in told.rows()]).save_to_disk(
            rows
        )
    clock, out = Clock(), told.place / "llama-factory"
    shutil.rmtree(out, ignore_errors=True)  # it refuses one that is there
    began = resident()
    run_exp(
        {
            "model_name_or_path": str(base(told)),
            "adapter_name_or_path": str(told.start),
            "tokenized_path": str(rows),
            "dataset": "rows",  # a name that it wants, and does not look up
            "template": "empty",
            "cutoff_len": LONGEST,
            "disable_shuffling": True,
            "stage": "sft",
            "finetuning_type": "lora",
            "lora_rank": told.rank,
            "lora_alpha": told.alpha,
            "lora_target": "all",
            "do_train": True,
            "output_dir": str(out),
            "max_steps": told.steps,
            "per_device_train_batch_size": told.micro,
            "gradient_accumulation_steps": told.effective // told.micro,
            "learning_rate": told.rate,
            "lr_scheduler_type": "linear",
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": not torch.cuda.is_available(),
            "bf16": told.precision == "bf16",
            "disable_gradient_checkpointing": True,  # it is on unless told
            "disable_tqdm": True,
        },
        callbacks=[clock],
    )
    return clock.found(began)


if __name__ == "__main__":
    play(side, "llamafactory", "peft", "transformers")
