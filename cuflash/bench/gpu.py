"""Attention on a GPU: time beside the time to read the keys and values, and beside other libraries; a GPU is needed.

Every figure is the median over rounds in which all take their turn, from CUDA graphs of many calls on copies of the
inputs that together are several times the L2 cache, so that every call reads from memory. Clocks are as found.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..attention import flash_attn_with_kvcache
from ..metadata import SchedulerMetadata
from ..scheduling import get_scheduler_metadata
from . import gpu_peers, report
from .device import plan_for
from .gpu_timing import (
    CupyGraph,
    Kernels,
    Sampler,
    machine_facts,
    medians,
    number_of_calls,
    number_of_copies,
    read_samplers,
    read_us,
)
from .report import Record

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_MOST_ERROR = 1e-2  # of an output's norm: bfloat16 rounds to 2^-8
_CHECKED_KEYS = 1 << 20  # keys times KV heads that are compared with the NumPy backend


# ------------------------------------------------------------------------------------------------------------- shapes
@dataclass(frozen=True, eq=False)
class Shape:
    """A decode step: one query per sequence, bfloat16, causal.

    Attributes:
        name: Its name.
        lengths: (batch,) keys of each sequence.
        heads_q: Query heads.
        heads_kv: KV heads.
        headdim: Head dim.
        page_size: Keys per page; None for a contiguous cache.
        target_us: What an H200 should need at most, or None.
    """

    name: str
    lengths: NDArray[np.int64]
    heads_q: int
    heads_kv: int
    headdim: int = 128
    page_size: int | None = 16
    target_us: float | None = None

    @property
    def kv_bytes(self) -> int:
        """Bytes of the visible keys and values."""
        return int(self.lengths.sum()) * self.heads_kv * 2 * self.headdim * 2


def shapes() -> dict[str, Shape]:
    """Return the shapes by their names; the first ones are those that ``--quick`` measures."""
    lognormal = np.random.default_rng(0).lognormal(np.log(1000), 0.9, 128)
    ragged = {
        "b64 random 1..8192": np.random.default_rng(51).integers(1, 8193, 64),
        "b128 lognormal": np.clip(lognormal * 195_000 / lognormal.sum(), 16, 32768).astype(np.int64),
    }
    every: list[Shape] = []

    def add(
        what: str, heads_q: int, heads_kv: int, target: float | None = None, headdim: int = 128, page: int | None = 16
    ) -> None:
        if what in ragged:
            lengths = ragged[what]
        else:
            batch, length = (int(word[1:]) for word in what.split())
            lengths = np.full(batch, length)
        name = f"{what} {heads_q}/{heads_kv}"
        name += f" D{headdim}" * (headdim != 128) + ("" if page == 16 else f" page {page}" if page else " contiguous")
        every.append(Shape(name, lengths, heads_q, heads_kv, headdim, page, target))

    add("b32 L4096", 32, 8, 121)
    add("b1 L1024", 32, 4, 3.5)
    add("b1 L32768", 32, 8, 33)
    add("b64 random 1..8192", 8, 1, 32.5)
    add("b128 lognormal", 32, 8, 183)
    add("b16 L2000", 32, 32, 118)
    add("b1 L262144", 32, 4, 124)
    add("b32 L32768", 8, 1, 124)
    add("b32 L4096", 64, 4, 63)  # 16 query rows per KV head
    add("b32 L4096", 256, 8, 126)  # 32
    add("b32 L4096", 32, 8, 63, headdim=64)
    add("b32 L4096", 16, 8, 239, headdim=256)
    add("b4 L1024", 32, 8, 6.5)
    add("b32 L4096", 32, 8, page=None)
    add("b32 L4096", 32, 8, page=64)
    add("b32 L4096", 32, 8, page=1)
    add("b64 random 1..8192", 8, 1, page=64)
    add("b1 L4096", 32, 8)
    add("b16 L1024", 32, 8)
    add("b8 L2048", 32, 8)
    add("b64 L8192", 32, 8)
    return {shape.name: shape for shape in every}


_QUICK = 5


# ------------------------------------------------------------------------------------------------------------- inputs
@dataclass
class Inputs:
    """Copies of a shape's arrays on the GPU.

    Attributes:
        shape: The shape.
        copies: The arrays of each copy, by the names of the arguments; lengths and page numbers are the same in all.
        calls: Calls that a graph has.
    """

    shape: Shape
    copies: list[dict[str, Any]]
    calls: int
    _contiguous: dict[int, tuple[Any, Any, Any]] = field(default_factory=dict)

    @classmethod
    def make(cls, shape: Shape, kernels: Kernels, l2_bytes: int) -> Inputs:
        """Fill copies with random numbers."""
        import cupy

        batch, longest = len(shape.lengths), int(shape.lengths.max())
        count = number_of_copies(shape.kv_bytes, l2_bytes)
        if shape.page_size is None:
            cache_shape: tuple[int, ...] = (batch, longest, shape.heads_kv, shape.headdim)
        else:
            pages = int((-(-shape.lengths // shape.page_size)).sum())
            cache_shape = (pages, shape.page_size, shape.heads_kv, shape.headdim)
        inputs = cls(shape, [], number_of_calls(3 + shape.kv_bytes / 4e6, count))
        for i in range(count):
            arrays = {
                "q": cupy.empty((batch, 1, shape.heads_q, shape.headdim), _BFLOAT16),
                "k_cache": cupy.empty(cache_shape, _BFLOAT16),
                "v_cache": cupy.empty(cache_shape, _BFLOAT16),
            }
            for j, array in enumerate(arrays.values()):
                kernels.fill(array, 3 * i + j + 1)
            arrays["out"] = cupy.empty_like(arrays["q"])
            arrays["cache_seqlens"] = cupy.asarray(shape.lengths.astype(np.int32))
            if shape.page_size is not None:
                arrays["page_table"] = cupy.asarray(inputs.host_table())
            inputs.copies.append(arrays)
        return inputs

    def host_table(self) -> NDArray[np.int32]:
        """Return the page table: pages in random order."""
        return self._table

    @cached_property
    def _table(self) -> NDArray[np.int32]:
        pages = -(-self.shape.lengths // (self.shape.page_size or 1))
        table = np.zeros((len(pages), int(pages.max())), np.int32)
        table[np.arange(table.shape[1]) < pages[:, None]] = np.random.default_rng(1).permutation(int(pages.sum()))
        return table

    def contiguous(self, i: int) -> tuple[Any, Any, Any]:
        """Return copy i as q, k and v (batch, longest, heads, headdim)."""
        copy = self.copies[i]
        if self.shape.page_size is None:
            return copy["q"], copy["k_cache"], copy["v_cache"]
        if i not in self._contiguous:
            k, v = (self._gathered(copy[name], copy["page_table"]) for name in ("k_cache", "v_cache"))
            self._contiguous[i] = copy["q"], k, v
        return self._contiguous[i]

    def _gathered(self, cache: Any, table: Any) -> Any:
        """Return the pages of all sequences one after another; what lies behind a length is of no meaning."""
        rows = cache.view(np.uint16)[table]  # (batch, pages, page_size, heads, headdim)
        batch, pages, page_size, *rest = rows.shape
        return rows.reshape(batch, pages * page_size, *rest)[:, : int(self.shape.lengths.max())].view(_BFLOAT16)

    def plan(self, copy: int = 0, out: SchedulerMetadata | None = None) -> SchedulerMetadata:
        """Plan the step."""
        s = self.shape
        return get_scheduler_metadata(
            len(s.lengths), 1, int(s.lengths.max()), s.heads_q, s.heads_kv, s.headdim,
            self.copies[copy]["cache_seqlens"], page_size=s.page_size, causal=True, out=out,
        )  # fmt: skip

    def attend(self, i: int, metadata: SchedulerMetadata | None) -> Any:
        """Attend on copy ``i`` modulo their number."""
        copy = self.copies[i % len(self.copies)]
        return flash_attn_with_kvcache(**copy, causal=True, scheduler_metadata=metadata)


class Reference:
    """The NumPy backend's answer for some sequences of the first copy."""

    def __init__(self, inputs: Inputs) -> None:
        shape = inputs.shape
        lengths = shape.lengths
        order = [int(lengths.argmin()), int(lengths.argmax()), *range(len(lengths))]
        self.sequences: list[int] = []
        for s in dict.fromkeys(order):
            if not self.sequences or (lengths[[*self.sequences, s]].sum() * shape.heads_kv <= _CHECKED_KEYS):
                self.sequences.append(s)
        self.sequences = self.sequences[:8]
        copy = inputs.copies[0]
        answers = []
        with plan_for(132, backend="numpy"):
            for s in self.sequences:
                k, v = (_sequence(inputs, copy[name], s) for name in ("k_cache", "v_cache"))
                q = _to_host(copy["q"][s : s + 1])
                answers.append(flash_attn_with_kvcache(q, k, v, causal=True)[0, 0].astype(np.float32))
        self.answers = np.stack(answers)

    def error(self, out: NDArray[Any]) -> float:
        """Return how far an output (batch, heads, headdim) is from the reference, relative to the reference's norm."""
        difference = out[self.sequences].astype(np.float64) - self.answers
        return float(np.linalg.norm(difference) / np.linalg.norm(self.answers))


