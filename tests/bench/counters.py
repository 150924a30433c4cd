"""What the kernels do for a key, counted while the simulator runs them; and what a plan makes them write in between."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuflash import SchedulerMetadata, flash_attn_with_kvcache, get_scheduler_metadata
from cuflash.bench import report
from cuflash.bench.report import Record
from cuflash.dtypes import QUANTISED_DTYPES, numpy_dtype
from cuflash.partition import GRAIN
from cuflash.problem import Problem

from .device import plan_for

_PAGE = 16
_SECTOR = 32  # bytes that memory moves at least


@dataclass(frozen=True)
class Workload:
    """A decode step.

    Attributes:
        name: Its name.
        lengths: Keys of each sequence.
        num_heads_q: Query heads.
        num_heads_kv: KV heads.
        headdim: Head dim.
        dtype: Element type.
        kv_dtype: Element type of the cache, None for the same.
        key_scales: Whether every key and head has a scale.
        options: Further arguments that the plan and the call have in common.
    """

    name: str
    lengths: NDArray[np.int64]
    num_heads_q: int
    num_heads_kv: int
    headdim: int = 128
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    key_scales: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def plan(self) -> SchedulerMetadata:
        """Plan it for the device of the environment."""
        return get_scheduler_metadata(
            len(self.lengths), 1, int(self.lengths.max()), self.num_heads_q, self.num_heads_kv, self.headdim,
            self.lengths.astype(np.int32), qkv_dtype=self.dtype, kv_dtype=self.kv_dtype, page_size=_PAGE, causal=True,
            **self.options,
        )  # fmt: skip

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that are visible."""
        keys = int(self.lengths.sum())
        if "window_size" in self.options:
            keys = int(np.minimum(self.lengths, self.options["window_size"][0] + 1).sum())
        return keys * self.num_heads_kv * 2 * self.headdim * numpy_dtype(self.kv_dtype or self.dtype).itemsize


def small_workloads() -> Iterator[Workload]:
    """Yield decode steps for a GPU of 4 multiprocessors, which the simulator runs in a moment."""
    equal = np.full(4, 1024)
    ragged = np.array([1800, 1003, 2500, 777, 1311])
    for headdim in (64, 128, 256):
        for group in (8, 16, 32):
            yield Workload("whole tiles", equal, 2 * group, 2, headdim)
    for headdim in (64, 128, 256):
        yield Workload("ragged", ragged, 16, 2, headdim)
    yield Workload("one sequence", np.array([4096]), 16, 2)
    yield Workload("one KV head", ragged, 8, 1)
    yield Workload("one query head each", ragged, 2, 2)
    yield Workload("head dim 96", ragged, 16, 2, 96)
    yield Workload("window of 1024", ragged, 16, 2, options={"window_size": (1023, 0)})
    yield Workload("at most 4 parts", np.array([8000, 700, 900]), 16, 2, options={"num_splits": 4})
    yield Workload("parts of 512", ragged, 16, 2, options={"split_size": 512})
    yield Workload("float16", ragged, 16, 2, dtype="float16")
    yield Workload("float32", ragged, 16, 2, dtype="float32")
    for kv_dtype in QUANTISED_DTYPES:
        for headdim in (64, 128, 256):
            yield Workload("ragged", ragged, 16, 2, headdim, kv_dtype=kv_dtype)
    for group in (8, 16):
        yield Workload("whole tiles, key scales", equal, 2 * group, 2, kv_dtype="float8_e4m3fn", key_scales=True)


