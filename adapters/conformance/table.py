"""What each installed adapter was proved to do: `python -m onegpu.adapters.conformance.table docs/adapters.md`.

Every cell comes from the conformance suite. A `no` has the reason that the adapter gives.
"""

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..files import write_text
from ..registry import ADAPTERS, entries
from ..specs import get
from .suite import Report, prove
from .tiny_models import ROWS

__all__ = ["COLUMNS", "PROOFS", "Proof", "Row", "cells", "page", "proved", "row_of"]

COLUMNS: Mapping[str, tuple[str, ...]] = {  # heading -> checks that must all be proved
    "Llama": ("llama",),
    "BERT": ("bert",),
    "T5": ("t5",),
    "nf4 base": ("packed bases",),
    "checkpointing": ("checkpointing",),
    "merge": ("merging",),
    "PEFT reads it": ("peft",),
    "packing": ("packing",),
    "two at once": ("two instances", "two saved"),
}
LINK = re.compile(r"https://(?:arxiv\.org|aclanthology\.org|openreview\.net|doi\.org)/[^\s,;)]+")

HEAD = """# Adapters

What each one is, and what the conformance suite proved it to do, on models made for that: a Llama, a BERT with a head
of three classes, a T5. A test proves every cell again; `python -m onegpu.adapters.conformance.table docs/adapters.md`
writes the page.

- **nf4 base**: trains over packed linears, whose bytes stay as they are (int8 too).
- **checkpointing**: gradients are the same with gradient checkpointing, reentrant or not, switched on before or after.
- **merge**: can be folded into float weights with the same outputs.
- **PEFT reads it**: stock PEFT loads the folder and computes the same logits.
- **packing**: sequences packed into one row do not see each other.
- **two at once**: two instances train on one model without disturbing each other, and are saved as one.

What holds for all: a run resumed is the run itself, bit for bit; what is saved is loaded strictly, in a fresh process,
and gives the same outputs, bit for bit; switched off, or detached, the base is what it was.

"""

# Methods that are slow to build take a few linears of every kind of model: queries, and those of the second layer of
# its feed-forward block.
FEWER = {"targets": "*.[qdw]*"}


@dataclass(frozen=True)
class Proof:
    """What an adapter needs in order to be proved on tiny models, beyond its defaults."""

    config: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[str, ...] = ()


PROOFS: Mapping[str, Proof] = {
    "adalora": Proof({"total_step": 20}),
    "adamss": Proof(FEWER),
    "adaption-prompt": Proof({"adapter_len": 4, "adapter_layers": 2}),
    "boft": Proof(FEWER),
    "c3a": Proof({"block_size": 64}),
    "cpt": Proof(
        {
            "num_virtual_tokens": 4,
            "cpt_token_ids": [3, 4, 5, 6],
            "cpt_mask": [1, 1, 1, 1],
            "cpt_tokens_type_mask": [1, 2, 2, 3],
        }
    ),
    "frod": Proof(FEWER),
    "hra": Proof(FEWER),
    "loftq": Proof(FEWER, beside=("nf4",)),
    "osf": Proof(FEWER),
    "pissa": Proof(FEWER),
    "peft-trainable-tokens": Proof({"token_indices": list(ROWS[0][:2])}),
    "psoft": Proof(FEWER),
    "shadow": Proof({"shadow_dropout": 0.0}),
    "tinylora": Proof(FEWER),
    "trainable-tokens": Proof({"tokens": list(ROWS[0][:2])}),
    "vblora": Proof({"vector_length": 64}),
    "waveft": Proof(FEWER),
}


@dataclass(frozen=True)
class Row:
    """One adapter on the page."""

    name: str
    summary: str
    paper: str  # a link, where its documentation has one
    cells: Mapping[str, str]  # heading -> `yes`, or the reason why not


def proved(name: str) -> Report:
    """The proof of one registered adapter, with the settings that it needs."""
    proof = PROOFS.get(name, Proof())
    return prove(name, proof.config, beside=proof.beside)


def cells(report: Report) -> dict[str, str]:
    """`yes` where everything was proved, else the reason or the failure."""
    found = {}
    for heading, checks in COLUMNS.items():
        reasons = [report.outcomes[check].reason for check in checks if report.outcomes[check].status != "proved"]
        found[heading] = " ".join(reasons[0].split()).replace("|", "/") if reasons else "yes"
    return found


def row_of(report: Report) -> Row:
    """One adapter's line, and what it is."""
    text = inspect.getdoc(get(report.adapter)) or ""
    link = LINK.search(text)
    first = " ".join(LINK.sub("", text.partition("\n\n")[0]).split()).partition(". ")[0]
    summary = first.replace("()", "").replace(" ;", ";").strip(" .").replace("|", "\\|") + "."
    return Row(report.adapter, summary, link.group().rstrip(".") if link else "", cells(report))


def page(rows: Sequence[Row]) -> str:
    """The whole page; equal reasons share a note."""
    reasons = list(dict.fromkeys(cell for row in rows for cell in row.cells.values() if cell != "yes"))
    number = {reason: index for index, reason in enumerate(reasons, 1)}
    lines = [_line(["adapter", *COLUMNS]), _line(["---"] * (1 + len(COLUMNS)))]
    for row in rows:
        marks = ("yes" if cell == "yes" else f"no [{number[cell]}]" for cell in row.cells.values())
        lines.append(_line([f"`{row.name}`", *marks]))
    notes = [f"{index}. {reason}" for reason, index in number.items()]
    what = [f"- `{row.name}`: {row.summary}" + (f" [paper]({row.paper})" if row.paper else "") for row in rows]
    parts = ["\n".join(lines), "## Notes\n\n" + "\n".join(notes), "## What they are\n\n" + "\n".join(what)]
    return HEAD + "\n\n".join(parts) + "\n"


def _line(fields: Sequence[str]) -> str:
    return f"| {' | '.join(fields)} |"


def main(arguments: Sequence[str]) -> None:
    """Prove every registered adapter and write the page to a file, or print it; nothing is written if one fails."""
    torch.set_num_threads(1)  # on matrices this small, threads wait for one another longer than they compute
    reports = []
    for name in dict.fromkeys(entry.name for entry in entries(ADAPTERS)):
        print(name, file=sys.stderr)
        reports.append(proved(name))
    failures = [f"{r.adapter}: {check}: {why}" for r in reports for check, why in r.failures.items()]
    if failures:
        raise SystemExit("\n".join(failures))
    text = page([row_of(report) for report in reports])
    if arguments:
        write_text(Path(arguments[0]), text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
