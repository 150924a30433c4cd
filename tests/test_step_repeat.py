"""Repeated calls of a step: what does not change from call to call is spelled once, and nothing goes unchecked."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.standin import DeviceArray, ForeignArray, Tensor, filled, gpu
from test_paged import Server
from test_repeat import SimulatedGpu, forbid_checks

import cuflash
from cuflash import memo
from cuflash.device import Device

TOKENS, HEADS, HEADS_KV, DIM = 2, 4, 2, 64


@pytest.fixture
def machine() -> Iterator[SimulatedGpu]:
    machine = SimulatedGpu()
    with gpu(Device(4, 90), machine):
        yield machine


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of all calls that are not repeated."""
    calls: list[dict[str, Any]] = []
    call = memo.Rest.afresh

    def spy(self: memo.Rest, given: dict[str, Any], view: Any) -> Any:
        calls.append(given)
        return call(self, given, view)

    monkeypatch.setattr(memo.Rest, "afresh", spy)
    return calls


def begun(**options: Any) -> cuflash.DecodeStep:
    """A step of two sequences, with a token each."""
    cache = cuflash.PagedKVCache(
        2, 8, 16, HEADS_KV, DIM, "float32", max_sequences=4, max_seqlen=64, xp=sys.modules["cupy"]
    )
    step = cuflash.DecodeStep(cache, HEADS)
    return step.begin([cache.add() for _ in range(TOKENS)], **options)


def inputs(seed: int = 0, rows: int = TOKENS) -> dict[str, DeviceArray]:
    rng = np.random.default_rng(seed)
    heads = {"q": HEADS, "k": HEADS_KV, "v": HEADS_KV}
    return {name: DeviceArray(rng.standard_normal((rows, number, DIM), np.float32)) for name, number in heads.items()}


def output() -> DeviceArray:
    return filled(7, (TOKENS, HEADS, DIM), np.float32)


