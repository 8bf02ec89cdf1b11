"""torchtune 0.6.1: its recipe for LoRA on one device, on the rows as they are tokenised.

With bf16 it holds A, B and the moments of AdamW in it, too; most others have them in float32.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import Told, now, peak, play, resident, told
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from torchtune.models.llama3_2 import lora_llama3_2

PARTS = {
    "self_attn.o_proj": "attn.output_proj",
    "self_attn": "attn",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]


# --- what its configuration names, by the name of this file -----------------------------------------------------------


def model(place: str, lora_rank: int, lora_alpha: int, lora_attn_modules: list[str], apply_lora_to_mlp: bool) -> Any:
    """SmolLM2, which is a Llama, with the adapter that all sides start from."""
    shared = told(Path(place))
    config = json.loads((Path(shared.model) / "config.json").read_text("utf-8"))
    built = lora_llama3_2(
        lora_attn_modules,
        apply_lora_to_mlp=apply_lora_to_mlp,
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        embed_dim=config["hidden_size"],
        intermediate_dim=config["intermediate_size"],
        max_seq_len=2048,
        norm_eps=config["rms_norm_eps"],
        rope_base=(config.get("rope_parameters") or config)["rope_theta"],
        scale_factor=1,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
    )
    its = dict(built.named_parameters())
    for name, tensor in load_file(shared.start / "adapter_model.safetensors").items():
        its[_its_name(name)].data.copy_(tensor)
    return built


def _its_name(name: str) -> str:
    name = name.removeprefix("base_model.model.model.").replace("lora_A", "lora_a").replace("lora_B", "lora_b")
    for ours, its in PARTS.items():
        name = name.replace(ours, its)
    return name


class Tokenizer:
    """All that the recipe asks of one, as rows are tokenised."""

    pad_id = 2


def rows(tokenizer: Tokenizer, place: str) -> list[dict[str, list[int]]]:
    """Rows by its names."""
    return [{"tokens": row["input_ids"], "labels": row["labels"]} for row in told(Path(place)).rows()]


def falling(optimizer: Any, num_training_steps: int, last_epoch: int) -> LambdaLR:
    """A rate that falls to zero in a line."""
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / num_training_steps), last_epoch)


class Log:
    """The time and the loss of each step, and the peak by then, written to a file at the end."""

    def __init__(self, file: str) -> None:
        self.file, self.began, self.before = Path(file), resident(), 0.0
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak = 0

    def log_config(self, config: Any) -> None:
        """Nothing of it is kept."""

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        self.seconds.append(now() - self.before)  # the first one is no time, and does not count
        self.losses.append(float(payload["loss"]))
        self.peak, self.before = peak(), now()

    def close(self) -> None:
        found = {"seconds": self.seconds, "losses": self.losses, "peak": self.peak - self.began}
        self.file.write_text(json.dumps(found), "utf-8")


# --- the run ----------------------------------------------------------------------------------------------------------


def side(shared: Told) -> dict[str, Any]:
    """Seconds, losses and peak."""
    place, here = str(shared.place), Path(__file__).parent
    settings = {
        "model": {
            "_component_": "with_torchtune.model",
            "place": place,
            "lora_attn_modules": ATTENTION,
            "apply_lora_to_mlp": True,
            "lora_rank": shared.rank,
            "lora_alpha": shared.alpha,
        },
        "tokenizer": {"_component_": "with_torchtune.Tokenizer"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": shared.model,
            "checkpoint_files": ["model.safetensors"],
            "recipe_checkpoint": None,
            "output_dir": f"{place}/torchtune",
            "model_type": "LLAMA3_2",
        },
        "resume_from_checkpoint": False,
        "save_adapter_weights_only": True,
        "dataset": {"_component_": "with_torchtune.rows", "place": place},
        "seed": 0,
        "shuffle": False,
        "batch_size": shared.micro,
        "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "weight_decay": 0.0, "lr": shared.rate},
        "lr_scheduler": {"_component_": "with_torchtune.falling"},
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "epochs": 1,
        "max_steps_per_epoch": shared.steps,
        "gradient_accumulation_steps": shared.effective // shared.micro,
        "clip_grad_norm": 1.0,
        "compile": False,
        "output_dir": f"{place}/torchtune",
        "metric_logger": {"_component_": "with_torchtune.Log", "file": f"{place}/torchtune.json"},
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "dtype": shared.precision,
    }
    config = shared.place / "torchtune.yaml"
    OmegaConf.save(OmegaConf.create(settings), config)
    tune = [str(Path(sys.executable).parent / "tune"), "run", "lora_finetune_single_device", "--config", str(config)]
    subprocess.run(tune, check=True, env=os.environ | {"PYTHONPATH": str(here)})
    found: dict[str, Any] = json.loads((shared.place / "torchtune.json").read_text("utf-8"))
    return found


if __name__ == "__main__":
    play(side, "torchtune", "torchao")
