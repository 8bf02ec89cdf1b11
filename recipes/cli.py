"""The command line. Commands import what they need when they run: listing needs no torch.

Exit codes: 0 done; 2 the recipe, data or arguments are wrong; 3 something needed is missing or does not fit this
machine; 4 a proof failed; 130 interrupted, resumable.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from onegpu.adapters import OnegpuError
from onegpu.adapters.registry import ADAPTERS, TASKS, entries

__all__ = ["app", "main"]

app = typer.Typer(
    help="Fine-tune large models on one GPU with adapters that anybody can publish.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Override = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a packaged recipe.")]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    _State.debug = debug


class _State:
    debug = False


@app.command()
def run(
    recipe: RecipeName,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder of the run; default runs/NAME.")] = None,
    overrides: Override = [],  # noqa: B006  # typer copies it
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
) -> None:
    """Check, train, prove and save."""
    from .loading import load_recipe
    from .running import run as run_recipe

    loaded = load_recipe(recipe, overrides)
    folder = out or Path("runs") / loaded.name.replace(":", "-")
    if run_recipe(loaded, folder, resume=resume) is None:
        print(f"{folder} is finished; nothing to do")


@app.command()
def show(recipe: RecipeName, overrides: Override = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Print a recipe with every effective value written out."""
    from .loading import load_recipe

    loaded = load_recipe(recipe, overrides)
    print(json.dumps(loaded.resolved(), indent=2) if as_json else loaded.as_yaml(), end="\n" if as_json else "")


@app.command()
def chat(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run, or an adapter folder.")],
    message: Annotated[
        str | None, typer.Option("-m", "--message", help="Ask once instead of in a conversation.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
) -> None:
    """Talk to a fine-tuned model."""
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
def adapters(
    name: Annotated[str | None, typer.Argument(help="Describe this one.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Import each one and say which are broken.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the installed adapters, or describe one."""
    if name is not None:
        from .describing import describe_adapter

        _print_described(describe_adapter(name), as_json)
    else:
        _list(ADAPTERS, check, as_json)


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(help="Describe this one.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Import each one and say which are broken.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the installed tasks, or describe one."""
    if name is not None:
        from .describing import describe_task

        _print_described(describe_task(name), as_json)
    else:
        _list(TASKS, check, as_json)


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
def recipes(as_json: AsJson = False) -> None:
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
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, and whether it works here."""
    from .doctor import examine

    findings = examine()
    if as_json:
        print(json.dumps([f._asdict() for f in findings], indent=2))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.what:<14}{finding.detail}")
    if not all(f.ok for f in findings):
        raise typer.Exit(3)


def main() -> None:
    """Run the command line; every expected error becomes one message and its exit code."""
    try:
        app()
    except OnegpuError as error:
        if _State.debug:
            raise
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt as error:
        _fail(str(error) or "interrupted", 130)


def _fail(message: str, code: int) -> None:
    print(f"onegpu: {message}", file=sys.stderr)
    sys.exit(code)
