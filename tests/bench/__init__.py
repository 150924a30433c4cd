"""Instruments for who works on the kernels: what they, the schedule and the host code cost, counted on any machine.

``python -m tests.bench INSTRUMENT`` from the root of the repository prints a table, or with ``--json`` a list of
records. Tests import this package as ``bench``, as they import their other helpers.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

_INSTRUMENTS = {
    "gpu": "time on a GPU of a table of shapes, beside the time to read the keys and values, and other libraries",
    "compare": "time on a GPU of trees, shared prefixes, chosen keys and mixed steps, beside other ways to do them",
    "ranks": "time of a decode step over ranks with a GPU each, under mpiexec, beside one GPU that has all keys",
    "host": "microseconds of Python from a call to its launch (no GPU)",
    "cpu": "time of the NumPy backend beside torch on the CPU",
    "counters": "memory traffic, bank conflicts and instructions of the kernels on the simulator (no GPU)",
    "schedule": "how evenly plans share out the keys, beside FlashAttention-3 and FlashInfer",
    "chart": "nothing: the committed figures become the tables of BENCHMARKS.md and the chart of the README",
    "resources": "registers, memory and instructions of the kernels, from their machine code (no GPU)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run an instrument.

    Args:
        argv: Arguments without the program's name; default: those of the process.

    Returns:
        The exit code.

    Raises:
        SystemExit: With code 2 for wrong arguments, as argparse does.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    instruments = parser.add_subparsers(metavar="INSTRUMENT", dest="instrument", required=True)
    for name, summary in _INSTRUMENTS.items():
        instrument = instruments.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        instrument.add_argument("--json", action="store_true", help="print records instead of a table")
        _module(name).add_arguments(instrument)
        instrument.set_defaults(fail=instrument.error)
    arguments = parser.parse_args(argv)
    try:
        code: int = _module(arguments.instrument).run(arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        arguments.fail(str(error))  # exits with code 2
    except (ImportError, RuntimeError, FileNotFoundError) as error:  # a compiler, library or driver is missing
        print(f"error: {error}", file=sys.stderr)
        return 1
    return code


def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __name__)
