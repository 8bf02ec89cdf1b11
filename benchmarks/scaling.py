"""How time and memory of a step grow with sequence length, vocabulary, adapted modules, rank, adapters and passes.

    python benchmarks/scaling.py [--axes length vocabulary ...] [--precision fp32] [--out FILE]

A random Llama of four layers takes steps of LoRA over rows that are all supervised, each point in a process of its own.
Of an axis one thing is doubled and the rest stays. Seconds are the median of three steps after one that does not count;
memory is the peak of the process above what it held with the bare base (on CUDA: of the device).
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

LINEARS = ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 4


@dataclass(frozen=True)
class Point:
    """One step that is measured."""

    length: int = 1024  # tokens of a row
    vocabulary: int = 32_768
    modules: int = len(LINEARS)  # adapted linears of a layer
    rank: int = 16
    adapters: int = 1
    passes: int = 1  # forward and backward passes of an optimiser step


AXES: dict[str, list[int]] = {
    "length": [128, 256, 512, 1024, 2048, 4096],
    "vocabulary": [32_768, 65_536, 131_072, 262_144],
    "modules": [1, 2, 4, 7],
    "rank": [4, 8, 16, 32, 64, 128],
    "adapters": [1, 2, 4, 8],
    "passes": [1, 2, 4, 8, 16],
}


# --- one process each -------------------------------------------------------------------------------------------------


def measure(point: Point, precision: str) -> dict[str, float]:
    """Seconds of a step, and bytes above the base."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from onegpu.adapters import attach
    from onegpu.adapters.device import attention, detect
    from onegpu.recipes.tasks.language_modelling import LanguageModelling, MaskableExample

    torch.manual_seed(0)
    hardware, dtype = detect(), {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    config = LlamaConfig(
        vocab_size=point.vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=max(AXES["length"]),
        tie_word_embeddings=True,
        attn_implementation=attention(dtype, hardware) or "sdpa",
    )
    model = LlamaForCausalLM(config).to(hardware.device, dtype)  # type: ignore[arg-type]
    peak = _peaks(hardware.kind)
    spec = {"rank": point.rank, "targets": LINEARS[: point.modules]}
    stack = attach(model, [{"lora": spec | {"name": f"a{number}"}} for number in range(point.adapters)])
    trainable = list(stack.trainable().values())
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    ids = torch.randint(point.vocabulary, (point.length,)).tolist()
    example = MaskableExample(0, ids, [-100, *ids[1:]])
    task, _ = LanguageModelling(data="none").suited(model, example, longest=point.length, pad=0, packing=True)
    batch = {name: tensor.to(hardware.device) for name, tensor in task.collate([example], 0).items()}
    model.train()
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        for _ in range(point.passes):
            with task.at_work(model):
                objective = task.objective(model, batch)
                (objective.total / objective.weight / point.passes).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if hardware.kind == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds[1:]), "bytes": peak()}


def _peaks(kind: str) -> Callable[[], int]:
    """From now on: the most bytes above those that are held now."""
    import torch

    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - held
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    return lambda: _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes that the kernel says of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


# --- all of them ------------------------------------------------------------------------------------------------------


def child(point: Point, precision: str) -> dict[str, float]:
    """A point in a process of its own."""
    command = [sys.executable, __file__, "--point", json.dumps(asdict(point)), "--precision", precision]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def section(axis: str, precision: str) -> list[str]:
    """The lines of one axis: table, what doubling does, and a plot."""
    values = AXES[axis]
    found = [child(replace(Point(), **{axis: value}), precision) for value in values]
    lines = [f"## {axis}", "", f"| {axis} | ms a step | times before | MB above the base | times before |"]
    lines.append("|" + " --- |" * 5)
    growth = {key: [b[key] / a[key] for a, b in itertools.pairwise(found)] for key in ("seconds", "bytes")}
    for number, (value, one) in enumerate(zip(values, found, strict=True)):
        times = {key: f"{growth[key][number - 1]:.2f}" if number else "" for key in growth}
        cells = [f"{value:,}", f"{one['seconds'] * 1e3:.0f}", times["seconds"]]
        cells += [f"{one['bytes'] / 1e6:.0f}", times["bytes"]]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Each step to the right multiplies memory by at most {max(growth['bytes']):.2f}.", ""]
    return [*lines, *plot(axis, values, [one["bytes"] / 1e6 for one in found]), ""]


def plot(axis: str, values: list[int], megabytes: list[float]) -> list[str]:
    """A plot that Markdown viewers with Mermaid draw."""
    return [
        "```mermaid",
        "xychart-beta",
        f'    x-axis "{axis}" [{", ".join(map(str, values))}]',
        '    y-axis "MB above the base" 0 --> ' + f"{max(megabytes) * 1.1:.0f}",
        f"    line [{', '.join(f'{value:.0f}' for value in megabytes)}]",
        "```",
    ]


def page(axes: list[str], precision: str, arguments: str) -> str:
    """Everything, with what it was measured on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "onegpu"))
    rest = ", ".join(f"{name} {value:,}" for name, value in asdict(Point()).items())
    head = [
        "# How a step grows",
        "",
        f"`python benchmarks/scaling.py {arguments}`. Where an axis says nothing else: {rest}; {precision}.",
        f"Machine: {platform.machine()}, {os.cpu_count()} cores; {versions} at {commit}.",
        "",
    ]
    return "\n".join([*head, *(line for axis in axes for line in section(axis, precision))])


def main() -> None:
    """Measure one point, or all of some axes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="*", default=list(AXES), choices=list(AXES))
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    chosen: Any = parser.parse_args()
    if chosen.point:
        print(json.dumps(measure(Point(**json.loads(chosen.point)), chosen.precision)))
        return
    text = page(chosen.axes, chosen.precision, " ".join(sys.argv[1:]))
    print(text)
    if chosen.out:
        chosen.out.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
