"""Three tiny Llamas that can chat, ten conversations, and ways to see what a library says while it works."""

import logging
import string
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "wide-heads": {"head_dim": 16},
    "wider": {"hidden_size": 128, "intermediate_size": 256},  # what bitsandbytes packs in blocks
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = 1
ANSWERS = ["hello.", "two, three.", "no.", "b", "all right: this one is longer.", "rain", "an answer of many words"]
ANSWERS += ["1 2 3", "x", "sleep well!"]
QUESTIONS = ["hi", "one?", "why is it so?", "a", "say something longer now", "sun or rain?", "q", "count", "name"]
QUESTIONS += ["good night"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Silent, without trackers or checkpoints, on the CPU: nothing of this changes what is computed.
QUIET: dict[str, Any] = {
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Characters as tokens; padding is the end token, as SmolLM2's is."""
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


@cache
def folder(variant: str = "plain") -> Path:
    """Where a tiny Llama lies, with the tokenizer."""
    place = Path(mkdtemp(prefix="onegpu-peers-")) / variant
    config = LlamaConfig(**(LLAMA | VARIANTS[variant]))
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


def scratch() -> str:
    """A new folder."""
    return mkdtemp(prefix="onegpu-peers-")


def model(variant: str = "plain", **options: Any) -> Any:
    """A new instance in float32."""
    return AutoModelForCausalLM.from_pretrained(folder(variant), **({"dtype": torch.float32} | options))


def lora(base: Any = None, **settings: Any) -> Any:
    """A model of PEFT's with LoRA that does something."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"r": 4, "target_modules": LINEARS, "task_type": "CAUSAL_LM"} | settings
    wrapped = get_peft_model(model() if base is None else base, LoraConfig(**options))
    stir(wrapped)
    return wrapped


def stir(wrapped: nn.Module) -> None:
    """Move what is trainable off its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter))


def saved(wrapped: Any = None) -> Path:
    """The folder of a LoRA as PEFT saves it."""
    place = Path(scratch()) / "adapter"
    (lora() if wrapped is None else wrapped).save_pretrained(str(place))
    return place


def loaded(place: Path, base: Any = None) -> Any:
    """It on a base, as its users load it."""
    return PeftModel.from_pretrained(model() if base is None else base, str(place))


def ids() -> torch.Tensor:
    """Two rows of seven tokens."""
    return torch.randint(5, 47, (2, 7), generator=torch.Generator().manual_seed(3))


def logits(of: Any, **inputs: Any) -> torch.Tensor:
    """In evaluation mode, for `ids()` unless told."""
    of.eval()
    with torch.no_grad():
        found: torch.Tensor = of(**({"input_ids": ids()} | inputs)).logits.float()
    return found


def rows(count: int = 10) -> Dataset:
    """Conversations of unequal length."""
    pairs = list(zip(QUESTIONS, ANSWERS, strict=True))[:count]
    return Dataset.from_list([{"messages": _talk(*pair)} for pair in pairs])


def _talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def tokenised() -> Dataset:
    """The same as tokens, with every token as its own label."""
    return rows().map(_tokens, remove_columns=["messages"])


def _tokens(row: dict[str, Any]) -> dict[str, Any]:
    found = list(tokenizer().apply_chat_template(row["messages"])["input_ids"])
    return {"input_ids": found, "labels": found}


def padded(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator that pads by length, as transformers' own for sequence-to-sequence does."""
    longest = max(len(e["input_ids"]) for e in examples)
    fill = [longest - len(e["input_ids"]) for e in examples]
    pairs = list(zip(examples, fill, strict=True))
    return {
        "input_ids": torch.tensor([e["input_ids"] + [END] * n for e, n in pairs]),
        "attention_mask": torch.tensor([[1] * len(e["input_ids"]) + [0] * n for e, n in pairs]),
        "labels": torch.tensor([e["labels"] + [-100] * n for e, n in pairs]),
    }


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of the second."""
    norm = sum(float(t.double().square().sum()) for t in theirs.values())
    return float((sum(float((ours[n].double() - t.double()).square().sum()) for n, t in theirs.items()) / norm) ** 0.5)


@dataclass
class Seen:
    """What happened while a library worked."""

    result: Any = None
    error: BaseException | None = None
    warned: list[str] = field(default_factory=list)

    def said(self, *about: str) -> str:
        """Whether it refused or warned, as a phrase; where words are given, only warnings with one of them count."""
        if self.error is not None:
            return f"refused with `{type(self.error).__name__}` ({_sentence(str(self.error))})"
        found = [text for text in self.warned if not about or any(word.lower() in text.lower() for word in about)]
        return f"goes on with a warning ({_sentence(found[0])})" if found else "goes on, no warning"


def watch(action: Callable[[], Any]) -> Seen:
    """Do something a user does, and note its result, error, warnings and logged warnings."""
    seen = Seen()
    with warnings.catch_warnings(record=True) as caught, _logged() as records:
        warnings.simplefilter("always")
        try:
            seen.result = action()
        except Exception as cause:
            seen.error = cause
    told = [str(w.message) for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
    seen.warned = [*told, *(r.getMessage() for r in records if r.levelno >= logging.WARNING)]
    return seen


@contextmanager
def _logged() -> Iterator[list[logging.LogRecord]]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("", "transformers", "peft", "trl", "accelerate")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield records
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _sentence(text: str, longest: int = 110) -> str:
    """The beginning of a message, without paths of this machine."""
    flat = " ".join(text.split()).replace("|", "/")
    for word in flat.split():
        if word.strip("'\"`:,.").startswith(("/tmp", "/root")):
            flat = flat.replace(word, "...")
    return flat if len(flat) <= longest else flat[:longest].rpartition(" ")[0] + " ..."
