from collections.abc import Callable
from pathlib import Path

import pytest

from onegpu.adapters import RECIPES
from onegpu.recipes import load_recipe, packaged_recipes

SHIPPED = "# Something small\nbase: somewhere\nadapters: [lora]\ntask: {chat: {data: x.jsonl}}\n"


@pytest.fixture
def collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with recipes in a folder, that fails when it is imported."""
    folder = tmp_path / "toy_recipes" / "library"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('nobody may import this')")
    (folder / "small.yaml").write_text(SHIPPED)
    (folder / "bare.yaml").write_text(SHIPPED.partition("\n")[2])
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_our_own_come_by_their_file_names() -> None:
    found = packaged_recipes()
    assert {p.name for p in found if p.origin == "onegpu"} >= {"quickstart", "classify-topics", "prefix-chat"}
    assert all(p.path.stem == p.name for p in found if p.origin == "onegpu")


def test_those_of_others_come_under_their_entry_point_and_nothing_is_imported(
    collection: Path, declare: Callable[..., None]
) -> None:
    declare(RECIPES, "toy", "toy_recipes.library")
    theirs = {p.name: p for p in packaged_recipes() if p.origin == "other 1.0"}
    assert theirs.keys() == {"toy:small", "toy:bare"}
    assert (theirs["toy:small"].summary, theirs["toy:bare"].summary) == ("Something small", "")
    assert load_recipe("toy:small").recipe.base == "somewhere"


def test_a_collection_whose_package_is_gone_is_passed_over(declare: Callable[..., None]) -> None:
    declare(RECIPES, "toy", "onegpu_no_such_package.library")
    assert {p.origin for p in packaged_recipes()} == {"onegpu"}
