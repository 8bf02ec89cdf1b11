"""LitGPT 0.5.13: its LoRA fine-tuning, on the rows as they are tokenised.

What it cannot do as the others: A starts as it draws it; the rate falls as a cosine, and is zero at the first step;
each pass counts alike in a step, however many of its tokens are supervised; gradients are not clipped; with bf16, A, B
and the moments of AdamW are in it, too. So its losses are not those of the others, but for the first.
"""

import csv
import shutil
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.data.base import get_sft_collate_fn
from litgpt.finetune.lora import setup
from litgpt.prompts import Default
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from measuring import DTYPES, LONGEST, Told, peak, play, resident
from torch.utils.data import DataLoader

NAME = "SmolLM2-135M-Instruct"
PRECISION = {"fp32": "32-true", "bf16": "bf16-true"}


class Rows(DataModule):
    """Rows that are tokenised, in their order."""

    def __init__(self, rows: list[dict[str, list[int]]]) -> None:
        super().__init__()
        self.prompt_style = Default()
        self.rows = [
            {
                **{name: torch.tensor(values) for name, values in row.items()},
                "token_counts": {"raw": len(row["labels"]), "raw_plus_prompt_template": len(row["labels"])},
            }
            for row in rows
        ]
        self.batch_size, self.peak = 1, 0

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None, **_: Any) -> None:
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(self.rows, batch_size=self.batch_size, collate_fn=self.collated)

    def collated(self, rows: Any) -> Any:
        """A batch; and the peak by then. Afterwards LitGPT merges, which takes memory of its own."""
        self.peak = peak()
        return get_sft_collate_fn()(rows)

    def val_dataloader(self) -> Any:
        return DataLoader(self.rows[:1], batch_size=1, collate_fn=get_sft_collate_fn())


def converted(told: Told) -> Path:
    """The base as LitGPT reads it."""
    folder = told.place / "litgpt" / NAME
    if not folder.exists():
        shutil.copytree(told.model, folder)
        convert_hf_checkpoint(folder, model_name=NAME, dtype=str(DTYPES[told.precision]).removeprefix("torch."))
    return folder


def side(told: Told) -> dict[str, Any]:
    """Seconds, losses and peak."""
    with get_context("spawn").Pool(1) as pool:  # whose memory is not this process's
        folder = pool.apply(converted, (told,))
    rows, out, passes = Rows(told.rows()), told.place / "litgpt-out", told.effective // told.micro
    shutil.rmtree(out, ignore_errors=True)
    # What it merges in the end, it reads off the command line.
    switches = [f"--lora_{part}=true" for part in ("key", "projection", "mlp")]
    sys.argv = ["litgpt", str(folder), f"--lora_r={told.rank}", f"--lora_alpha={told.alpha}", *switches]
    began = resident()
    setup(
        folder,
        out_dir=out,
        precision=PRECISION[told.precision],
        lora_r=told.rank,
        lora_alpha=told.alpha,
        lora_dropout=0.0,
        lora_query=True,
        lora_key=True,
        lora_value=True,
        lora_projection=True,
        lora_mlp=True,
        data=rows,
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=told.effective,
            micro_batch_size=told.micro,
            lr_warmup_steps=1,
            epochs=2,
            max_steps=told.steps,
            max_seq_length=LONGEST,
        ),
        eval=EvalArgs(interval=10**6, max_new_tokens=1, max_iters=1, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": told.rate, "weight_decay": 0.0}},
    )
    (log,) = out.glob("logs/csv/*/metrics.csv")
    with log.open(encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["loss"]]
    seconds = [sum(float(line["iter_time"]) for line in lines[i : i + passes]) for i in range(0, len(lines), passes)]
    losses = [float(line["loss"]) for line in lines[passes - 1 :: passes]]
    return {"seconds": seconds, "losses": losses, "peak": rows.peak - began}


if __name__ == "__main__":
    play(side, "litgpt", "lightning")
