import subprocess
import sys
from pathlib import Path

import pytest

from onegpu.adapters import DataError
from onegpu.recipes import metrics
from onegpu.recipes.metrics.pairs import check_pairs, reference_lists


def test_one_text_and_several_are_both_references() -> None:
    assert reference_lists(["x", "y", "z"], ["a", ["b", "c"], ()]) == [["a"], ["b", "c"], []]


@pytest.mark.parametrize(
    ("true", "predicted", "told"),
    [
        ([], [], "no classes to score"),
        ([1], [1, 2], "2 predicted classes cannot be scored against 1 true ones"),
        ([], [1], "1 predicted classes cannot be scored against 0"),
    ],
)
def test_what_cannot_be_scored_is_told(true: list[int], predicted: list[int], told: str) -> None:
    with pytest.raises(DataError, match=told) as error:
        check_pairs(true, predicted, what="classes")
    assert isinstance(error.value, ValueError)


def test_the_package_imports_no_library_and_its_modules_no_torch() -> None:
    (folder,) = metrics.__path__
    names = sorted(path.stem for path in Path(folder).glob("[!_]*.py"))
    assert len(names) >= 6
    code = (
        "import importlib, sys, onegpu.recipes.metrics as package\n"
        "assert not {'numpy', 'scipy', 'sklearn', 'seqeval', 'sacrebleu', 'rouge_score', 'torch'} & set(sys.modules)\n"
        "modules = [importlib.import_module(f'{package.__name__}.{name}') for name in sys.argv[1:]]\n"
        "[getattr(module, name) for module in modules for name in module.__all__]\n"
        "assert 'torch' not in sys.modules and 'sklearn' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, *names], check=True)
