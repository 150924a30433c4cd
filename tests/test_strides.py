"""Strides of axes of size 1 say nothing: whatever they are, the result is the same."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from inputs import make_inputs
from problems import DTYPES, Backend, Case, transfer
from small import DIM, PAGE, Arguments, call, native

import cuflash
from cuflash.memory import has_each_once, overlaps
from cuflash.packing import Packing

STRIDES = [0, 1, -1, 3, -(10**6), 2**38]  # in elements


def one_of_all(paged: bool = False, layout: str = "NHD", new: bool = False) -> Arguments:
    """One sequence, one query, one head, one page (or one key), and every array that a call may have."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    shape = (1, PAGE, 1, DIM) if layout == "NHD" else (1, 1, PAGE, DIM)
    arguments = {
        "q": normal(1, 1, 1, DIM),
        "k_cache": normal(*shape),
        "v_cache": normal(*shape),
        "cache_seqlens": np.array([9], np.int32),
        "cache_batch_idx": np.zeros(1, np.int32),
        "sinks": normal(1),
        "layout": layout,
        "out": normal(1, 1, 1, DIM),
        "softmax_lse": normal(1, 1, 1),
    }
    if paged:
        arguments["page_table"] = np.zeros((1, 1), np.int32)
    else:
        arguments["cache_leftpad"] = np.array([2], np.int32)
    if new:
        arguments |= {name: normal(1, 1, 1, DIM) for name in "kv"}
        arguments |= {
            "rotary_cos": normal(PAGE, 8),
            "rotary_sin": normal(PAGE, 8),
            "rotary_seqlens": np.ones(1, np.int32),
        }
    return arguments


def restride(array: Any, axis: int, stride: int, backend: Backend) -> Any:
    """The same array with another stride along an axis of size 1."""
    assert array.shape[axis] == 1
    strides = list(array.strides)
    strides[axis] = stride * array.itemsize
    if backend.name == "cuda":
        import cupy

        return cupy.ndarray(array.shape, array.dtype, array.data, strides)
    return np.lib.stride_tricks.as_strided(array, strides=strides)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize(
    "options",
    [{}, {"paged": True}, {"layout": "HND"}, {"new": True}, {"new": True, "paged": True, "layout": "HND"}],
    ids=str,
)
def test_axes_of_size_one(options: dict[str, Any], stride: int, backend: Backend) -> None:
    """Each array by itself, and all together; on a second call with a plan, too."""
    arguments = one_of_all(**options)
    wanted = [x.tobytes() for x in call(native(arguments, backend), backend)]
    axes = {
        name: [axis for axis, n in enumerate(x.shape) if n == 1]
        for name, x in arguments.items()
        if isinstance(x, np.ndarray)
    }
    plan = cuflash.get_scheduler_metadata(
        1, 1, PAGE, 1, 1, DIM, backend.to_native(arguments["cache_seqlens"]), "float32",
        cache_leftpad=backend.to_native(arguments["cache_leftpad"]) if "cache_leftpad" in arguments else None,
        page_size=PAGE if "page_table" in arguments else None, max_seqlen_k_new=1 if "k" in arguments else 0,
    )  # fmt: skip
    for names in [[name] for name, ones in axes.items() if ones] + [list(axes)]:
        given = native(arguments, backend)
        for name in names:
            for axis in axes[name]:
                given[name] = restride(given[name], axis, stride, backend)
        for made in (None, plan):
            found = [x.tobytes() for x in call(given, backend, scheduler_metadata=made)]
            assert found == wanted, names


def test_one_column_of_pages(backend: Backend) -> None:
    """Views that are made every day."""
    rng = np.random.default_rng(1)
    q = rng.standard_normal((2, 1, 4, DIM), np.float32)
    k_cache, v_cache = rng.standard_normal((2, 3, PAGE, 2, DIM), np.float32)
    lengths = np.array([5, 9], np.int32)
    arrays = [backend.to_native(x) for x in (q, k_cache, v_cache)]
    options = {"cache_seqlens": backend.to_native(lengths)}
    pages = backend.to_native(np.arange(2, dtype=np.int32))
    wide = backend.to_native(np.array([[0, 7], [1, 7]], np.int32))
    results = [
        cuflash.flash_attn_with_kvcache(*arrays, **options, page_table=table)
        for table in (wide, pages[:, None], wide[:, :1], wide[:, ::2], wide[:, -2::-2])
    ]
    for result in results:
        np.testing.assert_array_equal(backend.to_numpy(result), backend.to_numpy(results[0]))


