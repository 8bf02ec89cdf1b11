"""Layers that are compiled: the same numbers, plain layers outside of steps, and reasons why not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from onegpu.recipes import Loaded, Outcome, compiling, training
from onegpu.recipes.compiling import Compilation
from onegpu.recipes.display import Display
from onegpu.recipes.evaluation import evaluating
from onegpu.recipes.training import Session

Recipe = Callable[..., Loaded]
Run = Callable[..., Outcome]
SETTINGS = {"steps": 5, "effective_batch": 4, "learning_rate": 0.05, "checkpoint_every": 2, "evaluate_every": 2}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of a run."""
    found: list[str] = []
    monkeypatch.setattr(Display, "line", lambda self, label, text: found.append(f"{label} {text}"))
    return found


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Another backend than the one that needs a compiler and its time."""
    real = nn.Module.compile

    def use(backend: Any) -> None:
        torch._dynamo.reset()
        monkeypatch.setattr(nn.Module, "compile", lambda self, **_: real(self, dynamic=True, backend=backend))

    return use


@pytest.fixture
def losses(metrics: Callable[[Path], list[dict[str, Any]]], tmp_path: Path) -> Callable[[str], list[float]]:
    return lambda name: [line["loss"] for line in metrics(tmp_path / name)]


@pytest.mark.parametrize(
    "stack", [[{"lora": {"rank": 4}}], ["nf4", {"lora": {"rank": 4}}], [{"prefix": {"length": 3}}], ["full"]], ids=str
)
def test_a_compiled_run_has_the_losses_of_a_plain_one(
    stack: list[Any],
    chat_recipe: Recipe,
    run: Run,
    told: list[str],
    backend: Callable[[Any], None],
    losses: Callable[[str], list[float]],
) -> None:
    backend("aot_eager")
    run(chat_recipe(stack, train=SETTINGS), "plain")
    assert not any(line.startswith("note steps run") for line in told)
    run(chat_recipe(stack, train=SETTINGS | {"compile": True}), "compiled")
    assert any(line.startswith("note steps run compiled") for line in told), told
    assert losses("compiled") == pytest.approx(losses("plain"), rel=1e-5)


def test_only_steps_run_compiled(chat_recipe: Recipe, run: Run, backend: Callable[[Any], None]) -> None:
    modes: list[tuple[bool, bool]] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        modes.append((torch.is_grad_enabled(), any(isinstance(x, torch.SymInt) for x in inputs)))
        return graph.forward

    backend(compiler)
    run(chat_recipe(train=SETTINGS | {"compile": True}), "compiled")
    # The first layer, whose input has no gradient, and the others; each for rows with and without a common beginning.
    assert 2 <= len(modes) <= 8
    assert {gradients for gradients, _ in modes} == {True}
    assert all(any_length for _, any_length in modes)


def test_what_cannot_be_compiled_is_told_and_runs_plainly(
    chat_recipe: Recipe,
    run: Run,
    told: list[str],
    backend: Callable[[Any], None],
    losses: Callable[[str], list[float]],
) -> None:
    def missing(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    backend(missing)
    run(chat_recipe(train=SETTINGS), "plain")
    run(chat_recipe(train=SETTINGS | {"compile": True}), "compiled")
    (line,) = [line for line in told if "torch.compile" in line]
    assert line.startswith("note steps run without torch.compile:")
    assert "no compiler here" in line
    assert losses("compiled") == losses("plain")


def test_other_numbers_are_not_used(
    chat_recipe: Recipe,
    run: Run,
    told: list[str],
    backend: Callable[[Any], None],
    losses: Callable[[str], list[float]],
) -> None:
    def wrong(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return lambda *given: tuple(x * 1.01 if x.requires_grad else x for x in graph.forward(*given))

    backend(wrong)
    run(chat_recipe(train=SETTINGS), "plain")
    run(chat_recipe(train=SETTINGS | {"compile": True}), "compiled")
    assert any("it gives another gradient, by" in line for line in told), told
    assert losses("compiled") == losses("plain")


def test_a_model_without_layers_says_so(chat_recipe: Recipe, run: Run, told: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(compiling, "_layers", lambda stack: iter(()))
    run(chat_recipe(train=SETTINGS | {"compile": True}), "compiled")
    assert "note steps run without torch.compile: the model has no list of layers" in told


def test_hooks_see_modules_that_run_plainly() -> None:
    torch._dynamo.reset()
    traced = []

    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        traced.append(1)
        return graph.forward

    layer = Layer()
    layer.compile(backend=compiler)
    compilation, x = Compilation(tried=True), torch.ones(1, 2)
    with compilation(watched=True):
        layer(x)
    with evaluating(layer):
        layer(x)
    with Compilation(tried=True, fault="why ever")():
        layer(x)
    assert not traced
    with compilation():
        layer(x)
    assert traced


@pytest.mark.slow
@pytest.mark.parametrize("stack", [[{"lora": {"rank": 4, "dropout": 0.1}}], ["nf4", "lora"]], ids=str)
def test_a_compiled_run_that_is_resumed_writes_the_same_bytes(
    stack: list[Any],
    chat_recipe: Recipe,
    run: Run,
    losses: Callable[[str], list[float]],
    saved_tensors: Callable[[Path], dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = chat_recipe(stack, train=SETTINGS | {"compile": True})
    straight, real = run(loaded, "straight"), training._accumulate

    def stop(s: Session, *given: Any) -> tuple[float, float]:
        if s.step == 3:
            raise KeyboardInterrupt
        return real(s, *given)

    torch._dynamo.reset()  # as in another process
    with monkeypatch.context() as patch:
        patch.setattr(training, "_accumulate", stop)
        with pytest.raises(KeyboardInterrupt):
            run(loaded, "begun")
    torch._dynamo.reset()
    resumed = run(loaded, "begun", resume=True)
    assert losses("begun") == losses("straight")
    expected, found = (saved_tensors(outcome.adapter) for outcome in (straight, resumed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
