"""The planner in NumPy: what a schedule covers, how even it is, and what ``get_scheduler_metadata`` refuses."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import schedules

import cuflash
from cuflash import planner


def plan(seqlens: Any, heads: int = 8, **options: Any) -> cuflash.SchedulerMetadata:
    """Plan a plain decode step with a group size of 4 and head dim 128."""
    seqlens = np.array(seqlens, int) if isinstance(seqlens, list) else seqlens
    arguments = dict(
        batch_size=len(seqlens),
        max_seqlen_q=1,
        max_seqlen_k=int(seqlens.max(initial=1)),
        num_heads_q=4 * heads,
        num_heads_kv=heads,
        headdim=128,
        cache_seqlens=seqlens,
    )
    return cuflash.get_scheduler_metadata(**{**arguments, **options})


def cuts_of(meta: cuflash.SchedulerMetadata) -> np.ndarray:
    """Return the cuts of the used blocks and the end."""
    used = int(meta.array[0])
    return planner.plan_cuts(meta.array, meta.problem.batch_size)[: used + 1]


def parts_of_items(work: np.ndarray) -> np.ndarray:
    """Return how many lines of ``work()`` each item with keys has."""
    return np.unique(work[["sequence", "kv_head", "row_block"]], return_counts=True)[1]


# ------------------------------------------------------------------------------------------------------- coverage
def check_coverage(meta: cuflash.SchedulerMetadata, arguments: dict[str, Any]) -> None:
    """Every visible key of every item stands in ``work()`` exactly once, and nothing else does."""
    work = meta.work()
    seen = schedules.visible(arguments, meta.partition.rows, meta.partition.row_blocks)
    batch, row_blocks, slots = seen.shape
    covered = np.zeros((batch, arguments["num_heads_kv"], row_blocks, slots + 1), int)
    where = work["sequence"], work["kv_head"], work["row_block"]
    assert (work["key_begin"] < work["key_end"]).all()
    np.add.at(covered, (*where, work["key_begin"]), 1)
    np.add.at(covered, (*where, work["key_end"]), -1)
    expected = np.broadcast_to(seen[:, None], (batch, arguments["num_heads_kv"], row_blocks, slots))
    np.testing.assert_array_equal(covered.cumsum(-1)[..., :-1], expected)


def check_structure(meta: cuflash.SchedulerMetadata, arguments: dict[str, Any]) -> None:
    """The array is what the kernels trust: ordered non-empty shares, every item owned, the blocks of each cut item."""
    work, used = meta.work(), int(meta.array[0])
    items = arguments["batch_size"] * arguments["num_heads_kv"] * meta.partition.row_blocks
    cuts = planner.plan_cuts(meta.array, arguments["batch_size"])
    assert (meta.array[1:8] == 0).all()
    assert used <= meta.num_blocks and (used >= 1) == (items > 0)
    places = cuts["item"].astype(np.int64) * 2**31 + cuts["key"]
    item = schedules.items(arguments, work, meta.partition.rows, meta.partition.row_blocks)
    if meta.partition.cluster > 1:  # a cluster has all its blocks, also those without keys
        assert used == items * meta.partition.cluster and (np.diff(places) >= 0).all()
        assert (work["block"] // meta.partition.cluster == item).all()
        return
    assert (np.diff(places[: used + 1]) > 0).all()
    assert places[0] == 0
    assert (places[used:] == items * 2**31).all()
    assert (cuts["first_block"][used:] == used).all() and (cuts["last_block"][used:] == used).all()

    assert (np.diff(work["block"]) >= 0).all()
    assert (np.diff(item) >= 0).all()
    leftpad, _, _ = schedules.lengths(arguments)
    grain = arguments.get("split_size") or 16
    for u in range(used):
        cut = cuts[u]
        if cut["key"] == 0:
            assert cut["first_block"] == cut["last_block"] == u
            continue
        parts = work[item == cut["item"]]
        pad = leftpad[parts["sequence"][0]]
        assert cut["key"] % grain == 0
        assert parts["key_begin"].min() - pad < cut["key"] < parts["key_end"].max() - pad
        assert cut["first_block"] == parts["block"].min() and cut["last_block"] == parts["block"].max()


def check_options(meta: cuflash.SchedulerMetadata, arguments: dict[str, Any]) -> None:
    """num_splits bounds the parts of an item; split_size decides them."""
    work, leftpad = meta.work(), schedules.lengths(arguments)[0]
    if arguments.get("num_splits"):
        assert parts_of_items(work).max(initial=0) <= arguments["num_splits"]
    size = arguments.get("split_size")
    if size:
        begin, end = (work[bound] - leftpad[work["sequence"]] for bound in ("key_begin", "key_end"))
        assert (begin // size == (end - 1) // size).all()
        parts = [work["sequence"], work["kv_head"], work["row_block"], begin // size]
        assert len(np.unique(np.stack(parts), axis=1).T) == len(work)


@pytest.mark.parametrize("seed", range(20))
def test_every_visible_key_is_read_exactly_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(50):
        step = schedules.random_step(rng, max_keys=int(rng.choice([600, 600, 600, 5000])))
        monkeypatch.setenv("CUFLASH_NUM_SM", str(step.num_sm))
        meta = cuflash.get_scheduler_metadata(**step.arguments)
        check_coverage(meta, step.arguments)
        check_structure(meta, step.arguments)
        check_options(meta, step.arguments)


def test_every_word_is_written() -> None:
    meta = plan([100, 4000, 3])
    expected = meta.array.copy()
    meta.array[:] = -1
    planner.plan(meta.problem, meta.partition, _lengths([100, 4000, 3]), meta.array)
    np.testing.assert_array_equal(meta.array, expected)


def test_the_size_depends_on_batch_and_device_alone() -> None:
    sizes = {plan(seqlens, heads).array.size for seqlens in ([1, 2], [40000, 9]) for heads in (1, 8)}
    assert sizes == {8 + 4 * (2 * 132 + 1) + 3 * 2}


# --------------------------------------------------------------------------------------------------------- balance
RAGGED = {
    "uniform": lambda rng, batch: rng.integers(1, 8192, batch),
    "lognormal": lambda rng, batch: np.minimum(rng.lognormal(7.5, 1, batch), 65536).astype(int) + 1,
    "bimodal": lambda rng, batch: np.where(
        rng.random(batch) < 0.8, rng.integers(64, 512, batch), rng.integers(8192, 16384, batch)
    ),
    "zipf": lambda rng, batch: rng.permutation(65536 // (1 + np.arange(batch))),
    "one long": lambda rng, batch: np.concatenate([[131072], rng.integers(16, 512, batch - 1)]),
    "padded": lambda rng, batch: np.where(np.arange(batch) < 1 + batch // 8, rng.integers(4000, 9000, batch), 1),
}


@pytest.mark.parametrize("num_sm", [108, 132, 170])
@pytest.mark.parametrize("workload", RAGGED)
def test_shares_are_even(workload: str, num_sm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_NUM_SM", str(num_sm))
    efficiencies = []
    for heads in range(1, 9):
        for batch in (8, 16, 32, 64, 128, 256):
            meta = plan(RAGGED[workload](np.random.default_rng(batch + heads), batch), heads)
            work = meta.work()
            if (work["key_end"] - work["key_begin"]).sum() >= 1024 * int(meta.array[0]):
                efficiencies.append(meta.efficiency)
    assert len(efficiencies) > 10
    assert min(efficiencies) >= 0.92
    assert np.median(efficiencies) >= 0.96


@pytest.mark.parametrize(
    ("batch", "heads", "seqlen", "blocks", "shares"),
    [
        (32, 8, 4096, 256, {4096}),  # an item per block: 8 blocks of the GPU idle, and nothing is merged
        (16, 32, 2000, 256, {4000}),  # two items per block
        (1, 8, 32768, 128, {2048}),  # 16 blocks per item
        (1, 4, 262144, 132, {7936, 7952}),  # 33 blocks per item
        (77, 3, 4096, 231, {4096}),  # an item per block leaves an eighth of the GPU idle, and no more
        (1, 1, 64, 1, {64}),
        (1, 1, 640, 10, {64}),
    ],
)
def test_equal_items_are_cut_alike(
    batch: int, heads: int, seqlen: int, blocks: int, shares: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUFLASH_ARCH", "80")  # without clusters
    meta = plan(np.full(batch, seqlen), heads)
    work = meta.work()
    assert int(meta.array[0]) == blocks
    keys = np.bincount(work["block"], weights=work["key_end"] - work["key_begin"])
    assert set(keys) <= shares


def test_windows_count_what_they_show() -> None:
    seqlens = np.array([100000, 304, 100000, 304])
    meta = plan(seqlens, window_size=(255, 0))
    work = meta.work()
    assert (work["key_end"] - work["key_begin"]).sum() == 8 * 4 * 256
    assert int(meta.array[0]) == 128 and meta.balance == 1.0
    assert meta.efficiency == 128 / meta.num_blocks


@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("seqlens", [[64, 0, 0, 0], [0] * 6 + [3000], [200] + [0] * 7, [20000] + [0] * 300, [0] * 9])
def test_balance_is_that_of_used_blocks(seqlens: list[int], arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of items without keys are used, too: they write zeros. Of a cluster all blocks have the item."""
    monkeypatch.setenv("CUFLASH_ARCH", arch)
    meta = plan(seqlens, 1)
    keys = np.bincount(meta.work()["block"], meta.work()["key_end"] - meta.work()["key_begin"])
    used = int(meta.array[0]) if meta.partition.cluster == 1 else int((keys > 0).sum())
    assert meta.balance == (sum(seqlens) / (used * keys.max()) if sum(seqlens) else 1)
    assert meta.efficiency == (sum(seqlens) / (meta.num_blocks * keys.max()) if sum(seqlens) else 1)
    assert f"{used} used of {meta.num_blocks}" in str(meta)


