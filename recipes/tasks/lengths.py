"""What happens to an example that is longer than `max_length`: never silently cut."""

from collections.abc import Iterator, Sequence

from onegpu.adapters import DataError

from .contract import IGNORED, RowProblem, TooLong

__all__ = ["Piece", "fit", "refuse_too_long"]

Piece = tuple[list[int], list[int], int]  # ids, labels (one per id), tokens that were cut

OVERLAP = 4  # a window repeats a quarter of the one before it, for context


def refuse_too_long(length: int, limit: int, policy: TooLong, choices: Sequence[TooLong]) -> None:
    """Raise where the policy is not to use such a row.

    Args:
        choices: the policies that the task offers, for the message.

    Raises:
        DataError: the policy is `error`.
        RowProblem: the policy is `drop`.
    """
    if length <= limit:
        return
    if policy == "error":
        others = ", ".join(choice for choice in choices if choice != "error")
        raise DataError(f"{length} tokens, and max_length is {limit}: raise max_length, or set `too_long` ({others})")
    if policy == "drop":
        raise RowProblem(f"too long: above {limit} tokens")


def fit(
    ids: Sequence[int], labels: Sequence[int], limit: int, policy: TooLong, *, begin: int | None = None
) -> list[Piece]:
    """Cut a sequence that has a label for each token to what the model can take.

    Args:
        begin: the token that every sequence begins with; it stays when the left is cut.

    Raises:
        DataError, RowProblem: see `refuse_too_long`.
    """
    refuse_too_long(len(ids), limit, policy, ("error", "drop", "cut-left", "cut-right", "window"))
    cut = max(0, len(ids) - limit)
    if cut and policy == "window":
        return list(_windows(ids, labels, limit))
    if cut and policy == "cut-left":
        kept = limit if begin is None or ids[0] != begin else limit - 1
        return [([*ids[: limit - kept], *ids[-kept:]], [*labels[: limit - kept], *labels[-kept:]], cut)]
    return [(list(ids[:limit]), list(labels[:limit]), cut)]


def _windows(ids: Sequence[int], labels: Sequence[int], limit: int) -> Iterator[Piece]:
    """Windows that overlap, where each label is in exactly one: the first that has it."""
    overlap = max(1, limit // OVERLAP)
    for start in range(0, max(1, len(ids) - overlap), limit - overlap):
        seen = overlap if start else 0
        own = [IGNORED] * seen + list(labels[start + seen : start + limit])
        if any(label != IGNORED for label in own):
            yield list(ids[start : start + limit]), own, 0
