"""Writes the rows in order, the adapter that all sides start from, and what else they are told.

python prepare.py PLACE DATA STEPS PRECISION
"""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from onegpu.adapters import attach
from onegpu.recipes import parse_recipe
from onegpu.recipes.jobs import preflight
from recipes import ALPHA, EFFECTIVE, RANK, RATE, recipe, write_fixed

MICRO = 4


def main() -> None:
    """Prepare a folder."""
    place, data, steps, precision = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    write_fixed(place / "fixed.jsonl")
    job = preflight(parse_recipe(recipe(data, steps, precision), name="speed", folder=place))
    rows = [job.dataset.train[i] for step in range(steps) for i in job.plan.window(step)]
    (place / "rows.json").write_text(json.dumps([{"input_ids": row.ids, "labels": row.labels} for row in rows]))
    model = AutoModelForCausalLM.from_pretrained(job.place, dtype=job.options.dtype)
    memory = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))  # tied ones once
    stack = attach(model, job.loaded.stack, seed=0)
    (attachment,) = stack.attachments
    (place / "start").mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in attachment.tensors().items()}
    save_file(tensors, place / "start/adapter_model.safetensors", metadata={"format": "pt"})
    modules = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": modules}
    (place / "start/adapter_config.json").write_text(json.dumps(config), "utf-8")
    told = {
        "model": str(job.place),
        "base": memory,
        "data": data,
        "tokens": sum(len(row.ids) for row in rows),
        "steps": steps,
        "precision": precision,
        "effective": EFFECTIVE[data],
        "micro": MICRO,
        "rank": RANK,
        "alpha": ALPHA,
        "rate": RATE,
    }
    (place / "told.json").write_text(json.dumps(told), "utf-8")


if __name__ == "__main__":
    main()
