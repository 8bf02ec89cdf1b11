from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from onegpu.adapters import ADAPTERS, attach, entries, get, load, save
from onegpu.adapters.conformance.case import case_of, trained
from onegpu.adapters.conformance.table import PROOFS, Proof
from onegpu.adapters.fingerprints import differences, fingerprint
from onegpu.adapters.twins import twin

OURS = [entry.name for entry in entries(ADAPTERS) if entry.distribution == "onegpu"]
NOT_ALONE = {"xlora"}  # refuses every model
QUICK = {
    "lora",
    "dora",
    "pissa",
    "prefix",
    "nf4",
    "int8",
    "loftq",
    "bitfit",
    "trainable-tokens",
    "ia3",
    "prompt-tuning",
}


def _storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


def test_a_twin_shares_every_tensor_and_no_module(llama: PreTrainedModel) -> None:
    other = twin(llama)
    assert _storages(other) == _storages(llama)
    assert not set(other.modules()) & set(llama.modules())


def test_heads_are_copied_as_they_are_trained(bert: PreTrainedModel) -> None:
    other = twin(bert)
    shared = {name for name, p in other.named_parameters() if any(p is q for q in bert.parameters())}
    assert {name for name, _ in bert.named_parameters()} - shared == {"classifier.weight", "classifier.bias"}


def test_what_is_attached_to_one_is_not_on_the_other(llama: PreTrainedModel, ids: torch.Tensor) -> None:
    other, before = twin(llama), fingerprint(llama)
    expected = other(ids).logits
    stack = attach(llama, [{"prefix": {"length": 3}}, {"lora": {"rank": 2}}])
    for parameter in stack.trainable().values():
        parameter.data.normal_()
    assert not torch.equal(llama(ids).logits, expected)
    assert torch.equal(other(ids).logits, expected)
    attach(other, ["lora"]).detach()
    assert differences(before, other) == ([], [])


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OURS])
def test_a_saved_adapter_on_a_twin_is_the_trained_one(name: str, tmp_path: Path) -> None:
    capabilities = get(name).capabilities
    if not capabilities.base_frozen or name in NOT_ALONE:
        pytest.skip("it trains the base itself" if not capabilities.base_frozen else "it works on no such model")
    proof = PROOFS.get(name, Proof())
    case = case_of(name, proof.config, proof.beside)
    base = case.load()
    before, untouched = fingerprint(base), twin(base)
    live = trained(case, case.attach(base))
    save(live, tmp_path / "adapter")
    second = load(twin(untouched), tmp_path / "adapter", allow_base_mismatch=True)
    assert torch.equal(case.logits(second.model), case.logits(live.model))
    second.detach()
    assert differences(before, untouched) == ([], [])
