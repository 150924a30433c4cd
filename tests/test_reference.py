"""The reference itself: cases small enough to be calculated by hand."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from reference import attention, seen_slots

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
LOG2, LOG3 = np.log(2), np.log(3)


def call(values: list[float], **options: Any) -> Any:
    """One sequence, one head of one column; queries of 0, so that the keys that a row sees weigh the same."""
    cache = np.array(values, np.float32).reshape(1, -1, 1, 1)
    defaults = {"q": np.zeros((1, 1, 1, 1), np.float32), "k_cache": np.zeros_like(cache), "v_cache": cache}
    return attention(**defaults | {"cache_seqlens": [len(values)]} | options)


def queries(n: int) -> np.ndarray:
    return np.zeros((1, n, 1, 1), np.float32)


# ------------------------------------------------------------------------------------------------ rows and masks
def test_mean_of_what_is_seen() -> None:
    answer = call([1, 2, 6])
    assert answer.out.item() == pytest.approx(3)
    assert answer.lse.item() == pytest.approx(LOG3)
    assert answer.magnitude.item() == pytest.approx(3)
    assert call([1, -1]).magnitude.item() == pytest.approx(1)


@pytest.mark.parametrize(
    "options, means",
    [
        ({"causal": True}, [1.5, 2, 2.5]),
        ({"window_size": (1, 0)}, [1.5, 2.5, 3.5]),
        ({"window_size": (None, 0)}, [1.5, 2, 2.5]),
        ({"window_size": (0, 1)}, [2.5, 3.5, 4]),
        ({"attention_chunk": 2}, [1.5, 3.5, 3.5]),
        ({"attention_chunk": 2, "causal": True}, [1.5, 3, 3.5]),
        ({"cache_leftpad": [2], "causal": True}, [0, 3, 3.5]),
    ],
    ids=str,
)
def test_masks(options: dict[str, Any], means: list[float]) -> None:
    np.testing.assert_allclose(call([1, 2, 3, 4], q=queries(3), **options).out.ravel(), means)


def test_chunks_of_negative_positions() -> None:
    """Four queries, one key: positions -3 to 0, of which only 0 lies in the key's chunk."""
    lse = call([5], q=queries(4), attention_chunk=2).lse.ravel()
    np.testing.assert_array_equal(lse, [-np.inf, -np.inf, -np.inf, 0])


def test_tree() -> None:
    """Keys 1, 2, then the tree 4, 8, 16: a root with two children."""
    tree = np.array([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], bool)
    means = np.array([7 / 3, 15 / 4, 23 / 4])
    assert call([1, 2, 4, 8, 16], q=queries(3), tree_mask=tree).out.ravel() == pytest.approx(means)
    words = np.array([[[0b001], [0b011], [0b11111101]]], np.uint32)
    assert call([1, 2, 4, 8, 16], q=queries(3), tree_mask=words).out.ravel() == pytest.approx(means)
    none = np.zeros((1, 3, 3), bool)
    assert call([1, 2, 4, 8, 16], q=queries(3), tree_mask=none).out.ravel() == pytest.approx([1.5] * 3)
    # Fewer keys than nodes: column 0 has no key.
    np.testing.assert_allclose(call([8, 16], q=queries(3), tree_mask=tree).out.ravel(), [0, 8, 16])


def test_ragged_tree_ignores_other_columns() -> None:
    tree = np.ones((3, 40), bool)
    tree[1, 0], tree[:, 2:] = False, False
    options = {"cu_seqlens_q": [1, 3], "q": np.zeros((3, 1, 1), np.float32)}
    np.testing.assert_allclose(call([4, 8], tree_mask=tree, **options).out.ravel(), [0, 8, 6])
    words = np.array([[3, 0], [2, 9], [3, 0]], np.uint32)
    np.testing.assert_allclose(call([4, 8], tree_mask=words, **options).out.ravel(), [0, 8, 6])


def test_rows_of_nobody() -> None:
    options = {"q": np.zeros((4, 1, 1), np.float32), "cu_seqlens_q": [1, 2], "sinks": np.zeros(1)}
    part = (np.full((4, 1, 1), 7.0), np.zeros((1, 4)))
    answer = call([3], merge_with=part, **options)
    np.testing.assert_allclose(answer.lse.ravel(), [-np.inf, LOG3, -np.inf, -np.inf])
    np.testing.assert_allclose(answer.out.ravel(), [0, 10 / 3, 0, 0])


def test_sinks_and_merge() -> None:
    answer = call([3, 9], sinks=np.zeros(1))
    assert answer.out.item() == pytest.approx(4)
    assert answer.lse.item() == pytest.approx(LOG3)
    none = call([3], cache_seqlens=[0], sinks=np.array([0.5]))
    assert (none.out.item(), none.lse.item()) == (0, 0.5)
    merged = call([3, 9], merge_with=(np.full((1, 1, 1, 1), 12.0), np.full((1, 1, 1), LOG2)))
    assert merged.out.item() == pytest.approx(9)
    assert merged.lse.item() == pytest.approx(2 * LOG2)
    empty = call([3, 9], merge_with=(np.full((1, 1, 1, 1), np.nan), np.full((1, 1, 1), -np.inf)))
    assert empty.out.item() == pytest.approx(6)


