"""``cuflash bench``: attention on your GPU and your shapes, beside the libraries that are installed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import SchedulerMetadata
from ..bench import report
from ..bench.inputs import QUANTISED, Shape, read_trace
from ..bench.measure import measure
from ..bench.peers import PEERS, reason
from ..bench.report import Record
from ..bench.timing import Gpu, require_gpu
from ..device import host_device
from ..dtypes import dtype_name
from ..problem import MAX_BATCH
from . import packages
from .parser import program
from .text import (
    Progress,
    aligned,
    bars,
    environment,
    hanging,
    heads,
    integer,
    integers,
    positive,
    size,
    table,
    width,
    wrapped,
)

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_TRACE_BATCH = 64
_BOUNDS = {"bytes": "bytes / bandwidth", "operations": "operations / rate of the tensor cores"}


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the arguments."""
    parser = subparsers.add_parser(
        "bench",
        help="time your shapes on your GPU, beside the libraries that you have",
        description="Time attention on your GPU beside a plain read of the keys and values, and beside the libraries "
        "that are installed, whose outputs are checked first. Without a GPU: how evenly the keys are shared out.",
    )
    add = parser.add_argument
    batch = integer(1, MAX_BATCH)
    add("--batch", type=batch, help="sequences (default 32); with --trace how many at a time (default 64)")
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument("--seqlen", type=positive, default=4096, help="keys of each sequence (default 4096)")
    lengths.add_argument("--seqlens", type=integers(0), metavar="N,N,..", help="instead, keys of every sequence")
    lengths.add_argument("--trace", metavar="FILE", help="instead, a text file: the last number of each line")
    add("--steps", type=positive, default=4, help="batches of the trace, from its beginning (default 4)")
    add("--heads", type=heads, default=(32, 8), metavar="Q/KV", help="heads (default 32/8)")
    add("--headdim", type=positive, default=128, help="elements of a key (default 128)")
    add("--headdim-v", type=positive, help="elements of a value (default headdim)")
    add("--mla", action="store_true", help="values are the first elements of the keys' own rows")
    add("--page-size", type=int, default=16, help="keys per page (default 16), 0 for a contiguous cache")
    add("--dtype", default="bfloat16", help="float16, bfloat16 (default) or float32")
    add("--kv-dtype", choices=(*QUANTISED,), metavar="DTYPE", help=f"a quantised cache: {', '.join(QUANTISED)}")
    add("--queries", type=positive, default=1, help="queries per sequence (default 1)")
    add("--causal", action="store_true", help="causal mask, which matters from two queries on")
    add("--peers", nargs="*", choices=list(PEERS), metavar="PEER", help=f"of {', '.join(PEERS)} (default: all)")
    add("--rounds", type=positive, default=11, help="rounds, of which the median counts (default 11)")
    add("--json", action="store_true", help="print records instead of tables")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Time, or without a GPU plan; the exit code is 1 if a shape failed."""
    shapes = list(_shapes(arguments))
    with environment(CUFLASH_BACKEND="numpy"):  # wrong arguments show before anything is made
        plans = [shape.plan(shape.lengths) for shape in shapes]
    try:
        require_gpu()
    except RuntimeError as error:
        return _evenness(shapes, plans, str(error), arguments.json)
    chosen = {name: PEERS[name] for name in (PEERS if arguments.peers is None else arguments.peers)}
    records: list[Record] = []
    progress = Progress()
    with environment(CUFLASH_BACKEND="auto"):  # arrays on the GPU run there, the reference runs on NumPy
        progress("measuring the bandwidth")
        gpu = Gpu()
        arch = f"sm_{gpu.arch}"
        machine: Record = {"variant": "machine", "arch": arch, "workload": "a long read", "read_tb_s": gpu.bandwidth}
        records.append({**machine, **gpu.facts})
        progress.done()
        if not arguments.json:
            hanging("", f"{gpu.facts['gpu']}, CuPy {gpu.facts['cupy']}: {gpu.bandwidth:.2f} TB/s in a long read")
        for shape in shapes:
            progress(f"timing {shape.name}")
            record: Record = {"variant": f"{shape.dtype} {shape.headdim}", "arch": arch, "workload": shape.name}
            try:
                record |= measure(shape, gpu, chosen, arguments.rounds)
            except Exception as error:  # one shape must not hide the others
                record["error"] = reason(error)
            gpu.free()
            progress.done()
            records.append(record)
            if not arguments.json:
                print_times(shape, record)
    if arguments.json:
        report.write(records, as_json=True)
    else:
        _print_notes(records)
    return int(any("error" in record for record in records))


# ------------------------------------------------------------------------------------------------------------- shapes
def _shapes(arguments: argparse.Namespace) -> Iterator[Shape]:
    """Yield what the arguments ask for."""
    dtype = dtype_name("--dtype", arguments.dtype)
    heads_q, heads_kv = arguments.heads
    for what, lengths in _batches(arguments):
        if lengths.min() < arguments.queries:
            raise ValueError(f"lengths must be at least --queries {arguments.queries}, got {lengths.min()}")
        words = [what, f"{heads_q}/{heads_kv} heads", f"dim {arguments.headdim}", dtype]
        words += [f"{arguments.kv_dtype} cache"] if arguments.kv_dtype else []
        words += [f"pages of {arguments.page_size}" if arguments.page_size else "contiguous"]
        words += [f"{arguments.queries} queries"] if arguments.queries > 1 else []
        words += ["MLA"] if arguments.mla else []
        words += ["causal"] if arguments.causal else []
        yield Shape(
            ", ".join(words), lengths, heads_q, heads_kv, arguments.headdim, arguments.page_size or None,
            arguments.headdim_v, dtype, arguments.kv_dtype, arguments.queries, arguments.causal, arguments.mla,
        )  # fmt: skip


def _batches(arguments: argparse.Namespace) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Yield batches of lengths and what to call them."""
    if arguments.trace is not None:
        lengths = read_trace(arguments.trace)
        count = arguments.batch or _TRACE_BATCH
        for begin in range(0, min(len(lengths), count * arguments.steps), count):
            batch = lengths[begin : begin + count]
            yield f"{Path(arguments.trace).name} from {begin}, {_range(batch)}", batch
    elif arguments.seqlens:
        lengths = np.array(arguments.seqlens, np.int64)
        if arguments.batch not in (None, len(lengths)):
            raise ValueError(f"--batch must be the {len(lengths)} of --seqlens or left out, got {arguments.batch}")
        yield _range(lengths), lengths
    else:
        lengths = np.full(arguments.batch or 32, arguments.seqlen, np.int64)
        yield _range(lengths), lengths


