"""Seconds an optimiser step, losses and memory, beside others on the same model, rows, order, rank and precision.

    python benchmarks/speed.py [--data quartz chitchat fixed] [--steps 5] [--rounds 2] [--precision fp32] [--out FILE]
    python benchmarks/speed.py --sides "onegpu, compile" trl llama-factory litgpt torchtune --environments DIR
    python benchmarks/speed.py --sides onegpu "onegpu, nf4" --against onegpu

The rows of each step are tokenised once, and all sides but LitGPT start from the same A and B. They run in turn, each
in a process of its own (A B C A B C ...), on nothing but the steps, after a first one that does not count. What is
quoted is the median over rounds of the ratio of median step times. Peaks are above the bytes of the base in floats.
`fixed` are 4 rows of 512 tokens, all supervised: there is nothing to pack and nothing to leave out. What each side is,
and what it cannot do as the others, stands in `sides/`. Those that cannot live beside onegpu are installed into DIR.

After its steps, our side multiplies by the weights of the base alone, forward and backward, as many tokens as a step
had: that is the share of a step that no adapter could do without.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "sides"
TORCH = f"torch=={version('torch').partition('+')[0]}"
DATA = ["quartz", "chitchat", "fixed"]


@dataclass(frozen=True)
class Side:
    """What runs the steps."""

    script: str  # in sides/
    settings: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()  # what is installed for it, where it cannot live beside onegpu


SIDES = {
    "onegpu": Side("with_onegpu.py"),
    "onegpu, compile": Side("with_onegpu.py", {"compile": True}),
    "onegpu, compile, gradient_checkpointing": Side(
        "with_onegpu.py", {"compile": True, "gradient_checkpointing": True}
    ),
    "onegpu, nf4": Side("with_onegpu.py", {"packed": ["nf4"]}),
    "onegpu, nf4, compile": Side("with_onegpu.py", {"packed": ["nf4"], "compile": True}),
    "trl": Side("with_trl.py"),
    "llama-factory": Side("with_llama_factory.py", needs=("llamafactory==0.9.5",)),
    "litgpt": Side("with_litgpt.py", needs=("litgpt==0.5.13", "requests")),
    "torchtune": Side("with_torchtune.py", needs=("torchtune==0.6.1", "torchao==0.10.0")),
}
USUAL = ["onegpu", "onegpu, compile", "onegpu, compile, gradient_checkpointing", "trl"]

Found = dict[str, Any]
"""What a process left: `seconds` and `losses` of the steps, `peak` in bytes, `versions`; ours has `products`, too."""


def python_of(name: str, environments: Path | None) -> str:
    """The interpreter that a side runs in; its environment is made where it is missing."""
    needs = SIDES[name].needs
    if not needs:
        return sys.executable
    if environments is None:
        raise SystemExit(f"{name} needs an environment of its own: say where with --environments")
    python, made = (environments / name / "bin/python").absolute(), environments / name / "made-for"
    wanted = " ".join([TORCH, *needs])
    if not made.exists() or made.read_text("utf-8") != wanted:
        if python.parents[1].exists() and not (python.parents[1] / "pyvenv.cfg").exists():
            raise SystemExit(f"{python.parents[1]} is no environment: name another folder")
        venv.create(environments / name, clear=True, with_pip=True)
        for packages in ([TORCH], [TORCH, *needs]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        if "+cpu" in version("torch"):
            without_cuda(python)
        made.write_text(wanted, "utf-8")
    return str(python)


def without_cuda(python: Path) -> None:
    """Take away what is built for CUDA only, and stops an import beside a CPU build of torch; text needs none of it."""
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    for library in python.parents[1].glob("lib/python3*/site-packages/torchaudio/lib/*.so"):
        library.unlink()  # torchaudio goes on without


def compare(data: str, chosen: argparse.Namespace) -> tuple[list[str], dict[str, Found]]:
    """Rows of the table for one data set, one for each side; and what the first round found."""
    pythons = {name: python_of(name, chosen.environments) for name in chosen.sides}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        arguments = [str(place), data, str(chosen.steps), chosen.precision]
        subprocess.run([sys.executable, HERE / "prepare.py", *arguments], check=True, stdout=subprocess.DEVNULL)
        rounds = [{name: played(name, pythons[name], place) for name in chosen.sides} for _ in range(chosen.rounds)]
        told = json.loads((place / "told.json").read_text("utf-8"))
    return [row(name, chosen.against, rounds, told) for name in chosen.sides], rounds[0]


def played(name: str, python: str, place: Path) -> Found:
    """Run a side in a process of its own."""
    side = SIDES[name]
    command = [python, str(HERE / side.script), str(place), json.dumps(side.settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=place)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stdout[-3000:]}")
    found: Found = json.loads((place / "found.json").read_text("utf-8"))
    (place / "found.json").unlink()
    return found


def row(name: str, against: str, rounds: list[dict[str, Found]], told: dict[str, Any]) -> str:
    """What one side came to, beside another in the same round."""
    second = statistics.median([s for turn in rounds for s in turn[name]["seconds"][1:]])
    ratios = [median_step(turn[against]) / median_step(turn[name]) for turn in rounds]
    memory = {side: min(turn[side]["peak"] for turn in rounds) - told["base"] for side in (name, against)}
    comparable = not any(SIDES[side].settings.get("packed") for side in (name, against))
    apart = max(abs(a - b) for a, b in zip(rounds[0][name]["losses"], rounds[0][against]["losses"], strict=True))
    shown = [turn[name] for turn in rounds if "products" in turn[name]]
    cells = [
        told["data"],
        told["precision"],
        name,
        f"{second:.2f}",
        f"{told['tokens'] / told['steps'] / second:.0f}",
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{memory[name] / 1e9:.2f}" if comparable else "",
        f"{memory[name] / memory[against]:.2f}" if comparable else "",
        f"{statistics.median(map(products_share, shown)):.0%}" if shown else "",
        f"{apart:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def products_share(run: Found) -> float:
    """Of a step, what multiplying by the base's weights alone takes."""
    return statistics.median(run["products"]) / median_step(run)


