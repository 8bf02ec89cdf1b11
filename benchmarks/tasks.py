"""What the packaged recipes of the tasks come to, beside full training and a probe of the frozen base, over seeds.

    python benchmarks/tasks.py run RUNS [--only NAME ...] [--variants NAME ...] [--seeds 0 1 2]
    python benchmarks/tasks.py keep RUNS
    python benchmarks/tasks.py table docs/results.md

The first trains into RUNS/NAME/VARIANT-SEED, one process each, and leaves what is finished alone. The second reads what
every finished run came to into benchmarks/results/tasks.jsonl, a line each, in place of what stood there of the same
run: a table of a hundred runs need not be of one day. The third writes the page from these lines. No figure is written
by hand.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

KEPT = Path(__file__).parent / "results/tasks.jsonl"
ENVIRONMENT = "environment"  # in a run folder: what it was trained with
ADAPTER, FULL, PROBE, FOUR_BITS = "adapter", "full", "probe", "nf4"
NEAR = 0.015  # of `full`, where an adapter is said to be as good
SMALL = 0.05  # of the base's parameters, which an adapter is expected to train at most
# Measured before and after only, on rows that nothing is chosen by.
PLAIN = ("train.best=null", "train.evaluate_every=null", "train.checkpoint_every=null", "train.precision=bf16")


@dataclass(frozen=True)
class Case:
    """One row of the table: a packaged recipe, and how its variants differ from it."""

    recipe: str
    metric: str  # as `onegpu evaluate` calls it
    variants: Mapping[str, Sequence[str]]  # name -> overrides
    common: Sequence[str] = ()  # overrides of all variants
    note: str = ""
    share: bool = True  # whether the metric is a share, 0 to 1


def _full(rate: float) -> list[str]:
    return ["adapters=[full]", f"train.learning_rate={rate}"]


def _with_probe(rate: float = 1e-4) -> dict[str, list[str]]:
    """The recipe, all of the base, and the head alone on the frozen base."""
    return {ADAPTER: [], FULL: _full(rate), PROBE: ["adapters=[]"]}


def _task(name: str, **settings: Any) -> list[str]:
    return [f"task.{name}.{key}={json.dumps(value)}" for key, value in settings.items()]


HELD_OUT = {"evaluation": 0.2, "test": "none"}
CASES = {
    "topics of news": Case(
        "classify-topics",
        "accuracy",
        _with_probe() | {FOUR_BITS: ["adapters=[nf4, lora: {rank: 16, dropout: 0.05}, layerwise-lr: {decay: 0.8}]"]},
        _task("classification", **HELD_OUT),
    ),
    "sarcasm": Case("classify-sarcasm", "accuracy", _with_probe(), _task("classification", **HELD_OUT)),
    "sentiment, Chinese": Case(
        "classify-sarcasm",
        "accuracy",
        _with_probe(),
        _task("classification", **HELD_OUT, data="sample:chinese-sentiment", class_weight=None, limit=5000),
        "the encoder reads English: most Chinese characters are one unknown token to it",
    ),
    "parts of addresses": Case("tag-addresses", "f1", _with_probe(), _task("tagging", **HELD_OUT)),
    "names in finance": Case("tag-finance", "f1", _with_probe(), _task("tagging", **HELD_OUT)),
    "spans that answer": Case("answer-populations", "token_f1", _with_probe(), _task("question-answering", **HELD_OUT)),
    "questions of physics": Case(
        "chat-answers",
        "exact_match",
        {ADAPTER: [], FULL: _full(5e-5)},
        _task("chat", **HELD_OUT),
        "before, the form of an answer is wrong; of two letters one is right by chance in half of the rows, and in so "
        "few steps the model learns the form",
    ),
    "preferred answers": Case(
        "prefer-answers",
        "accuracy",
        {ADAPTER: ["adapters=[lora: {rank: 16}]"], FOUR_BITS: []},
        [*_task("preference", limit=None, evaluation=0.1), "train.steps=null", "train.epochs=6"],
        "chance is 0.5; before training the policy is its reference, and a tie counts as wrong; trained in full, the "
        "base would be no reference any more",
    ),
    "rewarded answers": Case(
        "reward-answers",
        "accuracy",
        {ADAPTER: []},
        note="chance is 0.5; in so few steps nothing of physics is learned, for which preferences need six epochs",
    ),
    "translation": Case(
        "translate-interface",
        "chrf",
        {ADAPTER: []},
        note="the decoder's attention to the encoder starts random, and is trained beside the adapter; trained in "
        "full, the base has a pooler that nothing reads, and the run stops at it",
        share=False,
    ),
    "translation by a chat model": Case("complete-translations", "chrf", {ADAPTER: [], FULL: _full(5e-5)}, share=False),
    "news": Case("adapt-to-news", "perplexity", {ADAPTER: [], FULL: _full(3e-5)}, note="lower is better", share=False),
    "news, near the base": Case(
        "distil-topics",
        "perplexity",
        {ADAPTER: []},
        note="lower is better; trained in full, the base would be no teacher any more",
        share=False,
    ),
}


# --- running ----------------------------------------------------------------------------------------------------------


def run_all(runs: Path, only: Sequence[str], variants: Sequence[str], seeds: Sequence[int]) -> None:
    """Train what is not there yet."""
    for name, case in CASES.items():
        for variant in case.variants:
            if (only and case.recipe not in only and name not in only) or (variants and variant not in variants):
                continue
            for seed in seeds:
                _train(runs / _folder(name, variant, seed), case.recipe, _overrides(case, variant), seed)


def _folder(name: str, variant: str, seed: int) -> str:
    return f"{name.replace(',', '').replace(' ', '-')}/{variant}-{seed}"


def _overrides(case: Case, variant: str) -> list[str]:
    """How a run differs from the packaged recipe, but for its seed."""
    return [*PLAIN, *case.common, *case.variants[variant]]


def _train(folder: Path, recipe: str, overrides: Sequence[str], seed: int) -> None:
    if (folder / "adapter/manifest.json").is_file():
        return  # without a file `environment` it was cut off behind the end: delete it to have it again
    command = ["onegpu", "run", recipe, "-o", str(folder)]
    if folder.exists():
        command.append("--resume")
    for override in (*overrides, f"train.seed={seed}"):
        command += ["--set", override]
    print(f"== {folder}", flush=True)
    environment = _environment()
    subprocess.run(command, check=True)
    (folder / ENVIRONMENT).write_text(environment, "utf-8")


# --- what runs came to ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What one run came to."""

    case: str
    variant: str
    seed: int
    metric: str
    before: float
    after: float
    base: str  # its source
    stack: str
    trained: int  # parameters
    share: float  # of the base's
    size: int  # bytes of the adapter folder
    rows: int
    steps: int
    seconds: float
    overrides: tuple[str, ...]  # how the run differs from the packaged recipe, but for its seed
    environment: str


