"""``cuflash [demo | info | schedule | bench | cache | replay]``: one module per command.

A command's module has two functions: ``add_parser`` describes its arguments, ``run`` does the work and returns the exit
code. Wrong arguments raise ValueError or TypeError anywhere in ``run``, and end as the parser's own errors do.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from .. import __version__
from . import bench, cache, demo, info, replay, schedule
from .parser import Parser, program
from .text import survive_any_encoding, wrapped

__all__ = ["bench", "cache", "demo", "info", "main", "replay", "schedule"]

_COMMANDS = (demo, info, schedule, bench, cache, replay)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; default: those of the process.

    Returns:
        The exit code.

    Raises:
        SystemExit: With code 2 for wrong arguments, as argparse does.
    """
    survive_any_encoding()
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # cuflash schedule | head
        with contextlib.suppress(OSError):  # what is left would be written at the end, and fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: list[str]) -> int:
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments.insert(0, "demo")
    name = program()
    parser = Parser(
        prog=name,
        description="Decode attention for CuPy. Without a command: demo.",
        epilog=f"{name} COMMAND --help says more about a command.",
    )
    parser.add_argument("--version", action="version", version=f"cuflash {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        subparser = command.add_parser(subparsers)
        subparser.set_defaults(run=command.run, fail=subparser.error)
    parsed = parser.parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except (TypeError, ValueError, NotImplementedError) as error:
        parsed.fail(str(error))  # exits with code 2
    except BrokenPipeError:
        raise
    except (OSError, MemoryError) as error:  # a file or a folder that may not be used, or too little memory
        print(*wrapped("error: ", str(error) or "out of memory"), sep="\n", file=sys.stderr)
    except (ImportError, RuntimeError) as error:  # a compiler, library or driver is missing or broken
        print("\n".join(["", *wrapped("error: ", str(error)), f"{name} info says what is missing"]), file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1
