"""Talk to a fine-tuned model: base and adapter as the manifest names them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onegpu.adapters import ArtefactError, artefact, load, load_base
from onegpu.adapters.pretrained import read_tokenizer, readable
from onegpu.adapters.sources import locate

from .facts import check_tokenizer, facts_of
from .runfolder import adapter_folder
from .tasks import Reader
from .tasks.chat import answer

__all__ = ["open_chat"]


def open_chat(folder: Path, tokens: int, *, allow_base_mismatch: bool = False) -> Callable[[str], str]:
    """Load the model of a run or adapter folder; returns a function that answers and remembers the conversation.

    Raises:
        ArtefactError: not an adapter folder, or not one of a chat task.
        RecipeError, Unavailable: its base is not here.
    """
    adapter = adapter_folder(folder)
    manifest = artefact.read(adapter).manifest
    facts = facts_of(adapter, manifest)
    trained = facts.task
    if "chat" not in {**trained, **_taught(trained)} or manifest.base.source is None:
        raise ArtefactError(f"{folder} was not trained by the task `chat`")
    source = locate(manifest.base.source, revision=manifest.base.revision)
    stack = artefact.specs(manifest)
    with readable(f"base {source.written!r} has no tokenizer that can be read"):
        tokenizer = read_tokenizer(source.materialise(), source.revision)
    check_tokenizer(adapter, facts, tokenizer, allow=allow_base_mismatch)
    model = load_base(source, stack, precision=manifest.base.precision)
    load(model, adapter, allow_base_mismatch=allow_base_mismatch)
    reader = Reader(tokenizer, limit=tokenizer.model_max_length, stops=frozenset(facts.stop_tokens))
    messages: list[dict[str, str]] = []

    def talk(text: str) -> str:
        messages.append({"role": "user", "content": text})
        reply = answer(model, reader, messages, tokens)
        messages.append({"role": "assistant", "content": reply})
        return reply

    return talk


def _taught(trained: Mapping[str, Any]) -> Mapping[str, Any]:
    """The task inside a distillation; nothing of others."""
    inside = trained.get("distillation", {}).get("task", {})
    return inside if isinstance(inside, Mapping) else {}
