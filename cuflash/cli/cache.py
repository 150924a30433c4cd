"""``cuflash cache``: how much compilers have left on the disk, and how to get rid of it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import cache
from .parser import program
from .text import hanging, size

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the arguments."""
    parser = subparsers.add_parser(
        "cache",
        help="how much compiled kernels take on the disk; clear deletes them",
        description="Say how much compiled kernels take on the disk, or delete those that this library keeps.",
    )
    parser.add_argument("action", nargs="?", choices=("clear",), help="delete them; they are made again when needed")
    parser.add_argument("--yes", action="store_true", help="delete without asking")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Say what there is, or delete it; the exit code is 1 if nothing was deleted that should have been."""
    files = cache.files()
    if arguments.action is None:
        hanging("  cuflash  ", f"{summary(files)} ({cache.folder()})")
        hanging("        -> ", f"{program()} cache clear" if files else "")
        of_cupy = cupy_folder()
        hanging("  CuPy     ", f"{summary(files_below(of_cupy))}, those of other programs too ({of_cupy})")
        hanging("        -> ", f"to clear it, delete {of_cupy}" if os.path.isdir(of_cupy) else "")
        return 0
    if not files:
        hanging("", f"nothing to delete in {cache.folder()}")
        return 0
    if not arguments.yes and not _agrees(f"Delete {summary(files)} in {cache.folder()}? [y/N] "):
        print("nothing deleted")
        return 1
    total = summary(files)
    for file in files:
        file.unlink(missing_ok=True)
    hanging("", f"deleted {total} in {cache.folder()}")
    return 0


def cupy_folder() -> Path:
    """Return the folder of the kernels that CuPy compiles, this library's among them."""
    return Path(os.path.expanduser(os.environ.get("CUPY_CACHE_DIR") or "~/.cupy/kernel_cache"))


def files_below(folder: Path) -> list[Path]:
    """Return all files in a folder and its folders, as far as they can be read."""
    return [Path(place, name) for place, _, names in os.walk(folder) for name in names]


def summary(files: Sequence[Path]) -> str:
    """Say how many files there are and how large they are."""
    total = 0
    for file in files:
        try:
            total += file.stat().st_size
        except OSError:  # deleted in between
            continue
    return f"{len(files)} file{'s' * (len(files) != 1)}, {size(total)}"


def _agrees(question: str) -> bool:
    print(question, end="", flush=True)
    answer = sys.stdin.readline() if sys.stdin is not None else ""
    if not answer.endswith("\n"):
        print()
    return answer.strip().lower() in ("y", "yes")
