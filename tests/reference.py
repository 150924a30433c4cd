"""The definition of what cuflash computes, in float64 and plain loops; it shares nothing with the library."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from reference_cache import LARGEST, Cache, Slots, are_leading_columns, dtype_of


@dataclass
class Answer:
    """What a call must give.

    Attributes:
        out: The output in float64, in the shape of q but for the last dimension.
        lse: (batch, heads, sq) or, for ragged queries, (heads, total).
        magnitude: sum of p * |v| for every output element: what its error is to be measured by.
        k_cache: The key cache after the call, in its own dtype and layout.
        v_cache: The value cache after the call.
        k_descale: As given, with the scales that an append has found.
        v_descale: The same.
        defined: Where out and lse mean something, in the shape of lse: not where a row sees a key on a negative page.
    """

    out: np.ndarray
    lse: np.ndarray
    magnitude: np.ndarray
    k_cache: np.ndarray
    v_cache: np.ndarray
    k_descale: Any
    v_descale: Any
    defined: np.ndarray


@dataclass
class Call:
    """The arguments of ``flash_attn_with_kvcache`` that say what is computed."""

    q: np.ndarray
    k_cache: np.ndarray
    v_cache: np.ndarray
    k: np.ndarray | None = None
    v: np.ndarray | None = None
    qv: np.ndarray | None = None
    rotary_cos: np.ndarray | None = None
    rotary_sin: np.ndarray | None = None
    cache_seqlens: Any = None
    cache_batch_idx: Any = None
    cache_leftpad: Any = None
    page_table: Any = None
    cu_seqlens_q: Any = None
    cu_seqlens_k_new: Any = None
    rotary_seqlens: Any = None
    q_descale: Any = None
    k_descale: Any = None
    v_descale: Any = None
    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int | None, int | None] | None = (-1, -1)
    attention_chunk: int | None = 0
    softcap: float | None = 0.0
    rotary_interleaved: bool = True
    sinks: np.ndarray | None = None
    kv_dtype: Any = None
    layout: str = "NHD"
    tree_mask: np.ndarray | None = None
    merge_with: tuple[np.ndarray, np.ndarray] | None = None
    cp_world_size: int = 1
    cp_rank: int = 0
    cp_interleave: int = 1

    @property
    def bounds(self) -> tuple[int, int]:
        """How far a row sees to the left and to the right as the caller says it, -1 for any distance."""
        window = (-1, -1) if self.window_size is None else self.window_size
        left, right = (-1 if bound is None else int(bound) for bound in window)
        return left, right


@dataclass
class Sequence:
    """One sequence of a call.

    Attributes:
        b: Its number.
        rows: Its queries among all, counted through the batch.
        new_rows: Its new keys among all.
        seqlen: Its length before the append, leftpad included.
        leftpad: Its first valid key.
    """

    b: int
    rows: range
    new_rows: range
    seqlen: int
    leftpad: int

    @property
    def num_keys(self) -> int:
        """Valid keys after the append."""
        return self.seqlen + len(self.new_rows) - self.leftpad


NOT_PART_OF_IT = {"scheduler_metadata", "num_splits", "split_size", "pack_gqa", "sm_margin", "max_seqlen_q"}
NOT_PART_OF_IT |= {"return_softmax_lse", "out", "softmax_lse"}


def attention(
    q: np.ndarray, k_cache: np.ndarray, v_cache: np.ndarray, only_rows: Container[int] | None = None, **kwargs: Any
) -> Answer:
    """Attend by the definition; the arguments are those of ``flash_attn_with_kvcache``, no array is changed.

    Where ``only_rows`` says which queries are to be calculated, counted through the batch, the others are not defined.
    """
    call = Call(q, k_cache, v_cache, **{name: x for name, x in kwargs.items() if name not in NOT_PART_OF_IT})
    joint = are_leading_columns(v_cache, k_cache)
    keys = Cache(k_cache.copy(), own(call.k_descale), call.kv_dtype, call.layout)
    values = (
        Cache(keys.array[..., : v_cache.shape[-1]], keys.descale, call.kv_dtype, call.layout)
        if joint
        else Cache(v_cache.copy(), own(call.v_descale), call.kv_dtype, call.layout)
    )
    sequences = sequences_of(call)
    slots = Slots(k_cache, call.layout, call.cache_batch_idx, call.page_table)
    for sequence in sequences:
        append(call, sequence, slots, keys, values, joint)

    num_heads, dv, total = q.shape[-2], v_cache.shape[-1], int(np.prod(q.shape[:-2]))
    out, magnitude = np.zeros((2, total, num_heads, dv))
    lse, defined = np.full((total, num_heads), -math.inf), np.ones((total, num_heads), bool)
    for sequence in sequences:
        j = local_keys(call, sequence)
        where = [slots.find(sequence.b, n) for n in local_slots(sequence, j)]
        empty = np.zeros((0, keys.num_heads, 1))
        all_keys = np.array([keys.read(sequence.b, slot) for slot in where]) if where else empty
        all_values = np.array([values.read(sequence.b, slot) for slot in where]) if where else empty
        is_there = np.array([slot is not None for slot in where], bool)
        for i, row in enumerate(sequence.rows):
            if only_rows is not None and row not in only_rows:
                defined[row] = False
                continue
            seen = visible(call, sequence, i, j)
            defined[row] = is_there[seen].all()
            result = attend(call, sequence, i, all_keys[seen], all_values[seen], joint)
            out[row], magnitude[row], lse[row] = merge(call, row, *result)
    return Answer(
        out.reshape(*q.shape[:-1], dv), as_lse(call, lse), magnitude.reshape(*q.shape[:-1], dv),
        keys.array, values.array, keys.descale, values.descale if call.v_descale is not None else None,
        as_lse(call, defined),
    )  # fmt: skip


def seen_slots(**kwargs: Any) -> np.ndarray:
    """Return which keys of the cache some row sees that were there before the call: bool, a cache without last axis."""
    call = Call(**{name: x for name, x in kwargs.items() if name not in NOT_PART_OF_IT})
    slots = Slots(call.k_cache, call.layout, call.cache_batch_idx, call.page_table)
    result = np.zeros(call.k_cache.shape[:-1], bool)
    for sequence in sequences_of(call):
        j = local_keys(call, sequence)
        seen = np.zeros(len(j), bool)
        for i in range(len(sequence.rows)):
            seen |= visible(call, sequence, i, j)
        seen &= j < sequence.seqlen - sequence.leftpad
        for n in local_slots(sequence, j)[seen]:
            slot = slots.find(sequence.b, n)
            if slot is not None:
                result[slot] = True
    return result


# ------------------------------------------------------------------------------------------------ sequences
def own(x: Any) -> Any:
    """Return a copy of an array, anything else as it is."""
    return x.copy() if isinstance(x, np.ndarray) else x


def sequences_of(call: Call) -> list[Sequence]:
    """Return the sequences of a call."""
    batch = len(call.q) if call.cu_seqlens_q is None else len(call.cu_seqlens_q) - 1
    slots = Slots(call.k_cache, call.layout, call.cache_batch_idx, call.page_table)
    sequences = []
    for b in range(batch):
        lengths = call.cache_seqlens
        seqlen = slots.capacity(b) if lengths is None else int(lengths if np.ndim(lengths) == 0 else lengths[b])
        leftpad = 0 if call.cache_leftpad is None else int(call.cache_leftpad[b])
        new_rows = range(0) if call.k is None else part(b, call.k, call.cu_seqlens_k_new)
        sequences.append(Sequence(b, part(b, call.q, call.cu_seqlens_q), new_rows, seqlen, leftpad))
    return sequences


def part(b: int, array: np.ndarray, cu_seqlens: Any) -> range:
    """Return the rows of sequence b, counted through the batch."""
    if cu_seqlens is not None:
        return range(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
    return range(b * array.shape[1], (b + 1) * array.shape[1])


def is_local(call: Call, position: Any) -> Any:
    """Whether a position of a whole sequence lives in this rank's cache."""
    return position // call.cp_interleave % call.cp_world_size == call.cp_rank


