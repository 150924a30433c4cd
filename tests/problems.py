"""Running random problems on a backend, and the check of their answers.

A :class:`Case` says what a problem is like (cases.py); :func:`make_inputs` makes the arrays of one (inputs.py);
:func:`run` calls cuflash on a backend and :func:`check` holds the result against the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import reference
from cases import DTYPES, Case
from inputs import as_uint8, make_inputs

import cuflash

__all__ = ["DTYPES", "Backend", "Case", "all_pairs", "check", "expected", "first_pairs", "make_inputs", "run"]
UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
# Below these, numbers have fewer bits (GPUs may also flush float32 ones to zero).
TINY = {"float16": 2.0**-24, "bfloat16": 2.0**-125, "float32": 2.0**-125}


@dataclass(frozen=True)
class Backend:
    """Where a problem runs.

    Attributes:
        name: The value of CUFLASH_BACKEND.
        to_native: Takes a NumPy array there.
        to_numpy: Brings one back.
    """

    name: str
    to_native: Callable[[np.ndarray], Any]
    to_numpy: Callable[[Any], np.ndarray]


# ------------------------------------------------------------------------------------------------ running problems
def run(case: Case, inputs: dict[str, Any], backend: Backend) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Call cuflash; return out, lse and the caches after the call as NumPy arrays. The inputs stay as they are."""
    results = run_all(case, inputs, backend)
    return tuple(results[name] for name in ("out", "lse", "k_cache", "v_cache"))  # type: ignore[return-value]


