"""Repeated calls: a plan remembers what was checked, and nothing goes unchecked that is not the same."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from bench.standin import DeviceArray, Machine, gpu

import cuflash
from cuflash import arguments, memo, scheduling
from cuflash.backends import sim
from cuflash.device import Device

Arguments = dict[str, Any]
BATCH, HEADS_Q, HEADS_KV, DIM, PAGE, PAGES = 3, 4, 2, 64, 16, 12
OUTPUTS = ("out", "softmax_lse")


class SimulatedGpu(Machine):
    """A device whose kernels run on the simulator."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []

    def launch(self, launch: Any, params: bytearray, arrays: Any) -> None:
        self.launched.append(launch.variant.kernel)
        hosts = [None if array is None else array.host for array in arrays]
        sim.SimulatedMachine().launch(launch, params, hosts)


@pytest.fixture
def machine() -> Iterator[SimulatedGpu]:
    machine = SimulatedGpu()
    with gpu(Device(4, 90), machine):
        yield machine


def paged(seed: int) -> Arguments:
    rng = np.random.default_rng(seed)
    caches = rng.standard_normal((2, BATCH * PAGES, PAGE, HEADS_KV, DIM), np.float32)
    return {
        "q": rng.standard_normal((BATCH, 1, HEADS_Q, DIM), np.float32),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "cache_seqlens": rng.integers(1, PAGE * PAGES - 4, BATCH).astype(np.int32),
        "page_table": rng.permutation(BATCH * PAGES).astype(np.int32).reshape(BATCH, PAGES),
        "causal": True,
    }


def contiguous(seed: int) -> Arguments:
    arguments = paged(seed)
    del arguments["page_table"]
    for name in ("k_cache", "v_cache"):
        arguments[name] = arguments[name].reshape(BATCH, PAGE * PAGES, HEADS_KV, DIM)
    return arguments


def head_major(seed: int) -> Arguments:
    arguments = paged(seed)
    for name in ("k_cache", "v_cache"):
        arguments[name] = np.ascontiguousarray(arguments[name].swapaxes(1, 2))
    return arguments | {"layout": "HND"}


