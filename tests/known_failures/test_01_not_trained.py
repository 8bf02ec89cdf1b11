"""1. The adapter is not trained, or only part of it.

Met: losses are printed and files are written, and the model is still its base. The adapter was loaded frozen, attached
twice, or cut off from the loss by checkpointing over frozen embeddings.

Here: what is loaded is trainable; nothing to train, or one name twice, is an error; every declared tensor must have a
gradient and move in the first steps, or the run ends with exit code 4 and names it.

Also: tests/adapters/conformance/test_table.py, tests/recipes/test_proofs.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from onegpu.adapters import ProofFailed, StackError, attach, load, save
from onegpu.recipes import Loaded, Outcome
from onegpu.recipes.step_proof import StepProof

Fresh = Callable[..., PreTrainedModel]
PREFIX = {"prefix": {"length": 3}}
# Every registered adapter goes through the same in the conformance suite.
STACKS: dict[str, list[Any]] = {"lora": [{"lora": {"rank": 4}}], "dora": ["dora"], "prefix": [PREFIX]}


def test_what_is_loaded_is_trainable(fresh: Fresh, tmp_path: Path) -> None:
    save(attach(fresh(), ["lora"]), tmp_path / "adapter")
    loaded = load(fresh(), tmp_path / "adapter").trainable()
    assert loaded
    assert all(parameter.requires_grad for parameter in loaded.values())


def test_an_adapter_that_somebody_froze_is_named(fresh: Fresh) -> None:
    stack = attach(fresh(), ["lora"])
    trainable = stack.trainable()
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    for parameter in trainable.values():
        parameter.requires_grad_(False)
    with pytest.raises(ProofFailed, match=r"q_proj\.lora_B\.lora is declared trainable.*frozen"):
        StepProof(stack, optimizer)


def test_a_recipe_that_trains_nothing_is_refused(recipe: Callable[..., Loaded]) -> None:
    with pytest.raises(StackError, match="nothing would be trained"):
        recipe([])


def test_the_same_adapter_twice_on_a_model_is_refused(fresh: Fresh, tmp_path: Path) -> None:
    model = fresh()
    save(attach(model, ["lora"]), tmp_path / "adapter")
    with pytest.raises(StackError, match="'lora' is attached to this model already"):
        load(model, tmp_path / "adapter")


@pytest.mark.parametrize("variant", ["plain", "tied", "wide-heads"])
@pytest.mark.parametrize("name", STACKS)
def test_checkpointing_changes_no_gradient_and_all_of_the_adapter_is_trained(
    name: str,
    variant: str,
    fresh: Fresh,
    gradients: Callable[..., dict[str, Tensor]],
    distance: Callable[..., float],
    noise: Callable[[Any], None],
) -> None:
    def model_and_stack(reentrant: bool | None, *, before: bool) -> tuple[Any, Any]:
        model = fresh(variant)
        enable = {"use_reentrant": reentrant}
        if reentrant is not None and before:
            model.activation_checkpointing_enable(enable)
        stack = attach(model, STACKS[name])
        if reentrant is not None and not before:
            model.activation_checkpointing_enable(enable)
        noise(stack.trainable())
        model.train()
        return model, stack

    model, stack = model_and_stack(None, before=True)
    expected = gradients(model, stack.trainable())
    for reentrant in (True, False):
        for before in (True, False):
            model, stack = model_and_stack(reentrant, before=before)
            trainable = stack.trainable()
            frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
            assert distance(gradients(model, trainable), expected) <= 1e-6
            start = {n: p.detach().clone() for n, p in trainable.items()}
            torch.optim.SGD(trainable.values(), lr=0.1).step()
            assert [n for n, p in trainable.items() if torch.equal(p, start[n])] == []
            assert frozen
            assert all(torch.equal(model.get_parameter(n), value) for n, value in frozen.items())


def test_a_module_that_is_cut_off_from_the_loss_ends_the_run_and_is_named(
    recipe: Callable[..., Loaded], run: Callable[..., Outcome], damaged: Callable[..., None], tmp_path: Path
) -> None:
    def cut(model: PreTrainedModel) -> None:
        block = model.get_submodule("model.layers.0.mlp")
        block.register_forward_hook(lambda module, args, output: output.detach())

    damaged(cut)
    with pytest.raises(ProofFailed, match=r"step proof: no gradient comes through model\.layers\.0\.mlp:") as caught:
        run(recipe(train={"steps": 4}))
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out/adapter").exists()
