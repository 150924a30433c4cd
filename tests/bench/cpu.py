"""The NumPy backend beside torch's scaled_dot_product_attention on the CPU."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from cuflash import flash_attn_with_kvcache
from cuflash.bench import report
from cuflash.bench.report import Record
from cuflash.dtypes import dtype_name, numpy_dtype

from .device import plan_for


def measure(
    dtypes: Iterable[str] = ("float32", "bfloat16"),
    batch: int = 8,
    keys: int = 4096,
    heads: tuple[int, int] = (32, 8),
    headdim: int = 128,
    runs: int = 9,
) -> Iterator[Record]:
    """Yield a record per element type: medians of alternating runs in this process.

    Args:
        dtypes: Element types.
        batch: Sequences.
        keys: Keys of each sequence.
        heads: Query and KV heads.
        headdim: Head dim.
        runs: Runs of each.

    Raises:
        ImportError: Without torch.
    """
    import torch

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads)
    num_heads_q, num_heads_kv = heads
    rng = np.random.default_rng(0)
    for dtype in dtypes:
        q = rng.standard_normal((batch, 1, num_heads_q, headdim), np.float32).astype(numpy_dtype(dtype))
        cache = rng.standard_normal((2, batch, keys, num_heads_kv, headdim), np.float32).astype(numpy_dtype(dtype))
        # (batch, heads, length, dim), contiguous: the layout that torch likes best.
        query, k, v = (_tensor(array).transpose(1, 2).contiguous() for array in (q, *cache))

        def ours(q: Any = q, cache: Any = cache) -> Any:
            return flash_attn_with_kvcache(q, *cache)

        def theirs(query: Any = query, k: Any = k, v: Any = v) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(query, k, v, enable_gqa=True)

        with plan_for(132, backend="numpy"):
            our_s, their_s = _alternately(ours, theirs, runs)
        yield {
            "variant": dtype,
            "arch": "cpu",
            "workload": f"{batch} x {keys}, {num_heads_q}/{num_heads_kv}, head dim {headdim}",
            "threads": threads,
            "numpy_ms": 1e3 * our_s,
            "torch_ms": 1e3 * their_s,
            "time_ratio": our_s / their_s,
        }


def _tensor(array: np.ndarray) -> Any:
    """Return a torch tensor on the same memory; torch does not read ml_dtypes."""
    import torch

    if array.dtype.isbuiltin == 1:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def _alternately(first: Callable[[], Any], second: Callable[[], Any], runs: int) -> tuple[float, float]:
    """Return the median seconds of two functions that run in turn, after one run of each that does not count."""
    seconds: tuple[list[float], list[float]] = [], []
    for run in range(runs + 1):
        for function, times in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            function()
            if run:
                times.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of ``python -m tests.bench cpu``."""
    add = parser.add_argument
    add("--dtype", nargs="+", default=["float32", "bfloat16"], help="element types (default: float32 bfloat16)")
    add("--batch", type=int, default=8, help="sequences (default: 8)")
    add("--keys", type=int, default=4096, help="keys of each sequence (default: 4096)")
    add("--runs", type=int, default=9, help="runs of each (default: 9)")


def run(arguments: argparse.Namespace) -> int:
    """Run ``python -m tests.bench cpu``."""
    dtypes = [dtype_name("--dtype", name) for name in arguments.dtype]
    records = measure(dtypes, arguments.batch, arguments.keys, runs=arguments.runs)
    report.write(records, arguments.json, ("", "time_ratio: the NumPy backend's time / torch's; medians."))
    return 0
