"""argparse's parser with errors that begin with what is wrong."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from .text import wrapped


def program() -> str:
    """Return how the program was called: as a script, or as a module."""
    return "cuflash" if Path(sys.argv[0] if sys.argv else "").stem == "cuflash" else "python -m cuflash"


class Parser(argparse.ArgumentParser):
    """A parser whose error is the message, one line of usage, and where the rest stands.

    The help begins with the same line: argparse's own repeats all options there, and is wider than a narrow terminal.
    A word that begins like a negative number is a value, so that ``--window -1,0`` works.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # that of Python 3.14; before, -1,0 was an option

    def format_help(self) -> str:
        """Return the help."""
        self.usage = f"{self.prog} {self._short_usage()}"
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        usage = f"usage: {self.prog} {self._short_usage()}"
        lines = [*wrapped("error: ", message), *wrapped("", usage), f"{self.prog} --help says more"]
        self.exit(2, "\n".join(lines) + "\n")

    def _short_usage(self) -> str:
        words = []
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                words.append(f"{action.metavar} ...")
            elif not action.option_strings:
                name = str(action.metavar or "|".join(action.choices or [action.dest]))
                words.append(name if action.required else f"[{name}]")
            elif action.required:
                words.append(f"{action.option_strings[0]} {action.metavar or action.dest.upper()}")
        return " ".join([*words, "[options]"])
