"""What the thirty share: three tiny Llamas that can chat, ten conversations, and recipes that run in a second."""

import json
import shutil
import string
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    logging as transformers_logging,
)

from onegpu.adapters import load_base
from onegpu.recipes import Job, Loaded, Outcome, parse_recipe, run as run_recipe
from onegpu.recipes.display import Display

transformers_logging.disable_progress_bar()

LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # fewer than the query heads, on purpose
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # gradients well above rounding
    "bos_token_id": 0,
    "eos_token_id": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "wide-heads": {"head_dim": 16},  # not hidden / heads
}
# No {% generation %} tags, as with most bases.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [
    [("hi", "hello."), ("who?", "me.")],
    [("one?", "two, three.")],
    [("why is it so?", "no.")],
    [("a", "b")],
    [("say something longer now", "all right: this one is longer."), ("and?", "stop.")],
    [("sun or rain?", "rain"), ("sure?", "quite sure")],
    [("q", "an answer of many words")],
    [("count", "1 2 3"), ("again", "1 2"), ("more", "1")],
    [("name", "x")],
    [("good night", "sleep well!")],
]
QUIET: dict[str, Any] = {"steps": 2, "effective_batch": 4, "precision": "fp32", "learning_rate": 0.01}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On matrices this small, threads wait for one another longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the user."""
    monkeypatch.setenv("ONEGPU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Characters as tokens; like SmolLM2's, padding is the end token. Do not change it."""
    tokens = ["<|im_start|>", "<|im_end|>", "<s>", "<unknown>", *"\n .,:?!", *string.ascii_lowercase, *string.digits]
    inner = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unknown>"))
    inner.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(tokens[:4])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<unknown>",
        chat_template=TEMPLATE,
        model_max_length=256,
    )


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """Folders of the three tiny Llamas, each with the tokenizer."""
    root = tmp_path_factory.mktemp("bases")
    for name, changes in VARIANTS.items():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**(LLAMA | changes))).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in VARIANTS}


@pytest.fixture
def fresh(bases: dict[str, Path]) -> Callable[..., PreTrainedModel]:
    """`fresh("tied", "nf4", precision="bf16")`: a new instance, float32 unless told."""

    def load(variant: str = "plain", *adapters: Any, **options: Any) -> PreTrainedModel:
        return load_base(str(bases[variant]), adapters, **({"precision": "fp32"} | options))

    return load


@pytest.fixture
def templated(bases: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """`templated("...")`: the plain base with another chat template."""

    def change(template: str) -> Path:
        folder = Path(shutil.copytree(bases["plain"], tmp_path / "templated", dirs_exist_ok=True))
        (folder / "chat_template.jinja").write_text(template, "utf-8")
        return folder

    return change


@pytest.fixture
def logits(ids: Tensor) -> Callable[..., Tensor]:
    """What a model says of the shared token ids: (2, 7, vocabulary), without gradients."""

    def of(model: nn.Module, **inputs: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**({"input_ids": ids} | inputs)).logits
        return found

    return of


@pytest.fixture
def gradients(ids: Tensor) -> Callable[..., dict[str, Tensor]]:
    """Gradients of the summed log-probability of token 0."""

    def take(model: nn.Module, parameters: Mapping[str, nn.Parameter], **inputs: Any) -> dict[str, Tensor]:
        for parameter in parameters.values():
            parameter.grad = None
        model(**({"input_ids": ids} | inputs)).logits.float().log_softmax(-1)[..., 0].sum().backward()
        return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}

    return take


@pytest.fixture
def distance() -> Callable[..., float]:
    """Norm of the difference of two sets of tensors, over the norm of the second."""

    def between(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
        assert ours.keys() == theirs.keys()
        norm = sum(float(tensor.double().square().sum()) for tensor in theirs.values())
        assert norm > 0
        apart = sum(float((ours[n].double() - theirs[n].double()).square().sum()) for n in ours)
        return float((apart / norm) ** 0.5)

    return between


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Ten conversations of unequal length."""
    return [
        {"messages": [{"role": r, "content": c} for q, a in turns for r, c in (("user", q), ("assistant", a))]}
        for turns in TURNS
    ]


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """`write_rows(rows, "train.jsonl")`: the file with these rows."""

    def write(rows: Sequence[Any], name: str = "rows.jsonl") -> Path:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return tmp_path / name

    return write


@pytest.fixture
def written(bases: dict[str, Path], rows: list[dict[str, Any]], write_rows: Callable[..., Path]) -> Callable[..., str]:
    """`written(["lora"], train={"steps": 3})`: the text of a chat recipe over a tiny base and the ten rows."""
    data = write_rows(rows)

    def write(adapters: Sequence[Any] = ({"lora": {"rank": 4}},), **sections: Any) -> str:
        content = {
            "base": str(sections.get("base", bases["plain"])),
            "adapters": list(adapters),
            "task": {"chat": {"data": str(data), "evaluation": "none"} | sections.get("task", {})},
            "train": QUIET | sections.get("train", {}),
        }
        return yaml.safe_dump(content | {k: v for k, v in sections.items() if k not in content})

    return write


@pytest.fixture
def recipe(written: Callable[..., str], tmp_path: Path) -> Callable[..., Loaded]:
    """The same, read."""
    return lambda *stack, **sections: parse_recipe(written(*stack, **sections), name="recipe.yaml", folder=tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Outcome]:
    """`run(loaded, "name", resume=True)`: the real thing, silent, into a folder of that name."""

    def go(loaded: Loaded, name: str = "out", *, resume: bool = False) -> Outcome:
        outcome = run_recipe(loaded, tmp_path / name, resume=resume, display=Display(quiet=True))
        assert outcome is not None
        return outcome

    return go


@pytest.fixture
def damaged(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[PreTrainedModel], object]], None]:
    """`damaged(change)`: every base of a run is changed after it was read."""

    def plant(change: Callable[[PreTrainedModel], object]) -> None:
        real = Job.load_base

        def load(job: Job) -> PreTrainedModel:
            model = real(job)
            change(model)
            return model

        monkeypatch.setattr(Job, "load_base", load)

    return plant


@pytest.fixture
def tensors() -> Callable[[Path], dict[str, Tensor]]:
    """Every tensor below a folder, by file and key."""

    def read(folder: Path) -> dict[str, Tensor]:
        files = sorted(folder.rglob("*.safetensors"))
        assert files
        return {f"{f.relative_to(folder)}:{key}": t for f in files for key, t in load_file(f).items()}

    return read


@pytest.fixture
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """The lines of a run's metrics."""
    return lambda folder: [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


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
        return (code, *capsys.readouterr())

    return call
