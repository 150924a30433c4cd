"""Random problems: any features that the library has together, against the float64 reference."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
from cases import ALL_FEATURES, FEATURES, features_of, random_case
from conftest import BACKENDS, on
from problems import Backend, Case, check, expected, make_inputs, transfer

import cuflash
from cuflash import simulator

COPIES = ("random", "early", "late")
SEEDS = [on(name, seed) for name in BACKENDS for seed in range(10 if name == "sim" else 60)]


@contextlib.contextmanager
def checked(backend: Backend, seed: int) -> Iterator[None]:
    """On the simulator: in a random order, copies as late or as early as they may come, and with all checks."""
    if backend.name != "sim":
        yield
        return
    with simulator.record(seed=seed, cp_async=COPIES[seed % 3]):
        yield


@pytest.mark.parametrize(("backend", "seed"), SEEDS, indirect=["backend"])
def test_random_problem(seed: int, backend: Backend) -> None:
    case = random_case(seed, longest=130 if backend.name == "sim" else 300)
    with checked(backend, seed):
        check(case, make_inputs(case), backend)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("plan", ["none", "reused"])
def test_append_to_rows_that_are_key_and_value(backend: Backend, dtype: str, plan: str) -> None:
    """One array given as both caches, of one head dim: an append brings ``k`` alone."""
    case = Case(
        dtype=dtype, heads=(4, 1), headdim=(128, 128), seqlens=(103, 34), seqlens_q=2, page_size=16, causal=True,
        new=(7, 5), mla="joint", plan=plan, seed=3,
    )  # fmt: skip
    check(case, make_inputs(case), backend)


@pytest.mark.parametrize("scale", ["float", "one", "heads", "keys"])
@pytest.mark.parametrize("queries", [2, 20])
def test_rows_that_are_key_and_value_have_one_scale(backend: Backend, scale: str, queries: int) -> None:
    """One array given as both caches, of one head dim, to which nothing is appended: values have the keys' scales."""
    case = Case(
        dtype="bfloat16", heads=(4, 1), headdim=(128, 128), seqlens=(103, 34), seqlens_q=queries, page_size=16,
        kv_dtype="int8", scales=("none", scale, "none"), mla="joint", seed=3,
    )  # fmt: skip
    check(case, make_inputs(case), backend)


def test_rows_that_are_key_and_value_bring_no_values(backend: Backend) -> None:
    """Neither new ones nor scales of their own, whatever the head dims."""
    case = Case(headdim=(64, 64), heads=(4, 1), kv_dtype="int8", scales=("none", "float", "none"), mla="joint", new=1)
    inputs = transfer(make_inputs(case), backend)
    with pytest.raises(ValueError, match="v must be None"):
        cuflash.flash_attn_with_kvcache(**inputs, v=inputs["k"])
    with pytest.raises(ValueError, match="v_descale must be None or k_descale"):
        cuflash.flash_attn_with_kvcache(**inputs, v_descale=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 3000, 50))
def test_more_random_problems(first: int, backend: Backend) -> None:
    for seed in range(first, first + 50):
        case = random_case(seed, longest=200 if backend.name == "sim" else 1000)
        try:
            with checked(backend, seed):
                check(case, make_inputs(case), backend)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {case}") from error


@pytest.mark.parametrize("seed", range(40))
def test_traps_do_not_reach_the_reference(seed: int) -> None:
    """With every feature of the contract: no NaN, and the same answer without traps."""
    case = random_case(seed, longest=100, features=ALL_FEATURES)
    answer = expected(make_inputs(case))
    assert np.isfinite(answer.out[answer.defined.swapaxes(-1, -2)]).all()
    assert not np.isnan(answer.lse[answer.defined]).any()
    plain = expected(make_inputs(dataclasses.replace(case, poison=False)))
    np.testing.assert_allclose(answer.out[answer.defined.swapaxes(-1, -2)], plain.out[plain.defined.swapaxes(-1, -2)])


def test_every_feature_is_drawn() -> None:
    """Each is switched on in some cases, and in none where it is not there."""
    drawn = [features_of(random_case(seed, features=ALL_FEATURES)) for seed in range(400)]
    assert set.union(*drawn) == ALL_FEATURES
    assert FEATURES <= ALL_FEATURES
    for have in (FEATURES, ALL_FEATURES - {"kv_dtype"}, ALL_FEATURES - {"rotary chunk", "cp", "qv"}):
        assert set.union(*(features_of(random_case(seed, features=have)) for seed in range(200))) <= have
