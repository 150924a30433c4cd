"""The NumPy backend: plan, attend and merge on host arrays.

Attention runs on BLAS in float32. For each sequence the scores of all rows and visible keys are computed first, then
their softmax, then the sum of values, block of keys by block of keys, all KV heads of a block together: memory is then
read in the order in which it lies, and a block is small enough for the L2 cache, to which pages are gathered and 16-bit
elements converted. Within a block every product is a small one (``_GEMM_KEYS`` keys of one head): BLAS keeps those on
one thread, which is faster here than its own threads, since other threads work on other sequences or heads.

What is computed for a sequence does not depend on the rest of the batch or on the number of threads, bit by bit. The
cuts of a plan are of no use here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..device import Device, host_device
from ..planner import plan, sequence_lengths
from ..problem import Problem

if TYPE_CHECKING:
    from ..attention import Operands
    from ..scheduling import SchedulerMetadata

__all__ = ["attend", "device", "merge", "plan"]

Array = NDArray[Any]
Floats = NDArray[np.float32]

_GEMM_KEYS = 32  # keys of one product
_BLOCK_ELEMENTS = 2**18  # of a block of keys: 1 MiB of float32
_ROWS = 32  # packed query rows that are computed together
_SCORES = 2**22  # scores that a thread holds at a time: 16 MiB
_THREAD_ELEMENTS = 2**22  # cache elements below which threads do not pay
_LARGEST, _TINY = np.finfo(np.float32).max, np.finfo(np.float32).tiny

USES_PLAN = False


def device(like: Array) -> Device:
    """The GPU that plans on host arrays are made for."""
    return host_device()


def prepare(variants: tuple[Any, ...], array: Array) -> int:
    """Compile nothing: this backend has no kernels."""
    return 0


def attend(problem: Problem, operands: Operands, metadata: SchedulerMetadata | None) -> None:
    """Append the new keys, if any, and attend: write ``operands.out`` and ``operands.softmax_lse``."""
    if problem.appends:
        _append(problem, operands)
    if operands.lengths.cu_seqlens_q is not None:
        _clear_rows_of_none(operands, operands.lengths.cu_seqlens_q)
    leftpad, seqlen_k, seqlen_q = (row.tolist() for row in sequence_lengths(problem, operands.lengths))
    rows = [b for b in range(problem.batch_size) if seqlen_q[b]]
    rows.sort(key=lambda b: -seqlen_k[b])  # long ones first, so that threads end together
    keys = sum(seqlen_k[b] for b in rows)
    heads = problem.num_heads_kv
    workers = 1 if keys * heads * (problem.headdim + problem.headdim_v) < _THREAD_ELEMENTS else _num_threads()
    # Where sequences are few, their KV heads are shared out too: two tasks per thread.
    parts = -(-2 * workers // max(1, len(rows))) if workers > 1 else 1
    step = -(-heads // parts)
    tasks = [
        partial(_attend, problem, operands, b, leftpad[b], seqlen_k[b], seqlen_q[b], h, min(h + step, heads))
        for b in rows
        for h in range(0, heads, step)
    ]
    _run(tasks, workers)


def merge(outs: Sequence[Array], lses: Sequence[Array], out: Array, lse: Array) -> None:
    """Merge partial results over disjoint keys; a part with LSE -inf counts for nothing, whatever its ``out`` is."""
    parts = np.stack([np.asarray(part, np.float32) for part in lses])
    with np.errstate(divide="ignore", over="ignore"):
        top = parts.max(0)
        finite_top = np.where(np.isneginf(top), np.float32(0), top)
        weights = np.exp(parts - finite_top)
        total = weights.sum(0)
        lse[...] = finite_top + np.log(total)
    weights /= np.where(total == 0, np.float32(1), total)
    merged = np.zeros(out.shape, np.float32)
    for part, weight in zip(outs, np.swapaxes(weights, -1, -2)[..., None]):  # (b, h, sq) -> (b, sq, h, 1)
        merged += np.where(weight == 0, np.float32(0), weight * _to_float32(part))
    out[...] = merged


def _clear_rows_of_none(operands: Operands, cu_seqlens_q: Array) -> None:
    """Write 0 and LSE -inf to the rows of ragged queries that belong to no sequence."""
    all_lse: Any = operands.softmax_lse
    for rows in (slice(0, cu_seqlens_q[0]), slice(cu_seqlens_q[-1], None)):
        operands.out[rows] = 0
        all_lse[:, rows] = -np.inf


# ------------------------------------------------------------------------------------------------ one sequence
def _attend(
    problem: Problem, operands: Operands, b: int, leftpad: int, seqlen_k: int, seqlen_q: int, head: int, end_head: int
) -> None:
    """Attend for all rows of sequence ``b`` and the KV heads [head, end_head)."""
    group, heads, rows = problem.group, end_head - head, seqlen_q * problem.group
    q_heads = slice(head * group, end_head * group)
    all_lse: Any = operands.softmax_lse  # on the host there always is one
    if operands.lengths.cu_seqlens_q is None:
        q, out, lse = operands.q[b], operands.out[b], all_lse[b]
    else:
        first = int(operands.lengths.cu_seqlens_q[b])
        queries = slice(first, first + seqlen_q)
        q, out, lse = operands.q[queries], operands.out[queries], all_lse[:, queries]

    # (queries, heads of q, d) -> (KV heads, rows, d); packed rows: query position major, head of the group minor.
    packed = _queries(problem, operands, q[:, q_heads], b)
    packed = packed.reshape(seqlen_q, heads, group, -1).swapaxes(0, 1).reshape(heads, rows, -1)
    packed_out = np.empty((heads, rows, problem.headdim_v), np.float32)
    packed_lse = np.empty((heads, rows), np.float32)
    sinks = None
    if operands.sinks is not None:
        sinks = np.tile(operands.sinks[q_heads].reshape(heads, group), seqlen_q)  # (KV heads, rows)

    offset = seqlen_k - seqlen_q  # of a query's position
    for r in range(0, rows, _ROWS):
        end_r = min(r + _ROWS, rows)
        begin, first_end = _visible(problem, offset + r // group, seqlen_k)
        last_begin, end = _visible(problem, offset + (end_r - 1) // group, seqlen_k)
        end = max(begin, end)
        hidden = None
        if last_begin > begin or first_end < end:
            hidden = _hidden(problem, offset + np.arange(r, end_r) // group, np.arange(begin, end))
        step = max(1, _SCORES // ((end_r - r) * max(1, end - begin)))
        for h in range(0, heads, step):
            part = slice(h, min(h + step, heads)), slice(r, end_r)
            keys = _Keys(problem, operands, b, leftpad + begin, leftpad + end, head + h, head + part[0].stop)
            packed_out[part], packed_lse[part] = _attend_rows(
                problem, operands, packed[part], keys, hidden, None if sinks is None else sinks[part]
            )

    packed_out = packed_out.reshape(heads, seqlen_q, group, -1).swapaxes(0, 1)
    out[:, q_heads] = packed_out.reshape(seqlen_q, heads * group, -1)
    lse[q_heads] = packed_lse.reshape(heads, seqlen_q, group).swapaxes(1, 2).reshape(heads * group, seqlen_q)


def _visible(problem: Problem, position: int, seqlen_k: int) -> tuple[int, int]:
    """Return the keys [begin, end) that a row at ``position`` sees, counted from the leftpad.

    Both grow with the position, and what rows one after another see has no gaps: together they see all keys from the
    first row's begin to the last row's end.
    """
    begin, end = 0, seqlen_k
    left, right = problem.window
    chunk = problem.attention_chunk
    if left >= 0:
        begin = max(begin, position - left)
    if right >= 0:
        end = min(end, position + right + 1)
    if chunk > 0:
        first = position // chunk * chunk
        begin, end = max(begin, first), min(end, first + chunk)
    return begin, end


def _hidden(problem: Problem, position: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return (rows, keys): what rows at ``position`` do not see of ``keys``."""
    left, right = problem.window
    chunk = problem.attention_chunk
    position = position[:, None]
    hidden = np.zeros((len(position), len(keys)), np.bool_)
    if left >= 0:
        hidden |= keys < position - left
    if right >= 0:
        hidden |= keys > position + right
    if chunk > 0:
        hidden |= keys // chunk != position // chunk
    return hidden


