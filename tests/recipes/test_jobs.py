"""Everything that can be told before weights are read is told then, and at once."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from onegpu.adapters import Adapter, Capabilities, RecipeError, StackError, Unavailable, attach, load_base
from onegpu.adapters.device import Hardware
from onegpu.recipes import Loaded, jobs, parse_recipe, preflight
from onegpu.recipes.jobs import target_rows
from onegpu.recipes.showing import target_lines

Recipe = Callable[..., Loaded]
Jsonl = Callable[..., Path]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def without_weights(chat_base: Path, tmp_path: Path) -> Path:
    """The tiny chat base, all but its weights."""
    folder = tmp_path / "without-weights"
    shutil.copytree(chat_base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def _refusal(loaded: Loaded) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        preflight(loaded)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def test_faults_of_every_stage_are_told_in_one_message_with_their_lines(
    without_weights: Path, jsonl: Jsonl, tmp_path: Path
) -> None:
    data = jsonl([{"question": "a", "context": "b"}] * 4, "answers.jsonl")
    text = f"""\
base: {without_weights}
revision: main
adapters:
- lora: {{targets: [q_prj]}}
- lora: {{targets: [v_porj], name: other}}
- prefix-tuning
task:
  question-answering: {{data: {data}, evaluation: none}}
train:
  precision: fp16
  gradient_checkpointing: true
  best: {{metric: nonsense}}
