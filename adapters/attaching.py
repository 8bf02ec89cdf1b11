"""Attaches a stack to a model: the base frozen, its heads freed, each adapter in order; all of it or nothing."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .compatibility import circumstances_of, refuse_unfit
from .contract import Context
from .errors import StackError
from .fingerprints import fingerprint
from .frozen_linear import packed_as
from .isolation import answerable
from .specs import Named, Spec, build, check, refuse_several
from .stack import Stack, present, remember
from .structure import Addition, Layers, head_modules, new_modules

__all__ = ["attach"]


def attach(
    model: nn.Module,
    specs: Sequence[Spec | Named],
    *,
    seed: int = 0,
    tokenizer: Any = None,
    samples: Sequence[Mapping[str, Tensor]] = (),
    fresh: bool = True,
) -> Stack:
    """Freeze the base, free its heads, and attach adapters in order.

    Args:
        model: a transformers model, loaded by `load_base` or otherwise.
        specs: the stack; adapters of the loading stage are checked against the model, not applied.
        seed: of the adapters' random start.
        tokenizer: for adapters that start from text.
        samples: a few batches as the model takes them, for adapters that start from data.
        fresh: False when saved values follow, so that a text to start from is not needed.

    Raises:
        StackError: the stack cannot work, on this model, or a name is attached already.
        RecipeError, TargetError, PluginError: a specification is wrong.
    """
    named = build(specs)
    check(named, has_head=bool(head_modules(model)))
    _check_model(model, named)
    refuse_unfit(named, circumstances_of(model))
    stack = Stack(model, named, [], Layers.of(model))
    if not all(n.adapter.capabilities.base_frozen for n in named):
        stack.base = fingerprint(model)
    _free_heads_only(stack)
    for n in named:
        try:
            context = Context(
                name=n.name, layers=stack.layers, seed=seed, tokenizer=tokenizer, samples=samples, fresh=fresh
            )
            with answerable(n.name, n.entry, "attach"):
                attachment = n.adapter.attach(model, context)
        except BaseException:
            for done in reversed(stack.attachments):
                done.detach()
            for undo in reversed(stack._undo):
                undo()
            raise
        if attachment is not None:
            stack.attachments.append(attachment)
    _pass_gradients_through_checkpoints(stack)
    _show_beside(stack)
    remember(stack)
    return stack


def _check_model(model: nn.Module, named: Sequence[Named]) -> None:
    others = present(model)
    if not others and (place := _foreign(model)) is not None:
        raise StackError(
            f"this model has an adapter of PEFT's own ({place}), which would be frozen and never saved: merge or "
            "unload it first, or load its folder with `load`"
        )
    names = frozenset[str]().union(*(p.names for p in others))
    refuse_several(named, [kind for p in others for kind in p.kinds])
    for n in named:
        capabilities = n.adapter.capabilities
        if names and not capabilities.base_frozen:
            raise StackError(
                f"{n.name} trains the base itself, and {min(names)!r} is attached to it: detach that first"
            )
        if n.name in names:
            raise StackError(f"{n.name!r} is attached to this model already; detach it, or give the new one a `name`")
        if capabilities.quantises and packed_as(model) is None:
            raise StackError(
                f"{n.name} packs weights while they are read; load the model with load_base(..., [{n.name!r}])"
            )


def _foreign(model: nn.Module) -> str | None:
    """Where PEFT itself has put something, on a model that no stack of ours is attached to."""
    if "peft" not in sys.modules:
        return None
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = (path or "all of it" for path, m in model.named_modules() if isinstance(m, (PeftModel, BaseTunerLayer)))
    return next(found, None)


def _free_heads_only(stack: Stack) -> None:
    """Freeze the base; make heads trainable in float32, fed in float32 whatever the base computes in."""
    model = stack.root
    taken = frozenset[int]().union(*(p.tensors for p in present(model)))
    for parameter in model.parameters():
        if id(parameter) not in taken:
            parameter.requires_grad_(False)
    for name in head_modules(model):
        head = model.get_submodule(name)
        if any(id(p) in taken for p in head.parameters()):
            continue  # an earlier stack owns it
        dtypes = {parameter: (parameter.dtype, parameter.detach().clone()) for parameter in head.parameters()}
        for tensor_name, parameter in head.named_parameters(prefix=name):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            stack.heads[tensor_name] = parameter
        handles = [head.register_forward_pre_hook(_floats_as_float32, with_kwargs=True)]
        if name in new_modules(model):  # the base goes on from it, in its own dtype
            ((dtype, _), *_) = dtypes.values()
            handles.append(head.register_forward_hook(partial(_floats_as, dtype)))
        stack._undo.append(lambda handles=handles, dtypes=dtypes: _restore_head(handles, dtypes))


def _restore_head(handles: Sequence[Any], dtypes: dict[nn.Parameter, tuple[torch.dtype, Tensor]]) -> None:
    for handle in handles:
        handle.remove()
    for parameter, (_, original) in dtypes.items():
        parameter.data = original
        parameter.requires_grad_(False)


def _floats_as_float32(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return _cast(args, torch.float32), {key: _cast(value, torch.float32) for key, value in kwargs.items()}


def _floats_as(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    return _cast(output, dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if type(value) is tuple:
        return tuple(_cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _show_beside(stack: Stack) -> None:
    """Put tensors that an adapter keeps beside the model into it.

    A Trainer finds what it optimises, clips and zeroes in `model.parameters()`; others would never be trained, or
    their gradients would add up from step to step. Other models than transformers' may run whatever is put into them.
    """
    if not isinstance(stack.root, PreTrainedModel):
        return
    for attachment in stack.attachments:
        inside = {id(p) for p in stack.root.parameters()}
        beside = [p for p in attachment.trainable().values() if id(p) not in inside]
        if beside:
            shown = Addition()
            shown.tensors = nn.ParameterList(beside)
            child = stack._beside[attachment.name] = f"beside_{attachment.name}"
            stack.root.add_module(child, shown.train(stack.root.training))


def _pass_gradients_through_checkpoints(stack: Stack) -> None:
    """Let the embeddings' output require gradients while checkpointing is on.

    A reentrant checkpoint drops the gradient of every tensor inside when none of its inputs requires one, and over
    frozen embeddings none does: the adapter would silently not be trained.
    """
    model = stack.root
    if not isinstance(model, PreTrainedModel):
        return

    def require(module: nn.Module, args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled() and model.is_activation_checkpointing and not output.requires_grad:
            output.requires_grad_(True)

    handle = model.get_input_embeddings().register_forward_hook(require)
    stack._undo.append(handle.remove)
