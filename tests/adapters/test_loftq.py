from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, PreTrainedModel

from onegpu.adapters import StackError, attach, load, load_base, save
from onegpu.adapters.base import load_options
from onegpu.adapters.low_rank import LowRankLinear, matrix
from onegpu.adapters.specs import build
from onegpu.adapters.structure import linears, modules

Fresh = Callable[..., PreTrainedModel]
Run = Callable[..., Tensor]
Noise = Callable[[Mapping[str, nn.Parameter]], None]


def _layers(model: nn.Module) -> dict[str, LowRankLinear]:
    return {path: module for path, module in modules(model) if isinstance(module, LowRankLinear)}


@pytest.mark.parametrize("packing", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize(("name", "count"), [("plain", 14), ("gpt2", 8), ("bert", 13)])
def test_every_linear_is_nearer_to_the_original_by_the_best_that_the_rank_allows(
    fresh: Fresh, name: str, count: int, packing: str
) -> None:
    originals = {path: matrix(linear) for path, linear in linears(fresh(name)).items()}
    model = fresh(name, packing)
    attach(model, [packing, {"loftq": {"rank": 4, "alpha": 6.0}}])
    assert len(_layers(model)) == count
    for path, layer in _layers(model).items():
        lost = originals[path] - matrix(layer)
        left = torch.linalg.matrix_norm(lost - layer.delta())
        assert left < 0.95 * torch.linalg.matrix_norm(lost)
        torch.testing.assert_close(left, torch.linalg.svdvals(lost)[4:].norm(), atol=1e-5, rtol=1e-4)


def test_at_full_rank_the_packed_model_is_the_original_again(fresh: Fresh, run: Run) -> None:
    original, model = run(fresh("gpt2")), fresh("gpt2", "nf4")
    packed = run(model)
    attach(model, ["nf4", {"loftq": {"rank": 32}}])
    torch.testing.assert_close(run(model), original, atol=1e-5, rtol=0)
    assert (packed - original).abs().max() > 1e-3


def test_a_checkpoint_in_parts_and_of_the_bare_backbone_is_read_too(fresh: Fresh, run: Run, tmp_path: Path) -> None:
    whole = fresh("bert")
    assert isinstance(whole, BertForSequenceClassification)
    whole.bert.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    model = load_base(str(tmp_path / "parts"), ["nf4"], kind="sequence-classification", precision="fp32")
    attach(model, ["nf4", {"loftq": {"rank": 32, "targets": ["query"]}}])
    assert len(_layers(model)) == 2
    for path, layer in _layers(model).items():
        original = whole.get_submodule(path).get_parameter("weight")
        torch.testing.assert_close(layer.merged(), original.detach(), atol=1e-5, rtol=0)


def test_a_saved_one_needs_no_checkpoint_any_more(fresh: Fresh, tmp_path: Path, run: Run, noise: Noise) -> None:
    model = fresh("plain", "nf4")
    stack = attach(model, ["nf4", "loftq"])
    noise(stack.trainable())
    save(stack, tmp_path / "a")
    again = fresh("plain", "nf4")
    again.config._name_or_path = "nowhere/at-all"
    load(again, tmp_path / "a")
    assert torch.equal(run(again), run(model))


def test_a_float_base_is_refused_before_it_is_read(tiny: dict[str, Path]) -> None:
    for stack in (["loftq"], ["loftq", "nf4"]):
        with pytest.raises(StackError, match="nothing is packed: put nf4, fp4 or int8 before it"):
            load_options(str(tiny["plain"]), build(stack), kind="causal-lm", precision="fp32")
    load_options(str(tiny["plain"]), build(["nf4", "loftq"]), kind="causal-lm", precision="fp32")


def test_a_base_without_anything_packed_is_refused(fresh: Fresh) -> None:
    with pytest.raises(StackError, match="no target of it is packed: use lora"):
        attach(fresh("plain"), ["loftq"])
    with pytest.raises(StackError, match="no target of it is packed: use lora"):
        attach(fresh("plain", "nf4"), ["nf4", {"loftq": {"targets": ["lm_head"]}}])


def test_a_linear_that_is_not_packed_starts_as_with_lora(fresh: Fresh) -> None:
    model = fresh("plain", "nf4")
    attach(model, ["nf4", {"loftq": {"targets": ["q_proj", "lm_head"]}}])
    layers = _layers(model)
    assert layers.keys() == {"lm_head", *(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))}
    assert {path for path, layer in layers.items() if not layer.lora_B.any()} == {"lm_head"}
    assert layers["lm_head"].lora_A.any()


def test_its_file_is_not_put_on_a_float_base(fresh: Fresh, tmp_path: Path) -> None:
    """It corrects what packing lost, and there nothing was lost."""
    save(attach(fresh("plain", "nf4"), ["nf4", "loftq"]), tmp_path / "a")
    with pytest.warns(UserWarning, match="packed"), pytest.raises(StackError, match="no target of it is packed"):
        load(fresh("plain"), tmp_path / "a")


def test_a_checkpoint_of_other_shapes_is_refused(fresh: Fresh, tiny: dict[str, Path]) -> None:
    model = fresh("plain", "nf4")
    model.config._name_or_path = str(tiny["wide-heads"])
    with pytest.raises(StackError, match=r"q_proj is \(32, 32\), and .* has \(64, 32\)"):
        attach(model, ["nf4", "loftq"])
