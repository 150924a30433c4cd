"""CUDA graphs: a decode step of 30 layers is captured once and replayed while the lengths grow."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import cuflash

pytestmark = pytest.mark.gpu

LAYERS, STEPS, BATCH, HEADS_Q, HEADS_KV, DIM, PAGE, CAPACITY = 30, 50, 4, 8, 2, 64, 16, 512
PLAN = {"qkv_dtype": "float16", "page_size": PAGE, "max_seqlen_k_new": 1, "causal": True}


class Model:
    """Caches, inputs and outputs of all layers; the output of a layer is the query of the next one."""

    def __init__(self) -> None:
        import cupy

        rng = np.random.default_rng(0)
        pages = CAPACITY // PAGE

        def normal(*shape: int) -> Any:
            return cupy.asarray(rng.standard_normal(shape, np.float32).astype(np.float16))

        self.seqlens = cupy.asarray(np.array([3, 400, 17, 200], np.int32))
        self.page_table = cupy.asarray(rng.permutation(BATCH * pages).astype(np.int32).reshape(BATCH, pages))
        self.caches = [(normal(BATCH * pages, PAGE, HEADS_KV, DIM), normal(BATCH * pages, PAGE, HEADS_KV, DIM))
                       for _ in range(LAYERS)]  # fmt: skip
        self.q, self.k, self.v = normal(BATCH, 1, HEADS_Q, DIM), normal(*self._new), normal(*self._new)
        self.outs = [normal(BATCH, 1, HEADS_Q, DIM) for _ in range(LAYERS)]
        angles = rng.uniform(0, 2 * np.pi, (CAPACITY, DIM // 2))
        self.cos, self.sin = (cupy.asarray(f(angles).astype(np.float16)) for f in (np.cos, np.sin))

    _new = (LAYERS, BATCH, 1, HEADS_KV, DIM)

    def plan(self, out: cuflash.SchedulerMetadata | None = None) -> cuflash.SchedulerMetadata:
        return cuflash.get_scheduler_metadata(
            BATCH, 1, CAPACITY, HEADS_Q, HEADS_KV, DIM, self.seqlens, **PLAN, out=out
        )  # fmt: skip

    def layers(self, plan: cuflash.SchedulerMetadata) -> None:
        q = self.q
        for (k_cache, v_cache), k, v, out in zip(self.caches, self.k, self.v, self.outs, strict=True):
            q = cuflash.flash_attn_with_kvcache(
                q, k_cache, v_cache, k, v, rotary_cos=self.cos, rotary_sin=self.sin, cache_seqlens=self.seqlens,
                page_table=self.page_table, causal=True, scheduler_metadata=plan, out=out,
            )  # fmt: skip

    def feed(self, step: int) -> None:
        """Write the inputs of a step where the graph reads them."""
        import cupy

        rng = np.random.default_rng(step + 1)
        for array in (self.q, self.k, self.v):
            array[...] = cupy.asarray(rng.standard_normal(array.shape, np.float32).astype(np.float16))

    def result(self) -> np.ndarray:
        return np.stack([out.get() for out in self.outs])


def run(model: Model, step: Any) -> Iterator[np.ndarray]:
    """Yield the outputs of all layers in every step."""
    import cupy

    for number in range(STEPS):
        model.feed(number)
        # Whatever CuPy's pool has free is overwritten: nothing that a graph uses may lie there.
        junk = [cupy.full(size, 0xFF, np.uint8) for size in (1 << 10, 1 << 14, 1 << 16, 1 << 20)]
        del junk
        step()
        yield model.result()
        model.seqlens += 1


@pytest.fixture(scope="module")
def eager() -> list[np.ndarray]:
    model = Model()
    plan = model.plan()

    def step() -> None:
        model.plan(out=plan)
        model.layers(plan)

    return list(run(model, step))


@contextlib.contextmanager
def captured(stream: Any) -> Iterator[list[Any]]:
    graph: list[Any] = []
    stream.begin_capture()
    try:
        yield graph
    finally:
        graph.append(stream.end_capture())


@pytest.mark.parametrize("refill", ["inside", "outside", "never"])
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_replays_equal_eager_steps(refill: str, warm: bool, eager: list[np.ndarray]) -> None:
    """A plan that is refilled gives the same bits; a stale one is as right."""
    import cupy

    model, stream = Model(), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        plan = model.plan()
        if warm:
            caches = [(k.copy(), v.copy()) for k, v in model.caches]
            model.layers(plan)
            model.caches = caches
        stream.synchronize()
        with captured(stream) as graph:
            if refill == "inside":
                model.plan(out=plan)
            model.layers(plan)

        def step() -> None:
            if refill == "outside":
                model.plan(out=plan)
            graph[0].launch()

        for number, (found, wanted) in enumerate(zip(run(model, step), eager, strict=True)):
            if refill == "never":
                np.testing.assert_allclose(found.astype(np.float32), wanted.astype(np.float32), atol=2e-2, rtol=2e-2)
            else:
                np.testing.assert_array_equal(found, wanted, err_msg=f"step {number}")


def test_replay_on_another_stream(eager: list[np.ndarray]) -> None:
    import cupy

    model, stream, other = Model(), cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        plan = model.plan()
        stream.synchronize()
        with captured(stream) as graph:
            model.plan(out=plan)
            model.layers(plan)
    with other:
        for found, wanted in zip(run(model, graph[0].launch), eager[:5], strict=False):
            np.testing.assert_array_equal(found, wanted)


def test_calls_do_not_allocate() -> None:
    """With ``out`` and a plan, nothing is allocated from the second call on."""
    import cupy

    model = Model()
    plan = model.plan()

    def step() -> None:
        model.plan(out=plan)
        model.layers(plan)

    def refuse(size: int) -> Any:
        raise AssertionError(f"{size} bytes were allocated")

    model.k, model.v = list(model.k), list(model.v)  # views are not allocated, but made anew by every iteration
    step()
    with cupy.cuda.using_allocator(refuse):
        step()
    cupy.cuda.Device().synchronize()


def test_streams_do_not_share_workspaces() -> None:
    """Two streams at the same time, each with its own problem of many parts."""
    import cupy

    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return cupy.asarray(rng.standard_normal(shape, np.float32).astype(np.float16))

    lengths = cupy.asarray(np.array([20000], np.int32))
    plan = cuflash.get_scheduler_metadata(1, 1, 20000, 8, 1, 128, lengths, qkv_dtype="float16")
    problems = [(normal(1, 1, 8, 128), normal(1, 20000, 1, 128), normal(1, 20000, 1, 128)) for _ in range(2)]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in problems]
    outs = [[cupy.zeros((1, 1, 8, 128), np.float16) for _ in range(200)] for _ in problems]
    options = {"cache_seqlens": lengths, "scheduler_metadata": plan}
    wanted = [cuflash.flash_attn_with_kvcache(*problem, **options).get() for problem in problems]
    cupy.cuda.Device().synchronize()
    for number in range(200):
        for problem, stream, out in zip(problems, streams, outs, strict=True):
            with stream:
                cuflash.flash_attn_with_kvcache(*problem, **options, out=out[number])
    cupy.cuda.Device().synchronize()
    for first, out in zip(wanted, outs, strict=True):
        for found in out:
            np.testing.assert_array_equal(found.get(), first)


def test_threads_that_follow_one_another_do_not_share_workspaces() -> None:
    """On the stream that every thread has of its own: an ended thread's may still be busy."""
    import cupy

    from cuflash.backends.cuda import BACKEND

    def look() -> None:
        with cupy.cuda.Stream.ptds, BACKEND.machine(0) as machine:
            keys.append(machine.key)

    keys: list[Any] = []
    for _ in range(8):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert len(set(keys)) == 8
