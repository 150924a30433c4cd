"""The border: arrays of other frameworks come in and go out on the same memory, bfloat16 included."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash import dlpack
from cuflash.arrays import empty, exporter, import_array, import_index
from cuflash.memory import is_on_device

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = ["float16", "bfloat16", "float32", "int32", "int64", "uint8"]


class Torch:
    """What the tests need of torch."""

    writeable = True

    def __init__(self) -> None:
        self.torch = pytest.importorskip("torch")

    def array(self, x: np.ndarray) -> Any:
        if x.dtype == BFLOAT16:
            return self.torch.from_numpy(x.view(np.int16).copy()).view(self.torch.bfloat16)
        return self.torch.from_numpy(x.copy())

    def pointer(self, x: Any) -> int:
        return x.data_ptr()

    def dtype(self, x: Any) -> str:
        return str(x.dtype).removeprefix("torch.")


class Jax:
    """What the tests need of JAX."""

    writeable = False

    def __init__(self) -> None:
        self.jax = pytest.importorskip("jax")
        self.jax.config.update("jax_enable_x64", True)

    def array(self, x: np.ndarray) -> Any:
        return self.jax.numpy.array(x)

    def pointer(self, x: Any) -> int:
        return x.unsafe_buffer_pointer()

    def dtype(self, x: Any) -> str:
        return str(x.dtype)


@pytest.fixture(params=[Torch, Jax], ids=["torch", "jax"])
def framework(request: pytest.FixtureRequest) -> Any:
    return request.param()


def _random(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    return np.asarray(20 * np.random.default_rng(seed).random(shape)).astype(BFLOAT16 if dtype == "bfloat16" else dtype)


# ------------------------------------------------------------------------------------------------ in
@pytest.mark.parametrize("shape", [(3, 4, 5), (7,), (), (0, 4), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_import(framework: Any, dtype: str, shape: tuple[int, ...]) -> None:
    values = _random(shape, dtype)
    theirs = framework.array(values)
    ours = import_array("x", theirs)
    assert type(ours) is np.ndarray
    assert ours.dtype == values.dtype
    assert ours.shape == shape
    assert ours.tobytes() == values.tobytes()
    assert not is_on_device(ours)
    if values.size:
        assert ours.ctypes.data == framework.pointer(theirs)
        assert ours.flags.writeable == framework.writeable


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_import_of_views(dtype: str) -> None:
    """Strides, offsets and expanded dimensions survive."""
    framework = Torch()
    values = _random((4, 6, 8), dtype)
    theirs = [framework.array(values) for _ in range(3)]
    for view, expected in [
        (theirs[0].transpose(0, 2), values.transpose(2, 1, 0)),
        (theirs[1][1:, ::2, 3:], values[1:, ::2, 3:]),
        (theirs[2][:, :1].expand(4, 5, 8), np.broadcast_to(values[:, :1], (4, 5, 8))),
    ]:
        ours = import_array("x", view)
        np.testing.assert_array_equal(ours.astype(np.float32), expected.astype(np.float32))
        assert ours.ctypes.data == view.data_ptr()
        assert ours.strides == tuple(s * ours.itemsize for s in view.stride())
        ours[0, 0, 0] = 3
        assert float(view[0, 0, 0]) == 3


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_float8(name: str) -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.arange(16.0).to(getattr(torch, name))
    ours = import_array("x", theirs)
    assert ours.dtype == np.dtype(getattr(ml_dtypes, name))
    np.testing.assert_array_equal(ours.astype(np.float32), theirs.float().numpy())
    back = exporter(theirs)(ours)
    assert back.dtype == theirs.dtype
    assert back.data_ptr() == theirs.data_ptr()


def test_a_tensor_whose_memory_was_taken_away() -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.zeros(4, 3)
    theirs.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"x must have memory, got shape \(4, 3\) at address 0"):
        import_array("x", theirs)
    assert import_array("x", torch.zeros(0, 3)).shape == (0, 3)


def test_numpy_passes_untouched() -> None:
    array = np.zeros((2, 3))
    assert import_array("x", array) is array
    assert exporter(array)(array) is array
    read_only = np.broadcast_to(np.float32(1), (3,))
    assert not import_array("x", read_only).flags.writeable

    class Sub(np.ndarray):
        pass

    ours = import_array("x", array.view(Sub))
    assert type(ours) is np.ndarray
    assert ours.ctypes.data == array.ctypes.data


def test_memory_lives_as_long_as_the_view() -> None:
    torch = pytest.importorskip("torch")
    storage = np.arange(1000, dtype=np.float32)
    alive = weakref.ref(storage)
    theirs = torch.from_numpy(storage)  # torch keeps `storage` alive
    del storage
    ours = import_array("x", theirs)
    view = ours[10:20]
    del theirs, ours
    gc.collect()
    assert alive() is not None
    np.testing.assert_array_equal(view, np.arange(10, 20))
    del view
    gc.collect()
    assert alive() is None, "the memory is never released"


def test_exported_memory_lives_as_long_as_the_tensor() -> None:
    torch = pytest.importorskip("torch")

    class Memory(np.ndarray):  # an ndarray that can be weakly referenced and seen to die
        pass

    array = np.arange(100, dtype=np.float32).astype(BFLOAT16).view(Memory)
    alive = weakref.ref(array)
    theirs = exporter(torch.zeros(1))(array[10:])
    del array
    gc.collect()
    assert alive() is not None
    assert theirs.float().tolist() == list(range(10, 100))
    del theirs
    gc.collect()
    assert alive() is None


def test_capsules_that_nobody_takes_are_released() -> None:
    torch = pytest.importorskip("torch")
    storage = np.arange(1000, dtype=np.complex64)
    alive = weakref.ref(storage)
    with pytest.raises(ValueError, match="x has elements that NumPy cannot name.*complex64"):
        import_array("x", torch.from_numpy(storage))
    del storage
    gc.collect()
    assert alive() is None


class Old:
    """An array whose framework knows DLPack before 1.0 only."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, stream: Any = None) -> Any:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class New(Old):
    """One whose framework says what is read-only, and counts from the beginning of a larger allocation."""

    def __dlpack__(self, max_version: Any = None, **options: Any) -> Any:
        capsule = self.array.__dlpack__(max_version=max_version)
        tensor = dlpack._managed(capsule)[1].tensor
        tensor.data -= 256
        tensor.byte_offset += 256
        return capsule


