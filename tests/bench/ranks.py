"""A decode step over ranks with a GPU each, beside one GPU with all keys: ``mpiexec -n 2 python -m tests.bench ranks``.

Pages of 16 keys lie in random order, and each belongs to one rank: all ranks read caches of the same pages. A step of
32 layers is one CUDA graph per rank, exchanges included, which all ranks replay at once; the slowest rank counts.
Without a GPU it runs with the NumPy backend on host arrays, over MPI, one small shape by default: that checks the
instrument, and says nothing about times.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cuflash import ContextParallel, flash_attn_with_kvcache
from cuflash.bench import report
from cuflash.bench.inputs import Inputs, Shape, to_host
from cuflash.bench.measure import distance
from cuflash.bench.peers import MOST_ERROR
from cuflash.bench.report import Record
from cuflash.bench.timing import Gpu, Sampler, medians, require_gpu
from cuflash.cli.context_parallel import nccl_communicator

_SHAPES = ("b1 L1048576", "b16 L131072", "b128 L8192", "b32 L4096", "b1 L32768", "b1 L4096")
_HOST_SHAPES = ("b1 L640",)
_HEADS, _PAGE, _LAYERS = (32, 8), 16, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of ``python -m tests.bench ranks``."""
    add = parser.add_argument
    shapes = f"batch and keys (default: {', '.join(_SHAPES)}; without a GPU {', '.join(_HOST_SHAPES)})"
    add("--shapes", nargs="+", metavar="SHAPE", help=shapes)
    how = ("direct", "collective")
    add("--exchanges", nargs="+", choices=how, default=how, help="how results travel between GPUs (default: both)")
    add("--rounds", type=int, default=11, help="rounds, of which the median counts (default: 11)")


def run(arguments: argparse.Namespace) -> int:
    """Run ``python -m tests.bench ranks`` on this rank; the first one prints."""
    from mpi4py import MPI

    world: Any = MPI.COMM_WORLD
    comm: Any
    machine: Any
    try:
        require_gpu()
    except RuntimeError as error:
        comm, machine, exchanges = world, _Host(), ["collective"]
        shapes = arguments.shapes or _HOST_SHAPES
        if world.rank == 0:
            print(f"{error}: the NumPy backend runs on host arrays, {', '.join(shapes)}", file=sys.stderr, flush=True)
    else:
        comm, exchanges = nccl_communicator(world), arguments.exchanges  # makes the rank's GPU the current one
        machine, shapes = Gpu(), arguments.shapes or _SHAPES
    facts = {"gpu": machine.facts.get("gpu"), "read_tb_s": machine.bandwidth}
    records = []
    for name in shapes:
        records.append(_measure(_shape(name), machine, world, comm, exchanges, arguments.rounds) | facts)
        if world.rank == 0 and not arguments.json:
            report.write(records[-1:], as_json=False)
            sys.stdout.flush()
        machine.free()
    if world.rank == 0 and arguments.json:
        report.write(records, as_json=True)
    if comm is not world:
        comm.destroy()
    return 0


def _shape(name: str) -> Shape:
    try:
        batch, keys = (int(word[1:]) for word in name.split())
    except ValueError:
        raise ValueError(f"--shapes must be like 'b1 L4096', got {name!r}") from None
    return Shape(name, np.full(batch, keys), *_HEADS, page_size=_PAGE)


