"""4. The begin token stands twice, or the text of training is not the text of inference.

Met: the template writes the begin token and the tokenizer adds another; training and serving render differently. The
adapter is mediocre, or good in one program and bad in another.

Here: one function renders for training, evaluation and chat, and the tokenizer adds nothing to it; two begin tokens in
a template are refused; a tokenizer is in the manifest by its content.

Also: tests/recipes/tasks/test_chat.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from onegpu.adapters import DataError, RecipeError
from onegpu.recipes import Job, Loaded, Outcome, preflight
from onegpu.recipes.chatting import open_chat

Recipe = Callable[..., Loaded]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
BEGIN = 2


@pytest.fixture
def base(templated: Callable[[str], Path]) -> Callable[[str], Path]:
    """The plain base with a template, and a tokenizer that puts `<s>` in front of every text itself."""

    def build(template: str) -> Path:
        folder = templated(template)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.bos_token = "<s>"
        single = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
        tokenizer.backend_tokenizer.post_processor = single
        tokenizer.save_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder)("hi")["input_ids"][0] == BEGIN
        return folder

    return build


def test_one_begin_token_in_training_evaluation_generation_and_chat(
    base: Callable[[str], Path],
    recipe: Recipe,
    run: Callable[..., Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = recipe(base=base(TEMPLATE), task={"evaluation": 0.3, "metrics": ["exact-match"], "answer_tokens": 2})
    job = preflight(loaded)
    for side in (job.dataset.train, job.dataset.evaluation):
        assert len(side)
        for example in side:
            assert example.ids[0] == BEGIN
            asked: Any = example
            assert asked.ids.count(BEGIN) == asked.prompt.count(BEGIN) == 1
    run(loaded)
    prompts: list[list[int]] = []
    monkeypatch.setattr("onegpu.recipes.tasks.chat.generate_texts", _listening(prompts))
    question = "good night"
    open_chat(tmp_path / "out", 2)(question)
    (prompt,) = prompts
    assert prompt.count(BEGIN) == 1
    (trained,) = [e for s in job.dataset.sides.values() for e in s if e.row == 9]
    assert trained.ids[: len(prompt)] == prompt


def _listening(asked: list[list[int]]) -> Any:
    def generate(model: Any, prompts: list[list[int]], *args: Any, **options: Any) -> list[str]:
        asked.extend(prompts)
        return ["" for _ in prompts]

    return generate


def test_a_template_that_writes_it_twice_is_refused(base: Callable[[str], Path], recipe: Recipe) -> None:
    with pytest.raises(DataError, match="begins with '<s>' twice: mend the chat template"):
        preflight(recipe(base=base("{{ bos_token }}" + TEMPLATE)))


def test_a_system_prompt_that_the_template_leaves_out_is_told(
    recipe: Recipe, templated: Callable[[str], Path], rows: list[Any], write_rows: Callable[..., Path]
) -> None:
    kind = {"role": "system", "content": "be kind"}
    data = str(write_rows([{"messages": [kind, *row["messages"]]} for row in rows], "kind.jsonl"))
    assert "be kind" in _text(preflight(recipe(task={"data": data})))
    sides = TEMPLATE.replace("{{ bos_token }}", "").replace("in messages", "in messages if m['role'] != 'system'")
    with pytest.raises(DataError, match="the chat template leaves out what 'system' says"):
        preflight(recipe(base=templated(sides), task={"data": data}))


def _text(job: Job) -> str:
    return str(job.reader.tokenizer.decode(job.dataset.train[0].ids))


def test_a_template_without_the_beginning_is_refused(base: Callable[[str], Path], recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="begins texts with '<s>', and its chat template leaves that out"):
        preflight(recipe(base=base(TEMPLATE.removeprefix("{{ bos_token }}"))))
