"""Kinds of arrays that no framework has: what comes back is useful, and what cannot come back is found at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small import Arguments, appending, check, check_caches

import cuflash
from cuflash.compat import flash_attn_interface

ARRAYS = ["q", "k_cache", "v_cache", "k", "v", "cache_seqlens", "rotary_cos", "rotary_sin"]

MODULES = ["mine", "torch.mine", "torchish", "cupy.mine", "cupyx.mine", "jax.mine", "numpy.mine", "keras", "builtins"]


class Bare:
    """What DLPack asks of an object, and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None, **_: Any) -> Any:
        return self.array.__dlpack__(max_version=max_version)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class Old(Bare):
    """The same as it was before DLPack had versions."""

    def __dlpack__(self, stream: Any = None) -> Any:  # type: ignore[override]
        return self.array.__dlpack__()


class Broken(Bare):
    """An object that cannot be exported."""

    def __dlpack__(self, **_: Any) -> Any:  # type: ignore[override]
        raise RuntimeError("no")


class Standard(Bare):
    """An object with a namespace, as the array API standard has it: arrays there have no method to be reshaped."""

    def __array_namespace__(self, api_version: Any = None) -> Any:
        return SimpleNamespace(from_dlpack=lambda x: Standard(np.from_dlpack(x)))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


class NoWayBack(Bare):
    """An object whose framework has a namespace that takes nothing back."""

    def __array_namespace__(self, api_version: Any = None) -> Any:
        return self

    def from_dlpack(self, x: Any) -> Any:
        raise RuntimeError("no")


class NoNamespace(Bare):
    """An object that does not tell its namespace."""

    def __array_namespace__(self, api_version: Any = None) -> Any:
        raise ValueError("no")


class Nowhere(Bare):
    """An object that does not say where it lies."""

    def __dlpack_device__(self) -> tuple[int, int]:
        raise RuntimeError("no")


class NoCapsule(Bare):
    """An object that exports something else."""

    def __dlpack__(self, **_: Any) -> Any:  # type: ignore[override]
        return None


class MyArray(np.ndarray):
    """An array class of a user."""


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_BACKEND", "numpy")


def named_like(kind: type, module: str) -> type:
    """The class as if it came from a module whose name promises something."""
    return type(kind.__name__, (kind,), {"__module__": module})


def copied() -> Arguments:
    return {name: x.copy() if isinstance(x, np.ndarray) else x for name, x in appending().items()}


def check_call(arguments: Arguments, caches: Arguments) -> Any:
    """Call and check the result; or a TypeError names q before anything is written."""
    before = appending()
    try:
        out, lse = cuflash.flash_attn_with_kvcache(**arguments, return_softmax_lse=True)
    except TypeError as error:
        assert "q" in str(error).split()
        for name in ("k_cache", "v_cache"):
            np.testing.assert_array_equal(caches[name], before[name])
        return None
    assert hasattr(out, "__dlpack__") or isinstance(out, np.ndarray)
    check(before, None, np.from_dlpack(out), np.from_dlpack(lse))  # type: ignore[arg-type]
    np_caches = {name: np.asarray(caches[name]) for name in ("k_cache", "v_cache")}
    check_caches(before, _Host(), np_caches)  # type: ignore[arg-type]
    return out


class _Host:
    to_numpy = staticmethod(np.asarray)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind, names", [(Bare, ["q"]), (Bare, ARRAYS), (Old, ["q"])], ids=["q", "all", "old q"])
def test_bare_objects(kind: type, module: str, names: list[str]) -> None:
    """Nothing but __dlpack__ and __dlpack_device__: a NumPy array comes back, or a TypeError names q."""
    arguments = copied()
    wrap = named_like(kind, module)
    given = arguments | {name: wrap(arguments[name]) for name in names}
    out = check_call(given, arguments)
    assert out is None or isinstance(out, np.ndarray)


@pytest.mark.parametrize("name", [name for name in ARRAYS if name != "q"])
def test_bare_objects_beside_arrays(name: str) -> None:
    """The result is of q's kind, whatever the others are."""
    arguments = copied()
    out = check_call(arguments | {name: Bare(arguments[name])}, arguments)
    assert type(out) is np.ndarray


def test_bare_outputs() -> None:
    """What was given as out is what comes back."""
    arguments = copied()
    out = Bare(np.full_like(arguments["q"], np.nan))
    result = cuflash.flash_attn_with_kvcache(**arguments, out=out)
    assert result is out
    assert np.isfinite(out.array).all()


@pytest.mark.parametrize("kind", [Broken, Nowhere, NoCapsule])
@pytest.mark.parametrize("name", ARRAYS)
def test_objects_that_do_not_export(name: str, kind: type) -> None:
    """Whatever they raise, the error names the argument, before anything is written."""
    arguments, before = copied(), appending()
    with pytest.raises((TypeError, ValueError), match=f"^{name} "):
        cuflash.flash_attn_with_kvcache(**arguments | {name: kind(arguments[name])})
    for cache in ("k_cache", "v_cache"):
        np.testing.assert_array_equal(arguments[cache], before[cache])


@pytest.mark.parametrize("kind", [NoWayBack, NoNamespace])
def test_what_cannot_be_returned_is_found_at_once(kind: type) -> None:
    arguments, before = copied(), appending()
    for _ in range(2):
        with pytest.raises(TypeError, match=f"^q must be of a kind.* got {kind.__name__}: no"):
            cuflash.flash_attn_with_kvcache(**arguments | {"q": kind(arguments["q"])})
    for cache in ("k_cache", "v_cache"):
        np.testing.assert_array_equal(arguments[cache], before[cache])