def _queries(problem: Problem, operands: Operands, q: Array, b: int) -> Floats:
    """Return the queries of a sequence (n, heads, d) in float32: rotated, times softmax_scale if that is small."""
    x = _to_float32(q)
    if operands.rotary_cos is not None:
        base = _rotary_base(operands, b)
        positions = base + np.arange(len(q)) if operands.rotary_moves else np.full(len(q), base)
        # Rounded like the keys that it meets.
        x = _to_float32(_rotate(operands, x, positions).astype(q.dtype))
    return x if _scales_scores(operands) else x * np.float32(operands.softmax_scale)


def _scales_scores(operands: Operands) -> bool:
    """Whether softmax_scale waits for the scores: a large one could make infinite queries of finite scores."""
    return abs(operands.softmax_scale) > 1


def _attend_rows(
    problem: Problem,
    operands: Operands,
    q: Floats,
    keys: _Keys,
    hidden: NDArray[np.bool_] | None,
    sinks: Floats | None,
) -> tuple[Floats, Floats]:
    """Attend for packed rows of some KV heads.

    Args:
        problem: The problem.
        operands: What the call works on.
        q: (KV heads, rows, d), scaled.
        keys: The keys that at least one row sees.
        hidden: (rows, keys) what a row does not see of them, or None.
        sinks: (KV heads, rows) or None.

    Returns:
        (KV heads, rows, dv) and the LSE (KV heads, rows).
    """
    heads, rows, _ = q.shape
    scores = np.empty((heads, rows, len(keys)), np.float32)
    for begin, block in keys.blocks(operands.k_cache):
        _scores(q, block, scores[..., begin : begin + len(block)])
    if _scales_scores(operands):
        scores *= np.float32(operands.softmax_scale)
    if operands.softcap:
        cap = np.float32(min(operands.softcap, float(_LARGEST)))
        # Not the queries over the cap: products of numbers as small as that would lose their bits.
        scores /= cap
        np.tanh(scores, out=scores)
        scores *= cap
    if hidden is not None:
        np.copyto(scores, -np.inf, where=hidden)
    top = scores.max(-1, initial=-_LARGEST)  # never -inf: where a row sees nothing, exp(-inf - top) is 0 and not NaN
    if sinks is not None:
        np.maximum(top, sinks, out=top)
    scores -= top[..., None]
    np.exp(scores, out=scores)
    total = scores.sum(-1)
    if sinks is not None:
        total += np.exp(sinks - top)
    lse = top + np.log(total)
    out = np.zeros((heads, rows, problem.headdim_v), np.float32)
    for begin, block in keys.blocks(operands.v_cache):
        out += _weighted_sum(scores[..., begin : begin + len(block)], block)
    out /= np.maximum(total, _TINY)[..., None]
    return out, lse


