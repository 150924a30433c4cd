"""Decode steps to measure with: the lengths of the sequences in a batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuflash.bench.inputs import read_trace

Lengths = NDArray[np.int64]

_LONGEST = 131_072


def ragged(trace: str | None = None) -> Iterator[tuple[str, Lengths]]:
    """Yield named batches of sequence lengths, the same ones every time.

    Args:
        trace: A text file of request lengths in the order of their arrival, the last number of each line; its batches
            come first.
    """
    if trace is not None:
        yield from _of_trace(trace)
    rng = np.random.default_rng(20)

    def whole(lengths: NDArray[Any]) -> Lengths:
        return np.clip(lengths, 1, _LONGEST).astype(np.int64)

    for batch in (4, 8, 16, 32, 64, 128, 256):
        yield f"uniform 1..8192, batch {batch}", rng.integers(1, 8193, batch)
        yield f"lognormal, median 1200, batch {batch}", whole(rng.lognormal(np.log(1200), 1.0, batch))
        yield f"lognormal wide, median 4000, batch {batch}", whole(rng.lognormal(np.log(4000), 1.5, batch))
        yield f"zipf, batch {batch}", whole(256.0 * rng.zipf(1.5, batch))
        either = rng.choice([500, 16000], batch)
        yield f"bimodal 500 and 16000, batch {batch}", whole(either * rng.uniform(0.8, 1.2, batch))
        one_long = rng.integers(200, 800, batch)
        one_long[batch // 2] = 65536
        yield f"one of 65536, others 200..800, batch {batch}", one_long
        yield f"exponential, mean 3000, batch {batch}", whole(rng.exponential(3000, batch))
        yield f"nearly equal, 4096 +- 5 %, batch {batch}", whole(4096 * rng.uniform(0.95, 1.05, batch))
    for step in (1, 4, 16, 64):  # sequences that joined one after another, and each has grown since
        yield f"growing batch of {step * 4}", whole(2000.0 + 37 * np.arange(step * 4))
    for batch in (1, 3, 17, 100):
        yield f"equal, 4000, batch {batch}", np.full(batch, 4000)


def _of_trace(path: str, batch: int = 64, batches: int = 16) -> Iterator[tuple[str, Lengths]]:
    lengths = read_trace(path)
    for begin in range(0, min(len(lengths), batch * batches), batch):
        yield f"trace {Path(path).stem}, requests {begin} ..", lengths[begin : begin + batch]
