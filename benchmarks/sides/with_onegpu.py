"""Our loop, as `onegpu run` has it; afterwards, the products of the base alone.

The settings are those of `train:` in a recipe; `packed` are adapters before LoRA, such as `nf4`.
"""

import json
import time
from typing import Any

import torch
from accelerate import Accelerator
from measuring import Told, now, play, resident
from safetensors.torch import load_file

from onegpu.adapters.structure import linears, output_embeddings, unwrap
from onegpu.recipes import parse_recipe
from onegpu.recipes.display import Display
from onegpu.recipes.jobs import preflight
from onegpu.recipes.running import RunFolder, _session
from onegpu.recipes.training import train
from recipes import recipe


def side(told: Told, **settings: Any) -> dict[str, Any]:
    """Seconds, losses, peak, and what the base's products alone take."""
    text = recipe(told.data, told.steps, told.precision, **settings)
    job = preflight(parse_recipe(text, name="speed", folder=told.place))
    began = resident()
    model = job.load_base()
    folder = RunFolder(told.place / f"run-{time.time_ns()}")
    session, _ = _session(job, model, folder, Accelerator(cpu=job.hardware.kind == "cpu"), Display(quiet=True))
    attachment = session.stack.attachments[-1]
    attachment.load_tensors(load_file(told.start / "adapter_model.safetensors"))
    folder.open(job.loaded.as_yaml(), resume=False, accept_changes=False)
    train(session)
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text("utf-8").splitlines()]
    found = {
        "seconds": [line["seconds"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "peak": lines[-1]["peak_memory"] - began,
    }
    if not settings.get("packed"):
        found["products"] = products(model, [_computed(session, step) for step in range(1, told.steps)])
    return found


def _computed(session: Any, step: int) -> list[int]:
    """Tokens of each forward pass of a step."""
    batches = [
        session.task.collate(chunk, session.evaluator.pad) for chunk in session.evaluator.cut(session.window(step))
    ]
    return [batch["input_ids"].numel() for batch in batches]


def products(model: Any, steps: list[list[int]]) -> list[float]:
    """Seconds that multiplying by the weights of the base's linears takes for each step, forward and backward."""
    dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
    head = output_embeddings(model)
    weights = [unwrap(module).weight.detach() for path, module in linears(model).items() if path != head]
    found = []
    for lengths in [steps[0], *steps]:  # the first of all does not count
        began = now()
        for tokens in lengths:
            x = {
                size: torch.ones(tokens, size, dtype=dtype, device=weights[0].device)
                for size in {n for w in weights for n in w.shape}
            }
            for weight in weights:
                torch.nn.functional.linear(x[weight.shape[1]], weight)
            for weight in reversed(weights):
                torch.mm(x[weight.shape[0]], weight)
        found.append(now() - began)
    return found[1:]


if __name__ == "__main__":
    play(side, "onegpu", "transformers")