class Future(Old):
    """One whose framework is at the next major version; the array lives as long as the capsule."""

    def __init__(self, array: np.ndarray) -> None:
        self.capsule = array.__dlpack__(max_version=(1, 0))
        dlpack._managed(self.capsule)[1].major = 2

    def __dlpack__(self, max_version: Any = None, **options: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


class Elsewhere(Old):
    def __dlpack_device__(self) -> tuple[int, int]:
        return (10, 0)  # kDLROCM


def test_older_dlpack() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    ours = import_array("x", Old(array))
    np.testing.assert_array_equal(ours, array)
    assert ours.ctypes.data == array.ctypes.data
    assert ours.flags.writeable


@pytest.mark.parametrize("writeable", [False, True])
def test_newer_dlpack(writeable: bool) -> None:
    array = np.arange(100, dtype=np.float32)
    array.flags.writeable = writeable
    ours = import_array("x", New(array))
    np.testing.assert_array_equal(ours, array)
    assert ours.ctypes.data == array.ctypes.data
    assert ours.flags.writeable == writeable


def test_another_major_version_of_dlpack() -> None:
    """Its tensor lies elsewhere in the struct: it is refused, and released at once."""

    class Memory(np.ndarray):  # an ndarray that can be weakly referenced and seen to die
        pass

    array = np.arange(100, dtype=np.float32).view(Memory)
    alive, future = weakref.ref(array), Future(array)
    del array
    with pytest.raises(ValueError, match=r"^x cannot be shared: it comes by DLPack 2\.\d, not 1$"):
        import_array("x", future)
    gc.collect()
    assert alive() is None
    with pytest.raises(ValueError, match="^x cannot be shared"):  # there is nothing in the capsule any more
        import_array("x", future)


@pytest.mark.parametrize("x", [[1.0, 2.0], 3, None, "array", Elsewhere(np.zeros(3))], ids=lambda x: type(x).__name__)
def test_what_is_no_array(x: Any) -> None:
    with pytest.raises(TypeError, match=r"^cache_thing must be"):
        import_array("cache_thing", x)


def test_tensors_that_need_gradients() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="q cannot be shared.*gradient"):
        import_array("q", torch.zeros(3, requires_grad=True))


