"""28. Prefixes break with every new cache, with checkpointing, with fewer key-value heads, with other head sizes.

Met: prefixes are put in as a cache, whose form changes; head counts and sizes are worked out from the hidden size; a
checkpoint and a cache exclude each other; logits get longer than the labels.

Here: keys and values enter through the registry of attention functions, in the shape that each layer's attention is
called with, so that checkpoints recompute them, caches stay the model's own, and logits keep their length.

Also: tests/adapters/test_prefix.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from onegpu.adapters import attach, load, save

Fresh = Callable[..., PreTrainedModel]
Logits = Callable[..., Tensor]
LENGTH = 3
_KINDS = ("key", "value")
VARIANTS = ["plain", "tied", "wide-heads"]


@pytest.fixture(params=VARIANTS)
def prefixed(request: pytest.FixtureRequest, fresh: Fresh, noise: Callable[[Any], None]) -> tuple[str, Any, Any]:
    """The variant, its model, and a prefix that does something."""
    model = fresh(request.param)
    stack = attach(model, [{"prefix": {"length": LENGTH}}])
    noise(stack.trainable())
    return request.param, model, stack


def test_it_is_the_same_keys_and_values_given_as_a_cache(prefixed: Any, fresh: Fresh, ids: Tensor) -> None:
    variant, model, stack = prefixed
    cache = DynamicCache()
    values = {name: p.detach() for name, p in stack.trainable().items()}
    assert len(values) == 4
    for layer in range(2):
        key, value = (next(v for n, v in values.items() if f".{layer}." in n and which in n) for which in _KINDS)
        cache.update(key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1), layer)
    plain = fresh(variant)
    mask = torch.ones(2, LENGTH + ids.shape[1], dtype=torch.long)
    with torch.no_grad():
        theirs = plain(input_ids=ids, past_key_values=cache, attention_mask=mask).logits
        ours = model(input_ids=ids).logits
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("left", [False, True])
def test_padding_on_either_side_changes_nothing(left: bool, prefixed: Any, ids: Tensor) -> None:
    _, model, _ = prefixed
    short = ids[:1, :4]
    filled, mask = torch.full((1, 7), 1), torch.zeros(1, 7, dtype=torch.long)
    place = slice(3, 7) if left else slice(0, 4)
    filled[:, place], mask[:, place] = short, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as `generate` gives them
    with torch.no_grad():
        alone = model(input_ids=short).logits
        padded = model(input_ids=filled, attention_mask=mask, position_ids=positions).logits[:, place]
    assert torch.allclose(padded, alone, atol=1e-5)


def test_generating_is_asking_again_and_again(prefixed: Any, ids: Tensor) -> None:
    _, model, _ = prefixed
    model.generation_config.eos_token_id = None
    prompt = ids[:1]
    said = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=1
    )
    step = prompt
    for _ in range(6):
        with torch.no_grad():
            following = model(input_ids=step, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        step = torch.cat([step, following], dim=1)
    assert torch.equal(said, step)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_reach_it_also_under_checkpointing(
    reentrant: bool, prefixed: Any, gradients: Callable[..., dict[str, Tensor]], distance: Callable[..., float]
) -> None:
    _, model, stack = prefixed
    model.train()
    expected = gradients(model, stack.trainable())
    assert all(gradient.any() for gradient in expected.values())
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert distance(gradients(model, stack.trainable()), expected) <= 1e-6


def test_saved_loaded_and_taken_out(prefixed: Any, fresh: Fresh, logits: Logits, tmp_path: Path) -> None:
    variant, model, stack = prefixed
    save(stack, tmp_path / "adapter")
    again = fresh(variant)
    loaded = load(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    loaded.detach()
    assert torch.equal(logits(again), logits(fresh(variant)))
    assert not torch.equal(logits(again), logits(model))


def test_logits_have_the_length_of_the_labels(prefixed: Any, ids: Tensor) -> None:
    _, model, _ = prefixed
    assert model(input_ids=ids, labels=ids).logits.shape[:2] == ids.shape
