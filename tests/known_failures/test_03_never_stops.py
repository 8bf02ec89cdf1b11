"""3. The end of a turn is never learned, and the model does not stop.

Met: the padding token is the end token and every one of them is masked by its id, or the end is cut off or outside the
loss. After training, answers run on to the limit.

Here: padding is masked by length, never by id; a template whose answers end with no stop token is refused; the stop
tokens of tokenizer and generation settings are in the manifest.

Also: tests/recipes/tasks/test_chat.py, tests/recipes/test_running.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from onegpu.adapters import DataError, load, load_base
from onegpu.recipes import Loaded, Outcome, preflight
from onegpu.recipes.tasks.chat import render

Recipe = Callable[..., Loaded]
OPEN_ENDED = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# The end of an answer is written by the turn that follows, outside of what the assistant says.
ENDED_BY_THE_NEXT = (
    "{% for m in messages %}{% if not loop.first %}<|im_end|>{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_end|><|im_start|>assistant\n{% endif %}"
)


def test_every_end_is_supervised_and_no_padding_is(recipe: Recipe) -> None:
    job = preflight(recipe())
    end = job.reader.tokenizer.eos_token_id
    assert job.pad == end
    batch = job.loaded.task.collate(list(job.dataset.train), job.pad)
    inside = batch["attention_mask"].bool()
    assert not inside.all()
    assert (batch["labels"][~inside] == -100).all()
    for labels in batch["labels"]:
        assert labels[labels != -100][-1] == end


def test_what_was_learned_by_heart_ends_by_itself(
    recipe: Recipe, run: Callable[..., Outcome], rows: list[dict[str, Any]], bases: dict[str, Path], write_rows: Any
) -> None:
    taught = [rows[n] for n in (1, 2, 3, 6)]
    loaded = recipe(
        [{"lora": {"rank": 16}}],
        task={"data": str(write_rows(taught, "four.jsonl"))},
        train={"steps": 70, "learning_rate": 0.02},
    )
    model: Any = load_base(str(bases["plain"]), precision="fp32")
    load(model, run(loaded).adapter)
    tokenizer = AutoTokenizer.from_pretrained(bases["plain"])
    for row in taught:
        prompt = torch.tensor([render(tokenizer, row["messages"][:1], prompt=True)])
        said = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, pad_token_id=1
        )[0, prompt.shape[1] :]
        assert tokenizer.decode(said) == f"{row['messages'][1]['content']}<|im_end|>"


@pytest.mark.parametrize("template", [OPEN_ENDED, ENDED_BY_THE_NEXT], ids=["never", "outside the answer"])
def test_a_template_that_does_not_end_an_answer_is_refused(
    template: str, recipe: Recipe, templated: Callable[[str], Path]
) -> None:
    with pytest.raises(DataError, match="does not end an answer with a stop token"):
        preflight(recipe(base=templated(template)))


def test_the_stop_tokens_are_in_the_manifest(recipe: Recipe, run: Callable[..., Outcome]) -> None:
    manifest = json.loads((run(recipe()).adapter / "manifest.json").read_text("utf-8"))
    assert manifest["run"]["stop_tokens"] == [1]