def local_keys(call: Call, sequence: Sequence) -> np.ndarray:
    """Return the keys of a sequence that this rank has, counted from the first valid one of the whole sequence."""
    positions = np.arange(sequence.leftpad, sequence.leftpad + max(0, sequence.num_keys))
    return positions[is_local(call, positions)] - sequence.leftpad


def local_slots(sequence: Sequence, j: np.ndarray) -> np.ndarray:
    """Return where those keys lie in the sequence's part of the cache: a rank's keys lie in order."""
    return np.arange(len(j)) + sequence.leftpad


# ------------------------------------------------------------------------------------------------ append and rotation
def append(call: Call, sequence: Sequence, slots: Slots, keys: Cache, values: Cache, joint: bool) -> None:
    """Write the new keys and values of a sequence, those that are this rank's."""
    first_column = values.codes.shape[-1] if joint else 0
    for t, row in enumerate(sequence.new_rows):
        position = sequence.seqlen + t
        if not is_local(call, position):
            continue
        n = position
        if call.cp_world_size > 1:
            n = int(np.count_nonzero(is_local(call, np.arange(position))))
        key = flat(call.k)[row].astype(np.float32)
        if call.rotary_cos is not None:
            key = rotate(call, key, rotary_base(call, sequence) + t, first_column)
        slot = slots.find(sequence.b, n)
        keys.write(sequence.b, slot, key)
        if not joint:
            values.write(sequence.b, slot, flat(call.v)[row].astype(np.float32))


