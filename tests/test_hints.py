"""Errors that name what is behind a mistake: a forgotten page table, the other layout, another library's names."""

from __future__ import annotations

import inspect
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_bad_input import BATCH, CAPACITY, DIM, DIM_V, HEADS, KV_HEADS, PAGE_SIZE, contiguous, paged, planning

import cuflash
from cuflash.arguments.hints import _PEERS
from cuflash.dtypes import FLOAT_DTYPES

LENGTHS = np.array([40, 7, 80], np.int32)


def fails(error: type[Exception], words: str, call: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(error) as raised:
        call(**arguments)
    assert words in str(raised.value)


# ---------------------------------------------------------------------------------------- a forgotten page_table
def test_a_forgotten_page_table() -> None:
    fails(ValueError, f"pages of {PAGE_SIZE} keys, page_table is missing", cuflash.flash_attn_with_kvcache,
          paged() | {"page_table": None})  # fmt: skip


def test_a_forgotten_page_table_of_as_many_pages_as_sequences() -> None:
    arguments = paged()
    arguments |= {name: arguments[name][:BATCH] for name in ("k_cache", "v_cache")} | {"page_table": None}
    fails(ValueError, "page_table is missing", cuflash.flash_attn_with_kvcache, arguments)


def test_a_forgotten_page_table_with_a_plan() -> None:
    meta = cuflash.get_scheduler_metadata(**planning(), page_size=PAGE_SIZE)
    arguments = paged() | {"page_table": None, "scheduler_metadata": meta}
    fails(ValueError, "page_size=None: page_table is missing", cuflash.flash_attn_with_kvcache, arguments)


# ------------------------------------------------------------------------------------------------ layouts
def test_caches_of_heads_first() -> None:
    arguments = contiguous()
    arguments |= {name: arguments[name].swapaxes(1, 2).copy() for name in ("k_cache", "v_cache")}
    fails(ValueError, 'need layout="HND"', cuflash.flash_attn_with_kvcache, arguments)
    fails(ValueError, "a multiple of k_cache's num_heads_kv=", cuflash.flash_attn_with_kvcache, arguments)
    cuflash.flash_attn_with_kvcache(**arguments, layout="HND")
    fails(ValueError, 'need layout="NHD"', cuflash.flash_attn_with_kvcache, contiguous() | {"layout": "HND"})


def test_pages_of_heads_first_that_only_a_plan_can_tell() -> None:
    """Two keys per page and four heads could be four keys of two heads."""
    caches = {name: np.zeros((60, 2, 4, 64), np.float32) for name in ("k_cache", "v_cache")}
    table, q = np.arange(60, dtype=np.int32).reshape(3, 20), np.zeros((3, 1, 4, 64), np.float32)
    meta = cuflash.get_scheduler_metadata(3, 1, 40, 4, 2, 64, 40, "float32", page_size=4)
    arguments = {"q": q, **caches, "cache_seqlens": 40, "page_table": table, "scheduler_metadata": meta}
    fails(ValueError, "is the layout of the caches the other one?", cuflash.flash_attn_with_kvcache, arguments)


# ------------------------------------------------------------------------------------------------ names
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("block_table", "page_table"), ("block_tables", "page_table"), ("seq_lens", "cache_seqlens"), ("s_aux", "sinks"),
     ("sm_scale", "softmax_scale"), ("paged_kv_indices", "page_table=(indptr, indices)"), ("kv_layout", "layout")],
)  # fmt: skip
def test_names_of_others(theirs: str, ours: str) -> None:
    words = f"flash_attn_with_kvcache() has no argument {theirs!r}: here it is {ours}"
    fails(TypeError, words, cuflash.flash_attn_with_kvcache, contiguous() | {theirs: LENGTHS})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("num_heads_k", "num_heads_kv"), ("page_table", "page_size"), ("softcap", "has_softcap"), ("dtype", "qkv_dtype")],
)
def test_names_of_others_in_a_plan(theirs: str, ours: str) -> None:
    words = f"get_scheduler_metadata() has no argument {theirs!r}: here it is {ours}"
    fails(TypeError, words, cuflash.get_scheduler_metadata, planning() | {theirs: 1})


def test_other_type_errors_stay() -> None:
    fails(TypeError, "unexpected keyword argument 'nonsense'", cuflash.flash_attn_with_kvcache, {"nonsense": 1})
    fails(TypeError, "missing 3 required positional arguments", cuflash.flash_attn_with_kvcache, {})
    fails(TypeError, "num_heads_q must be an integer", cuflash.get_scheduler_metadata, planning() | {"num_heads_q": ""})
    fails(TypeError, "unexpected keyword argument 'kv_cache'", cuflash.get_scheduler_metadata, {"kv_cache": 1})


