import inspect

import pytest

from onegpu.adapters import errors
from onegpu.adapters.errors import (
    DataError,
    DeviceError,
    OnegpuError,
    PluginError,
    ProofFailed,
    RecipeError,
    StackError,
    TargetError,
    nearest,
)

CLASSES = [c for c in map(errors.__dict__.get, errors.__all__) if inspect.isclass(c)]


@pytest.mark.parametrize(
    ("error", "code", "standard"),
    [
        (RecipeError, 2, ValueError),
        (DataError, 2, ValueError),
        (TargetError, 2, ValueError),
        (StackError, 2, ValueError),
        (PluginError, 3, LookupError),
        (DeviceError, 3, RuntimeError),
        (ProofFailed, 4, AssertionError),
    ],
)
def test_each_family_has_its_exit_code_and_is_a_standard_error_too(
    error: type[OnegpuError], code: int, standard: type[Exception]
) -> None:
    assert error.exit_code == code
    assert issubclass(error, standard)


def test_every_error_has_one_root_and_stands_in_the_tree_of_the_module() -> None:
    assert len(CLASSES) >= 11
    for error in CLASSES:
        assert issubclass(error, OnegpuError)
        assert error is OnegpuError or error.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize("error", CLASSES)
def test_the_text_of_an_error_is_its_message_and_nothing_else(error: type[OnegpuError]) -> None:
    assert str(error("no 'x' here")) == "no 'x' here"


def test_nearest_names_the_likeliest_choice_and_lists_few() -> None:
    assert nearest("lroa", ["prefix", "lora"]) == "; did you mean 'lora'? (valid: lora, prefix)"


def test_nearest_lists_the_choices_when_none_is_close() -> None:
    assert nearest("zzz", ["b", "a"]) == " (valid: a, b)"


def test_nearest_shortens_a_long_list_and_leaves_it_out_beside_a_close_name() -> None:
    many = [f"name{i:02}" for i in range(20)]
    assert nearest("zzz", many).endswith("name11, ...)")
    assert nearest("name19x", many) == "; did you mean 'name19'?"


def test_nearest_says_nothing_when_there_is_nothing_to_choose_from() -> None:
    assert nearest("x", []) == ""
    assert nearest("zzz", ["a"], list_all=False) == ""
