import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from onegpu.adapters import DataError, RecipeError
from onegpu.recipes.tasks import Example, Reader, RowProblem
from onegpu.recipes.tasks.language_modelling import LanguageModelling, MaskableExample

IGNORED = -100
START, END = 0, 1
PAD, UNKNOWN, CLS, SEP, MASK = range(5)
WORDS = [f"w{number}" for number in range(300)]
NEXT = LanguageModelling(data="rows.jsonl")
MASKED = LanguageModelling(data="rows.jsonl", predict="masked")
TEXTS = ["Rain again", "The bank of the team", "A", "Stocks rise and fall, and rise", "ß – 你"]


@pytest.fixture
def model(chat_base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(chat_base)


@pytest.fixture
def beginning(reader: Reader) -> Reader:
    """The reader with a tokenizer that puts its beginning token in front, as Llama's does."""
    tokenizer = copy.deepcopy(reader.tokenizer)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", START)]
    )
    return replace(reader, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def masking() -> Reader:
    """Words as tokens, between [CLS] and [SEP]."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner = Tokenizer(
        models.WordLevel(vocab={token: i for i, token in enumerate([*specials, *WORDS])}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    names = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    tokens = {f"{name}_token": specials[i] for name, i in names.items()}
    return Reader(PreTrainedTokenizerFast(tokenizer_object=inner, **tokens), 64)


@pytest.fixture(scope="module")
def encoder() -> PreTrainedModel:
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=len(WORDS) + 5,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def _text(*lengths: int) -> list[str]:
    return [" ".join(WORDS[(7 * n + k) % len(WORDS)] for k in range(length)) for n, length in enumerate(lengths)]


def _all(texts: Sequence[str], reader: Reader, task: LanguageModelling) -> list[Example]:
    return [e for number, text in enumerate(texts) for e in task.encode(number, {"text": text}, reader)]


def _gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _check_against_its_own(model: PreTrainedModel, task: LanguageModelling, batch: dict[str, Tensor]) -> None:
    own = model(**batch).loss
    expected = _gradients(model, own)
    objective = task.objective(model, batch)
    assert objective.total.item() / objective.weight == pytest.approx(own.item(), rel=1e-6)
    for name, gradient in _gradients(model, objective.total / objective.weight).items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-9, name


# --- the next token ---------------------------------------------------------------------------------------------------


def test_every_token_of_a_text_and_its_end_are_learned(reader: Reader) -> None:
    (example,) = NEXT.encode(7, {"text": "Rain"}, reader)
    assert reader.tokenizer.decode(example.ids) == "Rain<|im_end|>"
    assert example.labels == [IGNORED, *example.ids[1:]]


@pytest.mark.parametrize("text", ["Rain", "<|im_start|>Rain", "Rain<|im_end|>"])
def test_a_text_begins_and_ends_once(text: str, beginning: Reader) -> None:
    (example,) = NEXT.encode(7, {"text": text}, beginning)
    assert beginning.tokenizer.decode(example.ids) == "<|im_start|>Rain<|im_end|>"


def test_a_tokenizer_without_an_end_is_refused(reader: Reader) -> None:
    tokenizer = copy.deepcopy(reader.tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        NEXT.encode(7, {"text": "Rain"}, replace(reader, tokenizer=tokenizer))


def test_windows_of_a_long_text_learn_each_token_once(beginning: Reader) -> None:
    text = "".join(chr(97 + n % 26) for n in range(100))
    windows = NEXT.encode(7, {"text": text}, replace(beginning, limit=16))
    assert len(windows) > 6
    assert all(len(window.ids) <= 16 and window.labels[0] == IGNORED and window.row == 7 for window in windows)
    learned = [label for window in windows for label in window.labels if label != IGNORED]
    assert beginning.tokenizer.decode(learned) == text + "<|im_end|>"
    assert windows[0].ids[0] == START
    assert all(START not in window.ids for window in windows[1:])
    assert [END in window.ids for window in windows] == [False] * (len(windows) - 1) + [True]


def test_a_long_text_can_be_treated_otherwise(reader: Reader) -> None:
    short, row = replace(reader, limit=6), {"text": "abcdefgh"}
    with pytest.raises(DataError, match="9 tokens, and max_length is 6"):
        LanguageModelling(data="d", too_long="error").encode(7, row, short)
    with pytest.raises(RowProblem, match="too long: above 6 tokens"):
        LanguageModelling(data="d", too_long="drop").encode(7, row, short)
    (left,) = LanguageModelling(data="d", too_long="cut-left").encode(7, row, short)
    assert (reader.tokenizer.decode(left.ids), left.cut, left.supervised) == ("defgh<|im_end|>", 3, 5)
    (right,) = LanguageModelling(data="d", too_long="cut-right").encode(7, row, short)
    assert (reader.tokenizer.decode(right.ids), right.cut, right.supervised) == ("abcdef", 3, 5)


def test_the_loss_is_a_causal_models_own(model: PreTrainedModel, reader: Reader) -> None:
    batch = NEXT.collate(_all(TEXTS[1:], reader, NEXT), END)
    _check_against_its_own(model, NEXT, batch)


# --- hidden tokens ----------------------------------------------------------------------------------------------------


def test_a_text_stands_between_its_special_tokens_and_all_of_it_may_be_hidden(masking: Reader) -> None:
    (example,) = MASKED.encode(7, {"text": "w1 w2 nothing w3"}, masking)
    assert isinstance(example, MaskableExample)
    assert example.ids == [CLS, 6, 7, UNKNOWN, 8, SEP]
    assert example.labels == [IGNORED, 6, 7, IGNORED, 8, IGNORED]
    assert (example.mask, example.vocabulary) == (MASK, len(WORDS) + 5)


def test_windows_of_a_long_text_have_special_tokens_each_and_hide_each_token_in_one(masking: Reader) -> None:
    (text,) = _text(100)
    windows = MASKED.encode(7, {"text": text}, replace(masking, limit=16))
    assert len(windows) > 6
    assert all(w.ids[0] == CLS and w.ids[-1] == SEP and len(w.ids) <= 16 for w in windows)
    maskable = [label for window in windows for label in window.labels if label != IGNORED]
    assert maskable == masking.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_limit_counts_the_special_tokens(masking: Reader) -> None:
    task = LanguageModelling(data="d", predict="masked", too_long="error")
    assert len(task.encode(7, {"text": _text(8)[0]}, replace(masking, limit=10))[0].ids) == 10
    with pytest.raises(DataError, match="11 tokens, and max_length is 10"):
        task.encode(7, {"text": _text(9)[0]}, replace(masking, limit=10))
    with pytest.raises(RecipeError, match="leaves no room"):
        task.encode(7, {"text": "w1"}, replace(masking, limit=3))


def _hidden(before: Sequence[Example], after: Sequence[Example]) -> list[tuple[int, int]]:
    """(token, what stands there now) of everything that has a label."""
    found = []
    for was, now in zip(before, after, strict=True):
        assert len(was.ids) == len(now.ids) == len(now.labels)
        for old, new, label in zip(was.ids, now.ids, now.labels, strict=True):
            assert label in (IGNORED, old)
            if label == IGNORED:
                assert new == old
            else:
                found.append((old, new))
    return found


def test_tokens_are_hidden_as_bert_hides_them(masking: Reader) -> None:
    examples = _all(_text(*[60] * 100), masking, MASKED)
    found = _hidden(examples, MASKED.prepare(examples, 3))
    assert len(found) == 100 * 9  # 15 % of sixty
    kinds = Counter("mask" if new == MASK else "same" if new == old else "random" for old, new in found)
    assert kinds["mask"] / len(found) == pytest.approx(0.8, abs=0.04)
    assert kinds["random"] / len(found) == pytest.approx(0.1, abs=0.03)
    assert kinds["same"] / len(found) == pytest.approx(0.1, abs=0.03)
    assert len({new for old, new in found if new not in (MASK, old)}) > 50


def test_every_place_of_a_text_is_hidden_as_often(masking: Reader) -> None:
    examples = _all(_text(*[20] * 50), masking, MASKED)
    places = Counter(
        place
        for seed in range(20)
        for example in MASKED.prepare(examples, seed)
        for place, label in enumerate(example.labels)
        if label != IGNORED
    )
    assert set(places) == set(range(1, 21))  # never [CLS] and [SEP]
    assert min(places.values()) > 0.6 * 150
    assert max(places.values()) < 1.4 * 150


@pytest.mark.parametrize(("share", "hidden"), [(0.5, 10), (0.01, 1)])
def test_the_share_can_be_set_and_something_is_always_hidden(share: float, hidden: int, masking: Reader) -> None:
    task = LanguageModelling(data="d", predict="masked", masked_share=share)
    examples = _all(_text(20, 20), masking, task)
    assert [example.supervised for example in task.prepare(examples, 0)] == [hidden, hidden]


def test_what_is_hidden_depends_on_the_window_and_the_place_in_it_alone(masking: Reader) -> None:
    examples = _all(_text(30, 30, 30), masking, MASKED)
    once = MASKED.prepare(examples, 5)
    assert MASKED.prepare(examples, 5) == once
    assert MASKED.prepare(examples, 6) != once
    assert MASKED.prepare(examples[:2], 5) == list(once)[:2]
    same = [examples[0], examples[0]]
    first, second = MASKED.prepare(same, 5)
    assert first.labels != second.labels
    assert examples == _all(_text(30, 30, 30), masking, MASKED)  # left as they were


def test_nothing_is_hidden_from_a_causal_model(reader: Reader) -> None:
    examples = _all(TEXTS, reader, NEXT)
    assert NEXT.prepare(examples, 5) == examples


def test_the_loss_is_a_masked_models_own(encoder: PreTrainedModel, masking: Reader) -> None:
    examples = MASKED.prepare(_all(_text(5, 30, 17, 1), masking, MASKED), 0)
    batch = MASKED.collate(examples, PAD)
    assert batch["attention_mask"].sum(1).tolist() == [7, 32, 19, 3]
    _check_against_its_own(encoder, MASKED, batch)


def test_a_base_that_hides_nothing_is_refused(reader: Reader) -> None:
    with pytest.raises(RecipeError, match="no mask token: use `predict: next`"):
        MASKED.encode(7, {"text": "Rain"}, reader)


def test_a_text_of_unknown_words_is_a_problem_of_the_row(masking: Reader) -> None:
    with pytest.raises(RowProblem, match="no token that could be hidden"):
        MASKED.encode(7, {"text": "only unknown words"}, masking)


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"), [("", "is empty"), (" \n", "is empty"), (None, "not a text"), (3, "not a text")]
)
def test_a_row_without_a_text_is_a_problem_of_that_row(text: Any, told: str, reader: Reader) -> None:
    with pytest.raises(RowProblem, match=told):
        NEXT.encode(7, {"text": text}, reader)


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("predict", ["next", "masked"])
def test_the_split_into_batches_changes_nothing(
    model: PreTrainedModel, encoder: PreTrainedModel, reader: Reader, masking: Reader, predict: str, size: int
) -> None:
    causal = predict == "next"
    task, base, reading = (NEXT, model, reader) if causal else (MASKED, encoder, masking)
    examples = task.prepare(_all(TEXTS[1:] if causal else _text(5, 30, 17, 1, 9), reading, task), 0)
    chunks = [examples[start : start + size] for start in range(0, len(examples), size)]
    parts = [task.objective(base, task.collate(chunk, PAD)) for chunk in chunks]
    whole = task.objective(base, task.collate(examples, PAD))
    assert sum(part.weight for part in parts) == whole.weight
    assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-6)
    scores = task.scores([outcome for part in parts for outcome in part.outcomes()], (), reading)
    assert scores == pytest.approx(task.scores(whole.outcomes(), (), reading), rel=1e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(whole.total.item() / whole.weight), rel=1e-6)
    assert set(task.measures()) == {"loss", *scores}


def test_the_perplexity_of_a_model_that_diverged_is_a_number() -> None:
    assert math.isfinite(NEXT.scores([(0, 1, 1e9)], (), None)["perplexity"])  # type: ignore[arg-type]


def test_the_kind_of_model_follows_the_setting() -> None:
    assert (NEXT.model_kind(), MASKED.model_kind()) == ("causal-lm", "masked-lm")


def test_a_share_that_nothing_would_read_is_refused() -> None:
    with pytest.raises(ValueError, match="`masked_share` is for `predict: masked`"):
        LanguageModelling(data="d", masked_share=0.3)
    assert LanguageModelling(data="d", masked_share=0.15).masked_share == 0.15  # a resolved recipe names the default
