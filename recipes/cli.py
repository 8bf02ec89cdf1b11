"""The command line. Commands import what they need when they run: listing needs no torch.

Exit codes: 0 done; 2 the recipe, data or arguments are wrong; 3 something needed is missing or does not fit this
machine; 4 a proof failed; 130 interrupted, resumable.
"""

import json
import shlex
import sys
import textwrap
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from onegpu.adapters import OnegpuError
from onegpu.adapters.errors import printable
from onegpu.adapters.registry import ADAPTERS, OURS, TASKS, VARIABLE, Entry, entries, unmatched, unqualified

__all__ = ["app", "main"]

LABELS = 12  # width of the labels in front of facts
WIDTH = 80  # of what is printed for people, in characters
RECIPE = click.argument("recipe", metavar="RECIPE")
SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting; may be repeated.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
MISMATCH = click.option(
    "--allow-base-mismatch", is_flag=True, help="Use a saved adapter on another base or tokenizer than its own."
)
CHECK = click.option("--check", is_flag=True, help="Import each one, and say which are broken.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH})
@click.version_option(package_name="onegpu")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def app(context: click.Context, debug: bool) -> None:
    """Fine-tune large models on one GPU, with adapters that anybody can publish."""
    for sentence in unmatched():
        print(f"onegpu: {sentence}", file=sys.stderr)


@app.command()
@RECIPE
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the run; runs/NAME when left out.")
@SET
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in the folder.")
@click.option(
    "--accept-changes", is_flag=True, help="Resume although recipe, rows, versions or threads are others; it is noted."
)
@MISMATCH
def run(
    recipe: str,
    out: Path | None,
    overrides: tuple[str, ...],
    resume: bool,
    accept_changes: bool,
    allow_base_mismatch: bool,
) -> None:
    """Check, train, prove and save.

    RECIPE is a file, or the name of a packaged recipe.
    """
    from .loading import load_recipe
    from .running import run as run_recipe
    from .stopping import terminated_like_interrupted

    if accept_changes and not resume:
        raise click.UsageError("--accept-changes is about --resume, and does nothing without it")
    with terminated_like_interrupted():
        loaded = load_recipe(recipe, overrides, defer=True)
        loaded = replace(loaded, allow_base_mismatch=allow_base_mismatch)
        folder = out or Path("runs") / loaded.name.replace(":", "-")
        if run_recipe(loaded, folder, resume=resume, accept_changes=accept_changes) is None:
            print(f"{folder} is finished; nothing to do")


@app.command()
@RECIPE
@SET
@JSON
def show(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print a recipe with every effective value written out.

    As comments below: what its targets come to on its base, where that is at hand.
    """
    from .loading import load_recipe

    loaded = load_recipe(recipe, overrides)
    if as_json:
        print(json.dumps(loaded.resolved(), indent=2))
        return
    from .showing import targets_of

    print(loaded.as_yaml().rstrip())
    for line in targets_of(loaded):
        print(f"# {line}".rstrip())


@app.command()
@RECIPE
@SET
@click.option("--rows", type=click.IntRange(min=0), default=3, show_default=True, help="How many examples to show.")
@JSON
def data(recipe: str, overrides: tuple[str, ...], rows: int, as_json: bool) -> None:
    """Show what the rows of a recipe become.

    Lengths, classes, duplicates, what cannot be used and why; and examples, with what is learned in [[brackets]].
    """
    from .jobs import preflight
    from .loading import load_recipe
    from .showing import data_report, report_lines

    report = data_report(preflight(load_recipe(recipe, overrides, defer=True)), rows)
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    for label, text in report_lines(report):
        _print_wrapped(text, first=f"{label:<{LABELS - 1}} ", hanging=" " * LABELS)


@app.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--data", metavar="DATA", help="Rows to score on, as under `data:`; those that were held out if left out."
)
@MISMATCH
@JSON
def evaluate(folder: Path, data: str | None, allow_base_mismatch: bool, as_json: bool) -> None:
    """Score a saved adapter, beside its base.

    DIR is the folder of a run, or an adapter folder.
    """
    from .evaluating import evaluate_folder
    from .showing import unusable_lines

    found = evaluate_folder(folder, data=data, allow_base_mismatch=allow_base_mismatch)
    if as_json:
        print(json.dumps(found._asdict(), indent=2))
        return
    print(f"{found.rows:,} {found.what}")
    for line in unusable_lines(found.dropped):
        print(f"  unusable: {line}")
    for name in found.shown:
        base = f"{found.base[name]:>10.4f} without" if name in found.base else ""
        print(f"  {name:<20}{found.adapter[name]:>10.4f}{base}")


@app.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("-m", "--message", help="Ask once, instead of in a conversation.")
@click.option("--tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer, in tokens.")
@MISMATCH
def chat(folder: Path, message: str | None, tokens: int, allow_base_mismatch: bool) -> None:
    """Talk to a fine-tuned model.

    DIR is the folder of a run, or an adapter folder.
    """
    from .chatting import open_chat

    talk = open_chat(folder, tokens, allow_base_mismatch=allow_base_mismatch)
    if message is not None:
        print(talk(message))
        return
    print("An empty line ends the conversation.", file=sys.stderr)
    while (line := _ask("you> ")).strip():
        print(talk(line))


def _ask(prompt: str) -> str:
    try:
        return input(prompt)
    except EOFError:
        return ""


@app.command()
@click.argument("name", required=False)
@CHECK
@JSON
def adapters(name: str | None, check: bool, as_json: bool) -> None:
    """List the installed adapters, or describe NAME."""
    if name is None:
        _list(ADAPTERS, check, as_json)
    else:
        from .describing import describe_adapter

        _print_described(describe_adapter(name), as_json)


@app.command()
@click.argument("name", required=False)
@CHECK
@JSON
def tasks(name: str | None, check: bool, as_json: bool) -> None:
    """List the installed tasks, or describe NAME."""
    if name is None:
        _list(TASKS, check, as_json)
    else:
        from .describing import describe_task

        _print_described(describe_task(name), as_json)


def _list(group: str, check: bool, as_json: bool) -> None:
    found = entries(group)
    broken = _broken(group, found) if check else {}
    rows: list[dict[str, Any]] = []
    for entry in found:
        row = {"name": entry.name, "distribution": entry.distribution, "version": entry.version, "value": entry.value}
        rows.append(row | {"allowed": entry.allowed} | ({"broken": broken.get(entry)} if check else {}))
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for origin in dict.fromkeys(e.origin for e in sorted(found, key=lambda e: (e.distribution != OURS, e.origin))):
        print(origin)
        _print_names({e.name: _remark(e, found, broken.get(e)) for e in found if e.origin == origin})


def _broken(group: str, found: Sequence[Entry]) -> dict[Entry, str]:
    from .describing import breakage

    return {entry: why for entry in found if entry.allowed and (why := breakage(group, entry)) is not None}


def _remark(entry: Entry, found: Sequence[Entry], broken: str | None) -> str:
    if not entry.allowed:
        return f"not allowed by {VARIABLE}"
    ambiguous = "" if unqualified(entry, found) else f"ambiguous: write {entry.distribution}:{entry.name}"
    return "; ".join(filter(None, (ambiguous, f"BROKEN: {broken}" if broken else "")))


def _print_names(remarks: Mapping[str, str]) -> None:
    """Names in columns, as `ls` has them; below, one line for each that there is something to say about."""
    width = max(map(len, remarks)) + 2
    plain = [name for name, remark in remarks.items() if not remark]
    fit = max(1, (WIDTH - 2) // width)
    for first in range(0, len(plain), fit):
        print(f"  {''.join(f'{name:<{width}}' for name in plain[first : first + fit]).rstrip()}")
    for name, remark in remarks.items():
        if remark:
            print(f"  {name:<{width}}{remark}")


def _print_described(described: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(described, indent=2, default=str))
        return
    print(f"{described['name']} ({described['origin']})\n\n{described['doc']}\n")
    facts = described["facts"]
    for label, flag in (("yes", True), ("no", False)):
        if names := [name for name, value in facts.items() if value is flag]:
            _print_wrapped(f"{label}: {', '.join(names)}", hanging="  ")
    for name, why in facts.get("reasons", {}).items():
        _print_wrapped(f"{name}: {why}", hanging="  ")
    for label, value in facts.items():
        if label != "reasons" and not isinstance(value, bool):
            print(f"{label}: {value}")
    print("\nsettings:")
    for setting in described["settings"]:
        print(f"  {setting['name']}: {setting['type']} = {setting['default']}")
        _print_wrapped(setting["doc"], first="      ", hanging="      ")


def _print_wrapped(text: str, *, first: str = "", hanging: str) -> None:
    if text:
        print(textwrap.fill(" ".join(text.split()), WIDTH, initial_indent=first, subsequent_indent=hanging))


@app.command()
@JSON
def recipes(as_json: bool) -> None:
    """List the packaged recipes."""
    from .packaged import packaged_recipes

    found = packaged_recipes()
    if as_json:
        rows = [{"name": p.name, "origin": p.origin, "summary": p.summary, "allowed": p.allowed} for p in found]
        print(json.dumps(rows, indent=2))
        return
    width = max(len(p.name) for p in found)
    for p in found:
        print(f"{p.name:<{width}}  {p.summary}" if p.allowed else f"{p.name:<{width}}  not allowed by {VARIABLE}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from .describing import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


@app.command("new-adapter")
@click.argument("name", metavar="NAME")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the package; NAME when left out.")
def new_adapter(name: str, out: Path | None) -> None:
    """Write a package with an adapter of your own.

    It holds a small method that works, and tests that pass; NAME is what recipes will call it.
    """
    from .scaffold import new_adapter as write

    folder = write(name, out)
    print(f"{folder} holds an adapter that works. Next:\n")
    print(f"  cd {shlex.quote(str(folder))}\n  pip install -e '.[test]'\n  pytest")


@app.command()
@JSON
def doctor(as_json: bool) -> None:
    """Say what is installed, and whether it works here."""
    from .doctor import examine

    findings = examine()
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.what:<16}{finding.detail}")
    if not all(finding.ok for finding in findings):
        sys.exit(3)


def main() -> None:
    """Run the command line; every expected error becomes one message and its exit code."""
    try:
        app(prog_name="onegpu", standalone_mode=False)
    except click.ClickException as error:  # the arguments are wrong
        error.show()
        sys.exit(error.exit_code)
    except OnegpuError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        _fail(str(error), error.exit_code)
    except OSError as error:  # the machine refuses: no space, no permission, no such name
        if "--debug" in sys.argv:
            traceback.print_exc()
        _fail(str(error), 3)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> None:
    print(f"onegpu: {printable(message)}", file=sys.stderr)
    sys.exit(code)
