"""``python -m cuflash [demo | info | schedule | bench]``: one module per command.

A command's module has two functions: ``add_parser`` describes its arguments, ``run`` does the work and returns the exit
code. Wrong arguments raise ValueError or TypeError anywhere in ``run``, and end as argparse's own errors do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from . import demo, info, schedule
from .text import survive_any_encoding

__all__ = ["demo", "info", "main", "schedule"]

_COMMANDS = (demo, info, schedule)


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
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments.insert(0, "demo")
    parser = argparse.ArgumentParser(
        prog="python -m cuflash",
        description="Decode attention for CuPy. Without a command: demo.",
        epilog="python -m cuflash COMMAND --help says more about a command.",
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
    except (ImportError, RuntimeError) as error:  # a compiler, library or driver is missing or broken
        print(f"\nerror: {error}\npython -m cuflash info says what is missing", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # python -m cuflash schedule | head
        sys.stderr.close()
        return 1
    return 1
