"""The one error of a group of ranks."""

from __future__ import annotations

from collections.abc import Iterable


class ContextParallelError(RuntimeError):
    """A rank is missing, has failed, or wants something else than the others; the message names it.

    The group refuses further calls, since its ranks may no longer be at the same one. Make a new group, or end.

    Attributes:
        is_known: Whether the other ranks raise this error, too, without being told.
    """

    def __init__(self, message: str, is_known: bool = False) -> None:
        super().__init__(message)
        self.is_known = is_known


def name_ranks(ranks: Iterable[int]) -> str:
    """Say ranks for a person: ``rank 2``, ``ranks 0, 1 and 3``."""
    *first, last = map(str, sorted(ranks))
    return f"ranks {', '.join(first)} and {last}" if first else f"rank {last}"