def keep(runs: Path) -> None:
    """Put the results of run folders beside, or in place of, those that are kept.

    Raises:
        SystemExit: a run folder is not of the recipe that is here now.
    """
    found = {(r.case, r.variant, r.seed): r for r in [*kept(), *_finished(runs)]}
    lines = [json.dumps(asdict(found[key])) for key in sorted(found)]
    KEPT.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    print(f"{len(lines)} results in {KEPT}")


def kept() -> list[Result]:
    """The results that are kept."""
    lines = KEPT.read_text("utf-8").splitlines() if KEPT.is_file() else []
    return [Result(**(values | {"overrides": tuple(values["overrides"])})) for values in map(json.loads, lines)]


def _finished(runs: Path) -> Iterator[Result]:
    for name, case in CASES.items():
        for variant in case.variants:
            for path in sorted((runs / _folder(name, variant, 0)).parent.glob(f"{variant}-*/{ENVIRONMENT}")):
                _check(path.parent, _overrides(case, variant), case.recipe)
                yield read_result(path.parent, name, variant)


def _check(folder: Path, overrides: Sequence[str], recipe: str) -> None:
    """See that a run was of this recipe: a setting that did not exist then has its default."""
    from onegpu.recipes import load_recipe

    ran = load_recipe(str(folder / "recipe.yaml"))
    wanted = load_recipe(recipe, [*overrides, f"train.seed={ran.recipe.train.seed}"])
    if ran.resolved() != wanted.resolved():
        raise SystemExit(f"{folder} was run with other settings than are here: delete it, or change them")


def read_result(folder: Path, name: str, variant: str) -> Result:
    """The result of a run folder."""
    metric = CASES[name].metric
    manifest = json.loads((folder / "adapter/manifest.json").read_text("utf-8"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    evaluations = [line["evaluation"][metric] for line in lines if "evaluation" in line]
    trained = sum(group["elements"] for group in manifest["run"]["groups"])
    return Result(
        case=name,
        variant=variant,
        seed=manifest["run"]["train"]["seed"],
        metric=metric,
        before=evaluations[0],
        after=evaluations[-1],
        base=manifest["base"]["source"],
        stack=" + ".join(record["adapter"] for record in manifest["adapters"]),
        trained=trained,
        share=trained / manifest["run"]["parameters"],
        size=sum(path.stat().st_size for path in (folder / "adapter").iterdir()),
        rows=manifest["run"]["data"]["train_rows"],
        steps=max(line["step"] for line in lines),
        seconds=sum(line["seconds"] for line in lines if "seconds" in line),
        overrides=tuple(_overrides(CASES[name], variant)),
        environment=(folder / ENVIRONMENT).read_text("utf-8"),
    )


def _environment() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}, transformers "
        f"{version('transformers')}, onegpu {version('onegpu')} at {done.stdout.strip()}"
    )


# --- the table --------------------------------------------------------------------------------------------------------