def _scores(q: Floats, keys: Floats, out: Floats) -> None:
    """Write q (heads, rows, d) @ keys (n, heads, d)^T to ``out`` (heads, rows, n)."""
    heads, rows, _ = q.shape
    whole = len(keys) - len(keys) % _GEMM_KEYS
    if whole:
        columns = keys[:whole].reshape(-1, _GEMM_KEYS, *keys.shape[1:]).transpose(0, 2, 3, 1)
        np.matmul(q, columns, out=out[..., :whole].reshape(heads, rows, -1, _GEMM_KEYS).transpose(2, 0, 1, 3))
    if whole < len(keys):
        np.matmul(q, keys[whole:].transpose(1, 2, 0), out=out[..., whole:])


def _weighted_sum(weights: Floats, values: Floats) -> Floats:
    """Return weights (heads, rows, n) @ values (n, heads, dv): (heads, rows, dv)."""
    heads, rows, n = weights.shape
    whole = n - n % _GEMM_KEYS
    total = np.matmul(weights[..., whole:], values[whole:].swapaxes(0, 1))
    if whole:
        columns = values[:whole].reshape(-1, _GEMM_KEYS, *values.shape[1:]).swapaxes(1, 2)
        total += np.matmul(
            weights[..., :whole].reshape(heads, rows, -1, _GEMM_KEYS).transpose(2, 0, 1, 3), columns
        ).sum(0)
    return total


