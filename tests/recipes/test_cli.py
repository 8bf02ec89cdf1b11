import json
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onegpu.adapters import ADAPTERS, TASKS, artefact
from onegpu.recipes import Loaded, training
from onegpu.recipes.data.rows import Rows
from onegpu.recipes.training import Session

Command = Callable[..., tuple[int, str, str]]
SCRIPT = Path(sysconfig.get_path("scripts")) / "onegpu"

RECIPE = """\
base: BASE
adapters:
  - lora: {rank: 2}
task:
  chat: {data: rows.jsonl, evaluation: none}
train: {steps: 1, effective_batch: 4}
"""


@pytest.fixture
def workplace(
    tmp_path: Path, chat_base: Path, rows: list[Any], jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with a recipe that works and its rows, from where commands are called."""
    jsonl(rows)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("BASE", str(chat_base)), "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _change(workplace: Path, *pairs: tuple[str, str]) -> None:
    path = workplace / "recipe.yaml"
    text = path.read_text("utf-8")
    for was, becomes in pairs:
        assert was in text
        text = text.replace(was, becomes)
    path.write_text(text, "utf-8")


# --- wrong input ------------------------------------------------------------------------------------------------------

# What is changed in the recipe, the exit code, and what the one message must say: place, fault, nearest valid choice.
WRONG: dict[str, tuple[list[tuple[str, str]], int, list[str]]] = {
    "unknown key": ([("rank: 2", "rnak: 2")], 2, ["recipe.yaml:3", "adapters[0].lora.rnak", "did you mean 'rank'"]),
    "misplaced key": ([("rank: 2", "steps: 2")], 2, ["recipe.yaml:3", "'steps' belongs under `train`"]),
    "bad type": ([("steps: 1", "steps: soon")], 2, ["recipe.yaml:6", "train.steps", "valid integer", "'soon'"]),
    "missing file": ([("rows.jsonl", "row.jsonl")], 2, ["recipe.yaml:5", "'row.jsonl': no such file", "rows.jsonl"]),
    "empty dataset": ([("rows.jsonl", "empty.jsonl")], 2, ["recipe.yaml:5", "the file is empty"]),
    "missing column": ([("rows.jsonl", "other.jsonl")], 2, ["recipe.yaml:5", "no column 'messages'", "text"]),
    "unknown sample": (
        [("rows.jsonl", "sample:chitchat-shrot")],
        2,
        ["recipe.yaml:5", "did you mean 'chitchat-short'"],
    ),
    "no conversations": (
        [("rows.jsonl", "alone.jsonl")],
        2,
        ["recipe.yaml:5", "2 of 12 rows", "no assistant turn (alone.jsonl:5, alone.jsonl:8)"],
    ),
    "too long": (
        [("evaluation: none", "evaluation: none, max_length: 20")],
        2,
        ["recipe.yaml:5", "max_length is 20", "too_long"],
    ),
    "target without match": (
        [("rank: 2", "targets: q_prj")],
        2,
        ["recipe.yaml:3", "'q_prj' matches no linear", "did you mean 'q_proj'"],
    ),
    "unknown adapter": ([("lora:", "loar:")], 3, ["recipe.yaml:3", "'loar'", "did you mean 'lora'"]),
    "unknown task": ([("chat:", "chatt:")], 3, ["recipe.yaml:4", "'chatt'", "did you mean 'chat'"]),
    "two of one name": (
        [("  - lora: {rank: 2}", "  - lora\n  - lora")],
        2,
        ["recipe.yaml:2", "two adapters are called 'lora'"],
    ),
    "fp16 without a card": ([("steps: 1", "precision: fp16")], 3, ["recipe.yaml:6", "fp16 needs a CUDA device"]),
    "broken YAML": ([("{rank: 2}", "{rank: 2")], 2, ["recipe.yaml:", "not YAML"]),
}
BASES: dict[str, tuple[str, int, list[str]]] = {
    "missing base": ("./nowhere", 2, ["recipe.yaml:1", "'./nowhere': no such file or folder"]),
    "missing GGUF": ("nowhere.gguf", 2, ["recipe.yaml:1", "'nowhere.gguf': no such file or folder"]),
    "missing GGUF of a package": (
        "package:tiny_package/modle.gguf",
        2,
        ["recipe.yaml:1", "has no 'modle.gguf'", "'model.gguf'"],
    ),
    "missing package": (
        "package:onegpu_no_such/model.gguf",
        3,
        ["recipe.yaml:1", "'onegpu_no_such' is not installed", "pip install"],
    ),
    "hub id without revision": ("people/model", 2, ["recipe.yaml:1", "revision"]),
}


def _assert_refused(workplace: Path, done: tuple[int, str, str], code: int, told: list[str]) -> None:
    found, out, err = done
    assert (found, out) == (code, "")
    assert err.startswith("onegpu: ")
    assert len(err.splitlines()) == 1
    for text in told:
        assert text in err
    assert not (workplace / "out").exists()
    assert not (workplace / "runs").exists()


@pytest.fixture
def wrong_data(workplace: Path, rows: list[Any], jsonl: Callable[..., Path]) -> None:
    """Data sets with something wrong, beside the good one."""
    if torch.cuda.is_available():
        pytest.skip("one of the faults is to have no card")
    alone = {"messages": [{"role": "user", "content": "alone"}]}
    jsonl([], "empty.jsonl")
    jsonl([{"text": "a"}], "other.jsonl")
    jsonl([*rows[:4], alone, *rows[4:6], alone, *rows[6:]], "alone.jsonl")
    package = workplace / "tiny_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('nobody may import this')")
    (package / "model.gguf").touch()


@pytest.mark.usefixtures("wrong_data")
@pytest.mark.parametrize("fault", WRONG)
def test_wrong_input_is_refused_with_one_message_and_nothing_is_written(
    fault: str, workplace: Path, onegpu: Command
) -> None:
    changes, code, told = WRONG[fault]
    _change(workplace, *changes)
    _assert_refused(workplace, onegpu("run", "recipe.yaml", "-o", "out"), code, told)


@pytest.mark.usefixtures("wrong_data")
@pytest.mark.parametrize("fault", BASES)
def test_a_wrong_base_is_refused_with_one_message_and_nothing_is_written(
    fault: str, workplace: Path, chat_base: Path, onegpu: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, code, told = BASES[fault]
    monkeypatch.syspath_prepend(workplace)
    _change(workplace, (str(chat_base), base))
    _assert_refused(workplace, onegpu("run", "recipe.yaml", "-o", "out"), code, told)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "quickstrat", "-o", "out"], ["no such recipe", "did you mean 'quickstart'"]),
        (["run", "missing.yaml", "-o", "out"], ["no such file"]),
        (
            ["run", "recipe.yaml", "-o", "out", "--set", "train.stesp=3"],
            ["--set train.stesp=3", "did you mean 'steps'"],
        ),
        (["run", "recipe.yaml", "-o", "out", "--set", "train.steps"], ["write key.path=value"]),
        (["run", "recipe.yaml", "-o", "rows.jsonl"], ["rows.jsonl exists already"]),
        (["show", "quickstrat"], ["did you mean 'quickstart'"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_arguments_are_refused_with_one_message(
    arguments: list[str], told: list[str], workplace: Path, onegpu: Command
) -> None:
    _assert_refused(workplace, onegpu(*arguments), 2, told)


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["run"], ["run", "a", "b"], ["show", "--nonsense"], ["chat", ".", "--tokens", "0"]]
)
def test_arguments_that_no_command_takes_are_refused(arguments: list[str], workplace: Path, onegpu: Command) -> None:
    code, _, err = onegpu(*arguments)
    assert code == 2
    assert "Traceback" not in err
    assert "Usage: onegpu" in err


@pytest.mark.parametrize("name", ["nope", "loar"])
def test_an_adapter_that_is_not_installed_is_missing(name: str, onegpu: Command) -> None:
    code, _, err = onegpu("adapters", name)
    assert code == 3
    assert f"no adapter is called '{name}'" in err


def test_tracebacks_are_shown_on_demand_only(workplace: Path, onegpu: Command) -> None:
    for arguments, shown in ((["show", "quickstrat"], False), (["--debug", "show", "quickstrat"], True)):
        code, _, err = onegpu(*arguments)
        assert code == 2
        assert ("Traceback" in err) is shown
        assert err.splitlines()[-1].startswith("onegpu: recipe 'quickstrat'")


# --- the installed script ---------------------------------------------------------------------------------------------


def _script(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, cwd=cwd, timeout=120)


def test_the_installed_script_refuses_as_well(workplace: Path) -> None:
    _change(workplace, ("rank: 2", "rnak: 2"))
    done = _script("run", "recipe.yaml", "-o", "out", cwd=workplace)
    _assert_refused(workplace, (done.returncode, done.stdout, done.stderr), 2, WRONG["unknown key"][2])


def test_the_installed_script_trains_and_proves(workplace: Path) -> None:
    done = _script("run", "recipe.yaml", "-o", "out", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "proved    reloaded on a fresh base, logits differ by 0" in done.stdout
    assert (workplace / "out/adapter/manifest.json").is_file()


LISTINGS = [
    ["--help"],
    ["-h"],
    ["run", "--help"],
    ["--version"],
    ["adapters"],
    ["adapters", "--json"],
    ["tasks"],
    ["recipes"],
]


@pytest.mark.parametrize("arguments", LISTINGS, ids=" ".join)
def test_listings_import_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; from onegpu.recipes.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'torch', 'pydantic', 'transformers', 'yaml', 'onegpu.adapters.lora'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["adapters"]], ids=" ".join)
def test_listings_answer_in_less_than_five_times_the_time_of_reading_metadata(arguments: list[str]) -> None:
    commands = {"plain": [sys.executable, "-c", "import importlib.metadata"], "ours": [str(SCRIPT), *arguments]}
    best = dict.fromkeys(commands, float("inf"))
    for _ in range(9):  # in turns, and the least of each: other work on the machine only ever adds
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, capture_output=True, check=True)
            best[name] = min(best[name], time.perf_counter() - began)
    assert best["ours"] < 5 * best["plain"]


# --- listings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["adapters", "tasks", "recipes"])
def test_listings_are_the_same_as_json(command: str, onegpu: Command) -> None:
    code, out, _ = onegpu(command)
    as_json = json.loads(onegpu(command, "--json")[1])
    assert code == 0
    assert as_json
    assert {row["name"] for row in as_json} <= set(out.split())


def test_sixty_adapters_are_listed_in_few_lines_of_eighty_columns(
    declare: Callable[..., None], onegpu: Command
) -> None:
    before = len(onegpu("adapters")[1].splitlines())
    for i in range(60):
        declare(ADAPTERS, f"a-method-{i}", "onegpu_no_such_module:Toy")
    out = onegpu("adapters")[1].splitlines()
    assert max(map(len, out)) <= 80
    assert len(out) - before <= 16
    ours, theirs = [line for line in out if not line.startswith(" ")]  # a heading for each distribution, ours first
    assert ours.startswith("onegpu ")
    assert theirs == "other 1.0"


@pytest.mark.parametrize(("command", "name"), [("adapters", "lora"), ("tasks", "chat")])
def test_a_plugin_is_described(command: str, name: str, onegpu: Command) -> None:
    code, out, _ = onegpu(command, name)
    described = json.loads(onegpu(command, name, "--json")[1])
    assert code == 0
    assert described["name"] == name
    for setting in described["settings"]:
        assert f"  {setting['name']}: {setting['type']} = {setting['default']}" in out


@pytest.mark.parametrize(("command", "group"), [("adapters", ADAPTERS), ("tasks", TASKS)])
def test_a_broken_plugin_is_listed_as_broken_and_disturbs_nothing(
    command: str, group: str, declare: Callable[..., None], onegpu: Command
) -> None:
    declare(group, "toy", "onegpu_no_such_module:Toy")
    assert "BROKEN" not in onegpu(command)[1]
    code, out, _ = onegpu(command, "--check")
    assert code == 0
    theirs = out.partition("other 1.0\n")[2]
    assert theirs.startswith("  toy  BROKEN: toy of other 1.0 is broken: ModuleNotFoundError")
    rows = {row["name"]: row["broken"] for row in json.loads(onegpu(command, "--check", "--json")[1])}
    assert [name for name, reason in rows.items() if reason] == ["toy"]


def test_a_broken_plugin_that_a_recipe_asks_for_ends_it(
    workplace: Path, declare: Callable[..., None], onegpu: Command
) -> None:
    declare(ADAPTERS, "toy", "onegpu_no_such_module:Toy")
    _change(workplace, ("lora: {rank: 2}", "toy"))
    _assert_refused(
        workplace, onegpu("run", "recipe.yaml", "-o", "out"), 3, ["recipe.yaml:3", "toy of other 1.0 is broken"]
    )


def test_a_name_that_two_offer_is_listed_as_ambiguous_and_refused_until_one_is_picked(
    workplace: Path, declare: Callable[..., None], onegpu: Command
) -> None:
    declare(ADAPTERS, "lora", "onegpu.adapters.lora:LoRA")
    lines = [line.strip() for line in onegpu("adapters")[1].splitlines() if "ambiguous" in line]
    assert [line.split(" ", 1)[0] for line in lines] == ["lora", "lora"]
    assert [line.rpartition(" ")[2] for line in lines] == ["onegpu:lora", "other:lora"]
    _assert_refused(workplace, onegpu("show", "recipe.yaml"), 3, ["onegpu:lora or other:lora"])
    _change(workplace, ("lora:", "other:lora:"))
    code, out, _ = onegpu("show", "recipe.yaml")
    assert code == 0
    (workplace / "resolved.yaml").write_text(out, "utf-8")
    assert onegpu("show", "resolved.yaml")[:2] == (0, out)


@pytest.mark.parametrize("name", ["recipe.yaml", "quickstart"])
def test_a_shown_recipe_is_one(name: str, workplace: Path, onegpu: Command) -> None:
    code, out, _ = onegpu("show", name, "--set", "train.seed=7")
    assert code == 0
    (workplace / "shown.yaml").write_text(out, "utf-8")
    assert onegpu("show", "shown.yaml")[:2] == (0, out)
    as_json = json.loads(onegpu("show", "shown.yaml", "--json")[1])
    assert as_json["train"]["seed"] == 7


def test_the_schema_is_json(onegpu: Command) -> None:
    code, out, _ = onegpu("schema")
    assert code == 0
    assert json.loads(out)["type"] == "object"


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_goes_to_a_folder_of_its_name_where_none_is_given(workplace: Path, onegpu: Command) -> None:
    code, out, err = onegpu("run", "recipe.yaml", "--set", "train.checkpoint_every=null")
    assert code == 0, err
    assert (workplace / "runs/recipe/adapter/manifest.json").is_file()
    assert "runs/recipe/adapter" in out


def test_a_finished_run_is_not_done_again(workplace: Path, onegpu: Command) -> None:
    assert onegpu("run", "recipe.yaml", "-o", "out")[0] == 0
    assert onegpu("run", "recipe.yaml", "-o", "out", "--resume") == (0, "out is finished; nothing to do\n", "")
    code, _, err = onegpu("run", "recipe.yaml", "-o", "out")
    assert code == 2
    assert "go on with --resume" in err


def test_an_interrupted_run_says_how_to_go_on_and_goes_on(
    workplace: Path, onegpu: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training._accumulate

    def accumulate(s: Session, *args: Any) -> tuple[float, float]:
        if s.step == 0:
            signal.raise_signal(signal.SIGINT)
        return real(s, *args)

    monkeypatch.setattr(training, "_accumulate", accumulate)
    arguments = ["run", "recipe.yaml", "-o", "out", "--set", "train.steps=3"]
    code, _, err = onegpu(*arguments)
    assert code == 130
    assert "Traceback" not in err
    assert "interrupted after step 1" in err
    assert "--resume" in err
    code, out, err = onegpu(*arguments, "--resume")
    assert code == 0, err
    assert "after step 1" in out


def test_an_interrupt_before_the_first_step_is_one_too(
    workplace: Path, onegpu: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*args: Any, **options: Any) -> Rows:
        raise KeyboardInterrupt

    monkeypatch.setattr("onegpu.recipes.data.dataset.read_rows", read)
    code, _, err = onegpu("run", "recipe.yaml", "-o", "out")
    assert (code, err.strip()) == (130, "onegpu: interrupted")
    assert not (workplace / "out").exists()


def test_a_failed_proof_names_what_was_kept_aside(
    workplace: Path, onegpu: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = artefact.save

    def save(stack: Any, folder: Any, **options: Any) -> None:
        real(stack, folder, **options)
        (Path(folder) / "adapter_model.safetensors").write_bytes(b"nothing")

    monkeypatch.setattr(artefact, "save", save)
    code, _, err = onegpu("run", "recipe.yaml", "-o", "out")
    assert code == 4
    assert "Traceback" not in err
    assert "kept aside as out/adapter-unproved" in err
    assert (workplace / "out/adapter-unproved").is_dir()
    assert not (workplace / "out/adapter").exists()


def test_a_changed_recipe_is_not_resumed(workplace: Path, onegpu: Command) -> None:
    assert onegpu("run", "recipe.yaml", "-o", "out")[0] == 0
    shutil.rmtree(workplace / "out/adapter")
    code, _, err = onegpu("run", "recipe.yaml", "-o", "out", "--resume", "--set", "train.seed=5")
    assert code == 2
    assert "train.seed: 0 -> 5" in err
    assert "--accept-changes" in err


def test_threads_are_part_of_a_run(workplace: Path, onegpu: Command) -> None:
    extra = ["--set", "train.steps=2", "--set", "train.checkpoint_every=1"]
    assert onegpu("run", "recipe.yaml", "-o", "out", *extra)[0] == 0
    shutil.rmtree(workplace / "out/adapter")
    torch.set_num_threads(2)
    code, _, err = onegpu("run", "recipe.yaml", "-o", "out", "--resume", *extra)
    assert code == 3
    assert "threads was 1 and is 2" in err


def test_what_a_run_says(chat_recipe: Callable[..., Loaded], workplace: Path, onegpu: Command) -> None:
    loaded = chat_recipe(["nf4", {"lora": {"rank": 2}}], task={"evaluation": 0.2}, train={"steps": 4})
    (workplace / "recipe.yaml").write_text(loaded.as_yaml(), "utf-8")
    code, out, err = onegpu("run", "recipe.yaml", "-o", "out")
    assert code == 0, err
    labels = {line.split()[0] for line in out.splitlines() if line.strip()}
    assert labels >= {
        "recipe",
        "data",
        "base",
        "group",
        "step",
        "trained",
        "held-out",
        "before",
        "after",
        "adapter",
        "proved",
    }
    assert "packed linears" in out
    assert "8 for train" in out
    assert "2 for evaluation" in out
