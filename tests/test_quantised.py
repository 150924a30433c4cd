"""Quantised caches against the float64 reference of the dequantised one: elements, scales, features, two together."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from cases import KV_DTYPES, kernel_of
from inputs import as_uint8
from problems import Backend, Case, all_pairs, check, first_pairs, make_inputs, transfer
from reference_cache import LARGEST, find_scale, quantise

import cuflash
from cuflash.dlpack import AsBytes, Exporter, float8_name

MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal": True},
    "left": {"window": (19, -1)},
    "causal+left": {"causal": True, "window": (16, 0)},
    "chunk": {"chunk": 32},
    "window+chunk": {"window": (9, 1), "chunk": 23},
}
CACHES: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "rows": {"batch_idx": True, "leftpad": True},
    "pages of 1": {"page_size": 1},
    "pages of 16": {"page_size": 16, "layout": "HND"},
    "pages of 100": {"page_size": 100},
    "rows, heads first": {"layout": "HND"},
}
APPENDS: dict[str, dict[str, Any]] = {
    "none": {},
    "one": {"new": 1},
    "ragged": {"new": (3, 0, 5)},
    "rotated": {"new": 2, "rotary": "interleaved"},
    "half rotated": {"new": 3, "rotary": "half", "rotary_dim": 16},
}
FEATURES: dict[str, list[Any]] = {
    "kv_dtype": list(KV_DTYPES),
    "dtype": ["bfloat16", "float16", "float32", "float8_e4m3fn"],
    "q_scale": ["none", "float", "one", "heads"],
    "k_scale": ["none", "float", "one", "heads", "keys"],
    "v_scale": ["none", "float", "one", "heads", "keys"],
    "headdim": [(64, 64), (80, 48), (96, 112), (128, 128), (192, 128), (256, 256), (16, 64)],
    "heads": [(2, 2), (4, 2), (8, 1), (16, 1), (32, 1), (70, 1)],
    "queries": [1, 3, (0, 1, 6)],
    "mask": list(MASKS),
    "cache": list(CACHES),
    "append": list(APPENDS),
    "softcap": [0.0, 3.0],
    "sinks": [False, True],
    "scale": [None, -0.2, 0.0],
    "splits": [{}, {"num_splits": 3}, {"split_size": 64}],
    "plan": ["none", "given", "stale", "reused"],
    "strided": [False, True],
    "as_uint8": [False, True],
}


def _is_valid(choice: dict[str, Any]) -> bool:
    if choice["q_scale"] != "none" and choice["dtype"] != "float8_e4m3fn":
        return False
    if choice["kv_dtype"] == "int8" and choice["k_scale"] == "none":
        return False  # scores of tens of thousands: float32 holds them less exactly than the check expects
    return True


def _case(choice: dict[str, Any], seed: int) -> Case:
    choice = dict(choice)
    names = ("mask", MASKS), ("cache", CACHES), ("append", APPENDS)
    options = dict(itertools.chain.from_iterable(table[choice.pop(name)].items() for name, table in names))
    scales = tuple(choice.pop(f"{name}_scale") for name in "qkv")
    options |= {"seqlens_q": choice.pop("queries"), "scales": scales, "seed": seed, **choice.pop("splits")}
    return Case(seqlens=(77, 1, 130), **options, **choice)


CHOICES = all_pairs(FEATURES, _is_valid, lambda choice: kernel_of(_case(choice, 0)))
PAIRS = [_case(choice, seed) for seed, choice in enumerate(CHOICES)]


@pytest.mark.parametrize("case", first_pairs(PAIRS, 0.3))
def test_pairs(case: Case, backend: Backend) -> None:
    check(case, make_inputs(case), backend)


@pytest.mark.parametrize("scale", [0.0, 2.0**-126, -1e-36, 1e-20])
@pytest.mark.parametrize("form", ["one", "keys"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e4m3fn"])
def test_softmax_scales_that_make_keys_equal(scale: float, form: str, dtype: str, backend: Backend) -> None:
    """Nothing overflows where a weight of 2^7 or a value's scale is asked for in units of scores."""
    for name, queries in (("int8", 1), ("float8_e5m2", 20)):
        case = Case(dtype=dtype, seqlens=(77, 1), seqlens_q=queries, kv_dtype=name, scales=("none", form, form),
                    scale=scale)  # fmt: skip
        check(case, make_inputs(case), backend)


