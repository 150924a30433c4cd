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

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..device import Device, host_device
from ..dtypes import numpy_dtype
from ..kv_cache import Scales
from ..mask import Shard
from ..metadata import SchedulerMetadata
from ..operands import Lengths, Operands
from ..partition import Partition
from ..planner import plan, sequence_lengths
from ..problem import Problem
from .numpy_rows import append, rotary_base, rotate, to_float32

Array = NDArray[Any]
Floats = NDArray[np.float32]

_GEMM_KEYS = 32  # keys of one product
_BLOCK_ELEMENTS = 2**18  # of a block of keys: 1 MiB of float32
_ROWS = 32  # packed query rows that are computed together
_SCORES = 2**22  # scores that a thread holds at a time: 16 MiB
_THREAD_ELEMENTS = 2**22  # cache elements below which threads do not pay
_LARGEST, _TINY = np.finfo(np.float32).max, np.finfo(np.float32).tiny


class Numpy:
    """The CPU."""

    uses_plan = False

    def device(self, array: Array) -> Device:
        """Return the GPU that plans on host arrays are made for."""
        return host_device()

    def prepare(self, variants: tuple[Any, ...], array: Array) -> int:
        """Compile nothing: this backend has no kernels."""
        return 0

    def plan(self, problem: Problem, partition: Partition, lengths: Lengths, array: Array) -> None:
        """Fill a plan; see :func:`cuflash.get_scheduler_metadata`."""
        plan(problem, partition, lengths, array)

    def attend(self, problem: Problem, operands: Operands, metadata: SchedulerMetadata | None) -> None:
        """Append the new keys, if any, and attend: write ``operands.out`` and ``operands.softmax_lse``."""
        if operands.k is not None:
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                append(problem, operands)
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

    def merge(self, outs: Array, lses: Array, mask: Array | None, out: Array, lse: Array, base2: bool) -> None:
        """Merge partial results over disjoint keys."""
        parts = np.where(np.isposinf(lses), np.float32(-np.inf), lses)
        if mask is not None:
            parts = np.where(mask[:, :, None], parts, np.float32(-np.inf))
        merge(outs, parts, out, lse, math.log(2) if base2 else 1.0)


BACKEND = Numpy()


