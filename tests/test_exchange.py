"""The kernel that merges the results of GPUs through each other's memory, rank by rank on the simulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from problems import DTYPES

import cuflash
from cuflash.arrays import empty
from cuflash.kernels.exchange import exchange_launch, half_bytes, inbox_bytes
from cuflash.packing import Packing

pytest.importorskip("cuda.bindings", reason="pip install -e '.[sim]'")
from cuflash.simulator import record

HALF = 1 << 19


class Host:
    """Ranks that take turns: all but the last are stopped where they wait; then each runs to its end."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.size = ranks, inbox_bytes(HALF)
        self.inboxes = np.zeros((ranks, self.size), np.uint8)
        self.turn = 0

    def run(self, packing: Packing, partials: np.ndarray, shares: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        self.turn += 1
        other_half = inbox_bytes(0) + (self.turn + 1) % 2 * HALF + np.arange(HALF)
        before = self.inboxes[:, other_half]
        for rank in range(self.ranks - 1):
            for result in self._launch(packing, partials, shares, rank, stop=1):
                assert np.isnan(result.astype(np.float32)).all()
        last, *others = (self._launch(packing, partials, shares, rank, stop=0) for rank in range(-1, self.ranks - 1))
        np.testing.assert_array_equal(self.inboxes[:, other_half], before)  # somebody may still read it
        return [*others, last]

    def _launch(self, packing: Packing, partials: np.ndarray, shares: bool, rank: int, stop: int) -> Any:
        from cuflash.backends.sim import BACKEND

        rank %= self.ranks
        order = np.roll(np.arange(self.ranks), -rank)  # this rank's inbox comes first, where the others' are behind it
        memory = empty((self.ranks, self.size), np.uint8, partials)
        memory[...] = self.inboxes[order]
        addresses = np.empty(self.ranks, np.uint64)
        addresses[order] = memory.ctypes.data + self.size * np.arange(self.ranks)
        out = np.full(packing.out_shape, np.nan, packing.dtype)
        lse = np.full(packing.lse_shape, np.nan, np.float32)
        partial = empty(partials[rank].shape, np.uint8, partials)
        partial[...] = partials[rank]
        with record(seed=self.turn) as launches:  # in a random order, with all checks
            BACKEND.exchange(
                exchange_launch(packing, rank, self.ranks, shares, HALF),
                {"partial": partial, "inbox": memory, "inboxes": addresses, "stop": np.full(1, stop, np.uint32),
                 "out": out, "softmax_lse": lse},
            )  # fmt: skip
        assert not any(launch.findings for launch in launches)
        if stop:
            memory[0, : inbox_bytes(0)] = self.inboxes[rank, : inbox_bytes(0)]  # the call has not been made
        self.inboxes[order] = memory
        return out, lse


@pytest.mark.parametrize("shares", [True, False], ids=["share", "all"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_ranks_merge(dtype: str, ranks: int, shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of changing shapes, one behind the other: each gives the bits of merging all at once."""
    monkeypatch.setenv("CUFLASH_BACKEND", "sim")
    rng = np.random.default_rng(0)
    host = Host(ranks)
    for rows, heads, dim in [((2, 3), 2, 40), ((5,), 3, 64), ((1, 1), 1, 264), ((600, 1), 2, 8), ((2, 3), 2, 40)]:
        packing = Packing(rows, heads, dim, DTYPES[dtype])
        whole = Packing(rows, heads * (ranks if shares else 1), dim, DTYPES[dtype])
        outs = rng.standard_normal((ranks, *whole.out_shape), np.float32).astype(whole.dtype)
        lses = rng.standard_normal((ranks, *whole.lse_shape), np.float32)
        lses[-1, ..., 0] = -np.inf
        lses[:, ..., -1, -1] = np.nan  # of all ranks
        assert half_bytes(packing, ranks) <= HALF
        partials = np.full((ranks, ranks if shares else 1, packing.nbytes), 255, np.uint8)
        for rank in range(ranks):
            packing.fill(partials[rank], outs[rank], lses[rank])
        out, lse = cuflash.merge_attn_states(outs, lses)
        for rank, found in enumerate(host.run(packing, partials, shares)):
            share = slice(rank * heads, (rank + 1) * heads) if shares else slice(None)
            np.testing.assert_array_equal(found[0].astype(np.float32), out[..., share, :].astype(np.float32))
            np.testing.assert_array_equal(found[1], lse[..., share, :])
