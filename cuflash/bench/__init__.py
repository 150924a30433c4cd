"""Instruments: what the kernels, the schedule and the host code cost, counted on any machine.

``python -m cuflash bench INSTRUMENT`` prints a table, or with ``--json`` a list of records.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

_INSTRUMENTS = {
    "gpu": "time on a GPU beside the time to read the keys and values, and beside other libraries",
    "host": "microseconds of Python from a call to its launch (no GPU)",
    "cpu": "time of the NumPy backend beside torch on the CPU",
    "counters": "memory traffic, bank conflicts and instructions of the kernels on the simulator (no GPU)",
    "schedule": "how evenly plans share out the keys, beside FlashAttention-3 and FlashInfer",
    "resources": "registers, memory and instructions of the kernels, from their machine code (no GPU)",
}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Describe the arguments of ``bench``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench", help="count what kernels, schedule and host code cost", description=__doc__
    )
    instruments = parser.add_subparsers(metavar="INSTRUMENT", dest="instrument", required=True)
    for name, summary in _INSTRUMENTS.items():
        instrument = instruments.add_parser(name, help=summary, description=f"Count {summary}.")
        instrument.add_argument("--json", action="store_true", help="print records instead of a table")
        _module(name).add_arguments(instrument)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run an instrument; returns the exit code."""
    code: int = _module(arguments.instrument).run(arguments)
    return code


def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __name__)
