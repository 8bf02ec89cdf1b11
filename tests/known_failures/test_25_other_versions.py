"""25. A configuration from another version.

Met: new versions write every key that they know, older ones fail on an unknown one, or drop it with a warning that
hopes it does not matter; a key that mattered changes the method.

Here: only keys that differ from their default are written; an unknown key that says nothing is passed over, one that
says something is refused with its name; an unknown method is named as one.

Not yet: one run of the tests with the oldest supported versions.

Also: tests/adapters/test_artefact.py, tests/adapters/bridge/test_folders.py
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from onegpu.adapters import ArtefactError, OnegpuError, attach, load, save

Fresh = Callable[..., PreTrainedModel]


@pytest.fixture(params=["ours", "stock"])
def folder(
    request: pytest.FixtureRequest, fresh: Fresh, noise: Callable[[Any], None], tmp_path: Path, bases: dict[str, Path]
) -> Path:
    """A LoRA as we save it, or as PEFT does."""
    place = tmp_path / "adapter"
    if request.param == "ours":
        stack = attach(fresh(), ["lora"])
        noise(stack.trainable())
        save(stack, place)
    else:
        from peft import get_peft_model

        get_peft_model(fresh(), LoraConfig(target_modules=["q_proj"])).save_pretrained(str(place))
    return place


def _say(folder: Path, **keys: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | keys), "utf-8")


def _load(model: PreTrainedModel, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*was saved by PEFT")
        return load(model, folder)


@pytest.mark.parametrize("value", [None, False, {}, [], ""], ids=str)
def test_a_new_key_that_says_nothing_is_passed_over(value: Any, folder: Path, fresh: Fresh) -> None:
    _say(folder, new_key=value)
    assert _load(fresh(), folder).trainable()


def test_a_new_key_that_says_something_is_refused_by_name(folder: Path, fresh: Fresh) -> None:
    _say(folder, use_newthing=True)
    with pytest.raises(ArtefactError, match="use_newthing"):
        _load(fresh(), folder)


def test_an_unknown_method_is_named_as_one(folder: Path, fresh: Fresh) -> None:
    _say(folder, peft_type="HYPERLORA")
    with pytest.raises(OnegpuError, match="HYPERLORA"):
        _load(fresh(), folder)


def test_only_what_differs_is_written_and_peft_reads_it(
    fresh: Fresh, noise: Callable[[Any], None], tmp_path: Path, bases: dict[str, Path], logits: Callable[..., Tensor]
) -> None:
    model = fresh()
    stack = attach(model, [{"lora": {"rank": 4, "targets": ["q_proj", "v_proj"]}}])
    noise(stack.trainable())
    save(stack, tmp_path / "adapter", source=str(bases["plain"]))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text("utf-8"))
    assert config.keys() == {
        *("peft_type", "base_model_name_or_path", "inference_mode", "task_type", "target_modules", "r", "lora_alpha")
    }
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["plain"]), tmp_path / "adapter")
    assert torch.allclose(logits(theirs), logits(model), atol=1e-6)
