import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from onegpu.adapters import ArtefactError
from onegpu.adapters.artefact import read
from onegpu.recipes import Loaded, Outcome
from onegpu.recipes.facts import check_tokenizer, facts_of

Recipe = Callable[..., Loaded]
Run = Callable[..., Outcome]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def base(chat_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny chat base, to be changed after a run."""
    return Path(shutil.copytree(chat_base, tmp_path / "base"))


def _change_weights(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def _change_template(base: Path) -> None:
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", "<|im_end|>\n"))


def _change_normaliser(base: Path) -> None:
    """The vocabulary stays what it is."""
    path = base / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_change_weights, r"was trained on .*, and this model is another .*up_proj.weight has other values"),
        (
            _change_template,
            r"with another tokenizer than that of this base: its chat template was \w{24} and is",
        ),
        (_change_normaliser, r"with another tokenizer than that of this base: its pipeline was \w{24} and is"),
    ],
)
@pytest.mark.parametrize("verb", [("evaluate",), ("chat", "-m", "Hi", "--tokens", "2")])
def test_another_base_or_template_is_refused_unless_allowed(
    verb: tuple[str, ...],
    change: Callable[[Path], None],
    told: str,
    base: Path,
    chat_recipe: Recipe,
    run: Run,
    onegpu: Command,
) -> None:
    outcome = run(chat_recipe(base=base, task={"evaluation": 0.3}))
    name, *options = verb
    folder = str(outcome.adapter.parent)
    assert onegpu(name, folder, *options)[0] == 0
    change(base)
    code, out, err = onegpu(name, folder, *options)
    assert (code, out) == (2, "")
    assert re.search(told, err), err
    assert "--allow-base-mismatch" in err
    assert onegpu(name, folder, *options, "--allow-base-mismatch")[0] == 0


def test_going_on_over_another_base_is_asked_for_and_recorded(
    base: Path, chat_recipe: Recipe, run: Run, onegpu: Command, tmp_path: Path
) -> None:
    first = run(chat_recipe(base=base), "first")
    _change_weights(base)
    recipe = tmp_path / "again.yaml"
    recipe.write_text(chat_recipe(base=base, adapter=str(first.adapter)).as_yaml())
    code, _, err = onegpu("run", str(recipe), "-o", str(tmp_path / "second"))
    assert code == 2
    assert "this model is another" in err
    assert not (tmp_path / "second").exists()
    assert onegpu("run", str(recipe), "-o", str(tmp_path / "second"), "--allow-base-mismatch")[0] == 0
    (told,) = read(tmp_path / "second" / "adapter").manifest.base_mismatch
    assert told.startswith("values that were trained on ")
    assert told.endswith("up_proj.weight has other values")


def test_going_on_with_another_tokenizer_is_asked_for_and_recorded(
    base: Path, chat_recipe: Recipe, run: Run, onegpu: Command, tmp_path: Path
) -> None:
    first = run(chat_recipe(base=base), "first")
    _change_template(base)
    _change_normaliser(base)
    recipe = tmp_path / "again.yaml"
    recipe.write_text(chat_recipe(base=base, adapter=str(first.adapter)).as_yaml())
    code, _, err = onegpu("run", str(recipe), "-o", str(tmp_path / "second"))
    assert code == 2
    assert re.search(r"its chat template was \w{24} and is \w{24}; its pipeline was \w{24} and is", err), err
    assert onegpu("run", str(recipe), "-o", str(tmp_path / "second"), "--allow-base-mismatch")[0] == 0
    (told,) = read(tmp_path / "second" / "adapter").manifest.base_mismatch
    assert re.fullmatch(
        r"values that were trained with another tokenizer: its chat template was \w{24} and is \w{24}; "
        r"its pipeline was \w{24} and is \w{24}",
        told,
    )


def test_another_template_is_refused_before_weights_are_read(
    base: Path, chat_recipe: Recipe, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onegpu.recipes.jobs import Job

    first = run(chat_recipe(base=base), "first")
    _change_template(base)
    monkeypatch.setattr(Job, "load_base", lambda job: pytest.fail("weights were read"))
    with pytest.raises(ArtefactError, match=r"recipe.yaml:1: .*its chat template was"):
        run(chat_recipe(base=base, adapter=str(first.adapter)), "second")


def test_the_tokenizer_of_the_run_is_the_same(chat_recipe: Recipe, run: Run, chat_base: Path) -> None:
    outcome = run(chat_recipe())
    facts = facts_of(outcome.adapter, read(outcome.adapter).manifest)
    check_tokenizer(outcome.adapter, facts, AutoTokenizer.from_pretrained(chat_base), allow=False)
    assert facts.tokenizer


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"labels": 3}, "run.labels: must be a valid list, not 3"),
        ({"stop_tokens": ["x"]}, "run.stop_tokens.0: must be a valid integer"),
        ({"task": ["chat"]}, "run.task: must be a valid dictionary"),
        ({"task": {"chat": None}}, "run.task.chat: must be a valid dictionary"),
        ({"tokenizer": {"vocabulary": 1}}, "run.tokenizer.vocabulary: must be a valid string"),
    ],
)
@pytest.mark.parametrize("verb", ["evaluate", "chat"])
def test_facts_that_no_run_writes_are_a_message(
    verb: str, facts: dict[str, Any], told: str, chat_recipe: Recipe, run: Run, onegpu: Command
) -> None:
    path = run(chat_recipe(train={"steps": 1})).adapter / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["run"] |= facts
    path.write_text(json.dumps(manifest))
    code, _, err = onegpu(verb, str(path.parent), *(["-m", "Hi"] if verb == "chat" else []))
    assert code == 2
    assert told in err
