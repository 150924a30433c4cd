"""shared_prefix_attention: two calls that are one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from problems import DTYPES, UNIT_ROUNDOFF, Backend, expected

import cuflash

PAGE, HEADS, KV_HEADS, DIM = 16, 8, 2, 64
PREFIXES = (48, 0, 33)  # keys of three groups
MEMBERS = (2, 1, 3)


def _problem(dtype: str, queries: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of shared_prefix_attention, and those of one call that does not know of prefixes."""
    rng = np.random.default_rng(0)
    batch = sum(MEMBERS)
    own = rng.integers(5, 40, batch).astype(np.int32)
    counts = np.full(batch, queries) if isinstance(queries, int) else np.array(queries)
    shape = (batch, queries) if isinstance(queries, int) else (int(counts.sum()),)
    q = rng.standard_normal((*shape, HEADS, DIM), np.float32).astype(DTYPES[dtype])
    # A prefix that ends inside of a page cannot be followed in the same table: whole keys lie contiguously instead.
    keys = rng.standard_normal((2, batch, 3 * PAGE + 48, KV_HEADS, DIM), np.float32).astype(DTYPES[dtype])
    group = np.repeat(np.arange(len(MEMBERS)), MEMBERS)
    pages = np.zeros((2, 64, PAGE, KV_HEADS, DIM), DTYPES[dtype])
    place = iter(rng.permutation(64))
    prefix_table, suffix_table = np.full((3, 3), -1, np.int32), np.full((batch, 3), -1, np.int32)
    first_of = np.searchsorted(group, np.arange(3))

    def write(table: np.ndarray, b: int, begin: int, count: int) -> None:
        for i in range(-(-count // PAGE)):
            table[i] = next(place)
            part = keys[:, b, begin + i * PAGE : begin + min(count, (i + 1) * PAGE)]
            pages[:, table[i], : part.shape[1]] = part

    for b in range(batch):
        keys[:, b, : PREFIXES[group[b]]] = keys[:, first_of[group[b]], : PREFIXES[group[b]]]
    for g, length in enumerate(PREFIXES):
        write(prefix_table[g], first_of[g], 0, length)
    for b in range(batch):
        write(suffix_table[b], b, PREFIXES[group[b]], int(own[b]))
    starts = np.concatenate([[0], np.cumsum(counts)])
    rows = starts[np.concatenate([[0], np.cumsum(MEMBERS)])]
    common: dict[str, Any] = {"q": q, "causal": True}
    if not isinstance(queries, int):
        common |= {"cu_seqlens_q": starts.astype(np.int32), "max_seqlen_q": int(counts.max())}
    shared = common | {
        "k_cache": pages[0],
        "v_cache": pages[1],
        "page_table": suffix_table,
        "cache_seqlens": own,
        "prefix_page_table": prefix_table,
        "prefix_seqlens": np.array(PREFIXES, np.int32),
        "prefix_cu_seqlens_q": rows.astype(np.int32),
        "prefix_max_seqlen_q": int(np.diff(rows).max()),
    }
    plain = common | {"k_cache": keys[0], "v_cache": keys[1], "cache_seqlens": own + np.array(PREFIXES)[group]}
    return shared, plain


def _native(inputs: dict[str, Any], backend: Backend) -> dict[str, Any]:
    return {name: backend.to_native(x) if isinstance(x, np.ndarray) else x for name, x in inputs.items()}


@pytest.mark.parametrize("queries", [1, 3, (1, 2, 1, 4, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_is_one_call_over_all_keys(dtype: str, queries: Any, backend: Backend) -> None:
    shared, plain = _problem(dtype, queries)
    sinks = np.linspace(-1, 1, HEADS).astype(np.float32)
    native = _native(shared | {"sinks": sinks}, backend)
    out, lse = cuflash.shared_prefix_attention(**native, softmax_scale=0.2, return_softmax_lse=True, merge_with=None)
    answer = expected(plain | {"sinks": sinks, "softmax_scale": 0.2})
    np.testing.assert_allclose(backend.to_numpy(lse), answer.lse, atol=2e-5)
    tolerance = 4 * UNIT_ROUNDOFF[dtype] + 1e-5
    np.testing.assert_allclose(backend.to_numpy(out).astype(np.float64), answer.out, atol=tolerance)


def test_arrays_that_cannot_be_written() -> None:
    """The results are of q's kind; JAX's arrays are read-only."""
    jax = pytest.importorskip("jax")
    shared, plain = _problem("float32", 2)
    given = {name: jax.numpy.asarray(x) if isinstance(x, np.ndarray) else x for name, x in shared.items()}
    out, lse = cuflash.shared_prefix_attention(**given, return_softmax_lse=True)
    assert isinstance(out, jax.Array) and isinstance(lse, jax.Array)
    answer = expected(plain)
    np.testing.assert_allclose(out, answer.out, atol=2e-5)
    np.testing.assert_allclose(lse, answer.lse, atol=2e-5)
    assert isinstance(cuflash.shared_prefix_attention(**shared | {"q": given["q"]}), jax.Array)


def test_on_two_plans_into_the_callers_arrays(backend: Backend) -> None:
    shared, plain = _problem("float32", 2)
    native = _native(shared, backend)
    batch, groups = len(shared["q"]), len(PREFIXES)
    sizes = (HEADS, KV_HEADS, DIM)
    prefix = cuflash.get_scheduler_metadata(
        groups, shared["prefix_max_seqlen_q"], 48, *sizes, native["prefix_seqlens"], qkv_dtype="float32",
        page_size=PAGE, cu_seqlens_q=native["prefix_cu_seqlens_q"],
    )  # fmt: skip
    suffix = cuflash.get_scheduler_metadata(
        batch, 2, 48, *sizes, native["cache_seqlens"], qkv_dtype="float32", page_size=PAGE, causal=True
    )
    out = backend.to_native(np.full(shared["q"].shape, np.nan, np.float32))
    prefix_lse = backend.to_native(np.full((HEADS, 2 * batch), np.nan, np.float32))
    for _ in range(2):
        found = cuflash.shared_prefix_attention(
            **native, prefix_metadata=prefix, scheduler_metadata=suffix, out=out, prefix_lse=prefix_lse
        )
        assert found is out
        np.testing.assert_allclose(backend.to_numpy(out), expected(plain).out, atol=2e-5)


@pytest.mark.parametrize(
    "wrong",
    [{"window_size": (3, 0)}, {"attention_chunk": 16}, {"cp_world_size": 2}, {"rotary_cos": np.ones((9, 8))}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_positions_from_the_beginning_are_refused(wrong: dict[str, Any], backend: Backend) -> None:
    shared, _ = _problem("float32", 1)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        cuflash.shared_prefix_attention(**shared, **wrong)


@pytest.mark.parametrize("into", [False, True], ids=["new", "out"])
@pytest.mark.parametrize("batch, queries", [(0, 1), (0, 0), (3, 0)])
def test_nothing_to_attend(batch: int, queries: int, into: bool, backend: Backend) -> None:
    """An empty batch, or no queries."""
    q = backend.to_native(np.zeros((batch, queries, HEADS, DIM), np.float32))
    cache = backend.to_native(np.zeros((2, PAGE, KV_HEADS, DIM), np.float32))
    ints = {
        "prefix_page_table": (1, 1), "prefix_seqlens": (1,), "prefix_cu_seqlens_q": (2,),
        "page_table": (batch, 1), "cache_seqlens": (batch,),
    }  # fmt: skip
    given = {name: backend.to_native(np.zeros(of, np.int32)) for name, of in ints.items()}
    if into:
        given["out"] = backend.to_native(np.zeros(q.shape, np.float32))
    out, lse = cuflash.shared_prefix_attention(q, cache, cache, prefix_max_seqlen_q=1, **given, return_softmax_lse=True)
    assert out.shape == q.shape and lse.shape == (batch, HEADS, queries)


@pytest.mark.parametrize("heads, dim, what", [(0, DIM, "num_heads_q"), (HEADS, 0, "headdim")])
def test_queries_without_elements_are_refused_by_name(heads: int, dim: int, what: str) -> None:
    shared, _ = _problem("float32", 1)
    with pytest.raises(ValueError, match=f"q: {what} must be"):
        cuflash.shared_prefix_attention(**shared | {"q": np.zeros((6, 1, heads, dim), np.float32)})


@pytest.mark.parametrize("name", ["attention_chunk", "cp_world_size"])
def test_what_is_no_number_is_named(name: str) -> None:
    shared, _ = _problem("float32", 1)
    with pytest.raises(TypeError, match=f"{name} must be an integer, got ndarray"):
        cuflash.shared_prefix_attention(**shared, **{name: np.array([1, 2])})


@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("name", ["q_descale", "k_descale", "v_descale"])
def test_scales_per_sequence_are_refused(name: str, groups: int, backend: Backend) -> None:
    """A group has members of several, also where there happen to be as many groups as sequences."""
    shared, _ = _problem("float32", 1)
    scales = {name: backend.to_native(np.ones((groups, KV_HEADS), np.float32))}
    with pytest.raises(ValueError, match=rf"{name} must be one number.*, got shape \({groups}, {KV_HEADS}\)"):
        cuflash.shared_prefix_attention(**_native(shared, backend), **scales)


def test_scales_that_both_calls_have(backend: Backend) -> None:
    shared, _ = _problem("bfloat16", 1)
    codes = {name: np.clip(32 * shared[name].astype(np.float32), -127, 127) for name in ("k_cache", "v_cache")}
    native = _native(shared | {name: x.astype(np.int8) for name, x in codes.items()}, backend)
    wanted = backend.to_numpy(cuflash.shared_prefix_attention(**native, k_descale=1 / 32, v_descale=1 / 32))
    for scales in (np.full((1, 1), 1 / 32, np.float32), np.full((64, PAGE, KV_HEADS), 1 / 32, np.float32)):
        of_both = dict.fromkeys(("k_descale", "v_descale"), backend.to_native(scales))
        found = backend.to_numpy(cuflash.shared_prefix_attention(**native, **of_both))
        np.testing.assert_allclose(found.astype(np.float32), wanted.astype(np.float32), atol=2e-2)


@pytest.mark.parametrize("gap", [0, 3])
def test_an_output_in_the_queries_is_refused(gap: int, backend: Backend) -> None:
    """The prefix's results would stand where the suffixes read the queries. With a gap, rows of both are copies."""
    shared, _ = _problem("float32", 2)
    memory = backend.to_native(np.pad(shared["q"], ((0, 0), (0, gap), (0, 0), (0, 0))))
    q = memory[:, :2]
    native = _native(shared, backend) | {"q": q}
    before = backend.to_numpy(q).copy()
    with pytest.raises(ValueError, match="out must share no memory with q"):
        cuflash.shared_prefix_attention(**native, out=q)
    np.testing.assert_array_equal(backend.to_numpy(q), before)


@pytest.mark.parametrize("into", [False, True], ids=["new", "out"])
@pytest.mark.parametrize("name", ["cache_seqlens", "sinks", "page_table", "softmax_lse", "k", "scheduler_metadata"])
def test_an_lse_of_the_prefix_in_what_the_suffixes_have_is_refused(
    name: str, into: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is written."""
    monkeypatch.setenv("CUFLASH_BACKEND", "numpy")
    shared, _ = _problem("float32", 1)
    given = shared | {"softmax_lse": np.zeros((6, HEADS, 1), np.float32), "sinks": np.zeros(HEADS, np.float32)}
    if name == "k":
        given |= {x: np.zeros((6, 1, KV_HEADS, DIM), np.float32) for x in ("k", "v")}
    if name == "scheduler_metadata":
        given[name] = cuflash.get_scheduler_metadata(
            6, 1, 48, HEADS, KV_HEADS, DIM, given["cache_seqlens"], qkv_dtype="float32", page_size=PAGE, causal=True
        )
        memory = given[name].array.view(np.float32)
        memory.flags.writeable = True
    else:
        memory = np.zeros(9999, np.float32)
        moved = memory[: given[name].size].view(given[name].dtype).reshape(given[name].shape)
        moved[...] = given[name]
        given[name] = moved
    if into:
        given["out"] = np.zeros_like(shared["q"])
    before = memory.copy()
    with pytest.raises(ValueError, match=f"prefix_lse must share no memory with {name}"):
        cuflash.shared_prefix_attention(**given, prefix_lse=memory[:48].reshape(HEADS, 6))
    assert memory.tobytes() == before.tobytes()


@pytest.mark.parametrize("queries", [2, (1, 2, 1, 4, 0, 3)], ids=str)
@pytest.mark.parametrize(
    "wrong",
    [
        {"cache_seqlens": np.full(6, 49, np.int32)},
        {"cache_seqlens": np.zeros(5, np.int32)},
        {"page_table": np.full((6, 3), 64, np.int32)},
        {"sinks": np.zeros(HEADS + 1, np.float32)},
        {"softmax_lse": np.zeros((1, 1), np.float32)},
        {"scheduler_metadata": 3},
        {"tree_mask": np.ones((1, 1, 1), bool)},
        {"k": np.zeros((6, 2, KV_HEADS, DIM), np.float32)},
        {"k_descale": 2.0},
        {"block_tabel": 3},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_nothing_is_written_where_the_second_call_is_wrong(
    wrong: dict[str, Any], queries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUFLASH_BACKEND", "numpy")
    shared, _ = _problem("float32", queries)
    results = {
        "out": np.full_like(shared["q"], 7),
        "prefix_lse": np.full((HEADS, shared["q"].size // HEADS // DIM), 7, np.float32),
    }
    for given in (results, {"out": results["out"]}, {"prefix_lse": results["prefix_lse"]}):
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            cuflash.shared_prefix_attention(**shared | wrong, **given)
        for array in results.values():
            assert (array == 7).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"prefix_seqlens": np.array([49, 0, 33], np.int32)},
        {"prefix_page_table": np.full((3, 3), 64, np.int32)},
        {"prefix_cu_seqlens_q": np.array([0, 2, 3, 7], np.int32)},
        {"prefix_max_seqlen_q": 1},
        {"prefix_metadata": 3},
        {"prefix_lse": np.zeros((HEADS, 1), np.float32)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_errors_of_the_prefix_name_its_arguments(wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_BACKEND", "numpy")
    shared, _ = _problem("float32", 1)
    with pytest.raises((TypeError, ValueError), match=rf"{next(iter(wrong))}(=1| must)"):
        cuflash.shared_prefix_attention(**shared | wrong)
