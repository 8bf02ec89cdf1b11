"""Methods of PEFT that need more than the bridge: a loss term, a hook, data to start from, or another way in."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import EvaConfig, PeftModel
from peft.tuners.adaption_prompt.layer import AdaptedAttention, AdaptedAttentionGPT
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.variants import calculate_alora_offsets
from peft.utils import PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load as tensors_from_bytes, save as bytes_of
from torch import Tensor, nn

from ..contract import Attachment, Context
from ..errors import ArtefactError, StackError, TargetError, brief
from ..structure import Layers, head_modules, inside, without_wrappers
from ..targets import matches
from .injected import Bridged, Injected, InjectedAttachment
from .tuner import keeping_what_trains, quiet_peft, seeded

__all__ = ["AdaLoRA", "AdaptionPrompt", "FeatureScales", "Norms", "PeftLoRA", "Poly", "Shadow", "Unbridged"]

SUMS = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # what AdaLoRA's allocator keeps of every tensor


class AdaLoRA(Injected):
    """A budget of ranks, moved to where it matters while training."""

    total_step: int
    """Optimiser steps of the whole run: the budget falls from `init_r` to `target_r` over them."""

    def attached(self, context: Context, model: nn.Module, **parts: Any) -> "AdaLoRAAttachment":
        return AdaLoRAAttachment(context.name, self, model, **parts)


class AdaLoRAAttachment(InjectedAttachment):
    """Allocates ranks after each step; PEFT leaves the regulariser in an output that nobody may call for."""

    adapter: AdaLoRA

    @property
    def _config(self) -> Any:
        return self.shared.peft.peft_config[self.key]

    @property
    def _tuner(self) -> Any:
        return self.shared.peft.base_model

    def penalty(self) -> Tensor:
        """Mean over A and B of ||P Pᵀ - 1||, times its weight (AdaLoRA, equation 4)."""
        terms = []
        for name, p in self.parameters.items():
            if (role := self.roles().get(name)) is not None:
                covariance = p @ p.T if role == "A" else p.T @ p  # (rank, rank)
                terms.append(torch.linalg.norm(covariance - torch.eye(len(covariance), device=p.device)))
        weight: float = self._config.orth_reg_weight
        return weight * torch.stack(terms).mean()

    def after_step(self, step: int) -> None:
        with without_wrappers(self.model):
            self._tuner.update_and_allocate(step)

    def tensors(self) -> dict[str, Tensor]:
        """Whole factors: ranks that are switched off are zeros in E, and may come back."""
        kept, self._config.rank_pattern = self._config.rank_pattern, None
        try:
            return super().tensors()
        finally:
            self._config.rank_pattern = kept

    def state(self) -> dict[str, Any]:
        allocator = self._tuner.rankallocator
        sums = {f"{kind}/{name}": tensor for kind in SUMS for name, tensor in getattr(allocator, kind).items()}
        packed = base64.b64encode(bytes_of({k: t.contiguous() for k, t in sums.items()})).decode() if sums else ""
        return {"rank_pattern": self._config.rank_pattern, "importance": packed}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave.

        Raises:
            ArtefactError: it is not of this model; nothing was taken.
        """
        sums = tensors_from_bytes(base64.b64decode(state["importance"], validate=True)) if state["importance"] else {}
        allocator, device = self._tuner.rankallocator, next(iter(self.parameters.values())).device
        part = f".{allocator.adapter_name}"
        live = {n: p for n, p in self._tuner.model.named_parameters() if "lora_" in n and part in n}
        _check_ranks(state["rank_pattern"], {n: p for n, p in live.items() if ".lora_E" in n})
        _check_sums(sums, {f"{kind}/{name}": p for kind in SUMS for name, p in live.items()} if sums else {})
        self._config.rank_pattern = state["rank_pattern"]
        for key, tensor in sums.items():
            kind, _, name = key.partition("/")
            getattr(allocator, kind)[name] = tensor.to(device)


def _check_ranks(pattern: Any, live: Mapping[str, Tensor]) -> None:
    if not pattern and (pattern is None or isinstance(pattern, dict)):
        return
    if not isinstance(pattern, dict) or pattern.keys() != live.keys():
        raise ArtefactError(f"rank_pattern is {brief(pattern)}, and must name the {len(live)} modules of the adapter")
    for name, kept in pattern.items():
        if not isinstance(kept, list) or len(kept) != len(live[name]) or not all(type(one) is bool for one in kept):
            raise ArtefactError(
                f"rank_pattern of {name} is {brief(kept)}, and must be {len(live[name])} times yes or no"
            )


