"""What the commands share: argument types, bars, tables, progress."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:-=+*%#"


def survive_any_encoding() -> None:
    """Let a terminal that cannot show a character show a question mark instead of a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
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


def bars(values: ArrayLike, columns: int) -> str:
    """Draw non-negative numbers as a row of bars, the largest one full.

    Args:
        values: The numbers. Where they are more than ``columns``, a bar shows the mean of its neighbours.
        columns: The most characters to use.

    Returns:
        The row.
    """
    numbers = np.asarray(values, np.float64)
    if not numbers.size or not numbers.max():
        return ""
    groups = np.array_split(numbers, min(columns, numbers.size))
    heights = np.array([group.mean() for group in groups])
    levels = _BLOCKS if _can_print(_BLOCKS) else _ASCII
    steps = np.where(heights > 0, np.ceil(heights / numbers.max() * (len(levels) - 1) - 1e-9), 0)
    return "".join(levels[int(step)] for step in steps)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lay out a table: two blanks before each column, numbers to the right and text to the left."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    sides = "".join("<" if isinstance(cell, str) else ">" for cell in rows[0]) if rows else "<" * len(header)
    return "\n".join(
        "".join(f"  {cell:{side}{w}}" for cell, side, w in zip(row, sides, widths)).rstrip() for row in cells
    )


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


def integers(text: str) -> list[int]:
    """Read ``4096,100,2048``."""
    return [int(number) for number in text.split(",")]


integers.__name__ = "list of integers (like 4096,100,2048)"


def positive(text: str) -> int:
    """Read an integer that is at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


positive.__name__ = "positive integer"


class Progress:
    """One line on a terminal that says what is being done; nothing where stderr is not a terminal."""

    def __init__(self) -> None:
        self._shows = sys.stderr.isatty()

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
        text.encode(sys.stdout.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True
