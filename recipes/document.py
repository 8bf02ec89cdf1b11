"""A recipe as it is written: YAML with the place of each key, and what `--set` changes in it."""

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from onegpu.adapters import OnegpuError, RecipeError
from onegpu.adapters.errors import brief, nearest
from onegpu.adapters.specs import split
from onegpu.adapters.validation import Fault, Path as KeyPath

__all__ = ["LARGEST", "Document", "read_document"]

LARGEST = 2**18  # bytes of a recipe; PyYAML takes seconds for as much
MOST_NODES, DEEPEST = 20_000, 50  # keys, values and lists of a recipe, and how deep they lie


@dataclass
class Document:
    """The content of a recipe, and the place that each key came from."""

    name: str
    content: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)
    nodes: int = 0  # that were read

    @contextmanager
    def at(self, *path: str | int) -> Iterator[None]:
        """Put the place of a key, and its path, in front of what is found wrong inside the block."""
        try:
            yield
        except OnegpuError as error:
            raise type(error)(self.explain(Fault(path, str(error)))) from error

    def explain(self, fault: Fault) -> str:
        """A fault with its place and its path."""
        above = (fault.path[:n] for n in range(len(fault.path), 0, -1))
        place = next((self.places[path] for path in above if path in self.places), self.name)
        return f"{place}: {_dotted(fault.path)}: {fault.message}" if fault.path else f"{place}: {fault.message}"

    def without(self, paths: Iterable[KeyPath]) -> "Document":
        """The same without some keys; what is no key, or lies in a list, stays."""
        content = copy.deepcopy(self.content)
        for path in paths:
            *above, last = path or ("",)
            inner: Any = content
            for part in above:
                if isinstance(inner, list) and isinstance(part, int):
                    inner = inner[part]
                else:
                    inner = inner.get(part) if isinstance(inner, dict) else None
            if isinstance(inner, dict):
                inner.pop(last, None)
        return replace(self, content=content)

    def override(self, written: str) -> None:
        """Apply one `key.path=value`; an adapter is reached by its name or its index (`adapters.lora.rank=8`).

        Raises:
            RecipeError: it is none, or there is no such key.
        """
        _apply(self, written)


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that 2e-4 is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_document(text: str, name: str) -> Document:
    """Read the text of a recipe; `name` is what messages call it.

    Raises:
        RecipeError: it is no YAML, no set of keys, or grows without end.
    """
    document = Document(name, {})
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        content = _construct(loader, root, (), document) if root is not None else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{name}{line}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise RecipeError(f"{name}: nested too deeply for a recipe") from None
    if not isinstance(content, dict):
        raise RecipeError(
            f"{name}: a recipe is a set of keys (base, adapters, task, train), not {type(content).__name__}"
        )
    document.content = content
    return document


def _construct(loader: _Loader, node: yaml.Node, path: KeyPath, document: Document) -> Any:
    document.nodes += 1
    if document.nodes > MOST_NODES or len(path) > DEEPEST:  # aliases of aliases grow without end, in a few lines
        raise RecipeError(
            f"{document.name}:{node.start_mark.line + 1}: not a recipe: an alias contains itself, or there is "
            "more in it than in any recipe"
        )
    document.places.setdefault(path, f"{document.name}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*path, index), document) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        content: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = _scalar(loader, key_node)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise RecipeError(
                    f"{document.name}:{line}: {_dotted((*path, str(key)))}: a key must be text, not {key!r}"
                )
            if key in content:
                raise RecipeError(f"{document.name}:{line}: {_dotted((*path, key))}: this key is given twice")
            document.places[(*path, key)] = f"{document.name}:{line}"
            content[key] = _construct(loader, value_node, (*path, key), document)
        return content
    return _scalar(loader, node)


def _scalar(loader: _Loader, node: yaml.Node) -> Any:
    """What YAML says that it is; PyYAML's own classes raise whatever comes where a tag promises too much."""
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.constructor.ConstructorError(None, None, "a key must be text", node.start_mark)
    try:
        value = loader.construct_object(node)
        if isinstance(value, str):
            value.encode()
    except yaml.YAMLError:
        raise
    except Exception as cause:
        text = f"{brief(node.value)} cannot be read as {node.tag.rpartition(':')[2]}"
        raise yaml.constructor.ConstructorError(None, None, text, node.start_mark) from cause
    return value


def _dotted(path: Iterable[str | int]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


# --- overrides --------------------------------------------------------------------------------------------------------


def _apply(document: Document, override: str) -> None:
    """Apply one `key.path=value`; an adapter is reached by its name or its index (`adapters.lora.rank=8`)."""
    keys, equals, text = override.partition("=")
    if not equals or not keys:
        raise RecipeError(f"--set {override}: write key.path=value")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = None if node is None else _construct(loader, node, (), Document(f"--set {override}", {}))
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: {text!r} is not a YAML value") from None
    path: list[str | int] = []
    parts = keys.split(".")
    current: Any = document.content
    for part in parts[:-1]:
        current, step = _descend(current, part, override)
        path += step
    last = parts[-1]
    if isinstance(current, list):
        index = _index(current, last, override)
        current[index] = value
        path.append(index)
    else:
        current[last] = value
        path.append(last)
    document.places[tuple(path)] = f"--set {override}"


def _descend(current: Any, part: str, override: str) -> tuple[Any, list[str | int]]:
    """The container that `part` names inside `current`, made where it is missing, and its path."""
    if isinstance(current, list):
        index = _index(current, part, override)
        name, settings = split(current[index], f"--set {override}: {part!r}")
        current[index] = {name: settings}
        return settings, [index, name]
    if current.get(part) is None:
        current[part] = {}
    elif isinstance(current[part], str) and part == "task":
        current[part] = {current[part]: {}}
    if not isinstance(current[part], (dict, list)):
        raise RecipeError(f"--set {override}: {part!r} is a value, it has no keys below it")
    return current[part], [part]


def _index(items: list[Any], part: str, override: str) -> int:
    names = [next(iter(item), None) if isinstance(item, dict) else item for item in items]
    if part.isdigit() and int(part) < len(items):
        return int(part)
    if names.count(part) != 1:
        why = "is there more than once, use its index" if part in names else "is not in the list"
        raise RecipeError(f"--set {override}: {part!r} {why}{nearest(part, [str(n) for n in names])}")
    return names.index(part)
