"""`prefix`: learned keys and values in front of every attention layer.

They enter through transformers' public attention registry, not through a cache: so gradient checkpointing recomputes
them with their layer, `generate` keeps its own cache, and padding may be on either side.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .contract import Adapter, Attachment, Capabilities, Context
from .errors import StackError
from .structure import Addition

__all__ = ["Prefix"]

ATTENTION, LISTENING = "onegpu_prefix", "onegpu_listening"

# These count positions from the padding token on, skipping padding, instead of from zero.
COUNTED_FROM_PADDING = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text", "xmod"}
)


class Prefix(Adapter):
    """Attention over [P_k; K] and [P_v; V], with P_k, P_v: (key-value heads, length, head size) learned per layer.

    Positions of the tokens start at `length`, as if the prefix had been read before them. By default the prefix starts
    as the keys and values that the base computes for a text (or for random tokens), which trains far better than noise;
    a fresh one therefore acts like that text as a prompt, and the base's outputs do change.

    Source: Li & Liang 2021, https://arxiv.org/abs/2101.00190, equation 3; initialisation: section 7.4.
    """

    api = 1
    capabilities: ClassVar[Capabilities] = Capabilities(
        identity_at_start=False,
        peft_readable=True,
        encoder_decoder=False,
        reasons={"encoder_decoder": "it knows self-attention only", "mergeable": "it adds to keys, not to weights"},
    )

    length: int = Field(default=16, ge=1)
    """Number of learned positions in front of each layer."""

    init: Literal["tokens", "normal"] = "tokens"
    """Start from the base's own keys and values for tokens, or from normal noise (as PEFT does)."""

    text: str | None = None
    """Whose keys and values to start from (cut or repeated to `length` tokens); random tokens when left out."""

    def check(self, skeleton: nn.Module) -> None:
        _refuse_unregistered(skeleton)

    def positions(self) -> int:
        return self.length

    def attach(self, model: nn.Module, context: Context) -> "PrefixAttachment":
        if not isinstance(model, PreTrainedModel):
            raise StackError(f"{context.name}: a prefix needs a transformers model, not {type(model).__name__}")
        generator = torch.Generator().manual_seed(context.seed)
        heard = _listen(model, self._tokens(model, context, generator))
        layers = {}
        for attention, key, value in heard:
            if self.init == "normal":
                key, value = torch.randn(key.shape, generator=generator), torch.randn(value.shape, generator=generator)
            layers[attention] = KeyValues(key.to(model.device), value.to(model.device))
            layers[attention].train(attention.training)
            attention.add_module(f"prefix_{context.name}", layers[attention])
        paths = {module: path for path, module in model.named_modules()}
        return PrefixAttachment(context.name, self, model, {paths[module]: kv for module, kv in layers.items()})

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], targets: Sequence[str]) -> "Prefix":
        """The length is all that matters of it: PEFT saves the keys and values, whatever computed them."""
        return cls(length=config["num_virtual_tokens"])

    def _tokens(self, model: PreTrainedModel, context: Context, generator: torch.Generator) -> Tensor:  # (1, length)
        if self.text is None or not context.fresh:
            vocabulary = int(model.config.get_text_config().vocab_size)
            return torch.randint(vocabulary, (1, self.length), generator=generator)
        if context.tokenizer is None:
            raise StackError(f"{context.name}: `text` needs a tokenizer")
        ids = context.tokenizer(self.text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise StackError(f"{context.name}: `text` has no tokens")
        return torch.tensor([(ids * self.length)[: self.length]])


class KeyValues(Addition):
    """The prefix of one attention layer: (key-value heads, length, head size) each."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.key = nn.Parameter(key.float())
        self.value = nn.Parameter(value.float())
        self.on = True


class PrefixAttachment(Attachment):
    """One named prefix on one model."""

    adapter: Prefix
    head_prefix: ClassVar[str] = "base_model."

    def __init__(self, name: str, adapter: Prefix, model: PreTrainedModel, layers: dict[str, KeyValues]) -> None:
        super().__init__(name, adapter, model)
        self.base_model: PreTrainedModel = model
        self.layers = layers
        for path, layer in layers.items():
            self.parameters[f"{path}.prefix_key.{name}"] = layer.key
            self.parameters[f"{path}.prefix_value.{name}"] = layer.value
        self._positions = _shift_positions(model, adapter.length, self)
        _choose_attention(model)

    @property
    def on(self) -> bool:
        """Whether the prefix takes part."""
        return next(iter(self.layers.values())).on

    def enabled(self, on: bool) -> None:
        for layer in self.layers.values():
            layer.on = on
        _choose_attention(self.base_model)

    def detach(self) -> None:
        self._positions.remove()
        for path in self.layers:
            delattr(self.base_model.get_submodule(path), f"prefix_{self.name}")
        _choose_attention(self.base_model)

    def _in_order(self) -> list[Tensor]:
        """Key and value of the first layer, of the second, ...; each (heads, length, head size)."""
        return [tensor.detach() for layer in self.layers.values() for tensor in (layer.key, layer.value)]

    @property
    def _uniform(self) -> bool:
        return len({tensor.shape for tensor in self._in_order()}) == 1

    def tensors(self) -> dict[str, Tensor]:
        """PEFT's one tensor (length, layers * 2 * heads * head size) where all layers have one shape."""
        if not self._uniform:
            return super().tensors()
        stacked = torch.stack(self._in_order())  # (layers * 2, heads, length, size)
        return {"prompt_embeddings": stacked.permute(2, 0, 1, 3).reshape(self.adapter.length, -1)}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if not self._uniform:
            super().load_tensors(tensors)
            return
        own = self._in_order()
        heads, length, size = own[0].shape
        flat = tensors["prompt_embeddings"].view(length, len(own), heads, size)
        with torch.no_grad():
            for mine, loaded in zip(own, flat.permute(1, 2, 0, 3), strict=True):
                mine.copy_(loaded)

    def resolved(self) -> dict[str, Any]:
        return {"layers": list(self.layers)}

    def peft_config(self) -> dict[str, Any] | None:
        if not self._uniform:
            return None
        heads, length, size = self._in_order()[0].shape
        return {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": length,
            "num_layers": len(self.layers),
            "num_attention_heads": heads,
            "token_dim": heads * size,
            "num_transformer_submodules": 1,
        }


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention with the prefixes of this layer in front.

    key, value: (batch, key-value heads, tokens, size); attention_mask: (batch, 1, queries, tokens).
    """
    queries, tokens = query.shape[2], key.shape[2]
    if attention_mask is None and queries > 1 and getattr(module, "is_causal", False):
        # The kernel's own causal mask would be aligned with the prefix instead of with the tokens.
        attention_mask = torch.ones(queries, tokens, dtype=torch.bool, device=key.device).tril(tokens - queries)
        attention_mask = attention_mask.expand(key.shape[0], 1, queries, tokens)
    for prefix in module.children():
        if isinstance(prefix, KeyValues) and prefix.on:
            key = _put_before(key, prefix.key)
            value = _put_before(value, prefix.value)
    if attention_mask is not None:
        visible = 1.0 if attention_mask.dtype == torch.bool else 0.0
        attention_mask = F.pad(attention_mask, (key.shape[2] - attention_mask.shape[-1], 0), value=visible)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **(kwargs | {"is_causal": False}))


def _put_before(states: Tensor, prefix: Tensor) -> Tensor:  # (batch, heads, tokens, size), (heads, length, size)
    return torch.cat([prefix.to(states.dtype).expand(states.shape[0], -1, -1, -1), states], dim=2)


def _explicit_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' boolean mask (batch, 1, queries, tokens), written out even where a kernel could imply it."""
    return sdpa_mask(*args, **(kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}))


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _explicit_mask)
AttentionMaskInterface.register(LISTENING, _explicit_mask)

