import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onegpu.adapters import Stack, attach, load_base
from onegpu.adapters.fingerprints import fingerprint
from onegpu.recipes import Loaded, Outcome
from onegpu.recipes.data.batches import Cut
from onegpu.recipes.evaluation import Evaluator, reference
from onegpu.recipes.tasks import Example, Reader
from onegpu.recipes.tasks.chat import Chat

CHAT = Chat(data="rows.jsonl")
LORA = {"lora": {"rank": 4, "dropout": 0.1}}
BASES: dict[str, list[Any]] = {"float": [LORA], "int8": ["int8", LORA], "nf4": ["nf4", LORA], "fp4": ["fp4", LORA]}
PAD = 1


@pytest.fixture
def examples(rows: list[dict[str, Any]], reader: Reader) -> list[Example]:
    """The ten conversations, tokenised."""
    return [example for number, row in enumerate(rows) for example in CHAT.encode(number, row, reader)]


@pytest.fixture
def attached(chat_base: Path) -> Callable[..., Stack]:
    """`attached("nf4")`: a stack over that kind of base, moved off its start, in training mode."""

    def build(base: str, precision: Any = "fp32") -> Stack:
        model = load_base(str(chat_base), BASES[base], precision=precision)
        stack = attach(model, BASES[base])
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in stack.trainable().values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.train()
        return stack

    return build


def _evaluate(stack: Stack, examples: list[Example], micro_batch: int = 3) -> dict[str, float]:
    autocast = torch.autocast("cpu", enabled=False)
    evaluator = Evaluator(
        task=CHAT,
        reader=Reader(None, 256),
        pad=PAD,
        cut=Cut(micro_batch),
        window=4,
        autocast=autocast,
        refer=reference(CHAT, stack, autocast),
    )
    return evaluator(stack.model, examples).scores


def _gradients(stack: Stack, examples: list[Example]) -> dict[str, Tensor]:
    torch.manual_seed(5)  # of dropout
    stack.model.zero_grad()
    CHAT.objective(stack.model, CHAT.collate(examples, PAD)).total.backward()
    return {name: p.grad.clone() for name, p in stack.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("base", BASES)
def test_an_evaluation_changes_neither_gradients_nor_the_base(
    base: str, precision: str, attached: Callable[..., Stack], examples: list[Example]
) -> None:
    # bitsandbytes' own 4-bit layers repack their weight in evaluation on some CPUs, and later gradients are wrong.
    stack = attached(base, precision)
    bytes_before, before = fingerprint(stack.model), _gradients(stack, examples)
    assert len(before) == len(stack.trainable())
    _evaluate(stack, examples)
    after = _gradients(stack, examples)
    assert fingerprint(stack.model) == bytes_before
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("base", BASES)
def test_scores_do_not_depend_on_how_examples_are_batched(
    base: str, attached: Callable[..., Stack], examples: list[Example]
) -> None:
    stack = attached(base)
    first, *others = [_evaluate(stack, examples, micro_batch) for micro_batch in (1, 2, 7)]
    for other in others:
        assert other["loss"] == pytest.approx(first["loss"], rel=1e-6)
        assert other["token_accuracy"] == first["token_accuracy"]


def test_the_loss_is_the_mean_over_all_supervised_tokens(
    attached: Callable[..., Stack], examples: list[Example]
) -> None:
    stack = attached("float")
    stack.model.eval()
    with torch.no_grad():
        alone = [CHAT.objective(stack.model, CHAT.collate([example], PAD)) for example in examples]
    expected = sum(o.total.item() for o in alone) / sum(o.weight for o in alone)
    assert _evaluate(stack, examples)["loss"] == pytest.approx(expected, rel=1e-6)


def test_dropout_takes_no_part(attached: Callable[..., Stack], examples: list[Example]) -> None:
    stack = attached("float")
    assert _evaluate(stack, examples) == _evaluate(stack, examples)


def test_modes_and_random_state_are_left_as_they_were(attached: Callable[..., Stack], examples: list[Example]) -> None:
    stack = attached("float")
    stack.model.get_submodule("model.layers.1").eval()  # a mixture, as layer sampling makes one
    modes, state = {name: m.training for name, m in stack.model.named_modules()}, torch.get_rng_state()
    assert set(modes.values()) == {True, False}
    _evaluate(stack, examples)
    assert {name: m.training for name, m in stack.model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_no_logits_are_kept(attached: Callable[..., Stack], examples: list[Example]) -> None:
    stack = attached("float")
    vocabulary = stack.model.get_submodule("lm_head").out_features
    own = {id(p) for p in stack.model.parameters()}

    def wide() -> list[tuple[int, ...]]:
        gc.collect()
        return [
            tuple(found.shape)
            for found in gc.get_objects()
            if isinstance(found, Tensor) and found.ndim > 1 and found.shape[-1] == vocabulary and id(found) not in own
        ]

    before = wide()
    scores = _evaluate(stack, examples * 5, micro_batch=1)
    assert wide() == before
    assert all(isinstance(score, float) for score in scores.values())


def test_a_run_that_evaluates_often_trains_the_same_adapter(
    chat_recipe: Callable[..., Loaded], run: Callable[..., Outcome], saved_tensors: Callable[[Path], dict[str, Tensor]]
) -> None:
    found = []
    for every in (1, None):
        loaded = chat_recipe(["nf4", LORA], task={"evaluation": 0.2}, train={"steps": 4, "evaluate_every": every})
        found.append(saved_tensors(run(loaded, f"every-{every}").adapter))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0] | found[1])
