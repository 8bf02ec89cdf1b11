from importlib.metadata import EntryPoint

import pytest
import torch

from onegpu.adapters import Entry, PluginError, StackError
from onegpu.adapters.isolation import answerable

TOY = Entry("toy", "toys", "1.2", EntryPoint("toy", "m:Toy", "onegpu.adapters"))


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (RuntimeError("boom\nmore"), "RuntimeError: boom"),
        (KeyError("key"), "KeyError: 'key'"),
        (SystemExit(3), "SystemExit: 3"),
        (AssertionError(), "AssertionError"),
        (NotImplementedError(), "NotImplementedError"),
    ],
)
def test_whatever_a_plugin_raises_is_an_error_that_names_it(cause: BaseException, reason: str) -> None:
    with pytest.raises(PluginError) as caught, answerable("toy", TOY, "attach"):
        raise cause
    assert str(caught.value) == f"toy of toys 1.2 failed in attach: {reason}; `onegpu --debug` shows where"
    assert caught.value.exit_code == 3
    assert caught.value.__cause__ is cause


def test_an_instance_is_named_as_the_recipe_calls_it() -> None:
    told = r"^toy of toys 1\.2 \(called 'second'\) failed in rates: "
    with pytest.raises(PluginError, match=told), answerable("second", TOY, "rates"):
        raise ValueError("x")


def test_a_class_that_nobody_registers_is_named_by_its_instance() -> None:
    told = r"^mine, which no distribution registers, failed in attach: "
    with pytest.raises(PluginError, match=told), answerable("mine", None, "attach"):
        raise ValueError("x")


@pytest.mark.parametrize("error", [StackError("told"), torch.OutOfMemoryError("none left"), KeyboardInterrupt()])
def test_what_an_adapter_says_to_its_user_passes_and_so_does_what_is_nobodys_fault(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, answerable("toy", TOY, "attach"):
        raise error
    assert caught.value is error


def test_what_the_caller_explains_passes() -> None:
    with pytest.raises(ValueError, match=r"^x$"), answerable("toy", TOY, "attach", passing=ValueError):
        raise ValueError("x")
