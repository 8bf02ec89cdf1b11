"""Tokenizers compared: what a text, or a conversation, is turned into."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

__all__ = ["tokenizer_digest"]

LEFT_BEHIND = {"truncation": None, "padding": None}  # by the last call


def tokenizer_digest(tokenizer: Any) -> dict[str, str]:
    """By which two tokenizers are compared, as digests.

    Returns:
        vocabulary: tokens and their numbers.
        chat_template: how a conversation becomes text.
        pipeline: everything else from which the tokens of a text follow: how it is normalised and cut, merges, what is
            put around it, which tokens are special.
    """
    return {
        "vocabulary": _digest(repr(sorted(tokenizer.get_vocab().items()))),
        "chat_template": _digest(str(tokenizer.chat_template)),
        "pipeline": _digest(json.dumps(_pipeline(tokenizer), sort_keys=True, default=str)),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _pipeline(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer does, as JSON; the same wherever its files lie."""
    if tokenizer.is_fast:
        inner = _told(json.loads(tokenizer.backend_tokenizer.to_str()) | LEFT_BEHIND)
    else:
        inner = {"class": type(tokenizer).__qualname__, "files": _files(tokenizer), "settings": _settings(tokenizer)}
    return {
        "inner": inner,
        "specials": tokenizer.special_tokens_map,
        "truncates": tokenizer.truncation_side,
        "splits_specials": bool(getattr(tokenizer, "split_special_tokens", False)),
    }


def _told(value: Any) -> Any:
    """Without what is null, false or empty: a later version of tokenizers writes more such settings for the same."""
    if isinstance(value, Mapping):
        kept = {key: _told(inner) for key, inner in value.items() if inner is not None and inner is not False}
        return {key: inner for key, inner in kept.items() if inner not in ("", [], {})}
    return [_told(inner) for inner in value] if isinstance(value, list) else value


def _files(tokenizer: Any) -> dict[str, str]:
    """Digests of the files that a tokenizer without a backend of its own would save: merges and scores are there."""
    with TemporaryDirectory() as folder:
        try:
            written = tokenizer.save_vocabulary(folder)
        except NotImplementedError:  # it has nothing but a vocabulary
            return {}
        return {Path(path).name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in written or ()}


def _settings(tokenizer: Any) -> dict[str, Any]:
    """Switches and numbers that it was made with; texts among them name places on this machine."""
    given = getattr(tokenizer, "init_kwargs", {})
    return {key: value for key, value in given.items() if isinstance(value, (bool, int))}