# ------------------------------------------------------------------------------------------------ elements
def _all_codes(name: str) -> np.ndarray:
    """Return the 256 codes of a type; what is not finite is 1."""
    codes = np.arange(256, dtype=np.uint8).view(KV_DTYPES[name])
    numbers = codes.astype(np.float32)
    return np.where(np.isfinite(numbers), numbers, 1).astype(KV_DTYPES[name])


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("name", KV_DTYPES)
def test_every_code_is_exact(name: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One key: the output is its value, and with a query of one element LSE is that element of the key."""
    monkeypatch.setenv("CUFLASH_BACKEND", "sim")
    monkeypatch.setenv("CUFLASH_NUM_SM", "8")
    monkeypatch.setenv("CUFLASH_ARCH", str(arch))
    codes = _all_codes(name).reshape(16, 1, 1, 16)
    q = np.broadcast_to(np.eye(16, dtype=ml_dtypes.bfloat16), (16, 1, 16, 16)).copy()
    out, lse = cuflash.flash_attn_with_kvcache(q, codes, codes, softmax_scale=1.0, return_softmax_lse=True)
    numbers = codes.astype(np.float32).reshape(16, 1, 16)
    np.testing.assert_array_equal(out[:, 0, :].astype(np.float32), np.broadcast_to(numbers, (16, 16, 16)))
    np.testing.assert_allclose(lse[:, :, 0], numbers[:, 0], rtol=2e-7, atol=1e-6)


def _halfway(name: str) -> np.ndarray:
    """Return every code, what is halfway to the next one, and the floats beside that; and numbers out of range."""
    codes = np.unique(_all_codes(name).astype(np.float32))
    middle = (codes[1:] + codes[:-1]) / 2
    x = np.concatenate([codes, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)])
    x = np.concatenate([x, np.float32([-0.0, 1e30, -1e30, 2e38, LARGEST[name] * 1.01, 1e-38, 1e-40, -1e-40])])
    return np.concatenate([x, np.zeros(-len(x) % 256, np.float32)])


@pytest.mark.parametrize("name", KV_DTYPES)
def test_append_rounds_to_nearest_even_and_saturates(name: str, backend: Backend) -> None:
    k = _halfway(name).reshape(1, -1, 1, 256)
    cache = np.zeros((1, k.shape[1], 1, 256), KV_DTYPES[name])
    k_cache, v_cache = (backend.to_native(cache.copy().view(np.uint8)) for _ in range(2))
    lengths = backend.to_native(np.zeros(1, np.int32))
    q, new = backend.to_native(np.zeros((1, 1, 1, 256), np.float32)), backend.to_native(k)
    cuflash.flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=lengths, kv_dtype=name, v_descale=0.75)
    for got, scale in ((k_cache, 1), (v_cache, 0.75)):
        expected = quantise(k, np.float32(scale), KV_DTYPES[name])
        np.testing.assert_array_equal(backend.to_numpy(got), expected.view(np.uint8))


@pytest.mark.parametrize("name", KV_DTYPES)
def test_append_finds_scales(name: str, backend: Backend) -> None:
    """Of rows of any size: of zeros, below the normal numbers, near the largest; whichever element is the largest."""
    rng = np.random.default_rng(0)
    k = rng.standard_normal((1, 80, 2, 80), np.float32)
    k[:, np.arange(80), :, np.arange(80)] = -9
    k[:, :12] *= np.float32(10.0) ** np.float32([-44, -40, -38, -30, -6, -1, 0, 3, 9, 20, 30, 36])[:, None, None]
    k[0, 3] = 0
    k[0, 4, 1] = -0.0
    k_cache, v_cache = np.zeros((2, 1, 90, 2, 80), np.uint8)
    scales = np.full((2, 1, 90, 2), np.nan, np.float32)
    native = [backend.to_native(x) for x in (k_cache, v_cache, *scales)]
    q, new = backend.to_native(np.zeros((1, 1, 2, 80), np.float32)), backend.to_native(k)
    cuflash.flash_attn_with_kvcache(
        q, native[0], native[1], new, new, cache_seqlens=backend.to_native(np.int32([5])), kv_dtype=name,
        k_descale=native[2], v_descale=native[3],
    )  # fmt: skip
    expected = find_scale(k, KV_DTYPES[name])
    for codes, found in ((native[0], native[2]), (native[1], native[3])):
        found = backend.to_numpy(found)
        np.testing.assert_array_equal(found[:, 5:85], expected)
        assert np.isnan(found[:, :5]).all() and np.isnan(found[:, 85:]).all(), "scales of other keys have been written"
        codes = backend.to_numpy(codes)
        np.testing.assert_array_equal(codes[:, 5:85], quantise(k, expected, KV_DTYPES[name]).view(np.uint8))
        assert not codes[:, :5].any() and not codes[:, 85:].any()


# ------------------------------------------------------------------------------------------------ ranges
def _attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, backend: Backend, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Attend to all of a cache of float8_e4m3fn."""
    arrays = [backend.to_native(x) for x in (q, k.view(np.uint8), v.view(np.uint8))]
    options = {name: backend.to_native(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    out, lse = cuflash.flash_attn_with_kvcache(*arrays, kv_dtype="float8_e4m3fn", return_softmax_lse=True, **options)
    return backend.to_numpy(out).astype(np.float64), backend.to_numpy(lse)


def _exactly(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return out, LSE and the sum of |p v| of one KV head, in float64."""
    scores = np.einsum("bqhd,bkxd->bhqk", q.astype(np.float64), k) / np.sqrt(q.shape[-1])
    top = scores.max(-1, keepdims=True)
    p = np.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    p /= total
    lse = (top + np.log(total))[..., 0]
    return np.einsum("bhqk,bkxd->bqhd", p, v), lse, np.einsum("bhqk,bkxd->bqhd", p, np.abs(v))


def _random_cache(rng: np.random.Generator, keys: int, dim: int = 64) -> tuple[np.ndarray, np.ndarray]:
    k, v = rng.standard_normal((2, 1, keys, 1, dim), np.float32).astype(ml_dtypes.float8_e4m3fn)
    return k, v


@pytest.mark.parametrize("kind", ["spread", "tiny", "no values", "one value"])
def test_scales_of_values_may_be_anything(kind: str, backend: Backend) -> None:
    """Weights times scales have to fit float16 whatever the scales are."""
    rng = np.random.default_rng(1)
    k, v = _random_cache(rng, 300)
    q = rng.standard_normal((1, 1, 8, 64), np.float32).astype(ml_dtypes.bfloat16)
    scales = np.exp(8 * rng.standard_normal((1, 300, 1), np.float32))
    scales[rng.random(scales.shape) < 0.3] = 0
    scales *= {"spread": 1, "tiny": 1e-20, "no values": 0, "one value": 1}[kind]
    if kind == "one value":
        scales[:], scales[0, 200] = 0, 1e-3
    out, lse = _attend(q, k, v, backend, v_descale=scales)
    expected, expected_lse, magnitude = _exactly(q, k.astype(np.float64), v.astype(np.float64) * scales[..., None])
    np.testing.assert_allclose(lse, expected_lse, atol=2e-5)
    assert (np.abs(out - expected) <= 0.008 * magnitude + 1e-37).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_queries_keep_their_bits(dtype: str, backend: Backend) -> None:
    """Elements of a query may be of very different size, and rows too."""
    rng = np.random.default_rng(2)
    k, v = _random_cache(rng, 100)
    q = rng.standard_normal((1, 1, 8, 64), np.float32)
    q *= np.float32(2.0) ** rng.integers(-12, 1, (64,))
    q *= np.float32(2.0) ** (np.float32([0, 1, -8, -3, 2, 0, 0, 0]) - 3)[:, None]
    q[..., 5, :] = 0
    q = q.astype(getattr(ml_dtypes, dtype, dtype))
    if dtype == "bfloat16":  # out of the reach of float16; scores stay small
        q[..., 6, :] = (q[..., 6, :].astype(np.float32) * np.float32(2.0**-60)).astype(q.dtype)
        q[..., 7, :], q[..., 7, 0] = 0, 2.0**40
        k[..., 0] = 0
    out, lse = _attend(q, k, v, backend)
    expected, expected_lse, magnitude = _exactly(q, k.astype(np.float64), v.astype(np.float64))
    np.testing.assert_allclose(lse, expected_lse, atol=5e-6)
    unit = 2.0**-24 if dtype == "float32" else 2.0**-9
    assert (np.abs(out - expected) <= (2 * unit + 1e-5) * magnitude).all()


def test_small_weights_add_up(backend: Backend) -> None:
    """Keys whose weight is 3e-7 of the largest, 4.9 units of float16, keep their share of the output."""
    keys = 1000
    k, v = np.zeros((2, 1, keys, 1, 64), np.float32)
    k[0, 0, 0, 0] = 1
    v[0, 0], v[0, 1:] = 0, 256
    q = np.zeros((1, 1, 8, 64), np.float32)
    q[..., 0] = 8 * np.log(3.4e6)
    q = q.astype(np.float16)
    k, v = k.astype(ml_dtypes.float8_e4m3fn), v.astype(ml_dtypes.float8_e4m3fn)
    out, _ = _attend(q, k, v, backend)
    expected, _, _ = _exactly(q, k.astype(np.float64), v.astype(np.float64))
    np.testing.assert_allclose(out, expected, rtol=2e-3)


@pytest.mark.parametrize("queries", [4, 36])
@pytest.mark.parametrize("dims", [(64, 64), (576, 512)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scales_of_rows_that_see_no_key(value: float, dims: tuple[int, int], queries: int, backend: Backend) -> None:
    """They give 0, with a sink, too, whatever the scales of their sequence are: all its rows, or those before its keys.

    In the last sequence the last two rows see keys: only there may latent rows hold what comes of a scale like that.
    """
    rng = np.random.default_rng(0)
    (dim, dim_v), batch, heads_kv, joint = dims, 3, 1, dims[0] > dims[1]
    codes = rng.integers(-100, 100, (batch, 16, heads_kv, dim)).astype(np.int8)
    given: dict[str, Any] = {
        "q": rng.standard_normal((batch, queries, 4, dim)).astype(ml_dtypes.float8_e4m3fn),
        "k_cache": codes,
        "v_cache": codes[..., :dim_v] if joint else codes[..., ::-1].copy(),
        "cache_seqlens": np.array([9, 0, 2], np.int32),
        "causal": True,
    }
    names = ["q_descale", "k_descale"] if joint else ["q_descale", "k_descale", "v_descale"]
    for name, sinks in itertools.product(names, (None, rng.standard_normal(4).astype(np.float32))):
        scales = {each: rng.uniform(0.01, 0.02, (batch, heads_kv)).astype(np.float32) for each in names}
        answer = reference.attention(**given, **scales, sinks=sinks)
        scales[name][1:] = value
        arguments = as_uint8({**given, **scales, "sinks": sinks}, "int8")
        out, lse = cuflash.flash_attn_with_kvcache(**transfer(arguments, backend), return_softmax_lse=True)
        out, lse = backend.to_numpy(out).astype(np.float64), backend.to_numpy(lse)
        assert not out[1].any() and (joint or not out[2, :-2].any()), name
        assert (np.abs(out[0] - answer.out[0]) <= 0.01 * answer.magnitude[0]).all()
        np.testing.assert_allclose(lse[:2], answer.lse[:2], atol=1e-3)
        np.testing.assert_allclose(lse[2, :, :-2], answer.lse[2, :, :-2], atol=1e-3)


@pytest.mark.parametrize("negative", ["q_descale", "k_descale", "v_descale", "softmax_scale"])
def test_scales_may_be_negative(negative: str, backend: Backend) -> None:
    rng = np.random.default_rng(3)
    k, v = _random_cache(rng, 70)
    q = rng.standard_normal((1, 1, 4, 64), np.float32).astype(ml_dtypes.float8_e4m3fn)
    options: dict[str, Any] = {
        name: np.full((1, 1), 0.5, np.float32) for name in ("q_descale", "k_descale", "v_descale")
    }
    options["softmax_scale"] = 0.125
    options[negative] = -options[negative]
    out, lse = _attend(q.view(np.uint8), k, v, backend, **options)
    sign_k, sign_v = (1, -1) if negative == "v_descale" else (-1, 1)
    expected, expected_lse, magnitude = _exactly(
        q, sign_k * 0.25 * k.astype(np.float64), sign_v * 0.5 * v.astype(np.float64)
    )
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)
    assert (np.abs(out - expected) <= 0.008 * magnitude).all()


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize(
    "scales", [(1e30, 1e30, 5e-37), (1e-30, 1e30, 1.0), (1e-30, 1e-30, 1e37), (1e38, 1e-37, 0.1)], ids=str
)
def test_scales_whose_products_leave_float32(
    scales: tuple[float, float, float], queries: int, backend: Backend
) -> None:
    """Two scales may be of any size as long as the scores are finite."""
    rng = np.random.default_rng(4)
    q = rng.standard_normal((1, queries, 1, 64), np.float32).astype(ml_dtypes.float8_e4m3fn)
    k, v = rng.standard_normal((2, 1, 70, 1, 64), np.float32).astype(ml_dtypes.float8_e4m3fn)
    names = ("q_descale", "k_descale", "softmax_scale")
    out, lse = _attend(q.view(np.uint8), k, v, backend, **dict(zip(names, scales)))
    answer = reference.attention(q, k, v, cache_seqlens=np.array([70]), **dict(zip(names, scales)))
    # Sums of 64 products, in whichever order a machine's BLAS adds them up.
    np.testing.assert_allclose(lse, answer.lse, rtol=2.0**-20, atol=1e-3)
    assert (np.abs(out - answer.out) <= 0.009 * answer.magnitude).all()


# ------------------------------------------------------------------------------------------------ arguments
def _arguments() -> dict[str, Any]:
    return {
        "q": np.ones((2, 1, 4, 64), ml_dtypes.bfloat16),
        "k_cache": np.ones((2, 32, 2, 64), ml_dtypes.float8_e4m3fn),
        "v_cache": np.ones((2, 32, 2, 64), ml_dtypes.float8_e4m3fn),
        "cache_seqlens": np.array([3, 9], np.int32),
    }


def _key_scales(**changes: Any) -> np.ndarray:
    return np.ones(changes.pop("shape", (2, 32, 2)), changes.pop("dtype", np.float32))


WRONG: list[tuple[str, dict[str, Any], type[Exception]]] = [
    ("v_cache", {"v_cache": np.ones((2, 32, 2, 64), ml_dtypes.float8_e5m2)}, ValueError),
    ("kv_dtype", {name: np.ones((2, 32, 2, 64), np.uint8) for name in ("k_cache", "v_cache")}, ValueError),
    ("k_cache", {"kv_dtype": "float8_e5m2"}, ValueError),
    ("k_cache", {"kv_dtype": "bfloat16"}, ValueError),
    ("kv_dtype", {"kv_dtype": "nonsense"}, ValueError),
    ("kv_dtype", {"kv_dtype": "float8_e4m3"}, ValueError),
    ("kv_dtype", {"kv_dtype": ml_dtypes.float8_e4m3}, ValueError),
    ("q", {"q": np.ones((2, 1, 4, 64), ml_dtypes.float8_e4m3)}, ValueError),
    ("q", {"q": np.ones((2, 1, 4, 64), ml_dtypes.float8_e5m2)}, ValueError),
    ("q", {"q": np.ones((2, 1, 4, 64), np.int8)}, ValueError),
    ("q_descale", {"q_descale": 1.0}, ValueError),
    ("q_descale", {"q": np.ones((2, 1, 4, 64), np.uint8), "q_descale": _key_scales()}, ValueError),
    ("k_descale", {"k_descale": "1"}, TypeError),
    ("k_descale", {"k_descale": True}, TypeError),
    ("k_descale", {"k_descale": np.inf}, ValueError),
    ("k_descale", {"k_descale": [1.0]}, TypeError),
    ("k_descale", {"k_descale": 1e39}, ValueError),  # infinite as float32
    ("v_descale", {"v_descale": -1e-38}, ValueError),  # 0 for kernels
    ("k_descale", {"k_descale": 10**400}, ValueError),
    ("softmax_scale", {"softmax_scale": 10**400}, ValueError),
    ("softcap", {"softcap": 10**400}, ValueError),
    ("k_descale", {"k_descale": _key_scales(dtype=np.float64)}, TypeError),
    ("k_descale", {"k_descale": _key_scales(shape=(2,))}, ValueError),
    ("k_descale", {"k_descale": _key_scales(shape=(2, 4))}, ValueError),
    ("v_descale", {"v_descale": _key_scales(shape=(2, 2, 32))}, ValueError),
    ("v_descale", {"v_descale": _key_scales(shape=(2, 32, 2, 1))}, ValueError),
    ("headdim", {name: np.ones((2, 1, 4, 72), ml_dtypes.bfloat16) if name == "q" else
                 np.ones((2, 32, 2, 72), ml_dtypes.float8_e4m3fn) for name in ("q", "k_cache", "v_cache")}, ValueError),
    ("qv", {"q": np.ones((2, 1, 4, 64), np.uint8), "qv": np.ones((2, 1, 4, 64), np.uint8)}, ValueError),
    ("k", {"q": np.ones((2, 1, 4, 64), np.uint8), "k": np.ones((2, 1, 2, 64), np.float16),
           "v": np.ones((2, 1, 2, 64), np.float16)}, ValueError),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "error"), WRONG, ids=[f"{i}-{name}" for i, (name, *_) in enumerate(WRONG)])
def test_wrong_arguments(name: str, changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"(^|\W){name}(\W|$)"):
        cuflash.flash_attn_with_kvcache(**(_arguments() | changes))


def test_scales_that_an_append_writes_must_be_writeable() -> None:
    scales = _key_scales()
    scales.flags.writeable = False
    new = np.ones((2, 1, 2, 64), ml_dtypes.bfloat16)
    cuflash.flash_attn_with_kvcache(**_arguments(), k_descale=scales)
    with pytest.raises(ValueError, match="k_descale"):
        cuflash.flash_attn_with_kvcache(**_arguments(), k=new, v=new, k_descale=scales)


def test_kv_dtype_is_part_of_a_plan() -> None:
    arguments = _arguments()
    plans = [
        cuflash.get_scheduler_metadata(2, 1, 32, 4, 2, 64, arguments["cache_seqlens"], kv_dtype=dtype)
        for dtype in ("e4m3", "int8")
    ]
    for scales in (None, 0.5, np.ones((2, 2), np.float32), _key_scales()):  # their form is not
        cuflash.flash_attn_with_kvcache(**arguments, scheduler_metadata=plans[0], k_descale=scales)
    with pytest.raises(ValueError, match="kv_dtype"):
        cuflash.flash_attn_with_kvcache(**arguments, scheduler_metadata=plans[1])
    assert cuflash.flash_attn_with_kvcache(**arguments).dtype == ml_dtypes.bfloat16


# ------------------------------------------------------------------------------------------------ plans
@pytest.mark.parametrize("options", [{}, {"num_splits": 3}, {"split_size": 128}], ids=str)
@pytest.mark.parametrize("seqlens", [(), (5,), (0, 40, 0), (4000,) * 9, tuple(range(1, 9000, 130))], ids=len)
def test_planners_agree(seqlens: tuple[int, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of quantised keys weigh items by other numbers, on the host as on the device."""
    plans = []
    for name in ("numpy", "sim"):
        monkeypatch.setenv("CUFLASH_BACKEND", name)
        lengths = np.array(seqlens, np.int32)
        meta = cuflash.get_scheduler_metadata(len(seqlens), 1, 9000, 32, 8, 128, lengths, kv_dtype="int8", **options)
        plans.append(meta.array)
    np.testing.assert_array_equal(*plans)


def test_items_weigh_more_than_with_16_bits() -> None:
    """A block that begins many items gets fewer keys; together they still fill the GPU."""
    lengths = np.random.default_rng(0).integers(1, 8193, 64).astype(np.int32)
    plans = [
        cuflash.get_scheduler_metadata(64, 1, 8192, 8, 1, 128, lengths, kv_dtype=dtype)
        for dtype in ("bfloat16", "float8_e4m3fn")
    ]
    assert plans[0].partition.overhead < plans[1].partition.overhead
    assert plans[0].efficiency > plans[1].efficiency > 0.75


def test_compile_knows_both_kinds_of_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call compiles later would be compiled in the middle of a capture."""
    monkeypatch.setenv("CUFLASH_BACKEND", "sim")
    arguments = _arguments()
    meta = cuflash.get_scheduler_metadata(2, 1, 32, 4, 2, 64, arguments["cache_seqlens"], kv_dtype="e4m3")
    cuflash.compile(meta)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled after all")

    monkeypatch.setattr("cuflash.simulator.SimModule", refuse)
    for scales in (None, 0.5, _key_scales()):
        cuflash.flash_attn_with_kvcache(**arguments, scheduler_metadata=meta, k_descale=scales, v_descale=scales)


# ------------------------------------------------------------------------------------------------ other frameworks
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_frameworks_with_float8(framework: str, name: str) -> None:
    """Their arrays say what they are; the output is of their kind."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 1, 4, 64), np.float32).astype(ml_dtypes.float8_e4m3fn)
    k, v = rng.standard_normal((2, 2, 32, 2, 64), np.float32).astype(KV_DTYPES[name])
    expected = cuflash.flash_attn_with_kvcache(q, k, v, q_descale=0.5)
    if framework == "torch":
        torch = pytest.importorskip("torch")
        arrays = [torch.from_numpy(x.view(np.uint8)).view(getattr(torch, x.dtype.name)) for x in (q, k, v)]
    else:
        arrays = [pytest.importorskip("jax.numpy").asarray(x) for x in (q, k, v)]
    try:
        arrays[0].__dlpack__()
    except Exception as error:
        pytest.skip(f"{framework} does not export it: {error}")
    out = cuflash.flash_attn_with_kvcache(*arrays, q_descale=0.5)
    assert type(out) is type(arrays[0])
    np.testing.assert_array_equal(np.asarray(out.tolist()), expected.astype(np.float64))


def test_float8_comes_as_bytes_where_it_has_no_name() -> None:
    """What a GPU's arrays go through; read here by NumPy's own DLPack, which knows no float8 either."""
    array = _all_codes("float8_e5m2")
    foreign = AsBytes(Exporter(array))
    np.testing.assert_array_equal(np.from_dlpack(foreign), array.view(np.uint8))
    assert float8_name(array) == "float8_e5m2"
    assert float8_name(np.zeros(3)) is None
