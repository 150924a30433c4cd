"""A captured call: whatever a caller may leave out, give in another form or on the host, nothing is allocated.

Memory that a call takes from CuPy's pool and gives back when it returns would be used by every replay all the same. So
an argument with a convenience (a cast, a copy, a number made an array) either keeps what it makes, as long as the plan
lives, or is refused by name during the capture. Here the pool counts, and replays come after others have used the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import reference
from problems import DTYPES
from small import BATCH, CAPACITY, DIM, HEADS, KV_HEADS, Arguments, contiguous, everything, paged

import cuflash

pytestmark = pytest.mark.gpu


class Allocations:
    """Counts what CuPy allocates, in bytes of its pool, which has units of 512."""

    def __init__(self) -> None:
        self.bytes = 0

    def malloc(self, size: int) -> Any:
        import cupy

        self.bytes += -(-size // 512) * 512
        return cupy.get_default_memory_pool().malloc(size)


@contextmanager
def counted() -> Iterator[Allocations]:
    import cupy

    allocations = Allocations()
    with cupy.cuda.using_allocator(allocations.malloc):
        yield allocations


def every_other(x: Any) -> Any:
    """The same values in every other element."""
    import cupy

    memory = cupy.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    memory[..., ::2] = x
    return memory[..., ::2]


def at_odd_byte(x: Any) -> Any:
    import cupy

    memory = cupy.zeros(x.nbytes + 16, np.uint8)
    memory[1 : 1 + x.nbytes] = x.reshape(-1).view(np.uint8)  # byte by byte: CuPy's kernels want aligned addresses
    return cupy.ndarray(x.shape, x.dtype, memory.data + 1)


def cast(dtype: Any) -> Callable[[Any], Any]:
    def change(x: Any) -> Any:
        import cupy

        return cupy.asarray(x.get().astype(dtype))

    return change


def on_host(x: Any) -> Any:
    return x.get()


Change = tuple[Callable[[], Arguments], str, Callable[[Any], Any]]
CHANGES: dict[str, Change] = {
    "float16 sinks": (everything, "sinks", cast(np.float16)),
    "bfloat16 sinks": (everything, "sinks", cast(DTYPES["bfloat16"])),
    "float64 sinks": (everything, "sinks", cast(np.float64)),
    "strided sinks": (everything, "sinks", every_other),
    "sinks on the host": (everything, "sinks", on_host),
    "one length": (contiguous, "cache_seqlens", lambda _: 20),
    "one length, paged": (paged, "cache_seqlens", lambda _: 20),
    "one NumPy length": (contiguous, "cache_seqlens", lambda _: np.int64(20)),
    "no lengths": (contiguous, "cache_seqlens", lambda _: None),
    "no lengths, paged": (paged, "cache_seqlens", lambda _: None),
    **{f"strided {name}": (everything, name, every_other) for name in ("cache_seqlens", "q", "k", "v", "rotary_cos",
       "cache_batch_idx", "cache_leftpad", "cu_seqlens_q", "cu_seqlens_k_new", "rotary_seqlens", "page_table")},
    **{f"{name} at an odd byte": (everything, name, at_odd_byte) for name in ("q", "k", "v", "sinks", "cache_seqlens",
       "page_table", "cache_batch_idx", "cache_leftpad", "cu_seqlens_q", "cu_seqlens_k_new", "rotary_seqlens")},
    **{f"{name} on the host": (everything, name, on_host) for name in ("cache_seqlens", "page_table", "cache_leftpad",
       "cache_batch_idx", "cu_seqlens_q", "cu_seqlens_k_new", "rotary_seqlens")},
    "nothing": (everything, "sinks", lambda x: x),
}  # fmt: skip


def plan_of(a: Arguments, on_device: Arguments, **options: Any) -> cuflash.SchedulerMetadata:
    names = ("cu_seqlens_q", "cu_seqlens_k_new", "cache_leftpad")
    settings = {
        "qkv_dtype": "float32",
        "page_size": a["k_cache"].shape[1] if "page_table" in a else None,
        "max_seqlen_k_new": 3 if "k" in a else 0,
        "causal": a.get("causal", False),
    }
    return cuflash.get_scheduler_metadata(
        BATCH, a.get("max_seqlen_q", a["q"].shape[1]), CAPACITY, HEADS, KV_HEADS, DIM, on_device["cache_seqlens"],
        **{name: on_device[name] for name in names if name in a}, **settings, **options,
    )  # fmt: skip


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("change", CHANGES)
def test_captured_call_does_not_allocate(change: str, warm: bool) -> None:
    """The capture allocates nothing that is not kept; a replay after others have used the pool is right."""
    import cupy

    make, name, convert = CHANGES[change]
    host = make()
    given = {n: cupy.asarray(x) if isinstance(x, np.ndarray) else x for n, x in host.items()}
    plan = plan_of(host, given)
    given[name] = convert(given[name])
    wanted_of = host | {name: given[name].get() if hasattr(given[name], "get") else given[name]}
    out = cupy.full(host["q"].shape, np.nan, np.float32)
    shape = out.shape[:-1][::-1] if out.ndim == 3 else (out.shape[0], out.shape[2], out.shape[1])
    lse = cupy.full(shape, np.nan, np.float32)
    stream = cupy.cuda.Stream(non_blocking=True)
    options = {"scheduler_metadata": plan, "out": out, "softmax_lse": lse, "return_softmax_lse": True}
    cupy.cuda.Device().synchronize()
    caches = {n: given[n].copy() for n in ("k_cache", "v_cache")}
    with stream:
        if warm:
            try:
                cuflash.flash_attn_with_kvcache(**given, **options)
            except (ValueError, TypeError) as error:  # refused with or without a capture
                assert name in str(error)
                return
            for n, x in caches.items():
                given[n][...] = x
        stream.synchronize()
        before = cupy.get_default_memory_pool().used_bytes()
        refused = False
        stream.begin_capture()
        try:
            with counted() as allocations:
                cuflash.flash_attn_with_kvcache(**given, **options)
        except (ValueError, TypeError, RuntimeError) as error:
            assert name in str(error), f"refused without a name: {error}"
            refused = True
        finally:
            graph = stream.end_capture()
        if refused:
            assert change != "nothing"
            return
        # What has been allocated is still held: the pool cannot give it to anybody else.
        kept = cupy.get_default_memory_pool().used_bytes() - before
        assert kept == allocations.bytes, "allocated during the capture, and given back"
        if warm:
            assert allocations.bytes == 0
        junk = [cupy.full(size, 0xFF, np.uint8) for size in (512, 1024, 4096, 1 << 16, 1 << 20) for _ in range(8)]
        del junk
        for replay in range(2):
            out[...] = np.nan
            if replay and name == "sinks" and hasattr(given[name], "get") and given[name].data.ptr % 16 == 0:
                given[name][...] = -given[name]  # a replay reads what the caller's array holds then
                wanted_of[name] = given[name].get()
            for n, x in caches.items():
                given[n][...] = x
            graph.launch()
            stream.synchronize()
            answer = reference.attention(**wanted_of)
            np.testing.assert_allclose(out.get(), answer.out, atol=2e-5)
            np.testing.assert_allclose(lse.get(), answer.lse, atol=2e-5)


@pytest.mark.parametrize("change", ["strided", "odd byte", "one int", "host", "nothing"])
def test_captured_refill_does_not_allocate(change: str) -> None:
    """What is allocated is kept; a replay plans for the lengths that the caller's array holds then."""
    import cupy

    host = contiguous()
    given = {n: cupy.asarray(x) for n, x in host.items()}
    plan = plan_of(host, given)
    given["cache_seqlens"] = {"strided": every_other, "odd byte": at_odd_byte, "one int": lambda _: 20, "host": on_host,
                              "nothing": lambda x: x}[change](given["cache_seqlens"])  # fmt: skip
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    before = cupy.get_default_memory_pool().used_bytes()
    with stream:
        stream.begin_capture()
        refused = False
        try:
            with counted() as allocations:
                plan_of(host, given, out=plan)
        except (ValueError, TypeError, RuntimeError) as error:
            assert "cache_seqlens" in str(error)
            refused = True
        finally:
            graph = stream.end_capture()
        if refused:
            assert change != "nothing"
            return
        assert cupy.get_default_memory_pool().used_bytes() - before == allocations.bytes
        if change in ("strided", "nothing"):
            given["cache_seqlens"][...] = cupy.asarray(np.array([48, 1, 33], np.int32))
        junk = [cupy.full(size, 0xFF, np.uint8) for size in (512, 1024, 4096) for _ in range(8)]
        del junk
        graph.launch()
        stream.synchronize()
    np.testing.assert_array_equal(plan.work(), plan_of(host, given).work())


