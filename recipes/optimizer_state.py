"""The state of an optimiser as flat tensors and plain numbers, and back: held against the tensors that it steps."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from onegpu.adapters import RecipeError
from onegpu.adapters.errors import brief

__all__ = ["check", "flatten", "unflatten"]

Form = tuple[tuple[int, ...], torch.dtype]

STEP = "step"  # how often a tensor was stepped: a tensor of torch's, a number of bitsandbytes'
SQUARES = frozenset({"exp_avg_sq", "state2", "absmax2", "qmap2"})  # means of squares, of which the root is taken
BLOCK = 256  # elements that share a scale in bitsandbytes' 8-bit state
LEVELS = 256  # values that 8 bits can mean
WRAPPED = "__bnb_optimizer_quant_state__"  # where bitsandbytes puts what is in 8 bits


def flatten(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state as tensors and plain values, both keyed by tensor name and path within its state.

    bitsandbytes nests its quantised state one level deeper and shares look-up tables between tensors; safetensors
    wants flat names and tensors of their own.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}

    def visit(path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            tensors[path] = value.detach().clone().contiguous()
        elif isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{path}/{key}", inner)
        else:
            values[path] = value

    order = _names_in_order(optimizer)
    for index, state in optimizer.state_dict()["state"].items():
        if float(state.get(STEP, 1)):  # a fused optimiser begins a state at a step that overflowed and was passed over
            visit(order[index], state)
    return tensors, values


def unflatten(optimizer: Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Give the optimiser what `flatten` gave, and `check` found to fit."""
    state: dict[int, dict[str, Any]] = {}
    index_of = {name: index for index, name in enumerate(_names_in_order(optimizer))}
    for path, value in (*tensors.items(), *values.items()):
        name, *keys = path.split("/")
        place: dict[str, Any] = state.setdefault(index_of[name], {})
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _names_in_order(optimizer: Optimizer) -> list[str]:
    """Names in the order in which the optimiser numbers its tensors: group by group."""
    return [name for group in optimizer.param_groups for name in group["names"]]


def check(optimizer: Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, int], steps: int) -> None:
    """Whether this can be the optimiser's state after so many steps; a tensor that was never stepped has none.

    Raises:
        RecipeError: it cannot; the first three faults, with both sides.
    """
    found = list(_faults(optimizer, tensors, values, steps))
    if found:
        raise RecipeError("; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else ""))


def _faults(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, int], steps: int
) -> Iterator[str]:
    live = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    stored: dict[str, dict[str, Tensor | int]] = {}
    entries: list[tuple[str, Tensor | int]] = [*tensors.items(), *values.items()]
    for path, value in entries:
        name, _, key = path.partition("/")
        stored.setdefault(name, {})[key] = value
    for name, state in stored.items():
        if name not in live:
            yield f"it has a state of {brief(name)}, and the run trains no such tensor"
            continue
        forms = _forms(optimizer, live[name])
        if state.keys() != forms.keys():
            yield f"{name} has {_listed(state)}, and {type(optimizer).__name__} keeps {_listed(forms)}"
            continue
        for key, value in state.items():
            fault = _fault(key.rpartition("/")[2], value, forms[key], steps)
            if fault:
                yield f"{name}/{key} {fault}"


def _forms(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Form | None]:
    """What the optimiser keeps of a tensor that it stepped; None stands for a plain number."""
    own = (tuple(parameter.shape), parameter.dtype)
    if isinstance(optimizer, SGD):
        return {}
    if isinstance(optimizer, AdamW):
        return {STEP: ((), torch.float32), "exp_avg": own, "exp_avg_sq": own}
    if parameter.numel() < optimizer.args.min_8bit_size:  # type: ignore[attr-defined]
        whole = (own[0], torch.float32)
        return {STEP: None, f"{WRAPPED}/state1": whole, f"{WRAPPED}/state2": whole}
    blocks = -(-parameter.numel() // BLOCK)
    packed: dict[str, Form] = {"state": (own[0], torch.uint8), "qmap": ((LEVELS,), torch.float32)}
    packed["absmax"] = ((blocks,), torch.float32)
    return {STEP: None} | {f"{WRAPPED}/{kind}{n}": form for kind, form in packed.items() for n in (1, 2)}


def _fault(key: str, value: Tensor | int, form: Form | None, steps: int) -> str | None:
    if isinstance(value, Tensor) != (form is not None):
        return "is a number, and must be a tensor" if form else "is a tensor, and must be a number"
    if isinstance(value, Tensor):
        if (tuple(value.shape), value.dtype) != form:
            assert form is not None
            return f"is {_shown(tuple(value.shape), value.dtype)}, and must be {_shown(*form)}"
        if not torch.isfinite(value).all():
            return "has values that are not finite"
        if key in SQUARES and (value < 0).any():
            return "has negative values, and is a mean of squares"
    if key == STEP and not (float(value) == int(value) and 1 <= int(value) <= steps):
        return f"is {float(value):g}, and the run did {steps} steps"
    return None


def _shown(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{list(shape)} of {str(dtype).removeprefix('torch.')}"


def _listed(keys: Mapping[str, object]) -> str:
    return brief(", ".join(sorted(keys)) or "nothing")
