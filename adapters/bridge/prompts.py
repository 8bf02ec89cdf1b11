"""The prompt-learning methods of PEFT: learned vectors in front of the embeddings, or in front of keys and values.

PEFT makes and saves the vectors; they enter through hooks on the backbone instead of through PEFT's wrapper. So logits
keep their length, labels their places and `generate` its cache, and other adapters compose with them.
"""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from peft import PeftModel
from peft.utils import PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..contract import Attachment, Context
from ..errors import StackError
from ..structure import Addition, family, modules, unwrap, without_wrappers
from .config import differing
from .injected import Bridged
from .tuner import keeping_what_trains, quiet_peft, seeded

__all__ = ["CachedPrompt", "Prompt", "PromptAttachment"]

KEY = "default"  # what PEFT calls the one adapter of its model
WEIGHTS = "prompt_encoder."  # before what PEFT leaves out of the file: the weights behind the learned vectors


class Prompt(Bridged):
    """Learned vectors in front of the embeddings."""

    num_virtual_tokens: int = Field(default=16, ge=1)
    """Number of learned vectors."""

    def positions(self) -> int:
        return self.num_virtual_tokens

    def check(self, skeleton: nn.Module) -> None:
        _backbone(skeleton, self.needs, self.method.peft_type)

    @property
    def needs(self) -> Literal["inputs_embeds", "past_key_values"]:
        """What the backbone must take, for the vectors to enter by."""
        return "inputs_embeds"

    def attach(self, model: nn.Module, context: Context) -> "PromptAttachment":
        backbone = _backbone(model, self.needs, self.method.peft_type)
        facts = {"task_type": "CAUSAL_LM"} if self.method.peft_type == PeftType.CPT else {}
        with keeping_what_trains(model), without_wrappers(model), seeded(context.seed), quiet_peft():
            try:
                peft = PeftModel(model, self.peft_config(**facts), KEY)
            except (ValueError, TypeError, AssertionError) as cause:
                raise StackError(f"{context.name} cannot be attached: {cause}") from cause
        attachment = self.attached(context.name, self, model, peft=peft, backbone=backbone)
        if context.fresh:
            self._start(attachment, context)
        return attachment

    @property
    def attached(self) -> "type[PromptAttachment]":
        """The attachment; a method with more to it has its own."""
        return PromptAttachment

    def values(self) -> dict[str, Any]:
        text = {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None}  # PEFT would fetch a tokenizer by name
        values = super().values()
        return values | text if self._text else values

    @property
    def _text(self) -> str | None:
        return getattr(self, "prompt_tuning_init_text", None)

    def _start(self, attachment: "PromptAttachment", context: Context) -> None:
        """Start from the embeddings of a text, cut or repeated to the number of vectors."""
        if self._text is None:
            return
        if context.tokenizer is None:
            raise StackError(f"{context.name}: `prompt_tuning_init_text` needs a tokenizer")
        ids = context.tokenizer(self._text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise StackError(f"{context.name}: `prompt_tuning_init_text` has no tokens")
        repeated = torch.tensor((ids * self.num_virtual_tokens)[: self.num_virtual_tokens])
        embed: Any = unwrap(attachment.embeddings)
        with torch.no_grad():
            attachment.encoder.embedding.weight.copy_(embed(repeated.to(embed.weight.device)))


class ContextPrompt(Prompt):
    """Context-aware prompts: vectors that start from examples and may leave them by so much only."""

    @property
    def attached(self) -> "type[PromptAttachment]":
        return ContextAttachment


class CachedPrompt(Prompt):
    """Learned keys and values in front of every layer's, entering through the cache."""

    @property
    def needs(self) -> Literal["inputs_embeds", "past_key_values"]:
        return "past_key_values"


class PromptAttachment(Attachment):
    """One named prompt on one model."""

    adapter: Prompt
    head_prefix: ClassVar[str] = "base_model."

    def __init__(self, name: str, adapter: Prompt, model: nn.Module, *, peft: PeftModel, backbone: nn.Module) -> None:
        super().__init__(name, adapter, model)
        self.peft, self.on = peft, True
        self.encoder: Any = peft.prompt_encoder[KEY]
        self.encoder.to(next(model.parameters()).device).train(model.training)
        self.embeddings = model.get_input_embeddings()  # type: ignore[operator]  # a PreTrainedModel's
        place = next(path for path, module in modules(model) if unwrap(module) is unwrap(self.embeddings))
        for path, parameter in self.encoder.named_parameters():
            parameter.data = parameter.data.float()
            if parameter.requires_grad:
                self.parameters[f"{place}.{path}.{name}"] = parameter
        # PEFT keeps the encoder beside the model, where `model.zero_grad()`, clipping and `.train()` miss it.
        hung = Addition()
        hung.add_module("encoder", self.encoder)
        hung.training = model.training
        backbone.add_module(f"prompt_{name}", hung)
        self._backbone = backbone
        self._signature = inspect.signature(backbone.forward)
        enter = self._before_embeddings if adapter.needs == "inputs_embeds" else self._before_keys
        self._hooks = [backbone.register_forward_pre_hook(self._taking(enter), with_kwargs=True)]
        if family(model)[0] == "encoder_decoder":  # the decoder attends to the vectors too: only its mask changes
            self._hooks.append(model.register_forward_pre_hook(self._widen_mask, with_kwargs=True))
        else:
            self._hooks.append(backbone.register_forward_hook(self._trim, with_kwargs=True))
        self._entered = 0  # how many positions the running call has in front

    @property
    def length(self) -> int:
        """How many vectors there are."""
        config: Any = self.peft.peft_config[KEY]
        return int(config.num_virtual_tokens)

    def _taking(self, enter: Any) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._entered = 0
            if not self.on:
                return args, kwargs
            given = dict(self._signature.bind_partial(*args, **kwargs).arguments)
            given = given.pop("kwargs", {}) | given
            first = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
            cache = given.get("past_key_values")
            started = cache is not None and cache.get_seq_length() > 0  # a later token of `generate`
            self._extend(given, first, started=started)
            if not started:
                enter(given, first)
            return (), given

        return hook

    def _extend(self, given: dict[str, Any], first: Tensor, *, started: bool) -> None:
        """Masks and positions for the vectors in front."""
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and (started or mask.shape[1] == first.shape[1]):
            given["attention_mask"] = self._widened(mask)
        if (positions := given.get("position_ids")) is not None:
            given["position_ids"] = positions + self.length
            if not started and self.adapter.needs == "inputs_embeds":
                front = positions[:, :1] + torch.arange(self.length, device=positions.device)
                given["position_ids"] = torch.cat([front, positions + self.length], dim=1)

    def _widen_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        return (
            (args, kwargs) if mask is None or not self.on else (args, kwargs | {"attention_mask": self._widened(mask)})
        )

    def _widened(self, mask: Tensor) -> Tensor:  # (rows, tokens) -> (rows, length + tokens)
        return torch.cat([mask.new_ones(mask.shape[0], self.length), mask], dim=1)

    def _before_embeddings(self, given: dict[str, Any], first: Tensor) -> None:
        embedded = given.get("inputs_embeds")
        if embedded is None:
            embedded = self.embeddings(given.pop("input_ids"))  # (rows, tokens, hidden)
        prompt = self._prompt(first.shape[0]).to(embedded)
        given["inputs_embeds"] = torch.cat([prompt, embedded], dim=1)
        if (types := given.get("token_type_ids")) is not None:
            given["token_type_ids"] = torch.cat([types.new_zeros(types.shape[0], self.length), types], dim=1)
        self._entered = self.length

    def _before_keys(self, given: dict[str, Any], first: Tensor) -> None:
        prefix = self._prompt(first.shape[0])
        cache = given.get("past_key_values")
        if cache is None:
            given["past_key_values"] = prefix
        else:
            for index, layer in enumerate(prefix.layers):
                cache.update(layer.keys, layer.values, index)
        if given.get("position_ids") is None and "position_ids" in self._signature.parameters:
            given["position_ids"] = torch.arange(first.shape[1], device=first.device)[None] + self.length

    def _prompt(self, rows: int) -> Any:
        tasks = torch.zeros(rows, dtype=torch.long, device=self.embeddings.weight.device)
        with quiet_peft():
            return self.peft.get_prompt(batch_size=rows, task_ids=tasks)

    def _trim(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Hidden states of the tokens alone, so that logits and labels keep their places."""
        if self._entered:
            assert isinstance(output, ModelOutput)
            hidden: Any = output["last_hidden_state"]
            output["last_hidden_state"] = hidden[:, self._entered :]
            if output.get("hidden_states") is not None:
                output["hidden_states"] = tuple(state[:, self._entered :] for state in output["hidden_states"])
        return output

    def _whole(self) -> bool:
        """Whether PEFT's file holds all there is to train from: plain vectors, with no network behind them."""
        plain = (PeftType.PROMPT_TUNING, PeftType.MULTITASK_PROMPT_TUNING, PeftType.CARTRIDGE)
        return self.adapter.method.peft_type in plain or (
            self.adapter.method.peft_type == PeftType.PREFIX_TUNING and not self.encoder.prefix_projection
        )

    def tensors(self) -> dict[str, Tensor]:
        """PEFT's own, and beside them the weights that they were computed with, to go on from."""
        with quiet_peft(), torch.no_grad():
            found: dict[str, Tensor] = dict(
                get_peft_model_state_dict(self.peft, adapter_name=KEY, save_embedding_layers=False)
            )
        if not self._whole():
            found |= {f"{WEIGHTS}{name}": tensor for name, tensor in self.encoder.state_dict().items()}
        return {name: tensor.detach() for name, tensor in found.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if not self._whole():
            weights = {name.removeprefix(WEIGHTS): t for name, t in tensors.items() if name.startswith(WEIGHTS)}
            self.encoder.load_state_dict(weights)
            return
        with keeping_what_trains(self.encoder), quiet_peft():
            set_peft_model_state_dict(self.peft, dict(tensors), adapter_name=KEY)

    def enabled(self, on: bool) -> None:
        self.on = on

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        delattr(self._backbone, f"prompt_{self.name}")

    def peft_config(self) -> dict[str, Any] | None:
        if not self.adapter.capabilities.peft_readable:
            return None
        config = self.peft.peft_config[KEY]
        shape = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")
        values = differing(self.adapter.method.config_class, self.adapter.values())
        return {"peft_type": self.adapter.method.peft_type.value} | values | {k: getattr(config, k) for k in shape}


class ContextAttachment(PromptAttachment):
    """PEFT bounds the vectors anew at each forward pass, and each time rounding moves them a little."""

    def _prompt(self, rows: int) -> Any:
        self._settle()
        return super()._prompt(rows)

    def tensors(self) -> dict[str, Tensor]:
        self._settle()
        return super().tensors()

    def _settle(self) -> None:
        """Bound them until that changes nothing: what is saved is then what was used."""
        weight = self.encoder.delta_embedding.weight
        while not torch.equal(bounded := self.encoder.get_projection(), weight.data):
            weight.data = bounded


def _backbone(model: nn.Module, needs: str, method: PeftType) -> nn.Module:
    """The part of a model that the vectors enter."""
    if not isinstance(model, PreTrainedModel):
        raise StackError(f"{method.value} needs a transformers model, not {type(model).__name__}")
    backbone: nn.Module = model.get_encoder() if family(model)[0] == "encoder_decoder" else model.base_model
    if needs not in inspect.signature(backbone.forward).parameters:
        raise StackError(f"{method.value} cannot work on {model.config.model_type}: it takes no {needs}")
    return backbone