def run_all(case: Case, inputs: dict[str, Any], backend: Backend) -> dict[str, Any]:
    """Call cuflash; return out, lse and every argument after the call, arrays as NumPy arrays."""
    if backend.name == "cuda" and case.kv_dtype:
        inputs = as_uint8(inputs, case.kv_dtype)  # CuPy has no float8
    arguments = transfer(inputs, backend)
    options: dict[str, Any] = {"num_splits": case.num_splits, "split_size": case.split_size}
    if case.plan != "none":
        options = {"scheduler_metadata": make_plan(case, inputs, backend)}
    if case.merge == "in place":
        options["out"], options["softmax_lse"] = arguments["merge_with"]
    elif case.plan == "reused":
        cuflash.flash_attn_with_kvcache(**arguments, **options)
    out, lse = cuflash.flash_attn_with_kvcache(**arguments, **options, return_softmax_lse=True)

    def to_numpy(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(to_numpy(part) for part in x)
        return backend.to_numpy(x) if hasattr(x, "__dlpack__") else x

    return {name: to_numpy(x) for name, x in (arguments | {"out": out, "lse": lse}).items()}


def transfer(inputs: dict[str, Any], backend: Backend) -> dict[str, Any]:
    """Copy all arrays to a backend: strides stay as they are, and views of one memory stay views of one memory."""
    memories: dict[int, Any] = {}

    def move(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(move(part) for part in x)
        if not isinstance(x, np.ndarray):
            return x
        root = x
        while isinstance(root.base, np.ndarray):
            root = root.base
        if not root.flags.c_contiguous or not root.size:
            return backend.to_native(x.copy())
        if id(root) not in memories:
            memories[id(root)] = backend.to_native(root.reshape(-1).view(np.uint8).copy())
        memory, offset = memories[id(root)], x.__array_interface__["data"][0] - root.__array_interface__["data"][0]
        if isinstance(memory, np.ndarray):
            return np.ndarray(x.shape, x.dtype, memory, offset, x.strides)
        return type(memory)(x.shape, x.dtype, memory.data + offset, x.strides)

    return {name: move(x) for name, x in inputs.items()}


def make_plan(case: Case, inputs: dict[str, Any], backend: Backend) -> cuflash.SchedulerMetadata:
    """Plan a problem, with other lengths than its own if the case wants a stale plan."""
    seqlens = inputs["cache_seqlens"]
    if case.plan == "stale":
        # 61 is prime: as good as random, and some sequences grow while others shrink.
        seqlens = (inputs.get("cache_leftpad", 0) + (7 + 61 * np.arange(len(seqlens))) % 190).astype(np.int32)
    if case.plan == "long":
        seqlens = np.full(len(seqlens), 1000, np.int32)
    lengths = {
        name: backend.to_native(inputs[name])
        for name in ("cu_seqlens_q", "cu_seqlens_k_new", "cache_leftpad")
        if name in inputs
    }
    max_seqlen_q = inputs.get("max_seqlen_q", inputs["q"].shape[1])
    newer = {name: inputs[name] for name in ("cp_world_size", "cp_rank", "cp_interleave") if name in inputs}
    if case.kv_dtype:
        newer["kv_dtype"] = case.kv_dtype
    return cuflash.get_scheduler_metadata(
        len(seqlens),
        max_seqlen_q,
        1000,
        *case.heads,
        case.headdim[0],
        backend.to_native(seqlens),
        qkv_dtype=case.dtype,
        headdim_v=case.headdim[1],
        page_size=case.page_size,
        max_seqlen_k_new=max(case.appended, default=0),
        causal=case.causal,
        window_size=case.window,
        attention_chunk=case.chunk,
        has_softcap=case.softcap > 0,
        num_splits=case.num_splits,
        split_size=case.split_size,
        **lengths,
        **newer,
    )


def expected(inputs: dict[str, Any]) -> reference.Answer:
    """Return what the call must give."""
    return reference.attention(**inputs)


def check(case: Case, inputs: dict[str, Any], backend: Backend) -> tuple[np.ndarray, np.ndarray]:
    """Run a problem and compare out, lse and caches with the reference; return out and lse."""
    results = run_all(case, inputs, backend)
    answer = expected(inputs)
    check_out(case, results["out"], answer)
    check_lse(case, results["lse"], answer)
    slack = 1 if case.kv_dtype and case.rotary else 0
    check_cache("v_cache", results["v_cache"], answer.v_cache, slack if case.mla == "joint" else 0)
    check_cache("k_cache", results["k_cache"], answer.k_cache, slack)
    for name in ("k_descale", "v_descale"):
        if np.ndim(inputs.get(name)) == 3:
            tolerance = 1e-6 if case.rotary else 0
            np.testing.assert_allclose(results[name], getattr(answer, name), rtol=tolerance, err_msg=name)
    written = {"k_cache", "v_cache", "k_descale", "v_descale"} | ({"merge_with"} if case.merge == "in place" else set())
    for name in inputs.keys() - written:
        for before, after in zip(_arrays(inputs[name]), _arrays(results[name]), strict=True):
            assert before.tobytes() == after.tobytes(), f"{name} has been changed"
    return results["out"], results["lse"]


def _arrays(x: Any) -> list[np.ndarray]:
    """Return the arrays that an argument is made of."""
    return [part for part in (x if isinstance(x, tuple) else (x,)) if isinstance(part, np.ndarray)]


def check_out(case: Case, out: np.ndarray, answer: reference.Answer) -> None:
    """Compare an output with the reference.

    An output element is sum(p * v). For 16-bit types each p may be rounded, which moves the sum by at most
    u * sum(p * |v|) for the unit roundoff u, and then the sum itself, by at most u * |sum|: together 2 u * magnitude.
    Scores and sums are float32 throughout, worth 1e-5 for scores of size 1, which softmax_scale may make larger. On
    average roundings cancel. Next to a large sink, outputs may be subnormal. The bound of a row without keys is 0: it
    must be exactly 0.
    """
    assert out.shape == answer.out.shape
    assert out.dtype == DTYPES[case.out_dtype]
    u = UNIT_ROUNDOFF[case.out_dtype]
    defined = answer.defined.swapaxes(-1, -2)[..., None]
    with np.errstate(invalid="ignore"):  # what has no meaning may be anything
        error = np.where(defined, np.abs(out.astype(np.float64) - answer.out), 0)
    assert np.isfinite(error).all(), f"{np.count_nonzero(~np.isfinite(error))} of {error.size} elements are not finite"
    # Rotated float8 queries may or may not be rounded to bfloat16: scores differ by up to 0.02.
    size = abs(case.scale or 0) * sum(case.headdim[: 1 + (case.mla in ("qv", "qv row"))]) ** 0.5
    slack = 0.02 if case.dtype == "float8_e4m3fn" and case.rotary else 1e-5 * max(1, size)
    bound = (2 * u + slack) * answer.magnitude
    bound[answer.magnitude > 0] += TINY[case.out_dtype]
    worst = np.unravel_index((error - bound).argmax(), error.shape) if error.size else ()
    assert (error <= bound).all(), f"out{list(map(int, worst))}: {out[worst]} instead of {answer.out[worst]}"
    assert error.sum() <= (0.6 * u + slack / 5) * bound.sum() / (2 * u + slack), (
        "out is less accurate than rounding explains"
    )


def check_lse(case: Case, lse: np.ndarray, answer: reference.Answer) -> None:
    """Compare an LSE with the reference: float32 sums, but tanh and rotated 16-bit queries may be less accurate."""
    assert lse.shape == answer.lse.shape
    assert lse.dtype == np.float32
    empty = np.isneginf(answer.lse) & answer.defined
    np.testing.assert_array_equal(lse[empty], -np.inf)
    bound = 1e-3 if case.softcap or (case.rotary and case.dtype != "float32") else 2e-5
    bound = 0.02 if case.rotary and case.dtype == "float8_e4m3fn" else bound
    rest = answer.defined & ~empty
    np.testing.assert_allclose(lse[rest], answer.lse[rest], rtol=1e-6, atol=bound)


def check_cache(name: str, cache: np.ndarray, expected: np.ndarray, slack: int = 0) -> None:
    """Compare a cache bit by bit (NaN included) with what a separate write would have made.

    Args:
        name: Of the cache.
        cache: What is.
        expected: What must be.
        slack: By how many units codes of 8 bits may differ: rounded after a rotation, they may be beside each other.
    """
    bits = f"u{cache.dtype.itemsize}"
    cache, expected = np.ascontiguousarray(cache), np.ascontiguousarray(expected)
    different = cache.view(bits) != expected.view(bits)
    if slack:
        # Codes of one sign are in order as integers (int8 as they are); a zero of either sign is a zero.
        a, b = (_ordered(x) for x in (cache, expected))
        different &= np.abs(a - b) > slack
    different = different.any(-1)
    assert not different.any(), (
        f"{name} differs in {np.count_nonzero(different)} rows, first {np.argwhere(different)[0]}"
    )


def _ordered(codes: np.ndarray) -> np.ndarray:
    """Return 8-bit codes as integers in the order of their values."""
    if codes.dtype == np.int8:
        return codes.astype(int)
    x = codes.view(np.uint8).astype(int)
    return np.where(x < 128, x, 128 - x)


# ------------------------------------------------------------------------------------------------ all pairs
_CHOICES, _FEWER_PAIRS = 2000, 6  # random combinations to choose from, how many pairs less than the most are few


def all_pairs(
    features: dict[str, Sequence[Any]],
    is_valid: Callable[[dict[str, Any]], bool],
    kernel_of: Callable[[dict[str, Any]], Hashable] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield combinations in which every two values of different features meet at least once, where any valid one can.

    Greedy: of many random combinations around a pair that is missing yet, take the one with the most missing pairs. A
    kernel takes longer to compile than to run: one with a few pairs less is taken whose kernel is there already.

    Args:
        features: The values of each feature, by name.
        is_valid: Whether a combination can be.
        kernel_of: What tells the kernels of combinations apart.
    """
    rng = np.random.default_rng(0)
    names, sizes = list(features), [len(values) for values in features.values()]
    first = np.cumsum([0, *sizes[:-1]])  # values have numbers, those of one feature behind those of another
    feature = np.repeat(np.arange(len(sizes)), sizes)
    missing = feature[:, None] < feature
    a, b = np.triu_indices(len(sizes), 1)
    kernels: set[Hashable] = set()
    while missing.any():
        x, y = rng.choice(np.argwhere(missing))  # not the first: the first combinations would have but the first values
        chosen = first + rng.integers(0, sizes, (_CHOICES, len(sizes)))
        chosen[:, feature[x]], chosen[:, feature[y]] = x, y
        pairs = missing[chosen[:, a], chosen[:, b]].sum(1)
        best: tuple[int, dict[str, Any]] | None = None
        for number in np.argsort(-pairs, kind="stable"):
            if best is not None and pairs[number] < pairs[best[0]] - _FEWER_PAIRS:
                break
            choice = {name: features[name][i] for name, i in zip(names, chosen[number] - first, strict=True)}
            if not is_valid(choice):
                continue
            is_there = kernel_of is None or kernel_of(choice) in kernels
            if best is None or is_there:
                best = number, choice
            if is_there:
                break
        missing[x, y] = False  # a pair that no valid combination has is given up
        if best is not None:
            number, choice = best
            missing[chosen[number][:, None], chosen[number]] = False
            if kernel_of is not None:
                kernels.add(kernel_of(choice))
            yield choice


def first_pairs(cases: Sequence[Case], on_sim: float, elsewhere: int | None = None) -> list[Any]:
    """Return cases of :func:`all_pairs` as parameters; those that run with --slow alone come last and hold few pairs.

    Every case meets as many new pairs as it can: the first quarter holds three of four, two fifths seven of eight.

    Args:
        cases: The cases.
        on_sim: How many of them run on the simulator, which compiles kernels for them: a share.
        elsewhere: How many run on other backends; None: all.
    """
    few = len(cases) if elsewhere is None else elsewhere

    def marks(number: int) -> Any:
        if number >= few:
            return pytest.mark.slow
        return pytest.mark.slow_on_sim if number >= on_sim * few else ()

    return [pytest.param(case, id=str(case), marks=marks(number)) for number, case in enumerate(cases)]
