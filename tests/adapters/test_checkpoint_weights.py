from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from onegpu.adapters import StackError
from onegpu.adapters.checkpoint_weights import CheckpointWeights
from onegpu.adapters.low_rank import matrix
from onegpu.adapters.structure import linears

Fresh = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("name", ["plain", "gpt2", "bert", "roberta"])
def test_the_weights_are_those_of_the_model_read_from_there(fresh: Fresh, name: str) -> None:
    model = fresh(name)
    weights = CheckpointWeights(model)
    tied = {"lm_head"} if name == "gpt2" else set()  # the file has that as the input embeddings
    found = {path: linear for path, linear in linears(model).items() if path not in tied}
    assert len(found) >= 8
    for path, linear in found.items():
        assert torch.equal(weights.weight(path), matrix(linear))


def test_a_half_checkpoint_is_widened(fresh: Fresh, tmp_path: Path) -> None:
    fresh("plain", precision="bf16").save_pretrained(tmp_path)
    weight = CheckpointWeights(LlamaForCausalLM.from_pretrained(tmp_path)).weight("model.layers.0.mlp.up_proj")
    assert weight.dtype is torch.float32
    assert torch.equal(weight, weight.bfloat16().float())


def test_the_hub_is_never_asked(fresh: Fresh) -> None:
    model = fresh("plain")
    model.config._name_or_path = "nobody/no-such-model"
    with pytest.raises(StackError, match="nobody/no-such-model holds no safetensors"):
        CheckpointWeights(model)


def test_a_model_from_nowhere_is_refused(llama: PreTrainedModel) -> None:
    llama.config._name_or_path = ""
    for model in (llama, nn.Linear(2, 2)):
        with pytest.raises(StackError, match="was not read from a checkpoint"):
            CheckpointWeights(model)


def test_a_checkpoint_that_is_packed_itself_is_refused(fresh: Fresh, tmp_path: Path) -> None:
    model = fresh("plain")
    model.save_pretrained(tmp_path)
    key = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {key: torch.zeros(8, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    model.config._name_or_path = str(tmp_path)
    with pytest.raises(StackError, match=rf"is packed itself: {key} is uint8"):
        CheckpointWeights(model).weight("model.layers.0.mlp.up_proj")


def test_a_weight_that_the_checkpoint_lacks_is_named(fresh: Fresh) -> None:
    with pytest.raises(StackError, match=r"original weight of model\.nothing is needed"):
        CheckpointWeights(fresh("plain")).weight("model.nothing")


def test_a_missing_part_is_named(fresh: Fresh, tmp_path: Path) -> None:
    fresh("plain").save_pretrained(tmp_path, max_shard_size="20KB")
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    part = sorted(tmp_path.glob("*.safetensors"))[0]
    part.unlink()
    with pytest.raises(StackError, match=f"{part.name} is missing"):
        CheckpointWeights(model)