def _range(lengths: NDArray[np.int64]) -> str:
    """Say how many lengths there are and between what."""
    least, most = lengths.min(), lengths.max()
    return f"{len(lengths)} x {least} keys" if least == most else f"{len(lengths)} x {least} to {most} keys"


# ------------------------------------------------------------------------------------------------------ without a GPU
def _evenness(shapes: list[Shape], plans: list[SchedulerMetadata], why: str, as_json: bool) -> int:
    """Say why there are no times, and how evenly the plans share out the keys."""
    remedy = packages.install(*packages.cuda()) if "not installed" in why else f"{program()} info says more"
    device = host_device()
    if as_json:
        rows = zip(shapes, plans, strict=True)
        report.write((_plan_record(shape, plan, why) for shape, plan in rows), as_json=True)
        return 0
    hanging("", f"No times: {why}.")
    hanging("-> ", remedy)
    hanging("", f"How evenly keys are shared out on {device.num_sm} SMs of sm_{device.arch}:")
    for shape, plan in zip(shapes, plans, strict=True):
        print()
        hanging("", f"{shape.name}; {size(shape.kv_bytes)} of keys and values")
        aligned(str(plan))
        work = plan.work()
        print(
            f"  {'shares':<10}  {bars(np.bincount(work['block'], work['key_end'] - work['key_begin']), width() - 15)}"
        )
    return 0


def _plan_record(shape: Shape, plan: SchedulerMetadata, why: str) -> Record:
    return {
        "variant": f"{shape.dtype} {shape.headdim}",
        "arch": f"sm_{plan.device.arch}",
        "workload": shape.name,
        "kv_mb": shape.kv_bytes / 1e6,
        "num_sm": plan.device.num_sm,
        "blocks": int(plan.array[0]),
        "num_blocks": plan.num_blocks,
        "efficiency": plan.efficiency,
        "balance": plan.balance,
        "no_times": why,
    }


# --------------------------------------------------------------------------------------------------------- with a GPU
def print_times(shape: Shape, record: Record) -> None:
    """Print the times of a shape."""
    print()
    hanging("", f"{shape.name}; {size(shape.kv_bytes)} of keys and values")
    if "error" in record:
        hanging("  ", record["error"])
        return
    evenness = f"{record['blocks']} blocks, efficiency {record['efficiency']:.1%}, balance {record['balance']:.1%}"
    rows: list[tuple[str, Any, str]] = [
        ("floor", record["floor_us"], _BOUNDS[record["bound"]]),
        ("read kernel", record["read_us"], "reads as many bytes, and nothing else"),
        ("cuflash", record["given_us"], f"on a plan: {evenness}"),
        ("cuflash, no plan", record["unplanned_us"], "plans in the call"),
    ]
    for name, value in record["peers"].items():
        if isinstance(value, float):
            rows.append((name, value, ""))
        elif value != "not installed":
            rows.append((name, None, value))
    cells = [
        (name, _us(value), f"{value / record['floor_us']:.2f} x" if value else "-", note) for name, value, note in rows
    ]
    name_width = max(len(name) for name, *_ in cells)
    for name, time, ratio, note in cells:
        first = f"  {name:<{name_width}}  {time:>9}  {ratio:>7}  "
        print("\n".join(wrapped(first, note) or [first.rstrip()]))


def _print_notes(records: list[Record]) -> None:
    """Print how to read the tables, and what else could be in them."""
    absent = dict.fromkeys(
        name for record in records for name, value in record.get("peers", {}).items() if value == "not installed"
    )
    print()
    hanging(
        "",
        "Time of a call, and beside the floor: medians of CUDA graphs of calls on copies larger than L2. The outputs "
        "of all were compared before. JAX: wall time. cuDNN, FA2, flex, JAX and FA3's wheel read contiguous copies.",
    )
    if absent:
        print()
        print("Not installed:")
        print(table(("library", "to install it"), [(name, PEERS[name].install) for name in absent]))


def _us(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f} us" if value >= 10 else f"{value:.2f} us"
