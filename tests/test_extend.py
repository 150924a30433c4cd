"""The kernel families of many query rows, and how the host chooses between families.

Every problem here runs in one of them, also those with few rows: on the simulator with every check, in random order,
with copies that land early, late or at random.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import test_quantised
from cases import KV_DTYPES
from problems import Backend, Case, all_pairs, check, check_lse, check_out, expected, make_inputs, run
from reference import averages
from test_attention import APPENDS, CACHES, MASKS, SPLITS
from test_extremes import _check, _patterns, _problem

import cuflash
from cuflash import kernels, simulator
from cuflash.device import Device
from cuflash.kernels import decode, extend, extend_wgmma
from cuflash.problem import Problem, make_problem

pytestmark = pytest.mark.skipif(importlib.util.find_spec("cuda.bindings") is None, reason="no simulator")

COPIES = ("random", "early", "late")


BOTH = pytest.mark.parametrize("arch", ["90", "90a"])  # by mma.sync, by wgmma


@pytest.fixture
def arch() -> str:
    """The architecture: "90a" is the family of sm_90a."""
    return "90"


@pytest.fixture
def sim(arch: str, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A small simulated GPU, on which all problems run in a family of many rows."""
    monkeypatch.setattr(kernels, "FAMILIES", (extend_wgmma if arch == "90a" else extend,))
    monkeypatch.setenv("CUFLASH_ARCH", arch.rstrip("a"))
    monkeypatch.setenv("CUFLASH_BACKEND", "sim")
    monkeypatch.setenv("CUFLASH_NUM_SM", "4")
    return Backend("sim", lambda array: array, np.asarray)


@contextlib.contextmanager
def launched(case: Case, number: int = 0) -> Iterator[Any]:
    """Record launches, and see that the kernel was among them."""
    with simulator.record(seed=case.seed, cp_async=COPIES[number % 3]) as launches:
        yield launches
    assert attention(launches).kernel in ("extend", "extend_wgmma")


def attention(launches: list[Any]) -> Any:
    """Return the launch that attends."""
    return next(launch for launch in launches if launch.kernel not in ("plan", "append"))


# ------------------------------------------------------------------------------------------------------- all features
HEADDIMS = [(64, 64), (128, 128), (256, 256), (512, 512), (96, 40), (192, 128), (72, 200), (264, 320)]
QUERIES: dict[str, dict[str, Any]] = {
    "one": {"seqlens_q": 1},
    "33 rows": {"seqlens_q": 33, "heads": (2, 2)},
    "group of 7": {"seqlens_q": 9, "heads": (7, 1)},
    "60 rows": {"seqlens_q": 20, "heads": (6, 2)},
    "large group": {"seqlens_q": 2, "heads": (40, 1)},
    "ragged": {"seqlens_q": (0, 1, 41), "heads": (4, 2)},
    "ragged, long": {"seqlens_q": (130, 17, 64), "heads": (2, 1)},
}
FEATURES: dict[str, list[Any]] = {
    "dtype": ["float16", "bfloat16"],
    "headdim": HEADDIMS,
    "queries": list(QUERIES),
    "seqlens": [(77, 1, 130), (0, 64, 15), (16, 199, 63)],
    "mask": list(MASKS),
    "cache": [*CACHES, "pages of 128"],
    "append": list(APPENDS),
    "splits": list(SPLITS),
    "plan": ["none", "given", "stale", "reused"],
    "layout": ["NHD", "HND"],
    "leftpad": [False, True],
    "softcap": [0.0, 3.0],
    "sinks": [False, True],
    "scale": [None, -0.2, 0.0],
    "arch": ["80", "90", "120", "90a"],
}


# Of quantised caches.
OF_CODES: dict[str, list[Any]] = FEATURES | {
    "kv_dtype": list(KV_DTYPES),
    "dtype": ["bfloat16", "float16", "float8_e4m3fn"],
    "headdim": [(64, 64), (128, 128), (256, 256), (96, 48), (192, 128), (80, 208), (512, 512), (64, 272)],
    "mask": [*MASKS, "tree"],
    "q_scale": ["none", "float", "heads"],
    "k_scale": ["none", "float", "one", "heads", "keys"],
    "v_scale": ["none", "float", "one", "heads", "keys"],
    "merge": [False, True, "in place"],
    "strided": [False, True],
    "pages": [{}, {"negative_pages": True}, {"csr": True}],
    "arch": ["80", "89", "90", "120", "90a"],
}


