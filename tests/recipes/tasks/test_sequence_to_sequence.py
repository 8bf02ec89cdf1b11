from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from onegpu.adapters import DataError, RecipeError, attach
from onegpu.recipes.tasks import Reader, RowProblem
from onegpu.recipes.tasks.answering import Answer
from onegpu.recipes.tasks.sequence_to_sequence import Pair, SequenceToSequence

TASK = SequenceToSequence(data="rows.jsonl")
WORDS = [f"w{i}" for i in range(20)]
FAMILIES = ("t5", "bart", "bert")
SPECIALS = {
    "t5": ["<pad>", "</s>", "<unk>"],
    "bart": ["<s>", "<pad>", "</s>", "<unk>"],
    "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
}
AROUND = {"t5": "$A </s>", "bart": "<s> $A </s>", "bert": "[CLS] $A [SEP]"}
ROLES = {
    "t5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    "bart": {
        "bos_token": "<s>",
        "cls_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
    },
    "bert": {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
}
ENDS = {"t5": 1, "bart": 2, "bert": 3}
ROWS = [
    {
        "source": " ".join(WORDS[(3 * n + k) % 20] for k in range(2 + n % 4)),
        "target": " ".join(WORDS[(n + 7 * k) % 20] for k in range(1 + n % 3)),
    }
    for n in range(10)
]


def _reader(family: str) -> Reader:
    names = SPECIALS[family]
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*names, *WORDS])}, unk_token=ROLES[family]["unk_token"])
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single=AROUND[family], special_tokens=[(name, i) for i, name in enumerate(names) if name in AROUND[family]]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **ROLES[family])
    return Reader(tokenizer, 32, frozenset({ENDS[family]}))


