"""A table of shapes on a GPU, timed by :mod:`cuflash.bench`, and what plans and calls take; a GPU is needed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cuflash.bench import report
from cuflash.bench.inputs import Inputs, Shape
from cuflash.bench.measure import measure as measure_shape
from cuflash.bench.peers import PEERS, reason
from cuflash.bench.report import Record
from cuflash.bench.timing import Gpu, machine_facts, medians, require_gpu

# Lengths, query and KV heads, what an H200 should need at most in us, and what is not bfloat16, head dim 128, pages of
# 16 keys and one query.
_Entry = tuple[str, int, int, float | None, dict[str, Any]]

_MLA = {"headdim": 576, "headdim_v": 512, "page_size": 64, "latent": True}
_E4M3 = {"kv_dtype": "float8_e4m3fn"}

# The first ones are those that --quick measures.
_DECODE: tuple[_Entry, ...] = (
    ("b32 L4096", 32, 8, 121, {}),
    ("b1 L1024", 32, 4, 3.5, {}),
    ("b1 L32768", 32, 8, 33, {}),
    ("b64 random 1..8192", 8, 1, 32.5, {}),
    ("b128 lognormal", 32, 8, 183, {}),
    ("b16 L2000", 32, 32, 118, {}),
    ("b1 L262144", 32, 4, 124, {}),
    ("b32 L32768", 8, 1, 124, {}),
    ("b32 L4096", 64, 4, 63, {}),  # 16 query rows per KV head
    ("b32 L4096", 256, 8, 126, {}),  # 32
    ("b32 L4096", 32, 8, 63, {"headdim": 64}),
    ("b32 L4096", 16, 8, 239, {"headdim": 256}),
    ("b4 L1024", 32, 8, 6.5, {}),
    ("b32 L4096", 32, 8, None, {"page_size": None}),
    ("b32 L4096", 32, 8, None, {"page_size": 64}),
    ("b32 L4096", 32, 8, None, {"page_size": 1}),
    ("b64 random 1..8192", 8, 1, None, {"page_size": 64}),
    ("b1 L4096", 32, 8, None, {}),
    ("b16 L1024", 32, 8, None, {}),
    ("b8 L2048", 32, 8, None, {}),
    ("b64 L8192", 32, 8, None, {}),
)
_MANY_ROWS: tuple[_Entry, ...] = (
    ("b32 L4096", 32, 8, 128, {"queries": 8}),
    ("b32 L4096", 32, 8, 127, {"queries": 16}),
    ("b1 L32768", 32, 8, 36, {"queries": 16}),
    ("b32 L4096", 64, 4, 64, {"queries": 4}),
    ("b8 L4096", 32, 8, 60, {"queries": 64}),
    ("b1 L8192", 32, 8, 37, {"queries": 128}),
    ("b1 L8192", 32, 8, 104, {"queries": 512}),
    ("b1 L8192", 32, 8, 382, {"queries": 2048}),
    ("b32 L4096", 32, 8, 76, {"queries": 16, **_E4M3}),  # 0.6 of what bfloat16 should need
)
_LATENT: tuple[_Entry, ...] = (
    ("b128 L4096", 16, 1, 139, _MLA),
    ("b128 L4096", 32, 1, 140, _MLA),
    ("b128 L4096", 64, 1, 145, _MLA),
    ("b128 L4096", 128, 1, 225, _MLA),
    ("b32 L4096", 16, 1, 37, _MLA),
    ("b32 L4096", 64, 1, 42, _MLA),
    ("b32 L4096", 128, 1, 65, _MLA),
    ("b32 L4096", 128, 1, 117, {**_MLA, "queries": 2}),
    ("b1 L32768", 16, 1, 13, _MLA),
    ("b1 L32768", 128, 1, 22, _MLA),
    ("b16 L1024", 16, 1, 9, _MLA),
    ("b16 L1024", 128, 1, 15, _MLA),
)
_LATENT_OF_8_BITS = tuple(
    (what, heads_q, 1, None, {**_MLA, **_E4M3, **options})
    for what, heads_q, options in (
        *(("b128 L4096", heads, {}) for heads in (16, 32, 64, 128)),
        *(("b32 L4096", heads, {}) for heads in (16, 64, 128)),
        *((what, heads, {}) for what in ("b1 L32768", "b16 L1024") for heads in (16, 128)),
        ("b128 L4096", 16, {"key_scales": True}),
    )
)
_OF_8_BITS: tuple[tuple[str, int, int, float, dict[str, Any]], ...] = (
    ("b32 L4096", 32, 8, 64, _E4M3),
    ("b1 L32768", 32, 8, 20, _E4M3),
    ("b64 random 1..8192", 8, 1, 21, _E4M3),
    ("b32 L32768", 8, 1, 66, _E4M3),
    ("b32 L4096", 64, 8, 36, {"headdim": 64, **_E4M3}),
    ("b32 L4096", 16, 8, 123, {"headdim": 256, **_E4M3}),
    ("b1 L1024", 32, 4, 4.4, _E4M3),
    ("b1 L4096", 32, 8, 6, _E4M3),
)
_SCALED = tuple(
    (what, heads_q, heads_kv, 1.05 * target, {**options, "key_scales": True})
    for what, heads_q, heads_kv, target, options in _OF_8_BITS
)

_TABLES: dict[str, tuple[_Entry, ...]] = {
    "decode": _DECODE,
    "rows": _MANY_ROWS,
    "latent": _LATENT,
    "latent8": _LATENT_OF_8_BITS,
    "quantised": _OF_8_BITS + _SCALED,
}
_WORDS = {
    "headdim": "D{}",
    "headdim_v": "DV{}",
    "page_size": "page {}",
    "kv_dtype": "{}",
    "queries": "{} queries",
    "key_scales": "scale per key",
}


def _entries(table: str) -> tuple[_Entry, ...]:
    return sum(_TABLES.values(), ()) if table == "all" else _TABLES[table]


def shapes(table: str = "all") -> dict[str, Shape]:
    """Return the shapes of a table by their names."""
    lognormal = np.random.default_rng(0).lognormal(np.log(1000), 0.9, 128)
    ragged = {
        "b64 random 1..8192": np.random.default_rng(51).integers(1, 8193, 64),
        "b128 lognormal": np.clip(lognormal * 195_000 / lognormal.sum(), 16, 32768).astype(np.int64),
    }
    every = {}
    for what, heads_q, heads_kv, _, options in _entries(table):
        if what in ragged:
            lengths = ragged[what]
        else:
            batch, length = (int(word[1:]) for word in what.split())
            lengths = np.full(batch, length)
        name = _name(what, heads_q, heads_kv, options)
        every[name] = Shape(name, lengths, heads_q, heads_kv, **options)
    return every


def targets() -> dict[str, float | None]:
    """Return what an H200 should need at most, in us, by the names of the shapes."""
    return {_name(what, q, kv, options): target for what, q, kv, target, options in _entries("all")}


def _name(what: str, heads_q: int, heads_kv: int, options: dict[str, Any]) -> str:
    words = [what, f"{heads_q}/{heads_kv}"]
    if options.get("latent"):
        words.append("MLA")
        options = {key: value for key, value in options.items() if key not in _MLA}
    words += [_WORDS[key].format(value) if value is not None else "contiguous" for key, value in options.items()]
    return " ".join(words)


_QUICK = 5


# ---------------------------------------------------------------------------------------------------------- measuring
def measure(
    chosen: Sequence[Shape], peers: Sequence[str] = tuple(PEERS), rounds: int = 11, seconds: float = 1e9
) -> Iterator[Record]:
    """Yield a record of the machine, one per shape, and one each for the planner and for the host's time.

    Args:
        chosen: Shapes.
        peers: Names of peers, of ``PEERS``.
        rounds: Rounds, of which the median counts.
        seconds: When to stop: shapes that have not begun by then are left out, and say so.

    Raises:
        RuntimeError: Without CuPy and a GPU.
    """
    gpu = Gpu()
    start, target_us = time.monotonic(), targets()
    arch, bandwidth = f"sm_{gpu.arch}", gpu.bandwidth
    rates = {"read_tb_s": bandwidth, "tensor_tflop_s": gpu.tensor_rate}
    yield {"variant": "machine", "arch": arch, "workload": "plain read of 4 GiB", **rates, **gpu.facts}
    for shape in chosen:
        record: Record = {
            "variant": f"{shape.dtype} {shape.headdim}x{shape.heads_q // shape.heads_kv * shape.queries}",
            "arch": arch,
            "workload": shape.name,
            "target_us": target_us.get(shape.name),
        }
        if time.monotonic() - start > seconds:
            yield {**record, "error": "left out: no time"}
            continue
        try:
            record.update(measure_shape(shape, gpu, {name: PEERS[name] for name in peers}, rounds))
        except Exception as error:  # one shape must not hide the others
            record["error"] = reason(error)
        gpu.free()
        yield record
    yield from _planner_and_host(gpu, arch, rounds)
    yield {"variant": "machine", "arch": arch, "workload": "after the last shape", **machine_facts()}


def _planner_and_host(gpu: Gpu, arch: str, rounds: int) -> Iterator[Record]:
    """Yield the planner's time on the GPU, and what calls take of the host."""
    shape = Shape("plan of 256 sequences, out=", np.random.default_rng(2).integers(1, 8193, 256), 32, 8)
    lengths = gpu.xp.asarray(shape.lengths.astype(np.int32))
    metadata = shape.plan(lengths)
    time_us = medians({"plan": gpu.graph([lambda: shape.plan(lengths, out=metadata)] * 200)}, rounds)["plan"]
    yield {"variant": "planner", "arch": arch, "workload": shape.name, "given_us": time_us, "target_us": 4.0}

    small = Inputs.make(Shape("b4 L64 32/8", np.full(4, 64), 32, 8), gpu.xp, gpu.fill, l2_bytes=1)
    plan = small.plan()
    for name, call in (
        ("host: attention on a plan, out=", lambda: small.attend(0, plan)),
        ("host: attention without a plan, out=", lambda: small.attend(0, None)),
        ("host: plan, out=", lambda: small.plan(out=plan)),
    ):
        yield {"variant": "host", "arch": arch, "workload": name, "given_us": _host_us(call), "target_us": None}


