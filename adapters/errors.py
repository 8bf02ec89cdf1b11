"""Every error that a user can meet, and the exit code that each one ends a command with.

    OnegpuError
    ├── InvalidInput (ValueError)          exit 2   what was asked for is wrong
    │   ├── RecipeError                             a recipe, a setting, an argument
    │   ├── DataError                               rows, columns, files of a data set
    │   ├── TargetError                             a pattern that matches nothing
    │   ├── StackError                              adapters that cannot work together
    │   └── ArtefactError                           an adapter folder that is not what it should be
    ├── Unavailable (RuntimeError)         exit 3   something needed is missing here
    │   ├── PluginError (LookupError)               unknown, ambiguous, broken or outdated plugin
    │   ├── DeviceError                             device, precision or memory
    │   └── StorageError                            a disk, a folder or a limit that takes no more
    ├── ProofFailed (AssertionError)       exit 4   a run that did not do what it claims
    └── Interrupted                        exit 130 the user stopped a run that can be resumed

A message names the place and the valid choices; no traceback is needed to act on it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from reprlib import Repr

__all__ = [
    "OnegpuError",
    "InvalidInput",
    "RecipeError",
    "DataError",
    "TargetError",
    "StackError",
    "ArtefactError",
    "Unavailable",
    "PluginError",
    "DeviceError",
    "StorageError",
    "ProofFailed",
    "Interrupted",
    "brief",
    "noted",
    "nearest",
    "printable",
    "together",
]


LONGEST_VALUE = 240  # characters of a value in a message
LONGEST_MESSAGE = 1400  # characters


class OnegpuError(Exception):
    """The root: anything that ends a command with a message instead of a traceback."""

    exit_code = 1


class InvalidInput(OnegpuError, ValueError):
    """What was asked for is wrong: a recipe, data, an argument, an artefact."""

    exit_code = 2


class RecipeError(InvalidInput):
    """A recipe or a setting is wrong; the message names file, line and path.

    `faults` are (path, message) pairs, for who can add the line.
    """

    def __init__(self, message: str, *, faults: Sequence[tuple[tuple[str | int, ...], str]] = ()) -> None:
        super().__init__(message)
        self.faults = tuple(faults)


class DataError(InvalidInput):
    """A data set is missing, empty, or lacks what its task needs."""


class TargetError(InvalidInput):
    """A pattern or a name matches nothing in the model."""


class StackError(InvalidInput):
    """Adapters that cannot be used together, or not on this base."""


class ArtefactError(InvalidInput):
    """An adapter folder is incomplete, altered, or belongs to another base."""


class Unavailable(OnegpuError, RuntimeError):
    """Something needed is missing or does not fit this machine."""

    exit_code = 3


class PluginError(Unavailable, LookupError):
    """A plugin is unknown, ambiguous, broken, or written for another API level."""

    __str__ = Exception.__str__  # LookupError's children may quote their message


class DeviceError(Unavailable):
    """The device lacks a capability, a precision or the memory that was asked for."""


class StorageError(Unavailable):
    """Something could not be written: the disk is full, the folder read-only, or too many files are open."""


class ProofFailed(OnegpuError, AssertionError):
    """The run did not do what it claims; what was written is kept aside and named."""

    exit_code = 4


class Interrupted(OnegpuError):
    """The user stopped a run that can be resumed."""

    exit_code = 130


@contextmanager
def noted(found: list[OnegpuError]) -> Iterator[None]:
    """Note what is wrong inside the block, so that all faults can be told at once; see `together`."""
    try:
        yield
    except OnegpuError as error:
        found.append(error)


def together(found: Sequence[OnegpuError]) -> OnegpuError:
    """Several errors as one, a line each. Where the input is at fault, so it is (exit 2), whatever else is missing."""
    if len(found) == 1:
        return found[0]
    lines = list(dict.fromkeys(str(error) for error in found))
    kinds = {type(error) for error in found}
    if len(kinds) == 1:
        return kinds.pop()("\n".join(lines))
    wrong = any(isinstance(error, InvalidInput) for error in found)
    return (RecipeError if wrong else Unavailable)("\n".join(lines))


def nearest(wrong: str, valid: Iterable[str], *, list_all: bool = True) -> str:
    """The tail of an error message: the likeliest intended name, and the valid ones when they are few."""
    choices = sorted(set(valid))
    close = get_close_matches(wrong, choices, n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    if list_all and choices and (len(choices) <= 12 or not close):
        shown = ", ".join(choices[:12]) + (", ..." if len(choices) > 12 else "")
        hint += f" (valid: {shown})"
    return hint


_BRIEF = Repr()
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxdict = 3, 12, 6
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 120


def brief(value: object) -> str:
    """`repr` of what was given, for a message: in one line, and short whatever it is."""
    text = _BRIEF.repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def printable(message: str) -> str:
    """A message as it is shown: what a file smuggled in cannot move the cursor, and nothing fills the screen."""
    text = message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]} ... (cut)"
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
