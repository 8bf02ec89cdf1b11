"""12. Rows that are packed into one sequence see each other.

Met: one causal mask over several rows, positions that run on, a label across the seam; borders are honoured by one
attention kernel only. The curve is better than deserved.

Here: attention looks at each sequence of a packed row by itself. A trial on the real model, adapters attached, shows
that no row changes another's logits by a bit; where it does not, rows are padded, and the run says why. In loops of
other people's, rows packed with positions that start anew do not see each other through an adapter, with every
attention a base may have.

Also: tests/recipes/tasks/test_packing.py, tests/adapters/conformance/test_table.py (packing)
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from onegpu.adapters import attach
from onegpu.recipes import Loaded, Outcome

ROWS = ([5, 6, 7, 8, 9, 10], [20, 21, 22, 23], [30, 31, 32, 33, 34])
STACKS: dict[str, list[Any]] = {
    "lora": ["lora"],
    "prefix": [{"prefix": {"length": 3}}],
    "trainable-tokens": [{"trainable-tokens": {"tokens": [6, 21]}}],
}


@pytest.fixture(params=["eager", "sdpa"])
def build(
    request: pytest.FixtureRequest, bases: dict[str, Path], noise: Callable[[Any], None]
) -> Callable[[list[Any], str], Any]:
    """A model with that attention and a stack that does something."""

    def make(stack: list[Any], variant: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(bases[variant], attn_implementation=request.param)
        noise(attach(model, stack).trainable())
        return model

    return make


def _packed(model: Any, rows: Any) -> list[Tensor]:
    """Logits of each row, in one sequence."""
    ids, places = [t for row in rows for t in row], [p for row in rows for p in range(len(row))]
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids]), position_ids=torch.tensor([places]), use_cache=False).logits[0]
    return list(found.split([len(row) for row in rows]))


@pytest.mark.parametrize("variant", ["plain", "wide-heads"])
@pytest.mark.parametrize("name", STACKS)
def test_rows_in_one_sequence_do_not_see_each_other(name: str, variant: str, build: Callable[..., Any]) -> None:
    model = build(STACKS[name], variant)
    expected = _packed(model, ROWS)
    other = _packed(model, ([11, *ROWS[0][1:]], *ROWS[1:]))
    assert not torch.allclose(other[0], expected[0], atol=1e-3)
    for ours, theirs in zip(other[1:], expected[1:], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_with_positions_that_run_on_they_would(build: Callable[..., Any]) -> None:
    model = build(STACKS["lora"], "plain")
    ids = torch.tensor([[token for row in ROWS for token in row]])
    other = ids.clone()
    other[0, 0] = 11
    with torch.no_grad():
        apart = (model(input_ids=ids).logits - model(input_ids=other).logits)[0, len(ROWS[0]) :].abs().max()
    assert apart > 1e-3


def test_the_loss_of_a_pack_is_that_of_its_rows(build: Callable[..., Any]) -> None:
    model = build(STACKS["lora"], "plain")
    losses = [F.cross_entropy(said[:-1], torch.tensor(row[1:]), reduction="sum") for said, row in _pairs(model)]
    alone = [model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1) for row in ROWS]
    assert float(sum(losses)) == pytest.approx(float(sum(alone)), rel=1e-5)


def _pairs(model: Any) -> list[tuple[Tensor, list[int]]]:
    return list(zip(_packed(model, ROWS), ROWS, strict=True))


def test_a_run_that_packs_logs_the_losses_of_one_that_pads(
    recipe: Callable[..., Loaded], run: Callable[..., Outcome], tmp_path: Path
) -> None:
    losses = {}
    for packing in (True, False):
        run(recipe(["lora"], task={"packing": packing}, train={"steps": 6, "effective_batch": 4}), f"{packing}")
        lines = (tmp_path / f"{packing}/metrics.jsonl").read_text("utf-8").splitlines()
        losses[packing] = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert len(set(losses[True])) == 6


def test_a_model_whose_rows_would_see_each_other_is_padded(
    written: Callable[..., str],
    onegpu: Callable[..., tuple[int, str, str]],
    damaged: Callable[..., None],
    tmp_path: Path,
) -> None:
    """Its first layer adds the average over the whole row, as a convolution over neighbours would add some of it."""

    def mix(module: Any, args: Any, output: Any) -> Any:
        return output + output.mean(1, keepdim=True)

    damaged(lambda model: model.model.embed_tokens.register_forward_hook(mix))
    (tmp_path / "recipe.yaml").write_text(written(["lora"]), "utf-8")
    code, out, errors = onegpu("run", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"))
    assert code == 0, errors
    assert "not packed: the logits are not those of sequences by themselves" in " ".join(out.split())