def test_foreign_byte_order() -> None:
    with pytest.raises(ValueError, match="q must be in the machine's byte order"):
        import_array("q", np.zeros(3, np.dtype(np.float32).newbyteorder()))


def test_computation_in_flight() -> None:
    """JAX computes asynchronously: what comes in is finished."""
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((1000, 1000))
    for _ in range(3):
        y = (x @ x) * 1e-3
        np.testing.assert_allclose(import_array("y", y), 1, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ indices
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_import_index(dtype: str) -> None:
    array = np.array([3, 0, 100], dtype)
    ours = import_index("x", array)
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, array)
    assert (ours is array) == (dtype == "int32")
    assert import_index("x", np.zeros((0, 2), dtype)).shape == (0, 2)


def test_import_index_of_frameworks(framework: Any) -> None:
    theirs = framework.array(np.array([[1, 2], [3, 4]], np.int64))
    np.testing.assert_array_equal(import_index("x", theirs), [[1, 2], [3, 4]])
    transposed = import_index("x", np.array([[1, 2], [3, 4]], np.int32).T)
    assert transposed.flags.c_contiguous
    np.testing.assert_array_equal(transposed, [[1, 3], [2, 4]])


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1])
def test_indices_out_of_range(value: int) -> None:
    with pytest.raises(ValueError, match="page_table must have values in the range of int32"):
        import_index("page_table", np.array([0, value]))


def test_indices_of_a_wrong_type() -> None:
    for array in (np.zeros(3), np.zeros(3, bool), np.zeros(3, BFLOAT16)):
        with pytest.raises(TypeError, match="x must be an integer array"):
            import_index("x", array)


# ------------------------------------------------------------------------------------------------ out
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int32"])
def test_export(framework: Any, dtype: str) -> None:
    ours = empty((3, 4, 5), BFLOAT16 if dtype == "bfloat16" else dtype, np.zeros(0))
    ours[...] = _random((3, 4, 5), dtype)
    theirs = exporter(framework.array(np.zeros(2, np.float32)))(ours)
    assert framework.pointer(theirs) == ours.ctypes.data
    assert framework.dtype(theirs) == dtype
    assert tuple(theirs.shape) == (3, 4, 5)
    assert import_array("x", theirs).tobytes() == ours.tobytes()


@pytest.mark.parametrize("shape", [(0,), (3,), (5, 1, 7)], ids=str)
def test_empty_is_aligned(shape: tuple[int, ...]) -> None:
    for dtype in (np.float32, BFLOAT16, np.uint8):
        array = empty(shape, dtype, np.zeros(0))
        assert array.shape == shape
        assert array.dtype == dtype
        assert array.ctypes.data % 64 == 0 or not array.size
        assert array.flags.c_contiguous
        assert array.flags.writeable


