"""What the tests of recipes share: tiny bases with tokenizers, rows, and recipes that run in a fraction of a second."""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    logging as transformers_logging,
)

from onegpu.recipes import Loaded, Outcome, parse_recipe, run as run_recipe
from onegpu.recipes.display import Display
from onegpu.recipes.tasks import Reader

transformers_logging.disable_progress_bar()

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["the", "a", "cat", "dog", "sun", "rain", "goal", "ball", "stocks", "rise", "fall", "bank", "team", "wins"]
WORDS += ["loses", "again", "and", "of", "in", "at"]
CONVERSATIONS = [
    [("Hi", "Hello."), ("Who?", "Me.")],
    [("One?", "Two, three.")],
    [("Why is it so?", "No.")],
    [("A", "B")],
    [("Say something longer now", "All right: this one is longer."), ("And?", "Stop.")],
    [("Sun or rain?", "Rain"), ("Sure?", "Quite sure")],
    [("Q", "An answer of many words")],
    [("Count", "1 2 3"), ("Again", "1 2"), ("More", "1")],
    [("Name", "X")],
    [("Good night", "Sleep well!")],
]

Row = dict[str, Any]
Settings = Mapping[str, Any]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On matrices this small, threads wait for one another longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def messages() -> Callable[..., list[dict[str, str]]]:
    """`messages(("Hi", "Hello."), system="Be kind.")`: turns of user and assistant as a conversation."""

    def build(*turns: tuple[str, str], system: str | None = None) -> list[dict[str, str]]:
        found = [{"role": "system", "content": system}] if system is not None else []
        for user, assistant in turns:
            found += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        return found

    return build


@pytest.fixture
def rows(messages: Callable[..., list[dict[str, str]]]) -> list[Row]:
    """Ten conversations of unequal length."""
    return [{"messages": messages(*turns)} for turns in CONVERSATIONS]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """Bytes as tokens, so that decoding loses nothing; like SmolLM2's, padding is the end token. Do not change it."""
    specials = ["<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*specials, *alphabet])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
        model_max_length=256,
    )


