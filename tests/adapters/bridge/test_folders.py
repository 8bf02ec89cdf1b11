"""A folder of PEFT's that a stranger wrote: whatever its settings say, it loads or is refused with one message."""

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from onegpu.adapters import InvalidInput, OnegpuError, load

CONFIGS: list[peft.PeftConfig] = [
    peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]),
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
]
VALUES: list[Any] = [7, -1, "x", [1], {"a": 1}, True, float("inf"), None, [["q"]], "../../etc/passwd"]
TEXTS = [
    "",
    "[]",
    "3",
    "{",
    "[" * 100_000,
    '{"peft_type": "LORA"}',
    '{"peft_type": "LORA", "r": NaN}',
    '{"peft_type": 3}',
]


def _model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda config: config.peft_type.value)
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that stock PEFT saved."""
    folder = tmp_path_factory.mktemp("stock")
    peft.get_peft_model(_model(), request.param).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """PEFT's folders do not name their base, and loading says so each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _load(stock: Path, text: str, into: Path) -> None:
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(stock, into)
    (into / "adapter_config.json").write_text(text, "utf-8")
    load(_model(), into)


def test_it_loads_as_it_is(stock: Path, tmp_path: Path) -> None:
    _load(stock, (stock / "adapter_config.json").read_text("utf-8"), tmp_path / "copy")


@pytest.mark.slow
def test_no_setting_of_another_type_is_a_traceback(stock: Path, tmp_path: Path) -> None:
    config = json.loads((stock / "adapter_config.json").read_text("utf-8"))
    refused = 0
    for key in config:
        for value in VALUES:
            try:
                _load(stock, json.dumps(config | {key: value}), tmp_path / "copy")
            except OnegpuError:
                refused += 1
    assert refused > 30


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:20])
def test_what_is_no_configuration_is_refused(stock: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidInput):
        _load(stock, text, tmp_path / "copy")
