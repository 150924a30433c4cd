"""What the commands share: argument types, bars, tables, progress."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:-=+*%#"


def survive_any_encoding() -> None:
    """Let a terminal that cannot show a character show a question mark instead of a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # None where it is closed
            stream.reconfigure(errors="replace")


@contextmanager
def environment(**values: Any) -> Iterator[None]:
    """Set environment variables for a while; those whose value is None stay as they are."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: str(value) for name, value in values.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def width() -> int:
    """Columns of the terminal, at most 120."""
    return min(shutil.get_terminal_size((100, 24)).columns, 120)


def wrapped(first: str, text: str, later: str | None = None) -> list[str]:
    """Break text into lines of the terminal's width.

    Args:
        first: What stands before the first line.
        text: The text; words that are longer than a line stay whole.
        later: What stands before the others; blanks by default.

    Returns:
        The lines: none without text, and the text as it is, blanks included, where it fits into one.
    """
    if not text or len(first + text) <= width():
        return [first + text] if text else []
    return textwrap.wrap(
        text, width(), initial_indent=first, subsequent_indent=" " * len(first) if later is None else later,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def hanging(first: str, text: str) -> None:
    """Print text as :func:`wrapped` breaks it."""
    for line in wrapped(first, text):
        print(line)


def aligned(text: str, column: int = 14) -> None:
    """Print lines of names and what belongs to them, which begins at a column."""
    for line in text.splitlines():
        hanging(line[:column], line[column:]) if len(line) > width() else print(line)


def bars(values: ArrayLike, columns: int) -> str:
    """Draw non-negative numbers as a row of bars, the largest one full.

    Args:
        values: The numbers. Where they are more than ``columns``, a bar shows the mean of its neighbours.
        columns: The most characters to use; one at least.

    Returns:
        The row.
    """
    numbers = np.asarray(values, np.float64)
    if not numbers.size or not numbers.max():
        return ""
    groups = np.array_split(numbers, min(max(columns, 1), numbers.size))
    heights = np.array([group.mean() for group in groups])
    levels = _BLOCKS if _can_print(_BLOCKS) else _ASCII
    steps = np.where(heights > 0, np.ceil(heights / numbers.max() * (len(levels) - 1) - 1e-9), 0)
    return "".join(levels[int(step)] for step in steps)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lay out a table: two blanks before each column, numbers to the right and text to the left.

    Where it is wider than the terminal the last column is broken into lines.
    """
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    sides = "".join("<" if isinstance(cell, str) else ">" for cell in rows[0]) if rows else "<" * len(header)
    lines: list[str] = []
    for *before, last in cells:
        first = "".join(f"  {cell:{side}{w}}" for cell, side, w in zip(before, sides, widths)) + "  "
        text = f"{last:{sides[-1]}{widths[-1]}}".rstrip()
        lines += [line.rstrip() for line in wrapped(first, text)] or [first.rstrip()]
    return "\n".join(lines)


def size(number: float) -> str:
    """Say a number of bytes for a person: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1000
    return f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"


def seconds(number: float) -> str:
    """Say a time for a person: 1.25 ms."""
    if number < 1e-3:
        return f"{1e6 * number:.3g} us"
    return f"{1e3 * number:.3g} ms" if number < 1 else f"{number:.3g} s"


def heads(text: str) -> tuple[int, int]:
    """Read ``32/8``: query heads and KV heads."""
    query, slash, kv = text.partition("/")
    return int(query), int(kv if slash else query)


heads.__name__ = "heads (like 32/8)"  # what argparse calls it in an error


def integer(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return what reads an integer from ``least`` to ``most``, the largest that kernels and index arrays know."""

    def read(text: str) -> int:
        number = int(text)
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"must be in [{least}, {most}], got {number}")
        return number

    read.__name__ = "integer"
    return read


positive = integer(1)


def integers(least: int) -> Callable[[str], list[int]]:
    """Return what reads ``4096,100,2048``, each number at least ``least``."""
    each = integer(least)

    def read(text: str) -> list[int]:
        return [each(number) for number in text.split(",")]

    read.__name__ = "list of integers (like 4096,100,2048)"
    return read


class Progress:
    """One line on a terminal that says what is being done; nothing where stderr is not a terminal."""

    def __init__(self) -> None:
        self._shows = sys.stderr is not None and sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        """Replace the line."""
        if self._shows:
            print(f"\r\033[K  {text} ...", end="", file=sys.stderr, flush=True)

    def done(self) -> None:
        """Clear the line."""
        if self._shows:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _can_print(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")  # no encoding, no stream: it may be closed
    except (LookupError, UnicodeEncodeError):
        return False
    return True
