"""What FlashAttention-3 takes without a word is taken: arguments without their partner, None, padding of any kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from problems import Backend
from small import (
    BATCH,
    CAPACITY,
    PAGE,
    appending,
    call,
    check,
    contiguous,
    native,
    paged,
    plan,
)
from small import ragged as make_ragged

import cuflash

LONELY = {
    "rotary_seqlens": np.array([1, 2, 3], np.int32),
    "cu_seqlens_k_new": np.array([0, 1, 2, 3], np.int32),
    "max_seqlen_q": 99,
}


# ------------------------------------------------------------------------------------------------ without a partner
@pytest.mark.parametrize("planned", [False, True], ids=["", "planned"])
@pytest.mark.parametrize("names", [[name] for name in LONELY] + [list(LONELY)], ids="+".join)
def test_without_a_partner(names: list[str], planned: bool, backend: Backend) -> None:
    """rotary_seqlens without rotary_cos, cu_seqlens_k_new without k, max_seqlen_q without cu_seqlens_q."""
    arguments = contiguous()
    options = {"scheduler_metadata": plan(arguments, backend)} if planned else {}
    wanted = call(native(arguments, backend), backend, **options)
    given = native(arguments | {name: LONELY[name] for name in names}, backend)
    for _ in range(3):
        for x, y in zip(call(given, backend, **options), wanted, strict=True):
            np.testing.assert_array_equal(x, y)


def test_rotary_seqlens_beside_new_keys(backend: Backend) -> None:
    """As FlashAttention-3's test passes it: with new keys, without rotary embedding."""
    arguments = appending()
    del arguments["rotary_cos"], arguments["rotary_sin"]
    out, lse = call(native(arguments | {"rotary_seqlens": LONELY["rotary_seqlens"]}, backend), backend)
    check(arguments, backend, out, lse)


@pytest.mark.parametrize(
    "name, value", [("rotary_seqlens", [1, 2, 3]), ("rotary_seqlens", np.ones(3, np.float32)), ("max_seqlen_q", 2.5),
                    ("cu_seqlens_k_new", "abc"), ("cu_seqlens_k_new", np.ones(4, np.float32)), ("max_seqlen_q", "2")],
    ids=str,
)  # fmt: skip
def test_of_a_wrong_kind_all_the_same(name: str, value: Any, backend: Backend) -> None:
    if isinstance(value, np.ndarray):
        value = backend.to_native(value)
    with pytest.raises(TypeError, match=name):
        cuflash.flash_attn_with_kvcache(**native(contiguous(), backend), **{name: value})


# ------------------------------------------------------------------------------------------------ None
@pytest.mark.parametrize(
    "option, same",
    [
        ({"attention_chunk": None}, {}),
        ({"window_size": None}, {}),
        ({"window_size": (None, None)}, {}),
        ({"window_size": (5, None)}, {"window_size": (5, -1)}),
        ({"window_size": (None, 0)}, {"window_size": (-1, 0)}),
        ({"window_size": [None, -1]}, {}),
        ({"softcap": None}, {}),
        ({"softcap": None, "window_size": None, "attention_chunk": None, "causal": True}, {"causal": True}),
    ],
    ids=str,
)
def test_none_means_none(option: dict[str, Any], same: dict[str, Any], backend: Backend) -> None:
    """In calls and plans, and between the two."""
    arguments = contiguous()
    given = native(arguments, backend)
    wanted = call(given, backend, **same)
    check(arguments | same, backend, *wanted)
    planned = [{name: x for name, x in options.items() if name != "softcap"} for options in (option, same)]
    plans = [plan(arguments, backend, **options) for options in planned]
    for options in (option, same):
        for made in (None, *plans):
            for x, y in zip(call(given, backend, **options, scheduler_metadata=made), wanted, strict=True):
                np.testing.assert_allclose(x, y, atol=1e-6)