def test_sequences_without_keys_have_owners_but_no_work() -> None:
    meta = plan([0, 5000, 0, 0, 7000, 0])
    assert set(np.unique(meta.work()["sequence"])) == {1, 4}
    cuts = cuts_of(meta)
    assert (cuts["item"][0], cuts["item"][-1]) == (0, 48)
    empty = plan(np.zeros(1000, int))
    assert len(empty.work()) == 0 and empty.efficiency == 1.0 and int(empty.array[0]) > 1


def test_many_short_items_are_shared_out() -> None:
    meta = plan(np.where(np.arange(256) < 8, 5000, 0))
    items = np.diff(cuts_of(meta)["item"])
    assert items.max() < 400  # of 2048: an item without keys costs something too


@pytest.mark.parametrize(("batch", "keys", "chunk", "chunk_keys"), [(64, 4096, 2048, 8192), (128, 2048, 1024, 4096)])
def test_row_blocks_that_a_sequence_does_not_have_cost_nothing(
    batch: int, keys: int, chunk: int, chunk_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences that decode beside a chunk have one of its many row blocks. Who reads them reads as much as others."""
    monkeypatch.setenv("CUFLASH_NUM_SM", "132")
    monkeypatch.setenv("CUFLASH_ARCH", "90")
    starts = np.append(np.arange(batch + 1), batch + chunk).astype(np.int32)
    lengths = np.append(np.full(batch, keys), chunk_keys)
    meta = plan(lengths, cu_seqlens_q=starts, max_seqlen_q=chunk, causal=True)
    work = meta.work()
    shares = np.bincount(work["block"], weights=work["key_end"] - work["key_begin"], minlength=132)
    decodes = np.bincount(work["block"], weights=work["sequence"] < batch, minlength=132) > 0
    assert 10 < decodes.sum() < 120
    assert abs(shares[decodes].mean() / shares[~decodes].mean() - 1) < 0.04


def test_items_weigh_more_where_shares_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1024 keys a block and more, shares have about as many as one another; of fewer, who begins items has fewer."""
    monkeypatch.setenv("CUFLASH_NUM_SM", "4")
    works = [plan([600, 100, 324 - missing] + [0] * 5).work() for missing in (0, 1)]
    longest = [np.bincount(work["block"], work["key_end"] - work["key_begin"]).max() for work in works]
    assert longest[0] <= 1.06 * 1024 < 1.2 * 1024 < longest[1]


@pytest.mark.parametrize(("queries", "keys", "parts"), [
    (1, 1900, 30), (1, 5000, 32), (1, 20_000, 32), (1, 40_000, 42), (1, 63_300, 66), (1, 63_400, 132),
    (1, 140_000, 132),
    (8, 2000, 31), (8, 4000, 32), (8, 20_000, 78), (8, 33_000, 129),
])  # fmt: skip
def test_a_single_item_has_few_parts_unless_they_are_long(
    queries: int, keys: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All parts are merged in the end: what more blocks save in reading, they cost in merging."""
    monkeypatch.setenv("CUFLASH_NUM_SM", "132")
    monkeypatch.setenv("CUFLASH_ARCH", "90")
    meta = plan([keys], max_seqlen_q=queries, num_heads_q=8, num_heads_kv=1, max_seqlen_k=100_000)
    assert abs(int(meta.array[0]) - parts) <= 1


def test_items_of_many_rows_weigh_more_unless_some_have_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it takes to begin, end and merge 128 rows is not the same beside sequences that decode."""
    monkeypatch.setenv("CUFLASH_NUM_SM", "132")
    monkeypatch.setenv("CUFLASH_ARCH", "90")
    lengths, queries = [8000, 3000, 1500, 6000, 7000, 2500], np.full(6, 64)

    def keys_who_begins(queries: np.ndarray) -> float:
        """Return the keys of a block that begins two items, in those of a block that begins none."""
        starts = np.append(0, np.cumsum(queries)).astype(np.int32)
        work = plan(lengths, cu_seqlens_q=starts, max_seqlen_q=64).work()
        keys = np.bincount(work["block"], work["key_end"] - work["key_begin"])
        begins = np.bincount(work["block"], work["key_begin"] == 0)
        return float(keys[begins == 2].mean() / keys[begins == 0].mean())

    assert keys_who_begins(queries) < 0.75 < 0.9 < keys_who_begins(queries - [63, 0, 0, 0, 0, 0])


def test_num_splits_one_never_splits() -> None:
    work = plan([100000, 5, 300, 70000], num_splits=1).work()
    assert (parts_of_items(work) == 1).all()


def test_num_splits_bounds_only_those_that_exceed_it() -> None:
    seqlens = np.random.default_rng(0).integers(1, 8192, 64)
    np.testing.assert_array_equal(plan(seqlens, num_splits=32).array, plan(seqlens).array)


def test_split_size_gives_a_sequence_the_same_parts_in_every_batch() -> None:
    def parts(meta: cuflash.SchedulerMetadata, sequence: int) -> list[tuple[int, ...]]:
        work = meta.work()
        return work[work["sequence"] == sequence][["kv_head", "row_block", "key_begin", "key_end"]].tolist()

    alone = parts(plan([5000], split_size=256), 0)
    assert alone == parts(plan([3, 100000, 5000], split_size=256), 2) == parts(plan([5000] * 9, split_size=256), 5)


def test_sm_margin_leaves_multiprocessors_free() -> None:
    assert plan([100000] * 4, sm_margin=32).num_blocks == 100
    assert plan([100000] * 4, sm_margin=200).num_blocks == 1


def test_the_environment_chooses_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_NUM_SM", "20")
    meta = plan([100000] * 4)
    assert meta.num_blocks in (20, 40) and int(meta.array[0]) <= meta.num_blocks
    monkeypatch.setenv("CUFLASH_NUM_SM", "many")
    with pytest.raises(ValueError, match="CUFLASH_NUM_SM"):
        plan([100000] * 4)


@pytest.mark.parametrize("batch", [993, 100_000])
def test_large_batches(batch: int) -> None:
    seqlens = np.random.default_rng(0).integers(0, 8192, batch)
    plan(seqlens[:10])
    begin = time.perf_counter()
    meta = plan(seqlens)
    assert time.perf_counter() - begin < 1
    work = meta.work()
    assert (work["key_end"] - work["key_begin"]).sum() == 8 * seqlens.sum()
    assert meta.efficiency > 0.96
    assert str(meta)


# -------------------------------------------------------------------------------------------------------- metadata
def test_out_is_refilled_in_place() -> None:
    meta = plan([100, 4000, 3])
    array, before = meta.array, meta.array.copy()
    assert plan([3900, 10, 700], out=meta) is meta
    assert meta.array is array and (array != before).any()
    np.testing.assert_array_equal(array, plan([3900, 10, 700]).array)


def test_a_refill_beyond_the_bound_of_the_tiles_warns_once() -> None:
    meta = plan([100, 300, 3])
    with pytest.warns(RuntimeWarning, match="max_seqlen_k=5000 exceeds 300") as warned:
        plan([100, 5000, 3], out=meta)
    assert warned[0].filename == __file__
    for longest in (5001, 5002, 300, 5000):  # as sequences grow; a warning would be an error
        plan([100, longest, 3], out=meta)
    assert (meta.work()["key_end"] - meta.work()["key_begin"]).sum() == 8 * 5103


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("batch_size", {"batch_size": 2, "cache_seqlens": np.array([1, 2])}),
        ("max_seqlen_q", {"max_seqlen_q": 2}),
        ("num_heads_q", {"num_heads_q": 16}),
        ("num_heads_kv", {"num_heads_kv": 4}),
        ("headdim", {"headdim": 64}),
        ("headdim_v", {"headdim_v": 64}),
        ("qkv_dtype", {"qkv_dtype": "float16"}),
        ("cu_seqlens_q", {"cu_seqlens_q": np.array([0, 1, 1, 2])}),
        ("page_size", {"page_size": 16}),
        ("window_size", {"window_size": (5, -1)}),
        ("causal", {"causal": True, "max_seqlen_q": 2}),
        ("attention_chunk", {"attention_chunk": 5}),
        ("has_softcap", {"has_softcap": True}),
        ("num_splits", {"num_splits": 2}),
        ("split_size", {"split_size": 128}),
        ("sm_margin", {"sm_margin": 3}),
        ("pack_gqa", {"pack_gqa": True}),
    ],
)
def test_out_of_another_problem_is_refused(field: str, change: dict[str, Any]) -> None:
    meta = plan([100, 4000, 3], max_seqlen_q=change["max_seqlen_q"] if field == "causal" else 1)
    before = meta.array.copy()
    with pytest.raises(ValueError, match=f"out .*{field} "):
        plan([100, 4000, 3], **change, out=meta)
    np.testing.assert_array_equal(meta.array, before)


