"""Appending what overlaps the slots that are written: as if copied before, or a ValueError, the same everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
from conftest import BACKENDS as ALL_BACKENDS
from small import BATCH, CAPACITY, DIM, KV_HEADS, PAGE, Arguments, contiguous, paged

import cuflash

BACKENDS = [name for name in ALL_BACKENDS if name != "cuda"]
NEW = 10


def appending_at(seqlen: int) -> Arguments:
    arguments = contiguous()
    rng = np.random.default_rng(3)
    new = rng.standard_normal((2, BATCH, NEW, KV_HEADS, DIM), np.float32)
    return arguments | {"k": new[0], "v": new[1], "cache_seqlens": np.full(BATCH, seqlen, np.int32)}


def part_of(target: str, source: str, start: int, step: int = 1) -> Callable[[Arguments], None]:
    """New keys (or values) that are a part of a cache."""

    def change(arguments: Arguments) -> None:
        arguments[target] = arguments[source][:, start : start + step * NEW : step]

    return change


def reversed_part(arguments: Arguments) -> None:
    arguments["k"] = arguments["k_cache"][:, 19:9:-1]


def other_sequence(arguments: Arguments) -> None:
    """The new keys of each sequence are those of the next one."""
    arguments["k"] = arguments["k_cache"][::-1, 10 : 10 + NEW]


def other_heads(arguments: Arguments) -> None:
    arguments["k"] = arguments["k_cache"][:, 10 : 10 + NEW, ::-1]


def both(arguments: Arguments) -> None:
    part_of("k", "k_cache", 5)(arguments)
    part_of("v", "v_cache", 5)(arguments)


def queries(arguments: Arguments) -> None:
    arguments["q"] = arguments["k_cache"].reshape(BATCH, CAPACITY * KV_HEADS // 4, 4, DIM)[:, 5:7]


CHANGES: dict[str, Callable[[Arguments], None]] = {
    "keys before": part_of("k", "k_cache", 5),
    "keys behind": part_of("k", "k_cache", 15),
    "the same slots": part_of("k", "k_cache", 10),
    "every other": part_of("k", "k_cache", 4, 2),
    "backwards": reversed_part,
    "values": part_of("v", "v_cache", 5),
    "keys of values": part_of("k", "v_cache", 5),
    "values of keys": part_of("v", "k_cache", 5),
    "both": both,
    "of another sequence": other_sequence,
    "of other heads": other_heads,
    "beside": part_of("k", "k_cache", 30),
    "queries": queries,
}


def outcome(arguments: Arguments, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call on a backend; return out and caches, or the name of the array that was refused."""
    monkeypatch.setenv("CUFLASH_BACKEND", name)
    try:
        out = cuflash.flash_attn_with_kvcache(**arguments)
    except ValueError as error:
        assert re.search(r"\b[kvq](_cache)?\b", str(error)), error
        return "refused"
    return out, arguments["k_cache"].copy(), arguments["v_cache"].copy()