# ------------------------------------------------------------------------------------------------ scores
def test_scale_and_softcap() -> None:
    ones = np.ones((1, 1, 1, 4), np.float32)
    arrays = {"q": ones, "k_cache": ones, "v_cache": ones, "cache_seqlens": 1}
    assert attention(**arrays).lse.item() == pytest.approx(4 / 2)
    assert attention(**arrays, softmax_scale=3).lse.item() == pytest.approx(12)
    assert attention(**arrays, softcap=4.0).lse.item() == pytest.approx(4 * np.tanh(2 / 4))


def test_both_spellings_of_mla() -> None:
    """Values 2 and 3, of which qv makes 10; the joint row is (values, key)."""
    row = np.array([2, 3, 5], np.float32).reshape(1, 1, 1, 3)
    q, qv = np.full((1, 1, 1, 1), 4, np.float32), np.full((1, 1, 1, 2), 2, np.float32)
    split = attention(q, row[..., 2:], row[..., :2], qv=qv, cache_seqlens=1)
    joint = attention(np.concatenate([qv, q], axis=-1), row, row[..., :2], cache_seqlens=1)
    assert split.lse.item() == pytest.approx((20 + 10) / np.sqrt(3))
    assert joint.lse.item() == pytest.approx(split.lse.item())
    np.testing.assert_array_equal(joint.out.ravel(), [2, 3])


def test_joint_append_rotates_behind_the_values() -> None:
    row = np.zeros((1, 2, 1, 4), np.float32)
    quarter = {"rotary_cos": np.array([[1.0], [0.0]]), "rotary_sin": np.array([[0.0], [1.0]])}
    new = np.array([1, 2, 3, 4], np.float32).reshape(1, 1, 1, 4)
    answer = attention(new, row, row[..., :2], k=new, cache_seqlens=[1], **quarter)
    np.testing.assert_array_equal(answer.k_cache[0, 1, 0], [1, 2, -4, 3])
    np.testing.assert_array_equal(answer.v_cache[0, 1, 0], [1, 2])
    assert answer.lse.item() == pytest.approx(np.log(1 + np.exp((1 + 4 + 16 + 9) / 2)))


@pytest.mark.parametrize(
    "mask, angles",
    [
        ({}, [0, 0]),
        ({"window_size": None, "attention_chunk": None}, [0, 0]),
        ({"causal": True}, [0, 1]),
        ({"window_size": (9, -1)}, [0, 1]),
        ({"window_size": (-1, 9)}, [0, 1]),
        ({"attention_chunk": 9}, [0, 1]),
    ],
    ids=str,
)
def test_positions_of_queries(mask: dict[str, Any], angles: list[float]) -> None:
    """A key of (1, 0) at angle 0: the score of a query at angle a is cos a."""
    x = np.tile(np.array([1, 0], np.float32), (1, 2, 1, 1))
    tables = {"rotary_cos": np.cos([[0.0], [1.0]]), "rotary_sin": np.sin([[0.0], [1.0]])}
    answer = attention(x, x.copy(), x.copy(), k=x[:, :0], v=x[:, :0], cache_seqlens=[1], rotary_seqlens=[0],
                       softmax_scale=1, **tables, **mask)  # fmt: skip
    seen = np.isfinite(answer.lse.ravel())
    np.testing.assert_allclose(answer.lse.ravel()[seen], np.cos(angles)[seen])


# ------------------------------------------------------------------------------------------------ caches
def test_scales() -> None:
    codes = np.array([2, 4], np.float32).astype(E4M3).reshape(1, 2, 1, 1)
    q = np.ones((1, 1, 1, 1), np.float32)
    for scale in (0.5, np.float32(0.5), np.full(1, 0.5), np.full((1, 1), 0.5), np.full((1, 2, 1), 0.5)):
        answer = attention(q, codes, codes.copy(), cache_seqlens=2, v_descale=scale, softmax_scale=0)
        assert answer.out.item() == pytest.approx(1.5)
        answer = attention(q, codes, codes.copy(), cache_seqlens=1, k_descale=scale)
        assert answer.lse.item() == pytest.approx(1)
    stored = codes.view(np.uint8)
    answer = attention(q, stored, stored.copy(), cache_seqlens=1, kv_dtype="float8_e4m3fn")
    assert answer.lse.item() == pytest.approx(2)
    code = np.full((1, 1, 1, 1), 3, E4M3)
    assert attention(code, codes, codes.copy(), cache_seqlens=1, q_descale=2.0).lse.item() == pytest.approx(12)
    per_head = np.array([[2.0, 3.0]], np.float32)
    two = np.concatenate([codes, codes], axis=2)
    answer = attention(np.tile(code, (1, 1, 4, 1)), two, two.copy(), cache_seqlens=1, q_descale=per_head)
    np.testing.assert_allclose(answer.lse.ravel(), [12, 12, 18, 18])