def _sequence(inputs: Inputs, cache: Any, s: int) -> NDArray[Any]:
    """Return the keys of a sequence on the host, (1, length, heads, headdim)."""
    length, page_size = int(inputs.shape.lengths[s]), inputs.shape.page_size
    if page_size is None:
        return _to_host(cache[s : s + 1, :length])
    pages = inputs.copies[0]["page_table"][s, : -(-length // page_size)]
    rows = _to_host(cache.view(np.uint16)[pages])
    return rows.reshape(1, -1, *rows.shape[2:])[:, :length]


def _to_host(array: Any) -> NDArray[Any]:
    host: NDArray[Any] = array.view(np.uint16).get().view(_BFLOAT16)
    return host


# ---------------------------------------------------------------------------------------------------------- measuring
def measure(
    chosen: Sequence[Shape], peers: Sequence[str] = tuple(gpu_peers.PEERS), rounds: int = 11, seconds: float = 1e9
) -> Iterator[Record]:
    """Yield a record of the machine, one per shape, and one each for the planner and for the host's time.

    Args:
        chosen: Shapes.
        peers: Names of peers, of ``gpu_peers.PEERS``.
        rounds: Rounds, of which the median counts.
        seconds: When to stop: shapes that have not begun by then are left out, and say so.

    Raises:
        RuntimeError: Without CuPy and a GPU.
    """
    require_gpu()
    start = time.monotonic()
    facts, kernels = machine_facts(), Kernels()
    arch = f"sm_{_arch()}"
    l2_bytes = facts["l2_bytes"]
    bulk = max(4 << 30, 16 * l2_bytes) if l2_bytes > 1 << 20 else 1 << 22
    bandwidth = bulk / read_us(medians(read_samplers(kernels, bulk, l2_bytes), rounds=5)) / 1e6  # TB/s
    yield {"variant": "machine", "arch": arch, "workload": "plain read of 4 GiB", "read_tb_s": bandwidth, **facts}
    for shape in chosen:
        record: Record = {
            "variant": f"bfloat16 {shape.headdim}x{shape.heads_q // shape.heads_kv}",
            "arch": arch,
            "workload": shape.name,
            "kv_mb": shape.kv_bytes / 1e6,
            "floor_us": shape.kv_bytes / bandwidth / 1e6,
        }
        if time.monotonic() - start > seconds:
            yield {**record, "error": "left out: no time"}
            continue
        try:
            record.update(_measured(shape, kernels, l2_bytes, peers, rounds))
            record["share"] = record["floor_us"] / record["given_us"]
        except Exception as error:  # one shape must not hide the others
            record["error"] = gpu_peers.reason(error)
        _free()
        yield record
    yield from _planner_and_host(kernels, l2_bytes, arch, rounds)
    yield {"variant": "machine", "arch": arch, "workload": "after the last shape", **machine_facts()}


def _measured(shape: Shape, kernels: Kernels, l2_bytes: int, peers: Sequence[str], rounds: int) -> Record:
    """Return the figures of one shape."""
    inputs = Inputs.make(shape, kernels, l2_bytes)
    reference, metadata = Reference(inputs), inputs.plan()
    errors, failed = {}, {}
    samplers: dict[str, Sampler] = {}

    def ours(name: str, metadata: SchedulerMetadata | None) -> None:
        graph = CupyGraph([lambda i=i: inputs.attend(i, metadata) for i in range(inputs.calls)])  # type: ignore[misc]
        _poison(inputs.copies[0]["out"])
        graph.sample()  # what is timed is what is checked
        errors[name] = reference.error(_to_host(inputs.copies[0]["out"])[:, 0].astype(np.float32))
        if not errors[name] < _MOST_ERROR:
            raise ArithmeticError(f"{name} is wrong: relative error {errors[name]:.2g}")
        samplers[name] = graph

    ours("given", metadata)
    ours("unplanned", None)
    samplers |= read_samplers(kernels, shape.kv_bytes, l2_bytes)
    for name in peers:
        try:
            peer = gpu_peers.PEERS[name](inputs)
            errors[name] = reference.error(peer.answer())
            if not errors[name] < _MOST_ERROR:
                failed[name] = f"wrong: relative error {errors[name]:.2g}"
                continue
            samplers[name] = peer.sampler()
        except Exception as error:  # a peer that does not run a shape is a row without its figure
            failed[name] = gpu_peers.reason(error)
    times = medians(samplers, rounds)
    best = min((times[name] for name in peers if name in times), default=None)
    return {
        "read_us": read_us(times),
        "given_us": times["given"],
        "unplanned_us": times["unplanned"],
        "target_us": shape.target_us,
        "share": 0.0,  # of the read bandwidth; the caller knows it
        "to_read": times["given"] / read_us(times),
        "best_peer_us": best,
        "to_best_peer": None if best is None else times["given"] / best,
        "blocks": int(metadata.array[:1].get()[0]),
        "errors": errors,
        "peers": {name: times.get(name, failed.get(name)) for name in peers},
    }


def _planner_and_host(kernels: Kernels, l2_bytes: int, arch: str, rounds: int) -> Iterator[Record]:
    """Yield the planner's time on the GPU, and what calls take of the host."""
    lengths = np.random.default_rng(2).integers(1, 8193, 256)
    inputs = Inputs.make(Shape("256 sequences", lengths[:1], 32, 8), kernels, l2_bytes // 16)
    inputs.shape = Shape("plan of 256 sequences, out=", lengths, 32, 8)
    import cupy

    inputs.copies[0]["cache_seqlens"] = cupy.asarray(lengths.astype(np.int32))
    metadata = inputs.plan()
    time_us = medians({"plan": CupyGraph([lambda: inputs.plan(out=metadata)] * 200)}, rounds)["plan"]
    yield {"variant": "planner", "arch": arch, "workload": inputs.shape.name, "given_us": time_us, "target_us": 4.0}

    small = Inputs.make(Shape("b4 L64 32/8", np.full(4, 64), 32, 8), kernels, 1)
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


def require_gpu() -> None:
    """Raise RuntimeError, saying what is missing, if there is no GPU that CuPy can use."""
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(f"no GPU found: CuPy cannot be imported ({error})") from error
    if not cupy.cuda.is_available():
        raise RuntimeError("no GPU found: CuPy sees none")


def _arch() -> int:
    import cupy

    return int(cupy.cuda.Device().compute_capability)


def _poison(array: Any) -> None:
    array.view(np.uint16)[...] = 0x7FFF  # NaN
    array.device.synchronize()


def _free() -> None:
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


# -------------------------------------------------------------------------------------------------------- the command
_NOTES = (
    "",
    "us per call. floor: bytes of the visible keys and values / read bandwidth; read: a kernel that only reads as many",
    "bytes; given: with a plan; unplanned: planning in the call; share: floor / given; to_*: given / it;",
    "CUDA graphs of many calls on copies larger than L2, medians of alternating rounds; JAX is wall time. cuDNN, FA2",
    "(torch), flex and JAX read contiguous caches. All outputs were compared with the NumPy backend's.",
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
    absent = [n for n in names if all(r["peers"].get(n) == "not present" for r in chosen if "peers" in r)]
    columns = ("floor_us", "read_us", "given_us", "unplanned_us", "target_us", "share", "to_read", "to_best_peer")
    header = ["workload", *(c.removesuffix("_us") for c in columns), *(n for n in names if n not in absent)]
    rows = [header]
    for r in chosen:
        cells = [_cell(r.get(c), c) for c in columns] if "error" not in r else [r["error"][:60]] + [""] * 7
        rows.append([r["workload"], *cells, *(_cell(r.get("peers", {}).get(n))[:40] for n in names if n not in absent)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    rows.insert(1, ["-" * (width - markdown) + ":" * (markdown and i > 0) for i, width in enumerate(widths)])
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip()
    for name in absent:
        yield f"{name}: not present"


def _cell(value: Any, name: str = "") -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if name == "share":
        return f"{100 * value:.0f} %"
    return f"{value:.2f}" if name.startswith("to_") or abs(value) < 10 else f"{value:.1f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of ``bench gpu``."""
    add = parser.add_argument
    add("--shapes", nargs="+", metavar="TEXT", help="shapes whose name contains one of these texts")
    add("--quick", action="store_true", help=f"the first {_QUICK} shapes, few rounds, cuDNN as the only peer")
    add("--peers", nargs="*", choices=list(gpu_peers.PEERS), metavar="PEER", help=", ".join(gpu_peers.PEERS))
    add("--rounds", type=int, default=11, help="rounds, of which the median counts (default: 11)")
    add("--seconds", type=float, default=1e9, help="begin no further shape after so long (default: no limit)")
    add("--markdown", action="store_true", help="print a Markdown table")
    add("--save", metavar="FILE", help="write the records to this file, too, after every shape")


def run(arguments: argparse.Namespace) -> int:
    """Run ``bench gpu``."""
    every = shapes()
    chosen = list(every.values())[: _QUICK if arguments.quick else None]
    if arguments.shapes:
        chosen = [s for s in every.values() if any(text in s.name for text in arguments.shapes)]
        if not chosen:
            raise ValueError(f"--shapes must name some of {', '.join(every)}; got {' '.join(arguments.shapes)}")
    peers = arguments.peers if arguments.peers is not None else ["cuDNN"] if arguments.quick else list(gpu_peers.PEERS)
    try:
        require_gpu()
    except RuntimeError as error:
        print(f"python -m cuflash bench gpu: {error}", file=sys.stderr)
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
