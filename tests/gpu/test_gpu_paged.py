"""Sequences that come and go, decoded by one CUDA graph per batch size on a paged cache; beside NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuflash

pytestmark = pytest.mark.gpu

LAYERS, HEADS_Q, HEADS_KV, DIM, MOST = 3, 8, 2, 64, 200


def make(xp: Any, dtype: str) -> tuple[cuflash.PagedKVCache, cuflash.DecodeStep]:
    cache = cuflash.PagedKVCache(
        LAYERS, 200, 8, HEADS_KV, DIM, dtype, max_sequences=12, max_seqlen=MOST, xp=xp, seed=1
    )  # fmt: skip
    return cache, cuflash.DecodeStep(cache, HEADS_Q)


def test_a_graph_serves_all_steps_of_its_batch_size() -> None:
    import cupy

    rng = np.random.default_rng(0)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        cache, step = make(cupy, "float16")
        plain, plain_step = make(np, "float32")  # the same values: float16 ones are float32 ones
        cache.k[...], cache.v[...] = np.nan, np.nan
        inputs, outputs, graphs = {}, {}, {}
        for size in (4, 8):
            inputs[size] = [
                cupy.zeros((LAYERS, size, heads, DIM), "float16") for heads in (HEADS_Q, HEADS_KV, HEADS_KV)
            ]
            outputs[size] = cupy.zeros((LAYERS, size, HEADS_Q, DIM), "float16")

            def layers(size: int = size) -> None:
                for layer in range(LAYERS):
                    step(layer, *(x[layer] for x in inputs[size]), out=outputs[size][layer])

            step.begin([], batch_size=size)
            layers()  # compiles
            stream.begin_capture()
            layers()
            graphs[size] = stream.end_capture()

        running: list[tuple[int, int]] = []  # handles of both
        for turn in range(60):
            if len(running) < 8 and rng.random() < 0.4:
                number = int(rng.integers(1, 60))
                pair = cache.add(number), plain.add(number)
                new = prompt(rng, number)
                step.begin(pair[0], number)
                plain_step.begin(pair[1], number)
                for layer in range(LAYERS):
                    out = step(layer, *(cupy.asarray(x) for x in new))
                    compare(out, plain_step(layer, *(x.astype("float32") for x in new)))
                step.commit()
                plain_step.commit()
                running.append(pair)
            elif len(running) > 1 and rng.random() < 0.2:
                pair = running.pop(int(rng.integers(len(running))))
                cache.free(pair[0])
                plain.free(pair[1])
            elif running and len(running) < 8 and rng.random() < 0.2:
                running.append((cache.fork(running[0][0]), plain.fork(running[0][1])))
            if not running:
                continue
            number = len(running)
            size = 4 if number <= 4 else 8
            step.begin([a for a, _ in running], batch_size=size)
            plain_step.begin([b for _, b in running])
            new = [rng.standard_normal(x.shape, np.float32).astype("float16") for x in inputs[size]]
            for mine, values in zip(inputs[size], new, strict=True):
                values[:, number:] = np.nan
                mine[...] = cupy.asarray(values)
            graphs[size].launch(stream)
            for layer in range(LAYERS):
                expected = plain_step(layer, *(x[layer, :number].astype("float32") for x in new))
                compare(outputs[size][layer, :number], expected)
            assert not outputs[size][:, number:].any(), turn
            step.commit()
            plain_step.commit()
            if turn % 5 == 0:  # rejected
                length = int(cache.seqlens(running[-1][0])) - 1
                cache.truncate(running[-1][0], length)
                plain.truncate(running[-1][1], length)
        assert cache.seqlens([a for a, _ in running]).tolist() == plain.seqlens([b for _, b in running]).tolist()


def prompt(rng: np.random.Generator, number: int) -> list[np.ndarray]:
    shapes = ((number, heads, DIM) for heads in (HEADS_Q, HEADS_KV, HEADS_KV))
    return [rng.standard_normal(shape, np.float32).astype("float16") for shape in shapes]


def compare(found: Any, expected: np.ndarray) -> None:
    import cupy

    assert np.abs(cupy.asnumpy(found).astype("float32") - expected).max() < 4e-3
