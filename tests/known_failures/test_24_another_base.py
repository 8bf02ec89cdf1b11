"""24. An adapter is loaded on another base, or another revision of it.

Met: a folder names its base by a path or not at all, revisions are not kept, a method changed the weights of the base.
Everything fits, and the answers are worse.

Here: the manifest holds a fingerprint of every tensor of the base; another one is refused with what differs, unless the
mismatch is allowed; methods that start from changed weights are saved as updates of the base as it was.

Also: tests/adapters/test_fingerprints.py, tests/adapters/test_artefact.py, tests/adapters/test_weight_start.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from onegpu.adapters import ArtefactError, artefact, attach, load, save

Fresh = Callable[..., PreTrainedModel]
ROPE = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}  # no tensor differs
W = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def adapter(fresh: Fresh, noise: Callable[[Any], None], tmp_path: Path) -> Path:
    """The folder of a LoRA that does something."""
    stack = attach(fresh(), ["lora"])
    noise(stack.trainable())
    save(stack, tmp_path / "adapter", source="somebody/model", revision="1" * 40)
    return tmp_path / "adapter"


def test_one_weight_of_the_base_makes_it_another_and_it_can_be_allowed(adapter: Path, fresh: Fresh) -> None:
    model = fresh()
    with torch.no_grad():
        model.get_parameter(W)[3, 4] += 1e-3
    with pytest.raises(
        ArtefactError, match=rf"trained on somebody/model@1+, and this model is another \(.*\): {W} has other"
    ):
        load(model, adapter)
    assert load(model, adapter, allow_base_mismatch=True).trainable()


@pytest.mark.parametrize("change", [{"vocab_size": 72}, ROPE, {"num_key_value_heads": 4}], ids=str)
def test_another_shape_or_configuration_is_another_base(change: dict[str, Any], adapter: Path, bases: Any) -> None:
    torch.manual_seed(0)
    other = LlamaForCausalLM(LlamaConfig.from_pretrained(bases["plain"], **change))
    with pytest.raises(ArtefactError, match="this model is another"):
        load(other, adapter)


def test_another_revision_of_a_hub_id_is_another_base_even_with_the_same_weights(adapter: Path, fresh: Fresh) -> None:
    model = fresh()
    model.config._name_or_path, model.config._commit_hash = "somebody/model", "2" * 40
    with pytest.raises(ArtefactError, match=f"it is revision {'2' * 40}, not {'1' * 40}"):
        load(model, adapter)
    assert load(model, adapter, allow_base_mismatch=True).trainable()
    same = fresh()
    same.config._name_or_path, same.config._commit_hash = "somebody/model", "1" * 40
    assert load(same, adapter).trainable()


def test_the_revision_is_kept(adapter: Path) -> None:
    assert artefact.read(adapter).manifest.base.revision == "1" * 40


@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.parametrize("variant", ["plain", "tied", "wide-heads"])
def test_a_start_that_changes_the_base_is_saved_as_an_update_of_it(
    variant: str, method: str, fresh: Fresh, logits: Callable[..., Tensor], noise: Callable[[Any], None], tmp_path: Path
) -> None:
    model = fresh(variant)
    bare = logits(model)
    stack = attach(model, [{method: {"rank": 4}}])
    noise(stack.trainable())
    trained = logits(model)
    save(stack, tmp_path / "adapter")
    pristine = fresh(variant)
    loaded = load(pristine, tmp_path / "adapter")
    assert torch.allclose(logits(pristine), trained, atol=1e-6)
    assert not torch.allclose(logits(pristine), bare, atol=1e-2)
    with loaded.base_only():
        assert torch.equal(logits(pristine), bare)
    stack.detach()
    assert torch.equal(logits(model), bare)
