"""What trees, lists of pages and negative numbers cost, counted: nothing in the main loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash.simulator import Checks, record

PAGE, DIM = 16, 64
HEADS, KV_HEADS = 8, 1


@pytest.fixture(autouse=True)
def one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """One multiprocessor, and no cluster."""
    monkeypatch.setenv("CUFLASH_BACKEND", "sim")
    monkeypatch.setenv("CUFLASH_NUM_SM", "1")


def _counters(seqlen: int, queries: int, **options: Any) -> Any:
    rng = np.random.default_rng(0)
    pages = seqlen // PAGE
    q, k_cache, v_cache = (
        rng.standard_normal(shape, np.float32).astype(np.float16)
        for shape in ((1, queries, HEADS, DIM), *[(pages, PAGE, KV_HEADS, DIM)] * 2)
    )
    table = rng.permutation(pages).astype(np.int32)
    page_table = (np.array([0, pages], np.int32), table) if options.pop("csr", False) else table[None]
    with record(Checks.cheap()) as launches:
        cuflash.flash_attn_with_kvcache(
            q, k_cache, v_cache, page_table=page_table, cache_seqlens=np.array([seqlen], np.int32), num_splits=1,
            **options,
        )  # fmt: skip
    return launches[-1].counters


def _instructions_of_a_tile(queries: int, **options: Any) -> int:
    """Of keys that are added before those that a mask may hide."""
    long, short = (_counters(seqlen, queries, **options).instructions for seqlen in (2048, 1024))
    return int(long - short)


def test_a_tree_costs_nothing_in_tiles_before_it() -> None:
    tree = np.tril(np.random.default_rng(1).random((1, 2, 2)) < 0.5) | np.eye(2, dtype=bool)
    plain = _instructions_of_a_tile(2, causal=True)
    assert _instructions_of_a_tile(2, tree_mask=tree) == plain
    assert _instructions_of_a_tile(2) == plain  # the end of a sequence is a mask, too


def test_lists_of_pages_read_the_same_bytes() -> None:
    dense, listed = _counters(1024, 1), _counters(1024, 1, csr=True)
    for name in ("k_cache", "v_cache"):
        x, y = dense.arrays[name], listed.arrays[name]
        assert (x.read_bytes, x.read_sectors) == (y.read_bytes, y.read_sectors)
    assert _instructions_of_a_tile(1) == _instructions_of_a_tile(1, csr=True)