def _is_valid(choice: dict[str, Any]) -> bool:
    return choice["arch"] != "90a" or max(choice["headdim"]) <= 256


def _is_valid_of_codes(choice: dict[str, Any]) -> bool:
    if not _is_valid(choice):
        return False
    if choice["q_scale"] != "none" and choice["dtype"] != "float8_e4m3fn":
        return False
    if choice["kv_dtype"] == "int8" and choice["k_scale"] == "none":
        return False  # scores of tens of thousands, as in test_quantised.py
    if choice["pages"] and not choice["cache"].startswith("pages"):
        return False
    return choice["mask"] != "tree" or "rotary" not in APPENDS[choice["append"]]


def _cases(features: dict[str, list[Any]], is_valid: Callable[[dict[str, Any]], bool]) -> list[tuple[Case, str]]:
    named = {"mask": MASKS | {"tree": {"tree": "words"}}, "queries": QUERIES, "append": APPENDS, "splits": SPLITS}
    named["cache"] = CACHES | {"pages of 128": {"page_size": 128}}
    cases = []
    for seed, choice in enumerate(all_pairs(features, is_valid)):
        arch = choice.pop("arch")
        options: dict[str, Any] = {"seed": seed, **choice.pop("pages", {})}
        if "kv_dtype" in choice:
            options["scales"] = tuple(choice.pop(f"{name}_scale") for name in "qkv")
        for name, value in choice.items():
            options |= named[name][value] if name in named else {name: value}
        cases.append((Case(**options), arch))
    return cases


# The first ones hold most pairs: every one meets as many new pairs as it can.
PAIRS = [
    pytest.param(case, arch, id=f"sm_{arch},{case}", marks=() if number < 6 else pytest.mark.slow)
    for number, (case, arch) in enumerate(_cases(FEATURES, _is_valid))
]
PAIRS_OF_CODES = [
    pytest.param(case, arch, id=f"sm_{arch},{case}", marks=() if number < 6 else pytest.mark.slow)
    for number, (case, arch) in enumerate(_cases(OF_CODES, _is_valid_of_codes))
]


@pytest.mark.parametrize(("case", "arch"), PAIRS + PAIRS_OF_CODES)
def test_pairs(case: Case, sim: Backend) -> None:
    """Every two features together at least once."""
    with launched(case, case.seed):
        check(case, make_inputs(case), sim)


@pytest.mark.parametrize(
    ("arch", "headdim"),
    [("90", (128, 128)), ("90a", (128, 128))]
    + [pytest.param(arch, (256, 256), marks=pytest.mark.slow) for arch in ("90", "90a")],
)
@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_every_number_of_rows(step: int, headdim: tuple[int, int], sim: Backend) -> None:
    """33 to 256 rows; a step of 17 meets every residue modulo 16."""
    rows = tuple(range(33, 257, step))
    lengths = tuple(5 + 37 * row % 300 for row in rows)
    for causal in (False, True):
        case = Case(
            dtype="bfloat16",
            heads=(1, 1),
            headdim=headdim,
            seqlens=lengths,
            seqlens_q=rows,
            page_size=16,
            causal=causal,
        )
        with launched(case, causal):
            check(case, make_inputs(case), sim)


