"""The library's kernels on the simulator under all checks: in random order, with copies that come early and late."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from problems import Backend, Case, check, first_pairs, make_inputs
from test_attention import FEATURES, PAIRS, _case, _is_valid

from cuflash.simulator import record

COPIES = ("early", "late", "random")
HEADDIMS = [(64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (72, 40)]
ROWS = [(7, 1), (16, 1), (32, 1)]


@pytest.fixture(autouse=True)
def simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_BACKEND", "sim")
    # A small GPU, so that items share blocks; clusters have tests of their own.
    monkeypatch.setenv("CUFLASH_NUM_SM", "8")


def run(case: Case, seed: int, cp_async: str) -> None:
    """Run a case under all checks and compare it with the float64 reference."""
    with record(seed=seed, cp_async=cp_async, jitter=2) as launches:
        check(case, make_inputs(case), Backend("sim", lambda array: array, np.asarray))
    assert launches


@pytest.mark.parametrize("case", first_pairs(PAIRS, 0.3))
def test_pairs_under_all_checks(case: Case) -> None:
    run(case, case.seed, COPIES[case.seed % 3])


def variants() -> Iterator[Any]:
    """Yield every dtype x head dim x rows x (softcap, chunk); but for those where two first meet they are slow."""
    axes = FEATURES["dtype"], HEADDIMS, ROWS
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        dtype, headdim, rows = (axis[place] for axis, place in zip(axes, places))
        for turn, (softcap, chunk) in enumerate(itertools.product((0.0, 3.0), (0, 32))):
            marks = () if (places[0] + places[1]) % 3 == places[2] and turn == sum(places) % 4 else pytest.mark.slow
            name = f"{rows[0]}-{headdim}-{dtype}-{softcap}-{chunk}"
            yield pytest.param(dtype, headdim, rows, softcap, chunk, marks=marks, id=name)


@pytest.mark.parametrize(("dtype", "headdim", "heads", "softcap", "chunk"), list(variants()))
def test_every_variant(
    dtype: str, headdim: tuple[int, int], heads: tuple[int, int], softcap: float, chunk: int
) -> None:
    """In many items or in few, with early and with late copies."""
    many = bool(softcap) != bool(chunk)
    seqlens = (77, 1, 200) * (3 if many else 1)
    case = Case(
        dtype=dtype, headdim=headdim, heads=heads, seqlens=seqlens, page_size=16, softcap=softcap, chunk=chunk,
        seed=2 * bool(softcap) + bool(chunk),
    )  # fmt: skip
    for cp_async in ("early", "late"):
        run(case, case.seed, cp_async)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2000))
def test_random_problems(seed: int) -> None:
    """Any features together, with any lengths."""
    rng = np.random.default_rng(seed)
    while True:
        choice = {name: values[rng.integers(len(values))] for name, values in FEATURES.items()}
        if _is_valid(choice):
            break
    choice["seqlens"] = tuple(int(n) for n in rng.integers(0, rng.choice((20, 130, 400)), 3))
    run(_case(choice, seed), seed, COPIES[seed % 3])