@pytest.mark.parametrize("name", ["cache_batch_idx", "cache_seqlens", "cache_leftpad"])
def test_every_other_of_one(name: str, backend: Backend) -> None:
    rng = np.random.default_rng(2)
    q = rng.standard_normal((1, 1, 2, DIM), np.float32)
    k_cache, v_cache = rng.standard_normal((2, 3, PAGE, 2, DIM), np.float32)
    arguments = {"q": q, "k_cache": k_cache, "v_cache": v_cache} | {
        "cache_batch_idx": np.array([1], np.int32),
        "cache_seqlens": np.array([9], np.int32),
        "cache_leftpad": np.array([2], np.int32),
    }
    given = native(arguments, backend)
    wanted = call(given, backend)
    both = backend.to_native(np.concatenate([arguments[name], arguments[name]]))
    for view in (both[::2], both[::-2], both[1::5]):
        found = call(given | {name: view}, backend)
        for x, y in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["q", "k", "v", "tree_mask", "cache_seqlens"])
def test_elements_that_are_all_one(name: str, backend: Backend) -> None:
    """What a broadcast makes of one element is an array like any other."""
    rng = np.random.default_rng(3)
    given: dict[str, Any] = {
        "q": rng.standard_normal((2, 3, 4, DIM), np.float32), "cache_seqlens": np.array([5, 9], np.int32),
        "page_table": rng.permutation(4).reshape(2, 2).astype(np.int32),
        **{cache: rng.standard_normal((4, PAGE, 2, DIM), np.float32) for cache in ("k_cache", "v_cache")},
    }  # fmt: skip
    if name == "tree_mask":
        given["tree_mask"] = np.array([[[True] * 3, [False] * 3, [True] * 3]] * 2)
    else:
        given |= {new: rng.standard_normal((2, 3, 2, DIM), np.float32) for new in ("k", "v")}
    array = given[name]
    wanted = given | {name: np.ascontiguousarray(np.broadcast_to(array[..., :1], array.shape))}
    results = []
    for arguments in (wanted, given | {name: None}):
        copies = {key: x if x is None else backend.to_native(x.copy()) for key, x in arguments.items()}
        if copies[name] is None:
            first = backend.to_native(array.copy())[..., :1]  # rows that begin at multiples of 16 bytes
            copies[name] = importlib.import_module(type(first).__module__.split(".")[0]).broadcast_to(
                first, array.shape
            )
        results.append([*call(copies, backend), *(backend.to_numpy(copies[c]) for c in ("k_cache", "v_cache"))])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_pages_of_one_key(backend: Backend) -> None:
    """The axis inside a page has one entry, and any stride."""
    rng = np.random.default_rng(3)
    q = rng.standard_normal((1, 1, 2, DIM), np.float32)
    k_cache, v_cache = rng.standard_normal((2, 8, 1, 2, DIM), np.float32)
    arguments = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": np.array([5], np.int32)}
    given = native(arguments | {"page_table": np.array([[7, 2, 3, 0, 1]], np.int32)}, backend)
    wanted = call(given, backend)[0]
    for stride in STRIDES:
        views = {name: restride(given[name], 1, stride, backend) for name in ("k_cache", "v_cache")}
        np.testing.assert_array_equal(call(given | views, backend)[0], wanted)


