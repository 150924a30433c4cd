"""``python -m cuflash demo``: a ragged decode batch, several layers on one plan, checked and timed."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import SchedulerMetadata, flash_attn_with_kvcache, get_scheduler_metadata
from ..dtypes import FLOAT_DTYPES, QUANTISED_DTYPES, dtype_name, numpy_dtype
from ..problem import MAX_BATCH
from .info import backend_in_use
from .text import Progress, aligned, bars, environment, hanging, heads, integer, positive, seconds, size, width

if TYPE_CHECKING:
    from argparse import _SubParsersAction

# Work that takes a few seconds: sequences, their median length, layers, rounds of timing.
_SIZES = {"cuda": (64, 2048, 4, 20), "numpy": (16, 512, 4, 5), "sim": (4, 300, 2, 0)}
_DTYPES = {"cuda": "bfloat16", "numpy": "float32", "sim": "bfloat16"}
_MAX_RANDOM_PAGES = 4096  # caches of more pages repeat them: random numbers take longest
_MAX_MEDIAN = (2**31 - 1) // 16  # lengths reach 16 times their median
_UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the arguments; what is not given follows from the backend."""
    parser = subparsers.add_parser(
        "demo",
        help="run a ragged decode batch for several layers on one plan, check and time it",
        description="Run a ragged decode batch for several layers on one plan, on whatever is found.",
    )
    parser.add_argument(
        "--backend", choices=("auto", "cuda", "numpy", "sim"), help="default CUFLASH_BACKEND, or auto: a GPU if found"
    )
    batch, seqlen, layers, _ = (f"default {of[1]}; cuda: {of[0]}, sim: {of[2]}" for of in zip(*_SIZES.values()))
    parser.add_argument("--batch", type=integer(1, MAX_BATCH), help=f"sequences ({batch})")
    parser.add_argument(
        "--seqlen", type=integer(1, _MAX_MEDIAN), help=f"their median length; lengths are lognormal ({seqlen})"
    )
    parser.add_argument("--layers", type=positive, help=f"layers that share the plan ({layers})")
    parser.add_argument("--heads", type=heads, metavar="Q/KV", help="heads (default 32/8; sim: 8/2)")
    parser.add_argument("--headdim", type=positive, help="elements of a key (default 128; sim: 64)")
    parser.add_argument("--dtype", help=f"one of {', '.join(FLOAT_DTYPES)} (default bfloat16; numpy: float32)")
    parser.add_argument("--kv-dtype", metavar="DTYPE", help=f"a quantised cache: {', '.join(QUANTISED_DTYPES)}")
    parser.add_argument("--page-size", type=positive, default=16, help="keys per page (default 16)")
    parser.add_argument("--seed", type=integer(0), default=0, help="of lengths and values (default 0)")
    parser.add_argument(
        "--context-parallel",
        action="store_true",
        help="spread every sequence over the ranks that mpiexec has started (defaults: batch 8, seqlen 512, layers 2)",
    )
    parser.add_argument(
        "--interleave", type=positive, default=16, help="with it: neighbouring keys that a rank holds (default 16)"
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; the exit code is 1 if the results are wrong."""
    if arguments.context_parallel:
        from . import context_parallel

        return context_parallel.run(arguments)
    with environment(CUFLASH_BACKEND=arguments.backend):
        simulates = os.environ.get("CUFLASH_BACKEND") == "sim"
        # A simulated GPU is small, so that a small problem fills it.
        with environment(CUFLASH_NUM_SM=4 if simulates and not os.environ.get("CUFLASH_NUM_SM") else None):
            backend, reason = backend_in_use()
            with environment(CUFLASH_BACKEND=backend):
                return _run(arguments, backend, reason)


@dataclass
class Step:
    """The data of one decode step, in the memory of the backend.

    Attributes:
        seqlens: (batch,) keys of each sequence.
        page_table: (batch, pages per sequence); pages lie in random order.
        layers: (q, k_cache, v_cache) of each layer.
        kv_dtype: Element type of the caches if they are quantised, whose arrays are bytes then, else None.
        scale: What their elements are multiplied by.
    """

    seqlens: Any
    page_table: Any
    layers: list[tuple[Any, Any, Any]]
    kv_dtype: str | None
    scale: float | None

    def numbers(self, cache: NDArray[Any]) -> NDArray[np.float64]:
        """Return what the elements of a cache stand for."""
        if self.kv_dtype is None or self.scale is None:
            return cache.astype(np.float64)
        return cache.view(numpy_dtype(self.kv_dtype)).astype(np.float64) * self.scale


def _run(arguments: argparse.Namespace, backend: str, reason: str) -> int:
    batch, median, num_layers, rounds = _SIZES[backend]
    batch, median = arguments.batch or batch, arguments.seqlen or median
    num_layers, page_size = arguments.layers or num_layers, arguments.page_size
    num_heads = arguments.heads or ((8, 2) if backend == "sim" else (32, 8))
    headdim = arguments.headdim or (64 if backend == "sim" else 128)
    dtype = dtype_name("--dtype", _DTYPES[backend] if arguments.dtype is None else arguments.dtype, FLOAT_DTYPES)
    kv_dtype = arguments.kv_dtype
    kv_dtype = None if kv_dtype is None else dtype_name("--kv-dtype", kv_dtype, QUANTISED_DTYPES)
    rng = np.random.default_rng(arguments.seed)
    seqlens = np.clip(rng.lognormal(np.log(median), 1.0, batch), 1, 16 * median).astype(np.int32)

    def plan(lengths: Any, **options: Any) -> SchedulerMetadata:
        return get_scheduler_metadata(
            batch, 1, int(seqlens.max()), num_heads[0], num_heads[1], headdim, lengths,
            qkv_dtype=dtype, kv_dtype=kv_dtype, page_size=page_size, causal=True, **options,
        )  # fmt: skip

    # Wrong arguments show before the caches are made.
    with environment(CUFLASH_BACKEND="numpy"):
        plan(seqlens)
    hanging("", f"A decode step: planned once, run by {num_layers} layer{'s' * (num_layers > 1)}")
    print()
    _row("backend", f"{backend}: {reason}")
    if backend == "sim":
        from ..simulator.compile import machine_is_built

        if not machine_is_built():
            _row("", "the simulator is built first, once: some 20 s")
            sys.stdout.flush()  # so that it is seen in time where this is a pipe, too
    _row("sequences", f"{batch}, of {seqlens.min()} to {seqlens.max()} keys, {seqlens.sum()} in all")
    _row("", bars(seqlens, width() - 15))
    _row("cache", f"pages of {page_size} keys in random order{f', {kv_dtype}' if kv_dtype else ''}")

    progress = Progress()
    step = _make_step(rng, seqlens, num_layers, num_heads, headdim, page_size, dtype, kv_dtype, backend, progress)
    progress("planning" if backend == "numpy" else "compiling and planning")
    metadata = plan(step.seqlens)
    unsplit = plan(step.seqlens, num_splits=1)
    progress.done()
    print()
    aligned(str(metadata))
    columns = width() - 15
    shares, short = _shares(metadata), metadata.partition.short_share
    _row("shares", bars(shares, columns))
    if metadata.efficiency < 0.9 and shares.sum() < short * metadata.num_blocks:
        _row("", f"below {short} keys a block plans cut less: merging would cost more than it evens out")
    _row("unsplit", f"{100 * unsplit.efficiency:.1f} % efficient: the same if no item were cut (num_splits=1)")
    _row("", bars(_shares(unsplit), columns))
    print()

    def layer(index: int, metadata: SchedulerMetadata | None) -> tuple[Any, Any]:
        q, k_cache, v_cache = step.layers[index]
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=step.seqlens, page_table=step.page_table, causal=True,
            scheduler_metadata=metadata, return_softmax_lse=True, kv_dtype=kv_dtype, k_descale=step.scale,
            v_descale=step.scale,
        )  # fmt: skip

    worst, lse_worst, wrong = 0.0, 0.0, 0
    for index in sorted({0, num_layers - 1}):  # the reference takes far longer than a layer
        progress(f"layer {index + 1} of {num_layers} against a float64 reference")
        error, lse_error, excess = _compare(step, index, layer(index, metadata))
        worst, lse_worst, wrong = max(worst, error), max(lse_worst, lse_error), wrong + excess
    progress.done()
    verdict = f"within {dtype}'s rounding" if not wrong else f"WRONG: {wrong} values beyond rounding"
    _row("error", f"out {worst:.1e}, LSE {lse_worst:.1e} to float64, {verdict}")
    if rounds:
        _time(step, backend, layer, plan, metadata, seqlens, rounds, progress)
    return 1 if wrong else 0


def _make_step(
    rng: np.random.Generator,
    seqlens: NDArray[np.int32],
    num_layers: int,
    num_heads: tuple[int, int],
    headdim: int,
    page_size: int,
    dtype: str,
    kv_dtype: str | None,
    backend: str,
    progress: Progress,
) -> Step:
    """Make random queries and caches: all layers have the same pages, each in an order of its own."""
    to_backend: Callable[[Any], Any] = np.asarray
    if backend == "cuda":
        import cupy

        to_backend = cupy.asarray
    used = -(-seqlens // page_size)
    num_pages = int(used.sum())
    page_table = np.full((len(seqlens), used.max()), -1, np.int32)
    page_table[np.arange(used.max()) < used[:, None]] = rng.permutation(num_pages)
    progress("making random pages")
    some = min(num_pages, _MAX_RANDOM_PAGES)
    pages: NDArray[Any] = rng.standard_normal((2, some, page_size, num_heads[1], headdim), np.float32)
    scale = None
    if kv_dtype is not None:
        scale = 1 / 24 if kv_dtype == "int8" else 1.0  # codes of int8 reach 127: five standard deviations
        pages = np.clip(np.rint(pages / scale), -127, 127) if kv_dtype == "int8" else pages
    pages = pages.astype(numpy_dtype(kv_dtype or dtype))
    pages = pages if kv_dtype is None else pages.view(np.uint8)  # CuPy has no float8
    layers: list[tuple[Any, Any, Any]] = []
    for index in range(num_layers):
        progress(f"making the cache of layer {index + 1} of {num_layers}")
        q = rng.standard_normal((len(seqlens), 1, num_heads[0], headdim), np.float32).astype(numpy_dtype(dtype))
        k_cache, v_cache = pages[:, rng.permutation(num_pages) % some]
        layers.append((to_backend(q), to_backend(k_cache), to_backend(v_cache)))
    return Step(to_backend(seqlens), to_backend(page_table), layers, kv_dtype, scale)


def _compare(step: Step, index: int, result: tuple[Any, Any]) -> tuple[float, float, int]:
    """Return the largest errors of a layer's output and LSE, and how many outputs are beyond what rounding explains.

    An output is sum(p * v): rounding p and the sum moves it by at most 2 u * sum(p * |v|) for the unit roundoff u.
    """
    seqlens, page_table, q, k_cache, v_cache, out, lse = (
        x if isinstance(x, np.ndarray) else x.get()
        for x in (step.seqlens, step.page_table, *step.layers[index], *result)
    )
    kv_heads, headdim = k_cache.shape[2:]
    bound = 2 * _UNIT_ROUNDOFF[q.dtype.name] + 1e-5
    error, lse_error, wrong = 0.0, 0.0, 0
    for b, seqlen in enumerate(seqlens):
        pages = page_table[b, : -(-seqlen // k_cache.shape[1])]
        keys, values = (
            step.numbers(cache[pages]).reshape(-1, kv_heads, headdim)[:seqlen].transpose(1, 0, 2)
            for cache in (k_cache, v_cache)
        )  # (heads_kv, seqlen, headdim)
        query = q[b, 0].astype(np.float64).reshape(kv_heads, -1, headdim)
        scores = query @ keys.transpose(0, 2, 1) * headdim**-0.5
        top = scores.max(-1, keepdims=True)
        p = np.exp(scores - top)
        total = p.sum(-1, keepdims=True)
        p /= total
        difference = np.abs(out[b, 0].astype(np.float64).reshape(query.shape) - p @ values)
        error = max(error, float(difference.max()))
        lse_error = max(lse_error, float(np.abs(lse[b, :, 0] - (top + np.log(total)).ravel()).max()))
        wrong += int(np.count_nonzero(~(difference <= bound * (p @ np.abs(values)))))
    return error, lse_error, wrong


def _time(
    step: Step,
    backend: str,
    layer: Callable[[int, SchedulerMetadata | None], Any],
    plan: Callable[..., SchedulerMetadata],
    metadata: SchedulerMetadata,
    seqlens: NDArray[np.int32],
    rounds: int,
    progress: Progress,
) -> None:
    """Print what a step takes with the shared plan and without one. The layers' caches take turns: no warm L2.

    The NumPy backend splits nothing and needs no plan: there a step has one time.
    """
    num_layers = len(step.layers)
    _, k_cache, v_cache = step.layers[0]
    row_bytes = sum(int(np.prod(cache.shape[2:])) * cache.dtype.itemsize for cache in (k_cache, v_cache))
    step_bytes = int(seqlens.sum()) * row_bytes * num_layers

    def shared() -> None:
        plan(step.seqlens, out=metadata)
        for index in range(num_layers):
            layer(index, metadata)

    def alone() -> None:
        for index in range(num_layers):
            layer(index, None)

    ways: dict[str, Callable[[], object]] = {"alone": alone}
    if backend != "numpy":
        ways = {"shared": shared, **ways, "plan": lambda: plan(step.seqlens, out=metadata)}
    all_times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the ways take turns, so that a busy moment of the machine favours none
        progress(f"timing, round {number} of {rounds}")
        for name, way in ways.items():
            elapsed = _timed(way, backend)
            if number:  # the first round warms up
                all_times[name].append(elapsed)
    progress.done()
    times = {name: float(np.median(each)) for name, each in all_times.items()}
    rows = [("alone", "time", f"{num_layers} layers; the NumPy backend needs no plan")]
    if backend != "numpy":
        rows = [
            ("shared", "one plan", f"planned once ({seconds(times['plan'])}), {num_layers} layers run on it"),
            ("alone", "no plan", "every layer plans for itself"),
        ]
    for name, label, detail in rows:
        rate = f"{step_bytes / times[name] / 1e9:.1f} GB/s"
        _row(label, f"{seconds(times[name]):>8}  {rate:>11}   {detail}")
    _row("", f"median of {rounds} steps, each reads {size(step_bytes)} of keys and values")


def _timed(way: Callable[[], object], backend: str) -> float:
    """Return the seconds that ``way`` takes, until the GPU is done."""
    _synchronise(backend)
    begin = time.perf_counter()
    way()
    _synchronise(backend)
    return time.perf_counter() - begin


def _synchronise(backend: str) -> None:
    if backend == "cuda":
        import cupy

        cupy.cuda.get_current_stream().synchronize()


def _shares(metadata: SchedulerMetadata) -> NDArray[np.float64]:
    """Return the keys that each block reads, (blocks,)."""
    work = metadata.work()
    return np.bincount(work["block"], work["key_end"] - work["key_begin"]).astype(np.float64)


def _row(name: str, text: str) -> None:
    """Print a line of the report, aligned with those of ``print(metadata)``."""
    hanging(f"  {name:<10}  ", text)
