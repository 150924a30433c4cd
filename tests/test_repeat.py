"""Repeated calls: a plan remembers what was checked, and nothing goes unchecked that is not the same."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bench.standin import DeviceArray, ForeignArray, Machine, Tensor, from_dlpack, gpu, host

import cuflash
from cuflash import arguments, arrays, layouts, memo, scheduling
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
        self.prepared: list[str] = []

    def prepare(self, bound: Any, scratch: Any) -> Any:
        self.prepared.append(bound.launch.variant.kernel)
        run = sim.SimulatedMachine().prepare(bound, [array.host for array in scratch])

        def launch(params: bytes, arrays: Any) -> None:
            self.launched.append(bound.launch.variant.kernel)
            run(params, [host(array) for array in arrays])

        return launch


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


def in_kind(framework: type, arguments: Arguments) -> Arguments:
    """Make a framework's arrays of those on the device."""
    return {name: framework(x) if isinstance(x, DeviceArray) else x for name, x in arguments.items()}


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


def key(function: str, args: tuple[Any, ...], kwargs: Arguments) -> tuple[Any, ...]:
    """What a call is told apart by."""
    found = memo.spell(function, args, kwargs)[0]
    assert found is not None
    return tuple(found)


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_planned", [True, False])
@pytest.mark.parametrize("framework", [ForeignArray, Tensor])
def test_a_repeated_call_on_another_frameworks_arrays(
    framework: Any, kind: Any, is_planned: bool, machine: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is remembered as one on CuPy's own is, and gives the framework's arrays back."""
    wanted = first_call(kind, 1)
    metadata = plan(on_device(kind(1))) if is_planned else None
    for _ in range(2):
        given = on_device(kind(1))
        caches = given["k_cache"], given["v_cache"]
        given = in_kind(framework, given)
        results = cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=metadata, return_softmax_lse=True)
        for name, result in zip(OUTPUTS, results, strict=True):
            assert type(result) is framework
            assert name not in given or result is given[name]
        for found, expected in zip((*(result.native for result in results), *caches), wanted, strict=True):
            np.testing.assert_array_equal(found.get(), expected)
        forbid_checks(monkeypatch)


def test_arrays_of_two_frameworks(machine: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = on_device(with_everything_else(1))
    metadata, lse, tables = plan(arguments), arguments.pop("softmax_lse"), arguments["page_table"]
    given = arguments | {"q": ForeignArray(arguments["q"]), "page_table": ForeignArray(tables)}
    for _ in range(2):
        out, lse = cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=metadata, return_softmax_lse=True)
        assert out is arguments["out"] and isinstance(lse, ForeignArray)
        forbid_checks(monkeypatch)


@pytest.mark.parametrize("q", [DeviceArray, ForeignArray, Tensor])
@pytest.mark.parametrize("out", [DeviceArray, ForeignArray, Tensor])
def test_what_was_given_is_returned_of_whatever_kind(q: Any, out: Any, machine: SimulatedGpu) -> None:
    arguments = on_device(with_everything_else(1))
    wanted, metadata = first_call(with_everything_else, 1), plan(arguments)
    del arguments["softmax_lse"]
    for name, kind in (("q", q), ("out", out)):
        arguments[name] = kind(arguments[name]) if kind is not DeviceArray else arguments[name]
    for _ in range(3):
        results = cuflash.flash_attn_with_kvcache(**arguments, scheduler_metadata=metadata, return_softmax_lse=True)
        assert results[0] is arguments["out"] and type(results[1]) is q
        for result, expected in zip(results, wanted, strict=False):
            np.testing.assert_array_equal(host(result), expected)


def test_a_layout_is_part_of_a_call(machine: SimulatedGpu) -> None:
    memory = np.zeros(200, np.float32)
    memory = memory[-memory.ctypes.data % 16 // 4 :]
    hosts = [memory[:8], memory[:9], memory[:16:2], memory[:8].reshape(2, 4), memory[:8].view(np.int32), memory[1:9]]
    arrays = [DeviceArray(host) for host in hosts]
    arrays.append(DeviceArray(hosts[0]))
    arrays[-1].data.device_id = 1
    arrays += [kind(array) for kind in (ForeignArray, Tensor) for array in arrays]
    arrays.append(Tensor(arrays[0]))
    arrays[-1].requires_grad = True
    arrays.append(Tensor(arrays[0]))
    arrays[-1].negative = True
    keys = [key("print", (), {"x": array}) for array in arrays]
    assert len(set(keys)) == len(arrays)
    assert key("print", (), {"x": DeviceArray(memory[4:12])}) == keys[0]


def test_what_else_is_part_of_a_call(machine: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = plan(on_device(paged(1)))
    keys = [key("print", (), {"x": metadata})]
    metadata.max_seqlen_k += 1
    keys.append(key("print", (), {"x": metadata}))
    monkeypatch.setenv("CUFLASH_BACKEND", "cuda")
    keys.append(key("print", (), {"x": metadata}))
    assert len(set(keys)) == len(keys)


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


def test_launches_are_prepared_once_for_a_stream(machine: SimulatedGpu) -> None:
    """Kernels and scratch: another stream has its own, which stays right when the first one's has been replaced."""
    arguments = on_device(paged(1))
    metadata = plan(arguments)
    call(arguments, metadata)
    wanted = call(arguments, metadata)
    assert machine.prepared == ["plan", "decode", "decode"]
    for key in (1, 0, 1):
        machine.key = key
        for found, expected in zip(call(arguments, metadata), wanted, strict=True):
            np.testing.assert_array_equal(found, expected)
    assert machine.prepared == ["plan", "decode", "decode", "decode"]
    for machine.key in range(200):
        call(arguments, metadata)
    assert len(next(iter(metadata.calls.values()))._step.ready) <= 64


# -------------------------------------------------------------------------------------------------- torch's tensors
class Imports:
    """Counts what is imported by DLPack."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 0
        monkeypatch.setattr(sys.modules["cupy"], "from_dlpack", self.count)

    def count(self, x: Any) -> DeviceArray:
        self.number += 1
        return from_dlpack(x)


def test_tensors_are_not_imported_again(machine: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    device = on_device(with_everything_else(1))
    given, metadata = in_kind(Tensor, device), plan(device)
    wanted = cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=metadata).native.get().copy()
    imports = Imports(monkeypatch)
    given["out"].native.host[...] = 0
    assert cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=metadata) is given["out"]
    np.testing.assert_array_equal(given["out"].native.get(), wanted)
    assert not imports.number
    assert plan(in_kind(Tensor, device), out=metadata) is metadata
    plan(in_kind(Tensor, device), out=metadata)
    assert plan(in_kind(Tensor, device), out=metadata) is metadata


@pytest.mark.parametrize("is_planned", [True, False])
def test_results_beside_tensors_are_tensors_from_the_start(
    is_planned: bool, machine: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the plan that a call makes for itself: all memory is torch's, in which a graph of torch's keeps it."""
    device = on_device(paged(1))
    wanted = first_call(paged, 1)
    given, metadata = in_kind(Tensor, device), plan(device) if is_planned else None
    cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=metadata, return_softmax_lse=True)
    torch, made = sys.modules["torch"], []

    def empty(*shape: int, **options: Any) -> Tensor:
        made.append(Tensor.empty(*shape, **options))
        return made[-1]

    def forbidden(*args: Any) -> Any:
        raise AssertionError("not torch's")

    monkeypatch.setattr(torch, "empty", empty)
    for name in ("empty", "from_dlpack"):
        monkeypatch.setattr(sys.modules["cupy"], name, forbidden)
    monkeypatch.setattr(Tensor, "__array_namespace__", forbidden)
    monkeypatch.delitem(arrays._exporters, Tensor)
    results = cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=metadata, return_softmax_lse=True)
    assert len(made) == 2 + (not is_planned)
    for result, mine, expected in zip(results, made, wanted, strict=False):
        assert result is mine
        np.testing.assert_array_equal(result.native.get(), expected)
        assert result.dtype == expected.dtype


