"""``mpiexec -n 4 python -m cuflash --context-parallel``: a decode step whose sequences are spread over ranks."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..context_parallel import ContextParallel
from ..dtypes import FLOAT_DTYPES, dtype_name, numpy_dtype
from . import packages
from .info import backend_in_use
from .text import bars, environment, hanging, seconds, size, width

_BATCH, _MEDIAN, _LAYERS, _ROUNDS = 8, 512, 2, 5
_UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
_TIMEOUT = 120.0


def run(arguments: argparse.Namespace) -> int:
    """Run the demo on this rank; the first one prints. The exit code is 1 if the results of any rank are wrong."""
    if arguments.backend == "sim":
        raise ValueError("--context-parallel must go with --backend numpy or cuda, got sim")
    if arguments.kv_dtype is not None:
        raise ValueError(f"--context-parallel must go without --kv-dtype, got {arguments.kv_dtype}")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(f"context parallelism needs MPI ({reason}): {packages.install(*packages.MPI)}") from error
    world = MPI.COMM_WORLD
    with environment(CUFLASH_BACKEND=arguments.backend):
        backend, reason = backend_in_use()
    on_gpus = backend == "cuda" and all(world.allgather(_has_nccl()))
    if arguments.backend == "cuda" and not on_gpus:
        raise RuntimeError(f"every rank needs a GPU and NCCL: {reason}; {packages.install(packages.NCCL)}")
    with environment(CUFLASH_BACKEND="cuda" if on_gpus else "numpy"):
        comm: Any = nccl_communicator(world) if on_gpus else world
        num_heads = arguments.heads or (32, 8)
        heads = "all" if num_heads[0] % world.size else "share"
        with ContextParallel(
            comm, control=world if on_gpus else None, interleave=arguments.interleave, heads=heads, timeout=_TIMEOUT
        ) as group:
            wrong = _Demo(arguments, group, num_heads, heads, on_gpus).run(world)
        if on_gpus:
            comm.destroy()  # type: ignore[union-attr,unused-ignore]
    return 1 if wrong else 0


def _has_nccl() -> bool:
    try:
        import nccl.core  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True


def nccl_communicator(world: Any) -> Any:
    """Return a communicator of one GPU per rank, which becomes the current one."""
    import cupy
    import nccl.core

    cupy.cuda.Device(world.rank % cupy.cuda.runtime.getDeviceCount()).use()
    unique_id = world.bcast(nccl.core.get_unique_id() if world.rank == 0 else None)
    return nccl.core.Communicator.init(nranks=world.size, rank=world.rank, unique_id=unique_id)


class _Demo:
    """A batch of random sequences, and this rank's share of their keys."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        group: ContextParallel,
        num_heads: tuple[int, int],
        heads: str,
        on_gpus: bool,
    ) -> None:
        self.group, self.num_heads, self.heads, self.on_gpus = group, num_heads, heads, on_gpus
        self.batch, median = arguments.batch or _BATCH, arguments.seqlen or _MEDIAN
        self.layers, self.page_size = arguments.layers or _LAYERS, arguments.page_size
        self.headdim = arguments.headdim or 128
        dtype = "bfloat16" if on_gpus else "float32"
        self.dtype = dtype_name("--dtype", dtype if arguments.dtype is None else arguments.dtype, FLOAT_DTYPES)
        self.rng = np.random.default_rng(arguments.seed)  # the same on all ranks
        lengths = self.rng.lognormal(np.log(median), 1.0, self.batch)
        self.seqlens = np.clip(lengths, 1, 16 * median).astype(np.int32)

    def run(self, world: Any) -> int:
        """Print what happens; return how many values are wrong."""
        group, seqlens = self.group, self.seqlens
        held = world.allgather([int(n) for n in group.shard.held(seqlens)])
        lengths = self._to_backend(seqlens)
        plan = group.plan(
            self.batch, 1, int(seqlens.max()), *self.num_heads, self.headdim, lengths, qkv_dtype=self.dtype,
            page_size=self.page_size, causal=True,
        )  # fmt: skip
        whole = [self._layer() for _ in range(self.layers)]
        page_table, own = self._share(whole)

        def layer(index: int) -> Any:
            q = self._to_backend(whole[index][0])
            return group.attend(
                q, *own[index], cache_seqlens=lengths, page_table=page_table, causal=True, scheduler_metadata=plan
            )

        error, wrong = 0.0, 0
        for index in range(self.layers):
            worst, excess = self._compare(whole[index], layer(index))
            error, wrong = max(error, worst), wrong + excess
        times = []
        for _ in range(_ROUNDS):
            begin = time.perf_counter()
            for index in range(self.layers):
                layer(index)
            group.wait()
            times.append(time.perf_counter() - begin)
        all_results = world.allgather((error, wrong))
        wrong = sum(each for _, each in all_results)
        if group.rank == 0:
            self._report(held, max(each for each, _ in all_results), wrong, float(np.median(times)))
        return wrong

    def _layer(self) -> tuple[NDArray[Any], list[NDArray[Any]]]:
        """Return queries, and keys and values (2, seqlen, heads_kv, headdim) of each sequence."""
        dtype = numpy_dtype(self.dtype)
        q = self.rng.standard_normal((self.batch, 1, self.num_heads[0], self.headdim), np.float32).astype(dtype)
        rows = [(2, int(n), self.num_heads[1], self.headdim) for n in self.seqlens]
        return q, [self.rng.standard_normal(shape, np.float32).astype(dtype) for shape in rows]

    def _share(self, whole: list[Any]) -> tuple[Any, list[tuple[Any, Any]]]:
        """Return this rank's page table and caches."""
        shard, page_size = self.group.shard, self.page_size
        pages = [max(1, -(-int(n) // page_size)) for n in shard.held(self.seqlens)]
        begins = np.cumsum([0, *pages])
        table = np.zeros((self.batch, max(pages)), np.int32)
        caches = np.zeros((self.layers, 2, begins[-1] * page_size, *whole[0][1][0].shape[2:]), whole[0][0].dtype)
        for b, count in enumerate(pages):
            table[b, :count] = np.arange(begins[b], begins[b + 1])
            here = np.flatnonzero(shard.holds(np.arange(self.seqlens[b])))
            for index, (_, rows) in enumerate(whole):
                caches[index, :, begins[b] * page_size :][:, : len(here)] = rows[b][:, here]
        paged = caches.reshape(self.layers, 2, -1, page_size, *caches.shape[3:])
        return self._to_backend(table), [(self._to_backend(k), self._to_backend(v)) for k, v in paged]

    def _to_backend(self, array: NDArray[Any]) -> Any:
        if not self.on_gpus:
            return array
        import cupy

        return cupy.asarray(array)

    def _compare(self, layer: tuple[NDArray[Any], list[NDArray[Any]]], out: Any) -> tuple[float, int]:
        """Return the largest error of this rank's heads against float64, and how many are beyond rounding.

        Parts are rounded once each, and their sum once more.
        """
        out = out if isinstance(out, np.ndarray) else out.get()
        q, all_rows = layer
        share = out.shape[2]
        first = self.group.rank * share if self.heads == "share" else 0
        kv_heads = np.arange(first, first + share) // (self.num_heads[0] // self.num_heads[1])
        bound = 3 * _UNIT_ROUNDOFF[self.dtype] + 1e-5
        error, wrong = 0.0, 0
        for b, (keys, values) in enumerate(all_rows):
            keys, values = (x[:, kv_heads].transpose(1, 0, 2).astype(np.float64) for x in (keys, values))
            query = q[b, 0, first : first + share, :, None].astype(np.float64)
            scores = (keys @ query)[..., 0] * self.headdim**-0.5  # (heads, seqlen)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p = (p / p.sum(-1, keepdims=True))[:, None]
            difference = np.abs(out[b, 0].astype(np.float64) - (p @ values)[:, 0])
            error = max(error, float(difference.max()))
            wrong += int(np.count_nonzero(~(difference <= bound * (p @ np.abs(values))[:, 0])))
        return error, wrong

    def _report(self, held: list[list[int]], error: float, wrong: int, elapsed: float) -> None:
        group, ranks, seqlens = self.group, self.group.world_size, self.seqlens
        carrier = "NCCL" if self.on_gpus else "MPI, on host arrays"
        hanging("", f"A decode step with context parallelism: {ranks} rank{'s' * (ranks > 1)} over {carrier}")
        print()
        _row("sequences", f"{self.batch}, of {seqlens.min()} to {seqlens.max()} keys, {seqlens.sum()} in all")
        _row("", bars(seqlens, width() - 15))
        _row("positions", f"in turns of {group.shard.interleave}: rank (p // {group.shard.interleave}) % {ranks}")
        row_bytes = 2 * self.num_heads[1] * self.headdim * numpy_dtype(self.dtype).itemsize
        for rank, keys in enumerate(held):
            _row(f"rank {rank}", f"{sum(keys)} keys, {size(sum(keys) * row_bytes)} per layer")
        item = self.headdim * numpy_dtype(self.dtype).itemsize + 4
        sent = self.batch * self.num_heads[0] * item * (ranks - 1)
        sent = sent // ranks if self.heads == "share" else sent
        kind = "all-to-all" if self.heads == "share" else "all-gather (the ranks do not divide the heads)"
        _row("exchange", f"one {kind} a layer: {size(sent)} from each rank")
        verdict = f"within {self.dtype}'s rounding" if not wrong else f"WRONG: {wrong} values beyond rounding"
        _row("error", f"{error:.1e} to float64, {verdict}")
        _row("time", f"{seconds(elapsed)} for {self.layers} layers, median of {_ROUNDS} steps")
        if ranks == 1:
            print()
            hanging("", "One rank holds everything. Four: mpiexec -n 4 python -m cuflash --context-parallel")


def _row(name: str, text: str) -> None:
    hanging(f"  {name:<10}  ", text)
