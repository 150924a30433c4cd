"""Arrays of torch and JAX on a GPU: the same memory, and in the right order on every stream."""

from __future__ import annotations

import os
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gate import Gate

import cuflash
from cuflash.arrays import exporter, import_array

pytestmark = pytest.mark.gpu

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = ["float16", "bfloat16", "float32", "int32"]


class Torch:
    def __init__(self) -> None:
        self.torch = pytest.importorskip("torch")
        if not self.torch.cuda.is_available():
            pytest.skip("a torch without CUDA")

    def array(self, x: np.ndarray) -> Any:
        host = x.view(np.int16) if x.dtype == BFLOAT16 else x
        there = self.torch.from_numpy(host.copy()).cuda()
        return there.view(self.torch.bfloat16) if x.dtype == BFLOAT16 else there

    def pointer(self, x: Any) -> int:
        return int(x.data_ptr())

    def host(self, x: Any) -> np.ndarray:
        return np.asarray(x.float().cpu().numpy())


class Jax:
    def __init__(self) -> None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        self.jax = pytest.importorskip("jax")
        if self.jax.default_backend() != "gpu":
            pytest.skip("a JAX without CUDA")

    def array(self, x: np.ndarray) -> Any:
        return self.jax.numpy.array(x)

    def pointer(self, x: Any) -> int:
        return int(x.unsafe_buffer_pointer())

    def host(self, x: Any) -> np.ndarray:
        return np.asarray(x.astype("float32"))


@pytest.fixture(params=[Torch, Jax], ids=["torch", "jax"])
def framework(request: pytest.FixtureRequest) -> Any:
    return request.param()


def problem() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A decode step on the host, and its answer."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(BFLOAT16)

    arguments = {"q": normal(2, 1, 8, 64), "k_cache": normal(2, 700, 2, 64), "v_cache": normal(2, 700, 2, 64)}
    arguments["cache_seqlens"] = np.array([700, 300], np.int32)
    return arguments, cuflash.flash_attn_with_kvcache(**arguments).astype(np.float32)


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_memory(framework: Any, dtype: str) -> None:
    values = (20 * np.random.default_rng(0).random((3, 5, 8))).astype(BFLOAT16 if dtype == "bfloat16" else dtype)
    theirs = framework.array(values)
    ours = import_array("x", theirs)
    assert ours.data.ptr == framework.pointer(theirs)
    assert ours.dtype == values.dtype
    assert ours.get().tobytes() == values.tobytes()
    back = exporter(theirs)(ours)
    assert type(back) is type(theirs)
    assert framework.pointer(back) == framework.pointer(theirs)


def test_attention(framework: Any) -> None:
    arguments, wanted = problem()
    theirs = {name: framework.array(x) for name, x in arguments.items()}
    plan = cuflash.get_scheduler_metadata(2, 1, 700, 8, 2, 64, theirs["cache_seqlens"])
    for options in ({}, {"scheduler_metadata": plan}):
        out = cuflash.flash_attn_with_kvcache(**theirs, **options)
        assert type(out) is type(theirs["q"])
        assert_close(framework.host(out), wanted)


def with_plan(theirs: dict[str, Any]) -> dict[str, Any]:
    """Add a plan that remembers the call, with an output or without."""
    plan = cuflash.get_scheduler_metadata(2, 1, 700, 8, 2, 64, theirs["cache_seqlens"])
    theirs = theirs | {"scheduler_metadata": plan}
    for out in ({}, {"out": cuflash.flash_attn_with_kvcache(**theirs)}):
        for _ in range(2):
            cuflash.flash_attn_with_kvcache(**theirs, **out)
    assert plan.calls
    return theirs