@pytest.mark.parametrize("arch", ["90a"])
@pytest.mark.parametrize("options", [
    {"seqlens": (1500, 37, 1100)},
    {"seqlens": (64, 65, 900, 0), "page_size": 16, "softcap": 3.0, "leftpad": True},
    {"seqlens": (129, 1, 2000), "page_size": 1, "window": (700, 40), "headdim": (96, 72)},
    {"seqlens": (2500,), "seqlens_q": 13, "merge": "in place", "headdim": (72, 128), "layout": "HND"},
    {"seqlens": (0, 700, 1, 1300), "seqlens_q": (15, 0, 16, 3), "causal": True, "page_size": 64, "sinks": True},
    {"seqlens": (500, 900), "seqlens_q": 15, "causal": True, "scale": 0.5, "new": 5, "page_size": 8, "csr": True},
    {"seqlens": (640, 128, 63), "tree": "bool", "page_size": 32, "merge": True},
    {"seqlens": (128, 192, 64, 256), "num_splits": 1, "page_size": 16},
    {"seqlens": (1111, 300, 450), "chunk": 600, "negative_pages": True, "page_size": 16, "plan": "stale"},
], ids=str)  # fmt: skip
def test_warpgroups_in_turns(options: dict[str, Any], sim: Backend) -> None:
    """Two warpgroups have the same rows and every other tile: of segments of no tile, of one, and of many rings."""
    dtype = ("float16", "bfloat16")[len(options["seqlens"]) % 2]
    case = Case(**{"heads": (4, 1), "headdim": (128, 128), "seqlens_q": 16, "dtype": dtype, **options})
    for number in range(2):
        with launched(case, number + len(case.seqlens)) as launches:
            check(case, make_inputs(case), sim)
        assert attention(launches).block[0] == 384  # two warpgroups that multiply, and one that copies


@BOTH
@pytest.mark.parametrize("page_size", [16, *(pytest.param(size, marks=pytest.mark.slow) for size in (None, 1))])
def test_every_length(page_size: int | None, sim: Backend) -> None:
    """Lengths 0 to 129: every residue modulo a tile, together in one batch."""
    case = Case(
        dtype="float16", heads=(40, 1), headdim=(64, 64), seqlens=tuple(range(130)), page_size=page_size, seed=1
    )
    with launched(case):
        check(case, make_inputs(case), sim)


@pytest.mark.parametrize(
    ("arch", "tree"),
    [
        ("90", "bool"),
        ("90a", "words"),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in (("90", "words"), ("90a", "bool"))),
    ],
)
def test_trees_that_begin_anywhere(tree: str, sim: Backend) -> None:
    """In every place of a word of keys, and with as many rows as leave every number of them to the last warp."""
    for queries in (9, 10, 11, 12):
        seqlens = tuple(range(queries + 250 + queries % 2, queries + 282, 2))
        case = Case(dtype="float16", heads=(8, 1), headdim=(64, 64), seqlens=seqlens, seqlens_q=queries, tree=tree)
        with launched(case):
            check(case, make_inputs(case), sim)


@pytest.mark.parametrize(
    ("arch", "headdim", "split_size"),
    [
        ("90", (64, 64), 128),
        ("90a", (64, 64), None),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in (
                ("90", (64, 64), None),
                ("90a", (64, 64), 128),
                ("90", (512, 512), None),
                ("90", (512, 512), 128),
            )
        ),
    ],
)
def test_items_in_many_blocks(split_size: int | None, headdim: tuple[int, int], sim: Backend, monkeypatch: Any) -> None:
    """A tree of three levels, or a fold of 24 splits: right, and the same bits in whichever order blocks arrive."""
    monkeypatch.setenv("CUFLASH_NUM_SM", "24")
    case = Case(
        dtype="bfloat16", heads=(17, 1), headdim=headdim, seqlens=(3000,), seqlens_q=3, causal=True, sinks=True,
        page_size=64, split_size=split_size,
    )  # fmt: skip
    inputs = make_inputs(case)
    results = []
    for seed, attend in enumerate((run, run, check)):
        with simulator.record(seed=seed, cp_async=COPIES[seed]) as launches:
            results.append(attend(case, inputs, sim)[:2])
        assert attention(launches).counters.atomics > 16  # blocks that met
    for out, lse in results[1:]:
        assert out.tobytes() == results[0][0].tobytes() and lse.tobytes() == results[0][1].tobytes()


