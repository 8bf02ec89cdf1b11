"""The command line. Commands import what they need when they run: listing needs no torch.

Exit codes: 0 done; 2 the recipe, data or arguments are wrong; 3 something needed is missing or does not fit this
machine; 4 a proof failed; 130 interrupted, resumable.
"""

import json
import sys
from pathlib import Path
from typing import Any

import click

from onegpu.adapters import OnegpuError
from onegpu.adapters.registry import ADAPTERS, TASKS, entries

__all__ = ["app", "main"]

RECIPE = click.argument("recipe", metavar="RECIPE")
SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting; may be repeated.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
CHECK = click.option("--check", is_flag=True, help="Import each one, and say which are broken.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(package_name="onegpu")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def app(context: click.Context, debug: bool) -> None:
    """Fine-tune large models on one GPU, with adapters that anybody can publish."""


@app.command()
@RECIPE
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the run; runs/NAME when left out.")
@SET
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in the folder.")
def run(recipe: str, out: Path | None, overrides: tuple[str, ...], resume: bool) -> None:
    """Check, train, prove and save.

    RECIPE is a file, or the name of a packaged recipe.
    """
    from .loading import load_recipe
    from .running import run as run_recipe

    loaded = load_recipe(recipe, overrides)
    folder = out or Path("runs") / loaded.name.replace(":", "-")
    if run_recipe(loaded, folder, resume=resume) is None:
        print(f"{folder} is finished; nothing to do")


@app.command()
@RECIPE
@SET
@JSON
def show(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print a recipe with every effective value written out."""
    from .loading import load_recipe

    loaded = load_recipe(recipe, overrides)
    print(json.dumps(loaded.resolved(), indent=2) if as_json else loaded.as_yaml().rstrip())


@app.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("-m", "--message", help="Ask once, instead of in a conversation.")
@click.option("--tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer, in tokens.")
def chat(folder: Path, message: str | None, tokens: int) -> None:
    """Talk to a fine-tuned model.

    DIR is the folder of a run, or an adapter folder.
    """
    from .chatting import open_chat

    talk = open_chat(folder, tokens)
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
    rows: list[dict[str, Any]] = [
        {"name": e.name, "distribution": e.distribution, "version": e.version, "value": e.value} for e in found
    ]
    names = [e.name for e in found]
    if check:
        from .describing import breakage

        for row, entry in zip(rows, found, strict=True):
            row["broken"] = breakage(group, entry)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    width = max(map(len, names), default=0)
    for row in rows:
        twice = "  (ambiguous: write distribution:name)" if names.count(row["name"]) > 1 else ""
        broken = f"  BROKEN: {row['broken']}" if row.get("broken") else ""
        print(f"{row['name']:<{width}}  {row['distribution']} {row['version']}{twice}{broken}")


def _print_described(described: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(described, indent=2))
        return
    print(f"{described['name']} ({described['origin']})\n\n{described['doc']}\n")
    for label, value in described["facts"].items():
        print(f"{label}: {value}")
    print("\nsettings:")
    for setting in described["settings"]:
        print(f"  {setting['name']}: {setting['type']} = {setting['default']}\n      {setting['doc']}")


@app.command()
@JSON
def recipes(as_json: bool) -> None:
    """List the packaged recipes."""
    from .packaged import packaged_recipes

    found = packaged_recipes()
    if as_json:
        print(json.dumps([{"name": p.name, "origin": p.origin, "summary": p.summary} for p in found], indent=2))
        return
    width = max(len(p.name) for p in found)
    for p in found:
        print(f"{p.name:<{width}}  {p.summary}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from .describing import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


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
            raise
        _fail(str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> None:
    print(f"onegpu: {message}", file=sys.stderr)
    sys.exit(code)
