"""The real loop: exact accumulation."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onegpu.recipes import Loaded, Outcome

LORA = {"lora": {"rank": 4}}
STACKS: dict[str, list[Any]] = {
    "lora": [LORA],
    "prefix": [{"prefix": {"length": 3}}],
    "lora with layer-wise rates": [LORA, {"layerwise-lr": {"decay": 0.5}}],
    "full": ["full"],
    "lora and prefix": [LORA, {"prefix": {"length": 3}}],
    "lora on int8": ["int8", LORA],
    "lora on nf4": ["nf4", LORA],
    "lora on fp4": ["fp4", LORA],
}
EXACT = {"optimizer": "sgd", "learning_rate": 1.0, "clip": None, "schedule": "constant", "checkpoint_every": None}


def _distance(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Norm of the difference of two updates over the norm of one."""
    assert ours.keys() == theirs.keys() == start.keys()
    difference = sum(float((ours[n] - theirs[n]).double().square().sum()) for n in ours)
    update = sum(float((theirs[n] - start[n]).double().square().sum()) for n in ours)
    assert update > 0
    return float((difference / update) ** 0.5)


@pytest.mark.parametrize("stack", STACKS)
def test_x(stack, chat_recipe, run, saved_tensors, metrics, tmp_path):
    t=time.time()
    found = {}
    run(chat_recipe(STACKS[stack], train=EXACT | {"steps": 1, "learning_rate": 1e-30, "effective_batch":10}), "start")
    start = saved_tensors(tmp_path/"start/adapter")
    for micro in (10,5,2,1):
        run(chat_recipe(STACKS[stack], train=EXACT | {"steps": 1, "effective_batch": 10, "micro_batch": micro}), f"m{micro}")
        found[micro] = saved_tensors(tmp_path/f"m{micro}/adapter")
    print(stack, [_distance(found[m], found[10], start) for m in (5,2,1)], time.time()-t, metrics(tmp_path/"m10")[0]["grad_norm"])