def test_results_go_out_by_dlpack_beside_tensors_on_another_stream(
    machine: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's stream must wait for them."""
    device = on_device(paged(1))
    wanted = first_call(paged, 1)
    given, metadata = in_kind(Tensor, device), plan(device)
    cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=metadata)
    exports: list[Tensor] = []

    def from_dlpack(native: DeviceArray) -> Tensor:
        exports.append(Tensor(native))
        return exports[-1]

    monkeypatch.setattr(sys.modules["torch"]._C, "_cuda_getCurrentRawStream", lambda gpu: 7)
    monkeypatch.setattr(Tensor, "__array_namespace__", lambda self: SimpleNamespace(from_dlpack=from_dlpack))
    monkeypatch.delitem(arrays._exporters, Tensor)
    forbid_checks(monkeypatch)
    out = cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=metadata)
    monkeypatch.delitem(arrays._exporters, Tensor)
    assert [out] == exports
    np.testing.assert_array_equal(out.native.get(), wanted[0])


@pytest.mark.parametrize("stream, gpu", [(7, 0), (0, 1)])
def test_tensors_on_another_stream_wait_and_are_waited_for(
    stream: int, gpu: int, machine: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The import makes CuPy's stream wait, the export torch's: also of an output that was given."""
    device = on_device(with_everything_else(1))
    given, metadata = in_kind(Tensor, device), plan(device)
    wanted = cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=metadata).native.get().copy()
    imports, exports = Imports(monkeypatch), []
    monkeypatch.setattr(sys.modules["torch"]._C, "_cuda_getCurrentRawStream", lambda gpu: stream)
    monkeypatch.setattr(sys.modules["cupy"].cuda.runtime, "getDevice", lambda: gpu)
    namespace = SimpleNamespace(from_dlpack=exports.append)
    monkeypatch.setattr(Tensor, "__array_namespace__", lambda self: namespace)
    monkeypatch.delitem(arrays._exporters, Tensor, raising=False)
    forbid_checks(monkeypatch)
    given["out"].native.host[...] = 0
    assert cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=metadata) is given["out"]
    monkeypatch.delitem(arrays._exporters, Tensor)
    np.testing.assert_array_equal(given["out"].native.get(), wanted)
    assert imports.number == sum(isinstance(x, Tensor) for x in given.values())
    assert [array.data.ptr for array in exports] == [given["out"].data_ptr()]


def test_tensors_that_change_in_place_are_read_anew(machine: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    device, other = on_device(paged(1)), on_device(paged(2))
    given, metadata = in_kind(Tensor, device), plan(device)
    call(device, metadata)
    wanted = call(other | {"cache_seqlens": device["cache_seqlens"]}, metadata)[0]
    cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=metadata)
    for name in ("q", "k_cache", "v_cache", "page_table"):
        given[name].set_(other[name])
    with monkeypatch.context() as checked:
        forbid_checks(checked)
        found = cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=metadata)
    np.testing.assert_array_equal(found.native.get(), wanted)
    given["page_table"].set_(DeviceArray(np.zeros((BATCH - 1, PAGES), np.int32)))
    with pytest.raises(ValueError, match="page_table must have a row per sequence"):
        cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=metadata)
    given["page_table"] = Tensor(DeviceArray(other["page_table"].host.view(np.float32)))
    with pytest.raises(TypeError, match="page_table must be int32"):
        cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=metadata)


@pytest.mark.parametrize(
    ("what", "error"),
    [("requires_grad", "q cannot be shared: it requires a gradient"), ("negative", "q must have its values in memory")],
)
def test_what_a_tensor_cannot_share_is_refused_also_later(what: str, error: str, machine: SimulatedGpu) -> None:
    device = on_device(paged(1))
    given, metadata = in_kind(Tensor, device), plan(device)
    for _ in range(2):
        cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=metadata)
    setattr(given["q"], what, True)
    with pytest.raises(ValueError, match=error):
        cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=metadata)


def test_a_tensor_without_memory_is_the_importers_matter(
    machine: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(self: Any) -> int:
        raise RuntimeError("no storage")

    device = on_device(paged(1))
    given, metadata = in_kind(Tensor, device), plan(device)
    monkeypatch.setattr(Tensor, "data_ptr", unreadable)
    for _ in range(2):
        cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=metadata)
    assert not metadata.calls


def test_a_tensor_whose_memory_was_taken_away_is_refused_also_later(machine: SimulatedGpu) -> None:
    device = on_device(paged(1))
    given, metadata = in_kind(Tensor, device), plan(device)
    for _ in range(2):
        cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=metadata)
    empty = device["v_cache"]
    empty.data.ptr = 0
    given["v_cache"].set_(empty)
    for calls in (metadata, plan(device)):
        with pytest.raises(ValueError, match="v_cache must have memory, got shape .* at address 0"):
            cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=calls)


def test_no_tensor_is_kept(machine: SimulatedGpu) -> None:
    device = on_device(with_everything_else(1))
    given, metadata = in_kind(Tensor, device), plan(device)
    tensors = [x for x in given.values() if isinstance(x, Tensor)]
    references = [(sys.getrefcount(x), sys.getrefcount(x.native), sys.getrefcount(x.native.host)) for x in tensors]
    for _ in range(2):
        cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=metadata)
    assert metadata.calls
    assert references == [
        (sys.getrefcount(x), sys.getrefcount(x.native), sys.getrefcount(x.native.host)) for x in tensors
    ]


def test_what_is_read_of_torchs_own_tensors() -> None:
    """There are none on a GPU here: what they say is the same on the host."""
    torch = pytest.importorskip("torch")
    tensor = torch.zeros((4, 6, 8), dtype=torch.bfloat16)[1:, ::2]
    read = layouts.readers[torch.Tensor]
    layout = tensor.device, (3, 3, 8), (48, 16, 1), torch.bfloat16, False
    assert read(tensor) == (tensor.data_ptr(), (*layout, False))
    assert read(torch._neg_view(tensor)) == (tensor.data_ptr(), (*layout, True))
    assert read(torch.zeros(3).to_sparse()) is None
    assert layouts.readers[torch.nn.Parameter] is None  # a subclass may mean anything
    assert memo.spell("name", (tensor,), {})[0] is None  # host memory


def test_what_torch_itself_makes() -> None:
    torch = pytest.importorskip("torch")
    like = torch.zeros(3, requires_grad=True)
    for dtype in ("bfloat16", "float16", "float32", "int32"):
        tensor, address = layouts.new_array((2, 0, 5), dtype, like)
        assert (tensor.shape, str(tensor.dtype), tensor.device) == ((2, 0, 5), f"torch.{dtype}", like.device)
        assert tensor.is_contiguous() and not tensor.requires_grad and address == tensor.data_ptr()
    # Its build for a CPU has no streams, but their functions' signatures.
    assert (
        "def _cuda_getCurrentRawStream(device: _int) -> _int"
        in Path(torch._C.__file__).with_name("_C").joinpath("__init__.pyi").read_text()
    )


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


@pytest.mark.parametrize("planned", [False, True], ids=["", "planned"])
def test_a_cache_without_pages(planned: bool, machine: SimulatedGpu) -> None:
    """A later call, too, reads zeros in place of its keys, and no memory that the caller does not have."""
    arguments = paged(1)
    nowhere = {name: arguments[name][:0].copy() for name in ("k_cache", "v_cache")}
    nowhere["page_table"] = np.full_like(arguments["page_table"], -1)
    given = on_device(arguments | nowhere)
    metadata = plan(given) if planned else None
    lengths = arguments["cache_seqlens"][:, None, None]
    for _ in range(3):
        out, lse, *_ = call(given, metadata)
        assert not out.any()
        np.testing.assert_allclose(lse, np.broadcast_to(np.log(lengths), lse.shape), rtol=1e-6)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_first_call_refuses_a_later_one_refuses_alike(wrong: str, machine: SimulatedGpu) -> None:
    arguments = on_device(paged(1)) | {"window_size": (-1, -1)}
    with pytest.raises((TypeError, ValueError)) as first:
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
        except (TypeError, ValueError) as error:
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


@pytest.mark.parametrize("name, cache", [("out", "k_cache"), ("out", "v_cache"), ("k", "k_cache"), ("q", "v_cache"),
                                         ("k_cache", "v_cache"), ("out", "q"), ("out", "k"), ("out", "softmax_lse"),
                                         ("softmax_lse", "q"), ("k_cache", "rotary_cos")])  # fmt: skip
@pytest.mark.parametrize("elements", [-4, 4])
def test_arrays_that_reach_into_another_are_noticed_also_later(
    name: str, cache: str, elements: int, machine: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By 16 bytes at either end; beside it they are remembered."""

    def given(elements: int) -> Arguments:
        arguments = appending(1)
        arguments["out"] = np.zeros_like(arguments["q"])
        arguments["softmax_lse"] = np.zeros((BATCH, HEADS_Q, 1), np.float32)
        sizes = arguments[name].size, arguments[cache].size
        memory = np.empty(sum(sizes) + sizes[0] + 4, np.float32)
        memory = memory[-memory.ctypes.data % 16 // 4 :]
        start = sizes[0]  # of the cache
        placed = {cache: memory[start : start + sizes[1]]}
        begin = sizes[1] + start - elements if elements >= 0 else -elements
        placed[name] = memory[begin : begin + sizes[0]]
        views = {}
        for other in (name, cache):
            views[other] = placed[other].reshape(arguments[other].shape)
            views[other][...] = arguments[other]
        return arguments | views

    def outcome(arguments: Arguments, metadata: Any) -> Any:
        try:
            return [array.tobytes() for array in call(arguments, metadata)]
        except ValueError as error:
            return str(error)

    def in_place(arguments: Arguments) -> Arguments:
        return {key: DeviceArray(x) if isinstance(x, np.ndarray) else x for key, x in arguments.items()}

    wanted = outcome(in_place(given(elements)), plan(on_device(appending(1))))
    assert ("must share no memory" in wanted) == (name in (*OUTPUTS, "k_cache"))
    metadata = plan(on_device(appending(1)))
    call(on_device(given(elements)), metadata)
    assert outcome(in_place(given(elements)), metadata) == wanted
    forbid_checks(monkeypatch)
    call(in_place(given(0)), metadata)


def test_values_that_are_the_keys_are_noticed(machine: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other kernels may run then."""
    apart = on_device(paged(1))
    together = apart | {"v_cache": apart["k_cache"]}
    metadata = [plan(apart), plan(together)]
    call(apart, metadata[0])
    call(together, metadata[1])
    forbid_checks(monkeypatch)
    call(apart, metadata[0])
    call(together, metadata[1])
    for other, planned in ((together, metadata[0]), (apart, metadata[1])):
        with pytest.raises(AssertionError, match="checked again"):
            call(other, planned)


def test_results_that_reach_into_those_to_be_merged_are_noticed_also_later(machine: SimulatedGpu) -> None:
    arguments, rng = paged(1), np.random.default_rng(1)
    memory = np.zeros(BATCH * HEADS_Q * DIM + 4, np.float32)
    out, shifted = (memory[begin:][: memory.size - 4].reshape(BATCH, 1, HEADS_Q, DIM) for begin in (0, 4))
    lse = rng.standard_normal((BATCH, HEADS_Q, 1), np.float32)

    def merged(other: np.ndarray) -> Any:
        merge_with = DeviceArray(other), DeviceArray(lse)
        return call(on_device(arguments) | {"out": DeviceArray(out), "merge_with": merge_with}, metadata)

    metadata = plan(on_device(arguments))
    merged(rng.standard_normal(out.shape, np.float32))
    merged(out)  # each element has been read when it is written
    with pytest.raises(ValueError, match=r"out must share no memory with merge_with\[0\]"):
        merged(shifted)


def test_scales_that_are_one_array_must_be_one_also_later(machine: SimulatedGpu) -> None:
    rng = np.random.default_rng(2)
    rows = DeviceArray(rng.integers(-127, 128, (2, 32, 1, 96)).astype(np.int8))
    given = {
        "q": DeviceArray(rng.standard_normal((2, 1, 4, 96), np.float32)), "k_cache": rows, "v_cache": rows[..., :64],
        "cache_seqlens": DeviceArray(np.array([9, 12], np.int32)),
    }  # fmt: skip
    scales, others = (DeviceArray(rng.random((2, 32, 1), np.float32)) for _ in range(2))
    lengths = DeviceArray(np.array([5, 6], np.int32))
    metadata = cuflash.get_scheduler_metadata(2, 1, 32, 4, 1, 96, lengths, "float32", 64, kv_dtype="int8")
    for _ in range(2):
        call(given | {"k_descale": scales, "v_descale": scales}, metadata)
    with pytest.raises(ValueError, match="v_descale must be"):
        call(given | {"k_descale": scales, "v_descale": others}, metadata)


def test_a_plan_on_a_gpu_is_filled_for_one_length(machine: SimulatedGpu) -> None:
    """As a call on it takes one; a new plan for one is in host memory."""
    arguments = on_device(paged(1))
    metadata, wanted = plan(arguments), plan(on_device(paged(1) | {"cache_seqlens": np.full(BATCH, 70, np.int32)}))
    cuflash.get_scheduler_metadata(
        BATCH, 1, PAGE * PAGES, HEADS_Q, HEADS_KV, DIM, 70, "float32", page_size=PAGE, causal=True, out=metadata
    )
    assert metadata.array.host.tobytes() == wanted.array.host.tobytes()
    call(arguments | {"cache_seqlens": 70}, metadata)


def test_a_repeated_call_does_not_plan_in_a_capture(machine: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = on_device(paged(1))
    call(arguments, None)
    capturing = SimpleNamespace(is_capturing=lambda: True)
    monkeypatch.setattr(sys.modules["cupy"].cuda, "get_current_stream", lambda gpu=-1: capturing)
    with pytest.raises(ValueError, match="scheduler_metadata must be given"):
        call(arguments, None)


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
