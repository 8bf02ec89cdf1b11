"""Everything from which tokens follow is in the digest, and nothing else."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from onegpu.recipes.tokenizers import tokenizer_digest

CHANGES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "template": ("chat_template", lambda t: setattr(t, "chat_template", "{{ 1 }}")),
    "token": ("vocabulary", lambda t: t.add_tokens(["more"])),
    "normaliser": ("pipeline", lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.Lowercase())),
    "cutting": ("pipeline", lambda t: setattr(t.backend_tokenizer, "pre_tokenizer", pre_tokenizers.Whitespace())),
    "around": (
        "pipeline",
        lambda t: setattr(
            t.backend_tokenizer,
            "post_processor",
            processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]),
        ),
    ),
    "padding token": ("pipeline", lambda t: setattr(t, "pad_token", "<|im_start|>")),
    "special tokens in texts": ("pipeline", lambda t: setattr(t, "split_special_tokens", True)),
    "stripping": ("pipeline", lambda t: t.add_tokens([AddedToken("<|im_end|>", lstrip=True, special=True)])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_thing_that_changes_tokens_is_in_it(change: str, tokenizer: PreTrainedTokenizerFast) -> None:
    kind, alter = CHANGES[change]
    before, other = tokenizer_digest(tokenizer), copy.deepcopy(tokenizer)
    assert tokenizer_digest(other) == before
    alter(other)
    after = tokenizer_digest(other)
    assert kind in {key for key in before if before[key] != after[key]}


def test_merges_are_in_it() -> None:
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    with_merge, without = (
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=merges)))
        for merges in ([("a", "b")], [])
    )
    assert with_merge("ab")["input_ids"] != without("ab")["input_ids"]
    before, after = tokenizer_digest(with_merge), tokenizer_digest(without)
    assert {key for key in before if before[key] != after[key]} == {"pipeline"}


def test_using_and_copying_a_tokenizer_changes_nothing(
    tokenizer: PreTrainedTokenizerFast, chat_base: Path, tmp_path: Path
) -> None:
    before = tokenizer_digest(AutoTokenizer.from_pretrained(chat_base))
    used = AutoTokenizer.from_pretrained(chat_base)
    used(["a", "bcd"], truncation=True, max_length=2, padding=True)
    assert tokenizer_digest(used) == before
    used.save_pretrained(tmp_path / "copy")
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path / "copy")) == before


def test_settings_that_say_nothing_are_left_out_as_versions_differ_in_them(tokenizer: PreTrainedTokenizerFast) -> None:
    def written_by(more: Any) -> Any:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content["model"] |= more
        content["added_tokens"][0] |= more

        class Backend:
            def to_str(self) -> str:
                return json.dumps(content)

        return SimpleNamespace(
            is_fast=True,
            backend_tokenizer=Backend(),
            get_vocab=tokenizer.get_vocab,
            chat_template=tokenizer.chat_template,
            special_tokens_map=tokenizer.special_tokens_map,
            truncation_side=tokenizer.truncation_side,
        )

    before = tokenizer_digest(written_by({}))
    assert before == tokenizer_digest(tokenizer)
    assert tokenizer_digest(written_by({"later": False, "latest": None, "list": []})) == before
    assert tokenizer_digest(written_by({"later": 0}))["pipeline"] != before["pipeline"]


class Slow:
    """A tokenizer in Python, as far as it is looked at."""

    is_fast, chat_template, truncation_side = False, None, "right"

    def __init__(self, scores: str, **settings: Any) -> None:
        self.scores, self.init_kwargs, self.special_tokens_map = scores, settings, {"eos_token": "b"}

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1}

    def save_vocabulary(self, folder: str) -> tuple[str, ...]:
        path = Path(folder) / "scores.model"
        path.write_text(self.scores)
        return (str(path),)


def test_of_a_tokenizer_in_python_its_files_and_switches_count_and_its_place_does_not() -> None:
    before = tokenizer_digest(Slow("1 2", do_lower_case=False, name_or_path="here"))
    assert tokenizer_digest(Slow("1 2", do_lower_case=False, name_or_path="there")) == before
    for other in (Slow("2 1", do_lower_case=False), Slow("1 2", do_lower_case=True)):
        after = tokenizer_digest(other)
        assert {key for key in before if before[key] != after[key]} == {"pipeline"}
