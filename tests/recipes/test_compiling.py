"""Layers that are compiled: the same numbers, plain layers outside of steps, and reasons why not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from onegpu.adapters import ProofFailed, RecipeError, attach
from onegpu.recipes import Loaded, Outcome, compiling, training
from onegpu.recipes.compiling import Compilation, tried_on, watching
from onegpu.recipes.data.batches import Cut
from onegpu.recipes.display import Display
from onegpu.recipes.evaluation import evaluating
from onegpu.recipes.tasks import Example
from onegpu.recipes.tasks.output_head import before_head
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
def both(
    chat_recipe: Recipe,
    run: Run,
    backend: Callable[[Any], None],
    metrics: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
) -> Callable[..., list[list[float]]]:
    """`both(backend, stack)`: the losses of a plain run, and of one that asks for compiled steps."""

    def losses(of: Any, stack: list[Any]) -> list[list[float]]:
        backend(of)
        for name, more in (("plain", {}), ("compiled", {"compile": True})):
            run(chat_recipe(stack, train=SETTINGS | more), name)
        return [[line["loss"] for line in metrics(tmp_path / name)] for name in ("plain", "compiled")]

    return losses


LORA = [{"lora": {"rank": 4}}]


@pytest.mark.parametrize("stack", [LORA, ["nf4", *LORA], [{"prefix": {"length": 3}}], ["full"]], ids=str)
def test_a_compiled_run_has_the_losses_of_a_plain_one(
    stack: list[Any], both: Callable[..., list[list[float]]], told: list[str]
) -> None:
    plain, compiled = both("aot_eager", stack)
    (line,) = [line for line in told if line.startswith("note steps run")]  # of the second run alone
    assert line.startswith("note steps run compiled")
    assert compiled == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # torch's attention, and ours in plain products
def test_only_steps_run_compiled_once_for_all_lengths(
    precision: str, chat_recipe: Recipe, run: Run, backend: Callable[[Any], None]
) -> None:
    modes: list[tuple[bool, bool]] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        modes.append((torch.is_grad_enabled(), any(isinstance(x, torch.SymInt) for x in inputs)))
        return graph.forward

    backend(compiler)
    run(chat_recipe(train=SETTINGS | {"compile": True, "precision": precision}), "compiled")
    # The first layer, whose input has no gradient, and the others; each for rows with and without a common beginning.
    assert 2 <= len(modes) <= 6  # and at 8, torch would stop compiling
    assert {gradients for gradients, _ in modes} == {True}
    assert all(any_length for _, any_length in modes)


@pytest.mark.parametrize(
    ("sizes", "cut", "chosen"),
    [
        ([300, 100, 200, 50], Cut(8), [200, 100, 50]),
        ([600, 700, 500], Cut(8), [600, 500]),  # one would be compiled for by itself
        ([600, 700, 500], Cut(1), [600]),
        ([300, 100, 200, 50], Cut(8, 256, packed=True), [200, 50]),
        ([600, 700, 500], Cut(8, 1024, packed=True), [600]),  # no more than steps have in a pass
        ([9], Cut(8), [9]),
    ],
    ids=str,
)
def test_what_is_compiled_is_tried_on_the_shortest_examples(sizes: list[int], cut: Cut, chosen: list[int]) -> None:
    window = [Example(0, [1] * size, [1] * size) for size in sizes]
    assert [example.size for example in tried_on(window, cut)] == chosen


def test_what_cannot_be_compiled_is_told_and_runs_plainly(
    both: Callable[..., list[list[float]]], told: list[str], tmp_path: Path
) -> None:
    def missing(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    plain, compiled = both(missing, LORA)
    (line,) = [line for line in told if "torch.compile" in line]
    assert line.startswith("note steps run without torch.compile:")
    assert "no compiler here" in line
    assert compiled == plain
    assert _manifest(tmp_path / "compiled")["compiled"] is False
    assert "compiled" not in _manifest(tmp_path / "plain")


def _manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter/manifest.json").read_text("utf-8"))["run"]
    return found


@pytest.mark.parametrize(
    ("what", "change"), [("output", lambda x: x * 1.01), ("gradient", lambda x: x + 0.01 * (x - x.detach()))]
)
def test_other_numbers_are_not_used(
    what: str, change: Callable[[torch.Tensor], torch.Tensor], both: Callable[..., list[list[float]]], told: list[str]
) -> None:
    def wrong(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return lambda *given: tuple(change(x) if x.requires_grad else x for x in graph.forward(*given))

    plain, compiled = both(wrong, LORA)
    assert any(f"it gives another {what}, by" in line for line in told), told
    assert compiled == plain


def _in_step(step: int, do: Callable[[Session], None], monkeypatch: pytest.MonkeyPatch) -> None:
    real = training._accumulate

    def accumulate(s: Session, *given: Any) -> tuple[float, float]:
        if s.step + 1 == step:
            do(s)
        return real(s, *given)

    monkeypatch.setattr(training, "_accumulate", accumulate)


def _die(s: Session) -> None:
    raise SystemError("the power went")


def test_a_run_that_was_compiled_is_not_resumed_plainly(
    chat_recipe: Recipe, run: Run, backend: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = chat_recipe(LORA, train=SETTINGS | {"compile": True})
    backend("aot_eager")
    with monkeypatch.context() as patch:
        _in_step(4, _die, patch)
        with pytest.raises(SystemError):
            run(loaded)
    monkeypatch.setattr(compiling, "_layers", lambda stack: iter(()))
    with pytest.raises(RecipeError, match="whether steps run compiled changed"):
        run(loaded, resume=True)


def test_a_module_whose_output_is_not_finite_is_named_in_a_compiled_run(
    chat_recipe: Recipe, run: Run, backend: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(s: Session) -> None:
        s.stack.root.get_parameter("model.layers.1.input_layernorm.weight").data[0] = torch.inf

    backend("aot_eager")
    _in_step(2, spoil, monkeypatch)
    with pytest.raises(ProofFailed, match=r"step 2: the loss is nan, first in model\.layers\.1\.input_layernorm"):
        run(chat_recipe(LORA, train=SETTINGS | {"compile": True}))


def test_a_model_without_layers_says_so(chat_recipe: Recipe, run: Run, told: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(compiling, "_layers", lambda stack: iter(()))
    run(chat_recipe(train=SETTINGS | {"compile": True}), "compiled")
    assert "note steps run without torch.compile: the model has no list of layers" in told


def test_of_an_encoder_and_a_decoder_what_the_decoder_gives_is_watched() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=16, d_model=8, d_ff=16, d_kv=4, num_layers=2, num_heads=2, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    stack = attach(T5ForConditionalGeneration(config), LORA)
    tokens = torch.tensor([[1, 2, 3]])
    with watching(stack) as watched:
        before_head(stack.model, {"input_ids": tokens, "decoder_input_ids": tokens})  # whose own logits are empty
    watched.look_back(stack)
    assert watched.output is not None
    assert watched.output.shape == (1, 3, 8)
    gradients = dict(zip(stack.trainable(), watched.gradient, strict=True))
    assert {name.split(".")[0] for name, g in gradients.items() if g is not None and g.any()} == {"encoder", "decoder"}


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
    metrics: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
    saved_tensors: Callable[[Path], dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = chat_recipe(stack, train=SETTINGS | {"compile": True})
    straight = run(loaded, "straight")
    torch._dynamo.reset()  # as in another process
    with monkeypatch.context() as patch:
        _in_step(4, _die, patch)
        with pytest.raises(SystemError):
            run(loaded, "begun")
    torch._dynamo.reset()
    resumed = run(loaded, "begun", resume=True)
    first, second = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("straight", "begun"))
    assert first == second
    expected, found = (saved_tensors(outcome.adapter) for outcome in (straight, resumed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