@pytest.fixture(scope="session")
def chat_base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny random Llama that can chat. Its weights are large enough for gradients well above rounding."""
    folder = tmp_path_factory.mktemp("chat-base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def class_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT without a head and without dropout, with words as tokens."""
    folder = tmp_path_factory.mktemp("class-base")
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {token: i for i, token in enumerate([*specials, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    return folder


@pytest.fixture
def texts() -> list[Row]:
    """Ten texts of unequal length in three classes."""
    labels = ["weather", "sports", "money"]
    return [
        {"text": " ".join(WORDS[(3 * i + k) % len(WORDS)] for k in range(2 + i % 5)), "label": labels[i % 3]}
        for i in range(10)
    ]


@pytest.fixture
def reader(chat_base: Path) -> Reader:
    """What the tiny chat base reads rows with."""
    return Reader(AutoTokenizer.from_pretrained(chat_base), 256, frozenset({1}))


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """`jsonl(rows, "train.jsonl")`: the file with these rows."""

    def write(rows: Sequence[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return path

    return write


@pytest.fixture
def chat_recipe(chat_base: Path, rows: list[Row], jsonl: Callable[..., Path]) -> Callable[..., Loaded]:
    """`chat_recipe(adapters=[...], task={...}, train={...})`: a recipe over the tiny chat base and the ten rows."""
    data = jsonl(rows)

    def load(
        adapters: Sequence[Any] = ({"lora": {"rank": 4}},),
        *,
        base: str | Path = chat_base,
        task: Settings | None = None,
        train: Settings | None = None,
        adapter: str | None = None,
    ) -> Loaded:
        content = {
            "base": str(base),
            "adapters": list(adapters),
            "task": {"chat": {"data": str(data), "evaluation": "none"} | dict(task or {})},
            "train": {"steps": 2, "effective_batch": 4, "precision": "fp32", "learning_rate": 0.01} | dict(train or {}),
        }
        if adapter is not None:
            content["adapter"] = adapter
        return parse_recipe(yaml.safe_dump(content), name="recipe.yaml", folder=data.parent)

    return load


@pytest.fixture
def class_recipe(class_base: Path, texts: list[Row], jsonl: Callable[..., Path]) -> Callable[..., Loaded]:
    """The same over the tiny BERT and the ten texts."""
    data = jsonl(texts, "texts.jsonl")

    def load(
        adapters: Sequence[Any] = ({"lora": {"rank": 4}},),
        *,
        task: Settings | None = None,
        train: Settings | None = None,
    ) -> Loaded:
        content = {
            "base": str(class_base),
            "adapters": list(adapters),
            "task": {"classification": {"data": str(data), "evaluation": "none"} | dict(task or {})},
            "train": {"steps": 2, "effective_batch": 4, "precision": "fp32", "learning_rate": 0.01} | dict(train or {}),
        }
        return parse_recipe(yaml.safe_dump(content), name="recipe.yaml", folder=data.parent)

    return load


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Outcome]:
    """`run(loaded, "name", resume=True)`: the real thing, silent, into a folder of that name."""

    def go(loaded: Loaded, name: str = "out", *, resume: bool = False) -> Outcome:
        outcome = run_recipe(loaded, tmp_path / name, resume=resume, display=Display(quiet=True))
        assert outcome is not None
        return outcome

    return go


@pytest.fixture
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """The lines of a run folder's metrics that are about steps."""

    def read(folder: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        return [line for line in lines if "evaluation" not in line]

    return read


@pytest.fixture
def evaluations() -> Callable[[Path], list[dict[str, Any]]]:
    """The lines of a run folder's metrics that are about evaluations."""

    def read(folder: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        return [line for line in lines if "evaluation" in line]

    return read


@pytest.fixture
def saved_tensors() -> Callable[[Path], dict[str, Tensor]]:
    """Every tensor of an adapter folder, by file and key."""

    def read(folder: Path) -> dict[str, Tensor]:
        found = {
            f"{path.parent.relative_to(folder)}:{key}": tensor
            for path in sorted(folder.rglob("*.safetensors"))
            for key, tensor in load_file(path).items()
        }
        assert found
        return found

    return read


@pytest.fixture
def folder_bytes() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a folder by its relative name."""

    def read(folder: Path) -> dict[str, bytes]:
        found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        assert found
        return found

    return read


@pytest.fixture
def onegpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`onegpu("run", "recipe.yaml")`: the command line in this process; returns exit code, output and errors."""
    from onegpu.recipes import cli

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["onegpu", *arguments])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


class _Distribution(metadata.Distribution):
    """A distribution that is installed nowhere."""

    def __init__(self, name: str) -> None:
        self.text = f"Name: {name}\nVersion: 1.0\n"

    def read_text(self, filename: str) -> str | None:
        return self.text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """`declare("onegpu.adapters", "toy", "toy_package:Toy")`: an entry point of a distribution `other`, beside all."""
    real = metadata.entry_points
    made: list[metadata.EntryPoint] = []

    def found(*, group: str) -> list[metadata.EntryPoint]:
        return [*real(group=group), *(point for point in made if point.group == group)]

    def add(group: str, name: str, value: str) -> None:
        point = metadata.EntryPoint(name, value, group)
        vars(point).update(dist=_Distribution("other"))
        made.append(point)

    monkeypatch.setattr(metadata, "entry_points", found)
    return add


@pytest.fixture
def reading() -> Callable[..., AbstractContextManager[Mapping[type[BaseModel], set[str]]]]:
    """`with reading(Train) as found`: which settings are read inside; writing all of them out does not count."""

    @contextmanager
    def look_at(*models: type[BaseModel]) -> Iterator[Mapping[type[BaseModel], set[str]]]:
        found: dict[type[BaseModel], set[str]] = defaultdict(set)
        with pytest.MonkeyPatch.context() as patch:
            for model in models:
                real = model.__getattribute__

                def look(self: Any, name: str, real: Any = real, fields: Any = frozenset(model.model_fields)) -> Any:
                    if name in fields:
                        found[type(self)].add(name)
                    return real(self, name)

                patch.setattr(model, "__getattribute__", look)
            yield found

    return look_at
