"""Reads files that a stranger may have written: inside their folder, bounded, and without executing anything.

JSON is no larger and no deeper than any that is written here, names each key once, and holds text and finite numbers
only. A safetensors file has a header of that kind; its tensors are mapped into memory, and read when they were found
to fit.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Never

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import ArtefactError, brief

__all__ = ["LARGEST", "inside", "read_json", "read_tensors"]

LARGEST = 16 * 2**20  # bytes of JSON; the manifest of a base with 50,000 tensors has 10 million
DEEPEST = 64  # of a list in an object in a list ...
LENGTH = 8  # bytes of a safetensors file that say how long its header is


def inside(folder: Path, name: str) -> Path:
    """The path `name` in a folder that must hold it: neither `..` nor a link may lead out.

    The one exception are links of the hub's cache, which keeps the files of `snapshots/REVISION/` in `blobs/`.

    Raises:
        ArtefactError: it lies elsewhere.
    """
    try:
        root, place = folder.resolve(), (folder / name).resolve()
    except (OSError, ValueError, RuntimeError) as cause:  # no name of a file, or links in a circle
        raise ArtefactError(f"{folder}: {brief(name)} cannot be a path: {str(cause)[:200]}") from None
    blobs = [above.parent / "blobs" for above in root.parents if above.name == "snapshots"]
    if not place.is_relative_to(root) and place.parent not in blobs:
        raise ArtefactError(f"{folder}: {brief(name)} lies outside the artefact")
    return folder / name


def read_json(path: Path, *, largest: int = LARGEST) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        largest: bytes that it may have.

    Raises:
        ArtefactError: it is missing or damaged, or larger or deeper than anything written here.
    """
    content = _parsed(_bytes(path, largest), path, "not JSON")
    if not isinstance(content, dict):
        raise ArtefactError(f"{path} must hold one JSON object")
    return content


def _check_file(path: Path) -> None:
    try:
        if not path.is_file():  # a pipe would be waited for for ever
            raise ArtefactError(f"{path} is {'not a file' if path.exists() else 'missing'}")
    except OSError as cause:
        raise ArtefactError(f"{str(path)[:200]} cannot be read: {cause.strerror}") from None


def _bytes(path: Path, largest: int) -> bytes:
    _check_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except OSError as cause:
        raise ArtefactError(f"{path} cannot be read: {cause.strerror}") from cause
    if len(content) > largest:
        raise ArtefactError(f"{path} has more than {largest:,} bytes: nothing of that kind is so large")
    return content


def _parsed(content: bytes, path: Path, wrong: str) -> Any:
    try:
        parsed = _DECODER.decode(content.decode())
        _check_nested(parsed)
    except RecursionError:
        raise ArtefactError(f"{path} is nested too deeply") from None
    except ValueError as cause:
        raise ArtefactError(f"{path} is {wrong}: {cause}") from None
    return parsed


def _check_nested(content: Any) -> None:
    """No deeper than allowed, so that nothing that walks it later runs out of stack, and every text is UTF-8."""
    level = [content]
    for _ in range(DEEPEST):
        for item in level:
            for text in item if isinstance(item, dict) else [item]:
                if isinstance(text, str):
                    text.encode()  # half of a surrogate pair is a ValueError: it could not be printed or written
        level = [inner for item in level for inner in _below(item)]
        if not level:
            return
    raise RecursionError


def _below(item: Any) -> Iterable[Any]:
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, list) else ()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:80]!r} is given twice")
    return content


def _no_number(constant: str) -> Never:
    raise ValueError(f"{constant} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:80]} is too large a number")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, as they lie on disk: a page is read when it is looked at.

    Raises:
        ArtefactError: it is missing or damaged.
    """
    _check_file(path)
    try:
        _check_header(path)
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as cause:  # the last: torch cannot map or view it
        if isinstance(cause, ArtefactError):
            raise
        raise ArtefactError(f"{path} is damaged: {cause}") from cause
    return tensors


def _check_header(path: Path) -> None:
    """The header as strict JSON, each tensor once; that places and shapes agree is for safetensors to see."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH), "little")
        if not 0 < length <= path.stat().st_size - LENGTH:
            raise ValueError("its header is cut off")
        if length > LARGEST:
            raise ValueError(f"its header has {length:,} bytes, and {LARGEST:,} are more than enough")
        _parsed(file.read(length), path, "damaged: its header is no strict JSON")