@pytest.mark.parametrize("options", [{}, {"rotary_dim": 32}], ids=["", "rotary"])
def test_steps_of_a_server(options: Any, machine: SimulatedGpu, afresh: list[Any]) -> None:
    """Every result and every byte of the cache, in steps of every shape; few calls are checked."""
    server = Server(5, sys.modules["cupy"], 24, 4, DIM, **options)
    a, b = server.add(9), server.add(2)
    number = 0
    for _ in range(3):
        for tokens, kind in (
            ([9, 2], {}),
            ([1, 1], {}),
            ([1, 1], {"batch_size": 4}),
            ([3, 3], {}),
            ([1, 0], {"batch_size": 4, "max_seqlen_q": 8}),
        ):
            server.run([a, b], tokens, **kind)
            number += server.layers
        server.truncate([a, b], [3, 5])
    server.check()
    # With an output or without, of each shape; queries of 11 tokens and up to two rows more are shapes of their own.
    assert len(afresh) <= number * 2 // 3


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"max_seqlen_q": 4}], ids=["dense", "padded", "ragged"])
def test_a_repeated_call_makes_no_view(
    options: Any, machine: SimulatedGpu, afresh: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, rows = begun(**options), options.get("batch_size", TOKENS)
    given = inputs(rows=rows) | {"out": filled(7, (rows, HEADS, DIM), np.float32)}
    step(1, **given)
    wanted = given["out"].get().copy()
    step(0, **given)
    assert len(afresh) <= 2
    afresh.clear()

    def forbidden(*args: Any) -> Any:
        raise AssertionError("a view")

    for name in ("reshape", "__getitem__"):
        monkeypatch.setattr(DeviceArray, name, forbidden)
    forbid_checks(monkeypatch)
    for layer in (0, 1):
        given["out"].host[...] = 7
        assert step(layer, **given) is given["out"]
        np.testing.assert_array_equal(given["out"].get(), wanted)
    assert not afresh


def test_tensors(machine: SimulatedGpu, afresh: list[Any]) -> None:
    step, given = begun(), inputs()
    wanted = step(0, **given).get()
    tensors = {name: Tensor(array) for name, array in given.items()} | {"out": Tensor(output())}
    for layer in (0, 1, 0):
        tensors["out"].native.host[...] = 7
        assert step(layer, **tensors) is tensors["out"]
        np.testing.assert_array_equal(tensors["out"].native.get(), wanted)
    assert len(afresh) <= 3


def test_arrays_that_cannot_be_reshaped(machine: SimulatedGpu) -> None:
    step, given = begun(), inputs()
    wanted = [x.get() for x in step(0, **given, return_softmax_lse=True)]
    theirs = {name: ForeignArray(array) for name, array in given.items()}
    for layer in (0, 1, 0):
        found = step(layer, **theirs, return_softmax_lse=True)
        for x, array in zip(found, wanted, strict=True):
            assert type(x) is ForeignArray
            np.testing.assert_array_equal(x.native.get(), array)


@pytest.mark.parametrize(
    "options", [{}, {"kv_dtype": "int8"}, {"latent": True, "headdim_v": 32}], ids=["", "quantised", "latent"]
)
def test_the_arrays_of_a_cache_are_the_same_for_its_life(options: Any, machine: SimulatedGpu) -> None:
    """Steps of every shape keep them."""
    cache = cuflash.PagedKVCache(
        2, 12, 16, HEADS_KV, DIM, "float32", max_sequences=4, max_seqlen=64, xp=sys.modules["cupy"], **options
    )
    arrays = {name: getattr(cache, name) for name in ("k", "v", "k_scale", "v_scale", "page_table")}
    addresses = {name: x if x is None else x.data.ptr for name, x in arrays.items()}
    step = cuflash.DecodeStep(cache, HEADS)
    a, b = cache.add(20), cache.add()
    for tokens, shape in (([20, 3], {}), ([1, 1], {}), ([2, 0], {"batch_size": 3}), ([1, 1], {"max_seqlen_q": 4})):
        step.begin([a, b], tokens, **shape).commit()
    c = cache.fork(a)
    step.begin([c, a], 1).commit()  # copies a page
    cache.truncate(c, 5)
    cache.free([a, b])
    step.begin([cache.add(40), c], [33, 1]).commit()
    for name, array in arrays.items():
        assert getattr(cache, name) is array
        assert array is None or array.data.ptr == addresses[name]


def test_what_changes_in_the_arrays_of_a_cache_is_seen(machine: SimulatedGpu, afresh: list[Any]) -> None:
    rng = np.random.default_rng(1)
    step, given = begun(), inputs()
    cache = step.cache
    step.commit()
    step.begin(cache.sequences)
    for _ in range(3):
        before = step(0, **given).get()
    afresh.clear()
    for array in (cache.k.host, cache.v.host):
        array[...] = rng.standard_normal(array.shape, np.float32)
    cache.page_table.host[...] = np.flip(cache.page_table.host)
    found = step(0, **given).get()
    assert not afresh
    wanted = cuflash.flash_attn_with_kvcache(
        given["q"].reshape(TOKENS, 1, HEADS, DIM), cache.k[0], cache.v[0], cache_seqlens=filled(2, TOKENS, np.int32),
        cache_batch_idx=DeviceArray(cache.rows(cache.sequences).astype(np.int32)), page_table=cache.page_table,
        causal=True,
    )  # fmt: skip
    np.testing.assert_allclose(found, wanted.get().reshape(found.shape), atol=1e-6)
    assert (found != before).any()


WRONG: dict[str, Any] = {
    "queries of the wrong shape": {"q": DeviceArray(np.zeros((TOKENS + 1, HEADS, DIM), np.float32))},
    "queries of another type": {"q": DeviceArray(np.zeros((TOKENS, HEADS, DIM), np.float16))},
    "no values": {"v": None},
    "keys of other heads": {"k": DeviceArray(np.zeros((TOKENS, HEADS, DIM), np.float32))},
    "an output of the wrong shape": {"out": DeviceArray(np.zeros((TOKENS, HEADS, 2 * DIM), np.float32))},
    "an output on the host": {"out": np.zeros((TOKENS, HEADS, DIM), np.float32)},
    "sinks of the wrong shape": {"sinks": DeviceArray(np.zeros(HEADS + 1, np.float32))},
    "a flag that is a number": {"return_softmax_lse": 1},
    "a layer too many": {"layer": 2},
    "a layer that is no number": {"layer": 0.0},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_first_call_refuses_a_later_one_refuses_alike(wrong: str, machine: SimulatedGpu) -> None:
    given = {"layer": 0} | inputs() | {"out": output()}
    with pytest.raises((TypeError, ValueError, IndexError)) as first:
        begun()(**given | WRONG[wrong])
    step = begun()
    for _ in range(3):
        step(**given)
    before = [array.get().copy() for array in (step.cache.k, step.cache.v)]
    with pytest.raises(first.type) as later:
        step(**given | WRONG[wrong])
    assert str(later.value) == str(first.value)
    for array, kept in zip((step.cache.k, step.cache.v), before, strict=True):
        np.testing.assert_array_equal(array.get(), kept)


def test_an_output_in_the_cache_is_refused_also_later(machine: SimulatedGpu) -> None:
    step, given = begun(), inputs()
    for _ in range(3):
        step(0, **given, out=output())
    inside = DeviceArray(step.cache.k.host.reshape(-1)[: TOKENS * HEADS * DIM].reshape(TOKENS, HEADS, DIM))
    with pytest.raises(ValueError, match="out must share no memory with k_cache"):
        step(0, **given, out=inside)


def test_values_are_checked_in_every_call_that_asks_for_it(
    machine: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, given = begun(), inputs()
    for _ in range(3):
        step(0, **given)
    monkeypatch.setenv("CUFLASH_VALIDATE", "1")
    step.cache_seqlens.host[0] = 1000
    with pytest.raises(ValueError, match="cache_seqlens"):
        step(0, **given)


def test_repeated_calls_are_written_down(
    machine: SimulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, given = begun(), inputs()
    for _ in range(2):
        step(0, **given)
    monkeypatch.setenv("CUFLASH_LOG", str(tmp_path / "log"))
    step(1, **given)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["call"] for line in lines] == ["flash_attn_with_kvcache"]
    assert len(lines[0]["launches"]) == 2
