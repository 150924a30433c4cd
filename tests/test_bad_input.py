"""Every kind of bad input raises TypeError or ValueError that names the argument, and changes no array."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference

import cuflash
from cuflash.simulator import Finding, SimulationError

Arguments = dict[str, Any]
BATCH, SEQLEN_Q, HEADS, KV_HEADS, DIM, DIM_V, CAPACITY, PAGE_SIZE = 3, 2, 4, 2, 64, 32, 96, 16


# ------------------------------------------------------------------------------------------------ good arguments
def contiguous() -> Arguments:
    """Arguments of a call that works, every output given."""
    rng = np.random.default_rng(0)
    return {
        "q": rng.standard_normal((BATCH, SEQLEN_Q, HEADS, DIM), np.float32),
        "k_cache": rng.standard_normal((BATCH, CAPACITY, KV_HEADS, DIM), np.float32),
        "v_cache": rng.standard_normal((BATCH, CAPACITY, KV_HEADS, DIM_V), np.float32),
        "cache_seqlens": np.array([40, 7, 80], np.int32),
        "out": np.full((BATCH, SEQLEN_Q, HEADS, DIM_V), 7, np.float32),
        "softmax_lse": np.full((BATCH, HEADS, SEQLEN_Q), 7, np.float32),
    }


def paged() -> Arguments:
    """The same with pages."""
    arguments = contiguous()
    for name in ("k_cache", "v_cache"):
        cache = arguments[name]
        arguments[name] = cache.reshape(-1, PAGE_SIZE, *cache.shape[2:])
    table = np.arange(BATCH * CAPACITY // PAGE_SIZE, dtype=np.int32)[::-1].reshape(BATCH, -1)
    return arguments | {"page_table": np.ascontiguousarray(table)}


def ragged() -> Arguments:
    """The same with ragged queries."""
    arguments = contiguous()
    arguments["q"] = arguments["q"].reshape(-1, HEADS, DIM)
    arguments["out"] = arguments["out"].reshape(-1, HEADS, DIM_V)
    arguments["softmax_lse"] = np.full((HEADS, BATCH * SEQLEN_Q), 7, np.float32)
    return arguments | {"cu_seqlens_q": np.array([0, 1, 1, 6], np.int32), "max_seqlen_q": 5}


def appending() -> Arguments:
    """The same with new keys and rotary embedding."""
    rng = np.random.default_rng(1)
    angles = rng.standard_normal((128, 16), np.float32)
    return contiguous() | {
        "k": rng.standard_normal((BATCH, 2, KV_HEADS, DIM), np.float32),
        "v": rng.standard_normal((BATCH, 2, KV_HEADS, DIM_V), np.float32),
        "rotary_cos": np.cos(angles),
        "rotary_sin": np.sin(angles),
    }


def appending_ragged() -> Arguments:
    """New keys of different numbers."""
    arguments = appending()
    for name in ("k", "v"):
        arguments[name] = arguments[name].reshape(-1, KV_HEADS, arguments[name].shape[-1])
    return arguments | {"cu_seqlens_k_new": np.array([0, 1, 1, 6], np.int32)}


def planning() -> Arguments:
    """Arguments of get_scheduler_metadata."""
    return {
        "batch_size": BATCH,
        "max_seqlen_q": SEQLEN_Q,
        "max_seqlen_k": CAPACITY,
        "num_heads_q": HEADS,
        "num_heads_kv": KV_HEADS,
        "headdim": DIM,
        "cache_seqlens": np.array([40, 7, 80], np.int32),
        "qkv_dtype": "float32",
        "headdim_v": DIM_V,
    }


def merging() -> Arguments:
    """Arguments of merge_attn_states."""
    outs = [np.full((BATCH, SEQLEN_Q, HEADS, DIM_V), i, np.float32) for i in range(3)]
    return {"outs": outs, "lses": [np.zeros((BATCH, HEADS, SEQLEN_Q), np.float32) for _ in range(3)]}


GOOD: dict[Callable[[], Arguments], Callable[..., Any]] = {
    **dict.fromkeys((contiguous, paged, ragged, appending, appending_ragged), cuflash.flash_attn_with_kvcache),
    planning: cuflash.get_scheduler_metadata,
    merging: cuflash.merge_attn_states,
}


@pytest.mark.parametrize("make", GOOD, ids=lambda make: make.__name__)
def test_good_input_is_accepted(make):
    GOOD[make](**make())


# ------------------------------------------------------------------------------------------------ bad arguments
class Change:
    """A change of one good argument, applied when the test runs."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        self.change = change


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def unaligned(array: np.ndarray) -> np.ndarray:
    """The same values one element further on: rows no longer begin at multiples of 16 bytes."""
    memory = np.empty(array.size + 5, array.dtype)
    start = 1 + (-memory.ctypes.data % 16) // array.itemsize
    view = memory[start : start + array.size].reshape(array.shape)
    view[...] = array
    return view