_ORIGINAL: "WeakKeyDictionary[nn.Module, str]" = WeakKeyDictionary()  # the attention a model had before any prefix


def _choose_attention(model: PreTrainedModel) -> None:
    """Ours while a prefix is on, otherwise the model's own, so that without one the base is what it was to the bit."""
    if model.config._attn_implementation != ATTENTION:
        _ORIGINAL[model] = model.config._attn_implementation
    active = any(isinstance(module, KeyValues) and module.on for module in model.modules())
    _set_attention(model, ATTENTION if active else _ORIGINAL[model])


def _set_attention(model: PreTrainedModel, implementation: str) -> None:
    if implementation in (ATTENTION, LISTENING):
        _refuse_unregistered(model)
    model.set_attn_implementation(implementation)


def _refuse_unregistered(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel):
        raise StackError(f"a prefix needs a transformers model, not {type(model).__name__}")
    if not model._can_set_attn_implementation():
        raise StackError(
            f"prefix cannot work on {model.config.model_type}: its attention is not in the public registry"
        )


def _listen(model: PreTrainedModel, tokens: Tensor) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Run the base over `tokens` (1, length); each attention layer with its keys and values (heads, length, size).

    What a layer is really called with is the only source of its shapes that holds for every architecture: grouped
    heads, head sizes that differ from hidden / heads, or that differ between layers.
    """
    heard: list[tuple[nn.Module, Tensor, Tensor]] = []

    def listen(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        heard.append((module, key[0].detach().clone(), value[0].detach().clone()))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(LISTENING, listen)
    uncached = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with _in_evaluation(model), _attention(model, LISTENING), torch.no_grad():
        try:
            here = tokens.to(model.device)
            # The mask says what is true anyway; without one, transformers looks into positions, which the meta device
            # of a cost estimate cannot.
            model(input_ids=here, attention_mask=torch.ones_like(here), **uncached)
        except ValueError as cause:  # sdpa refuses what it cannot do, such as soft-capped scores
            raise StackError(f"prefix cannot work on {model.config.model_type}: {cause}") from cause
        finally:
            AttentionInterface.register(LISTENING, sdpa_attention_forward)  # or it would keep the model in memory
    if not heard:
        raise StackError(f"prefix cannot work on {model.config.model_type}: it called no registered attention")
    return heard


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    before = model.config._attn_implementation
    _set_attention(model, implementation)
    try:
        yield
    finally:
        _set_attention(model, before)


def _shift_positions(
    model: PreTrainedModel, length: int, attachment: PrefixAttachment
) -> torch.utils.hooks.RemovableHandle:
    """Make the backbone count positions from `length` on, while the prefix takes part."""
    backbone = model.base_model
    signature = inspect.signature(backbone.forward)

    def shift(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if not attachment.on:
            return args, kwargs
        given = signature.bind_partial(*args, **kwargs).arguments
        positions = given.get("position_ids")
        if positions is None:
            positions = _positions(given, model)
        given = {**given, "position_ids": positions + length}
        return (), {**given.pop("kwargs", {}), **given}

    if "position_ids" not in signature.parameters:
        return backbone.register_forward_pre_hook(lambda module, args: None)
    return backbone.register_forward_pre_hook(shift, with_kwargs=True)


def _positions(given: Mapping[str, Any], model: PreTrainedModel) -> Tensor:  # (1 or batch, tokens)
    """The positions that the backbone would have numbered its tokens with."""
    tokens: Tensor = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
    if model.config.model_type in COUNTED_FROM_PADDING and given.get("input_ids") is not None:
        padding = int(model.config.pad_token_id)
        real = (tokens != padding).int()
        return real.cumsum(1) * real + padding
    cache = given.get("past_key_values")
    seen = cache.get_seq_length() if cache is not None else 0
    return torch.arange(tokens.shape[1], device=tokens.device)[None] + seen