def _measure(shape: Shape, machine: Any, world: Any, comm: Any, exchanges: Sequence[str], rounds: int) -> Record:
    """Return the record of a shape: microseconds of a layer.

    Raises:
        ArithmeticError: If ranks give something else than one GPU.
    """
    whole = Inputs.make(shape, machine.xp, machine.fill, machine.l2_bytes)
    plan = whole.plan()
    graphs: dict[str, Sampler] = {"one": machine.graph([partial(whole.attend, i, plan) for i in range(_LAYERS)])}
    answer = to_host(whole.copies[0]["out"])
    share = shape.heads_q // world.size
    answer = answer[..., world.rank * share : (world.rank + 1) * share, :]
    groups = []
    for exchange in exchanges:
        control = None if comm is world else world
        group = ContextParallel(comm, interleave=_PAGE, control=control, exchange=exchange, timeout=60)
        groups.append(group)
        own = _Own(whole, group, machine.xp)
        graphs[exchange] = machine.graph([partial(own.attend, i) for i in range(_LAYERS)])
        error = distance(to_host(own.outs[0]), answer)
        if not error < MOST_ERROR:
            raise ArithmeticError(f"{shape.name}, {exchange}: relative error {error:.2g}")
    graphs["alone"] = machine.graph([partial(own.attend_alone, i) for i in range(_LAYERS)])
    times = medians({name: _Together(world, graph) for name, graph in graphs.items()}, rounds)
    del graphs  # before the communicator
    for group in groups:
        group.close()
    record: Record = {"variant": f"{world.size} ranks", "arch": "", "workload": shape.name}
    record |= {f"{name}_us": us for name, us in times.items()}
    for exchange in exchanges:
        record[f"{exchange}_to_one"] = times[exchange] / times["one"]
        record[f"{exchange}_beyond_us"] = times[exchange] - times["one"] / world.size
    return record


class _Own:
    """What a rank has of a step: every page of its own, in the caches of all."""

    def __init__(self, whole: Inputs, group: ContextParallel, xp: Any) -> None:
        shape, first = whole.shape, whole.copies[0]
        self._whole, self._group = whole, group
        self._table = xp.ascontiguousarray(first["page_table"][:, group.rank :: group.world_size])
        self._plan = group.plan(
            len(shape.lengths), 1, int(shape.lengths.max()), shape.heads_q, shape.heads_kv, shape.headdim,
            first["cache_seqlens"], qkv_dtype=shape.dtype, page_size=shape.page_size, causal=shape.causal,
        )  # fmt: skip
        rows, heads = len(shape.lengths), shape.heads_q // group.world_size
        self.outs = [xp.empty((rows, 1, heads, shape.dim_v), first["q"].dtype) for _ in range(_LAYERS)]
        self._partial = xp.empty((rows, 1, shape.heads_q, shape.dim_v), first["q"].dtype)
        self._lse = xp.empty((rows, shape.heads_q, 1), np.float32)

    def attend(self, i: int) -> None:
        """Attend with all ranks."""
        self._group.attend(**self._given(i), out=self.outs[i])

    def attend_alone(self, i: int) -> None:
        """Attend to this rank's keys, without an exchange."""
        shard = self._group.shard
        flash_attn_with_kvcache(
            **self._given(i), out=self._partial, softmax_lse=self._lse, return_softmax_lse=True,
            cp_world_size=shard.world_size, cp_rank=shard.rank, cp_interleave=shard.interleave,
        )  # fmt: skip

    def _given(self, i: int) -> dict[str, Any]:
        copy = self._whole.copies[i % len(self._whole.copies)] | {"page_table": self._table}
        del copy["out"]
        return copy | self._whole.shape.options | {"scheduler_metadata": self._plan}


@dataclass
class _Together:
    """A graph of every rank, replayed at once: the slowest counts."""

    world: Any
    graph: Sampler

    def sample(self) -> float:
        """Replay; return microseconds per call."""
        self.world.Barrier()
        return max(self.world.allgather(self.graph.sample()))


class _Host:
    """What :class:`cuflash.bench.timing.Gpu` is, on host arrays."""

    xp, l2_bytes, bandwidth, facts = np, 1, None, dict[str, Any]()

    def fill(self, array: Any, seed: int) -> None:
        array[...] = np.random.default_rng(seed).standard_normal(array.shape, np.float32)

    def graph(self, calls: Sequence[Callable[[], Any]]) -> Any:
        for call in calls:
            call()
        return _Calls(calls)

    def free(self) -> None:
        pass


@dataclass
class _Calls:
    calls: Sequence[Callable[[], Any]]

    def sample(self) -> float:
        begin = time.perf_counter()
        for call in self.calls:
            call()
        return 1e6 * (time.perf_counter() - begin) / len(self.calls)
