"""Tree masks and context-parallel positions: cases that random ones seldom meet."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from problems import Backend, Case, check, make_inputs


@pytest.mark.parametrize("heads", [(2, 1), (16, 1)], ids=str)
@pytest.mark.parametrize("seqlens_q", [9, (9, 3, 40)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nodes_that_no_row_sees_may_hold_anything(
    dtype: str, seqlens_q: Any, heads: tuple[int, int], backend: Backend
) -> None:
    """Rejected drafts: whole columns of the mask are empty, and their keys and values are NaN."""
    case = Case(dtype=dtype, seqlens=(77, 20, 130), seqlens_q=seqlens_q, heads=heads, tree="bool", poison=False)
    inputs = make_inputs(case)
    inputs["tree_mask"][..., ::2] = False
    inputs["tree_mask"][..., 1] = True  # and one that all rows see
    unseen = ~reference.seen_slots(**inputs)
    assert unseen[2, 129 - max(case.queries) : 130].any()
    inputs["k_cache"][unseen] = inputs["v_cache"][unseen] = np.nan
    check(case, inputs, backend)


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("cp", [(3, 0, 2), (3, 1, 2), (3, 2, 2), (8, 7, 1), (2, 1, 64)], ids=str)
def test_a_rank_appends_its_own_keys_alone(cp: tuple[int, int, int], page_size: int | None, backend: Backend) -> None:
    """Every byte of the cache is compared, also of slots behind the rank's last key."""
    for new in (1, 5):
        case = Case(seqlens=(20, 1, 130), cp=cp, new=new, causal=True, seqlens_q=2, page_size=page_size)
        check(case, make_inputs(case), backend)