def test_remembered_tensors_are_read_anew() -> None:
    """Where they lie, and what they hold: without an import, since torch's current stream is CuPy's."""
    framework = Torch()
    torch = framework.torch
    arguments, wanted = problem()
    theirs = with_plan({name: framework.array(x) for name, x in arguments.items()})
    given = torch.full_like(theirs["q"], float("nan"))
    assert cuflash.flash_attn_with_kvcache(**theirs, out=given) is given
    assert_close(framework.host(given), wanted)
    elsewhere, q = framework.array(arguments["q"]), theirs["q"]
    q.zero_()
    q.set_(elsewhere)
    assert_close(framework.host(cuflash.flash_attn_with_kvcache(**theirs)), wanted)
    assert_close(framework.host(cuflash.flash_attn_with_kvcache(**theirs, out=given)), wanted)
    before = torch.cuda.memory_allocated()
    made = cuflash.flash_attn_with_kvcache(**theirs)
    assert torch.cuda.memory_allocated() > before  # results are torch's own memory
    assert_close(framework.host(made), wanted)
    with pytest.raises(ValueError, match="q cannot be shared"):
        cuflash.flash_attn_with_kvcache(**{**theirs, "q": q.clone().requires_grad_()}, out=given)


@pytest.mark.parametrize("is_remembered", [False, True])
def test_a_producer_that_is_busy_on_another_stream(is_remembered: bool) -> None:
    """Torch's current stream writes the queries late; CuPy's current stream is another one."""
    import cupy

    framework = Torch()
    torch = framework.torch
    arguments, wanted = problem()
    theirs = {name: framework.array(x) for name, x in arguments.items()}
    theirs = with_plan(theirs) if is_remembered else theirs
    late = torch.full_like(theirs["q"], float("nan"))
    producer, consumer = torch.cuda.Stream(), cupy.cuda.Stream(non_blocking=True)
    gate = Gate()
    with torch.cuda.stream(producer), consumer:
        cuflash.flash_attn_with_kvcache(**theirs)  # loads, and takes memory
        torch.cuda.synchronize()
        gate.close(producer)
        late.copy_(theirs["q"])
        out = cuflash.flash_attn_with_kvcache(**{**theirs, "q": late})
        answer = out.clone()  # on the producer, which waits for the consumer
    gate.open()
    torch.cuda.synchronize()
    assert_close(framework.host(answer), wanted)


@pytest.mark.parametrize("is_remembered", [False, True])
def test_a_result_that_takes_long(is_remembered: bool) -> None:
    """CuPy's stream is busy when the call is made: torch's stream waits for the result, also where it was given."""
    import cupy

    framework = Torch()
    torch = framework.torch
    arguments, wanted = problem()
    theirs = {name: framework.array(x) for name, x in arguments.items()}
    theirs = with_plan(theirs) if is_remembered else theirs
    reader, worker = torch.cuda.Stream(), cupy.cuda.Stream(non_blocking=True)
    given = torch.full_like(theirs["q"], float("nan"))
    gate = Gate()
    for out in (None, given):
        with torch.cuda.stream(reader), worker:
            cuflash.flash_attn_with_kvcache(**theirs).clone()  # loads, and takes memory
            torch.cuda.synchronize()
            gate.close(worker)
            answer = cuflash.flash_attn_with_kvcache(**theirs, out=out).clone()
        gate.open()
        torch.cuda.synchronize()
        assert_close(framework.host(answer), wanted)


def test_a_computation_of_jax_in_flight() -> None:
    framework = Jax()
    numpy = framework.jax.numpy
    arguments, wanted = problem()
    theirs = {name: framework.array(x) for name, x in arguments.items()}
    x = numpy.ones((6000, 6000))

    @framework.jax.jit
    def slowly(q: Any, x: Any) -> Any:
        for _ in range(20):
            x = (x @ x) * (1 / 6000)
        return q * x[0, 0].astype(q.dtype)

    for _ in range(3):
        out = cuflash.flash_attn_with_kvcache(**{**theirs, "q": slowly(theirs["q"], x)})
        assert_close(framework.host(out), wanted)
