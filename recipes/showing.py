"""`onegpu data`: what a recipe's rows become, with what is learned of them marked."""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from onegpu.adapters import TASKS, OnegpuError
from onegpu.adapters.isolation import answerable
from onegpu.adapters.registry import entry_of
from onegpu.adapters.target_table import Target

from .data.dataset import SIDES
from .jobs import Job, target_rows
from .loading import Loaded
from .tasks import Example

__all__ = [
    "data_report",
    "lengths_line",
    "marked_text",
    "report_lines",
    "rows_line",
    "target_lines",
    "targets_of",
    "unusable_lines",
]

LISTED = 5  # places of unusable rows
LISTED_CLASSES = 30
WIDTH = 80
TARGET_WIDTH = 68  # with the labels of a run in front, a line is at most 80


def data_report(job: Job, shown: int) -> dict[str, Any]:
    """Everything that is known about the data of a job, as JSON; see the keys.

    Args:
        shown: how many examples are decoded.
    """
    dataset, gathered = job.dataset, job.gathered
    report: dict[str, Any] = {"data": gathered.rows.written, **dataset.report()}
    if job.reader.labels is not None:
        report["labels"] = _label_counts(job)
    report["examples"] = [_explained(job, dataset.train[n]) for n in range(min(shown, len(dataset.train)))]
    return report


def _label_counts(job: Job) -> dict[str, int]:
    """How often each class is learned, most frequent first."""
    labels = job.reader.labels or ()
    counts = Counter(labels[label] for example in job.dataset.train for label in job.loaded.task.classes_of(example))
    return dict(counts.most_common())


def _explained(job: Job, example: Example) -> dict[str, Any]:
    task = job.loaded.task
    with answerable(job.loaded.task_name, entry_of(TASKS, type(task)), "explain"):
        pieces = task.explain(example, job.reader)
    return {"place": job.gathered.rows.place(example.row), "tokens": example.size, "pieces": pieces}


def marked_text(pieces: Sequence[tuple[str, str | None]]) -> str:
    """Pieces of an example as one text: `[[learned]]`, with what it is learned as where that is not the text itself."""
    return "".join(
        text if mark is None else f"[[{text}]]" if not mark else f"[[{text}|{mark}]]" for text, mark in pieces
    )


def report_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The report as (label, text) for people."""
    lines = [("data", report["data"]), ("rows", rows_line(report))]
    lines.append(("lengths", lengths_line(report)))
    if report["supervised_max"] > 1:
        counted = (f"{tokens}: {count:,}" for tokens, count in report["supervised_histogram"].items())
        lines.append(("supervised", f"tokens: examples - {', '.join(counted)}"))
    if "labels" in report:
        classes = [f"{name} {count:,}" for name, count in report["labels"].items()]
        lines.append(("classes", ", ".join(_beginning(classes, LISTED_CLASSES))))
    lines += [("duplicates", f"{what}: {count:,}") for what, count in report["duplicates"].items() if count]
    lines += [("unusable", text) for text in unusable_lines(report["dropped"])]
    for example in report["examples"]:
        lines += [("", ""), (example["place"], f"{example['tokens']} tokens"), ("", marked_text(example["pieces"]))]
    return lines


def rows_line(report: dict[str, Any]) -> str:
    """How many rows are for what."""
    return ", ".join(_side(report, side) for side in SIDES if report[f"{side}_examples"])


def _side(report: dict[str, Any], side: str) -> str:
    rows, examples = report[f"{side}_rows"], report[f"{side}_examples"]
    return f"{rows:,} for {side}" + (f" (in {examples:,} examples)" if examples != rows else "")


def lengths_line(report: dict[str, Any]) -> str:
    """How long the examples are, and how many are cut."""
    middle, most, longest = (report[f"length_{name}"] for name in ("p50", "p95", "max"))
    text = f"{middle:,} tokens in the middle, 95 % up to {most:,}, longest {longest:,}"
    cut = [(report[f"{side}_cut"], report[f"{side}_examples"], side) for side in SIDES if report[f"{side}_cut"]]
    told = ", ".join(f"{count:,} of {examples:,} for {side}" for count, examples, side in cut)
    text += f"; cut to {report['limit']:,}: {told}" if cut else ""
    if report["supervised_max"] > 1:  # of a class, one label is
        middle, most, longest = (report[f"supervised_{name}"] for name in ("p50", "p95", "max"))
        text += f"; supervised {middle:,} in the middle, 95 % up to {most:,}, most {longest:,}"
    return text


def targets_of(loaded: Loaded) -> list[str]:
    """The table of targets of a recipe, for `onegpu show`; or why there is none."""
    try:
        return ["targets on this base:", *(f"  {line}" for line in target_lines(target_rows(loaded)))]
    except OnegpuError as error:
        return textwrap.wrap(f"targets: not known, {error}", WIDTH - 2, break_long_words=False, break_on_hyphens=False)


def target_lines(rows: Sequence[Target]) -> list[str]:
    """What the targets of a stack come to: a line for each entry, and how many modules of which kind it means."""
    lines = []
    for row in rows:
        count = f"{row.parameters:,} parameters" if row.parameters is not None else "parameters known with the weights"
        lines.append(f"{row.adapter} {row.entry}: {row.modules:,} module{'s' if row.modules != 1 else ''}, {count}")
        kinds = ", ".join(f"{name} {number:,}" for name, number in row.kinds.items())
        lines += textwrap.wrap(kinds, TARGET_WIDTH, initial_indent="  ", subsequent_indent="  ")
    return lines


def unusable_lines(dropped: Mapping[str, Sequence[str]]) -> list[str]:
    """Why rows cannot be used, and the first places of each reason."""
    return [
        f"{_rows(len(places))}: {reason} ({', '.join(_beginning(places, LISTED))})"
        for reason, places in dropped.items()
    ]


def _rows(count: int) -> str:
    return f"{count:,} row{'s' if count != 1 else ''}"


def _beginning(items: Sequence[str], count: int) -> list[str]:
    return [*items[:count], *(["..."] if len(items) > count else [])]