def real_workloads() -> Iterator[Workload]:
    """Yield decode steps of the sizes that GPUs run."""
    rng = np.random.default_rng(3)

    def equal(batch: int, length: int, heads_q: int, heads_kv: int, headdim: int = 128) -> Workload:
        name = f"{batch} x {length}, {heads_q}/{heads_kv}"
        return Workload(name, np.full(batch, length), heads_q, heads_kv, headdim)

    yield equal(32, 4096, 32, 8)
    yield equal(64, 8192, 32, 8)
    yield equal(16, 2000, 32, 32)
    yield equal(32, 4096, 16, 8, 256)
    yield equal(1, 1024, 32, 4)
    yield equal(1, 4096, 32, 8)
    yield equal(1, 32768, 32, 8)
    yield equal(1, 262144, 32, 4)
    yield equal(4, 1024, 32, 8)
    yield equal(16, 1024, 32, 8)
    yield equal(8, 2048, 32, 8)
    yield equal(32, 32768, 8, 1)
    lognormal = np.clip(rng.lognormal(np.log(1500), 0.9, 128), 16, 32768).astype(np.int64)
    yield Workload("128 lognormal, 32/8", lognormal, 32, 8)
    yield Workload("64 random 1..8192, 8/1", rng.integers(1, 8193, 64), 8, 1)
    yield equal(32, 4096, 64, 4)
    yield equal(32, 4096, 256, 8)
    yield equal(32, 4096, 32, 8, 64)


def simulate(archs: Iterable[int] = (80, 90), num_sm: int = 4) -> Iterator[Record]:
    """Yield what the simulator counts in the small workloads."""
    for arch in archs:
        for workload in small_workloads():
            yield count(workload, arch, num_sm)


def count(workload: Workload, arch: int, num_sm: int = 4) -> Record:
    """Run a workload on the simulator and return what it counts."""
    with plan_for(num_sm, arch, "sim"):
        return _count(workload, arch)


def _count(workload: Workload, arch: int) -> Record:
    from cuflash.simulator import Checks, record

    metadata = workload.plan()
    rng = np.random.default_rng(0)
    dtype, pages = numpy_dtype(workload.dtype), -(-workload.lengths // _PAGE)
    shape = (int(pages.sum()), _PAGE, workload.num_heads_kv, workload.headdim)
    numbers = rng.standard_normal((2, *shape), np.float32) * (24 if workload.kv_dtype == "int8" else 1)
    k_cache, v_cache = numbers.astype(numpy_dtype(workload.kv_dtype or workload.dtype))
    scales = rng.uniform(0.01, 0.02, shape[:-1]).astype(np.float32) if workload.key_scales else None
    q = rng.standard_normal((len(pages), 1, workload.num_heads_q, workload.headdim), np.float32).astype(dtype)
    table = np.full((len(pages), int(pages.max())), -1, np.int32)
    table[np.arange(table.shape[1]) < pages[:, None]] = rng.permutation(shape[0])
    with record(Checks.cheap()) as launches:
        flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=workload.lengths.astype(np.int32), page_table=table, causal=True,
            window_size=workload.options.get("window_size", (-1, -1)), scheduler_metadata=metadata,
            k_descale=scales, v_descale=None if scales is None else scales.copy(),
        )  # fmt: skip
    counters = launches[0].counters
    caches_read = counters.arrays["k_cache"], counters.arrays["v_cache"]
    sectors = sum(array.read_sectors for array in caches_read)
    # The main loop copies to shared memory and reads from there; merges and bookkeeping use other instructions.
    tensor = counters.mma > 0
    ideal, real = counters.wavefronts("cp.async", "ldmatrix" if tensor else "ld.shared")
    partials = counters.arrays.get("partials")
    partial_bytes = partials.write_bytes if partials else 0
    return {
        "variant": _variant(metadata),
        "arch": f"sm_{arch}",
        "workload": workload.name,
        "rows": metadata.problem.rows,
        "launches": len(launches),
        "blocks": int(metadata.array[0]),
        "kv_bytes_ratio": sectors * _SECTOR / workload.kv_bytes,
        "scale_bytes_ratio": sum(
            counters.arrays[name].read_bytes for name in ("k_descale", "v_descale") if name in counters.arrays
        )
        / workload.kv_bytes,
        "sector_ratio": sectors / sum(array.read_ideal for array in caches_read),
        "wavefront_ratio": real / ideal,
        "partial_bytes": partial_bytes,
        "partial_ratio": partial_bytes / workload.kv_bytes,
        "partial_bound": _partial_bound(metadata),
        "warp_instructions_per_kb": counters.instructions / (workload.kv_bytes / 1024),
        "mma_ratio": counters.mma / _needed_mmas(metadata) if tensor else None,
    }


