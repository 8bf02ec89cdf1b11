import importlib
import pkgutil
from types import ModuleType

import pytest

from onegpu import recipes

MODULES = sorted(module.name for module in pkgutil.iter_modules(recipes.__path__))


def test_there_are_modules_and_public_names() -> None:
    assert len(MODULES) > 15
    assert len(recipes.__all__) > 5


@pytest.mark.parametrize("name", recipes.__all__)
def test_every_public_name_is_an_object_even_after_every_module_was_imported(name: str) -> None:
    # A module that is called like what it exports takes its place in the package once somebody imports it.
    for module in MODULES:
        importlib.import_module(f"onegpu.recipes.{module}")
    assert not isinstance(getattr(recipes, name), ModuleType)


def test_an_unknown_name_is_an_error_of_the_usual_kind() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = recipes.nonsense
