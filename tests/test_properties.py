"""Two ways to say the same thing give the same: in the reference, and in the library where it has the feature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
from cases import FEATURES, Case
from conftest import BACKENDS, backend_of, on
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import make_inputs
from problems import Backend, transfer

import cuflash

Results = tuple[np.ndarray, np.ndarray]
Solver = Callable[[dict[str, Any]], Results]
# The solver is the same for all examples of a test.
SETTINGS = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
EVERYTHING = {"causal": True, "leftpad": True, "sinks": True, "seqlens": (70, 0, 1, 33), "seqlens_q": (1, 3, 2, 4)}


def by_definition(inputs: dict[str, Any]) -> Results:
    answer = reference.attention(**inputs)
    return answer.out, answer.lse


@pytest.fixture(params=["reference", *(on(name) for name in BACKENDS)])
def solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Solver]:
    """The reference, or the library on a backend; called with the features that a test needs."""
    if request.param == "reference":
        return lambda *_: by_definition
    monkeypatch.setenv("CUFLASH_BACKEND", request.param)
    monkeypatch.setenv("CUFLASH_NUM_SM", "8")
    backend: Backend = backend_of(request.param)

    def solve(inputs: dict[str, Any]) -> Results:
        given = transfer({name: x for name, x in inputs.items() if x is not None}, backend)
        out, lse = cuflash.flash_attn_with_kvcache(**given, return_softmax_lse=True)
        return backend.to_numpy(out), backend.to_numpy(lse)

    def needing(*features: str) -> Solver:
        if not set(features) <= FEATURES:
            pytest.skip(f"the library has no {features} yet")
        return solve

    return needing


def assert_close(found: Results, wanted: Results, atol: float = 2e-5) -> None:
    np.testing.assert_allclose(found[1], wanted[1], atol=atol)
    np.testing.assert_allclose(found[0], wanted[0], atol=atol)


@pytest.mark.parametrize("words", [False, True], ids=["bool", "words"])
@pytest.mark.parametrize("queries", [(1, 5, 2, 3), 4, 40], ids=str)
def test_a_chain_is_causal(queries: Any, words: bool, solver: Any) -> None:
    solve = solver("tree_mask")
    inputs = make_inputs(Case(seqlens=(70, 0, 1, 33), seqlens_q=queries, sinks=True, page_size=16))
    sq = max(queries) if isinstance(queries, tuple) else queries
    chain = np.tril(np.ones((sq, sq), bool))
    starts = inputs.get("cu_seqlens_q", np.arange(5) * sq)
    mask = np.concatenate([chain[:n] for n in np.diff(starts)]).reshape(*inputs["q"].shape[:-2], sq)
    if words:
        bits = np.zeros((*mask.shape[:-1], -(-sq // 32) * 32), np.uint8)
        bits[..., :sq] = mask
        mask = np.packbits(bits, axis=-1, bitorder="little").view("<u4").astype(np.uint32)
    assert_close(solve(inputs | {"tree_mask": mask}), solve(inputs | {"causal": True}))


@pytest.mark.parametrize("rows", [False, True], ids=["", "rows"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_csr_is_dense_bit_by_bit(page_size: int, rows: bool, solver: Any) -> None:
    solve = solver("csr")
    inputs = make_inputs(Case(page_size=page_size, csr=True, batch_idx=rows, **EVERYTHING))
    indptr, indices = inputs["page_table"]
    counts = np.diff(indptr)
    dense = np.full((len(counts), int(counts.max()) + 2), 2**31 - 1, np.int32)
    for row, count in enumerate(counts):
        dense[row, :count] = indices[indptr[row] : indptr[row] + count]
    once = {"num_splits": 1}  # the room of a table may change the plan
    for x, y in zip(solve(inputs | once), solve(inputs | once | {"page_table": dense}), strict=True):
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("form", ["none", "float", "one", "heads", "keys"])
@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_codes_are_what_they_stand_for(kv_dtype: str, form: str, solver: Any) -> None:
    """float32 queries see a quantised cache as they see its values in float32."""
    solve = solver("kv_dtype")
    inputs = make_inputs(Case(kv_dtype=kv_dtype, scales=("none", form, form), poison=False, **EVERYTHING))
    values = dict(inputs)
    for name in ("k_cache", "v_cache"):
        scale = values.pop(name[0] + "_descale", None)
        if form == "heads":
            scale = np.asarray(scale)[:, None, :, None]
        elif form == "keys":
            scale = np.asarray(scale)[..., None]
        values[name] = (inputs[name].astype(np.float32) * np.float32(1 if scale is None else scale)).astype(np.float32)
    size = float(np.abs(values["v_cache"]).max())
    assert_close(solve(inputs), solve(values), atol=2e-5 * max(1, size))


@pytest.mark.parametrize("sizes", [(576, 512), (320, 256)], ids=str)
@pytest.mark.parametrize("pages", [None, 16])
def test_both_spellings_of_mla(pages: int | None, sizes: tuple[int, int], solver: Any) -> None:
    solve = solver("qv", "joint")
    d, dv = sizes
    case = Case(heads=(6, 1), headdim=(d, dv), mla="joint", page_size=pages, poison=False, **EVERYTHING)
    inputs = make_inputs(case)
    q, row = inputs["q"], inputs["k_cache"]
    split = inputs | {"q": q[..., dv:], "qv": q[..., :dv], "k_cache": row[..., dv:], "v_cache": row[..., :dv]}
    assert_close(solve(inputs), solve(split))


MASKS: list[dict[str, Any]] = [{}, {"causal": True}, {"window": (19, 2)}, {"chunk": 16}, {"causal": True, "chunk": 23}]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("world, interleave", [(1, 1), (2, 1), (3, 16), (8, 64), (5, 7)])
def test_merged_ranks_are_the_whole(world: int, interleave: int, mask: dict[str, Any], solver: Any) -> None:
    """Each rank has its keys, appends its own of the new ones, and is merged into those before it."""
    merge_ranks(world, interleave, mask, 3, (70, 0, 1, 133), solver)


@SETTINGS
@given(
    world=st.integers(1, 8),
    interleave=st.integers(1, 64),
    mask=st.sampled_from(MASKS),
    queries=st.integers(1, 9),
    seqlens=st.tuples(st.integers(0, 200), st.integers(0, 3)),
)
def test_merged_ranks_of_any_world(
    world: int, interleave: int, mask: dict[str, Any], queries: int, seqlens: tuple[int, ...], solver: Any
) -> None:
    merge_ranks(world, interleave, mask, queries, seqlens, solver)


def merge_ranks(
    world: int, interleave: int, mask: dict[str, Any], queries: int, seqlens: tuple[int, ...], solver: Any
) -> None:
    solve = solver("cp", "merge_with")
    case = Case(seqlens=seqlens, seqlens_q=queries, new=3, rotary="half", sinks=True, poison=False, **mask)
    inputs = make_inputs(case)
    if mask == {"chunk": 16}:
        solve = by_definition if solve is by_definition else solver("cp", "merge_with", "rotary chunk")
    wanted = solve(inputs)
    capacity = inputs["k_cache"].shape[1]
    result: Results | None = None
    for rank in range(world):
        here = np.flatnonzero(np.arange(capacity) // interleave % world == rank)
        part = inputs | {name: np.ascontiguousarray(inputs[name][:, here]) for name in ("k_cache", "v_cache")}
        if not len(here):
            part |= {name: inputs[name][:, :1] for name in ("k_cache", "v_cache")}
        part |= {"cp_world_size": world, "cp_rank": rank, "cp_interleave": interleave, "merge_with": result}
        if rank:
            part.pop("sinks")
        result = solve(part)
    assert result is not None
    assert_close(result, wanted, atol=5e-5)


@pytest.mark.parametrize("cut", [0, 1, 16, 33])
def test_merged_parts_are_the_whole(cut: int, solver: Any) -> None:
    """Keys before the cut in one call, those behind it in another."""
    solve = solver("merge_with")
    inputs = make_inputs(Case(seqlens=(70, 0, 1, 33), seqlens_q=(1, 3, 0, 5), sinks=True, page_size=16))
    lengths = inputs["cache_seqlens"]
    before = np.minimum(lengths, cut).astype(np.int32)
    first = solve({name: x for name, x in inputs.items() if name != "sinks"} | {"cache_seqlens": before})
    second = solve(inputs | {"cache_leftpad": before, "merge_with": first})
    assert_close(second, solve(inputs))


@SETTINGS
@given(cuts=st.lists(st.tuples(*[st.integers(0, 130)] * 3), min_size=1, max_size=3), masked=st.booleans())
def test_any_parts_are_the_whole(cuts: list[tuple[int, ...]], masked: bool, solver: Any) -> None:
    """Each sequence cut anywhere, parts without keys too; only the last part has a mask, which begins there."""
    solve = solver("merge_with")
    inputs = make_inputs(Case(seqlens=(120, 1, 33), seqlens_q=2, page_size=3, csr=False, causal=masked))
    lengths = inputs["cache_seqlens"]
    most = lengths - 2 * masked  # what the first query sees
    ends = [np.clip(cut, 0, np.maximum(most, 0)) for cut in np.sort(cuts, axis=0)]
    begin, result = np.zeros(3, np.int64), None
    for end in ends:
        part = {"cache_leftpad": begin.astype(np.int32), "cache_seqlens": end.astype(np.int32), "causal": False}
        result = solve(inputs | part | {"merge_with": result})
        begin = end
    found = solve(inputs | {"cache_leftpad": begin.astype(np.int32), "merge_with": result})
    assert_close(found, solve(inputs))


def test_negative_pages_change_nothing_else(solver: Any) -> None:
    solve = solver("negative pages")
    inputs = make_inputs(Case(page_size=16, seqlens=(70, 20, 33), seqlens_q=2, new=1, poison=False))
    wanted = solve(inputs)
    table = inputs["page_table"].copy()
    table[1] = -1
    found = solve(inputs | {"page_table": table})
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(x[[0, 2]], y[[0, 2]])