@pytest.mark.parametrize(
    "dtype, x, scale, codes",
    [
        (np.dtype(np.int8), [2.5, 3.5, -999, 999], 1.0, [2, 4, -127, 127]),
        (np.dtype(np.int8), [3, -6, 1, 0], 2.0, [2, -3, 0, 0]),
        (E4M3, [17, 19, 500, -1e9], 1.0, [16, 20, 448, -448]),
        (E5M2, [9, 11, 1e6, -1e6], 1.0, [8, 12, 57344, -57344]),
    ],
)
def test_append_with_given_scales(dtype: np.dtype, x: list[float], scale: float, codes: list[float]) -> None:
    cache = np.zeros((1, 2, 1, 4), dtype)
    new = np.array(x, np.float32).reshape(1, 1, 1, 4)
    answer = attention(new, cache, cache.copy(), k=new, v=new, cache_seqlens=[1], k_descale=scale,
                       v_descale=scale)  # fmt: skip
    for written in (answer.k_cache, answer.v_cache):
        np.testing.assert_array_equal(written[0, 1, 0].astype(float), codes)
        assert not written[0, 0].astype(float).any()


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_append_finds_scales(layout: str) -> None:
    """Two heads: (254, 1) has the scale 2; zeros have 1."""
    shape = (1, 3, 2, 2) if layout == "NHD" else (1, 2, 3, 2)
    cache = np.zeros(shape, np.int8)
    descale = np.full(shape[:-1], np.nan, np.float32)
    new = np.array([[254, -1], [0, 0]], np.float32).reshape(1, 1, 2, 2)
    answer = attention(new, cache, cache.copy(), k=new, v=new / 2, cache_seqlens=[2], cache_leftpad=[2], layout=layout,
                       k_descale=descale, v_descale=descale.copy())  # fmt: skip
    at = (0, 2) if layout == "NHD" else (0, slice(None), 2)
    np.testing.assert_array_equal(answer.k_descale[at], [2, 1])
    np.testing.assert_array_equal(answer.v_descale[at], [1, 1])
    np.testing.assert_array_equal(answer.k_cache[at], [[127, 0], [0, 0]])
    assert np.count_nonzero(np.isnan(answer.k_descale)) == 4
    assert np.isfinite(answer.lse).all()


def test_page_tables() -> None:
    pages = np.array([[1, 2], [3, 4], [5, 6]], np.float32).reshape(3, 2, 1, 1)
    arrays = {"q": np.zeros((2, 1, 1, 1), np.float32), "k_cache": np.zeros_like(pages), "v_cache": pages}
    dense = np.array([[2, 0], [1, 99]])
    csr = (np.array([1, 3, 5]), np.array([99, 2, 0, 1, 99]))
    for table in (dense, csr):
        answer = attention(**arrays, page_table=table, cache_seqlens=[3, 2])
        np.testing.assert_allclose(answer.out.ravel(), [4, 3.5])
        answer = attention(**arrays, page_table=table, cache_seqlens=[2, 3], cache_batch_idx=[1, 0])
        np.testing.assert_allclose(answer.out.ravel(), [3.5, 4])


def test_negative_pages() -> None:
    pages = np.ones((2, 1, 1, 1), np.float32)
    new = np.full((2, 1, 1, 1), 5, np.float32)
    answer = attention(new, pages, pages.copy(), k=new, v=new, cache_seqlens=[1, 1],
                       page_table=np.array([[0, -1], [0, 1]]))  # fmt: skip
    np.testing.assert_array_equal(answer.v_cache.ravel(), [1, 5])
    np.testing.assert_array_equal(answer.defined.ravel(), [False, True])


def test_context_parallel_ranks() -> None:
    """Keys 0 to 6 on two ranks, two at a time: (0, 1, 4, 5) and (2, 3, 6); 5 and 6 are new, the query is at 6."""
    new = np.array([5, 6], np.float32).reshape(1, 2, 1, 1)
    options = {"k": new, "v": new, "cache_seqlens": [5], "cp_world_size": 2, "cp_interleave": 2, "causal": True}
    first = call([0, 1, 4, 99, 99], cp_rank=0, q=queries(2), **options)
    np.testing.assert_array_equal(first.v_cache.ravel(), [0, 1, 4, 5, 99])
    np.testing.assert_allclose(first.out.ravel(), [2.5, 2.5])
    second = call([2, 3, 99, 99], cp_rank=1, q=queries(2), **options)
    np.testing.assert_array_equal(second.v_cache.ravel(), [2, 3, 6, 99])
    np.testing.assert_allclose(second.out.ravel(), [2.5, 11 / 3])


def test_seen_slots() -> None:
    cache = np.zeros((1, 6, 1, 1))
    seen = seen_slots(q=queries(1), k_cache=cache, v_cache=cache, cache_seqlens=[4], window_size=(1, 0))
    np.testing.assert_array_equal(seen.ravel(), [0, 0, 1, 1, 0, 0])