def test_out_of_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = plan([100, 4000, 3])
    monkeypatch.setenv("CUFLASH_NUM_SM", "108")
    with pytest.raises(ValueError, match="device"):
        plan([100, 4000, 3], out=meta)
    with pytest.raises(TypeError, match="out"):
        plan([100, 4000, 3], out=meta.array)


def test_what_is_remembered() -> None:
    meta = plan([100, 4000], max_seqlen_k=5000, pack_gqa=False)
    assert (meta.max_seqlen_k, meta.pack_gqa) == (5000, False)
    assert plan([100, 4000]).pack_gqa is None
    np.testing.assert_array_equal(meta.array, plan([100, 4000]).array)


def test_text() -> None:
    text = str(plan([4096, 100, 2048], causal=True))
    for part in ("3 sequences", "32 query, 8 KV", "129 used of 132", "per sequence 10, 2, 6", "efficiency", "median"):
        assert part in text
    assert "1: 90" in str(plan([64] * 90, num_splits=1))
    assert "none" in str(plan([]))
    assert repr(plan([5])).startswith("SchedulerMetadata(batch_size=1, ")


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int16])
def test_host_lengths_of_any_integer_type(dtype: Any) -> None:
    np.testing.assert_array_equal(plan(np.array([100, 40], dtype)).array, plan([100, 40]).array)