def merge(outs: Array, lses: Array, out: Array, lse: Array, unit: float = 1.0) -> None:
    """Merge partial results over disjoint keys; a part with LSE -inf counts for nothing, whatever its ``out`` is.

    Args:
        outs: (n, batch, sq, heads, dv).
        lses: (n, batch, heads, sq).
        out: Where the output goes; may be one of ``outs``.
        lse: Where the LSE goes.
        unit: What 1 in an LSE stands for: ln 2 if they are to base 2.
    """
    parts = np.stack([np.asarray(part, np.float32) for part in lses])
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # also of parts that count for nothing
        top = parts.max(0)
        finite_top = np.where(np.isneginf(top), np.float32(0), top)
        weights = np.exp((parts - finite_top) * unit)
        total = weights.sum(0)
        lse[...] = finite_top + np.log(total) / unit
        weights /= np.where(total == 0, np.float32(1), total)
        merged = np.zeros(out.shape, np.float32)
        for part, weight in zip(outs, np.swapaxes(weights, -1, -2)[..., None]):  # (b, h, sq) -> (b, sq, h, 1)
            merged += np.where(weight == 0, np.float32(0), weight * to_float32(part))
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
) -> Iterator[None]:
    """Attend for all rows of sequence ``b`` and the KV heads [head, end_head); pause between blocks of rows."""
    group, heads, rows = problem.group, end_head - head, seqlen_q * problem.group
    q_heads = slice(head * group, end_head * group)
    cache = operands.cache
    all_lse: Any = operands.softmax_lse  # on the host there always is one
    tokens: Any = b  # of the sequence
    if operands.lengths.cu_seqlens_q is not None:
        tokens = slice(int(operands.lengths.cu_seqlens_q[b]), int(operands.lengths.cu_seqlens_q[b]) + seqlen_q)
    lse_tokens = b if operands.lengths.cu_seqlens_q is None else (slice(None), tokens)
    out, lse = operands.out[tokens], all_lse[lse_tokens]

    # (queries, heads of q, d) -> (KV heads, rows, d); packed rows: query position major, head of the group minor.
    def pack(x: Array) -> Array:
        return x.reshape(seqlen_q, heads, group, -1).swapaxes(0, 1).reshape(heads, rows, -1)

    kv_heads = slice(head, end_head)
    k_scale, v_scale = (scales.of_heads(b, kv_heads)[:, None, None] for scales in (cache.k_scales, cache.v_scales))
    packed = pack(_queries(problem, operands, operands.q[tokens][:, q_heads], b))
    # Two scales that float32 holds may have a product that only a small softmax_scale, applied already, brings back.
    packed *= np.multiply(k_scale, operands.q_scales.of_heads(b, kv_heads)[:, None, None], dtype=np.float64)
    packed_qv = None
    if operands.qv is not None:
        packed_qv = pack(to_float32(operands.qv[tokens][:, q_heads]) * _query_factor(operands)) * v_scale
    tree = None if operands.tree_mask is None else _tree(operands.tree_mask[tokens], seqlen_q)
    packed_out = np.empty((heads, rows, problem.headdim_v), np.float32)
    packed_lse = np.empty((heads, rows), np.float32)
    sinks = None
    if operands.sinks is not None:
        sinks = np.tile(operands.sinks[q_heads].reshape(heads, group), seqlen_q)  # (KV heads, rows)

    mask, offset = problem.mask, seqlen_k - seqlen_q  # of a query's position
    for r in range(0, rows, _ROWS):
        end_r = min(r + _ROWS, rows)
        first, last = offset + r // group, offset + (end_r - 1) // group
        begin, first_end = int(mask.first(first)), int(mask.end(first, seqlen_k))
        last_begin, end = int(mask.first(last)), max(begin, int(mask.end(last, seqlen_k)))
        hidden = None
        if last_begin > begin or first_end < end:
            hidden = mask.hidden(offset + np.arange(r, end_r) // group, np.arange(begin, end))
        if tree is not None:
            hidden = _hidden_by_tree(tree[np.arange(r, end_r) // group], mask.shard, np.arange(begin, end), offset)
        step = max(1, _SCORES // ((end_r - r) * max(1, end - begin)))
        for h in range(0, heads, step):
            part = slice(h, min(h + step, heads)), slice(r, end_r)
            keys = _Keys(problem, operands, b, leftpad + begin, leftpad + end, head + h, head + part[0].stop)
            packed_out[part], packed_lse[part] = _attend_rows(
                problem,
                operands,
                packed[part],
                None if packed_qv is None else packed_qv[part],
                keys,
                hidden,
                None if sinks is None else sinks[part],
            )
        yield

    result = packed_out.reshape(heads, seqlen_q, group, -1).swapaxes(0, 1).reshape(seqlen_q, heads * group, -1)
    result_lse = packed_lse.reshape(heads, seqlen_q, group).swapaxes(1, 2).reshape(heads * group, seqlen_q)
    if operands.merge_out is not None and operands.merge_lse is not None:
        other, other_lse = operands.merge_out[tokens][:, q_heads], operands.merge_lse[lse_tokens][q_heads]
        parts, lses = np.stack([to_float32(other), result])[:, None], np.stack([other_lse, result_lse])[:, None]
        merge(parts, lses, result[None], result_lse[None])
    out[:, q_heads], lse[q_heads] = result, result_lse


def _scales_scores(operands: Operands) -> bool:
    """Whether softmax_scale waits for the scores: a large one could make infinite queries of finite scores."""
    return abs(operands.softmax_scale) > 1


def _query_factor(operands: Operands) -> np.float32:
    """Return what queries are multiplied by: softmax_scale, if it is small."""
    return np.float32(1 if _scales_scores(operands) else operands.softmax_scale)


def _tree(mask: Array, seqlen_q: int) -> NDArray[np.bool_]:
    """Return the tree mask of a sequence, (sq, sq), from bools or packed words."""
    if mask.dtype == np.uint32:
        words = np.ascontiguousarray(mask, "<u4").view(np.uint8)
        mask = np.unpackbits(words, axis=-1, bitorder="little").view(np.bool_)
    return mask[:seqlen_q, :seqlen_q]


def _hidden_by_tree(tree: NDArray[np.bool_], shard: Shard, keys: NDArray[np.int64], offset: int) -> NDArray[np.bool_]:
    """Return (rows, keys): what rows do not see of ``keys``, of which the last of the sequence are the tree's.

    Args:
        tree: (rows, sq) what each row sees of the last sq keys.
        shard: Which positions the keys have.
        keys: (keys,) numbers of keys in the cache.
        offset: Position of the first of the last sq keys; negative where the sequence has fewer.
    """
    column = shard.position(keys) - offset
    inside = column >= 0
    hidden = np.zeros((len(tree), len(keys)), np.bool_)
    hidden[:, inside] = ~tree[:, column[inside]]
    return hidden


def _queries(problem: Problem, operands: Operands, q: Array, b: int) -> Floats:
    """Return the queries of a sequence (n, heads, d) in float32: rotated, times the factor of the scores."""
    x = to_float32(q)
    rotary = operands.rotary
    if rotary is not None:
        base = rotary_base(rotary, operands.lengths, b)
        positions = base + np.arange(len(q)) if rotary.moves else np.full(len(q), base)
        # Rounded like the keys that it meets.
        x = to_float32(rotate(rotary, x, positions).astype(numpy_dtype(problem.out_dtype)))
    return x * _query_factor(operands)


def _attend_rows(
    problem: Problem,
    operands: Operands,
    q: Floats,
    qv: Floats | None,
    keys: _Keys,
    hidden: NDArray[np.bool_] | None,
    sinks: Floats | None,
) -> tuple[Floats, Floats]:
    """Attend for packed rows of some KV heads.

    Args:
        problem: The problem.
        operands: What the call works on.
        q: (KV heads, rows, d), scaled.
        qv: (KV heads, rows, dv), scaled, or None.
        keys: The keys that at least one row sees.
        hidden: (rows, keys) what a row does not see of them, or None.
        sinks: (KV heads, rows) or None.

    Returns:
        (KV heads, rows, dv) and the LSE (KV heads, rows).
    """
    heads, rows, _ = q.shape
    scores = np.empty((heads, rows, len(keys)), np.float32)
    for begin, block in keys.blocks(operands.cache.k, operands.cache.k_scales):
        _scores(q, block, scores[..., begin : begin + len(block)])
    if qv is not None:
        more = np.empty((heads, rows, keys.block), np.float32)
        for begin, block in keys.blocks(operands.cache.v, operands.cache.v_scales):
            _scores(qv, block, more[..., : len(block)])
            scores[..., begin : begin + len(block)] += more[..., : len(block)]
    if _scales_scores(operands):
        scores *= np.float32(operands.softmax_scale)
    if operands.softcap:
        cap = np.float32(min(max(operands.softcap, float(_TINY)), float(_LARGEST)))
        # Not the queries over the cap: products of numbers as small as that would lose their bits.
        scores /= cap
        np.tanh(scores, out=scores)
        scores *= cap
    if hidden is not None:
        np.copyto(scores, -np.inf, where=hidden)
    top = scores.max(-1, initial=-_LARGEST)  # never -inf: where a row sees nothing, exp(-inf - top) is 0 and not NaN
    if sinks is not None:  # finite in any case: what an infinite sink or NaN makes of a row is in the total
        np.fmax(top, np.minimum(sinks, _LARGEST), out=top)
    scores -= top[..., None]
    np.exp(scores, out=scores)
    weight = scores.sum(-1)
    total = weight if sinks is None else weight + np.exp(sinks - top)
    lse = top + np.log(total)
    out = np.zeros((heads, rows, problem.headdim_v), np.float32)
    unseen: Any = None if hidden is None or operands.tree_mask is None else hidden.all(0)
    for begin, block in keys.blocks(operands.cache.v, operands.cache.v_scales):
        if unseen is not None:  # by nobody, so that it may hold anything
            block = np.where(unseen[begin : begin + len(block), None, None], np.float32(0), block)
        out += _weighted_sum(scores[..., begin : begin + len(block)], block)
    # A row that sees no key gives 0, whatever its sink and the scale of its sequence are.
    sees = weight[..., None] != 0
    np.divide(out, total[..., None], out=out, where=sees)
    v_scale = operands.cache.v_scales.of_heads(keys.b, keys.heads)[:, None, None]
    np.multiply(out, v_scale, out=out, where=sees)
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
        self.cache, self.b = operands.cache, b
        # Depends on neither the heads of this task nor the keys: so do the shapes of all products.
        elements = problem.num_heads_kv * max(problem.headdim, problem.headdim_v)
        self.block = max(_GEMM_KEYS, _BLOCK_ELEMENTS // elements // _GEMM_KEYS * _GEMM_KEYS)

    def __len__(self) -> int:
        return self.end - self.begin

    def blocks(self, cache: Array, scales: Scales) -> Iterator[tuple[int, Floats]]:
        """Yield (offset from begin, keys (n, heads, d)), scaled if each has a scale; valid until the next block."""
        cache = cache[:, :, self.heads]
        per_key = scales.array[:, :, self.heads] if scales.array is not None and scales.per_key else None
        buffer = None
        for begin in range(self.begin, self.end, self.block):
            end = min(begin + self.block, self.end)
            block = self.cache.read(cache, self.b, begin, end)
            if block.dtype != np.float32:
                if buffer is None:
                    buffer = np.empty((min(self.block, len(self)), *block.shape[1:]), np.float32)
                block = to_float32(block, buffer[: end - begin])
            if per_key is not None:
                block *= self.cache.read(per_key, self.b, begin, end)[..., None]
            yield begin - self.begin, block


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


def _run(tasks: Sequence[Callable[[], Iterator[None]]], workers: int) -> None:
    """Run tasks on this thread and ``workers - 1`` others, which give theirs up where they pause if this one raises."""
    global _pool
    queue = iter(tasks)  # next() of a list's iterator is atomic
    given_up = False

    def work() -> None:
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # log(0) is the LSE of no keys
            for task in queue:
                for _ in task():
                    if given_up:
                        return

    if workers > 1 and len(tasks) > 1:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(1, _num_threads() - 1), "cuflash")
        others = [_pool.submit(work) for _ in range(min(workers, len(tasks)) - 1)]
        try:
            work()
        except BaseException:  # Ctrl-C, too
            given_up = True
            raise
        finally:
            for other in others:
                other.result()
    else:
        work()
