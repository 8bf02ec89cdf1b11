"""trl's `SFTTrainer` with PEFT's LoRA."""

from typing import Any

import torch
from clock import Clock
from datasets import Dataset
from measuring import DTYPES, LONGEST, Told, play, resident
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def side(told: Told) -> dict[str, Any]:
    """Seconds, losses and peak."""
    began = resident()
    model = AutoModelForCausalLM.from_pretrained(told.model, dtype=DTYPES[told.precision])
    clock = Clock()
    config = SFTConfig(
        output_dir=str(told.place / "trl"),
        max_steps=told.steps,
        per_device_train_batch_size=told.micro,
        gradient_accumulation_steps=told.effective // told.micro,
        learning_rate=told.rate,
        lr_scheduler_type="linear",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=told.precision == "bf16",
        gradient_checkpointing=False,
        max_length=LONGEST,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=PeftModel.from_pretrained(model, told.start, is_trainable=True),
        args=config,
        train_dataset=Dataset.from_list(told.rows()),
        processing_class=AutoTokenizer.from_pretrained(told.model),
        callbacks=[clock],
    )
    trainer.train()
    return clock.found(began)


if __name__ == "__main__":
    play(side, "trl", "peft", "transformers")