def table() -> str:
    """The page."""
    results = kept()
    lines, notes = [HEAD, *COLUMNS], []
    for name, case in CASES.items():
        found = {variant: [r for r in results if (r.case, r.variant) == (name, variant)] for variant in case.variants}
        if found[ADAPTER]:
            lines.append(_row(case, found))
            notes += [f"- **{name}**: {remark}." for remark in _remarks(case, found)]
    runs = Counter(result.environment for result in results)
    machines = [f"- {number} run{'s' if number > 1 else ''}: {environment}." for environment, number in runs.items()]
    sections = [("Notes", notes), ("Settings", list(_settings(results))), ("Runs", machines)]
    return "\n".join([*lines, *(line for title, told in sections for line in ("", f"## {title}", "", *told)), ""])


def _settings(results: Sequence[Result]) -> Iterator[str]:
    """How the runs differ from their packaged recipes."""
    yield f"All: {_shown(PLAIN)}."
    yield ""
    for name, case in CASES.items():
        ran = {v: {r.overrides for r in results if (r.case, r.variant) == (name, v)} for v in case.variants}
        if any(len(ways) > 1 for ways in ran.values()):
            raise SystemExit(f"{name}: its seeds were run with different settings: run them again")
        own = {variant: [o for o in next(iter(ways)) if o not in PLAIN] for variant, ways in ran.items() if ways}
        if own:
            first = next(iter(own.values()))
            of_all = [override for override in first if all(override in others for others in own.values())]
            told = [_shown(of_all), *(_own(variant, overrides, of_all) for variant, overrides in own.items())]
            yield f"- **{name}**: {'; '.join(filter(None, told)) or 'as packaged'}."


def _own(variant: str, overrides: Sequence[str], of_all: Sequence[str]) -> str:
    """What only one variant is run with."""
    found = [override for override in overrides if override not in of_all]
    return f"{variant} {_shown(found)}" if found else ""


def _shown(overrides: Sequence[str]) -> str:
    return ", ".join(f"`{override}`" for override in overrides)


def _row(case: Case, found: Mapping[str, Sequence[Result]]) -> str:
    ours = found[ADAPTER]
    first = ours[0]
    cells = [
        first.case,
        f"`{case.recipe}`",
        f"`{first.base}`",
        first.stack,
        f"{first.rows:,}",
        f"{first.share:.1%}",
        f"{first.size / 1e6:.1f} MB",
        case.metric,
        f"{statistics.mean(r.before for r in ours):.3f}",
        *(_spread(found.get(variant)) for variant in (ADAPTER, PROBE, FOUR_BITS, FULL)),
    ]
    return f"| {' | '.join(cells)} |"


def _spread(results: Sequence[Result] | None) -> str:
    """Mean, and the smallest and largest of several seeds."""
    if not results:
        return ""
    values = [result.after for result in results]
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else " (one seed)"
    return f"{statistics.mean(values):.3f}{spread}"


def _remarks(case: Case, found: Mapping[str, Sequence[Result]]) -> Iterator[str]:
    if case.note:
        yield case.note
    if (share := found[ADAPTER][0].share) > SMALL:
        yield f"{share:.1%} of the base's parameters are trained, which misses {SMALL:.0%} by {share - SMALL:.1%}"
    ours = {result.seed: result.after for result in found[ADAPTER]}
    for other, what in ((FULL, "full training"), (FOUR_BITS, "the same over a 4-bit base")):
        gaps = [result.after - ours[result.seed] for result in found.get(other, ()) if result.seed in ours]
        if gaps:
            gap, seeds = statistics.mean(gaps), f"{len(gaps)} seed{'s' if len(gaps) > 1 else ''}"
            missed = f", which misses {NEAR} by {gap - NEAR:.3f}" if case.share and other == FULL and gap > NEAR else ""
            yield f"{what} is {abs(gap):.3f} {'above' if gap > 0 else 'below'} the adapter{missed} ({seeds} of both)"


HEAD = """# Results

What packaged recipes come to on rows that were held out. `python benchmarks/tasks.py run RUNS` trains, `... keep RUNS`
reads what the run folders say into `benchmarks/results/tasks.jsonl`, and `... table docs/results.md` writes this page
from that. No figure was typed.

- **share**: trained parameters, heads included, of the base's. **size**: the adapter folder.
- **before**: the base, with a fresh head where the task has one. **adapter**: after training, the mean of the seeds
  with the smallest and the largest.
- **probe**: the head alone, on the frozen base, with the same rows and steps. **nf4**: the base in 4 bits.
- **full**: all of the base, with the same rows and steps, and a rate of its own.

How a run differs from the packaged recipe stands under [Settings](#settings).
"""
COLUMNS = [
    "| task | recipe | base | stack | rows | share | size | metric | before | adapter | probe | nf4 | full |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
]


def main() -> None:
    """Run, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("run")
    train.add_argument("runs", type=Path)
    train.add_argument("--only", nargs="*", default=[])
    train.add_argument("--variants", nargs="*", default=[])
    train.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    commands.add_parser("keep").add_argument("runs", type=Path)
    commands.add_parser("table").add_argument("out", type=Path)
    chosen = parser.parse_args()
    if chosen.command == "run":
        run_all(chosen.runs, chosen.only, chosen.variants, chosen.seeds)
    elif chosen.command == "keep":
        keep(chosen.runs)
    else:
        chosen.out.write_text(table(), "utf-8")


if __name__ == "__main__":
    main()
