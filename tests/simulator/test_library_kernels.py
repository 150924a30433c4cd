"""The library's kernels under all checks, in random order, with copies that come early and late."""

from __future__ import annotations

import numpy as np
import pytest
from problems import Backend, Case, check, make_inputs
from test_attention import PAIRS

from cuflash.simulator import Checks, record


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=[str(case) for case in PAIRS])
def test_pairs_under_all_checks(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_BACKEND", "sim")
    case: Case = PAIRS[number]
    # Value tiles that are padded have columns that nothing writes; they are merged and dropped.
    checks = Checks(uninitialised=case.headdim[1] % 32 == 0)
    with record(checks, seed=number, cp_async=("early", "late", "random")[number % 3], jitter=2) as launches:
        check(case, make_inputs(case), Backend("sim", lambda array: array, np.asarray))
    assert launches