@BOTH
def test_bits_with_split_size(sim: Backend, monkeypatch: Any) -> None:
    """A sequence alone, in a batch, on few blocks and on many: folded by one block or by several."""
    case = Case(
        dtype="bfloat16", heads=(20, 1), seqlens=(700, 90, 300), seqlens_q=(4, 1, 2), split_size=64, causal=True
    )
    inputs = make_inputs(dataclasses.replace(case, poison=False))
    starts = inputs["cu_seqlens_q"]
    for number, num_sm in enumerate((1, 4, 20)):
        monkeypatch.setenv("CUFLASH_NUM_SM", str(num_sm))
        with simulator.record(seed=number):
            out, lse = run(case, inputs, sim)[:2]
        together = [(out[a:b].tobytes(), lse[:, a:b].tobytes()) for a, b in zip(starts, starts[1:])]
        if number == 0:
            alone = []
            for b, (begin, end) in enumerate(zip(starts, starts[1:])):
                one = {name: inputs[name][b : b + 1] for name in ("k_cache", "v_cache", "cache_seqlens")}
                one["q"] = inputs["q"][None, begin:end]
                out, lse = cuflash.flash_attn_with_kvcache(
                    **one, causal=True, split_size=64, return_softmax_lse=True
                )  # fmt: skip
                alone.append((out[0].tobytes(), lse[0].tobytes()))
        assert together == alone


@BOTH
@pytest.mark.parametrize(("heads", "queries", "length"), [((2, 1), 40, 1500), ((7, 1), 1, 700), ((4, 2), 20, 300)])
def test_blocks_merge_together(heads: tuple[int, int], queries: int, length: int, arch: str, sim: Backend) -> None:
    """Blocks that run at the same time wait for one another and share the rows: one block merging has the same bits."""
    case = Case(dtype="bfloat16", heads=heads, headdim=(64, 64), seqlens=(length,), seqlens_q=queries, causal=True)
    inputs, answer, results, instructions = make_inputs(case), None, [], []
    for seed, window in ((None, 1), (None, 8), (3, 8), (4, 3)):
        with simulator.record(seed=seed, window=window) as launches:
            out, lse = run(case, inputs, sim)[:2]
        answer = answer or expected(inputs)
        check_out(case, out, answer)
        check_lse(case, lse, answer)
        results.append((out.tobytes(), lse.tobytes()))
        instructions.append(attention(launches).counters.instructions)
    assert len(set(results)) == 1
    assert instructions[1] != instructions[0]  # some have waited