adapter: {tmp_path / "nowhere"}
"""
    told = _refusal(parse_recipe(text, name="recipe.yaml", folder=tmp_path))
    for place, what in {
        "recipe.yaml:2": "only a hub id has revisions",
        "recipe.yaml:4": "'q_prj' matches no linear layer; did you mean 'q_proj'?",
        "recipe.yaml:5": "'v_porj' matches no linear layer; did you mean 'v_proj'?",
        "recipe.yaml:6": "prefix-tuning cannot work under gradient checkpointing",
        "recipe.yaml:10": "precision fp16 needs a CUDA device",
        "recipe.yaml:12": "nonsense",
        "recipe.yaml:13": "nowhere",
    }.items():
        assert any(line.startswith(f"{place}: ") and what in line for line in told), (place, told)
    assert any("no column" in line or "answers" in line for line in told)


def test_what_is_wrong_with_a_recipe_and_with_its_run_is_one_message(onegpu: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "base: nowhere/at/all\nadapters: [{lora: {rnk: 4, rank: 0}}]\ntask: {chat: {data: missing.jsonl}}\n"
        "train: {precision: fp16, steps: 2, learning_rat: 1e-3}\n"
    )
    for command in (["run", str(recipe), "-o", str(tmp_path / "out")], ["data", str(recipe)]):
        code, out, err = onegpu(*command)
        assert (code, out) == (2, "")
        for text in ("rnk", "rank: must be", "learning_rat", "missing.jsonl", "nowhere/at/all", "fp16 needs a CUDA"):
            assert text in err, text
    assert not (tmp_path / "out").exists()


def test_a_wrong_key_is_told_of_a_finished_run_too(onegpu: Command, chat_recipe: Any, run: Any, tmp_path: Path) -> None:
    run(chat_recipe(train={"steps": 2}))
    (tmp_path / "wrong.yaml").write_text((tmp_path / "out/recipe.yaml").read_text() + "wrng: 1\n")
    code, _, err = onegpu("run", str(tmp_path / "wrong.yaml"), "-o", str(tmp_path / "out"), "--resume")
    assert code == 2
    assert "wrng: unknown key" in err


def test_a_task_that_does_not_fit_its_base_is_told_with_what_else_is_wrong(jsonl: Jsonl, tmp_path: Path) -> None:
    folder = tmp_path / "t5"
    T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    ).config.save_pretrained(folder)
    content = {
        "base": str(folder),
        "adapters": [{"lora": {"targets": ["qq"]}}],
        "task": {"completion": {"data": str(jsonl([{"prompt": "a", "completion": "b"}] * 3)), "evaluation": "none"}},
        "train": {"precision": "fp16"},
    }
    told = _refusal(parse_recipe(yaml.safe_dump(content), name="recipe.yaml", folder=tmp_path))
    joined = "\n".join(told)
    assert "cannot be used as a causal-lm model" in joined
    assert "target 'qq' matches no linear layer" in joined
    assert "precision fp16 needs a CUDA device" in joined


def test_a_model_that_only_encodes_is_no_base_to_write_with(class_base: Path, jsonl: Jsonl, tmp_path: Path) -> None:
    content = {
        "base": str(class_base),
        "adapters": ["lora"],
        "task": {"language-modelling": {"data": str(jsonl([{"text": "the cat"}] * 30)), "evaluation": "none"}},
    }
    told = _refusal(parse_recipe(yaml.safe_dump(content), name="recipe.yaml", folder=tmp_path))
    assert "is a model that only encodes" in told[0]
    assert "language-modelling needs one that writes" in told[0]


def test_no_weight_is_read(without_weights: Path, chat_recipe: Recipe) -> None:
    job = preflight(chat_recipe(["nf4", {"lora": {"rank": 2}}, {"prefix": {"length": 3}}], base=without_weights))
    assert job.steps == 2
    with pytest.raises(Exception, match=r"model\.safetensors"):
        job.load_base()


# --- what adapters declare --------------------------------------------------------------------------------------------


class Picky(Adapter):
    """Works nowhere in particular."""

    api = 1


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        ({"devices": ("cuda",)}, "picky cannot work on a device of kind cpu (works on cuda): why not"),
        ({"attentions": ("eager",)}, "picky cannot work with sdpa attention (works with eager): why not"),
        ({"decoders": False}, "picky cannot work on a model that only decodes: why not"),
        ({"half_bases": False}, "picky cannot work on a base in bfloat16: why not; load it in float32"),
        ({"checkpointing": False}, "picky cannot work under gradient checkpointing: why not"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_an_adapter_declares_is_held_against_the_run_before_weights(
    declared: dict[str, Any],
    told: str,
    without_weights: Path,
    chat_recipe: Recipe,
    declare: Callable[[str, str, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "picky_package", sys.modules[__name__])
    declare("onegpu.adapters", "picky", "picky_package:Picky")
    train: dict[str, Any] = {"gradient_checkpointing": True} if "checkpointing" in declared else {}
    train |= {"precision": "bf16"} if "half_bases" in declared else {}
    loaded = chat_recipe(["picky", {"lora": {"rank": 2}}], base=without_weights, train=train)
    monkeypatch.setattr(Picky, "capabilities", Capabilities(trains=False))
    preflight(loaded)
    reasons = dict.fromkeys(declared, "why not")
    monkeypatch.setattr(Picky, "capabilities", Capabilities(trains=False, reasons=reasons, **declared))
    with pytest.raises(StackError) as caught:
        preflight(loaded)
    assert str(caught.value) == f"recipe.yaml:2: {told}"
    assert isinstance(caught.value, StackError)


def test_only_what_is_missing_here_is_exit_3(
    chat_recipe: Recipe, without_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unavailable) as caught:
        preflight(chat_recipe(base=without_weights, train={"precision": "fp16"}))
    assert caught.value.exit_code == 3
    old = Hardware("cuda", (7, 5), "Old", 1)
    monkeypatch.setattr(jobs, "detect", lambda: old)
    with pytest.raises(Unavailable, match="only emulates bf16"):
        preflight(chat_recipe(base=without_weights, train={"precision": "bf16"}))


def test_attention_that_a_base_does_not_have_is_told_once_with_its_place(
    chat_recipe: Recipe, without_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    with pytest.raises(RecipeError) as caught:
        preflight(chat_recipe(base=without_weights, train={"attention": "sdpa"}))
    assert re.fullmatch(r"recipe.yaml:\d+: LlamaForCausalLM has no attention sdpa: .*", str(caught.value))


# --- targets ----------------------------------------------------------------------------------------------------------

ENTRIES = [{"lora": {"rank": 2, "targets": ["q_proj", "*.layers.1.mlp.*"]}}, {"prefix": {"length": 3}}]


def test_the_table_of_targets_counts_modules_and_parameters_by_entry(
    without_weights: Path, chat_recipe: Recipe, chat_base: Path
) -> None:
    loaded = chat_recipe(ENTRIES, base=without_weights)
    lines = target_lines(target_rows(loaded))
    assert lines == [
        "lora q_proj: 2 modules, 256 parameters",
        "  q_proj 2",
        "lora *.layers.1.mlp.*: 3 modules, 576 parameters",
        "  gate_proj 1, up_proj 1, down_proj 1",
        "prefix (all it changes): 2 modules, 192 parameters",
        "  self_attn 2",
    ]
    stack = attach(load_base(str(chat_base)), loaded.stack)
    rows = preflight(loaded).targets
    assert sum(row.parameters or 0 for row in rows) == sum(p.numel() for p in stack.trainable().values())


def test_show_and_run_print_the_table(
    chat_recipe: Recipe, without_weights: Path, onegpu: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    loaded = chat_recipe(ENTRIES, base=without_weights)
    (tmp_path / "recipe.yaml").write_text(loaded.as_yaml(), "utf-8")
    code, out, _ = onegpu("show", str(tmp_path / "recipe.yaml"))
    assert code == 0
    comments = [line for line in out.splitlines() if line.startswith("#")]
    assert comments[0] == "# targets on this base:"
    assert "#   lora q_proj: 2 modules, 256 parameters" in comments
    assert max(map(len, comments)) <= 80
    assert yaml.safe_load(out) == json.loads(onegpu("show", str(tmp_path / "recipe.yaml"), "--json")[1])


def test_show_needs_no_base(chat_recipe: Recipe, onegpu: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    text = chat_recipe().as_yaml().replace(str(chat_recipe().recipe.base), "somebody/a-model")
    (tmp_path / "recipe.yaml").write_text(text, "utf-8")
    code, out, _ = onegpu("show", str(tmp_path / "recipe.yaml"))
    assert code == 0
    assert "# targets: not known," in out
    assert replace(chat_recipe()).recipe.base not in out