# ------------------------------------------------------------------------------------------------ an advisory length
@pytest.mark.parametrize("made_for", [0, 1, 2, 7])
@pytest.mark.parametrize("new", [0, 1, 2])
def test_new_keys_of_a_plan_are_advisory(new: int, made_for: int, backend: Backend) -> None:
    """A plan made with new keys serves calls without, and the other way round."""
    arguments = appending(new=new) if new else contiguous()
    made = plan(arguments, backend, max_seqlen_k_new=made_for)
    given = native(arguments, backend)
    out, lse = call(given, backend, scheduler_metadata=made)
    check(arguments, backend, out, lse)


@pytest.mark.parametrize("made_for", [0, 3, 5])
def test_ragged_new_keys_of_a_plan_are_advisory(made_for: int, backend: Backend) -> None:
    for arguments in (make_ragged(appending), make_ragged(contiguous)):
        made = plan(arguments, backend, max_seqlen_k_new=made_for)
        out, lse = call(native(arguments, backend), backend, scheduler_metadata=made)
        check(arguments, backend, out, lse)


def test_plan_with_ragged_new_keys_and_call_without(backend: Backend) -> None:
    """That new keys are ragged may be binding, but then it is said so."""
    with_keys, without = make_ragged(appending), make_ragged(contiguous)
    made = plan(with_keys, backend)
    try:
        out, lse = call(native(without, backend), backend, scheduler_metadata=made)
    except ValueError as error:
        assert "cu_seqlens_k_new" in str(error)
        assert "cu_seqlens_k_new" in str(cuflash.get_scheduler_metadata.__doc__)
    else:
        check(without, backend, out, lse)


# ------------------------------------------------------------------------------------------------ padding
@pytest.mark.parametrize(
    "dtype, value",
    [(np.uint32, 0xFFFFFFFF), (np.uint32, 0x80000000), (np.int64, 2**63 - 1), (np.int64, -(2**63)), (np.int64, -1),
     (np.uint64, 2**64 - 1), (np.int32, 2**31 - 1), (np.int32, -(2**31)), (np.int16, -(2**15)), (np.uint8, 255)],
)  # fmt: skip
@pytest.mark.parametrize("rows", [False, True], ids=["", "rows"])
def test_padding_of_page_tables(dtype: Any, value: int, rows: bool, backend: Backend) -> None:
    """Behind the last needed page, and in rows that no sequence has, anything may stand."""
    if backend.name == "cuda" and dtype is not np.int32:
        pytest.skip("index arrays on a device are int32")
    arguments = paged()
    table = arguments["page_table"].astype(dtype)
    wide = np.full((BATCH + 2, CAPACITY // PAGE + 2), value, dtype)
    index = np.array([4, 1, 2], np.int32) if rows else np.arange(BATCH, dtype=np.int32)
    for b, length in enumerate(arguments["cache_seqlens"]):
        count = -(-int(length) // PAGE)
        wide[index[b], :count] = table[b, :count]
    given = arguments | {"page_table": wide}
    if rows:
        given["cache_batch_idx"] = index
    else:
        given["page_table"] = wide[:BATCH]
    out, lse = call(native(given, backend), backend)
    check(arguments, backend, out, lse)
    made = plan(arguments, backend)
    for _ in range(2):
        out, lse = call(native(given, backend), backend, scheduler_metadata=made)
        check(arguments, backend, out, lse)


@pytest.mark.parametrize("dtype, value", [(np.uint32, 0xFFFFFFFF), (np.int64, 2**63 - 1), (np.int64, 2**32)])
def test_needed_pages_are_still_checked(dtype: Any, value: int, backend: Backend) -> None:
    if backend.name == "cuda":
        pytest.skip("index arrays on a device are int32")
    arguments = paged()
    arguments["page_table"] = arguments["page_table"].astype(dtype)
    arguments["page_table"][0, 0] = value
    with pytest.raises(ValueError, match="page_table"):
        call(native(arguments, backend), backend)
