import logging
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from onegpu.adapters import DataError, attach
from onegpu.recipes.tasks import Reader
from onegpu.recipes.tasks.answering import (
    Answer,
    AnswerExample,
    answers_to,
    generate_texts,
    prompt_within,
    text_measures,
    text_scores,
)

PAD, END, WORDS, POSITIONS = 0, 1, 64, 80
LENGTHS = (3, 9, 5, 30, 1, 60)


class _Numbers:
    """A tokenizer whose texts are the numbers of their tokens."""

    pad_token_id, eos_token_id = PAD, END

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(f" {token}" for token in ids if token > END or not skip_special_tokens)


READER = Reader(_Numbers(), POSITIONS, frozenset({END}))


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            max_position_embeddings=POSITIONS,
        )
    )


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=POSITIONS,
            initializer_range=0.3,
            bos_token_id=END,
            eos_token_id=END,
        )
    )


def _t5() -> PreTrainedModel:
    settings: dict[str, Any] = {"decoder_start_token_id": PAD}
    model: PreTrainedModel = T5ForConditionalGeneration(
        T5Config(vocab_size=WORDS, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, **settings)
    )
    for parameter in model.parameters():  # else it says the same to everything
        nn.init.normal_(parameter, std=0.4)
    return model


def _bart() -> PreTrainedModel:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=WORDS,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=POSITIONS,
            init_std=0.4,
            bos_token_id=END,
            eos_token_id=END,
            pad_token_id=PAD,
            decoder_start_token_id=END,
            forced_eos_token_id=END,
        )
    )


def _two_berts() -> PreTrainedModel:
    part: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    part |= {"num_attention_heads": 4, "max_position_embeddings": POSITIONS, "initializer_range": 0.4}
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**part), BertConfig(**part))
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, PAD, END
    return EncoderDecoderModel(config)


@pytest.fixture
def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(2, WORDS) for _ in range(length)] for length in LENGTHS]


def _made(make: Callable[[], PreTrainedModel], stack: Sequence[Any] = ()) -> PreTrainedModel:
    torch.manual_seed(0)
    model = make()
    if stack:
        attach(model, list(stack), seed=3)
    model.eval()
    return model