def strided(array: np.ndarray) -> np.ndarray:
    """The same values, every other element."""
    memory = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    memory[..., ::2] = array
    return memory[..., ::2]


def odd_rows(array: np.ndarray) -> np.ndarray:
    """The same values in rows with one element between them."""
    memory = np.zeros((*array.shape[:-1], array.shape[-1] + 1), array.dtype)
    memory[..., :-1] = array
    return memory[..., :-1]


def overlapping(array: np.ndarray) -> np.ndarray:
    """Return rows that all lie at one place."""
    return np.lib.stride_tricks.as_strided(array, strides=(0, 0, 0, array.itemsize))


def seqlens(*values: Any, dtype: Any = np.int32) -> np.ndarray:
    return np.array(values, dtype)


def entry(index: Any, value: Any) -> Change:
    """One wrong entry."""

    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[index] = value
        return array

    return Change(change)


as_float16 = Change(lambda array: array.astype(np.float16))
as_list = Change(lambda array: array.tolist())
first_half = Change(lambda array: array[..., : array.shape[-1] // 2])
without_last = Change(lambda array: array[:-1])
one_more_dimension = Change(lambda array: array[None])
zeros = np.zeros
ROTARY = ("rotary_cos", "rotary_sin")

# (good arguments, the argument that the message names, what to change, exception)
BAD: list[tuple[Callable[[], Arguments], str, Arguments, type[Exception]]] = [
    # -- q
    (contiguous, "q", {"q": None}, TypeError),
    (contiguous, "q", {"q": as_list}, TypeError),
    (contiguous, "q", {"q": "q"}, TypeError),
    (contiguous, "q", {"q": Change(lambda q: q[0])}, ValueError),
    (contiguous, "q", {"q": one_more_dimension}, ValueError),
    (contiguous, "q", {"q": Change(lambda q: q.astype(np.float64))}, ValueError),
    (contiguous, "q", {"q": Change(lambda q: q.astype(np.complex64))}, ValueError),
    (contiguous, "q", {"q": Change(lambda q: q.astype(np.int32))}, ValueError),
    (contiguous, "q", {"q": Change(lambda q: q.astype(np.int8))}, ValueError),
    (contiguous, "q", {"q": Change(lambda q: q.astype(">f4"))}, ValueError),
    (contiguous, "q", {"q": Change(lambda q: q.astype(object))}, ValueError),
    (contiguous, "num_heads_q", {"q": Change(lambda q: q[:, :, :3])}, ValueError),
    (contiguous, "num_heads_q", {"q": Change(lambda q: q[:, :, :0])}, ValueError),
    (contiguous, "headdim", {"q": Change(lambda q: q[..., :63])}, ValueError),
    (contiguous, "headdim", {"q": Change(lambda q: q[..., :0])}, ValueError),
    (contiguous, "headdim", {"q": zeros((BATCH, SEQLEN_Q, HEADS, 584), np.float32)}, ValueError),
    (contiguous, "k_cache", {"q": first_half}, ValueError),
    # -- caches
    (contiguous, "k_cache", {"k_cache": None}, TypeError),
    (contiguous, "v_cache", {"v_cache": as_list}, TypeError),
    (contiguous, "k_cache", {"k_cache": as_float16}, ValueError),
    (contiguous, "v_cache", {"v_cache": Change(lambda v: v.astype(ml_dtypes.bfloat16))}, ValueError),
    (contiguous, "k_cache", {"k_cache": Change(lambda k: k[0])}, ValueError),
    (contiguous, "v_cache", {"v_cache": Change(lambda v: v[:, :-1])}, ValueError),
    (contiguous, "v_cache", {"v_cache": Change(lambda v: v[:, :, :1])}, ValueError),
    (contiguous, "headdim_v", {"v_cache": Change(lambda v: v[..., :12])}, ValueError),
    (contiguous, "k_cache", {"k_cache": Change(unaligned)}, ValueError),
    (contiguous, "v_cache", {"v_cache": Change(strided)}, ValueError),
    (contiguous, "k_cache", {"k_cache": Change(odd_rows)}, ValueError),
    (contiguous, "k_cache", {"k_cache": Change(lambda k: k[:, ::-1])}, ValueError),
    (contiguous, "k_cache", {"k_cache": without_last, "v_cache": without_last}, ValueError),
    (contiguous, "num_heads_kv", {"k_cache": Change(lambda k: k[:, :, :0]), "v_cache": Change(lambda v: v[:, :, :0])},
     ValueError),
    (contiguous, "layout", {"layout": "BSHD"}, ValueError),
    (contiguous, "layout", {"layout": 1}, TypeError),
    (contiguous, "k_cache", {"k_cache": zeros((BATCH, CAPACITY, KV_HEADS, DIM), np.uint8)}, ValueError),
    (contiguous, "k_cache", {"k_cache": zeros((BATCH, CAPACITY, KV_HEADS, DIM), ml_dtypes.float8_e4m3fn)}, ValueError),
    (contiguous, "kv_dtype", {"kv_dtype": "e4m3"}, ValueError),
    (contiguous, "kv_dtype", {"kv_dtype": "int8"}, ValueError),
    (contiguous, "kv_dtype", {"kv_dtype": "float16"}, ValueError),
    (contiguous, "kv_dtype", {"kv_dtype": "floatish"}, ValueError),
    (contiguous, "kv_dtype", {"kv_dtype": 8}, TypeError),
    # -- lengths
    (contiguous, "cache_seqlens", {"cache_seqlens": as_list}, TypeError),
    (contiguous, "cache_seqlens", {"cache_seqlens": 40.0}, TypeError),
    (contiguous, "cache_seqlens", {"cache_seqlens": True}, TypeError),
    (contiguous, "cache_seqlens", {"cache_seqlens": seqlens(4, 7, 8, dtype=np.float32)}, TypeError),
    (contiguous, "cache_seqlens", {"cache_seqlens": seqlens(4, 7, 2**40, dtype=np.int64)}, ValueError),
    (contiguous, "cache_seqlens", {"cache_seqlens": -1}, ValueError),
    (contiguous, "cache_seqlens", {"cache_seqlens": CAPACITY + 1}, ValueError),
    (contiguous, "cache_seqlens", {"cache_seqlens": entry(1, -1)}, ValueError),
    (contiguous, "cache_seqlens", {"cache_seqlens": entry(1, CAPACITY + 1)}, ValueError),
    (contiguous, "cache_seqlens", {"cache_seqlens": without_last}, ValueError),
    (contiguous, "cache_seqlens", {"cache_seqlens": one_more_dimension}, ValueError),
    (contiguous, "cache_leftpad", {"cache_leftpad": seqlens(1, 1)}, ValueError),
    (contiguous, "cache_leftpad", {"cache_leftpad": seqlens(1, 8, 1)}, ValueError),
    (contiguous, "cache_leftpad", {"cache_leftpad": seqlens(1, -1, 1)}, ValueError),
    (contiguous, "cache_leftpad", {"cache_leftpad": 3}, TypeError),
    (contiguous, "cache_batch_idx", {"cache_batch_idx": seqlens(0, 1)}, ValueError),
    (contiguous, "cache_batch_idx", {"cache_batch_idx": seqlens(0, 1, 3)}, ValueError),
    (contiguous, "cache_batch_idx", {"cache_batch_idx": seqlens(0, -1, 2)}, ValueError),
    (contiguous, "cache_batch_idx", {"cache_batch_idx": seqlens(0, 1, 2, dtype=np.float64)}, TypeError),
    # -- pages
    (paged, "page_table", {"page_table": as_list}, TypeError),
    (paged, "page_table", {"page_table": Change(lambda table: table.astype(np.float32))}, TypeError),
    (paged, "page_table", {"page_table": Change(lambda table: table[0])}, ValueError),
    (paged, "page_table", {"page_table": Change(lambda table: table[:2])}, ValueError),
    (paged, "page_table", {"page_table": entry((2, 4), 18)}, ValueError),
    (paged, "cache_seqlens", {"page_table": Change(lambda table: np.ascontiguousarray(table[:, :4]))}, ValueError),
    (paged, "page_size", {"k_cache": Change(lambda k: k[:, :0]), "v_cache": Change(lambda v: v[:, :0])}, ValueError),
    # -- ragged queries
    (ragged, "max_seqlen_q", {"max_seqlen_q": None}, ValueError),
    (ragged, "max_seqlen_q", {"max_seqlen_q": -1}, ValueError),
    (ragged, "max_seqlen_q", {"max_seqlen_q": 2.0}, TypeError),
    (ragged, "max_seqlen_q", {"max_seqlen_q": 4}, ValueError),
    (ragged, "q", {"q": one_more_dimension}, ValueError),
    (ragged, "cu_seqlens_q", {"cu_seqlens_q": seqlens(0, 3, 1, 6)}, ValueError),
    (ragged, "cu_seqlens_q", {"cu_seqlens_q": seqlens(-1, 2, 3, 6)}, ValueError),
    (ragged, "cu_seqlens_q", {"cu_seqlens_q": seqlens(0, 2, 4, 7)}, ValueError),
    (ragged, "cu_seqlens_q", {"cu_seqlens_q": one_more_dimension}, ValueError),
    (ragged, "cu_seqlens_q", {"cu_seqlens_q": seqlens()}, ValueError),
    (ragged, "cu_seqlens_q", {"cu_seqlens_q": as_list}, TypeError),
    (ragged, "cu_seqlens_q", {"cu_seqlens_q": Change(lambda starts: starts.astype(np.float32))}, TypeError),
    (contiguous, "max_seqlen_q", {"max_seqlen_q": 1.5}, TypeError),
    # -- append
    (appending, "k", {"k": None}, ValueError),
    (appending, "v", {"v": None}, ValueError),
    (appending, "k", {"k": Change(lambda k: k[0])}, ValueError),
    (appending, "k", {"k": as_float16}, ValueError),
    (appending, "v", {"v": as_float16}, ValueError),
    (appending, "v", {"v": Change(lambda v: v[:, :1])}, ValueError),
    (appending, "k", {"k": Change(lambda k: k[:2]), "v": Change(lambda v: v[:2])}, ValueError),
    (appending, "k", {"k": Change(lambda k: k[:, :, :1])}, ValueError),
    (appending, "v", {"v": first_half}, ValueError),
    (appending, "k", {"k": as_list}, TypeError),
    (appending, "cache_seqlens", {"cache_seqlens": entry(2, CAPACITY - 1)}, ValueError),
    (appending, "cache_seqlens", {"cache_seqlens": None}, ValueError),
    (appending, "k_cache", {"k_cache": Change(read_only)}, ValueError),
    (appending, "v_cache", {"v_cache": Change(read_only)}, ValueError),
    (appending_ragged, "cu_seqlens_k_new", {"cu_seqlens_k_new": seqlens(0, 2, 1, 6)}, ValueError),
    (appending_ragged, "cu_seqlens_k_new", {"cu_seqlens_k_new": seqlens(0, 1, 2, 7)}, ValueError),
    (appending_ragged, "cu_seqlens_k_new", {"cu_seqlens_k_new": seqlens(0, 1, 2)}, ValueError),
    (appending_ragged, "k", {"k": one_more_dimension, "v": one_more_dimension}, ValueError),
    (contiguous, "cu_seqlens_k_new", {"cu_seqlens_k_new": 3.0}, TypeError),
    # -- rotary embedding
    (appending, "rotary_sin", {"rotary_sin": None}, ValueError),
    (appending, "rotary_cos", {"rotary_cos": None}, ValueError),
    (appending, "rotary_cos", {"k": None, "v": None}, ValueError),
    (appending, "rotary_cos", {"rotary_cos": as_float16}, ValueError),
    (appending, "rotary_cos", {"rotary_cos": Change(lambda cos: cos[0])}, ValueError),
    (appending, "rotary_sin", {"rotary_sin": first_half}, ValueError),
    (appending, "rotary_cos", {name: zeros((128, 40), np.float32) for name in ROTARY}, ValueError),
    (appending, "rotary_cos", {name: zeros((81, 16), np.float32) for name in ROTARY}, ValueError),
    (appending, "rotary_seqlens", {"rotary_seqlens": seqlens(1, 2)}, ValueError),
    (appending, "rotary_cos", {"rotary_seqlens": seqlens(1, 2, 127)}, ValueError),
    (appending, "rotary_seqlens", {"rotary_seqlens": seqlens(1, -2, 3)}, ValueError),
    (appending, "rotary_interleaved", {"rotary_interleaved": 1}, TypeError),
    (contiguous, "rotary_seqlens", {"rotary_seqlens": seqlens(1, 2, 3, dtype=np.float32)}, TypeError),
    # -- masks and scales
    (contiguous, "causal", {"causal": "yes"}, TypeError),
    (contiguous, "window_size", {"window_size": 5}, TypeError),
    (contiguous, "window_size", {"window_size": "55"}, TypeError),
    (contiguous, "window_size", {"window_size": (5,)}, ValueError),
    (contiguous, "window_size", {"window_size": (-2, 0)}, ValueError),
    (contiguous, "window_size", {"window_size": (1.5, 0)}, TypeError),
    (contiguous, "attention_chunk", {"attention_chunk": -1}, ValueError),
    (contiguous, "attention_chunk", {"attention_chunk": 8.0}, TypeError),
    (contiguous, "softcap", {"softcap": -1.0}, ValueError),
    (contiguous, "softcap", {"softcap": float("inf")}, ValueError),
    (contiguous, "softcap", {"softcap": "30"}, TypeError),
    (contiguous, "softmax_scale", {"softmax_scale": float("nan")}, ValueError),
    (contiguous, "softmax_scale", {"softmax_scale": 1e-38}, ValueError),
    (contiguous, "softmax_scale", {"softmax_scale": -2e38}, ValueError),
    (contiguous, "softmax_scale", {"softmax_scale": [1.0]}, TypeError),
    (contiguous, "sinks", {"sinks": zeros(HEADS - 1, np.float32)}, ValueError),
    (contiguous, "sinks", {"sinks": zeros((1, HEADS), np.float32)}, ValueError),
    (contiguous, "sinks", {"sinks": zeros(HEADS, np.int64)}, ValueError),
    (contiguous, "sinks", {"sinks": [0.0] * HEADS}, TypeError),
    # -- outputs
    (contiguous, "out", {"out": Change(lambda out: out[..., :16])}, ValueError),
    (contiguous, "out", {"out": as_float16}, ValueError),
    (contiguous, "out", {"out": Change(read_only)}, ValueError),
    (contiguous, "out", {"out": Change(lambda out: np.repeat(out, 2, -1)[..., ::2])}, ValueError),
    (contiguous, "out", {"out": Change(lambda out: np.pad(out, ((0, 0),) * 3 + ((0, 1),))[..., :-1])}, ValueError),
    (contiguous, "out", {"out": Change(overlapping)}, ValueError),
    (contiguous, "out", {"out": Change(lambda out: out[:, :, ::-1])}, ValueError),
    (contiguous, "out", {"out": as_list}, TypeError),
    (contiguous, "softmax_lse", {"softmax_lse": Change(lambda lse: lse.swapaxes(1, 2).copy())}, ValueError),
    (contiguous, "softmax_lse", {"softmax_lse": Change(lambda lse: np.repeat(lse, 2, -1)[..., ::2])}, ValueError),
    (contiguous, "softmax_lse", {"softmax_lse": Change(lambda lse: lse.astype(np.float64))}, ValueError),
    (contiguous, "softmax_lse", {"softmax_lse": Change(read_only)}, ValueError),
    (contiguous, "return_softmax_lse", {"return_softmax_lse": 1}, TypeError),
    # -- plan
    (contiguous, "scheduler_metadata", {"scheduler_metadata": zeros(64, np.int32)}, TypeError),
    (contiguous, "num_splits", {"num_splits": -1}, ValueError),
    (contiguous, "num_splits", {"num_splits": 1.0}, TypeError),
    (contiguous, "split_size", {"split_size": 65}, ValueError),
    (contiguous, "split_size", {"split_size": 0}, ValueError),
    (contiguous, "split_size", {"split_size": 64, "num_splits": 2}, ValueError),
    (contiguous, "sm_margin", {"sm_margin": -1}, ValueError),
    (contiguous, "pack_gqa", {"pack_gqa": 2}, TypeError),
    (contiguous, "qv", {"qv": zeros((BATCH, SEQLEN_Q, HEADS, 512), np.float32)}, ValueError),
    *((contiguous, name, {name: 1.0}, ValueError) for name in ("q_descale", "k_descale", "v_descale")),
    # -- get_scheduler_metadata
    (planning, "batch_size", {"batch_size": -1}, ValueError),
    (planning, "batch_size", {"batch_size": 2**40}, ValueError),
    (planning, "batch_size", {"batch_size": "3"}, TypeError),
    (planning, "batch_size", {"batch_size": True}, TypeError),
    (planning, "cache_seqlens", {"batch_size": 4}, ValueError),
    (planning, "max_seqlen_q", {"max_seqlen_q": -1}, ValueError),
    (planning, "max_seqlen_q", {"max_seqlen_q": None}, TypeError),
    (planning, "max_seqlen_k", {"max_seqlen_k": -1}, ValueError),
    (planning, "max_seqlen_k", {"max_seqlen_k": 9.5}, TypeError),
    (planning, "num_heads_q", {"num_heads_q": 0}, ValueError),
    (planning, "num_heads_q", {"num_heads_q": 5}, ValueError),
    (planning, "num_heads_kv", {"num_heads_kv": 0}, ValueError),
    (planning, "headdim", {"headdim": 60}, ValueError),
    (planning, "headdim", {"headdim": 584}, ValueError),
    (planning, "headdim_v", {"headdim_v": 7}, ValueError),
    (planning, "cache_seqlens", {"cache_seqlens": None}, TypeError),
    (planning, "cache_seqlens", {"cache_seqlens": as_list}, TypeError),
    (planning, "cache_seqlens", {"cache_seqlens": entry(0, -5)}, ValueError),
    (planning, "qkv_dtype", {"qkv_dtype": "float64"}, ValueError),
    (planning, "qkv_dtype", {"qkv_dtype": None}, TypeError),
    (planning, "qkv_dtype", {"qkv_dtype": "float8_e5m2"}, ValueError),
    (planning, "kv_dtype", {"kv_dtype": "float16"}, ValueError),
    (planning, "kv_dtype", {"kv_dtype": "bfloat16"}, ValueError),
    (planning, "page_size", {"page_size": 0}, ValueError),
    (planning, "page_size", {"page_size": 16.0}, TypeError),
    (planning, "max_seqlen_k_new", {"max_seqlen_k_new": -1}, ValueError),
    (planning, "cu_seqlens_q", {"cu_seqlens_q": seqlens(0, 1, 2)}, ValueError),
    (planning, "cu_seqlens_q", {"cu_seqlens_q": seqlens(0, 1, 2, 6)}, ValueError),
    (planning, "cu_seqlens_k_new", {"cu_seqlens_k_new": seqlens(3, 4, 5, 6)}, ValueError),
    (planning, "cache_leftpad", {"cache_leftpad": seqlens(0, 8, 0)}, ValueError),
    (planning, "causal", {"causal": None}, TypeError),
    (planning, "window_size", {"window_size": 7}, TypeError),
    (planning, "window_size", {"window_size": (1, 2, 3)}, ValueError),
    (planning, "attention_chunk", {"attention_chunk": -4}, ValueError),
    (planning, "has_softcap", {"has_softcap": 30.0}, TypeError),
    (planning, "num_splits", {"num_splits": -2}, ValueError),
    (planning, "split_size", {"split_size": 100}, ValueError),
    (planning, "split_size", {"split_size": "64"}, TypeError),
    (planning, "pack_gqa", {"pack_gqa": "auto"}, TypeError),
    (planning, "sm_margin", {"sm_margin": 1.5}, TypeError),
    (planning, "out", {"out": zeros(100, np.int32)}, TypeError),
    # -- merge_attn_states
    (merging, "outs", {"outs": []}, ValueError),
    (merging, "outs", {"outs": None}, TypeError),
    (merging, r"outs\[1\]", {"outs": Change(lambda outs: [outs[0], 3, outs[2]])}, TypeError),
    (merging, r"outs\[1\]", {"outs": Change(lambda outs: [outs[0], outs[1][:2], outs[2]])}, ValueError),
    (merging, r"outs\[2\]", {"outs": Change(lambda outs: [*outs[:2], outs[2].astype(np.float16)])}, ValueError),
    (merging, "outs", {"outs": Change(lambda outs: [out.astype(np.int64) for out in outs])}, ValueError),
    (merging, "outs", {"outs": Change(lambda outs: [out[0, 0] for out in outs])}, ValueError),
    (merging, "lses", {"lses": Change(lambda lses: lses[:2])}, ValueError),
    (merging, "lses", {"lses": Change(lambda lses: [lse.swapaxes(1, 2) for lse in lses])}, ValueError),
    (merging, "lses", {"lses": Change(lambda lses: [lse.astype(np.float64) for lse in lses])}, TypeError),
    (merging, "lses", {"lses": 0.0}, TypeError),
]  # fmt: skip


def changed(good: Arguments, changes: Arguments) -> Arguments:
    """The good arguments with bad ones among them."""
    return good | {
        name: value.change(good[name]) if isinstance(value, Change) else value for name, value in changes.items()
    }


def contents(arguments: Arguments) -> dict[str, bytes]:
    """What all arrays among the arguments hold."""
    arrays = {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}
    for name in ("outs", "lses"):
        if isinstance(arguments.get(name), list):
            arrays |= {f"{name}[{i}]": x for i, x in enumerate(arguments[name]) if isinstance(x, np.ndarray)}
    return {name: array.tobytes() for name, array in arrays.items()}


def test_there_are_many():
    assert len(BAD) >= 60


@pytest.mark.parametrize(
    ("make", "name", "changes", "error"),
    BAD,
    ids=[f"{make.__name__}-{number}-{'+'.join(changes)}" for number, (make, _, changes, _) in enumerate(BAD)],
)
def test_bad_input(make, name, changes, error):
    arguments = changed(make(), changes)
    before = contents(arguments)
    with pytest.raises(error, match=rf"(^|\W){name}(\W|$)") as raised:
        GOOD[make](**arguments)
    assert raised.type is error
    assert contents(arguments) == before


def with_pages_as_list(**changes: Any) -> Arguments:
    """Arguments of a call with a list of pages in a wider type, one of them in place of the first of the last row."""
    arguments = paged()
    table = arguments["page_table"].astype(np.int64)
    table[-1, 0] = 2**40
    indptr = np.arange(0, table.size + 1, table.shape[1])
    return arguments | {"page_table": (indptr, table.ravel())} | changes


def codes(**changes: Any) -> Arguments:
    """Arguments of a call with quantised caches."""
    arguments = contiguous()
    return arguments | {name: arguments[name].astype(np.int8) for name in ("k_cache", "v_cache")} | changes


def of_one_sequence(*starts: int) -> Arguments:
    """Arguments of a call with ragged queries of one sequence, three at most."""
    arguments = ragged()
    one = {name: arguments[name][:1] for name in ("k_cache", "v_cache", "cache_seqlens")}
    return arguments | one | {"cu_seqlens_q": np.array(starts, np.int32), "max_seqlen_q": 3}


MERGED = np.ones((BATCH, SEQLEN_Q, HEADS, DIM_V), np.float32)
MESSAGES: list[tuple[Arguments, str]] = [
    (with_pages_as_list(), r"page_table must .*, got 1099511627776 in row 2 for page 0$"),
    (
        paged() | {"page_table": np.full((BATCH, CAPACITY // PAGE_SIZE), 2**40)},
        r"page_table must .*, got 1099511627776 in",
    ),
    (of_one_sequence(0, 4), r"cu_seqlens_q must grow by at most max_seqlen_q=3, got 0, 4 at \[0\]$"),
    (of_one_sequence(4, 3), r"cu_seqlens_q must never decrease, got 4, 3 at \[0\]$"),
    (of_one_sequence(-1, 2), r"cu_seqlens_q must begin with 0 or more, got -1 at \[0\]$"),
    (contiguous() | {"merge_with": (MERGED,)}, r"merge_with must be a pair \(out, lse\), got 1 arrays$"),
    (
        contiguous() | {"out": MERGED, "merge_with": (MERGED[::-1], np.zeros((BATCH, HEADS, SEQLEN_Q), np.float32))},
        r"out must share no memory with merge_with\[0\], got overlapping arrays$",
    ),
    (
        codes(k_descale=np.ones((BATCH, KV_HEADS, CAPACITY), np.float32)),
        r"k_descale must be one number, \(batch, heads_kv\) \(3, 2\), or one per key and head \(3, 96, 2\) \(NHD\)",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), MESSAGES, ids=[message.split()[0] for _, message in MESSAGES])
def test_messages_say_what_was_given(arguments, message):
    """By the name of the argument and with the numbers that came, whatever becomes of them inside."""
    with pytest.raises(ValueError, match=f"^{message}"):
        cuflash.flash_attn_with_kvcache(**arguments)


def plan_of(arguments: Arguments) -> cuflash.SchedulerMetadata:
    """A plan that fits a good call."""
    new = arguments.get("k")
    return cuflash.get_scheduler_metadata(
        BATCH,
        arguments.get("max_seqlen_q", SEQLEN_Q),
        CAPACITY,
        HEADS,
        KV_HEADS,
        DIM,
        arguments["cache_seqlens"],
        "float32",
        DIM_V,
        page_size=PAGE_SIZE if "page_table" in arguments else None,
        max_seqlen_k_new=0 if new is None or "cu_seqlens_k_new" in arguments else new.shape[1],
        **{name: arguments[name] for name in ("cu_seqlens_q", "cu_seqlens_k_new") if name in arguments},
    )


@pytest.mark.parametrize(
    ("make", "changes"),
    [(make, changes) for make, _, changes, _ in BAD if GOOD[make] is cuflash.flash_attn_with_kvcache],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else value.__name__,
)
def test_bad_input_on_a_plan(make, changes):
    """Nor does a plan help, not even one that a good call has used."""
    good = make()
    good["scheduler_metadata"] = metadata = plan_of(good)
    for _ in range(2):
        cuflash.flash_attn_with_kvcache(**make(), scheduler_metadata=metadata)
    arguments = changed(good, changes)
    before, planned = contents(arguments), metadata.array.copy()
    says_why = r"\bmust\b|\bneeds?\b|was made for|exclude"
    with pytest.raises((TypeError, ValueError), match=says_why):
        cuflash.flash_attn_with_kvcache(**arguments)
    assert contents(arguments) == before
    np.testing.assert_array_equal(metadata.array, planned)


@pytest.mark.parametrize(
    ("queries", "cache", "headdim", "rule"),
    [
        ("float16", "int8", 320, r"^v_cache must be .* \(320, 128\) with queries of float16 and a cache of int8, got"),
        ("float32", "float32", 512, r"^v_cache must be .* \(512, 128\) with queries of float32 and a cache of float32"),
        ("float32", "float32", 128, r"^headdim and headdim_v must be .* got \(128, 320\) with queries of float32"),
    ],
)
def test_what_the_numpy_backend_alone_serves(queries, cache, headdim, rule, backend):
    """Keys that only joint rows may be as long as, and values that are too long, for what becomes float32."""
    rng = np.random.default_rng(2)
    headdim_v = 128 if headdim > 256 else 320
    k_cache, v_cache = (rng.integers(-3, 4, (1, 40, 1, dim)).astype(cache) for dim in (headdim, headdim_v))
    arguments = {"q": rng.standard_normal((1, 1, 2, headdim)).astype(queries), "k_cache": k_cache, "v_cache": v_cache}
    out = backend.to_native(np.full((1, 1, 2, headdim_v), 7, queries))
    given = {name: backend.to_native(array) for name, array in arguments.items()} | {"out": out}
    if backend.name == "numpy":
        cuflash.flash_attn_with_kvcache(**given)
        np.testing.assert_allclose(out, reference.attention(**arguments).out, atol=2e-3)
        return
    with pytest.raises(ValueError, match=rule):
        cuflash.flash_attn_with_kvcache(**given)
    assert (backend.to_numpy(out) == 7).all()


@pytest.mark.parametrize(
    ("variable", "value"), [("CUFLASH_BACKEND", "gpu"), ("CUFLASH_BACKEND", "cuda"), ("CUFLASH_NUM_SM", "0"),
                            ("CUFLASH_NUM_SM", "many"), ("CUFLASH_ARCH", "sm_90"), ("CUFLASH_ARCH", "79")]
)  # fmt: skip
@pytest.mark.parametrize("make", [planning, contiguous], ids=lambda make: make.__name__)
def test_bad_environment(make, variable, value, monkeypatch):
    if make is contiguous:
        if variable != "CUFLASH_BACKEND":
            pytest.skip("the NumPy backend plans nothing")
    monkeypatch.setenv(variable, value)
    arguments = make()
    before = contents(arguments)
    with pytest.raises(ValueError, match=rf"^{variable}\b.* (must|cannot|needs) "):
        GOOD[make](**arguments)
    assert contents(arguments) == before


# ------------------------------------------------------------------------------------------------ errors themselves
FINDING = Finding("bounds", "kernel", "a.cu", 3, (0, 0, 0), (1, 0, 0), "x + 4", "text", None, None, None, "ld", "text")
ERRORS = [cuflash.OutOfPages(3, 1), SimulationError([FINDING]), cuflash.ContextParallelError("rank 2 is missing", True)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_pass_between_processes(error: Exception) -> None:
    """As a pool of processes hands them on: all that they say is in the copy."""
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error)
        assert str(other) == str(error) and vars(other) == vars(error)
