"""Where a gradient stops: which module of a model has cut its output off, and which user of a shared tensor ignores it.

Hooks look at modules while they run; nothing is computed that would not be computed without them.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from onegpu.adapters.structure import modules

__all__ = ["GradientFlow", "SharedTensors", "tensors_in"]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of what a module takes or gives."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (t for inner in value.values() for t in tensors_in(inner))
    elif isinstance(value, (tuple, list)):
        yield from (t for inner in value for t in tensors_in(inner))


@dataclass
class _Seen:
    """What was seen of one module."""

    ran: bool = False
    carries: bool = False  # its output requires a gradient
    reached: bool = False  # a gradient arrived at its output


@dataclass
class GradientFlow:
    """Watches the modules that tensors lie in, innermost to outermost."""

    chains: dict[str, list[str]]  # tensor -> logical paths of the modules around it, innermost first
    seen: dict[str, _Seen] = field(default_factory=lambda: defaultdict(_Seen))
    handles: list[RemovableHandle] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, tensors: Iterable[str]) -> "GradientFlow":
        """Watch from now on. `tensors`: names that begin with the path of the module that they change."""
        found = dict(modules(model))
        flow = cls({name: [path for path in _ancestors(name) if path in found] for name in tensors})
        for path in {path for chain in flow.chains.values() for path in chain}:
            flow.handles.append(found[path].register_forward_hook(flow._watch(path)))
        return flow

    def _watch(self, path: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if not torch.is_grad_enabled():
                return  # a reference model, or the first pass of a reentrant checkpoint
            seen = self.seen[path]
            seen.ran = True
            for tensor in tensors_in(output):
                if tensor.requires_grad:
                    seen.carries = True
                    tensor.register_hook(lambda gradient: setattr(seen, "reached", True))

        return look

    def culprit(self, tensor: str) -> str:
        """The module in which the gradient of a tensor was lost, as narrowly as can be told; the tensor if in none."""
        chain = [path for path in self.chains.get(tensor, []) if self.seen[path].ran]
        cut = next((path for path in chain if not self.seen[path].carries), None)
        if cut is not None:
            return cut
        unreached = [path for path in chain if not self.seen[path].reached]
        return unreached[-1] if unreached else next(iter(self.chains.get(tensor, [])), tensor)

    def close(self) -> None:
        """Watch no longer."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def _ancestors(name: str) -> Iterator[str]:
    """`a.b.c`: `a.b`, `a`."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


@dataclass
class SharedTensors:
    """Watches tensors that several modules of one class share: one of them hides that another is cut off."""

    users: dict[str, dict[str, type]] = field(default_factory=dict)  # tensor -> physical path of a user -> its class
    used: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # tensor -> users that depend on it
    ran: set[str] = field(default_factory=set)
    handles: list[RemovableHandle] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, tensors: Mapping[str, nn.Parameter]) -> "SharedTensors":
        """Watch from now on, where anything is shared at all."""
        shared = cls()
        for name, paths in _shared(model, tensors).items():
            shared.users[name] = {path: type(model.get_submodule(path)) for path in paths}
            for path in paths:
                hook = shared._watch(name, tensors[name], path)
                shared.handles.append(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
        return shared

    def _watch(self, name: str, tensor: nn.Parameter, path: str) -> Any:
        def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                self.ran.add(path)
                if _depends(tensors_in(output), tensor, before=tensors_in((args, kwargs))):
                    self.used[name].add(path)

        return look

    def idle(self) -> dict[str, str]:
        """Tensor -> a module that should use it, since another one of its class does, and has not."""
        found = {}
        for name, users in self.users.items():
            busy = {users[path] for path in self.used[name]}
            idle = [p for p, kind in users.items() if kind in busy and p in self.ran and p not in self.used[name]]
            if idle:
                found[name] = idle[0]
        return found

    def close(self) -> None:
        """Watch no longer."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def _shared(model: nn.Module, tensors: Mapping[str, nn.Parameter]) -> dict[str, list[str]]:
    """Tensors that stand in several modules -> paths of these; a mere container counts as the module around it."""
    names = {id(parameter): name for name, parameter in tensors.items()}
    found: dict[str, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            if id(parameter) in names:
                user = path
                while user and isinstance(model.get_submodule(user), (nn.ParameterDict, nn.ParameterList)):
                    user = user.rpartition(".")[0]
                found[names[id(parameter)]].append(user)
    return {name: sorted(set(paths)) for name, paths in found.items() if len(set(paths)) > 1}


def _depends(outputs: Iterable[Tensor], tensor: Tensor, *, before: Iterable[Tensor]) -> bool:
    """Whether outputs were computed from a leaf with gradient, after what they were computed `before`."""
    seen = {t.grad_fn for t in before}
    waiting = [t.grad_fn for t in outputs]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", None) is tensor:
            return True
        waiting += [below for below, _ in node.next_functions]
    return False
