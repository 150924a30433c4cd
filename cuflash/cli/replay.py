"""``cuflash replay``: run a call again that ``CUFLASH_LOG`` has written down."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import cuflash

from .. import journal
from .info import backend_in_use
from .text import environment, hanging

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_SET = (journal.VARIABLE, "CUFLASH_BACKEND")
_CALLS = ("flash_attn_with_kvcache", "get_scheduler_metadata")


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the arguments."""
    parser = subparsers.add_parser(
        "replay",
        help="run calls again that CUFLASH_LOG=FILE has written down",
        description="Run calls again that a program wrote to CUFLASH_LOG=FILE: with its shapes, layouts, options and "
        "index arrays, on numbers that are made up. Results of other backends are compared with the NumPy backend's.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="what CUFLASH_LOG wrote")
    parser.add_argument("--line", type=int, metavar="N", help="only this line, from 1; negative ones from the end")
    parser.add_argument("--backend", choices=("cuda", "sim", "numpy"), help="where (default: where the arrays were)")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the calls; the exit code is 1 if one fails, or differs from the NumPy backend's result."""
    try:
        lines = [line for line in arguments.file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"FILE must be what CUFLASH_LOG wrote: {error}") from None
    if arguments.backend == "cuda":
        with environment(CUFLASH_BACKEND="cuda"):
            backend_in_use()  # one error instead of one a line
    numbers = range(1, len(lines) + 1)
    if arguments.line is not None:
        if not (arguments.line and abs(arguments.line) <= len(lines)):
            raise ValueError(f"--line must be one of 1 to {len(lines)}, got {arguments.line}")
        number = arguments.line if arguments.line > 0 else len(lines) + 1 + arguments.line
        numbers = range(number, number + 1)
    return max([_again(number, lines[number - 1], arguments.backend) for number in numbers], default=0)


def _again(number: int, text: str, backend: str | None) -> int:
    """Run one call; return 1 if it fails or its result is another one than NumPy's."""
    try:
        line = json.loads(text)
        name, described = str(line["call"]), dict(line["arguments"])
        memories = [str(x["memory"]) for x in described.values() if isinstance(x, dict) and "memory" in x]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"line {number} must be one that CUFLASH_LOG wrote, got {text[:60]!r}") from None
    if name not in _CALLS:
        raise ValueError(f"line {number} must be about {' or '.join(_CALLS)}, got {name!r}")
    on_gpu = any("GPU" in memory for memory in memories)
    backend = backend or ("cuda" if on_gpu else os.environ.get("CUFLASH_BACKEND") or "auto")
    backend = "numpy" if backend == "auto" else backend  # what it means for arrays in host memory
    before = dict(os.environ)
    try:
        return _compared(number, name, described, backend, str(line.get("error", "no error")))
    finally:
        for variable in _SET:
            os.environ.pop(variable, None)
            os.environ.update({variable: before[variable]} if variable in before else {})


def _compared(number: int, name: str, described: dict[str, Any], backend: str, was: str) -> int:
    begin = time.perf_counter()
    try:
        found = _call(name, described, backend)
    except Exception as error:  # what the report is about
        hanging(f"line {number}: ", f"{type(error).__name__}: {error}")
        hanging("  then: ", was)
        return 1
    seconds = time.perf_counter() - begin
    text = f"{name} on {backend}, {seconds:.3f} s"
    if name == _CALLS[0] and backend != "numpy":
        wanted = _call(name, described, "numpy")
        off = float(np.abs(found - wanted).max(initial=0)) if np.isfinite(found).all() else float("inf")
        text += f", off the NumPy backend by {off:.2g} at most"
        hanging(f"line {number}: ", text)
        return int(not off < 0.05)
    hanging(f"line {number}: ", text)
    return 0


def _call(name: str, described: dict[str, Any], backend: str) -> Any:
    """Run a call on numbers from a seed, on a plan if it had one; return the output as float32."""
    os.environ.pop(journal.VARIABLE, None)  # this is none of the program's calls
    os.environ["CUFLASH_BACKEND"] = backend
    xp = importlib.import_module("cupy" if backend == "cuda" else "numpy")
    rng = np.random.default_rng(0)
    plan = described.get("scheduler_metadata")
    given = journal.all_rebuilt(described, xp, rng)
    if name == _CALLS[1]:
        cuflash.get_scheduler_metadata(**given)
        return None
    if plan is not None:
        given["scheduler_metadata"] = _planned(plan, given, xp)
    result = cuflash.flash_attn_with_kvcache(**given)
    out = result[0] if isinstance(result, tuple) else result
    return np.asarray(out.get() if xp is not np else out, np.float32)


def _planned(plan: dict[str, Any], given: dict[str, Any], xp: Any) -> cuflash.SchedulerMetadata:
    """Make the plan of a call, for the call's lengths where they fit: a plan for another problem has made-up ones.

    A line does not say what a plan was filled with; and it is the call that is to refuse the plan.
    """
    problem, longest = dict(plan["plan"]), plan["max_seqlen_k"]
    ragged, batch = problem.pop("cu_seqlens_q"), problem["batch_size"]
    problem |= {"window_size": tuple(problem["window_size"]), "max_seqlen_k": longest}
    problem["pack_gqa"] = plan.get("pack_gqa")  # lines of older versions do not say it
    lengths = given.get("cache_seqlens")
    try:
        return cuflash.get_scheduler_metadata(
            **problem,
            cache_seqlens=longest if lengths is None else lengths,
            cu_seqlens_q=given["cu_seqlens_q"] if ragged else None,
        )
    except (KeyError, TypeError, ValueError):
        return cuflash.get_scheduler_metadata(
            **problem,
            cache_seqlens=xp.full(batch, longest, np.int32),
            cu_seqlens_q=xp.zeros(batch + 1, np.int32) if ragged else None,
        )
