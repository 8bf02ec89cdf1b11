"""Makes an encoder-decoder of two encoders: one reads, the other writes (https://arxiv.org/abs/1907.12461).

The second model becomes a decoder: it looks at earlier tokens only, and at the first model's output through
cross-attention. Cross-attention, and what the second model's checkpoint lacks of an output layer, start random; the
configuration lists them, so that a run trains and saves them whatever adapter it has (see `structure.new_modules`).
"""

import hashlib
import sys
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    EncoderDecoderModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from .contract import SAFELY
from .errors import RecipeError
from .files import atomic_folder, cache_folder
from .pretrained import read_config, read_tokenizer, readable, refuse_detours
from .quiet import quietly
from .structure import NEW_MODULES, family

__all__ = ["compose", "composed"]

VERSION = 1  # of what `compose` writes
SEED = 0  # of the tensors that start random: the same for everybody


def composed(encoder: Path, decoder: Path) -> Path:
    """The folder of the model made of two; written at first use, into the cache.

    Raises:
        RecipeError: see `compose`.
    """
    digest = hashlib.sha256(str(VERSION).encode())
    for part in (encoder, decoder):
        digest.update(_digest(part))
    folder = cache_folder() / "composed" / f"{encoder.name}+{decoder.name}-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        print(f"composing {encoder.name} and {decoder.name} in the cache, once", file=sys.stderr)
        with atomic_folder(folder) as partial:
            compose(encoder, decoder, partial)
    return folder


def _digest(folder: Path) -> bytes:
    """Of all files of a model, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        with path.open("rb") as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.digest()


def compose(encoder: Path, decoder: Path, folder: Path) -> None:
    """Write the model in float32, with configuration and tokenizer, to `folder`; the same bytes every time.

    Raises:
        RecipeError: a part is no encoder, or cannot decode; its checkpoint lacks tensors; their vocabularies differ.
    """
    with quietly(), torch.random.fork_rng():
        torch.manual_seed(SEED)
        tokenizer = _shared_tokenizer(encoder, decoder)
        model = _joined(encoder, decoder)
        _name_special_tokens(model, tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _joined(encoder: Path, decoder: Path) -> EncoderDecoderModel:
    reads, _ = _read(encoder, AutoModel, _encoder_config(encoder))
    config = _encoder_config(decoder)
    config.is_decoder = config.add_cross_attention = True
    writes, fresh = _read(decoder, AutoModelForCausalLM, config)
    try:
        model = EncoderDecoderModel(encoder=reads, decoder=writes)
    except ValueError as cause:
        raise RecipeError(f"base part {str(decoder)!r} cannot be a decoder: {cause}") from cause
    fresh = {f"decoder.{name}" for name in fresh}
    fresh |= {name for name, _ in model.named_parameters() if name.startswith("enc_to_dec_proj.")}  # of unequal widths
    started = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in fresh}
    setattr(model.config, NEW_MODULES, list(_outermost(model, started)))
    for part in _parts(model):
        part._name_or_path = ""  # a path of this machine
    return model


def _encoder_config(place: Path) -> PreTrainedConfig:
    """The configuration of a part, which must be a model that only encodes."""
    with readable(f"base part {str(place)!r} cannot be read"):
        refuse_detours(place)
        config = read_config(place)
        with torch.device("meta"):
            found, kind = family(AutoModel.from_config(config))
    if found != "encoders":
        raise RecipeError(f"base part {str(place)!r} is {kind}; both parts must be models that only encode, as BERT is")
    return config


def _read(place: Path, auto: Any, config: PreTrainedConfig) -> tuple[PreTrainedModel, Set[str]]:
    """A part, and the names of its tensors that started random; of what it has as an encoder, none may."""
    with readable(f"base part {str(place)!r} cannot be a decoder"):
        model, info = auto.from_pretrained(
            place, config=config, dtype=torch.float32, output_loading_info=True, **SAFELY
        )
    with torch.device("meta"):
        known = AutoModel.from_config(read_config(place)).state_dict()
    prefix = f"{model.base_model_prefix}."
    missing = {name: name.removeprefix(prefix) for name in info["missing_keys"]}
    # Nothing in an encoder-decoder reads what its encoder pools.
    lost = sorted(name for name in missing.values() if name in known and not name.startswith("pooler."))
    if lost:
        raise RecipeError(f"base part {str(place)!r}: the checkpoint has no weights for {lost[0]}")
    return model, missing.keys()


def _outermost(module: nn.Module, started: Set[int], path: str = "") -> Iterator[str]:
    """Paths of the largest modules whose every tensor started random.

    A bias beside a tied output layer is in none of them; it stays zero, as in models that have none.
    """
    for name, child in module.named_children():
        own = [id(p) in started for p in child.parameters()]
        if own and all(own):
            yield f"{path}{name}"
        else:
            yield from _outermost(child, started, f"{path}{name}.")


def _shared_tokenizer(encoder: Path, decoder: Path) -> Any:
    with readable("a part of the base has no tokenizer that can be read"):
        first, second = (read_tokenizer(part) for part in (encoder, decoder))
    for part, tokenizer in ((encoder, first), (decoder, second)):
        if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):  # what transformers makes of no file
            raise RecipeError(f"base part {str(part)!r} has no tokenizer")
    if first.get_vocab() != second.get_vocab():
        raise RecipeError("the parts of the base have different vocabularies: one tokenizer must serve both")
    lacking = [kind for kind in ("cls_token", "sep_token", "pad_token") if getattr(first, kind) is None]
    if lacking:
        raise RecipeError(f"base part {str(encoder)!r}: its tokenizer has no {lacking[0]}, where a text begins or ends")
    first.eos_token = first.sep_token
    return first


def _name_special_tokens(model: EncoderDecoderModel, tokenizer: Any) -> None:
    """A target begins where BERT's texts do, at [CLS], and ends at [SEP]."""
    for settings in (model.config, model.generation_config):
        settings.decoder_start_token_id = tokenizer.cls_token_id
        settings.eos_token_id = tokenizer.sep_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    parts = [part.to_dict() for part in _parts(model)]
    model.config.vocab_size = parts[1]["vocab_size"]
    # Both sides must have room.
    bounds = [part["max_position_embeddings"] for part in parts if "max_position_embeddings" in part]
    if bounds:
        model.config.max_position_embeddings = min(bounds)


def _parts(model: EncoderDecoderModel) -> tuple[Any, Any]:
    """The configurations of encoder and decoder."""
    return model.config.encoder, model.config.decoder