def test_one_int_for_all_lengths() -> None:
    np.testing.assert_array_equal(plan([0, 0], cache_seqlens=700, max_seqlen_k=700).array, plan([700, 700]).array)


@pytest.mark.parametrize(
    ("error", "name", "change"),
    [
        (ValueError, "cache_seqlens", {"batch_size": 4}),
        (ValueError, "cache_seqlens", {"cache_seqlens": np.array([1, -1, 2])}),
        (ValueError, "cache_seqlens", {"cache_seqlens": -1}),
        (ValueError, "cache_seqlens", {"cache_seqlens": np.array([1, 2**31, 2])}),
        (ValueError, "cache_seqlens", {"cache_seqlens": np.ones((3, 1), int)}),
        (TypeError, "cache_seqlens", {"cache_seqlens": np.ones(3)}),
        (TypeError, "cache_seqlens", {"cache_seqlens": [1, 2, 3]}),
        (TypeError, "cache_seqlens", {"cache_seqlens": None}),
        (TypeError, "cache_seqlens", {"cache_seqlens": True}),
        (ValueError, "cache_leftpad", {"cache_leftpad": np.array([0, 0, 4])}),
        (ValueError, "cache_leftpad", {"cache_leftpad": np.array([0, -1, 0])}),
        (ValueError, "cache_leftpad", {"cache_leftpad": np.array([0, 0])}),
        (ValueError, "cu_seqlens_q", {"cu_seqlens_q": np.array([0, 1, 2])}),
        (ValueError, "cu_seqlens_q", {"cu_seqlens_q": np.array([-1, 1, 2, 3])}),
        (ValueError, "cu_seqlens_q", {"cu_seqlens_q": np.array([0, 1, 0, 1])}),
        (ValueError, "cu_seqlens_q", {"cu_seqlens_q": np.array([0, 1, 3, 4])}),
        (ValueError, "cu_seqlens_k_new", {"cu_seqlens_k_new": np.array([0, 5, 4, 6])}),
        (TypeError, "cu_seqlens_k_new", {"cu_seqlens_k_new": "abc"}),
        (ValueError, "max_seqlen_k", {"max_seqlen_k": -1}),
        (TypeError, "max_seqlen_k", {"max_seqlen_k": 1.5}),
        (TypeError, "pack_gqa", {"pack_gqa": 1}),
        (ValueError, "split_size", {"split_size": 65}),
        (ValueError, "split_size", {"split_size": 64, "num_splits": 2}),
        (ValueError, "max_seqlen_q", {"max_seqlen_q": 2**31 - 1}),
    ],
)
def test_bad_arguments_are_named(error: type[Exception], name: str, change: dict[str, Any]) -> None:
    with pytest.raises(error, match=name):
        plan([1, 2, 3], **change)


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    meta = plan([4096, 100, 2048, 0])
    axes = meta.plot()
    assert axes.get_xlabel() == "keys read by the block" and axes.get_ylabel() == "thread block"
    assert "4 sequences" in axes.get_title(loc="left")
    assert plan([5], 1).plot(axes) is axes
    assert plan([]).plot() is not None
    matplotlib.pyplot.close("all")


def _lengths(seqlens: list[int]) -> Any:
    from cuflash.operands import Lengths

    return Lengths(np.array(seqlens, np.int32))


@pytest.mark.parametrize("sequences", [3, 12, 21])
def test_legends_match_the_marks(sequences):
    """Each of up to twenty sequences has a colour and hatch of its own, and a line of the legend."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    lengths = np.full(sequences, 600, np.int32)
    meta = cuflash.get_scheduler_metadata(sequences, 1, 600, 8, 2, 64, lengths)
    ax = meta.plot()
    lines = dict(zip((text.get_text() for text in ax.get_legend().get_texts()), ax.get_legend().legend_handles))
    named = {
        label: (patch.get_facecolor(), patch.get_hatch()) for label, patch in lines.items() if "sequence " in label
    }
    named = {label: look for label, look in named.items() if label[-1].isdigit()}
    assert len(named) == len(set(named.values())) == (sequences if sequences <= 20 else 0)
    assert "KV heads in turn" in lines
    matplotlib.pyplot.close("all")