def _host_us(call: Callable[[], Any], calls: int = 300, series: int = 9) -> float:
    """Return microseconds of the host per call while the GPU keeps up."""
    import cupy

    best = float("inf")
    for _ in range(series):
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    cupy.cuda.Device().synchronize()
    return 1e6 * best


# -------------------------------------------------------------------------------------------------------- the command
_NOTES = (
    "",
    "us per call. floor: bytes of the visible keys and values / read bandwidth, or operations / rate of the tensor",
    "cores at the highest clock, whichever is longer (bound); read: a kernel that reads as many bytes; given: on a",
    "plan; unplanned: planning in the call; share: floor / given; to_*: given / it;",
    "CUDA graphs of many calls on copies larger than L2, medians of alternating rounds; JAX is wall time. cuDNN, FA2",
    "(torch), flex, JAX and the wheel of FA3 read contiguous caches. Outputs were compared with the NumPy backend's.",
    "",
)


def lines(records: Sequence[Record], markdown: bool = False) -> Iterator[str]:
    """Yield the text of a report, as a table for people or in Markdown."""
    machine = next((r for r in records if r["variant"] == "machine"), None)
    if machine is not None:
        yield "; ".join(f"{k} {_cell(v)}" for k, v in machine.items() if k not in ("variant", "arch", "workload"))
        yield ""
    chosen = [r for r in records if r["variant"] != "machine"]
    names = list(dict.fromkeys(name for r in chosen for name in r.get("peers", ())))
    absent = [n for n in names if all(r["peers"].get(n) == "not installed" for r in chosen if "peers" in r)]
    columns = (
        "kv_mb", "gflop", "bound", "floor_us", "read_us", "given_us", "unplanned_us", "target_us", "share", "to_read",
        "to_best_peer",
    )  # fmt: skip
    header = ["workload", *(c.removesuffix("_us") for c in columns), *(n for n in names if n not in absent)]
    rows = [header]
    for r in chosen:
        cells = (
            [_cell(r.get(c), c) for c in columns] if "error" not in r else [r["error"][:60]] + [""] * (len(columns) - 1)
        )
        rows.append([r["workload"], *cells, *(_cell(r.get("peers", {}).get(n))[:40] for n in names if n not in absent)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    rows.insert(1, ["-" * (width - markdown) + ":" * (markdown and i > 0) for i, width in enumerate(widths)])
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip()
    for name in absent:
        yield f"{name}: not installed"


def _cell(value: Any, name: str = "") -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if name == "share":
        return f"{100 * value:.0f} %"
    return f"{value:.2f}" if name.startswith("to_") or abs(value) < 10 else f"{value:.1f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of ``python -m tests.bench gpu``."""
    add = parser.add_argument
    add("--table", choices=[*_TABLES, "all"], default="decode", help="which shapes (default: decode)")
    add("--shapes", nargs="+", metavar="TEXT", help="those of the table whose name contains one of these texts")
    add(
        "--quick",
        action="store_true",
        help=f"the first {_QUICK} shapes of the table, few rounds, cuDNN as the only peer",
    )
    add("--peers", nargs="*", choices=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    add("--rounds", type=int, default=11, help="rounds, of which the median counts (default: 11)")
    add("--seconds", type=float, default=1e9, help="begin no further shape after so long (default: no limit)")
    add("--markdown", action="store_true", help="print a Markdown table")
    add("--save", metavar="FILE", help="write the records to this file, too, after every shape")


def run(arguments: argparse.Namespace) -> int:
    """Run ``python -m tests.bench gpu``."""
    every = shapes(arguments.table)
    chosen = list(every.values())[: _QUICK if arguments.quick else None]
    if arguments.shapes:
        chosen = [s for s in every.values() if any(text in s.name for text in arguments.shapes)]
        if not chosen:
            raise ValueError(f"--shapes must name some of {', '.join(every)}; got {' '.join(arguments.shapes)}")
    peers = arguments.peers if arguments.peers is not None else ["cuDNN"] if arguments.quick else list(PEERS)
    try:
        require_gpu()
    except RuntimeError as error:
        print(f"python -m tests.bench gpu: {error}", file=sys.stderr)
        return 2
    records: list[Record] = []
    for record in measure(chosen, peers, 5 if arguments.quick else arguments.rounds, arguments.seconds):
        records.append(record)
        if arguments.save:
            with open(arguments.save, "w") as file:
                report.write(records, as_json=True, file=file)
        elif not arguments.json:
            print(f"{record['workload']}: {_cell(record.get('given_us'))} us", file=sys.stderr)
    if arguments.json:
        report.write(records, as_json=True)
    else:
        print("\n".join([*lines(records, arguments.markdown), *_NOTES]))
    return 0
