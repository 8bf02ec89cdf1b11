"""Which modules an adapter changes: names, patterns or `all-linear`, resolved to a full list before anything runs."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .errors import TargetError, nearest
from .structure import head_modules, linears, modules, output_embeddings, unwrap

__all__ = ["ALL_LINEAR", "Kind", "as_list", "matches", "resolve", "resolve_kind", "shortest_names"]

Kind = Literal["linears", "norms", "embeddings", "blocks"]

ALL_LINEAR = "all-linear"


def resolve(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """The linears that `targets` name, by logical path, in the order of the model.

    `all-linear` is every linear except output embeddings. A plain name matches the end of a path at a dot (`q_proj`,
    `self_attn.q_proj`); a name with `*`, `?` or `[` is a pattern over the whole path (`*.layers.1?.*`). Heads are
    passed over whatever is named: they are trained whole.

    Raises:
        TargetError: an entry matches no linear (each such entry is named, with the nearest valid one), an entry matches
            tied output embeddings, or `all-linear` would pass over experts that are kept as one large parameter.
    """
    found = linears(model)
    wanted = as_list(targets)
    heads, output = _in_heads(model), output_embeddings(model)
    if ALL_LINEAR in wanted:
        _refuse_fused_experts(model)
    faults = []
    chosen: set[str] = set()
    for entry in wanted:
        named = {path for path in found if matches(path, entry)}
        hits = named - heads - ({output} if entry == ALL_LINEAR else set())
        if not hits:
            faults.append(_explain(entry, model, found, in_head=bool(named & heads)))
        chosen |= hits
    if faults:
        raise TargetError("; ".join(faults))
    _refuse_tied_output(model, chosen)
    return {path: module for path, module in found.items() if path in chosen}


def as_list(targets: str | Sequence[str]) -> list[str]:
    """The entries of `targets`, one or many."""
    return [targets] if isinstance(targets, str) else list(targets)


def matches(path: str, entry: str) -> bool:
    """Whether one entry of `targets` means this path."""
    if entry == ALL_LINEAR:
        return True
    if any(mark in entry for mark in "*?["):
        return fnmatchcase(path, entry)
    return path == entry or path.endswith(f".{entry}")


def shortest_names(model: nn.Module, chosen: Sequence[str]) -> list[str]:
    """Names that mean exactly `chosen` among the linears: last components where those suffice, else full paths."""
    last = sorted({path.rpartition(".")[2] for path in chosen})
    meant = {path for path in linears(model) if any(matches(path, name) for name in last)}
    return last if meant == set(chosen) else sorted(chosen)


def _in_heads(model: nn.Module) -> set[str]:
    heads = head_modules(model)
    return {p for p in linears(model) if any(p == head or p.startswith(f"{head}.") for head in heads)}


def _explain(entry: str, model: nn.Module, found: dict[str, nn.Module], *, in_head: bool) -> str:
    if in_head:
        return f"target {entry!r} belongs to the head, which is trained whole anyway: leave it out"
    other = [type(unwrap(m)).__name__ for path, m in modules(model) if matches(path, entry)]
    if other and entry != ALL_LINEAR:
        return f"target {entry!r} matches {other[0]} modules, and only linear layers can be adapted"
    return f"target {entry!r} matches no linear layer{nearest(entry, {path.rpartition('.')[2] for path in found})}"


def _refuse_tied_output(model: nn.Module, chosen: set[str]) -> None:
    output = output_embeddings(model)
    if output in chosen and getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        raise TargetError(
            f"target {output!r} shares its weight with the input embeddings; adapting one of the two would pull them "
            "apart. Untie them in the base first, or leave it out"
        )


def _refuse_fused_experts(model: nn.Module) -> None:
    """Experts of some mixture models are one 3-D parameter, not linears: passing over them must not be silent."""
    for path, module in modules(model):
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                raise TargetError(
                    f"{ALL_LINEAR} would leave {path}.{name} {tuple(parameter.shape)} unadapted, which holds many "
                    "matrices in one parameter; list the targets by name to adapt the rest only"
                )


def resolve_kind(model: nn.Module, targets: str | Sequence[str], kind: Kind) -> dict[str, nn.Module]:
    """The modules of another kind than linears that `targets` name (`all` for every one); heads are left out.

    Raises:
        TargetError: an entry matches none of them.
    """
    heads = head_modules(model)
    among = {
        path: module
        for path, module in modules(model)
        if IS_A[kind](unwrap(module), model) and not any(path == h or path.startswith(f"{h}.") for h in heads)
    }
    wanted = as_list(targets)
    chosen: set[str] = set()
    for entry in wanted:
        hits = {path for path in among if entry == "all" or matches(path, entry)}
        if not hits:
            names = sorted({path.rpartition(".")[2] for path in among})
            raise TargetError(f"target {entry!r} matches none of the {kind}{nearest(entry, names)}")
        chosen |= hits
    return {path: module for path, module in among.items() if path in chosen}


def _is_norm(module: nn.Module, model: nn.Module) -> bool:
    """Something with one scale per feature and nothing inside: LayerNorm, RMSNorm, whatever a model calls its own."""
    own = dict(module.named_parameters(recurse=False))
    return not list(module.children()) and "weight" in own and own["weight"].ndim == 1


def _is_embedding(module: nn.Module, model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) and module is unwrap(model.get_input_embeddings())


def _is_block(module: nn.Module, model: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


IS_A: dict[str, Callable[[nn.Module, nn.Module], bool]] = {
    "norms": _is_norm,
    "embeddings": _is_embedding,
    "blocks": _is_block,
}