def flat(x: Any) -> np.ndarray:
    """Return the rows of all sequences along one axis: (total, heads, d)."""
    return x if x.ndim == 3 else x.reshape(-1, *x.shape[2:])


def rotary_base(call: Call, sequence: Sequence) -> int:
    """Return the position of a sequence's first new key."""
    return sequence.seqlen if call.rotary_seqlens is None else int(call.rotary_seqlens[sequence.b])


def rotate(call: Call, x: np.ndarray, position: int, first_column: int) -> np.ndarray:
    """Rotate columns of x, (heads, d), from the first one on by the angles of a position, in the dtype of x."""
    cos, sin = (table[position].astype(x.dtype) for table in (call.rotary_cos, call.rotary_sin))
    result = x.copy()
    for pair, (c, s) in enumerate(zip(cos, sin, strict=True)):
        first, second = (2 * pair, 2 * pair + 1) if call.rotary_interleaved else (pair, pair + len(cos))
        first, second = first + first_column, second + first_column
        result[:, first] = x[:, first] * c - x[:, second] * s
        result[:, second] = x[:, first] * s + x[:, second] * c
    return result


# ------------------------------------------------------------------------------------------------ what a row sees
def visible(call: Call, sequence: Sequence, i: int, j: np.ndarray) -> np.ndarray:
    """Return which keys the i-th query of a sequence sees; j counts from the first valid key of the sequence."""
    first = sequence.num_keys - len(sequence.rows)  # the key at the position of the first query
    if call.tree_mask is not None:
        return (j < first) | tree_row(call, sequence.rows[i])[np.maximum(j - first, 0)]
    position, (left, right), chunk = first + i, call.bounds, call.attention_chunk
    seen = np.ones(len(j), bool)
    if left >= 0:
        seen &= j >= position - left
    if call.causal:
        seen &= j <= position
    elif right >= 0:
        seen &= j <= position + right
    if chunk:
        seen &= j // chunk == position // chunk
    return seen


def tree_row(call: Call, row: int) -> np.ndarray:
    """Return a row of the tree mask as bool; the columns begin at the first of the sequence's last sq keys."""
    mask: Any = call.tree_mask
    entries = mask.reshape(-1, mask.shape[-1])[row]
    if entries.dtype == bool:
        return entries
    return np.array([int(word) >> bit & 1 for word in entries for bit in range(32)], bool)