def planned(archs: Iterable[int] = (90,), num_sm: int = 132) -> Iterator[Record]:
    """Yield what plans of real workloads make the kernels write between their blocks."""
    for arch in archs:
        for workload in real_workloads():
            with plan_for(num_sm, arch):
                metadata = workload.plan()
            partial_bytes = _parts(metadata) * metadata.problem.rows * (4 * workload.headdim + 8)
            yield {
                "variant": _variant(metadata),
                "arch": f"sm_{arch}",
                "workload": workload.name,
                "blocks": int(metadata.array[0]),
                "cluster": metadata.partition.cluster,
                "efficiency": metadata.efficiency,
                "partial_bytes": partial_bytes,
                "partial_ratio": partial_bytes / workload.kv_bytes,
                "partial_bound": _partial_bound(metadata),
            }


def _parts(metadata: SchedulerMetadata) -> int:
    """Count the partial results in memory: the parts of the items that lie in several blocks."""
    if metadata.partition.cluster > 1:
        return 0  # they go from one block's shared memory to another's
    work = metadata.work()
    problem, row_blocks = metadata.problem, metadata.partition.row_blocks
    item = (work["sequence"] * problem.num_heads_kv + work["kv_head"]) * row_blocks + work["row_block"]
    _, counts = np.unique(item, return_counts=True)
    return int(counts[counts > 1].sum())


def _partial_bound(metadata: SchedulerMetadata) -> int:
    """Return bytes of two partial results for every block of the plan, and with ``split_size`` of cut items' splits."""
    problem, tiles = metadata.problem, metadata.partition
    most = 2 * metadata.num_blocks
    if problem.split_size:
        items = problem.batch_size * problem.num_heads_kv * tiles.row_blocks
        most += min(items, metadata.num_blocks) * -(-metadata.max_seqlen_k // problem.split_size)
    return most * tiles.rows * (4 * problem.headdim_v + 8)


def _needed_mmas(metadata: SchedulerMetadata) -> int:
    """Count the products of 16 keys x 16 elements x 8 rows that the work consists of."""
    work = metadata.work()
    problem, tiles = metadata.problem, metadata.partition
    steps = math.ceil(problem.headdim / 16) + math.ceil(problem.headdim_v / 16)
    rows = np.minimum(tiles.rows, problem.rows - work["row_block"] * tiles.rows)
    tiles_of_keys = -(-(work["key_end"] - work["key_begin"]) // GRAIN)
    return int((tiles_of_keys * -(-rows // 8)).sum()) * steps


def _variant(metadata: SchedulerMetadata) -> str:
    problem: Problem = metadata.problem
    kinds = f"{problem.qkv_dtype} on {problem.kv_dtype}" if problem.is_quantised else problem.qkv_dtype
    return f"{kinds} {problem.headdim}x{metadata.partition.rows}"


_SIMULATED_NOTES = (
    "",
    "A launch on a simulated GPU of 4 multiprocessors, pages of 16. kv_bytes_ratio: bytes of the 32-byte sectors that",
    "were read / bytes of visible keys and values; scale_bytes_ratio: bytes of scales of keys, likewise; sector_ratio:",
    "sectors / fewest that hold the bytes asked for;",
    "wavefront_ratio: shared-memory wavefronts of the main loop / those without bank conflicts; partial_*: bytes that",
    "blocks leave for one another, / KV bytes, and the most there can be;",
    "warp_instructions_per_kb: PTX instructions per KB of keys and values; mma_ratio: matrix products / fewest.",
    "",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of ``python -m tests.bench counters``."""
    add = parser.add_argument
    add("--arch", type=int, nargs="+", default=[80, 90], help="architectures to simulate (default: 80 90)")
    add("--num-sm", type=int, default=132, help="multiprocessors to plan real workloads for (default: 132)")


def run(arguments: argparse.Namespace) -> int:
    """Run ``python -m tests.bench counters``."""
    simulated = list(simulate(arguments.arch))
    real = list(planned(arguments.arch[-1:], arguments.num_sm))
    if arguments.json:
        report.write(simulated + real, as_json=True)
    else:
        report.write(simulated, as_json=False, notes=_SIMULATED_NOTES)
        print(f"What plans of real workloads write between blocks ({arguments.num_sm} multiprocessors):\n")
        report.write(real, as_json=False)
    return 0