def _check_sums(sums: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    if strays := sums.keys() ^ live.keys():
        raise ArtefactError(f"importance: {brief(min(strays))} is on one side only, the checkpoint's or the model's")
    for key, tensor in sums.items():
        own = live[key]
        here, wanted = (list(tensor.shape), tensor.dtype), (list(own.shape), own.dtype)
        if here != wanted:
            raise ArtefactError(f"importance: {key} is {here[0]} of {here[1]}, and must be {wanted[0]} of {wanted[1]}")
        if not torch.isfinite(tensor).all():
            raise ArtefactError(f"importance: {key} has values that are not finite")


class PeftLoRA(Injected):
    """PEFT's LoRA with its variants: activated (aLoRA), started from data (EVA), and more."""

    init_lora_weights: bool | Literal["gaussian", "eva", "orthogonal", "mica"] = True
    """How A and B start; `eva` looks at data. (`pissa`, `olora` and `loftq` are adapters of their own.)"""

    alora_invocation_tokens: list[int] | None = None
    """Token ids from whose last occurrence on the adapter acts (aLoRA)."""

    def values(self) -> dict[str, Any]:
        """Where it started does not matter to who reads the file, and would be computed again there."""
        values = super().values()
        return values | {"init_lora_weights": True, "eva_config": None} if self.init_lora_weights == "eva" else values

    def peft_config(self, **model_facts: Any) -> Any:
        if self.init_lora_weights == "eva":
            # One rank for all: with ranks by layer, what is saved would not fit what the configuration says.
            given = super().values()["eva_config"] or {}
            model_facts |= {"init_lora_weights": "eva", "eva_config": EvaConfig(**{**given, "rho": 1.0})}
        return super().peft_config(**model_facts)

    def start(self, peft: PeftModel, key: str, context: Context) -> None:
        if self.init_lora_weights != "eva" or not context.fresh:
            return
        if not context.samples:
            raise StackError(f"{context.name}: `eva` starts from data, so attach() needs `samples`")
        initialize_lora_eva_weights(peft, list(context.samples), adapter_name=key, show_progress_bar=False)

    def attached(self, context: Context, model: nn.Module, **parts: Any) -> InjectedAttachment:
        kind = ActivatedLoRA if self.alora_invocation_tokens is not None else InjectedAttachment
        return kind(context.name, self, model, **parts)


class ActivatedLoRA(InjectedAttachment):
    """LoRA from the last occurrence of the invocation tokens on; a row without them is the base's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.offsets: Sequence[int | None] = []  # by row, counted from the end
        self._hooks = [self.model.register_forward_pre_hook(self._find, with_kwargs=True)]
        self._hooks += [layer.register_forward_pre_hook(self._hand_over, with_kwargs=True) for layer in self.layers]

    def _find(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids: Any = args[0] if args else kwargs.get("input_ids")
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:  # generating: what was invoked stays so
            self.offsets = [None if offset is None else ids.shape[1] for offset in self.offsets]
        elif ids is None:
            raise StackError(f"{self.name} looks for its invocation tokens, so the model must be given `input_ids`")
        else:
            configs: Any = self.shared.peft.peft_config
            self.offsets = calculate_alora_offsets(configs, self.key, ids)

    def _hand_over(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"alora_offsets": self.offsets}

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        super().detach()


class FeatureScales(Injected):
    """IA3: a scale for each output feature, or for each input feature of the feed-forward layers named."""

    feedforward_modules: str | list[str] | None = None
    """Which of the targets have their inputs scaled instead of their outputs; PEFT's usual ones when left out."""

    def values(self) -> dict[str, Any]:
        return super().values() | {"feedforward_modules": None}

    def facts(self, model: nn.Module, chosen: Mapping[str, nn.Module]) -> dict[str, Any]:
        facts = super().facts(model, chosen)
        if self.feedforward_modules is None:
            return facts
        named = [self.feedforward_modules] if isinstance(self.feedforward_modules, str) else self.feedforward_modules
        inputs = [path for path in chosen if any(matches(path, entry) for entry in named)]
        if named and not inputs:  # an empty list means none
            raise TargetError(f"feedforward_modules {self.feedforward_modules!r} matches none of the targets")
        # PEFT wants one list inside the other: both in full.
        return facts | {"target_modules": list(chosen), "feedforward_modules": inputs}


class Norms(Injected):
    """Copies of the norms, trained in float32 whatever the base computes in."""

    def attached(self, context: Context, model: nn.Module, **parts: Any) -> "NormsAttachment":
        return NormsAttachment(context.name, self, model, **parts)


class NormsAttachment(InjectedAttachment):
    """Gives back the dtype that it was given: PEFT's layer would hand float32 on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hooks = [layer.register_forward_hook(_in_the_given_dtype) for layer in self.layers]

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        super().detach()


def _in_the_given_dtype(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(args[0].dtype)


class Poly(Injected):
    """Polytropon with one task: a learned mixture of low-rank skills."""

    def attached(self, context: Context, model: nn.Module, **parts: Any) -> "PolyAttachment":
        return PolyAttachment(context.name, self, model, **parts)


class PolyAttachment(InjectedAttachment):
    """Tells every layer that each row is of the one task."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hooks = [layer.register_forward_pre_hook(_first_task, with_kwargs=True) for layer in self.layers]

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        super().detach()


def _first_task(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
    rows = args[0]  # (rows, tokens, in)
    return args, kwargs | {"task_ids": torch.zeros(rows.shape[0], dtype=torch.long, device=rows.device)}


class Shadow(Injected):
    """A small model beside the base whose states are passed from layer to layer."""

    def attached(self, context: Context, model: nn.Module, **parts: Any) -> "ShadowAttachment":
        return ShadowAttachment(context.name, self, model, **parts)


class ShadowAttachment(InjectedAttachment):
    """PEFT's hooks at the first and the last layer go with it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        last = f"{self.facts['target_modules'][-1]}.shadow_update"  # nothing reads the state after the last layer
        for name in [name for name in self.parameters if name.startswith(last)]:
            self.parameters.pop(name).requires_grad_(False)

    def peft_config(self) -> dict[str, Any] | None:
        # For a task with a head, PEFT gives the shadow a head of its own.
        return None if head_modules(self.model) else super().peft_config()

    def detach(self) -> None:
        tuner: Any = self.shared.peft.base_model
        with quiet_peft():
            tuner.delete_adapter(self.key)
        for handle in tuner._boundary_hook_handles:  # PEFT takes them out only together with every layer of its own
            handle.remove()
        super().detach()


class AdaptionPrompt(Bridged):
    """Learned prompts in the attention of the upper layers, let in through a gate that starts closed."""

    adapter_len: int = 10
    """Number of prompt vectors in each adapted layer."""

    adapter_layers: int
    """How many layers are adapted, counted from the top."""

    def check(self, skeleton: nn.Module) -> None:
        self.attach(skeleton, Context(name="adaption-prompt", layers=Layers((), ()), fresh=False)).detach()

    def attach(self, model: nn.Module, context: Context) -> "AdaptionPromptAttachment":
        before = {id(p) for p in model.parameters()}
        with without_wrappers(model), keeping_what_trains(model), seeded(context.seed), quiet_peft():
            try:
                peft = PeftModel(model, self.peft_config(), "default")
            except (ValueError, TypeError, KeyError) as cause:
                raise StackError(f"{context.name} cannot be attached: {cause}") from cause
            finally:
                vars(model).pop("peft_config", None)
        attachment = AdaptionPromptAttachment(context.name, self, model)
        attachment.peft = peft
        for module in model.modules():
            if isinstance(module, (AdaptedAttention, AdaptedAttentionGPT)):
                module.training = module.model.training  # a new module starts in training mode
        for path, parameter in model.named_parameters():
            if id(parameter) not in before:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
                attachment.parameters[f"{path}.{context.name}"] = parameter
        return attachment


class AdaptionPromptAttachment(Attachment):
    """PEFT puts its attention modules in and takes them out; there is nothing else to switch."""

    adapter: AdaptionPrompt
    peft: PeftModel
    on = True

    def tensors(self) -> dict[str, Tensor]:
        with self._present(), without_wrappers(self.model), quiet_peft():
            found: dict[str, Tensor] = get_peft_model_state_dict(
                self.peft, adapter_name="default", save_embedding_layers=False
            )
        return {name: tensor.detach() for name, tensor in found.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        with self._present(), without_wrappers(self.model), keeping_what_trains(self.model), quiet_peft():
            set_peft_model_state_dict(self.peft, dict(tensors), adapter_name="default")

    @contextmanager
    def _present(self) -> Iterator[None]:
        """PEFT saves and loads what is in the model, and what is switched off is not."""
        was_on = self.on
        self.enabled(True)
        try:
            yield
        finally:
            self.enabled(was_on)

    def enabled(self, on: bool) -> None:
        if on != self.on:
            self.on = on
            tuner: Any = self.peft.base_model
            switch = tuner.enable_adapter_layers if on else tuner.disable_adapter_layers
            switch()

    def may_rest(self) -> frozenset[str]:
        """A prompt has no gradient while its gate is closed."""
        gates = {name: p for name, p in self.parameters.items() if p.numel() == 1}
        return frozenset(self.parameters) - gates.keys() if not any(p.any() for p in gates.values()) else frozenset()

    def detach(self) -> None:
        self.enabled(False)

    def peft_config(self) -> dict[str, Any]:
        config = self.peft.peft_config["default"]
        keys = ("adapter_len", "adapter_layers", "target_modules")
        return {"peft_type": PeftType.ADAPTION_PROMPT.value} | {key: getattr(config, key) for key in keys}


@inside.register(AdaptedAttention)
@inside.register(AdaptedAttentionGPT)
def _(module: Any) -> nn.Module:
    wrapped: nn.Module = module.model
    return wrapped


class Unbridged(Bridged):
    """Known by name, so that asking for it says why it cannot be had."""

    def check(self, skeleton: nn.Module) -> None:
        raise StackError(f"{self.method.peft_type.value}{self.capabilities.because('trains')}")

    def attach(self, model: nn.Module, context: Context) -> None:
        self.check(model)
