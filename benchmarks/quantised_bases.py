"""Packed bases on SmolLM2 and real conversations: memory, and what twenty steps of LoRA do to the held-out loss.

    python benchmarks/quantised_bases.py            # about ten minutes on two cores

Prints a Markdown table; quote it from benchmarks/results/ together with machine, versions and commit.
"""

import sys
import tempfile
from pathlib import Path

from onegpu.adapters.base import footprint
from onegpu.recipes import load_recipe, preflight, run
from onegpu.recipes.display import Display, human_bytes

SETTINGS = ["train.steps=20", "task.chat.limit=200", "train.evaluate_every=null", "train.checkpoint_every=null"]
BASES = {
    "bf16": [],
    "int8": ["int8"],
    "nf4": ["nf4"],
    "nf4, single": [{"nf4": {"double_quantisation": False}}],
    "fp4": ["fp4"],
}


def main() -> None:
    """Run each base once and print its row."""
    print("| base | memory | packed linears | smaller than bf16 | held-out loss before | after 20 steps |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, packing in BASES.items():
        adapters = [*packing, {"lora": {"rank": 8, "alpha": 16}}]
        loaded = load_recipe("quickstart", [*SETTINGS, f"adapters={adapters}"])
        size = footprint(preflight(loaded).load_base())
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(loaded, Path(folder) / "run", display=Display(quiet=True))
        assert outcome is not None
        packed = human_bytes(size.packed) if size.packed else "-"
        ratio = f"{size.packed_as_bf16 / size.packed:.2f} x" if size.packed else "-"
        scores = f"{outcome.before['loss']:.4f} | {outcome.after['loss']:.4f}"
        print(f"| {name} | {human_bytes(size.total)} | {packed} | {ratio} | {scores} |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