# ------------------------------------------------------------------------------------------------ the whole way
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_attention(framework: Any, dtype: str) -> None:
    """The result is of the caller's kind and that of NumPy, bit by bit."""
    q, k, v = _random((2, 1, 4, 64), dtype), _random((2, 50, 2, 64), dtype, 1), _random((2, 50, 2, 64), dtype, 2)
    lengths = np.array([50, 3], np.int32)
    expected = cuflash.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, return_softmax_lse=True)
    theirs = [framework.array(x) for x in (q, k, v, lengths)]
    plan = cuflash.get_scheduler_metadata(2, 1, 50, 4, 2, 64, theirs[3], qkv_dtype=dtype)
    for options in ({}, {"scheduler_metadata": plan}):
        out, lse = cuflash.flash_attn_with_kvcache(
            *theirs[:3], cache_seqlens=theirs[3], return_softmax_lse=True, **options
        )
        assert type(out) is type(theirs[0])
        assert framework.dtype(out) == dtype
        assert framework.dtype(lse) == "float32"
        assert import_array("out", out).tobytes() == expected[0].tobytes()
        assert import_array("lse", lse).tobytes() == expected[1].tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_append_in_place(dtype: str) -> None:
    """Torch's own cache gets the new keys; an `out` of torch's gets the output."""
    framework = Torch()
    q, new = framework.array(_random((2, 1, 4, 64), dtype)), framework.array(_random((2, 1, 2, 64), dtype, 3))
    k, v = framework.array(_random((2, 9, 2, 64), dtype, 1)), framework.array(_random((2, 9, 2, 64), dtype, 2))
    pointers = k.data_ptr(), v.data_ptr()
    out = framework.torch.full_like(q, float("nan"))
    lengths = framework.torch.tensor([4, 8])
    returned = cuflash.flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=lengths, out=out)
    assert returned is out
    assert not out.isnan().any()
    assert pointers == (k.data_ptr(), v.data_ptr())
    for cache in (k, v):
        assert framework.torch.equal(cache[0, 4], new[0, 0])
        assert framework.torch.equal(cache[1, 8], new[1, 0])


def test_caches_in_any_layout() -> None:
    """Views of caches are read where they are: HND storage as NHD, a slice of a fused cache."""
    framework = Torch()
    torch = framework.torch
    q, k = framework.array(_random((2, 1, 4, 64), "bfloat16")), framework.array(_random((2, 30, 2, 64), "bfloat16", 1))
    expected = cuflash.flash_attn_with_kvcache(q, k, k)
    stored = k.transpose(1, 2).contiguous()
    assert torch.equal(cuflash.flash_attn_with_kvcache(q, stored.transpose(1, 2), stored.transpose(1, 2)), expected)
    assert torch.equal(cuflash.flash_attn_with_kvcache(q, stored, stored, layout="HND"), expected)
    fused = torch.cat([k, k], dim=-1)
    assert torch.equal(cuflash.flash_attn_with_kvcache(q, fused[..., :64], fused[..., 64:]), expected)


def test_read_only_caches() -> None:
    """Reading a JAX or read-only cache is fine, appending to it is an error, and changes nothing."""
    values = _random((1, 8, 2, 64), "float32")
    read_only = values.copy()
    read_only.flags.writeable = False
    caches = [read_only, Jax().array(values)]
    q, new = np.ones((1, 1, 2, 64), np.float32), np.ones((1, 1, 2, 64), np.float32)
    for cache in caches:
        other = values.copy()
        cuflash.flash_attn_with_kvcache(q, cache, cache)
        for name, pair in (("k_cache", (cache, other)), ("v_cache", (other, cache))):
            with pytest.raises(ValueError, match=f"{name} must be writeable"):
                cuflash.flash_attn_with_kvcache(q, *pair, new, new, cache_seqlens=2)
        np.testing.assert_array_equal(other, values)
        np.testing.assert_array_equal(np.asarray(cache), values)


