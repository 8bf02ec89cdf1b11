"""The sources of both rooms, the tests' helpers excepted: nothing unpickles, and nothing runs what a file names."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for room in ("adapters", "recipes", "benchmarks") for path in (ROOT / room).rglob("*.py"))
PICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "pandas"}
FORBIDDEN = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
    *("np.load", "numpy.load", "np.fromfile", "numpy.fromfile"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "yaml.UnsafeLoader"),
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path"),
}
# Who may import by name: the rooms import their own modules when a public name is asked for; a benchmark, its parts.
IMPORTERS = {"adapters/__init__.py", "recipes/__init__.py", "benchmarks/proofs.py"}
# Who may write a pickle, and only that: to see what other libraries make of a hostile one.
TRAPS = {"benchmarks/peers/folders.py"}


def _calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def _id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_is_something_to_look_at() -> None:
    assert len(SOURCES) > 100


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_a_source_neither_unpickles_nor_executes(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not {name.split(".")[0] for name in names} & PICKLING or _id(path) in TRAPS, names
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in FORBIDDEN
    for name, call in _calls(path):
        assert name not in {"pickle.load", "pickle.loads", "pickle.Unpickler"}
        assert name not in FORBIDDEN, f"{name} in line {call.lineno}"
        for keyword in call.keywords:
            given = (keyword.arg, ast.unparse(keyword.value))
            assert given != ("strict", "False") or not name.endswith("load_state_dict"), f"line {call.lineno}"
            assert given not in {("allow_pickle", "True"), ("weights_only", "False"), ("trust_remote_code", "True")}
            assert given != ("shell", "True")


def test_whatever_is_read_by_transformers_says_that_no_code_may_run() -> None:
    """Left unsaid, transformers asks at the terminal, and runs it where somebody says yes."""
    told = {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "AUTO[kind]", "auto"}
    seen = set()
    for path in (source for source in SOURCES if "benchmarks" not in source.parts):
        for name, call in _calls(path):
            owner, _, method = name.rpartition(".")
            if method == "from_pretrained" and owner in told:
                seen.add(owner)
                given = {(k.arg, ast.unparse(k.value)) for k in call.keywords}
                assert given & {("trust_remote_code", "False"), (None, "SAFELY")}, f"{_id(path)}:{call.lineno}"
    assert seen == told


def test_only_the_rooms_import_by_name() -> None:
    importers = {
        _id(path) for path in SOURCES for name, _ in _calls(path) if name.endswith(("import_module", "exec_module"))
    }
    assert importers == IMPORTERS
