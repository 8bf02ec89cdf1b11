"""What the manifest of an adapter says of the run that wrote it, checked where it is used again."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from onegpu.adapters import ArtefactError
from onegpu.adapters.manifest import Manifest
from onegpu.adapters.validation import faults

from .tokenizers import tokenizer_digest

__all__ = ["Facts", "check_tokenizer", "facts_of"]


class Facts(BaseModel):
    """Those facts of a run that evaluating, chatting and continuing need; the others are for people."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    task: dict[str, dict[str, Any]] = {}
    train: dict[str, Any] | None = None
    labels: list[str] | None = None
    class_weights: list[float] | None = None
    stop_tokens: list[int] = []
    tokenizer: dict[str, str] | None = None  # digests, as `tokenizer_digest` gives them


def facts_of(folder: str | Path, manifest: Manifest) -> Facts:
    """The facts in a manifest that somebody else may have written.

    Raises:
        ArtefactError: they are not what a run writes.
    """
    try:
        return Facts.model_validate(manifest.run)
    except ValidationError as error:
        texts = [f"run.{'.'.join(map(str, f.path))[:200]}: {f.message}" for f in faults(error, Facts)]
        raise ArtefactError(f"{folder}: its manifest was not written by a run: {'; '.join(texts[:5])}") from None


def check_tokenizer(folder: str | Path, facts: Facts, tokenizer: Any, *, allow: bool) -> list[str]:
    """See that texts become the tokens that an adapter was trained on; what differs is returned, where allowed.

    Raises:
        ArtefactError: another vocabulary, chat template or way from a text to tokens, and that is not allowed.
    """
    here = tokenizer_digest(tokenizer)
    changed = [
        f"its {kind.replace('_', ' ')} was {digest[:24]} and is {here.get(kind)}"
        for kind, digest in sorted((facts.tokenizer or {}).items())
        if here.get(kind) != digest
    ]
    if not changed:
        return []
    if not allow:
        raise ArtefactError(
            f"{folder} was trained with another tokenizer than that of this base: {'; '.join(changed[:3])}. Pass "
            "`--allow-base-mismatch` to go on all the same"
        )
    return [f"values that were trained with another tokenizer: {'; '.join(changed[:3])}"]