@pytest.mark.parametrize("form", ["list", "stacked", "strided"])
def test_captured_merge(form: str) -> None:
    """merge_attn_states of a list, of a stack and of views: what is allocated is kept, or refused by name."""
    import cupy

    rng = np.random.default_rng(0)
    host_outs = rng.standard_normal((3, 2, 1, 4, 64), np.float32)
    host_lses = rng.standard_normal((3, 2, 4, 1), np.float32)
    outs, lses = cupy.asarray(host_outs), cupy.asarray(host_lses)
    if form == "list":
        outs, lses = [x.copy() for x in outs], [x.copy() for x in lses]
    elif form == "strided":
        outs, lses = cupy.repeat(outs, 2, axis=1)[:, ::2], cupy.repeat(lses, 2, axis=1)[:, ::2]
    wanted = cuflash.merge_attn_states(host_outs, host_lses)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        try:
            out, lse = cuflash.merge_attn_states(outs, lses)
        except (ValueError, TypeError, RuntimeError) as error:
            assert "outs" in str(error) or "lses" in str(error)
            return
        finally:
            graph = stream.end_capture()
        junk = [cupy.full(size, 0xFF, np.uint8) for size in (512, 1024, 4096, 1 << 16) for _ in range(8)]
        del junk
        graph.launch()
        stream.synchronize()
    np.testing.assert_allclose(out.get(), wanted[0], atol=1e-5)
    np.testing.assert_allclose(lse.get(), wanted[1], atol=1e-5)