@pytest.mark.parametrize("plan", ["none", "given", "used"])
@pytest.mark.parametrize("change", CHANGES)
def test_overlapping_append(change: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for name in BACKENDS:
        arguments = appending_at(10)
        CHANGES[change](arguments)
        wanted = reference.attention(**arguments)
        caches = [arguments[cache].copy() for cache in ("k_cache", "v_cache")]
        if plan != "none":
            monkeypatch.setenv("CUFLASH_BACKEND", name)
            arguments["scheduler_metadata"] = cuflash.get_scheduler_metadata(
                BATCH, 2, CAPACITY, 4, KV_HEADS, DIM, arguments["cache_seqlens"], "float32", max_seqlen_k_new=NEW
            )
        if plan == "used":
            for _ in range(2):
                cuflash.flash_attn_with_kvcache(
                    **appending_at(10) | {"scheduler_metadata": arguments["scheduler_metadata"]}
                )
        result = outcome(arguments, name, monkeypatch)
        results.append(isinstance(result, str))
        if isinstance(result, str):
            assert all((arguments[n] == x).all() for n, x in zip(("k_cache", "v_cache"), caches, strict=True))
            continue
        np.testing.assert_array_equal(result[1], wanted.k_cache, err_msg=f"k_cache on {name}")
        np.testing.assert_array_equal(result[2], wanted.v_cache, err_msg=f"v_cache on {name}")
        np.testing.assert_allclose(result[0], wanted.out, atol=2e-5, err_msg=f"out on {name}")
    assert len(set(results)) == 1, "refused on one backend only"


@pytest.mark.parametrize("page", [0, 3])
def test_overlapping_pages(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """New keys that are a page, written to that page or to another one."""
    results = []
    for name in BACKENDS:
        arguments = paged()
        arguments["page_table"] = np.arange(BATCH * CAPACITY // PAGE, dtype=np.int32).reshape(BATCH, -1)
        arguments["cache_seqlens"] = np.array([4, 4, 4], np.int32)
        arguments["k"] = arguments["k_cache"][page : page + BATCH, 2:7]
        arguments["v"] = np.ones((BATCH, 5, KV_HEADS, DIM), np.float32)
        wanted = reference.attention(**arguments)
        result = outcome(arguments, name, monkeypatch)
        results.append(isinstance(result, str))
        if not isinstance(result, str):
            np.testing.assert_array_equal(result[1], wanted.k_cache, err_msg=name)
            np.testing.assert_allclose(result[0], wanted.out, atol=2e-5, err_msg=name)
    assert len(set(results)) == 1, "refused on one backend only"


# ------------------------------------------------------------------------------------------- what an append writes
def one_buffer(shape: tuple[int, ...], first: Callable[..., Any], second: Callable[..., Any]) -> Callable[..., None]:
    """Both caches in one buffer of float32."""

    def change(arguments: Arguments) -> None:
        buffer = np.random.default_rng(4).standard_normal(shape, np.float32)
        arguments |= {"k_cache": first(buffer), "v_cache": second(buffer)}

    return change


APART: dict[str, Callable[[Arguments], None]] = {
    "sequence": one_buffer((BATCH, 2, CAPACITY, KV_HEADS, DIM), lambda x: x[:, 0], lambda x: x[:, 1]),
    "token": one_buffer((BATCH, CAPACITY, 2, KV_HEADS, DIM), lambda x: x[:, :, 0], lambda x: x[:, :, 1]),
    "head": one_buffer((BATCH, CAPACITY, 2 * KV_HEADS, DIM), lambda x: x[:, :, ::2], lambda x: x[:, :, 1::2]),
    "row": one_buffer((BATCH, CAPACITY, KV_HEADS, 2 * DIM), lambda x: x[..., DIM:], lambda x: x[..., :DIM]),
    "every other token": one_buffer((BATCH, 2 * CAPACITY, KV_HEADS, DIM), lambda x: x[:, ::2], lambda x: x[:, 1::2]),
}
MEETING: dict[str, Callable[[Arguments], None]] = {
    "sequence": one_buffer((BATCH + 1, CAPACITY, KV_HEADS, DIM), lambda x: x[1:], lambda x: x[:-1]),
    "token": one_buffer((BATCH, CAPACITY + 1, KV_HEADS, DIM), lambda x: x[:, 1:], lambda x: x[:, :-1]),
    "head": one_buffer((BATCH, CAPACITY, KV_HEADS + 1, DIM), lambda x: x[:, :, 1:], lambda x: x[:, :, :-1]),
    "row": one_buffer((BATCH, CAPACITY, KV_HEADS, DIM + 4), lambda x: x[..., 4:], lambda x: x[..., :-4]),
}


@pytest.mark.parametrize("change", APART)
def test_caches_that_take_turns(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BACKENDS:
        arguments = appending_at(10)
        APART[change](arguments)
        wanted = reference.attention(**arguments)
        out, k_cache, v_cache = outcome(arguments, name, monkeypatch)
        np.testing.assert_array_equal(k_cache, wanted.k_cache)
        np.testing.assert_array_equal(v_cache, wanted.v_cache)
        np.testing.assert_allclose(out, wanted.out, atol=2e-5)


@pytest.mark.parametrize("change", MEETING)
def test_caches_that_meet(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be read, and not appended to: which of two elements would be written last?"""
    for name in BACKENDS:
        arguments = appending_at(10)
        MEETING[change](arguments)
        assert outcome(arguments, name, monkeypatch) == "refused"
        only_read = {key: x for key, x in arguments.items() if key not in ("k", "v")}
        wanted = reference.attention(**only_read)
        np.testing.assert_allclose(outcome(only_read, name, monkeypatch)[0], wanted.out, atol=2e-5)


@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_caches_of_repeated_elements(cache: str, axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BACKENDS:
        arguments = appending_at(10)
        strides = [0 if i == axis else stride for i, stride in enumerate(arguments[cache].strides)]
        arguments[cache] = np.lib.stride_tricks.as_strided(arguments[cache], strides=strides)
        assert outcome(arguments, name, monkeypatch) == "refused"


def small_arrays(arguments: Arguments) -> dict[str, Callable[[np.ndarray], Any]]:
    """Arguments that a call reads, made of the first elements of a slot that is written."""
    rows = arguments["q"].shape[:2]

    def integers(slot: np.ndarray, shape: tuple[int, ...], values: Any) -> np.ndarray:
        view = slot[: np.prod(shape)].view(np.int32).reshape(shape)
        view[...] = values
        return view

    return {
        "sinks": lambda slot: slot[:4],
        "cache_seqlens": lambda slot: integers(slot, (BATCH,), 10),
        "cache_leftpad": lambda slot: integers(slot, (BATCH,), 1),
        "cache_batch_idx": lambda slot: integers(slot, (BATCH,), [1, 0, 2]),
        "rotary_cos": lambda slot: slot[: 32 * 8].reshape(32, 8),
        "page_table": lambda slot: (integers(slot, (BATCH + 1,), range(BATCH + 1)), np.arange(BATCH)),
        "merge_with": lambda slot: (np.ones((*rows, 4, DIM), np.float32), slot[: BATCH * 8].reshape(BATCH, 4, 2)),
    }


@pytest.mark.parametrize("read", small_arrays(appending_at(10)))
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_what_is_read_in_slots_that_are_written(cache: str, read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BACKENDS:
        arguments = appending_at(10)
        given = small_arrays(arguments)[read](arguments[cache][1, 10:].reshape(-1))
        more = {"rotary_sin": np.ones((32, 8), np.float32)} if read == "rotary_cos" else {}
        before = arguments[cache].copy()
        monkeypatch.setenv("CUFLASH_BACKEND", name)
        with pytest.raises(ValueError, match=rf"{cache} must share no memory with {read}(\[[01]\])?, "):
            cuflash.flash_attn_with_kvcache(**arguments | {read: given} | more)
        np.testing.assert_array_equal(arguments[cache], before)


def test_latent_queries_in_slots_that_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BACKENDS:
        rng = np.random.default_rng(3)
        q, k, k_cache, v, v_cache = (
            rng.standard_normal(shape, np.float32)
            for shape in ((2, 2, 4, 64), (2, 5, 1, 64), (2, 60, 1, 64), (2, 5, 1, 512), (2, 60, 1, 512))
        )
        arguments = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
        arguments |= {"cache_seqlens": np.array([10, 12], np.int32)}
        arguments["qv"] = np.lib.stride_tricks.as_strided(
            v_cache[:, 8:16], (2, 2, 4, 512), (v_cache.strides[0], 4 * v_cache.strides[1], v_cache.strides[1], 4)
        )
        wanted = reference.attention(**arguments | {"v_cache": v_cache.copy(), "qv": arguments["qv"].copy()})
        np.testing.assert_allclose(outcome(arguments, name, monkeypatch)[0], wanted.out, atol=5e-5, err_msg=name)


def test_scales_that_an_append_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values have scales of their own; those may take turns in a buffer, in any direction."""
    buffer = np.full((BATCH, CAPACITY, 2 * KV_HEADS), 0.02, np.float32)
    repeated = np.lib.stride_tricks.as_strided(buffer, (BATCH, CAPACITY, KV_HEADS), (*buffer.strides[:2], 0))
    for name in BACKENDS:
        for k_scale, v_scale, is_right in [
            (buffer[..., ::2], buffer[..., 1::2], True), (buffer[..., 2::-2], buffer[..., 3::-2], True),
            (buffer[..., :2], buffer[..., :2], False), (buffer[..., :2], buffer[..., 1:3], False),
            (repeated, buffer[..., 2:], False),
        ]:  # fmt: skip
            arguments = appending_at(10)
            for cache in ("k_cache", "v_cache"):
                arguments[cache] = np.rint(40 * arguments[cache]).clip(-127, 127).astype(np.int8)
            arguments |= {"k_descale": k_scale, "v_descale": v_scale}
            wanted = reference.attention(**arguments)
            monkeypatch.setenv("CUFLASH_BACKEND", name)
            if is_right:
                out = cuflash.flash_attn_with_kvcache(**arguments)
                np.testing.assert_allclose(out, wanted.out, atol=2e-5)
            else:
                with pytest.raises(ValueError, match="k_descale must"):
                    cuflash.flash_attn_with_kvcache(**arguments)