def test_caches_that_would_need_a_copy() -> None:
    """A cache is never copied: where its memory cannot be read as it is, that is an error."""
    q = np.ones((1, 1, 2, 64), np.float32)
    good = np.ones((1, 8, 2, 64), np.float32)
    columns = np.ones((1, 8, 2, 128), np.float32)[..., ::2]
    odd = np.ones((1, 8, 2, 66), np.float32)[..., :64]
    for bad in (columns, odd):
        for name, pair in (("k_cache", (bad, good)), ("v_cache", (good, bad))):
            with pytest.raises(ValueError, match=name):
                cuflash.flash_attn_with_kvcache(q, *pair)


def test_mixed_frameworks() -> None:
    """Every argument may be of another kind; the result is of q's."""
    torch = pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    q, k = np.ones((1, 1, 2, 64), np.float32), np.ones((1, 8, 2, 64), np.float32)
    out = cuflash.flash_attn_with_kvcache(jax.numpy.array(q), torch.from_numpy(k), k, cache_seqlens=torch.tensor([5]))
    assert isinstance(out, jax.Array)
    np.testing.assert_allclose(out, 1)


def test_merge_states(framework: Any) -> None:
    outs = [framework.array(np.full((1, 1, 2, 64), x, BFLOAT16)) for x in (1, 3)]
    lses = [framework.array(np.zeros((1, 2, 1), np.float32)) for _ in range(2)]
    out, lse = cuflash.merge_attn_states(outs, lses)
    assert type(out) is type(outs[0])
    assert framework.dtype(out) == "bfloat16"
    np.testing.assert_array_equal(import_array("out", out).astype(np.float32), 2)
    np.testing.assert_allclose(import_array("lse", lse), np.log(2), rtol=1e-6)


def test_frameworks_are_not_imported() -> None:
    """Nothing but NumPy is imported for NumPy callers."""
    code = (
        "import sys, numpy as np, cuflash; x = np.ones((1, 1, 1, 64), np.float32);"
        "cuflash.flash_attn_with_kvcache(x, x, x);"
        "print(sorted({'torch', 'jax', 'cupy', 'tensorflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.slow
def test_speed_beside_torch() -> None:
    """The NumPy backend takes at most twice the time of torch's attention on CPU; usually it takes half."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    q = rng.standard_normal((8, 1, 32, 128), np.float32)
    k, v = rng.standard_normal((2, 8, 4096, 8, 128), np.float32)
    # torch is fastest on (batch, heads, keys, dim), contiguous.
    theirs = [torch.from_numpy(x).transpose(1, 2).contiguous() for x in (q, k, v)]
    calls = {
        "cuflash": lambda: cuflash.flash_attn_with_kvcache(q, k, v),
        "torch": lambda: torch.nn.functional.scaled_dot_product_attention(*theirs, enable_gqa=True),
    }
    np.testing.assert_allclose(calls["cuflash"](), calls["torch"]().transpose(1, 2), atol=1e-5)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(7):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    assert min(times["cuflash"]) <= 2 * min(times["torch"])


@pytest.mark.parametrize("transform", ["jit", "vmap", "grad"])
@pytest.mark.parametrize("name", ["q", "cache_seqlens"])
def test_traced_by_jax(transform: str, name: str) -> None:
    """What JAX traces is no array: the error says so, and what to do."""
    jax = pytest.importorskip("jax")
    q, cache = jax.numpy.ones((2, 1, 4, 64), "float32"), jax.numpy.ones((2, 8, 2, 64), "float32")
    given: dict[str, Any] = {"q": q, "k_cache": cache, "v_cache": cache, "cache_seqlens": 3}

    def call(x: Any) -> Any:
        return cuflash.flash_attn_with_kvcache(**given | {name: x}).sum()

    x = q if name == "q" else jax.numpy.ones(2, "float32" if transform == "grad" else "int32")
    with pytest.raises(TypeError, match=f"^{name} is traced by JAX.*jit, vmap or grad.*pure_callback"):
        getattr(jax, transform)(call)(x)
