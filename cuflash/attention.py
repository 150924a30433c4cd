"""Attention of a decode step on a KV cache: arguments and arrays -> Problem + plan -> a backend."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, Literal, overload

from . import arguments, backends, memo
from .array_types import Array, ArrayT
from .memory import NativeArray, is_on_device
from .metadata import SchedulerMetadata
from .operands import PAIRS, Lengths
from .problem import Problem
from .public import public
from .repeated_call import RepeatedCall, came_as_they_are, in_kind, refuse_planning_in_capture
from .scheduling import make_metadata


# What is returned follows from return_softmax_lse; a test compares these with the function itself.
# fmt: off
@overload
def flash_attn_with_kvcache(
    q: ArrayT, k_cache: Array, v_cache: Array, k: Array | None = None, v: Array | None = None,
    qv: Array | None = None, rotary_cos: Array | None = None, rotary_sin: Array | None = None,
    cache_seqlens: Array | int | None = None, cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None, page_table: Array | tuple[Array, Array] | None = None,
    cu_seqlens_q: Array | None = None, cu_seqlens_k_new: Array | None = None, max_seqlen_q: int | None = None,
    rotary_seqlens: Array | None = None, q_descale: Array | float | None = None,
    k_descale: Array | float | None = None, v_descale: Array | float | None = None,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1), attention_chunk: int | None = 0,
    softcap: float | None = 0.0, rotary_interleaved: bool = True, scheduler_metadata: SchedulerMetadata | None = None,
    num_splits: int = 0, pack_gqa: bool | None = None, sm_margin: int = 0, return_softmax_lse: Literal[False] = False,
    *, sinks: Array | None = None, split_size: int | None = None, kv_dtype: Any = None,
    layout: Literal["NHD", "HND"] = "NHD", out: Array | None = None, softmax_lse: Array | None = None,
    tree_mask: Array | None = None, merge_with: tuple[Array, Array] | None = None, cp_world_size: int = 1,
    cp_rank: int = 0, cp_interleave: int = 1,
) -> ArrayT: ...
@overload
def flash_attn_with_kvcache(
    q: ArrayT, k_cache: Array, v_cache: Array, k: Array | None = None, v: Array | None = None,
    qv: Array | None = None, rotary_cos: Array | None = None, rotary_sin: Array | None = None,
    cache_seqlens: Array | int | None = None, cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None, page_table: Array | tuple[Array, Array] | None = None,
    cu_seqlens_q: Array | None = None, cu_seqlens_k_new: Array | None = None, max_seqlen_q: int | None = None,
    rotary_seqlens: Array | None = None, q_descale: Array | float | None = None,
    k_descale: Array | float | None = None, v_descale: Array | float | None = None,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1), attention_chunk: int | None = 0,
    softcap: float | None = 0.0, rotary_interleaved: bool = True, scheduler_metadata: SchedulerMetadata | None = None,
    num_splits: int = 0, pack_gqa: bool | None = None, sm_margin: int = 0, *, return_softmax_lse: Literal[True],
    sinks: Array | None = None, split_size: int | None = None, kv_dtype: Any = None,
    layout: Literal["NHD", "HND"] = "NHD", out: Array | None = None, softmax_lse: Array | None = None,
    tree_mask: Array | None = None, merge_with: tuple[Array, Array] | None = None, cp_world_size: int = 1,
    cp_rank: int = 0, cp_interleave: int = 1,
) -> tuple[ArrayT, ArrayT]: ...
@overload
def flash_attn_with_kvcache(
    q: ArrayT, k_cache: Array, v_cache: Array, k: Array | None = None, v: Array | None = None,
    qv: Array | None = None, rotary_cos: Array | None = None, rotary_sin: Array | None = None,
    cache_seqlens: Array | int | None = None, cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None, page_table: Array | tuple[Array, Array] | None = None,
    cu_seqlens_q: Array | None = None, cu_seqlens_k_new: Array | None = None, max_seqlen_q: int | None = None,
    rotary_seqlens: Array | None = None, q_descale: Array | float | None = None,
    k_descale: Array | float | None = None, v_descale: Array | float | None = None,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1), attention_chunk: int | None = 0,
    softcap: float | None = 0.0, rotary_interleaved: bool = True, scheduler_metadata: SchedulerMetadata | None = None,
    num_splits: int = 0, pack_gqa: bool | None = None, sm_margin: int = 0, return_softmax_lse: bool = False, *,
    sinks: Array | None = None, split_size: int | None = None, kv_dtype: Any = None,
    layout: Literal["NHD", "HND"] = "NHD", out: Array | None = None, softmax_lse: Array | None = None,
    tree_mask: Array | None = None, merge_with: tuple[Array, Array] | None = None, cp_world_size: int = 1,
    cp_rank: int = 0, cp_interleave: int = 1,
) -> ArrayT | tuple[ArrayT, ArrayT]: ...
# fmt: on
@public
@memo.repeatable(**PAIRS)
def flash_attn_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None = None,
    v: Array | None = None,
    qv: Array | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    cache_seqlens: Array | int | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    page_table: Array | tuple[Array, Array] | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k_new: Array | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Array | None = None,
    q_descale: Array | float | None = None,
    k_descale: Array | float | None = None,
    v_descale: Array | float | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float | None = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: SchedulerMetadata | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    sinks: Array | None = None,
    split_size: int | None = None,
    kv_dtype: Any = None,
    layout: Literal["NHD", "HND"] = "NHD",
    out: Array | None = None,
    softmax_lse: Array | None = None,
    tree_mask: Array | None = None,
    merge_with: tuple[Array, Array] | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_interleave: int = 1,
) -> Any:
    """Attend to a KV cache, optionally after appending new keys and values to it.

    Names, order and meaning of the arguments are those of FlashAttention-3's function of this name; its algorithm is
    Flash-Decoding (https://pytorch.org/blog/flash-decoding/) with the shares of ``get_scheduler_metadata``. Query
    head x uses KV head ``x // (heads_q / heads_kv)``. Query i of sq sees key j of sk (both counted from 0, keys from
    the leftpad) if ``j <= i + sk - sq`` when causal, ``i + sk - sq - left <= j <= i + sk - sq + right`` with a window,
    and if j is in the chunk of position ``i + sk - sq`` with ``attention_chunk``. A row that sees no key gives 0, and
    LSE -inf (with a sink: LSE = sink).

    Arrays may be NumPy, CuPy or anything with ``__dlpack__``; they are taken without a copy, and all lie in one memory.

    Args:
        q: (batch, seqlen_q, heads_q, headdim), or (total_q, heads_q, headdim) with ``cu_seqlens_q``; float16, bfloat16
            or float32; with a quantised cache also float8_e4m3fn (or uint8, which means it): then the output, and
            ``k`` and ``v``, are bfloat16.
        k_cache: (rows, capacity, heads_kv, headdim), or (pages, page_size, heads_kv, headdim) with ``page_table``;
            q's dtype, or quantised: float8_e4m3fn, float8_e5m2, int8, or uint8 with ``kv_dtype``. Its rows must be
            whole 16-byte units: a cache is never copied.
        v_cache: The same with headdim_v; may be the first columns of ``k_cache``'s own rows (MLA), whose headdim then
            reaches 576.
        k: (batch, seqlen_new, heads_kv, headdim) or (total_new, heads_kv, headdim) new keys, written in place at
            ``cache_seqlens`` before attending.
        v: New values, likewise; None where values are the first columns of ``k_cache``'s own rows.
        qv: As q with headdim_v: adds ``qv . v`` to the scores, MLA in FlashAttention-3's spelling.
        rotary_cos: (positions, rotary_dim / 2) of q's dtype; rotates q and k. Needs ``k``.
        rotary_sin: The same.
        cache_seqlens: (batch,) int32 keys in the cache before the append, or one int; default: the capacity.
        cache_batch_idx: (batch,) int32 row of the cache, or of the page table, of each sequence.
        cache_leftpad: (batch,) int32 first valid key of each sequence.
        page_table: (batch, pages per sequence) int32, or a pair (indptr, indices): sequence i has the pages
            ``indices[indptr[i] : indptr[i + 1]]``. Entries past the last needed page may hold anything. A negative
            page number means that nothing is there: an append to it writes nothing, zeros stand in place of its keys.
        cu_seqlens_q: (batch + 1,) int32 first query of each sequence. Needs ``max_seqlen_q``.
        cu_seqlens_k_new: (batch + 1,) int32 first new key of each sequence.
        max_seqlen_q: Longest query length, with ``cu_seqlens_q``.
        rotary_seqlens: (batch,) int32 rotary position of the first new key; default ``cache_seqlens``.
        q_descale: Scales of float8_e4m3fn queries: a number, one float32, or (batch, heads_kv) float32; default 1.
        k_descale: Scales of quantised keys, likewise; or one per key and head, in the shape of the cache without its
            last axis, any strides. Values are codes times scales. Scales per key and head are written by an append,
            which finds them; by other ones it quantises.
        v_descale: Scales of quantised values, likewise.
        softmax_scale: Factor of the scores; default ``headdim ** -0.5``.
        causal: Bottom-right aligned causal mask.
        window_size: (left, right) keys around a row's position, -1 for all.
        attention_chunk: Keys of a chunk, 0 for none.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0 for none.
        rotary_interleaved: Rotate pairs (0, 1), (2, 3) .. instead of (0, rotary_dim / 2) ..
        scheduler_metadata: The plan of ``get_scheduler_metadata``; without it the call plans for itself.
        num_splits: As in ``get_scheduler_metadata``; with a plan the plan's counts.
        pack_gqa: Accepted; query heads are always packed.
        sm_margin: As in ``get_scheduler_metadata``.
        return_softmax_lse: Whether to return the LSE too.
        sinks: (heads_q,) learnable logits that take part in the softmax with a value of zero.
        split_size: As in ``get_scheduler_metadata``: results independent of the batch.
        kv_dtype: What the bits of a cache of uint8 are: float8_e4m3fn, float8_e5m2 or int8.
        layout: "NHD", or "HND" for caches (pages, heads_kv, page_size, dim) or (rows, heads_kv, capacity, dim).
        out: Where to write the output, as q with headdim_v; rows at any multiples of 16 bytes.
        softmax_lse: Where to write the LSE, (batch, heads_q, seqlen_q) or (heads_q, total_q) float32; likewise any
            strides but that of the last axis. Both may take turns in one buffer.
        tree_mask: bool (batch, seqlen_q, seqlen_q), or (total_q, max_seqlen_q) with ragged queries, or the same packed
            along the last axis as uint32 words, bit j of word w for key 32 w + j: entry (i, j) says whether query i
            sees the j-th of the last sq keys of its sequence; it sees all before those. Only without other masks and
            rotary.
        merge_with: (out, lse) of the same queries over other keys, any strides: the call returns the merge of both.
            They may be the arrays given as ``out`` and ``softmax_lse``. Where lse is -inf, out is not read.
        cp_world_size: Ranks that share every sequence: position p lives in the cache of rank
            ``(p // cp_interleave) % cp_world_size``, in order. Lengths and new keys are those of whole sequences,
            caches and page tables the rank's own. Merge the ranks' results with ``merge_attn_states``.
        cp_rank: This rank.
        cp_interleave: Neighbouring positions that a rank holds.

    Returns:
        The output, of q's kind, shape (with headdim_v) and dtype; with ``return_softmax_lse`` also the LSE, natural
        log, float32.

    Raises:
        TypeError: For an argument of a wrong kind.
        ValueError: For a wrong value, or a plan made for another problem, naming the first field that differs. Values
            of index arrays are checked on the host, and on a GPU under ``CUFLASH_VALIDATE=1``. Nothing has been
            written then.

    Example:
        >>> import cuflash, numpy as np
        >>> rng = np.random.default_rng(0)
        >>> q = rng.standard_normal((2, 1, 8, 64), np.float32)
        >>> k_cache, v_cache = rng.standard_normal((2, 2, 128, 2, 64), np.float32)
        >>> lengths = np.array([100, 7], np.int32)
        >>> meta = cuflash.get_scheduler_metadata(2, 1, 128, 8, 2, 64, lengths, qkv_dtype="float32")
        >>> out = cuflash.flash_attn_with_kvcache(
        ...     q, k_cache, v_cache, cache_seqlens=lengths, scheduler_metadata=meta)
        >>> out.shape
        (2, 1, 8, 64)
    """
    return _attend(locals())


# What is not given, for other interfaces of the same call.
_PARAMETERS = inspect.signature(flash_attn_with_kvcache).parameters
DEFAULTS: dict[str, Any] = {
    name: parameter.default for name, parameter in _PARAMETERS.items() if parameter.default is not parameter.empty
}


def check(given: dict[str, Any]) -> None:
    """Raise what ``flash_attn_with_kvcache`` would raise for these arguments, before another call writes to them."""
    if not memo.is_remembered(flash_attn_with_kvcache.__name__, given):
        for name in given.keys() - _PARAMETERS.keys():
            raise TypeError(f"{flash_attn_with_kvcache.__name__}() got an unexpected keyword argument {name!r}")
        whole = {**DEFAULTS, **given}
        arguments.attention(whole, arguments.plan_of(whole["scheduler_metadata"]))


def attend_once(given: dict[str, Any], max_seqlen_k: int) -> Any:
    """Check everything, plan, attend, and remember nothing.

    Args:
        given: The arguments of ``flash_attn_with_kvcache`` by name; beside them ``cu_seqlens_k`` for packed keys.
        max_seqlen_k: Upper bound of the key lengths.
    """
    problem, operands = arguments.attention(given, None)
    backend, plan = backends.select(operands.q), None
    if backend.uses_plan:
        refuse_planning_in_capture(operands.q)
        plan, _ = make_metadata(problem, operands.lengths, max_seqlen_k, given["pack_gqa"])
    backend.attend(problem, operands, plan)
    return _results(given, operands.out, operands.softmax_lse)


def _attend(given: dict[str, Any]) -> Any:
    """Check everything, attend, and say how to do it again."""
    plan = arguments.plan_of(given["scheduler_metadata"])
    problem, operands = arguments.attention(given, plan)
    backend = backends.select(operands.q)
    refill, words = None, None
    if plan is None and backend.uses_plan:
        refuse_planning_in_capture(operands.q)
        longest = _longest(operands.lengths, operands.cache.capacity, problem)
        plan, refill = make_metadata(problem, operands.lengths, longest, given["pack_gqa"])
        words = plan.array.shape
    step = backend.attend(problem, operands, plan)
    results = _results(given, operands.out, operands.softmax_lse)
    if step is None:
        return memo.first(results, None)
    if refill is not None:
        step = replace(step, launches=refill.launches + step.launches)

    def again(arrays: memo.Arrays) -> RepeatedCall | None:
        if not came_as_they_are(operands, arrays):
            return None
        return RepeatedCall(backend, step, words, operands, arrays, given["return_softmax_lse"])

    return memo.first(results, again)


def _results(given: dict[str, Any], out: NativeArray, lse: NativeArray | None) -> Any:
    """Return what the caller asked for, as arrays of his kind."""
    result = in_kind(out, given["out"], given["q"])
    return (result, in_kind(lse, given["softmax_lse"], given["q"])) if given["return_softmax_lse"] else result


def _longest(lengths: Lengths, capacity: int, problem: Problem) -> int:
    """Return an upper bound of the key lengths: exact on the host, the capacity where reading them would sync."""
    if is_on_device(lengths.cache_seqlens) or lengths.cu_seqlens_k_new is not None or not problem.batch_size:
        return min(capacity, 2**31 - 1)
    return int(lengths.cache_seqlens.max()) + lengths.seqlen_k_new
