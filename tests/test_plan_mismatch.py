"""A plan made for one problem and used for another raises ValueError naming the field; what may differ does."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from bench.standin import DeviceArray
from numpy.testing import assert_allclose, assert_array_equal

import cuflash
from cuflash.problem import Problem

SEQLENS = np.array([40, 7, 80], np.int32)


def plan(**options: Any) -> cuflash.SchedulerMetadata:
    """A plan for the problem of ``attend()``, but for what the options change."""
    arguments: dict[str, Any] = {
        "batch_size": 3, "max_seqlen_q": 2, "max_seqlen_k": 96, "num_heads_q": 4, "num_heads_kv": 2, "headdim": 64,
        "cache_seqlens": SEQLENS, "qkv_dtype": "float32",
    }  # fmt: skip
    return cuflash.get_scheduler_metadata(**(arguments | options))


def attend(metadata: Any, **options: Any) -> np.ndarray:
    """Attention of three sequences with two queries each."""
    rng = np.random.default_rng(0)
    arguments: dict[str, Any] = {
        "q": rng.standard_normal((3, 2, 4, 64), np.float32),
        "k_cache": rng.standard_normal((3, 96, 2, 64), np.float32),
        "v_cache": rng.standard_normal((3, 96, 2, 64), np.float32),
        "cache_seqlens": SEQLENS,
    }
    return cuflash.flash_attn_with_kvcache(**(arguments | options), scheduler_metadata=metadata)


# Another value of every field of a problem, and what a plan for it is made with.
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "batch_size": (2, {"batch_size": 2, "cache_seqlens": SEQLENS[:2]}),
    "max_seqlen_q": (1, {"max_seqlen_q": 1}),
    "num_heads_q": (8, {"num_heads_q": 8}),
    "num_heads_kv": (4, {"num_heads_kv": 4}),
    "headdim": (72, {"headdim": 72, "headdim_v": 64}),
    "headdim_v": (128, {"headdim_v": 128}),
    "qkv_dtype": ("float16", {"qkv_dtype": "float16"}),
    "kv_dtype": ("float8_e4m3fn", {"kv_dtype": "float8_e4m3fn"}),
    "cu_seqlens_q": (True, {"cu_seqlens_q": np.array([0, 2, 4, 6], np.int32)}),
    "page_size": (96, {"page_size": 96}),
    "window_size": ((9, -1), {"window_size": (9, -1)}),
    "attention_chunk": (32, {"attention_chunk": 32}),
    "has_softcap": (True, {"has_softcap": True}),
    "num_splits": (3, {"num_splits": 3}),
    "split_size": (64, {"split_size": 64}),
    "sm_margin": (4, {"sm_margin": 4}),
    "cp_world_size": (2, {"cp_world_size": 2}),
    "cp_rank": (1, {"cp_world_size": 2, "cp_rank": 1}),
    "cp_interleave": (16, {"cp_interleave": 16}),
}
OF_THE_PLAN = {"num_splits": 1, "split_size": 128, "sm_margin": 2}  # the call may be silent about them


def test_every_field_is_here():
    assert list(OTHERS) == [field.name for field in dataclasses.fields(Problem)]


@pytest.mark.parametrize("field", OTHERS)
def test_field(field):
    """The plan says one thing, the call another; the outputs and caches stay as they are."""
    metadata = plan(**OTHERS[field][1])
    called = {field: OF_THE_PLAN[field]} if field in OF_THE_PLAN else {}
    before = metadata.array.copy()
    out, lse = np.full((3, 2, 4, 64), 7, np.float32), np.full((3, 4, 2), 7, np.float32)
    # num_heads_q differs with num_heads_kv alone, and so on: the named field is the first that does.
    named = "cp_world_size" if field == "cp_rank" else field  # a rank needs a world, which differs first
    with pytest.raises(ValueError, match=rf"scheduler_metadata was made for {named}="):
        attend(metadata, out=out, softmax_lse=lse, **called)
    assert_array_equal(out, 7)
    assert_array_equal(lse, 7)
    assert_array_equal(metadata.array, before)


@pytest.mark.parametrize("field", OTHERS)
def test_field_alone(field):
    """Each field is compared for itself, whatever else is the same."""
    metadata = plan()
    problem = dataclasses.replace(metadata.problem, **{field: OTHERS[field][0]})
    called = {field: OF_THE_PLAN[field]} if field in OF_THE_PLAN else {}
    with pytest.raises(ValueError, match=rf"made for {field}="):
        attend(dataclasses.replace(metadata, problem=problem), **called)


@pytest.mark.parametrize("field", OTHERS)
def test_refilled_plan(field):
    """``out=`` refills a plan only for the problem it was made for."""
    _, options = OTHERS[field]
    metadata = plan()
    before = metadata.array.copy()
    named = "cp_world_size" if field == "cp_rank" else field
    with pytest.raises(ValueError, match=rf"out was made for another problem: {named} was"):
        plan(**options, out=metadata)
    assert_array_equal(metadata.array, before)


def test_refilled_plan_of_another_device(monkeypatch):
    metadata = plan()
    monkeypatch.setenv("CUFLASH_NUM_SM", "78")
    with pytest.raises(ValueError, match="device was"):
        plan(out=metadata)


def test_plan_in_other_memory():
    metadata = plan()
    with pytest.raises(ValueError, match="scheduler_metadata must be in host memory"):
        attend(dataclasses.replace(metadata, array=DeviceArray(metadata.array)))


@pytest.mark.parametrize("other", [plan().array, 1, "plan", plan().problem], ids=lambda x: type(x).__name__)
def test_not_a_plan(other):
    with pytest.raises(TypeError, match="scheduler_metadata must come from get_scheduler_metadata"):
        attend(other)


def test_pack_gqa():
    """Given and different it is an error; left out it says nothing."""
    with pytest.raises(ValueError, match="made for pack_gqa=True, but this call has pack_gqa=False"):
        attend(plan(pack_gqa=True), pack_gqa=False)
    assert_array_equal(attend(plan(pack_gqa=True), pack_gqa=True), attend(plan(pack_gqa=False)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_splits": 1},
        {"num_splits": 5},
        {"split_size": 64},
        {"sm_margin": 8},
        {"pack_gqa": True},
        {"pack_gqa": False},
        {"max_seqlen_k": 0},
        {"max_seqlen_k": 10**6},
        {"max_seqlen_k_new": 5},
        {"cu_seqlens_k_new": np.array([0, 1, 2, 30], np.int32)},
        {"cache_seqlens": np.array([1, 96, 0], np.int32)},
        {"cache_seqlens": 50},
        {"kv_dtype": "float32"},
        {"headdim_v": 64},
        {"qkv_dtype": np.float32},
        {"window_size": (-1, 1)},  # shows every key to two queries
    ],
    ids=str,
)
def test_what_may_differ(options):
    assert_allclose(attend(plan(**options)), attend(None), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"num_splits": 4}, {"split_size": 64}, {"sm_margin": 8}], ids=str)
def test_what_the_call_may_repeat(options):
    assert_array_equal(attend(plan(**options), **options), attend(plan(**options)))


def test_masks_are_compared_as_what_they_show():
    """A causal mask is a right bound of 0, however it is said."""
    assert_array_equal(attend(plan(causal=True), window_size=(-1, 0)), attend(plan(window_size=(-1, 0)), causal=True))
    for planned, called in ((True, False), (False, True)):
        with pytest.raises(ValueError, match=f"made for causal={planned}, but this call has causal={called}"):
            attend(plan(causal=planned), causal=called)


def test_ragged_queries_and_new_keys():
    """The total may differ from the plan's, the bound may not."""
    rng = np.random.default_rng(1)
    starts = np.array([0, 1, 1, 3], np.int32)
    q = rng.standard_normal((3, 4, 64), np.float32)
    metadata = plan(cu_seqlens_q=np.array([0, 2, 4, 6], np.int32))
    out = attend(metadata, q=q, cu_seqlens_q=starts, max_seqlen_q=2)
    assert_allclose(out, attend(None, q=q, cu_seqlens_q=starts, max_seqlen_q=2), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="made for max_seqlen_q=2, but this call has max_seqlen_q=3"):
        attend(metadata, q=q, cu_seqlens_q=starts, max_seqlen_q=3)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_seqlen_k_new": 1}, {"max_seqlen_k_new": 7}, {"cu_seqlens_k_new": np.array([0, 4, 5, 5], np.int32)}],
    ids=str,
)
def test_new_keys_are_lengths(options):
    """A plan made for other new keys, or for none, serves a call that appends some, ragged or not."""
    rng = np.random.default_rng(1)
    k, v = rng.standard_normal((2, 3, 1, 2, 64), np.float32)
    assert_allclose(attend(plan(**options), k=k, v=v), attend(None, k=k, v=v), rtol=1e-5, atol=1e-6)
    ragged = {"k": k[:, 0], "v": v[:, 0], "cu_seqlens_k_new": np.array([0, 1, 1, 3], np.int32)}
    assert_allclose(attend(plan(**options), **ragged), attend(None, **ragged), rtol=1e-5, atol=1e-6)
