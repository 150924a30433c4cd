"""What a kernel takes of a multiprocessor: registers, memory, instructions; from its machine code, without a GPU."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cuflash.bench import report
from cuflash.bench.report import Record
from cuflash.device import Device
from cuflash.dtypes import dtype_name, numpy_dtype
from cuflash.kernels.attention import Form
from cuflash.kernels.decode import decode_variant
from cuflash.kernels.tiles import Tiling, tiling
from cuflash.partition import GRAIN
from cuflash.problem import Problem, make_problem

from . import sass
from .cubins import Cubin, cubin

# What NVIDIA sells with each architecture: the A100, RTX 3090, RTX 4090, H200, B200 and RTX 5090.
NUM_SM = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA C++ Programming Guide, "Compute Capabilities").

    Attributes:
        warps: Resident warps.
        blocks: Resident blocks.
        registers: Registers of 32 bits.
    """

    warps: int
    blocks: int
    registers: int = 65536

    def resident_blocks(self, device: Device, registers: int, threads: int, shared_bytes: int) -> int:
        """Return how many blocks of a kernel fit at once.

        Args:
            device: The GPU.
            registers: Registers of a thread.
            threads: Threads of a block.
            shared_bytes: Shared memory of a block.
        """
        warps = -(-threads // 32)
        warp_registers = -(-max(registers, 1) * 32 // 256) * 256
        warps_of_a_quarter = self.registers // 4 // warp_registers  # a warp's registers lie in one of four files
        shared = -(-shared_bytes // 128) * 128 + 1024  # the system takes 1 KB of every block
        return min(
            self.blocks,
            self.warps // warps,
            4 * warps_of_a_quarter // warps,
            device.shared_per_sm // shared if shared_bytes <= device.shared_per_block else 0,
        )


_MULTIPROCESSORS = {
    80: Multiprocessor(64, 32),
    86: Multiprocessor(48, 16),
    89: Multiprocessor(48, 24),
    90: Multiprocessor(64, 32),
    100: Multiprocessor(64, 32),
    120: Multiprocessor(48, 24),
}


def measure(
    archs: Iterable[int] = tuple(NUM_SM),
    dtypes: Iterable[str] = ("bfloat16",),
    headdims: Iterable[int] = (64, 128, 256),
    rows: Iterable[int] = (8, 16, 32),
    items: Iterable[str] = ("many", "few"),
    fresh: bool = False,
    kv_dtypes: Iterable[str | None] = (None,),
    key_scales: int = 0,
) -> Iterator[Record]:
    """Yield a record for each decode variant that the library runs.

    Args:
        archs: Architectures.
        dtypes: Element types.
        headdims: Head dims of keys and values.
        rows: Packed query rows per KV head.
        items: "many" for batches that fill the GPU, "few" for batches with fewer items than multiprocessors.
        fresh: Whether to compile what the disk cache holds.
        kv_dtypes: Element types of the cache, None for that of the queries.
        key_scales: KEY_SCALES of quantised caches: 1 if every key has a scale, 2 if every value, 3 for both.
    """
    for dtype, kv_dtype, headdim, number, amount, arch in itertools.product(
        dtypes, kv_dtypes, headdims, rows, items, archs
    ):
        batch = 64 if amount == "many" else 1
        problem = make_problem(batch, 1, 8 * number, 8, headdim, qkv_dtype=dtype, kv_dtype=kv_dtype)
        device = Device(NUM_SM[arch], arch)
        tiles = tiling(problem, device)
        variant = decode_variant(problem, tiles, Form(key_scales=key_scales if problem.is_quantised else 0))
        kinds = f"{dtype} on {kv_dtype}" if problem.is_quantised else dtype
        yield {
            "variant": f"{kinds} {headdim}x{tiles.rows}",
            "arch": f"sm_{arch}",
            "workload": f"{amount} items, {number} rows",
            **_record(problem, device, tiles, cubin(variant, arch, fresh)),
        }


def _record(problem: Problem, device: Device, tiles: Tiling, code: Cubin) -> Record:
    shared_bytes = tiles.shared_bytes + code.static_shared_bytes
    resident = _MULTIPROCESSORS[device.arch].resident_blocks(device, code.registers, tiles.warps * 32, shared_bytes)
    running = min(resident, tiles.blocks_per_sm)  # the grid holds no more
    slot_bytes = tiles.tile_keys * max(tiles.headdim, tiles.headdim_v) * numpy_dtype(problem.kv_dtype).itemsize
    program = sass.disassemble(code.code)
    loop = sass.main_loop(program)
    return {
        "tile_keys": tiles.tile_keys,
        "warps": tiles.warps,
        "stages": tiles.stages,
        "registers": code.registers,
        "local_bytes": code.local_bytes,
        "shared_bytes": shared_bytes,
        "resident_blocks": resident,
        "resident_warps": resident * tiles.warps,
        "bytes_in_flight": running * tiles.warps * (tiles.stages - 1) * slot_bytes,
        "warp_instructions_per_tile": _per_tile(problem, tiles, loop),
        "classes": loop.classes(),
        "odd_descriptors": sass.odd_descriptors(program),
        "compile_s": code.compile_s,
        "warm_ms": code.warm_ms,
    }


def _per_tile(problem: Problem, tiles: Tiling, loop: sass.MainLoop) -> float | None:
    """Return instructions per tile of 16 keys; None if loops inside hide how often they run."""
    if loop.inner_loops:
        return None
    if problem.qkv_dtype == "float32":
        products, done = GRAIN * tiles.rows * (problem.headdim + problem.headdim_v) // 32, loop.count("FFMA")
    else:  # an MMA multiplies 16 keys x 16 elements x 8 rows
        steps = -(-problem.headdim // 16) + -(-problem.headdim_v // 16)
        products, done = steps * tiles.rows // 8, loop.count("HMMA")
    return round(len(loop.path) * products / done, 1)


_NOTES = (
    "",
    "resident_*: what the architecture's limits allow; bytes_in_flight: of the blocks that a plan puts on a",
    "multiprocessor, in their rings. LDGSTS .. other: instructions of one turn of a warp's main loop when no mask, no",
    "new maximum and no new item interrupts it; warp_instructions_per_tile: their sum per 16 keys.",
    "odd_descriptors: memory accesses with an odd uniform descriptor, which are illegal and must be 0.",
    "compile_s: processor seconds of NVRTC; warm_ms: the same variant from the disk cache.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of ``python -m tests.bench resources``."""
    add = parser.add_argument
    add("--arch", type=int, nargs="+", choices=tuple(NUM_SM), default=tuple(NUM_SM), help="default: all of them")
    add("--dtype", nargs="+", default=["bfloat16"], help="element types (default: bfloat16)")
    add("--kv-dtype", nargs="+", help="element types of quantised caches (default: the cache is that of --dtype)")
    add(
        "--key-scales",
        type=int,
        choices=(0, 1, 2, 3),
        default=0,
        help="1: keys have their own scales, 2: values, 3: both",
    )
    add("--headdim", type=int, nargs="+", default=[64, 128, 256], help="head dims (default: 64 128 256)")
    add("--rows", type=int, nargs="+", default=[8, 16, 32], help="query rows per KV head (default: 8 16 32)")
    add("--items", nargs="+", choices=("many", "few"), default=["many"],
        help="more items (sequence, KV head) than multiprocessors, or fewer (default: many)")  # fmt: skip
    add("--fresh", action="store_true", help="compile anew what the disk cache holds")


def run(arguments: argparse.Namespace) -> int:
    """Run ``python -m tests.bench resources``."""
    dtypes = [dtype_name("--dtype", name) for name in arguments.dtype]
    kv_dtypes: list[str | None] = [dtype_name("--kv-dtype", name) for name in arguments.kv_dtype or ()]
    kv_dtypes = kv_dtypes or [None]
    records = measure(
        arguments.arch, dtypes, arguments.headdim, arguments.rows, arguments.items, arguments.fresh, kv_dtypes,
        arguments.key_scales,
    )  # fmt: skip
    report.write(records, arguments.json, _NOTES)
    return 0
