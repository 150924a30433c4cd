"""The merge by the block that arrives last, ten thousand times: the same bits whatever the timing."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash

pytestmark = pytest.mark.gpu

LAUNCHES, COPIES = 10_000, 100


@pytest.mark.parametrize(
    ("seqlens", "heads", "headdim", "options"),
    [
        ((9000,), (8, 1), 128, {}),  # one item in as many parts as there are blocks
        ((3000, 17, 1200, 5000, 1, 800), (16, 2), 64, {}),
        ((4000, 2500, 64), (8, 2), 128, {"split_size": 128}),
    ],
    ids=["one sequence", "ragged", "split_size"],
)
def test_the_same_bits(seqlens: tuple[int, ...], heads: tuple[int, int], headdim: int, options: dict[str, Any]) -> None:
    import cupy

    rng = np.random.default_rng(0)
    batch, longest = len(seqlens), max(seqlens)

    def normal(*shape: int) -> Any:
        return cupy.asarray(rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16))

    q, lengths = normal(batch, 1, heads[0], headdim), cupy.asarray(np.array(seqlens, np.int32))
    caches = [normal(batch, longest, heads[1], headdim) for _ in range(2)]
    outs = cupy.zeros((COPIES, batch, 1, heads[0], headdim), np.uint16).view(ml_dtypes.bfloat16)
    lses = cupy.zeros((COPIES, batch, heads[0], 1), np.float32)
    plan = cuflash.get_scheduler_metadata(batch, 1, longest, *heads, headdim, lengths, **options)
    work = plan.work()
    assert len(work) > batch * heads[1], "nothing is merged"

    # Traffic on another stream shifts the blocks against each other, every time in another way.
    other, noise = cupy.cuda.Stream(non_blocking=True), cupy.zeros(1 << 24, np.uint8)
    expected: tuple[np.ndarray, np.ndarray] | None = None
    for launch in range(LAUNCHES // COPIES):
        outs.view(np.uint16)[...] = 0x7FFF
        lses[...] = np.nan
        for copy in range(COPIES):
            if copy % 7 == launch % 7:
                with other:
                    noise[...] = launch % 256
            cuflash.flash_attn_with_kvcache(
                q, *caches, cache_seqlens=lengths, scheduler_metadata=plan, out=outs[copy], softmax_lse=lses[copy]
            )
        found = outs.view(np.uint16).get(), lses.view(np.uint32).get()
        expected = expected or (found[0][:1].copy(), found[1][:1].copy())
        for name, values, first in zip(("out", "lse"), found, expected, strict=True):
            wrong = (values != first).reshape(COPIES, -1).any(axis=1)
            assert not wrong.any(), f"{name} differs in launches {launch * COPIES + np.flatnonzero(wrong)}"
