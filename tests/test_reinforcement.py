"""The script of docs/reinforcement.md: TRL's own trainer on a model that `load_base` and `attach` prepared."""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from onegpu.adapters import load, load_base

PAGE = (Path(__file__).parent.parent / "docs" / "reinforcement.md").read_text("utf-8")
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}a: {% endif %}"
# How many different letters: a tiny random model hardly ever says the same twice, so rewards differ.
REWARD = """
def varied(completions, **columns):
    return [float(len(set(turns[0]["content"]))) for turns in completions]
"""
HERE = {
    "my_rewards:brief": "my_rewards:varied",
    '"TRAINER",': '"TRAINER", use_cpu=True, disable_tqdm=True, logging_steps=1,',
}


class Ran(NamedTuple):
    """The script after it ran."""

    names: dict[str, Any]
    before: dict[str, Tensor]  # the model's parameters before it was trained


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On matrices this small, threads wait for one another longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def blocks() -> list[str]:
    """The code of the page: the reward function, and the script."""
    found = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(found) == 2
    return found


@pytest.fixture
def base(worded: Path, tmp_path: Path) -> Path:
    """The tiny Llama with a tokenizer that can chat."""
    folder = shutil.copytree(worded, tmp_path / "base")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(worded)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def script(blocks: list[str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """`script({"beta=0.0": "beta=0.1"})`: run it, with these changes of its text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_rewards.py").write_text(blocks[0] + REWARD, "utf-8")

    def run(changes: Mapping[str, str] = MappingProxyType({})) -> Ran:
        text = blocks[1]
        for old, new in {**HERE, '"BASE"': repr(str(base)), **changes}.items():
            assert old in text, old
            text = text.replace(old, new)
        names: dict[str, Any] = {}
        prepare, line, rest = text.partition("trainer.train()")
        exec(prepare, names)
        before = {name: parameter.detach().clone() for name, parameter in names["model"].named_parameters()}
        exec(line + rest, names)
        return Ran(names, before)

    return run


def _owned_and_changed(ran: Ran) -> tuple[set[str], set[str]]:
    """Names of the parameters that the stack trains, and of those that have changed."""
    owned = {id(parameter) for parameter in ran.names["stack"].trainable().values()}
    now = dict(ran.names["model"].named_parameters())
    assert now.keys() == ran.before.keys()
    changed = {name for name, parameter in now.items() if not torch.equal(parameter, ran.before[name])}
    return {name for name, parameter in now.items() if id(parameter) in owned}, changed


@pytest.mark.parametrize(
    "changes", [{}, {'{"lora": {"rank": 8}}': '"nf4", {"lora": {"rank": 8}}'}, {"beta=0.0": "beta=0.1"}], ids=str
)
def test_two_steps_change_the_adapter_alone_and_it_can_be_loaded(
    changes: dict[str, str], script: Callable[..., Ran], base: Path, tmp_path: Path, ids: Tensor
) -> None:
    ran = script(changes)
    owned, changed = _owned_and_changed(ran)
    assert owned
    assert changed == owned
    model = ran.names["model"].eval()
    fresh = load_base(str(base), ran.names["STACK"])
    load(fresh, tmp_path / "ADAPTER")
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, model(ids).logits)


def test_a_reference_model_is_loaded_only_where_it_counts(script: Callable[..., Ran]) -> None:
    assert script().names["trainer"].ref_model is None
    reference = script({"beta=0.0": "beta=0.1", '{"lora": {"rank": 8}}': '"nf4", {"lora": {"rank": 8}}'})
    trainer = reference.names["trainer"]
    assert trainer.ref_model is not None
    first = next(record for record in trainer.state.log_history if "kl" in record)
    assert first["kl"] > 0  # before the first step, as the reference is not packed


def test_the_reward_function_of_the_page_prefers_what_is_brief(blocks: list[str]) -> None:
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    long, short = ([{"role": "assistant", "content": text}] for text in ("a long answer", "short"))
    worse, better = names["brief"](completions=[long, short], prompts=["?", "?"])
    assert worse < better
