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