def _one_by_one(model: Any, prompt: Sequence[int], tokens: int) -> str:
    """Greedy generation as in the books: the whole prompt again for each token, without padding and without a cache."""
    said: list[int] = []
    start = [model.config.decoder_start_token_id] if model.config.is_encoder_decoder else []
    for _ in range(tokens):
        if model.config.is_encoder_decoder:
            inputs = {"input_ids": [list(prompt)], "decoder_input_ids": [[*start, *said]]}
        else:
            inputs = {"input_ids": [[*prompt, *said]]}
        with torch.no_grad():
            logits = model(**{name: torch.tensor(ids) for name, ids in inputs.items()}, use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token == END:
            break
        said.append(token)
    return READER.tokenizer.decode(said, skip_special_tokens=True).strip()  # type: ignore[no-any-return]


STACKS: list[list[Any]] = [
    [],
    [{"prefix": {"length": 4}}],
    [{"prompt-tuning": {"num_virtual_tokens": 4}}],
    [{"prefix-tuning": {"num_virtual_tokens": 4}}],
]


@pytest.mark.parametrize("stack", STACKS, ids=str)
@pytest.mark.parametrize("make", [_llama, _gpt2])
def test_prompts_of_unequal_length_are_answered_as_one_by_one(
    make: Callable[[], PreTrainedModel], stack: list[Any], prompts: list[list[int]]
) -> None:
    model = _made(make, stack)
    expected = [_one_by_one(model, prompt, 12) for prompt in prompts]
    assert len(set(expected)) == len(expected)
    assert generate_texts(model, prompts, READER, tokens=12) == expected


@pytest.mark.parametrize("make", [_t5, _bart, _two_berts])
def test_what_an_encoder_reads_is_answered_as_one_by_one(
    make: Callable[[], PreTrainedModel], prompts: list[list[int]]
) -> None:
    model = _made(make)
    expected = [_one_by_one(model, prompt, 12) for prompt in prompts]
    assert len(set(expected)) > 1
    examples = [AnswerExample(n, prompt, [END], references=["7"]) for n, prompt in enumerate(prompts)]
    answers = answers_to(model, examples, READER, tokens=12, encoder=True)
    assert [answer.prediction for answer in answers] == expected


@pytest.mark.parametrize("together", [1, 3])
def test_answers_do_not_depend_on_how_many_are_made_together(
    prompts: list[list[int]], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _made(_llama)
    expected = generate_texts(model, prompts, READER, tokens=12)
    monkeypatch.setattr("onegpu.recipes.tasks.answering.TOGETHER", together)
    assert generate_texts(model, prompts, READER, tokens=12) == expected


def test_an_answer_ends_where_the_model_has_no_positions_left(prompts: list[list[int]]) -> None:
    draw = random.Random(1)
    long = [[draw.randrange(2, WORDS) for _ in range(length)] for length in (POSITIONS - 3, POSITIONS, POSITIONS + 5)]
    model = _made(_gpt2)
    model.generation_config.eos_token_id = None
    reader = Reader(_Numbers(), POSITIONS)
    found = generate_texts(model, [*long, *prompts[:3]], reader, tokens=12)
    assert [len(text.split()) for text in found] == [3, 0, 0, 12, 12, 12]


def test_an_answer_ends_at_any_stop_token_and_does_not_contain_it(prompts: list[list[int]]) -> None:
    model = _made(_llama)
    free = generate_texts(model, prompts, READER, tokens=12)[0].split()
    stop = int(free[2])
    assert str(stop) not in free[:2]
    stopped = generate_texts(model, prompts, Reader(_Numbers(), POSITIONS, frozenset({END, stop})), tokens=12)
    assert stopped[0].split() == free[:2]


def test_settings_that_came_with_a_base_change_no_answer_and_stay_as_they_are(prompts: list[list[int]]) -> None:
    model = _made(_llama)
    expected = generate_texts(model, prompts, READER, tokens=12)
    quirks = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.3,
        "num_beams": 4,
        "length_penalty": 2.0,
        "early_stopping": True,
        "min_length": 56,
        "max_length": 70,
        "no_repeat_ngram_size": 2,
    }
    model.generation_config.update(**quirks)
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert generate_texts(model, prompts, READER, tokens=12) == expected
    finally:
        logger.removeHandler(handler)
    assert told == []
    assert {name: getattr(model.generation_config, name) for name in quirks} == quirks


@pytest.mark.parametrize("training", [True, False])
def test_generation_is_without_dropout_and_leaves_the_modes_alone(prompts: list[list[int]], training: bool) -> None:
    model = _made(_gpt2)  # which has dropout
    expected = generate_texts(model, prompts, READER, tokens=12)
    model.train(training)
    assert generate_texts(model, prompts, READER, tokens=12) == expected
    assert {module.training for module in model.modules()} == {training}


def test_only_examples_with_a_prompt_are_answered_and_in_their_order(prompts: list[list[int]]) -> None:
    model = _made(_llama)
    examples = [AnswerExample(n, prompt, [], 0, prompt, [str(n)]) for n, prompt in enumerate(prompts)]
    examples[2] = AnswerExample(2, prompts[2], [])
    answers = answers_to(model, examples, READER, tokens=5)
    assert [answer.references for answer in answers] == [["0"], ["1"], ["3"], ["4"], ["5"]]
    said = generate_texts(model, prompts, READER, tokens=5)
    assert [answer.prediction for answer in answers] == [said[n] for n in (0, 1, 3, 4, 5)]


@pytest.mark.parametrize(
    ("prompt", "limit", "begin", "kept"),
    [
        ([5, 6, 7], 3, 5, [5, 6, 7]),
        ([5, 6, 7, 8], 3, 5, [5, 7, 8]),
        ([5, 6, 7, 8], 3, None, [6, 7, 8]),
        ([5, 6, 7, 8], 3, 9, [6, 7, 8]),
        ([], 3, 5, []),
    ],
)
def test_a_long_prompt_keeps_its_end(prompt: list[int], limit: int, begin: int | None, kept: list[int]) -> None:
    assert prompt_within(prompt, limit, begin) == kept


# --- scores -----------------------------------------------------------------------------------------------------------

ANSWERS = [
    Answer("the cat sat on the mat", ["the cat sat on a mat", "it sat"]),
    Answer("a dog barked at night", ["the dog barked all night"]),
]


def test_the_scores_are_those_that_the_metrics_name() -> None:
    scores = text_scores(["rouge", "exact-match", "chrf"], ANSWERS)
    assert list(scores) == ["rougeL", "rouge1", "rouge2", "exact_match", "chrf"]
    assert list(text_measures(["rouge", "exact-match", "chrf"])) == list(scores)
    assert text_scores([], ANSWERS) == {}


def test_each_score_is_its_librarys() -> None:
    predictions = [answer.prediction for answer in ANSWERS]
    columns: list[Any] = [["the cat sat on a mat", "the dog barked all night"], ["it sat", None]]
    scores = text_scores(["bleu", "chrf", "exact-match", "token-f1"], ANSWERS)
    assert scores["bleu"] == pytest.approx(BLEU().corpus_score(predictions, columns).score)
    assert scores["chrf"] == pytest.approx(CHRF().corpus_score(predictions, columns).score)
    assert scores["exact_match"] == 0.5  # articles do not count
    # "dog barked at night" and "dog barked all night" share three of four words each.
    assert scores["token_f1"] == pytest.approx((1 + 3 / 4) / 2)


def test_bleu_finds_words_as_it_is_told() -> None:
    answers = [Answer("今天天气很好", ["今天天气不好"])]
    plain, characters = (text_scores(["bleu"], answers, tokeniser=kind)["bleu"] for kind in ("13a", "zh"))
    assert plain < 1 < characters


def test_a_score_of_no_answers_is_refused() -> None:
    with pytest.raises(DataError, match="no texts to score"):
        text_scores(["exact-match"], [])
