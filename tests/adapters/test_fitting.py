import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForTokenClassification, PreTrainedModel

from onegpu.adapters import ArtefactError, attach, load, save
from onegpu.adapters.artefact import read
from onegpu.adapters.lora import LoRA

Fresh = Callable[..., PreTrainedModel]


def _changed(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] += 0.01
    return model


def test_another_class_over_the_same_weights_is_refused(fresh: Fresh, tiny: dict[str, Path], tmp_path: Path) -> None:
    """Its head has the same name and shape, so that nothing else tells them apart."""
    save(attach(fresh("bert"), ["lora"]), tmp_path / "a")
    model = BertForTokenClassification.from_pretrained(tiny["bert"], num_labels=3)
    with pytest.raises(ArtefactError, match="it is a BertForTokenClassification, not a BertForSequenceClassification"):
        load(model, tmp_path / "a")


def test_another_vocabulary_is_told_in_numbers(fresh: Fresh, tmp_path: Path) -> None:
    save(attach(fresh("plain"), ["lora"]), tmp_path / "a")
    model = fresh("plain")
    model.resize_token_embeddings(80)
    with pytest.raises(ArtefactError, match="its vocabulary has 80 entries, not 64"):
        load(model, tmp_path / "a")


def test_both_bases_are_named_with_their_revision(fresh: Fresh, tiny: dict[str, Path], tmp_path: Path) -> None:
    save(attach(fresh("plain"), ["lora"]), tmp_path / "a", source="someone/model", revision="abc123")
    told = rf"trained on someone/model@abc123, and this model is another \({re.escape(str(tiny['plain']))}\): .*norm"
    with pytest.raises(ArtefactError, match=told):
        load(_changed(fresh("plain")), tmp_path / "a")


def test_a_mismatch_that_was_allowed_stays_in_the_manifests_that_follow(fresh: Fresh, tmp_path: Path) -> None:
    save(attach(fresh("plain"), ["lora"]), tmp_path / "a", source="someone/model", revision="abc")
    assert read(tmp_path / "a").manifest.base_mismatch == []
    other = _changed(fresh("plain"))
    stack = load(other, tmp_path / "a", allow_base_mismatch=True)
    save(stack, tmp_path / "b")
    told = ["values that were trained on someone/model@abc: model.norm.weight has other values"]
    assert read(tmp_path / "b").manifest.base_mismatch == told
    stack.detach()
    save(load(other, tmp_path / "b"), tmp_path / "c")  # its base by now, and still not where its values came from
    assert read(tmp_path / "c").manifest.base_mismatch == told


def test_a_folder_that_no_adapter_reads_is_a_fault(fresh: Fresh, tmp_path: Path) -> None:
    save(attach(fresh("plain"), ["lora", {"prefix": {"length": 2}}]), tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    manifest["adapters"][1] |= {"adapter": "layerwise-lr", "config": {"decay": 0.5}, "name": "layerwise-lr"}
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match="prefix belongs to no adapter"):
        load(fresh("plain"), tmp_path / "a")


@pytest.mark.parametrize(
    ("spec", "setting"),
    [("lora", "rank"), ("prefix", "length"), ("dora", "rank"), ("vera", "r"), ("prompt-tuning", "num_virtual_tokens")],
)
def test_settings_that_would_fill_the_memory_are_refused_before_any_is_taken(
    spec: str, setting: str, fresh: Fresh, tmp_path: Path
) -> None:
    save(attach(fresh("plain"), [spec]), tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    manifest["adapters"][0]["config"][setting] = 10**10
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match=rf"the settings of {spec} ask for [\d,]+ bytes|{spec} takes \d+ positions"):
        load(fresh("plain"), tmp_path / "a")


def test_what_is_attached_is_what_was_weighed(fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighing happens on a model without weights, and leaves the real one alone."""
    save(attach(fresh("plain"), ["lora"]), tmp_path / "a")
    devices = []
    real = LoRA.attach

    def attached(self: LoRA, model: Any, context: Any) -> Any:
        devices.append(next(model.parameters()).device.type)
        return real(self, model, context)

    monkeypatch.setattr(LoRA, "attach", attached)
    load(fresh("plain"), tmp_path / "a")
    assert devices == ["meta", "cpu"]
