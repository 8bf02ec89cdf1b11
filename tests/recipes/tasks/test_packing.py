"""Rows behind one another: the numbers of padded rows, or a reason why not."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from onegpu.adapters import attach
from onegpu.adapters.segments import cannot_pack
from onegpu.recipes.tasks import Batch, Example
from onegpu.recipes.tasks.chat import Chat
from onegpu.recipes.tasks.distillation import Distillation
from onegpu.recipes.tasks.language_modelling import LanguageModelling
from onegpu.recipes.tasks.packing import LEAST_SHARED, MULTIPLE, packed_batch, token_batch

Build = Callable[..., PreTrainedModel]
IGNORED, PAD = -100, 0
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LLAMA = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}
CHAT = Chat(data="rows")
START = list(range(40, 52))  # what several rows begin with


def _example(ids: Sequence[int], supervised: Sequence[int]) -> Example:
    return Example(0, list(ids), [token if place in supervised else IGNORED for place, token in enumerate(ids)])


EXAMPLES = [
    _example([*START, 1, 2, 3, 4], [14, 15]),
    _example([5, 6, 7], [1, 2]),
    _example([*START, 8, 9], [13]),
    _example([*START, 8, 9, 10, 11, 12, 13], [14, 17]),
    _example([*reversed(START), 3], [1, 12]),
    _example([14, 15, 16, 17, 18], [2]),
]
TOGETHER = [range(len(EXAMPLES))]
APART = [[number] for number in range(len(EXAMPLES))]
COMPUTED = 15 + 2 + 13 + 17 + 12 + 2  # tokens of each that are before its last supervised one


def _suited(model: PreTrainedModel, **settings: Any) -> tuple[Any, str]:
    task = Chat(data="rows", **settings)
    return task.suited(model, EXAMPLES[0], longest=18, pad=PAD, packing=True)


def _lora(model: PreTrainedModel, **settings: Any) -> dict[str, torch.nn.Parameter]:
    trainable = dict(attach(model, [{"lora": {"rank": 3} | settings}], seed=1).trainable())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return trainable


def _gradients(
    model: PreTrainedModel, trainable: dict[str, torch.nn.Parameter], task: Any, batch: Batch
) -> dict[str, Tensor]:
    with task.at_work(model):
        objective = task.objective(model, batch)
        objective.total.backward()
    found = {"loss": objective.total.detach(), "weight": torch.tensor(objective.weight)}
    for name, parameter in trainable.items():
        assert parameter.grad is not None, name
        found[name], parameter.grad = parameter.grad, None
    return found


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradients_are_those_of_padded_rows(
    architecture: PreTrainedConfig, attention: str, causal_model: Build
) -> None:
    model = causal_model(architecture, attention)
    trainable = _lora(model)
    task, remark = _suited(model)
    assert (task.packs, remark) == (True, "rows are packed, and what several begin with is read once")
    expected = _gradients(model, trainable, CHAT, token_batch(EXAMPLES, PAD))
    for batch in (task.collate(EXAMPLES, PAD), packed_batch(EXAMPLES, APART)):
        found = _gradients(model, trainable, task, batch)
        for key, value in expected.items():
            assert torch.allclose(found[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max())), key
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_trains_in_float32_is_packed_in_bf16(attention: str, causal_model: Build) -> None:
    model = causal_model(attention=attention)
    with torch.autocast("cpu", torch.bfloat16):
        task, remark = _suited(model)
        assert (task.packs, remark) == (True, "rows are packed, and what several begin with is read once")
        trainable = dict(model.named_parameters())
        expected = _gradients(model, trainable, CHAT, token_batch(EXAMPLES, PAD))
        found = _gradients(model, trainable, task, task.collate(EXAMPLES, PAD))
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_see_the_same_segments(reentrant: bool, causal_model: Build) -> None:
    model = causal_model()
    trainable = _lora(model)
    task, _ = _suited(model)
    expected = _gradients(model, trainable, task, task.collate(EXAMPLES, PAD))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    found = _gradients(model, trainable, task, task.collate(EXAMPLES, PAD))
    assert model.model.layers[0].gradient_checkpointing
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-5, atol=1e-6), key


def test_a_pack_of_one_example_is_that_example(causal_model: Build) -> None:
    model = causal_model()
    trainable = _lora(model)
    task, _ = _suited(model)
    for example in EXAMPLES:
        expected = _gradients(model, trainable, CHAT, token_batch([example], PAD))
        found = _gradients(model, trainable, task, task.collate([example], PAD))
        assert all(torch.allclose(found[key], value, rtol=1e-4, atol=1e-6) for key, value in expected.items())


def test_equal_examples_are_each_counted(causal_model: Build) -> None:
    model = causal_model()
    trainable = _lora(model)
    task, _ = _suited(model)
    once = _gradients(model, trainable, task, task.collate(EXAMPLES[:1], PAD))
    thrice = _gradients(model, trainable, task, task.collate(EXAMPLES[:1] * 3, PAD))
    assert all(torch.allclose(thrice[key], 3 * value, rtol=1e-4, atol=1e-5) for key, value in once.items())


# --- the row ----------------------------------------------------------------------------------------------------------


def test_there_is_no_padding_and_a_common_beginning_stands_once() -> None:
    apart, shared = (packed_batch(EXAMPLES, groups) for groups in (APART, TOGETHER))
    assert apart["input_ids"].shape == apart["targets"].shape == apart["position_ids"].shape == (1, COMPUTED)
    # Three begin with the same twelve tokens; of the third the last is supervised, and the one before it predicts it.
    assert shared["input_ids"].shape == (1, COMPUTED - 2 * len(START))
    assert (shared["targets"] != IGNORED).sum() == (apart["targets"] != IGNORED).sum() == 10


def test_the_last_token_that_is_learned_and_what_follows_is_not_computed() -> None:
    batch = packed_batch(
        [_example([1, 2, 3, 4, 5, 6], [1, 3]), _example([7, 8], [1]), _example([9, 10], [])], [[0, 1, 2]]
    )
    assert batch["input_ids"].tolist() == [[7, 9, 10, 1, 2, 3]]  # all of a sequence of which nothing is learned
    assert batch["targets"].tolist() == [[8, IGNORED, IGNORED, 2, IGNORED, 4]]
    assert batch["sequences"].tolist() == [[1, 2, 2, 0, 0, 0]]
    assert batch["supervised"].tolist() == [2, 1, 0]


def test_what_is_supervised_or_predicts_it_is_not_shared() -> None:
    examples = [_example([*START, 1, 2], [supervised]) for supervised in (LEAST_SHARED + 1, 13)]
    assert packed_batch(examples, [[0, 1]])["input_ids"].shape == (1, LEAST_SHARED + 1 + 13 - LEAST_SHARED)
    examples = [_example([*START, 1, 2], [supervised]) for supervised in (LEAST_SHARED, 13)]
    assert packed_batch(examples, [[0, 1]])["input_ids"].shape == (1, LEAST_SHARED + 13)


def test_beginnings_form_a_tree(causal_model: Build) -> None:
    """All begin with START; two of these go on alike, so what they share lies behind what all share."""
    middle = list(range(20, 30))
    examples = [
        _example([*START, *middle, 1, 2, 3], [23]),
        _example([*START, 30, 31, 32], [13]),
        _example([*START, *middle, 4, 5], [23]),
    ]
    batch = packed_batch(examples, [range(3)])
    assert batch["input_ids"].tolist() == [[*START, *middle, 30, 1, 4]]  # those that others go on from come first
    assert batch["position_ids"].tolist() == [[*range(22), 12, 22, 22]]
    assert batch["targets"].tolist() == [[*[IGNORED] * 22, 31, 2, 5]]
    assert batch["sequences"].tolist() == [[-1] * 22 + [1, 0, 2]]
    assert batch["supervised"].tolist() == [1, 1, 1]
    model = causal_model()
    trainable = _lora(model)
    task, _ = _suited(model)
    expected = _gradients(model, trainable, CHAT, token_batch(examples, PAD))
    found = _gradients(model, trainable, task, task.collate(examples, PAD))
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max())), key


def test_a_short_sequence_keeps_no_others_from_sharing() -> None:
    long = [_example([*START, *range(20, 30), last], [22]) for last in (1, 2, 3)]
    short = _example([*START, 4], [LEAST_SHARED])  # its last token that could be shared is the seventh
    batch = packed_batch([*long, short], [range(4)])
    assert batch["input_ids"].shape == (1, 21 + 3 * 1 + LEAST_SHARED)
    assert (batch["sequences"] == -1).sum() == 21


@pytest.mark.parametrize("groups", [APART, TOGETHER], ids=["apart", "together"])
def test_each_token_says_what_comes_next_in_its_own_sequence(groups: Any) -> None:
    batch = packed_batch(EXAMPLES, groups)
    for number, example in enumerate(EXAMPLES):
        own = batch["sequences"][0] == number
        for place, target in zip(
            batch["position_ids"][0, own].tolist(), batch["targets"][0, own].tolist(), strict=True
        ):
            assert target == example.labels[place + 1]
        assert (batch["targets"][0, own] != IGNORED).sum() == example.supervised
    assert (batch["targets"][batch["sequences"] == -1] == IGNORED).all()


# --- where it is possible ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
def test_a_beginning_is_not_shared_where_training_draws_at_random(trained: bool, causal_model: Build) -> None:
    """Even while nothing of it is seen in the logits, as of a new adapter that adds nothing."""
    model = causal_model()
    if trained:
        _lora(model, dropout=0.5)
    else:
        attach(model, [{"lora": {"rank": 3, "dropout": 0.5}}])
    before = torch.get_rng_state()
    task, remark = _suited(model)
    assert (task.packs, remark) == (True, "rows are packed")
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in model.modules())
    assert task.collate(EXAMPLES, PAD)["input_ids"].shape[1] == -(-COMPUTED // MULTIPLE) * MULTIPLE


@pytest.mark.parametrize(
    ("config", "attention", "reason"),
    [
        (MistralConfig(**LLAMA, sliding_window=8), "sdpa", "its attention sees 8 tokens, and sequences have up to 18"),
        (
            BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64),
            "eager",
            "its attention is not in the public registry",
        ),
        (LlamaConfig(**LLAMA), "flex_attention", "its attention is `flex_attention`"),
    ],
)
def test_models_that_cannot_say_why(config: PreTrainedConfig, attention: str, reason: str, causal_model: Build) -> None:
    model = causal_model(config, attention)
    task, remark = _suited(model)
    assert not task.packs
    assert remark.startswith(f"rows are padded to one length, not packed: {reason}")
    assert set(task.collate(EXAMPLES, PAD)) == {"input_ids", "attention_mask", "labels"}


def test_a_window_longer_than_every_row_is_none(causal_model: Build) -> None:
    assert cannot_pack(causal_model(MistralConfig(**LLAMA, sliding_window=18)), 18) == ""


def test_a_prefix_brings_an_attention_of_its_own(causal_model: Build) -> None:
    model = causal_model()
    attach(model, [{"prefix": {"length": 2}}])
    task, remark = _suited(model)
    assert not task.packs
    assert "its attention is `onegpu_prefix`" in remark


def test_an_adapter_that_mixes_tokens_is_declared(causal_model: Build) -> None:
    task, remark = CHAT.suited(causal_model(), EXAMPLES[0], longest=18, pad=PAD, packing=False)
    assert not task.packs
    assert remark == "rows are padded to one length, not packed: an adapter or a teacher would mix what is in a row"


def test_a_model_that_leaks_is_found_by_trying(monkeypatch: pytest.MonkeyPatch, causal_model: Build) -> None:
    model = causal_model()
    inner = model.model.layers[1].forward
    # A layer that mixes neighbours, as a convolution over the row would.
    model.model.layers[1].forward = lambda x, **kwargs: inner(x + x.mean(1, keepdim=True), **kwargs)
    task, remark = _suited(model)
    assert not task.packs
    assert "the logits are not those of sequences by themselves" in remark


def test_a_recipe_can_do_without(causal_model: Build) -> None:
    task, remark = _suited(causal_model(), packing=False)
    assert (task.packs, remark) == (False, "")


def test_hidden_tokens_are_not_packed(causal_model: Build) -> None:
    task = LanguageModelling(data="rows", predict="masked")
    suited, remark = task.suited(causal_model(), EXAMPLES[0], longest=18, pad=PAD, packing=True)
    assert (suited.packs, "packed" in remark) == (False, False)


def test_a_student_is_packed_beside_the_base_only(causal_model: Build) -> None:
    model = causal_model()
    inner: dict[str, Any] = {"language-modelling": {}}
    for teacher, packs in (("base", True), ("somewhere", False)):
        task = Distillation(data="rows", task=inner, teacher=teacher)
        suited, _ = task.suited(model, EXAMPLES[0], longest=18, pad=PAD, packing=True)
        assert suited.packs == packs
        assert not task.packs
