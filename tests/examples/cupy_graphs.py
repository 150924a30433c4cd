"""A decode loop on a GPU whose steps are CUDA graphs, one per batch size; without a GPU the steps run as they are.

``DecodeStep`` keeps index arrays and plans in place, so that a graph captured once is right for all later steps of its
shape. Batches are padded to a few sizes. Between ``begin``, which moves lengths, pages and the plan, and ``commit``
there is nothing but a replay.

    python tests/examples/cupy_graphs.py
"""

from __future__ import annotations

from typing import Any

import numpy as np

import cuflash

try:
    import cupy

    HAS_GPU = bool(cupy.cuda.is_available())
except ImportError:
    HAS_GPU = False
xp: Any = cupy if HAS_GPU else np

LAYERS, HEADS, KV_HEADS, DIM, DTYPE = 3, 8, 2, 64, "float16"
SIZES = (1, 2, 4)  # of batches, for which there are graphs


class Decoder:
    """All layers of a step, with memory of their own per batch size."""

    def __init__(self, cache: cuflash.PagedKVCache, step: cuflash.DecodeStep) -> None:
        self.cache, self.step = cache, step
        self.q = {size: xp.ones((size, HEADS, DIM), DTYPE) for size in SIZES}
        self.kv = {size: xp.ones((size, KV_HEADS, DIM), DTYPE) for size in SIZES}
        self.out = {size: xp.empty((LAYERS, size, HEADS, DIM), DTYPE) for size in SIZES}
        self.graphs: dict[int, Any] = {}

    def layers(self, size: int) -> None:
        """Attend in every layer; a model would compute q, k and v in between."""
        for layer in range(LAYERS):
            kv = self.kv[size]
            self.step(layer, self.q[size], kv, kv, out=self.out[size][layer])

    def __call__(self, sequences: list[int]) -> Any:
        """Run a step of one token for each sequence; return the last layer's output."""
        size = next(size for size in SIZES if size >= len(sequences))
        self.step.begin(sequences, 1, batch_size=size)
        if size not in self.graphs:
            self.layers(size)  # compiles what the graph needs; the same token is written once more below
            if HAS_GPU:
                stream = cupy.cuda.get_current_stream()
                stream.begin_capture()
                self.layers(size)
                self.graphs[size] = stream.end_capture()
        if HAS_GPU:
            self.graphs[size].launch()
        elif size in self.graphs:
            self.layers(size)
        self.graphs.setdefault(size, None)
        self.step.commit()
        return self.out[size][-1, : len(sequences)]


def main() -> None:
    """Decode for sequences that end at different times."""
    cache = cuflash.PagedKVCache(LAYERS, 64, 16, KV_HEADS, DIM, DTYPE, max_seqlen=200, xp=xp)
    step = cuflash.DecodeStep(cache, HEADS)
    decoder = Decoder(cache, step)
    left = {}
    for prompt, answer in ((100, 9), (30, 4), (5, 6)):
        sequence = cache.add(prompt + answer)
        step.begin(sequence, prompt)
        kv, q = xp.ones((prompt, KV_HEADS, DIM), DTYPE), xp.ones((prompt, HEADS, DIM), DTYPE)
        for layer in range(LAYERS):
            step(layer, q, kv, kv)
        step.commit()
        left[sequence] = answer
    stream = cupy.cuda.Stream(non_blocking=True) if HAS_GPU else None
    if stream is not None:
        cupy.cuda.get_current_stream().synchronize()
        stream.use()
    steps = 0
    while left:
        out = decoder(list(left))
        assert bool((abs(out - 1) < 1e-3).all())  # the values are ones, and so is any mean of them
        steps += 1
        left = {sequence: number - 1 for sequence, number in left.items()}
        cache.free([sequence for sequence, number in left.items() if not number])
        left = {sequence: number for sequence, number in left.items() if number}
    if stream is not None:
        stream.synchronize()
        cupy.cuda.Stream.null.use()
    how = f"{len(decoder.graphs)} graphs" if HAS_GPU else "no GPU, so no graphs"
    print(f"{steps} steps of {LAYERS} layers, {how}")


if __name__ == "__main__":
    main()
