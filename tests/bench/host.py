"""Microseconds of Python from a public function to its launch; the launch itself does nothing, and no GPU is needed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from cuflash import (
    DecodeStep,
    PagedKVCache,
    SchedulerMetadata,
    arguments,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
    kernels,
    memo,
)
from cuflash.bench import report
from cuflash.bench.report import Record
from cuflash.device import Device
from cuflash.dtypes import numpy_dtype

from .standin import DeviceArray, ForeignArray, Machine, Tensor, empty, gpu

_BATCH, _KEYS, _HEADS_Q, _HEADS_KV, _HEADDIM, _PAGE = 32, 4096, 32, 8, 128, 16


def measure(seconds: float = 0.2) -> Iterator[Record]:
    """Yield a record per call and per part of it.

    Args:
        seconds: How long to repeat each; the fastest of many short series counts, as on a quiet core.
    """

    def us(function: Callable[[], Any]) -> float:
        return _microseconds(function, seconds)

    nothing = np.empty(0, np.float32)
    unit = us(lambda: np.add(nothing, nothing))
    with gpu(Device(132, 90), Machine()) as backend:
        call, append, plan = _calls()
        (call_tensors, *_), (call_foreign, *_) = _calls(Tensor), _calls(ForeignArray)
        metadata = plan(None)

        def again() -> Any:
            return call(metadata)

        def first() -> Any:
            metadata.calls.clear()
            return call(metadata)

        def first_refill() -> Any:
            metadata.calls.clear()
            return plan(metadata)

        append_metadata = append(None)
        total_again, total_first = us(again), us(first)
        rows = [
            ("attention on a plan", "every later call", total_again),
            ("", "signature, lookup", us(_captured(memo, "spell", again))),
            ("", "launch: parameters", us(_captured(backend, "repeat", again))),
        ]
        rows.append(("", "the rest", total_again - rows[1][2] - rows[2][2]))
        parts = [
            ("", "scalar checks", us(_captured(arguments, "make_problem", first))),
            ("", "plan comparison", us(_captured(arguments, "_planned", first))),
            ("", "variant lookup", us(_captured(kernels.decode, "decode_variant", first))),
            ("", "launch: parameters", us(_captured(backend, "attend", first))),
        ]
        rows += [
            ("attention on a plan", "first call of its shapes", total_first),
            *parts,
            ("", "array checks, the rest", total_first - sum(part[2] for part in parts) + parts[2][2]),
            ("attention on a plan", "with new keys and rotary", us(lambda: append(append_metadata))),
            ("attention on a plan", "output made by the call", us(lambda: call(metadata, out=None))),
            ("attention on a plan", "torch's tensors", us(lambda: call_tensors(metadata))),
            ("attention on a plan", "torch's tensors, output made", us(lambda: call_tensors(metadata, out=None))),
            ("attention on a plan", "another framework's arrays", us(lambda: call_foreign(metadata))),
            ("attention", "without a plan", us(lambda: call(None))),
            ("DecodeStep", "a layer's later calls, with new keys", us(_step_call())),
            ("get_scheduler_metadata", "out=, every later call", us(lambda: plan(metadata))),
            ("", "signature, lookup", us(_captured(memo, "spell", lambda: plan(metadata)))),
            ("", "launch: parameters", us(_captured(backend, "repeat", lambda: plan(metadata)))),
            ("get_scheduler_metadata", "out=, first call", us(first_refill)),
            ("get_scheduler_metadata", "a new plan", us(lambda: plan(None))),
        ]
    name = ""
    for variant, part, time_us in rows:
        name = variant or name
        yield {
            "variant": name,
            "arch": "host",
            "workload": part if variant else f"  {part}",
            "us_per_call": time_us,
            "ratio_to_numpy_add": time_us / unit,
        }
    yield {
        "variant": "numpy.add",
        "arch": "host",
        "workload": "empty arrays",
        "us_per_call": unit,
        "ratio_to_numpy_add": 1.0,
    }


def _calls(
    kind: Callable[[DeviceArray], Any] = lambda array: array,
) -> tuple[Callable[..., Any], Callable[[Any], Any], Callable[[Any], SchedulerMetadata]]:
    """Return attention on a plan or None, the same with an append (None makes its plan), and planning into ``out``."""

    def device(*shape: int, dtype: str = "bfloat16") -> Any:
        return kind(empty(shape, np.int32 if dtype == "int32" else numpy_dtype(dtype)))

    q, given = device(_BATCH, 1, _HEADS_Q, _HEADDIM), device(_BATCH, 1, _HEADS_Q, _HEADDIM)
    pages = _BATCH * _KEYS // _PAGE
    caches = device(pages, _PAGE, _HEADS_KV, _HEADDIM), device(pages, _PAGE, _HEADS_KV, _HEADDIM)
    table, lengths = device(_BATCH, _KEYS // _PAGE, dtype="int32"), device(_BATCH, dtype="int32")
    k, v = device(_BATCH, 1, _HEADS_KV, _HEADDIM), device(_BATCH, 1, _HEADS_KV, _HEADDIM)
    cos, sin = device(_KEYS, _HEADDIM // 2), device(_KEYS, _HEADDIM // 2)

    def plan(metadata: SchedulerMetadata | None, new: int = 0) -> SchedulerMetadata:
        return get_scheduler_metadata(
            _BATCH, 1, _KEYS, _HEADS_Q, _HEADS_KV, _HEADDIM, lengths, page_size=_PAGE, max_seqlen_k_new=new,
            causal=True, out=metadata,
        )  # fmt: skip

    def call(metadata: SchedulerMetadata | None, out: Any = given) -> Any:
        return flash_attn_with_kvcache(
            q, *caches, cache_seqlens=lengths, page_table=table, causal=True, scheduler_metadata=metadata, out=out
        )

    def append(metadata: SchedulerMetadata | None) -> Any:
        if metadata is None:
            return plan(None, new=1)
        return flash_attn_with_kvcache(
            q, *caches, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=lengths, page_table=table, causal=True,
            scheduler_metadata=metadata, out=given,
        )  # fmt: skip

    return call, append, plan


def _step_call() -> Callable[[], Any]:
    """Return the call of a layer in a step of a token each."""
    cache = PagedKVCache(
        1, _BATCH * 2, _PAGE, _HEADS_KV, _HEADDIM, "bfloat16", max_sequences=_BATCH, xp=sys.modules["cupy"]
    )
    step = DecodeStep(cache, _HEADS_Q).begin([cache.add() for _ in range(_BATCH)])
    heads = (_HEADS_Q, _HEADS_KV, _HEADS_KV, _HEADS_Q)
    q, k, v, out = (empty((_BATCH, number, _HEADDIM), numpy_dtype("bfloat16")) for number in heads)
    return lambda: step(0, q, k, v, out=out)


def _captured(owner: ModuleType | Any, name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that calls ``owner.name`` as ``call`` last did."""
    function = getattr(owner, name)
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return function(*args, **kwargs)

    setattr(owner, name, spy)
    try:
        call()
    finally:
        setattr(owner, name, function)
    args, kwargs = seen[-1]
    return lambda: function(*args, **kwargs)


def _microseconds(function: Callable[[], Any], seconds: float) -> float:
    """Return the time of a call: of the fastest of many series of about a millisecond."""
    function()
    best, end, number = float("inf"), time.perf_counter() + seconds, 1
    while True:
        start = time.perf_counter()
        for _ in range(number):
            function()
        now = time.perf_counter()
        if now - start < 1e-3:
            number *= 2
        else:
            best = min(best, (now - start) / number)
        if now > end and best < float("inf"):
            return 1e6 * best


_NOTES = (
    "",
    f"{_BATCH} x {_KEYS} keys, {_HEADS_Q}/{_HEADS_KV} heads, bfloat16, pages of {_PAGE}; CuPy's and torch's arrays,"
    " imports and launches are stood in for.",
    "us_per_call: of the fastest of many short series; ratio_to_numpy_add: beside numpy.add of two empty arrays.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of ``python -m tests.bench host``."""
    parser.add_argument("--seconds", type=float, default=0.2, help="how long to repeat each part (default: 0.2)")


def run(arguments: argparse.Namespace) -> int:
    """Run ``python -m tests.bench host``."""
    report.write(measure(arguments.seconds), arguments.json, _NOTES)
    return 0