def test_hints_name_what_exists() -> None:
    functions = cuflash.flash_attn_with_kvcache, cuflash.get_scheduler_metadata
    names = {name for function in functions for name in inspect.signature(function).parameters}
    assert not names & _PEERS.keys()
    assert {hint.replace("=", ",").split(",")[0].split()[0] for hint in _PEERS.values()} <= names


# ------------------------------------------------------------------------------------------------ dtypes
@pytest.mark.parametrize("dtype", ["float64", "uint16", np.int32, "float8_e5m2"])
def test_allowed_dtypes_are_allowed(dtype: Any) -> None:
    """All that the error about a dtype lists can be planned for (float8 queries as soon as they are there)."""
    with pytest.raises(ValueError, match="qkv_dtype must be one of ") as raised:
        cuflash.get_scheduler_metadata(**planning() | {"qkv_dtype": dtype})
    listed = str(raised.value).split("one of ")[1].split(", got")[0].split(", ")
    assert set(FLOAT_DTYPES) <= set(listed) <= {*FLOAT_DTYPES, "float8_e4m3fn"}
    for name in FLOAT_DTYPES:
        cuflash.get_scheduler_metadata(**planning() | {"qkv_dtype": name})


def test_bits_of_bfloat16() -> None:
    arguments = contiguous() | {"q": np.zeros((BATCH, 2, HEADS, DIM), np.uint16)}
    fails(ValueError, "view(ml_dtypes.bfloat16)", cuflash.flash_attn_with_kvcache, arguments)


@pytest.mark.parametrize("name", ["sinks", "outs"])
def test_dtypes_of_what_is_not_a_cache(name: str) -> None:
    """Quantised types are those of caches alone."""
    for dtype in (np.int8, ml_dtypes.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"{name} must be one of float16, bfloat16, float32, got"):
            if name == "sinks":
                cuflash.flash_attn_with_kvcache(**contiguous(), sinks=np.zeros(HEADS, dtype))
            else:
                out = np.zeros((BATCH, 2, HEADS, DIM_V), dtype)
                cuflash.merge_attn_states([out], [np.zeros((BATCH, HEADS, 2), np.float32)])


def test_dtypes_of_torch() -> None:
    torch = pytest.importorskip("torch")
    for name in FLOAT_DTYPES:
        arguments = planning() | {"qkv_dtype": getattr(torch, name)}
        assert cuflash.get_scheduler_metadata(**arguments).problem.qkv_dtype == name
    fails(ValueError, "got 'float64'", cuflash.get_scheduler_metadata, planning() | {"qkv_dtype": torch.float64})


# ------------------------------------------------------------------------------------------------ swapped bounds
def test_swapped_bounds() -> None:
    message = "max_seqlen_q=96 and max_seqlen_k=1 look swapped: cache_seqlens goes up to 80"
    with pytest.warns(UserWarning, match=message) as warned:
        meta = cuflash.get_scheduler_metadata(BATCH, CAPACITY, 1, HEADS, KV_HEADS, DIM, LENGTHS, "float32")
    assert warned[0].filename == __file__
    cache = np.zeros((BATCH, CAPACITY, KV_HEADS, DIM), np.float32)
    with pytest.raises(ValueError, match="look swapped"):
        cuflash.flash_attn_with_kvcache(
            np.zeros((BATCH, 1, HEADS, DIM), np.float32), cache, cache, cache_seqlens=LENGTHS, scheduler_metadata=meta
        )


@pytest.mark.parametrize(("most_q", "most_k"), [(1, 96), (96, 96), (1, 8), (60, 30), (96, 80)])
def test_bounds_that_are_not_swapped(most_q: int, most_k: int) -> None:
    """Lengths beyond max_seqlen_k are legal, and so are many queries on few keys."""
    cuflash.get_scheduler_metadata(BATCH, most_q, most_k, HEADS, KV_HEADS, DIM, LENGTHS, "float32")


def test_arrays_where_names_belong() -> None:
    """Comparing them with names raises errors of its own."""
    arguments = contiguous()
    for array in (np.zeros(2), np.zeros(0)):
        with pytest.raises(TypeError, match="^layout must be"):
            cuflash.flash_attn_with_kvcache(**arguments, layout=array)
    torch = pytest.importorskip("torch")
    with pytest.raises((TypeError, ValueError), match="^kv_dtype must be"):
        cuflash.flash_attn_with_kvcache(**arguments, kv_dtype=torch.zeros(3))