def _model(family: str) -> Any:
    torch.manual_seed(0)
    if family == "t5":
        t5 = T5Config(vocab_size=23, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, dropout_rate=0.0)
        t5.decoder_start_token_id = 0
        return T5ForConditionalGeneration(t5).eval()
    if family == "bart":
        bart = BartConfig(
            vocab_size=24,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
            init_std=0.2,
            dropout=0.0,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
        return BartForConditionalGeneration(bart).eval()
    settings: dict[str, Any] = {
        "vocab_size": 24,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    decoder = BertLMHeadModel(BertConfig(**settings, is_decoder=True, add_cross_attention=True))
    model = EncoderDecoderModel(encoder=BertModel(BertConfig(**settings)), decoder=decoder)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 2
    model.config.pad_token_id = 0
    return model.eval()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """T5, BART, and two BERTs in one."""
    return str(request.param)


@pytest.fixture
def reader(family: str) -> Reader:
    return _reader(family)


@pytest.fixture
def model(family: str) -> Any:
    """A tiny random encoder-decoder without dropout."""
    return _model(family)


@pytest.fixture
def pairs(reader: Reader) -> list[Pair]:
    return [pair for n, row in enumerate(ROWS) for pair in TASK.encode(n, row, reader)]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_pair_is_read_with_the_special_tokens_of_the_base() -> None:
    told = {
        "t5": ("w1 w2</s>", "w3</s>"),
        "bart": ("<s>w1 w2</s>", "<s>w3</s>"),
        # [CLS] is where such a decoder starts: as a label it would come twice.
        "bert": ("[CLS] w1 w2 [SEP]", "w3 [SEP]"),
    }
    for family, (source, target) in told.items():
        reader = _reader(family)
        (pair,) = TASK.encode(4, {"source": "w1 w2", "target": " w3 "}, reader)
        decoded = [reader.tokenizer.decode(ids) for ids in (pair.ids, pair.labels)]
        assert [text.replace(" ", "") for text in decoded] == [text.replace(" ", "") for text in (source, target)]
        assert (pair.row, pair.cut, pair.references, pair.prompt) == (4, 0, ["w3"], [])
        assert pair.size == len(pair.ids) + len(pair.labels)
        assert pair.supervised == len(pair.labels)


def test_an_end_is_put_behind_a_target_where_the_tokenizer_puts_none() -> None:
    reader = _reader("t5")
    reader.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    (pair,) = TASK.encode(0, {"source": "w1", "target": "w3"}, reader)
    assert (len(pair.ids), pair.labels[-1], len(pair.labels)) == (1, 1, 2)


def test_a_tokenizer_of_translations_says_what_a_target_begins_with() -> None:
    """As NLLB's: a text begins with its language, and another one where it is a target."""
    reader = _reader("t5")

    class Translating(PreTrainedTokenizerFast):
        def _switch_to_target_mode(self) -> None:
            self._language("w19")

        def _switch_to_input_mode(self) -> None:
            self._language("w18")

        def _language(self, token: str) -> None:
            self.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{token} $A </s>",
                special_tokens=[(token, self.convert_tokens_to_ids(token)), ("</s>", 1)],
            )

    made: Any = Translating
    tokenizer = made(tokenizer_object=reader.tokenizer.backend_tokenizer, **ROLES["t5"])
    tokenizer._switch_to_input_mode()
    (pair,) = TASK.encode(0, {"source": "w1", "target": "w3"}, replace(reader, tokenizer=tokenizer))
    assert tokenizer.decode(pair.ids).split() == ["w18", "w1", "</s>"]
    assert tokenizer.decode(pair.labels).split() == ["w19", "w3", "</s>"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"source": ""}, "`source` is empty"),
        ({"target": "  "}, "`target` is empty"),
        ({"target": None}, "`target` is not a text"),
        ({"source": ["w1"]}, "`source` is not a text"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(change: dict[str, Any], told: str) -> None:
    with pytest.raises(RowProblem, match=told):
        TASK.encode(0, {"source": "w1", "target": "w2"} | change, _reader("t5"))


def test_a_base_that_cannot_end_is_refused() -> None:
    TASK.check(_reader("bert"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_reader("t5").tokenizer.backend_tokenizer)
    with pytest.raises(RecipeError, match="no end token"):
        TASK.check(Reader(tokenizer, 8))


LONG = {"source": "w1 w2 w3 w4 w5 w6", "target": "w7 w8 w9 w10"}


@pytest.mark.parametrize(
    ("policy", "limits", "source", "target", "cut"),
    [
        ("cut-right", (5, 3), "[CLS] w1 w2 w3 [SEP]", "w7 w8 [SEP]", 5),
        ("cut-left", (5, 3), "[CLS] w4 w5 w6 [SEP]", "w9 w10 [SEP]", 5),
        ("cut-left", (8, None), "[CLS] w1 w2 w3 w4 w5 w6 [SEP]", "w7 w8 w9 w10 [SEP]", 0),
        ("cut-right", (3, None), "[CLS] w1 [SEP]", "w7 w8 [SEP]", 7),
    ],
)
def test_cutting_leaves_special_tokens_and_is_counted(
    policy: Any, limits: tuple[int, int | None], source: str, target: str, cut: int
) -> None:
    reader = replace(_reader("bert"), limit=limits[0])
    task = SequenceToSequence(data="rows.jsonl", too_long=policy, max_target_length=limits[1])
    (pair,) = task.encode(0, LONG, reader)
    assert [reader.tokenizer.decode(ids) for ids in (pair.ids, pair.labels)] == [source, target]
    assert pair.cut == cut
    assert pair.references == [LONG["target"]]  # what is right does not change with what is taught


def test_what_is_too_long_is_an_error_or_dropped() -> None:
    reader = replace(_reader("bert"), limit=7)
    with pytest.raises(DataError, match=r"8 tokens, and max_length is 7: .*\(drop, cut-left, cut-right\)"):
        TASK.encode(2, LONG, reader)
    with pytest.raises(RowProblem, match="too long: above 7 tokens"):
        SequenceToSequence(data="rows.jsonl", too_long="drop").encode(2, LONG, reader)
    reader = replace(reader, limit=8)
    with pytest.raises(DataError, match="its target has 5 tokens, and max_target_length is 4: raise it"):
        SequenceToSequence(data="rows.jsonl", max_target_length=4).encode(2, LONG, reader)
    with pytest.raises(RowProblem, match="target too long: above 4 tokens"):
        SequenceToSequence(data="rows.jsonl", max_target_length=4, too_long="drop").encode(2, LONG, reader)
    with pytest.raises(RecipeError, match="no room beside the special tokens"):
        SequenceToSequence(data="rows.jsonl", too_long="cut-left").encode(2, LONG, replace(reader, limit=2))


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")
def test_loss_and_gradients_are_those_of_transformers(model: Any, pairs: list[Pair]) -> None:
    batch = TASK.collate(pairs, 0)
    assert {len(pair.labels) for pair in pairs} != {len(pairs[0].labels)}  # so that some are padded
    objective = TASK.objective(model, batch)
    assert objective.weight == sum(pair.supervised for pair in pairs)
    (objective.total / objective.weight).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    theirs.loss.backward()
    torch.testing.assert_close(objective.total / objective.weight, theirs.loss)
    told = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == told.keys()
    for name, expected in told.items():
        torch.testing.assert_close(ours[name], expected, msg=name, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_any_split_gives_the_same_total_and_scores(
    model: Any, pairs: list[Pair], reader: Reader, smoothing: float
) -> None:
    task = SequenceToSequence(data="rows.jsonl", label_smoothing=smoothing)
    totals, weights, scores = [], [], []
    for size in (1, 2, 7, len(pairs)):
        with torch.no_grad():
            chunks = [pairs[i : i + size] for i in range(0, len(pairs), size)]
            found = [task.objective(model, task.collate(chunk, reader.tokenizer.pad_token_id)) for chunk in chunks]
        totals.append(float(sum(o.total for o in found)))
        weights.append(sum(o.weight for o in found))
        scores.append(task.scores([x for o in found for x in o.outcomes()], (), reader))
    assert len(set(weights)) == 1
    assert totals == pytest.approx([totals[0]] * 4, rel=1e-5)
    assert all(found == pytest.approx(scores[0], rel=1e-5) for found in scores)
    assert scores[0].keys() | {"loss"} == task.measures().keys()


def test_smoothing_is_torchs(pairs: list[Pair]) -> None:
    model = _model("t5")
    pairs = [pair for n, row in enumerate(ROWS) for pair in TASK.encode(n, row, _reader("t5"))]
    batch = TASK.collate(pairs, 0)
    with torch.no_grad():
        ours = SequenceToSequence(data="rows.jsonl", label_smoothing=0.2).objective(model, batch).total
        logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).logits
    loss = torch.nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(ours, loss(logits.flatten(0, 1), batch["labels"].flatten()))


def test_a_model_that_does_not_say_where_its_decoder_starts_is_refused(pairs: list[Pair]) -> None:
    with pytest.raises(RecipeError, match="Linear does not say where its decoder starts"):
        TASK.objective(torch.nn.Linear(1, 1), TASK.collate(pairs, 0))


# --- answers ----------------------------------------------------------------------------------------------------------


def test_it_learns_to_write_the_target_and_to_stop(model: Any, pairs: list[Pair], reader: Reader) -> None:
    task = SequenceToSequence(data="rows.jsonl", metrics=["exact-match", "bleu"], answer_tokens=6)
    before = task.scores(_outcomes(model, pairs), task.answer(model, pairs, reader), reader)
    stack = attach(model, ["full"])
    optimizer = torch.optim.AdamW(list(stack.trainable().values()), lr=5e-3)
    batch = task.collate(pairs, reader.tokenizer.pad_token_id)
    for _ in range(80):
        optimizer.zero_grad()
        objective = task.objective(model, batch)
        (objective.total / objective.weight).backward()
        optimizer.step()
    answers = task.answer(model, pairs, reader)
    scores = task.scores(_outcomes(model, pairs), answers, reader)
    assert scores["exact_match"] == 1.0 > before["exact_match"]
    assert scores["token_accuracy"] == 1.0
    assert list(answers) == [Answer(row["target"], [row["target"]]) for row in ROWS]
    assert task.measures().keys() == scores.keys() | {"loss"}
    assert list(task.measures())[:2] == ["exact_match", "bleu"]
    assert task.demonstrate(model, reader, ROWS[3]) == (ROWS[3]["source"], ROWS[3]["target"])


def _outcomes(model: Any, pairs: list[Pair]) -> list[Any]:
    with torch.no_grad():
        return list(TASK.objective(model, TASK.collate(pairs, 0)).outcomes())


def test_nothing_is_generated_where_no_metric_is_named(pairs: list[Pair], reader: Reader) -> None:
    assert TASK.answer(torch.nn.Linear(1, 1), pairs, reader) == ()


def test_a_probe_feeds_both_sides(model: Any, pairs: list[Pair], reader: Reader) -> None:
    probe = TASK.probe(pairs[3], 2)
    assert probe == {"input_ids": pairs[3].ids[:2], "decoder_input_ids": pairs[3].labels[:2]}
    with torch.no_grad():
        logits = model(**{name: torch.tensor([ids]) for name, ids in probe.items()}).logits
    assert logits.shape[:2] == (1, 2)
    (source, told), (target, taught) = TASK.explain(pairs[3], reader)
    assert (told, taught) == (None, "")
    assert ROWS[3]["source"] in source
    assert ROWS[3]["target"] in target