@pytest.mark.parametrize("arch", ["90a"])
@pytest.mark.parametrize("parts", [18, 34])
def test_more_parts_than_sixteen(parts: int, sim: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels by wgmma take 32 parts at once: right, and the same bits whether one block merges or several."""
    monkeypatch.setenv("CUFLASH_NUM_SM", str(parts // 2))  # two blocks each
    case = Case(dtype="bfloat16", heads=(36, 1), headdim=(64, 64), seqlens=(parts * 128,), sinks=True, page_size=64)
    inputs, bits = make_inputs(case), set()
    for window in (1, parts):
        with simulator.record(window=window) as launches:
            bits.add(b"".join(array.tobytes() for array in check(case, inputs, sim)))
        assert attention(launches).grid == (parts, 1, 1)
    assert len(bits) == 1


@BOTH
@pytest.mark.parametrize(
    ("planned", "called"),
    [((200, 3, 0, 1), (0, 0, 200, 5)), ((0, 0, 200, 5), (200, 3, 0, 1)), ((200, 0, 0, 0), (0, 0, 0, 200))],
)
def test_a_plan_for_other_queries(planned: tuple[int, ...], called: tuple[int, ...], sim: Backend) -> None:
    """Row blocks that the plan cuts may have no rows, others that it thinks empty have some."""
    case = Case(dtype="bfloat16", heads=(4, 2), seqlens=(77, 150, 130, 300), seqlens_q=called, causal=True)
    inputs = make_inputs(case)
    starts = np.cumsum((0, *planned)).astype(np.int32)
    meta = cuflash.get_scheduler_metadata(
        4, 200, 300, 4, 2, 64, inputs["cache_seqlens"], cu_seqlens_q=starts, causal=True
    )
    answer = expected(inputs)
    out, lse = cuflash.flash_attn_with_kvcache(**inputs, scheduler_metadata=meta, return_softmax_lse=True)
    check_out(case, out, answer)
    check_lse(case, lse, answer)


@BOTH
@pytest.mark.parametrize("length", [2**31 - 1, 2**31 - 70])
def test_lengths_up_to_2_31(length: int, sim: Backend) -> None:
    """A sequence as long as an int32 says, in a table that names one page again and again: no key number overflows."""
    rng = np.random.default_rng(0)
    window, page_size = 100, 1024
    q = rng.standard_normal((1, 1, 40, 64), np.float32).astype(np.float16)
    k, v = rng.standard_normal((2, 1, page_size, 1, 64), np.float32).astype(np.float16)
    out = cuflash.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=np.array([length], np.int32), window_size=(window, 0),
        page_table=np.zeros((1, 2**31 // page_size), np.int32),
    )  # fmt: skip
    seen = np.arange(length - window - 1, length) % page_size
    scores = q[0, 0].astype(np.float64) @ k[0, seen, 0].astype(np.float64).T / 8
    wanted = averages(scores, v[0, seen, 0])
    np.testing.assert_allclose(out[0, 0], wanted, atol=2e-3)


@BOTH
@pytest.mark.parametrize(
    "size", [4e7, *(pytest.param(size, marks=pytest.mark.slow) for size in (1.0, 3e5, 1e13, 2e38))]
)
def test_scores_of_any_size(size: float, sim: Backend) -> None:
    for scores in _patterns(size).values():
        _check(_problem("bfloat16", scores), sim, "bfloat16", softmax_scale=0.5)


# Where the scores of a row jump, and to what: within what weights can follow, beyond what float16 or float32 weights
# are, to where a maximum is subtracted before it is multiplied, and down.
JUMPS = ((70, 3), (129, 6), (200, 9), (330, 20), (333, 88), (400, 320), (10, 28672), (64, -48))


@BOTH
@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
@pytest.mark.parametrize("queries", [5, 20])
def test_maxima_that_jump(kv_dtype: str | None, queries: int, sim: Backend) -> None:
    """Tile after tile the maxima of other rows move; a row's bits do not depend on the rows beside it."""
    rng = np.random.default_rng(queries)
    length, heads, headdim, scale = 600, 8, 64, 64.0
    kind = rng.permutation(queries * heads).reshape(1, queries, heads) % len(JUMPS)
    q = np.zeros((1, queries, heads, headdim), np.float16)
    np.put_along_axis(q, kind[..., None], 1, axis=-1)
    q[..., -1] = 1
    k = np.zeros((1, length, 1, headdim))
    for column, (position, jump) in enumerate(JUMPS):
        k[0, position:, 0, column] = jump / scale
    k[0, :, 0, -1] = rng.integers(-8, 9, length) / 8 / scale
    v = rng.integers(-8, 9, k.shape) / 8
    dtype = ml_dtypes.float8_e4m3fn if kv_dtype else np.float16
    caches = {"k_cache": (k if kv_dtype else k * scale).astype(dtype), "v_cache": v.astype(dtype)}
    options = {
        "softmax_scale": 1.0,
        "num_splits": 1,
        "return_softmax_lse": True,
        **({"k_descale": scale} if kv_dtype else {}),
    }
    out, lse = cuflash.flash_attn_with_kvcache(q, **caches, **options)
    scores = np.einsum("qhd,kd->qhk", q[0].astype(np.float64), k[0, :, 0] * scale)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    sums = weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(out[0], weights / sums @ v[0, :, 0], atol=2e-3)
    wanted = (scores.max(axis=-1) + np.log(sums[..., 0])).T
    assert (np.abs(lse[0] - wanted) <= 1e-3 + 2.0**-22 * np.abs(wanted)).all()
    for number in range(len(JUMPS)):
        of_kind = kind[0] == number
        alone = np.broadcast_to(q[0][of_kind][0], q.shape)
        own_out, own_lse = cuflash.flash_attn_with_kvcache(alone, **caches, **options)
        assert {row.tobytes() for row in out[0][of_kind]} == {own_out[0, 0, 0].tobytes()}
        assert set(lse[0].T[of_kind]) == {own_lse[0, 0, 0]}


@pytest.mark.parametrize("rise", [3, 60, 200])
@BOTH
def test_maxima_that_rise_from_far_below_zero(rise: int, sim: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A huge maximum is subtracted from the scores first: weights that are found without that say nothing."""
    monkeypatch.setenv("CUFLASH_NUM_SM", "1")
    for dtype in ("float16", "bfloat16"):
        problem = _problem(dtype, np.where(np.arange(300) < 290, -(2.0**23), -(2.0**22)), heads=16)
        problem["q"][..., 5] = 1
        problem["q"][:, :, ::3, 3] = 0  # rows beside them that are not huge
        problem["k_cache"][:, 200:290, :, 5] = rise
        _check(problem, sim, dtype, softmax_scale=1.0)
        problem["k_cache"][:, 290:] = problem["k_cache"][:, 289:290]
        _check(problem, sim, dtype, softmax_scale=1.0)


# --------------------------------------------------------------------------------------------------- quantised caches
@pytest.mark.parametrize(
    ("name", "arch"),
    [pytest.param(name, arch, marks=() if i in (j, (j + 1) % 3) else pytest.mark.slow)
     for i, name in enumerate(KV_DTYPES) for j, arch in enumerate(("80", "89", "90a"))],
)  # fmt: skip
def test_every_code_is_exact(name: str, sim: Backend) -> None:
    """As in test_quantised.py: one key, of which the output is the value and LSE an element."""
    codes = test_quantised._all_codes(name).reshape(16, 1, 1, 16)
    q = np.broadcast_to(np.eye(16, dtype=ml_dtypes.bfloat16), (16, 3, 16, 16)).copy()
    out, lse = cuflash.flash_attn_with_kvcache(q, codes, codes, softmax_scale=1.0, return_softmax_lse=True)
    numbers = codes.astype(np.float32).reshape(16, 1, 1, 16)
    np.testing.assert_array_equal(out.astype(np.float32), np.broadcast_to(numbers, out.shape))
    np.testing.assert_allclose(
        lse.swapaxes(1, 2), np.broadcast_to(numbers[:, 0], lse.swapaxes(1, 2).shape), rtol=2e-7, atol=1e-6
    )


@pytest.mark.parametrize(
    ("rows", "headdim", "arch"),
    [
        (40, (128, 128), "90"),
        (100, (64, 128), "90a"),
        pytest.param(40, (128, 128), "90a", marks=pytest.mark.slow),
        pytest.param(100, (64, 128), "90", marks=pytest.mark.slow),
    ],
)
def test_rings_of_codes_turn(
    rows: int, headdim: tuple[int, int], sim: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block reads all: slots of codes, of numbers and of scales are filled again and again."""
    monkeypatch.setenv("CUFLASH_NUM_SM", "1")
    for number, name in enumerate(KV_DTYPES):
        case = Case(
            dtype="bfloat16", heads=(rows, 1), headdim=headdim, seqlens=(1100, 1100), kv_dtype=name, page_size=16,
            scales=("none", "keys", "keys"), seed=number,
        )  # fmt: skip
        with launched(case, number):
            check(case, make_inputs(case), sim)


@BOTH
@pytest.mark.parametrize("kind", ["spread", "tiny", "no values", "one value"])
def test_scales_of_values_may_be_anything(kind: str, sim: Backend) -> None:
    test_quantised.test_scales_of_values_may_be_anything(kind, sim)


@BOTH
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_queries_keep_their_bits(dtype: str, sim: Backend) -> None:
    test_quantised.test_queries_keep_their_bits(dtype, sim)


@BOTH
def test_small_weights_add_up(sim: Backend) -> None:
    test_quantised.test_small_weights_add_up(sim)


@BOTH
@pytest.mark.parametrize("negative", ["q_descale", "k_descale", "v_descale", "softmax_scale"])
def test_scales_may_be_negative(negative: str, sim: Backend) -> None:
    test_quantised.test_scales_may_be_negative(negative, sim)


# ------------------------------------------------------------------------------------------------------------- counts
@pytest.mark.parametrize(
    ("headdim", "rows", "arch", "kv_dtype"),
    [(128, 64, "90", None), (128, 128, "90", None), (128, 128, "90a", None)]
    + [(128, 64, "80", "int8"), (128, 64, "90a", "float8_e4m3fn"), (64, 128, "90a", "float8_e5m2")]
    + [
        pytest.param(d, rows, arch, kv_dtype, marks=pytest.mark.slow)
        for d in (64, 128, 192, 256, 512) for rows in (40, 64, 128) for arch in ("80", "90", "120", "90a")
        for kv_dtype in (None, "float8_e4m3fn")
        if d <= 256 or (rows == 64 and arch != "90a" and (kv_dtype is None or arch == "90"))
    ],
)  # fmt: skip
def test_counts(headdim: int, rows: int, arch: str, kv_dtype: str | None, sim: Backend) -> None:
    """Keys and values are asked for once, in whole sectors, and no two lanes meet in a bank."""
    if arch == "120" and (rows > 64 and headdim > 128 or headdim > 256):
        pytest.skip("row blocks are smaller where shared memory is")
    lengths = (1800, 1003, 777, 1311)
    scales = ("none", "keys", "keys") if kv_dtype else ("none",) * 3
    case = Case(
        dtype="bfloat16", heads=(rows // 4, 1), headdim=(headdim, headdim), seqlens=lengths, seqlens_q=4, page_size=16,
        kv_dtype=kv_dtype, scales=scales,
    )  # fmt: skip
    with simulator.record(simulator.Checks.cheap()) as launches:
        run(case, make_inputs(dataclasses.replace(case, poison=False)), sim)
    counters = attention(launches).counters
    visible = sum(lengths) * headdim * (1 if kv_dtype else 2)
    # Rings of codes and of numbers do not fit beside 128 queries of 256 elements: two row blocks read the keys.
    blocks = 2 if (headdim, rows, arch) == (256, 128, "90a") and kv_dtype else 1
    for name in ("k_cache", "v_cache"):
        assert (blocks - 0.01) * visible <= counters.arrays[name].read_bytes <= (blocks + 0.02) * visible
        assert counters.arrays[name].read_sectors == counters.arrays[name].read_ideal
    ideal, real = counters.wavefronts("cp.async", "ldmatrix", "ld.shared")
    assert real == ideal
    if kv_dtype:
        for name in ("k_descale", "v_descale"):
            assert counters.arrays[name].read_bytes == 4 * blocks * sum(lengths)
        ideal, real = counters.wavefronts("st.shared")
        assert real <= 1.02 * ideal  # what blocks fold is stored less evenly


# ------------------------------------------------------------------------------------------------------------- choice
H200 = Device(132, 90)


def _rows(rows: int, headdim: int | tuple[int, int] = 128, **options: Any) -> Problem:
    d, dv = headdim if isinstance(headdim, tuple) else (headdim, headdim)
    return make_problem(4, rows // 4, 32, 8, d, headdim_v=dv, **options)


def test_few_rows_decode_and_many_extend() -> None:
    """Keys are read once per row block: the family with fewer of them, and the smaller one where they are alike.

    But for decode.cu's row blocks of 32, where there are products of warpgroups.
    """
    for rows, family in ((4, decode), (16, decode), (32, decode), (36, extend), (64, extend), (512, extend)):
        for arch in (80, 86, 90, 120):
            for kv_dtype in (None, "float8_e4m3fn"):
                is_wide = rows == 32 and kv_dtype is None
                expected = extend_wgmma if arch == 90 and (family is extend or is_wide) else family
                choice = kernels.choose(_rows(rows, kv_dtype=kv_dtype), Device(132, arch), 4096)
                assert choice.family == expected.NAME
    assert kernels.choose(_rows(20), H200, 4096).family == "extend_wgmma"
    assert kernels.choose(_rows(32, 64), H200, 4096).family == "decode"
    assert kernels.choose(_rows(16, 256), H200, 4096).family == "decode"
    assert kernels.choose(_rows(32, 256), H200, 4096).family == "extend_wgmma"  # decode has 16 rows at most


def test_warpgroups_take_turns_where_items_are_few() -> None:
    """A block has a multiprocessor alone where items are whole or nearly so, or cut into whole blocks."""

    def takes_turns(batch: int, queries: int, *heads: int, headdim: int = 128, **options: Any) -> bool:
        problem = make_problem(batch, queries, *heads, headdim, **options)
        tiles = extend_wgmma.tiling(problem, H200)
        assert tiles is not None
        assert (tiles.key_groups, tiles.blocks_per_sm) in ((2, 1), (1, 2))
        assert tiles.key_groups == 1 or tiles.stages % 4 == 0
        return tiles.key_groups == 2

    assert takes_turns(32, 4, 64, 4) and takes_turns(1, 16, 32, 8) and takes_turns(16, 1, 256, 8)
    assert not takes_turns(32, 16, 32, 8)  # 256 items
    assert not takes_turns(6, 12, 32, 8)  # 48: in blocks of 2.75
    assert not takes_turns(1, 1, 256, 8)  # 32 rows in many parts
    assert not takes_turns(32, 4, 64, 4, headdim=64)
    assert not takes_turns(32, 4, 64, 4, kv_dtype="int8")
    assert not takes_turns(32, 4, 64, 4, split_size=256)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_wide_heads_extend(arch: int) -> None:
    for headdim in (264, 320, 512, (512, 64), (72, 512)):
        assert kernels.choose(_rows(4, headdim), Device(132, arch), 4096).family == "extend"
    for headdim in (272, 320, 512, (80, 512)):
        assert kernels.choose(_rows(4, headdim, kv_dtype="int8"), Device(132, arch), 4096).family == "extend"


@pytest.mark.parametrize("arch", ["89"])
@pytest.mark.parametrize(("headdim", "kv_dtype"), [((512, 512), "int8"), ((272, 288), "float8_e4m3fn")])
def test_wide_codes_in_little_shared_memory(headdim: tuple[int, int], kv_dtype: str, sim: Backend) -> None:
    """In tiles of 16 keys, of which each of two warps scores 8."""
    case = Case(
        dtype="float16", kv_dtype=kv_dtype, headdim=headdim, heads=(4, 2), seqlens=(77, 0, 1, 40), seqlens_q=5,
        scales=("none", "keys", "keys"), causal=True, page_size=16, sinks=True,
    )  # fmt: skip
    for seed in range(2):
        with launched(case, seed):
            check(case, make_inputs(case), sim)
    problem = make_problem(4, 5, 4, 2, headdim[0], headdim_v=headdim[1], kv_dtype=kv_dtype)
    tiles = extend.tiling(problem, Device(132, 89))
    assert tiles is not None and tiles.tile_keys == 16


def test_what_extend_does_not_have() -> None:
    assert kernels.choose(_rows(512, qkv_dtype="float32"), H200, 4096).family == "decode"
    assert kernels.choose(_rows(512, qkv_dtype="float32", kv_dtype="int8"), H200, 4096).family == "decode"
    wide = _rows(4, 512, qkv_dtype="float32")
    choice = kernels.choose(wide, H200, 4096)  # a plan for the NumPy backend
    with pytest.raises(ValueError, match=r"headdim and headdim_v must be .* got \(512, 512\) with queries of float32"):
        kernels.family(wide, choice)


def test_with_split_size_the_batch_does_not_choose() -> None:
    """Family and row blocks follow from one query position."""
    for heads in (8, 32, 512):
        kinds = {
            (choice.family, choice.rows)
            for batch in (1, 64) for seqlen_q in (1, 7, 2048) for seqlen_k in (100, 100_000)
            for choice in [
                kernels.choose(make_problem(batch, seqlen_q, heads, 8, 128, split_size=256), H200, seqlen_k)
            ]
        }  # fmt: skip
        assert len(kinds) == 1


def test_a_refilled_plan_keeps_its_family() -> None:
    lengths = np.array([100, 200], np.int32)
    meta = cuflash.get_scheduler_metadata(2, 16, 4000, 32, 8, 128, lengths, causal=True)
    assert meta.partition.family == "extend_wgmma" and "extend_wgmma, row blocks of 64 rows" in str(meta)
    again = cuflash.get_scheduler_metadata(2, 16, 10, 32, 8, 128, lengths, causal=True, out=meta)
    assert again.partition is meta.partition