@pytest.mark.parametrize(
    "case",
    [
        Case(seqlens=(130, 5, 0), heads=(4, 2)),
        Case(seqlens=(70, 3), seqlens_q=3, causal=True, new=3, dtype="bfloat16", page_size=16),
        Case(seqlens=(40, 90), seqlens_q=(1, 5), unowned=(1, 2), heads=(12, 2), dtype="float16"),
        Case(seqlens=(50, 5), seqlens_q=30, causal=True, heads=(12, 2), headdim=(96, 64), dtype="bfloat16"),
        Case(seqlens=(50, 5), headdim=(576, 512), mla="joint", heads=(16, 1), dtype="bfloat16"),
    ],
    ids=["decode", "append", "ragged", "many rows", "latent"],
)
def test_results_that_take_turns(case: Case, backend: Backend) -> None:
    """Output and LSE of a head after those of another, in one buffer, whose other bytes stay as they are."""
    inputs = make_inputs(case)
    out, lse = call(transfer(inputs, backend), backend)
    packing = Packing(out.shape[:-2], 1, out.shape[-1], DTYPES[case.out_dtype])
    blocks = np.full((out.shape[-2], packing.nbytes), 99, np.uint8)
    wanted = blocks.copy()
    packing.fill(wanted, out, lse)
    given = backend.to_native(blocks)
    place, place_lse = packing.in_place(given)
    for repeated in (False, True):
        found = call(transfer(inputs, backend) | {"out": place, "softmax_lse": place_lse}, backend)
        assert [x.tobytes() for x in found] == [out.tobytes(), lse.tobytes()], repeated
        np.testing.assert_array_equal(backend.to_numpy(given), wanted)


def test_what_shares_memory() -> None:
    memory = np.zeros((6, 10), np.float32)
    left, right, middle = memory[:, :4], memory[:, 4:], memory[:, 3:6]
    for one, other, wanted in [
        (left, right, False), (right, left, False), (left, middle, True), (right, middle, True), (left, left, True),
        (left[2:], right[:3], False), (left[:2], left[2:], False), (left[::2], left[1::2], False),
        (left, memory[0, 4:], False), (left, memory[0, 3:], True),
        (left[::-1], left[::-1], True), (memory[0, :1], memory[0, :1], True), (left[:0], left, False),
        (memory.T[:4], memory.T[4:], False),
    ]:  # fmt: skip
        assert overlaps(one, other) == wanted
        assert wanted or not np.shares_memory(one, other)
    rows = np.zeros((3, 4, 5, 8), np.float32)
    for one, other, wanted in [
        (rows[..., :3], rows[..., 3:], False), (rows[..., :3], rows[..., 2:], True),
        (rows[:, ::2], rows[:, 1::2], False),
        (rows[:, :, ::2], rows[:, :, 1::2], False), (rows[:, ::-1, :2], rows[:, :, 2:], False),
        (rows[:, ::-1, :3], rows[:, :, 2:], True), (rows[1:], rows[:-1, :, :2], True), (rows[0, 0], rows[1], False),
        (rows[:, :2, :, :4].swapaxes(0, 1), rows[:, :, :, 4:], False), (rows[::2, :, 3], rows[1:2, :, 3], False),
    ]:  # fmt: skip
        assert overlaps(one, other) == overlaps(other, one) == wanted
    assert has_each_once(left) and has_each_once(memory.T) and has_each_once(memory[:1])
    assert has_each_once(left[::-1]) and not has_each_once(np.broadcast_to(memory, (2, 6, 10)))
    assert not has_each_once(np.lib.stride_tricks.as_strided(memory, (3, 4), (12, 4)))
    assert has_each_once(np.zeros((0, 6))) and has_each_once(np.zeros((3, 0, 6)))


def test_what_shares_memory_by_chance() -> None:
    """Whatever NumPy's solver finds is found."""
    rng = np.random.default_rng(0)
    memory, found = np.zeros(400, np.uint8), 0
    for _ in range(3000):
        views = []
        steps = rng.choice([1, 2, 3, 4, 12, 24, 72, 80, 120], 3)
        for _ in range(2):
            shape, signs = rng.integers(1, 4, 3), rng.choice([-1, 1], 3)
            strides = signs * np.where(rng.random(3) < 0.9, steps, rng.integers(0, 50, 3))
            reach = ((shape - 1) * strides).clip(max=0).sum(), ((shape - 1) * strides).clip(min=0).sum()
            if reach[1] - reach[0] >= len(memory):
                break
            start = int(rng.integers(-reach[0], len(memory) - reach[1]))
            views.append(np.ndarray(tuple(shape), np.uint8, memory, start, tuple(strides)))
        else:
            shares = np.shares_memory(*views)
            found += not shares and np.may_share_memory(*views) and not overlaps(*views)
            assert overlaps(*views) or not shares
    assert found > 50