# ------------------------------------------------------------------------------------------------ attention
def query(call: Call, sequence: Sequence, i: int, joint: bool) -> np.ndarray:
    """Return the i-th query of a sequence, (heads, d), rotated and scaled."""
    q = flat(call.q)[sequence.rows[i]]
    q = q.view(ml_dtypes.float8_e4m3fn) if q.dtype == np.uint8 else q
    is_quantised = q.dtype.name in LARGEST
    dtype = dtype_of("bfloat16") if is_quantised else q.dtype
    q = q.astype(np.float64)
    if call.rotary_cos is not None:
        # As FlashAttention-3: at the position of the query where a mask looks at positions.
        moves = call.causal or max(call.bounds) >= 0 or call.attention_chunk
        position = rotary_base(call, sequence) + (i if moves else 0)
        q = rotate(call, q, position, call.v_cache.shape[-1] if joint else 0).astype(dtype).astype(np.float64)
    scale = call.q_descale
    if scale is not None:
        scale = np.asarray(scale, np.float32).astype(np.float64)
        scale = scale[sequence.b] if scale.size > 1 else scale.reshape(1)
        q *= np.repeat(scale, len(q) // len(scale))[:, None]
    return q


def attend(
    call: Call, sequence: Sequence, i: int, keys: np.ndarray, values: np.ndarray, joint: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return out, magnitude (heads, dv) and lse (heads,) of a query from the keys and values, (n, KV heads, d)."""
    q = query(call, sequence, i, joint)
    num_heads, group = len(q), len(q) // keys.shape[1]
    qv = None if call.qv is None else flat(call.qv)[sequence.rows[i]].astype(np.float64)
    scale = call.softmax_scale
    if scale is None:
        scale = (call.q.shape[-1] + (0 if qv is None else qv.shape[-1])) ** -0.5
    out, magnitude = np.zeros((2, num_heads, call.v_cache.shape[-1]))
    lse = np.full(num_heads, -math.inf)
    for head in range(num_heads):
        exponents = [] if call.sinks is None else [float(call.sinks[head])]
        if len(keys):
            scores = keys[:, head // group] @ q[head]
            if qv is not None:
                scores = scores + values[:, head // group] @ qv[head]
            scores = scores * scale
            if call.softcap:
                scores = call.softcap * np.tanh(scores / call.softcap)
            exponents += scores.tolist()
        lse[head] = log_sum_exp(exponents)
        if len(keys):
            top = max(exponents)  # not the LSE, which of huge scores has no bits left for the sum
            p = np.exp(scores - top) / math.fsum(math.exp(x - top) for x in exponents)
            out[head], magnitude[head] = p @ values[:, head // group], p @ np.abs(values[:, head // group])
    return out, magnitude, lse


def merge(
    call: Call, row: int, out: np.ndarray, magnitude: np.ndarray, lse: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the merge of a row with the part that the caller gives, out of which nothing is read where lse is -inf."""
    if call.merge_with is None:
        return out, magnitude, lse
    other_out = flat(call.merge_with[0])[row].astype(np.float64)
    other_lse = call.merge_with[1]
    other_lse = other_lse[:, row] if other_lse.ndim == 2 else other_lse.swapaxes(1, 2).reshape(-1, len(lse))[row]
    for head, (mine, other) in enumerate(zip(lse.copy(), other_lse.astype(np.float64), strict=True)):
        if other > -math.inf:
            lse[head] = log_sum_exp([mine, other])
            a, b = math.exp(mine - lse[head]), math.exp(other - lse[head])
            out[head] = a * out[head] + b * other_out[head]
            magnitude[head] = a * magnitude[head] + b * np.abs(other_out[head])
    return out, magnitude, lse


def as_lse(call: Call, x: np.ndarray) -> np.ndarray:
    """Return x, (total, heads), in the shape of an LSE."""
    return x.T if call.q.ndim == 3 else x.reshape(*call.q.shape[:2], -1).swapaxes(1, 2)


def averages(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the averages of values, (keys, dim), by the softmax of float64 scores, (.., keys)."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values


def log_sum_exp(exponents: list[float]) -> float:
    """Return log(sum(exp(exponents))), -inf for none."""
    top = max(exponents, default=-math.inf)
    if top == -math.inf:
        return -math.inf
    return top + math.log(math.fsum(math.exp(x - top) for x in exponents))