def appending(seed: int) -> Arguments:
    rng = np.random.default_rng(seed + 100)
    positions = rng.uniform(0, 6, (PAGE * PAGES, DIM // 2)).astype(np.float32)
    return paged(seed) | {
        "k": rng.standard_normal((BATCH, 1, HEADS_KV, DIM), np.float32),
        "v": rng.standard_normal((BATCH, 1, HEADS_KV, DIM), np.float32),
        "rotary_cos": np.cos(positions),
        "rotary_sin": np.sin(positions),
    }


def with_everything_else(seed: int) -> Arguments:
    rng = np.random.default_rng(seed + 200)
    arguments = paged(seed)
    return arguments | {
        "cache_leftpad": rng.integers(0, arguments["cache_seqlens"]).astype(np.int32),
        "cache_batch_idx": rng.permutation(BATCH).astype(np.int32),
        "sinks": rng.standard_normal(HEADS_Q, np.float32),
        "softcap": 20.0,
        "softmax_scale": 0.2,
        "window_size": (60, 0),
        "out": np.empty((BATCH, 1, HEADS_Q, DIM), np.float32),
        "softmax_lse": np.empty((BATCH, HEADS_Q, 1), np.float32),
    }


def with_what_is_ignored(seed: int) -> Arguments:
    """Arguments without a partner, which say nothing."""
    return paged(seed) | {
        "rotary_seqlens": np.full(BATCH, 5, np.int32),
        "cu_seqlens_k_new": np.arange(0, 3 * BATCH + 1, 3, dtype=np.int32),
        "max_seqlen_q": 7,
    }


def with_one_length(seed: int) -> Arguments:
    return paged(seed) | {"cache_seqlens": 70}


KINDS = [paged, contiguous, head_major, appending, with_everything_else, with_what_is_ignored, with_one_length]


def on_device(arguments: Arguments) -> Arguments:
    """Copy the arrays to the device."""
    return {name: DeviceArray(x.copy()) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}


def plan(arguments: Arguments, out: Any = None, **changes: Any) -> cuflash.SchedulerMetadata:
    options = {
        "page_size": PAGE if "page_table" in arguments else None,
        "cache_leftpad": arguments.get("cache_leftpad"),
        "causal": arguments["causal"],
        "window_size": arguments.get("window_size", (-1, -1)),
        "has_softcap": "softcap" in arguments,
        "max_seqlen_k_new": int("k" in arguments),
        "qkv_dtype": "float32",
    }
    seqlens = arguments["cache_seqlens"]
    if isinstance(seqlens, int):
        seqlens = DeviceArray(np.full(BATCH, seqlens, np.int32))
    return cuflash.get_scheduler_metadata(
        BATCH, 1, PAGE * PAGES, HEADS_Q, HEADS_KV, DIM, seqlens, out=out, **options | changes
    )


def call(arguments: Arguments, metadata: Any, **changes: Any) -> list[np.ndarray]:
    """Call with an LSE; return everything that may have been written."""
    out, lse = cuflash.flash_attn_with_kvcache(
        **arguments | {"scheduler_metadata": metadata, "return_softmax_lse": True} | changes
    )
    return [array.get() for array in (out, lse, arguments["k_cache"], arguments["v_cache"])]


def first_call(kind: Any, seed: int) -> list[np.ndarray]:
    """Call on a plan of its own, which remembers nothing."""
    arguments = on_device(kind(seed))
    return call(arguments, plan(arguments))


def forbid_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("checked again")

    monkeypatch.setattr(arguments, "make_problem", forbidden)
    monkeypatch.setattr(scheduling, "make_problem", forbidden)


# -------------------------------------------------------------------------------------------------- the same results
@pytest.mark.parametrize("kind", KINDS)
def test_a_repeated_call_does_what_a_first_one_does(
    kind: Any, machine: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [first_call(kind, seed) for seed in (1, 2)]
    metadata = plan(on_device(kind(1)))
    call(on_device(kind(1)), metadata)
    machine.launched.clear()
    forbid_checks(monkeypatch)
    for found, wanted in zip(call(on_device(kind(1)), metadata), expected[0], strict=True):
        np.testing.assert_array_equal(found, wanted)
    # The plan is that of other lengths: right, but rounded elsewhere.
    for found, wanted in zip(call(on_device(kind(2)), metadata), expected[1], strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert machine.launched == (["append", "decode"] if "k" in kind(1) else ["decode"]) * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_repeated_call_without_a_plan_plans_again(
    kind: Any, machine: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [first_call(kind, seed) for seed in (1, 2)]
    call(on_device(kind(3)), None)
    machine.launched.clear()
    forbid_checks(monkeypatch)
    for seed in (1, 2):  # on a plan of their own lengths: the same bits
        for found, wanted in zip(call(on_device(kind(seed)), None), expected[seed - 1], strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert machine.launched == (["plan", "append", "decode"] if "k" in kind(1) else ["plan", "decode"]) * 2


def test_a_repeated_call_without_a_plan_keeps_no_array(machine: SimulatedGpu) -> None:
    arguments = on_device(with_everything_else(1))
    arrays = [x for x in arguments.values() if isinstance(x, DeviceArray)]
    references = [sys.getrefcount(array) for array in arrays]
    call(arguments, None)
    assert memo.unplanned
    assert references == [sys.getrefcount(array) for array in arrays]


@pytest.mark.parametrize("is_planned", [True, False])
@pytest.mark.parametrize("name", ["k_cache", "cache_seqlens", "page_table", "sinks"])
def test_an_array_on_another_gpu_is_refused_also_later(is_planned: bool, name: str, machine: SimulatedGpu) -> None:
    arguments = on_device(with_everything_else(1))
    metadata = plan(arguments) if is_planned else None
    call(arguments, metadata)
    arguments[name].data.device_id = 1
    among_lengths = "cache_seqlens, .* must be in one memory"
    with pytest.raises(ValueError, match=rf"{name} must be in the memory of GPU 0 like q, .* GPU 1|{among_lengths}"):
        call(arguments, metadata)


def test_lengths_on_another_gpu_than_the_plan_are_refused(machine: SimulatedGpu) -> None:
    arguments = on_device(paged(1))
    metadata = plan(arguments)
    for _ in range(2):
        plan(arguments, out=metadata)
    arguments["cache_seqlens"].data.device_id = 1
    with pytest.raises(ValueError, match="where cache_seqlens lies was 'the memory of GPU 0'"):
        plan(arguments, out=metadata)


def test_calls_on_another_gpu_are_prepared_anew(machine: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = on_device(paged(1))
    call(arguments, None)
    forbid_checks(monkeypatch)
    call(arguments, None)
    for array in arguments.values():
        if isinstance(array, DeviceArray):
            array.data.device_id = 1
    with pytest.raises(AssertionError, match="checked again"):
        call(arguments, None)


def test_a_repeated_call_writes_to_the_arrays_it_is_given(machine: SimulatedGpu) -> None:
    arguments = on_device(with_everything_else(1))
    metadata = plan(arguments)
    results = [
        cuflash.flash_attn_with_kvcache(**arguments, scheduler_metadata=metadata, return_softmax_lse=True)
        for _ in range(2)
    ]
    assert all(out is arguments["out"] and lse is arguments["softmax_lse"] for out, lse in results)


def test_a_repeated_call_without_lse_returns_the_output_alone(machine: SimulatedGpu) -> None:
    arguments = on_device(paged(1))
    metadata = plan(arguments)
    first, second = (cuflash.flash_attn_with_kvcache(**arguments, scheduler_metadata=metadata) for _ in range(2))
    assert first is not second
    np.testing.assert_array_equal(first.get(), second.get())


@pytest.mark.parametrize("kind", [paged, with_everything_else])
def test_a_plan_refilled_twice_is_the_plan_of_its_lengths(
    kind: Any, machine: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plan(on_device(kind(3))).array.get()
    metadata = plan(on_device(kind(1)))
    plan(on_device(kind(2)), out=metadata)
    forbid_checks(monkeypatch)
    assert plan(on_device(kind(3)), out=metadata) is metadata
    np.testing.assert_array_equal(metadata.array.get(), wanted)


def test_refilling_for_longer_keys_makes_room_for_their_splits(machine: SimulatedGpu) -> None:
    short, long = paged(1), paged(1)
    short["cache_seqlens"], long["cache_seqlens"] = np.full(BATCH, 60, np.int32), np.full(BATCH, 190, np.int32)
    metadata = plan(on_device(short), split_size=64)
    metadata.max_seqlen_k = 64
    call(on_device(short), metadata)
    plan(on_device(long), out=metadata, split_size=64)
    wanted = call(on_device(long), plan(on_device(long), split_size=64))
    for found, expected in zip(call(on_device(long), metadata), wanted, strict=True):
        np.testing.assert_array_equal(found, expected)


# -------------------------------------------------------------------------------------------------- nothing unchecked
WRONG: dict[str, Arguments] = {
    "causal is no bool": {"causal": 1},
    "a window's bound is a bool": {"window_size": (True, -1)},
    "another mask": {"causal": False, "window_size": (5, 5)},
    "a layout": {"layout": "DHN"},
    "softcap": {"softcap": float("nan")},
    "another number of splits": {"num_splits": 3},
    "a descale": {"q_descale": 1.0},
    "lse of the wrong type": {"softmax_lse": DeviceArray(np.empty((BATCH, HEADS_Q, 1), np.float64))},
    "out of the wrong shape": {"out": DeviceArray(np.empty((BATCH, 2, HEADS_Q, DIM), np.float32))},
    "out is no array": {"out": 7},
    "a page table too short": {"page_table": DeviceArray(np.zeros((BATCH - 1, PAGES), np.int32))},
    "a page table of int64": {"page_table": DeviceArray(np.zeros((BATCH, PAGES), np.int64))},
    "a page table on the host": {"page_table": np.zeros((BATCH, PAGES), np.int32)},
    "lengths too short": {"cache_seqlens": DeviceArray(np.ones(BATCH - 1, np.int32))},
    "a cache of another type": {"v_cache": DeviceArray(np.zeros((BATCH * PAGES, PAGE, HEADS_KV, DIM), np.float16))},
    "a cache of other pages": {"k_cache": DeviceArray(np.zeros((BATCH * PAGES, 8, HEADS_KV, DIM), np.float32))},
    "one query more": {"q": DeviceArray(np.zeros((BATCH, 2, HEADS_Q, DIM), np.float32))},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_first_call_refuses_a_later_one_refuses_alike(wrong: str, machine: SimulatedGpu) -> None:
    arguments = on_device(paged(1)) | {"window_size": (-1, -1)}
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as first:
        call(arguments | WRONG[wrong], plan(arguments))
    metadata = plan(arguments)
    call(arguments, metadata)
    with pytest.raises(first.type) as later:
        call(arguments | WRONG[wrong], metadata)
    assert str(later.value) == str(first.value)


@pytest.mark.parametrize("wrong", WRONG)
def test_without_a_plan_a_later_call_does_what_a_first_one_does(wrong: str, machine: SimulatedGpu) -> None:
    def outcome() -> Any:
        try:
            return [array.tobytes() for array in call(arguments | WRONG[wrong], None)]
        except (TypeError, ValueError, NotImplementedError) as error:
            return type(error), str(error)

    arguments = on_device(paged(1)) | {"window_size": (-1, -1)}
    first = outcome()
    memo.unplanned.clear()
    call(arguments, None)
    assert outcome() == first


@pytest.mark.parametrize("is_planned", [True, False])
def test_a_cache_between_16_byte_boundaries_is_refused_also_later(is_planned: bool, machine: SimulatedGpu) -> None:
    arguments = on_device(paged(1))
    metadata = plan(arguments) if is_planned else None
    call(arguments, metadata)
    cache = arguments["k_cache"].host
    shifted = np.empty(cache.size + 8, np.float32)
    begin = -shifted.ctypes.data % 16 // 4 + 1
    arguments["k_cache"] = DeviceArray(shifted[begin : begin + cache.size].reshape(cache.shape))
    with pytest.raises(ValueError, match="k_cache must begin at a multiple of 16 bytes"):
        call(arguments, metadata)


def test_queries_between_16_byte_boundaries_are_copied_also_later(machine: SimulatedGpu) -> None:
    arguments = on_device(paged(1))
    metadata = plan(arguments)
    wanted = call(arguments, metadata)
    q = arguments["q"].host
    shifted = np.empty(q.size + 8, np.float32)
    begin = -shifted.ctypes.data % 16 // 4 + 1
    shifted[begin : begin + q.size] = q.ravel()
    arguments["q"] = DeviceArray(shifted[begin : begin + q.size].reshape(q.shape))
    for _ in range(2):
        np.testing.assert_array_equal(call(arguments, metadata)[0], wanted[0])


def test_values_are_checked_in_every_call_that_asks_for_it(
    machine: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = on_device(paged(1))
    metadata = plan(arguments)
    call(arguments, metadata)
    monkeypatch.setenv("CUFLASH_VALIDATE", "1")
    arguments["cache_seqlens"].host[0] = PAGE * PAGES + 1
    with pytest.raises(ValueError, match="cache_seqlens must fit the capacity"):
        call(arguments, metadata)
    with pytest.raises(ValueError, match="cache_seqlens must be at least 0"):
        arguments["cache_seqlens"].host[0] = -1
        plan(arguments, out=metadata)


def test_arrays_that_had_to_be_copied_are_copied_again(machine: SimulatedGpu) -> None:
    arguments = on_device(paged(1))
    lengths, sinks = arguments["cache_seqlens"].host, np.linspace(-1, 1, HEADS_Q).astype(np.float16)
    wanted = call(arguments | {"sinks": DeviceArray(sinks.astype(np.float32))}, plan(arguments))
    strided = np.zeros((BATCH, 2), np.int32)
    strided[:, 0] = lengths
    arguments |= {"sinks": DeviceArray(sinks), "cache_seqlens": DeviceArray(strided[:, 0])}
    metadata = plan(arguments)
    for _ in range(3):
        np.testing.assert_array_equal(call(arguments, plan(arguments, out=metadata))[0], wanted[0])


def test_host_arrays_are_checked_in_every_call() -> None:
    arguments = paged(1)
    metadata = plan(arguments)
    cuflash.flash_attn_with_kvcache(**arguments, scheduler_metadata=metadata)
    plan(arguments, out=metadata)
    assert not metadata.calls


# -------------------------------------------------------------------------------------------------- the memory itself
def test_a_plan_remembers_a_bounded_number_of_calls(machine: SimulatedGpu) -> None:
    arguments = on_device(paged(1))
    metadata = plan(arguments)
    for i in range(70):
        call(arguments, metadata, softmax_scale=0.1 + 0.001 * i)
    assert 0 < len(metadata.calls) <= 64


def test_few_calls_without_a_plan_are_remembered(machine: SimulatedGpu) -> None:
    arguments = on_device(paged(1))
    for i in range(70):
        call(arguments, None, softmax_scale=0.1 + 0.001 * i)
    assert 0 < len(memo.unplanned) <= 64


def test_a_plan_that_remembers_calls_can_be_copied(machine: SimulatedGpu) -> None:
    arguments = on_device(paged(1))
    metadata = plan(arguments)
    wanted = call(arguments, metadata)
    for twin in (copy.copy(metadata), copy.deepcopy(metadata)):
        assert not twin.calls
        np.testing.assert_array_equal(call(arguments, twin)[0], wanted[0])