def median_step(run: Found) -> float:
    """Seconds of a step; the first of a process does not count."""
    return statistics.median(run["seconds"][1:])


def page(rows: list[str], sides: dict[str, Found], chosen: argparse.Namespace) -> str:
    """The table with what it was measured on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    threads, against = os.environ.get("OMP_NUM_THREADS", "as many"), chosen.against
    versions = [f"- {name}: {shown_versions(found)}." for name, found in sides.items()]
    lines = [
        f"# Steps beside {against}",
        "",
        f"`python benchmarks/speed.py {shown_arguments(chosen)}`: SmolLM2-135M, LoRA rank 16 on all linears, 16 rows a",
        "step (4 x 4 where nothing is packed; `fixed`: 4 rows), at most 512 tokens. Memory is the peak of the process",
        "above the base; `products` is the share of the base's matrix products alone, and `apart` the largest",
        f"difference of a step's loss from that of {against}.",
        "",
        f"| data | precision | side | s a step | tokens/s | times {against} | GB | of its | products | apart |",
        f"|{' --- |' * 10}",
        *rows,
        "",
        f"Machine: {platform.machine()}, {os.cpu_count()} cores, {threads} threads; commit {commit}.",
        "",
        *versions,
        "",
    ]
    return "\n".join(lines)


def shown_versions(found: Found) -> str:
    """The packages that a side ran with."""
    return ", ".join(f"{name} {number}" for name, number in found["versions"].items())


def shown_arguments(chosen: argparse.Namespace) -> str:
    """The command line without the places on this machine."""
    counts = ["--steps", str(chosen.steps), "--rounds", str(chosen.rounds), "--precision", chosen.precision]
    sides = ["--sides", *chosen.sides, "--against", chosen.against]
    return shlex.join(["--data", *chosen.data, *counts, *sides])


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=DATA, choices=DATA)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--sides", nargs="*", default=USUAL, choices=list(SIDES))
    parser.add_argument("--against", default="trl", choices=list(SIDES))
    parser.add_argument("--environments", type=Path)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    if chosen.against not in chosen.sides:
        parser.error(f"--against {chosen.against} is none of --sides")
    rows: list[str] = []
    for data in chosen.data:
        more, sides = compare(data, chosen)
        rows += more
    text = page(rows, sides, chosen)
    print(text)
    if chosen.out:
        chosen.out.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
