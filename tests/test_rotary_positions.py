"""Which rows of the rotary tables a call needs, and where each query is turned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from problems import Backend
from small import DIM, Arguments, call, check, check_caches, native

MASKS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "left": {"window_size": (7, -1)},
    "right": {"window_size": (-1, 2)},
    "wide": {"window_size": (10**6, 10**6)},
    "chunk": {"attention_chunk": 16},
    "causal chunk": {"causal": True, "attention_chunk": 16},
    "none": {},
}


def problem(
    lengths: tuple[int, ...], queries: tuple[int, ...], new: tuple[int, ...], table: int, **options: Any
) -> Arguments:
    """Ragged queries and new keys on rotary tables of some rows."""
    rng = np.random.default_rng(0)
    batch, capacity = len(lengths), max(lengths) + max(new) + 5

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    angles = rng.uniform(0, 6, (table, DIM // 2))
    return {
        "q": normal(sum(queries), 2, DIM),
        "k_cache": normal(batch, capacity, 1, DIM),
        "v_cache": normal(batch, capacity, 1, DIM),
        "k": normal(sum(new), 1, DIM),
        "v": normal(sum(new), 1, DIM),
        "rotary_cos": np.cos(angles).astype(np.float32),
        "rotary_sin": np.sin(angles).astype(np.float32),
        "cache_seqlens": np.array(lengths, np.int32),
        "cu_seqlens_q": np.cumsum((0, *queries)).astype(np.int32),
        "cu_seqlens_k_new": np.cumsum((0, *new)).astype(np.int32),
        "max_seqlen_q": max(queries),
    } | options


def positions(arguments: Arguments) -> int:
    """Return how many rows of the tables the definition reads."""
    base = arguments.get("rotary_seqlens", arguments["cache_seqlens"])
    moves = arguments.keys() & {"causal", "window_size", "attention_chunk"}
    queries = np.diff(arguments["cu_seqlens_q"])
    last_query = np.where(queries > 0, base + (queries if moves else 1), 0)
    new = np.diff(arguments["cu_seqlens_k_new"])
    return int(np.maximum(last_query, np.where(new > 0, base + new, 0)).max())


PROBLEMS: dict[str, dict[str, Any]] = {
    "long query at 0, short one at 99": {"lengths": (0, 99), "queries": (8, 1), "new": (8, 1), "table": 100},
    "the other way round": {"lengths": (99, 0), "queries": (1, 8), "new": (1, 8), "table": 100},
    "no queries, new keys at 100": {"lengths": (3, 100), "queries": (4, 0), "new": (4, 2), "table": 102},
    "queries at 60, no new keys": {"lengths": (60, 3), "queries": (3, 1), "new": (0, 1), "table": 63},
    "neither at 200": {"lengths": (3, 200), "queries": (2, 0), "new": (2, 0), "table": 5},
    "positions beside lengths": {"lengths": (90, 5), "queries": (2, 6), "new": (2, 6), "table": 12,
                                 "rotary_seqlens": np.array([10, 0], np.int32)},
}  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_tables_that_are_just_long_enough(name: str, mask: str, backend: Backend) -> None:
    arguments = problem(**PROBLEMS[name], **MASKS[mask])
    needed = positions(arguments)
    assert needed <= PROBLEMS[name]["table"]
    for table in ("rotary_cos", "rotary_sin"):
        arguments[table] = arguments[table][:needed]
    given = native(arguments, backend)
    out, lse = call(given, backend)
    check(arguments, backend, out, lse)
    check_caches(arguments, backend, given)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_tables_that_are_one_row_too_short(name: str, mask: str, backend: Backend) -> None:
    """Refused where lengths are at hand, and nothing is written."""
    if backend.name == "cuda":
        pytest.skip("lengths on a device are not looked at")
    arguments = problem(**PROBLEMS[name], **MASKS[mask])
    for table in ("rotary_cos", "rotary_sin"):
        arguments[table] = arguments[table][: positions(arguments) - 1]
    given = native(arguments, backend)
    with pytest.raises(ValueError, match="rotary_cos"):
        call(given, backend)
    np.testing.assert_array_equal(given["k_cache"], arguments["k_cache"])


@pytest.mark.parametrize("dense", [False, True], ids=["ragged", "dense"])
@pytest.mark.parametrize("mask", MASKS)
def test_where_queries_are_turned(mask: str, dense: bool, backend: Backend) -> None:
    """By base + i under any mask that looks at positions, an attention chunk alone included; else by base."""
    arguments = problem((20, 33), (4, 4), (4, 4), 60, **MASKS[mask])
    if dense:
        for name in ("q", "k", "v"):
            arguments[name] = arguments[name].reshape(2, 4, *arguments[name].shape[1:])
        for name in ("cu_seqlens_q", "cu_seqlens_k_new", "max_seqlen_q"):
            del arguments[name]
    out, lse = call(native(arguments, backend), backend)
    check(arguments, backend, out, lse)
