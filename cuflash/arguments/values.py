"""Checks of what index arrays hold: on the host always, on a GPU under ``CUFLASH_VALIDATE``, since they copy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import import_array, to_host
from ..memory import NativeArray
from ..operands import Lengths, Operands
from ..problem import Problem

Ints = NDArray[np.int64]
_INT32_MAX = 2**31 - 1


def check_lengths(problem: Problem, lengths: Lengths) -> None:
    """Check lengths by themselves.

    Raises:
        ValueError: Naming the argument, the rule and the first value that breaks it.
    """
    seqlens = to_host(lengths.cache_seqlens)
    _refuse("cache_seqlens", "be at least 0", seqlens, seqlens < 0)
    if lengths.cache_leftpad is not None:
        leftpad = to_host(lengths.cache_leftpad)
        _refuse("cache_leftpad", "be at least 0", leftpad, leftpad < 0)
        _refuse("cache_leftpad", "be at most cache_seqlens", leftpad, leftpad > seqlens)
    for name, array in (("cu_seqlens_q", lengths.cu_seqlens_q), ("cu_seqlens_k_new", lengths.cu_seqlens_k_new)):
        if array is not None:
            starts = to_host(array)
            steps = np.diff(starts.astype(np.int64))
            if name == "cu_seqlens_k_new":
                _refuse(name, "begin with 0", starts[:1], starts[:1] != 0)
            _refuse(name, "never decrease", starts, steps < 0)
            if name == "cu_seqlens_q":
                _refuse(name, "begin with 0 or more", starts[:1], starts[:1] < 0)
                most = problem.max_seqlen_q
                _refuse(name, f"grow by at most max_seqlen_q={most}", starts, steps > most)


def check_packed(starts: NativeArray, total: int, used: NativeArray | None = None) -> None:
    """Check where packed keys begin, and how many of each sequence are used.

    Raises:
        ValueError: Naming the argument, the rule and the first value that breaks it.
    """
    values = to_host(starts).astype(np.int64)
    _refuse("cu_seqlens_k", "begin with 0", values[:1], values[:1] != 0)
    _refuse("cu_seqlens_k", "never decrease", values, np.diff(values) < 0)
    _refuse("cu_seqlens_k", f"end by k's {total} rows", values, values > total)
    if used is not None:
        numbers = to_host(used).astype(np.int64)
        _refuse("seqused_k", "be at least 0", numbers, numbers < 0)
        _refuse("seqused_k", "be at most its sequence's keys", numbers, numbers > np.diff(values))


def check_call(problem: Problem, operands: Operands, page_table: Any) -> None:
    """Check lengths against the arrays of a call, and the pages that it follows.

    Args:
        problem: The problem.
        operands: The data of the call.
        page_table: As it was given.

    Raises:
        ValueError: Naming the argument, the rule and the first value that breaks it.
    """
    lengths, cache = operands.lengths, operands.cache
    seqlens = to_host(lengths.cache_seqlens).astype(np.int64)
    queries, new = np.full(problem.batch_size, problem.max_seqlen_q), np.full(problem.batch_size, lengths.seqlen_k_new)
    rows_of_keys = cache.k.shape[1] if operands.k is None else operands.k.shape[0]
    for name, array, rows in (
        ("cu_seqlens_q", lengths.cu_seqlens_q, operands.q.shape[0]),
        ("cu_seqlens_k_new", lengths.cu_seqlens_k_new, rows_of_keys),
    ):
        if array is not None:
            starts = to_host(array).astype(np.int64)
            if starts[-1] > rows:
                tokens = "q" if name == "cu_seqlens_q" else "k"
                raise ValueError(f"{name} must end by {tokens}'s {rows} rows, got {starts[-1]}")
            if name == "cu_seqlens_q":
                queries = np.diff(starts)
            else:
                new = np.diff(starts)
    total = seqlens + new
    _refuse("cache_seqlens", "be less than 2**31 with the new keys", total, total > _INT32_MAX)
    row = np.arange(problem.batch_size)
    if cache.batch_idx is not None:
        row = to_host(cache.batch_idx)
        _refuse("cache_batch_idx", f"be in [0, {cache.num_rows})", row, (row < 0) | (row >= cache.num_rows))
    held = problem.mask.shard.held(total)
    capacity = np.full(problem.batch_size, cache.capacity)
    if cache.is_packed:
        capacity = np.diff(to_host(cache.page_indptr).astype(np.int64))
    elif cache.page_indptr is not None:
        indptr = to_host(cache.page_indptr).astype(np.int64)
        _refuse("page_table[0]", "begin with 0 or more", indptr[:1], indptr[:1] < 0)
        _refuse("page_table[0]", "never decrease", indptr, np.diff(indptr) < 0)
        indices = int(cache.page_indices.shape[0])  # type: ignore[union-attr]
        _refuse("page_table[0]", f"end by the {indices} page numbers", indptr, indptr > indices)
        capacity = np.diff(indptr)[row] * cache.page_size
    if (held > capacity).any():
        worst = int((held - capacity).argmax())
        more = f" + {new[worst]} new keys" if new[worst] else ""
        pages = "" if cache.is_paged or cache.is_packed else "; if these are pages, page_table is missing"
        raise ValueError(
            f"cache_seqlens must fit the capacity {capacity[worst]}, got {seqlens[worst]}{more} at [{worst}]{pages}"
        )
    if cache.is_paged:
        _check_pages(operands, row, held, page_table)
    if operands.rotary is not None:
        _check_rotary(operands, seqlens, queries, new)


def _check_rotary(operands: Operands, seqlens: Ints, queries: Ints, new: Ints) -> None:
    """Check that there is a row of the tables for every position of a query and a new key."""
    rotary: Any = operands.rotary
    base = seqlens if rotary.seqlens is None else to_host(rotary.seqlens).astype(np.int64)
    _refuse("rotary_seqlens", "be at least 0", base, base < 0)
    tokens = np.maximum(new, queries if rotary.moves else np.minimum(queries, 1))
    positions = rotary.cos.shape[0]
    missing = (tokens > 0) & (base + tokens > positions)
    if missing.any():
        bad = int(missing.argmax())
        raise ValueError(
            f"rotary_cos must have a row for every position, got {positions} rows for positions {base[bad]} to "
            f"{base[bad] + tokens[bad] - 1} at [{bad}]"
        )


def _check_pages(operands: Operands, row: NDArray[Any], held: Ints, given: Any) -> None:
    """Check the page numbers that the call follows: those of the pages from the leftpad to the last key.

    A negative number is legal: nothing is there.
    """
    cache, page_size, pages = operands.cache, operands.cache.page_size, operands.cache.k.shape[0]
    leftpad = operands.lengths.cache_leftpad
    first = np.zeros_like(held) if leftpad is None else to_host(leftpad).astype(np.int64) // page_size
    count = np.maximum(-(-held // page_size) - first, 0)  # pages that each sequence follows
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    rows = np.repeat(row, count)
    place: tuple[Ints, ...] = (rows, within)
    if cache.page_indptr is not None:
        place = (to_host(cache.page_indptr).astype(np.int64)[rows] + within,)
    wrong = to_host(cache.page_indices if cache.page_table is None else cache.page_table)[place] >= pages
    if wrong.any():
        bad = int(wrong.argmax())
        # What was given: in the cache's own table stands the nearest number that int32 has.
        numbers = import_array("page_table", given[1] if isinstance(given, tuple) else given)
        raise ValueError(
            f"page_table must hold page numbers below {pages} where keys are, or negative ones where nothing is, got "
            f"{numbers[tuple(int(index[bad]) for index in place)]} in row {rows[bad]} for page {within[bad]}"
        )


def _refuse(name: str, rule: str, values: NDArray[Any], wrong: NDArray[np.bool_]) -> None:
    """Raise ValueError if any entry is wrong, or any step to the next one, showing the first."""
    if wrong.any():
        index = int(wrong.argmax())
        step = f", {values[index + 1]}" if len(wrong) < len(values) else ""
        raise ValueError(f"{name} must {rule}, got {values[index]}{step} at [{index}]")