@pytest.mark.parametrize("names", [["q"], ["k_cache", "v_cache"], ARRAYS], ids=["q", "caches", "all"])
def test_subclasses_of_ndarray(names: list[str]) -> None:
    arguments = copied()
    out = check_call(arguments | {name: arguments[name].view(MyArray) for name in names}, arguments)
    assert isinstance(out, np.ndarray)


def test_memory_maps(tmp_path: Any) -> None:
    arguments = copied()
    mapped = {}
    for name in ("q", "k_cache", "v_cache"):
        mapped[name] = np.memmap(tmp_path / name, np.float32, "w+", shape=arguments[name].shape)
        mapped[name][...] = arguments[name]
    assert isinstance(check_call(arguments | mapped, mapped), np.ndarray)


@pytest.mark.parametrize("module", ["mine", "torch.mine", "numpy.mine"])
@pytest.mark.parametrize("names", [["q"], ARRAYS], ids=["q", "all"])
def test_subclasses_of_tensor(names: list[str], module: str) -> None:
    torch = pytest.importorskip("torch")
    arguments = copied()
    mine = named_like(type("MyTensor", (torch.Tensor,), {}), module)
    given = arguments | {name: torch.from_numpy(arguments[name]).as_subclass(mine) for name in names}
    out = check_call(given, arguments)
    assert isinstance(out, torch.Tensor)


def test_negated_tensors() -> None:
    """What such a view means is not what its memory holds."""
    torch = pytest.importorskip("torch")
    arguments = copied()
    arguments["q"] = torch.complex(torch.from_numpy(arguments["q"]), torch.from_numpy(arguments["q"])).conj().imag
    with pytest.raises(ValueError, match="^q must have its values in memory"):
        cuflash.flash_attn_with_kvcache(**arguments)


@pytest.mark.parametrize("kind", [Bare, Old, named_like(Bare, "torch.mine")])
def test_merging_bare_objects(kind: type) -> None:
    rng = np.random.default_rng(0)
    outs = [rng.standard_normal((2, 3, 4, 16), np.float32) for _ in range(2)]
    lses = [rng.standard_normal((2, 4, 3), np.float32) for _ in range(2)]
    wanted = cuflash.merge_attn_states(outs, lses)
    try:
        found = cuflash.merge_attn_states([kind(out) for out in outs], [kind(lse) for lse in lses])
    except TypeError as error:
        assert "outs" in str(error)
    else:
        for x, y in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("module", ["mine", "torch.mine"])
def test_planning_with_bare_objects(module: str) -> None:
    lengths = np.array([5, 7], np.int32)
    plans = [
        cuflash.get_scheduler_metadata(2, 1, 32, 4, 2, 64, given)
        for given in (lengths, named_like(Bare, module)(lengths))
    ]
    assert (plans[0].work() == plans[1].work()).all()


# ------------------------------------------------------------------------------------------------ steps
STEPS: dict[str, dict[str, int]] = {"dense": {}, "padded": {"batch_size": 3}, "ragged": {"max_seqlen_q": 4}}


def begun(**options: int) -> tuple[cuflash.DecodeStep, Arguments]:
    """A step of two sequences with a token each, and the arguments of a call."""
    cache = cuflash.PagedKVCache(1, 4, 16, 2, 64, "float32")
    step = cuflash.DecodeStep(cache, 4).begin([cache.add(), cache.add()], **options)
    rng, rows = np.random.default_rng(0), options.get("batch_size", 2)
    heads = {"q": 4, "k": 2, "v": 2}
    return step, {name: rng.standard_normal((rows, number, 64), np.float32) for name, number in heads.items()}


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_what_a_step_returns_is_of_the_kind_of_its_queries(options: dict[str, int]) -> None:
    step, arguments = begun(**options)
    wanted = step(0, **arguments, return_softmax_lse=True)
    theirs = {name: Standard(x) for name, x in arguments.items()}
    alone = step(0, **theirs)
    found = step(0, **theirs, return_softmax_lse=True)
    targets = [Standard(np.full_like(x, np.nan)) for x in wanted]
    written = step(0, **theirs, out=targets[0], softmax_lse=targets[1], return_softmax_lse=True)
    assert written[0] is targets[0] and written[1] is targets[1]
    for result, array in zip((alone, *found, *targets), (wanted[0], *wanted, *wanted), strict=True):
        assert type(result) is Standard
        np.testing.assert_array_equal(result.array, array)


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_a_step_finds_at_once_what_cannot_be_returned(options: dict[str, int]) -> None:
    step, arguments = begun(**options)
    lse = step(0, **arguments, return_softmax_lse=True)[1]
    step.cache.k[...] = 0
    queries, out = NoWayBack(arguments["q"]), np.empty_like(arguments["q"])
    for more in ({}, {"out": out, "return_softmax_lse": True}):
        with pytest.raises(TypeError, match=r"^q must be of a kind.* got NoWayBack: no"):
            step(0, **arguments | {"q": queries}, **more)
    assert not step.cache.k.any()
    assert step(0, **arguments | {"q": queries}, out=out) is out
    step(0, **arguments | {"q": queries}, out=out, softmax_lse=lse, return_softmax_lse=True)


def test_the_scratch_of_other_interfaces() -> None:
    rng = np.random.default_rng(0)
    q, kv = (Standard(rng.standard_normal((2, 3, heads, 64), np.float32)) for heads in (4, 2))
    for result in flash_attn_interface.flash_attn_with_kvcache(q, kv, kv, return_softmax_lse=True):
        assert type(result) is Standard