class _Keys:
    """The keys [begin, end) (cache positions) of one sequence and some KV heads, read block by block as float32."""

    def __init__(self, problem: Problem, operands: Operands, b: int, begin: int, end: int, head: int, end_head: int):
        self.begin, self.end = begin, end
        self.heads = slice(head, end_head)
        self.page_size = problem.page_size
        self.row = b if operands.cache_batch_idx is None else int(operands.cache_batch_idx[b])
        self.pages = None if operands.page_table is None else operands.page_table[self.row]
        # Depends on neither the heads of this task nor the keys: so do the shapes of all products.
        elements = problem.num_heads_kv * max(problem.headdim, problem.headdim_v)
        self.block = max(_GEMM_KEYS, _BLOCK_ELEMENTS // elements // _GEMM_KEYS * _GEMM_KEYS)

    def __len__(self) -> int:
        return self.end - self.begin

    def blocks(self, cache: Array) -> Iterator[tuple[int, Floats]]:
        """Yield (offset from begin, keys (n, heads, d)); a block is valid until the next one."""
        cache = cache[:, :, self.heads]
        buffer = None
        for begin in range(self.begin, self.end, self.block):
            end = min(begin + self.block, self.end)
            block = cache[self.row, begin:end] if self.pages is None else self._gather(cache, begin, end)
            if block.dtype != np.float32:
                if buffer is None:
                    buffer = np.empty((min(self.block, len(self)), *block.shape[1:]), np.float32)
                block = _to_float32(block, buffer[: end - begin])
            yield begin - self.begin, block

    def _gather(self, cache: Array, begin: int, end: int) -> Array:
        """Return the keys [begin, end) of a paged cache; looks at no page-table entry beyond them."""
        assert self.pages is not None and self.page_size is not None
        first = begin // self.page_size
        pages = cache[self.pages[first : -(-end // self.page_size)]]
        pages = pages.reshape(-1, *pages.shape[2:])
        return pages[begin - first * self.page_size : end - first * self.page_size]


# ------------------------------------------------------------------------------------------------ append and rotary
def _append(problem: Problem, operands: Operands) -> None:
    """Write every new key and value to the cache, behind the keys that are there."""
    assert operands.k is not None and operands.v is not None
    starts = operands.lengths.cu_seqlens_k_new
    for b in range(problem.batch_size):
        new = slice(int(starts[b]), int(starts[b + 1])) if starts is not None else b
        k, v = operands.k[new], operands.v[new]
        base = int(operands.lengths.cache_seqlens[b])
        positions = base + np.arange(len(k))
        if operands.rotary_cos is not None:
            k = _rotate(operands, _to_float32(k), _rotary_base(operands, b) + np.arange(len(k)))
        row = b if operands.cache_batch_idx is None else int(operands.cache_batch_idx[b])
        if operands.page_table is None:
            operands.k_cache[row, base : base + len(k)] = k
            operands.v_cache[row, base : base + len(v)] = v
        else:
            assert problem.page_size is not None
            page = operands.page_table[row, positions // problem.page_size]
            slot = positions % problem.page_size
            operands.k_cache[page, slot] = k
            operands.v_cache[page, slot] = v


def _rotary_base(operands: Operands, b: int) -> int:
    base = operands.lengths.cache_seqlens if operands.rotary_seqlens is None else operands.rotary_seqlens
    return int(base[b])


def _rotate(operands: Operands, x: Floats, positions: NDArray[np.int64]) -> Floats:
    """Return x (n, heads, d), its row r rotated for ``positions[r]``, computed in float32."""
    assert operands.rotary_cos is not None and operands.rotary_sin is not None
    cos = _to_float32(operands.rotary_cos[positions])[:, None]  # (n, 1, rotary_dim / 2)
    sin = _to_float32(operands.rotary_sin[positions])[:, None]
    half = cos.shape[-1]
    if operands.rotary_interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = x[..., first], x[..., second]
    rotated = x.copy()
    rotated[..., first] = a * cos - b * sin
    rotated[..., second] = a * sin + b * cos
    return rotated


def _to_float32(x: Array, buffer: Floats | None = None) -> Floats:
    """Return x in float32: itself, or converted into ``buffer``."""
    if x.dtype == np.float32:
        return x
    if buffer is None:
        return x.astype(np.float32)
    buffer[...] = x
    return buffer


# ------------------------------------------------------------------------------------------------ threads
_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # threads do not survive a fork


def _num_threads() -> int:
    """Threads that may compute at once: the cores of this process, or fewer if OMP_NUM_THREADS says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(limit)) if limit.isdecimal() and int(limit) else cores


def _run(tasks: Sequence[Callable[[], None]], workers: int) -> None:
    """Run tasks on this thread and ``workers - 1`` others."""
    global _pool
    queue = iter(tasks)  # next() of a list's iterator is atomic

    def work() -> None:
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # log(0) is the LSE of no keys
            for task in queue:
                task()

    if workers > 1 and len(tasks) > 1:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(1, _num_threads() - 1), "cuflash")
        others = [_pool.submit(work) for _ in range(min(workers, len(tasks)) - 1)]
        try:
            work()
        finally:
            for other in others:
                other.result()
    else:
        work()
