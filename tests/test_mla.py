"""The kernel family of latent attention: rows that are key and value at once, in both spellings."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import ChangeSource
from problems import Backend, Case, all_pairs, check, make_inputs, run
from reference import averages
from test_attention import APPENDS, CACHES, MASKS, SPLITS

import cuflash
from cuflash import kernels, simulator
from cuflash.device import Device
from cuflash.kernels import mla, mla_wgmma
from cuflash.problem import Problem, make_problem

pytestmark = pytest.mark.skipif(importlib.util.find_spec("cuda.bindings") is None, reason="no simulator")

COPIES = ("random", "early", "late")


@pytest.fixture
def arch() -> str:
    """The architecture: "90a" is the family of sm_90a."""
    return "90"


@pytest.fixture
def sim(arch: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """A small simulated GPU, on which all problems run in a family of latent attention."""
    monkeypatch.setattr(kernels, "FAMILIES", (mla_wgmma if arch == "90a" else mla,))
    monkeypatch.setattr(mla_wgmma, "_outdoes_few_rows", lambda problem, resident: True)
    mla_wgmma.tiling.cache_clear()
    monkeypatch.setenv("CUFLASH_ARCH", arch.rstrip("a"))
    monkeypatch.setenv("CUFLASH_BACKEND", "sim")
    monkeypatch.setenv("CUFLASH_NUM_SM", "4")
    yield Backend("sim", lambda array: array, np.asarray)
    mla_wgmma.tiling.cache_clear()


@contextlib.contextmanager
def launched(number: int = 0, window: int | None = None) -> Iterator[Any]:
    """Record launches, of which so many blocks run side by side, and see that the kernel was among them."""
    with simulator.record(seed=number, cp_async=COPIES[number % 3], window=window) as launches:
        yield launches
    attention(launches)


def attention(launches: list[Any]) -> Any:
    """Return the launch that attends."""
    return next(launch for launch in launches if launch.kernel in ("mla", "mla_wgmma"))


BOTH = pytest.mark.parametrize("arch", ["90", "90a"])  # by mma.sync, by wgmma


# ------------------------------------------------------------------------------------------------------- all features
FEATURES: dict[str, list[Any]] = {
    "heads": [(1, 1), (8, 1), (12, 1), (16, 1), (32, 1), (64, 1), (96, 1), (128, 1), (10, 2)],
    "seqlens_q": [1, 2, 4, (0, 1, 3), (5, 0, 2)],
    "latent": [("joint", (576, 512)), ("qv", (64, 512)), ("qv row", (64, 512)), (None, (64, 512)), ("qv", (64, 256)),
               ("joint", (520, 264)), ("joint", (576, 64)), ("qv row", (40, 456)), (None, (8, 512))],
    "dtype": ["float16", "bfloat16", "float32"],
    "seqlens": [(77, 1, 130), (0, 64, 15), (16, 199, 63)],
    "cache": [*CACHES, "pages of 64"],
    "mask": list(MASKS),
    "append": list(APPENDS),
    "splits": list(SPLITS),
    "plan": ["none", "given", "stale", "reused"],
    "layout": ["NHD", "HND"],
    "leftpad": [False, True],
    "softcap": [0.0, 3.0],
    "sinks": [False, True],
    "scale": [None, -0.2, 0.0],
    "rotary": [{}, {"rotary": "interleaved", "rotary_dim": 16}, {"rotary": "half", "rotary_dim": 32}],
    "arch": ["80", "90", "120", "90a"],
}  # fmt: skip


# Caches of 8 bits: what becomes float16 on its way to an MMA, or beside queries of float32 before it.
FEATURES_OF_CODES = FEATURES | {
    "latent": [("joint", (576, 512)), ("qv", (64, 512)), ("qv row", (64, 512)), (None, (64, 512)), ("qv", (48, 256)),
               ("joint", (528, 272)), ("joint", (576, 64)), ("qv row", (48, 464)), ("joint", (480, 464))],
    "dtype": ["float16", "bfloat16", "float8_e4m3fn", "float32"],
    "kv_dtype": ["float8_e4m3fn", "float8_e5m2", "int8"],
    "scales": [("float", "one"), ("heads", "keys"), ("keys", "float"), ("keys", "keys")],
}  # fmt: skip


def _is_valid(choice: dict[str, Any]) -> bool:
    kind, (d, dv) = choice["latent"]
    room = d - dv if kind == "joint" else d
    if choice["arch"] == "90a" and (room > 64 or dv <= 384 or choice["dtype"] == "float32"):
        return False
    if "kv_dtype" in choice and kind != "joint" and (choice["arch"] == "90a" or choice["dtype"] == "float8_e4m3fn"):
        return False
    return not choice["rotary"] or (choice["append"] != "none" and room >= choice["rotary"]["rotary_dim"])


def _cases(features: dict[str, list[Any]]) -> list[tuple[Case, str]]:
    named = {"mask": MASKS, "append": APPENDS, "splits": SPLITS, "cache": CACHES | {"pages of 64": {"page_size": 64}}}
    cases = []
    for seed, choice in enumerate(all_pairs(features, _is_valid)):
        arch, (kind, headdim) = choice.pop("arch"), choice.pop("latent")
        options: dict[str, Any] = {"seed": seed, "mla": kind, "headdim": headdim, **choice.pop("rotary")}
        if "scales" in choice:  # a joint row has one
            choice["scales"] = ("none", choice["scales"][0], "none" if kind == "joint" else choice["scales"][1])
        for name, value in choice.items():
            options |= named[name][value] if name in named else {name: value}
        cases.append((Case(**options), arch))
    return cases


# The first ones hold most pairs: every one meets as many new pairs as it can.
PAIRS = [
    pytest.param(case, arch, id=f"sm_{arch},{case}", marks=() if number < 6 else pytest.mark.slow)
    for features in (FEATURES, FEATURES_OF_CODES)
    for number, (case, arch) in enumerate(_cases(features))
]


@pytest.mark.parametrize(("case", "arch"), PAIRS)
def test_pairs(case: Case, sim: Backend) -> None:
    """Every two features together at least once."""
    with launched(case.seed):
        check(case, make_inputs(case), sim)


@pytest.mark.parametrize("heads", [16, *(pytest.param(heads, marks=pytest.mark.slow) for heads in (32, 64))])
@pytest.mark.parametrize("page_size", [16, pytest.param(None, marks=pytest.mark.slow)])
@BOTH
def test_every_length(page_size: int | None, heads: int, sim: Backend) -> None:
    """Lengths 0 to 66 and around 128: every residue modulo a tile, together in one batch."""
    case = Case(
        dtype="float16", heads=(heads, 1), headdim=(576, 512), mla="joint", page_size=page_size, seed=1,
        seqlens=(*range(67), 127, 128, 129),
    )  # fmt: skip
    with launched():
        check(case, make_inputs(case), sim)


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [("90", "bfloat16"), ("90a", "bfloat16")] + [pytest.param(arch, dtype, marks=pytest.mark.slow)
     for arch in ("80", "90", "120") for dtype in ("bfloat16", "float32") if (arch, dtype) != ("90", "bfloat16")],
)  # fmt: skip
def test_both_spellings_are_one(dtype: str, sim: Backend) -> None:
    """The same memory gives the same bits, named by one row or by its two parts."""
    for heads in (12, 40):
        case = Case(
            dtype=dtype, heads=(heads, 1), headdim=(576, 512), mla="joint", page_size=16, seqlens_q=2, causal=True,
            seqlens=(300, 17, 64), sinks=True, scale=0.05,
        )  # fmt: skip
        inputs = make_inputs(case)
        q, row = inputs["q"], inputs["k_cache"]
        parts = {"q": q[..., 512:], "qv": q[..., :512], "k_cache": row[..., 512:], "v_cache": row[..., :512]}
        apart = {name: np.ascontiguousarray(parts[name]) for name in ("k_cache", "v_cache")}
        results = []
        for given in (inputs, inputs | parts, inputs | parts | apart):
            with launched():
                results.append(cuflash.flash_attn_with_kvcache(**given, return_softmax_lse=True))
        for out, lse in results[1:]:
            assert out.tobytes() == results[0][0].tobytes() and lse.tobytes() == results[0][1].tobytes()


@pytest.mark.parametrize(
    ("heads", "split_size", "arch"),
    [pytest.param(heads, split_size, arch,
                  marks=() if heads == 16 and (split_size is None) == (arch == "90a") else pytest.mark.slow)
     for heads in (16, 48) for split_size in (None, 128) for arch in ("90", "90a")],
)  # fmt: skip
def test_items_in_many_blocks(split_size: int | None, heads: int, sim: Backend, monkeypatch: Any) -> None:
    """A tree of several levels, or a fold of splits: right, and the same bits in whichever order blocks arrive."""
    monkeypatch.setenv("CUFLASH_NUM_SM", "12")
    case = Case(
        dtype="bfloat16", heads=(heads, 1), headdim=(576, 512), mla="joint", seqlens=(1200,), sinks=True, page_size=64,
        split_size=split_size,
    )  # fmt: skip
    inputs = make_inputs(case)
    results = []
    for seed, attend in enumerate((run, run, check)):
        with launched(seed) as launches:
            results.append(attend(case, inputs, sim)[:2])
        assert attention(launches).counters.atomics > 4  # blocks that met
    for out, lse in results[1:]:
        assert out.tobytes() == results[0][0].tobytes() and lse.tobytes() == results[0][1].tobytes()


def _merging(at_once: int, vectors: int) -> dict[str, str]:
    """Return what to change in the source for so many loads of a lane, and so many lanes that load one part."""
    return {"kAtOnce = MERGE_LOADS": f"kAtOnce = {at_once}", "= MERGE_VECTORS": f"= {vectors}"}


@pytest.mark.parametrize(
    ("num_sm", "heads", "headdim_v", "vectors"),
    [(40, 16, 512, 32),
     *(pytest.param(*sizes, marks=pytest.mark.slow)
       for sizes in ((36, 2, 456, 16), (70, 64, 512, 32), (132, 128, 512, 32), (132, 16, 512, 16)))],
)  # fmt: skip
@pytest.mark.parametrize("arch", ["90a"])
def test_more_parts_than_a_warp_merges(
    num_sm: int, heads: int, headdim_v: int, vectors: int, sim: Backend, change_source: ChangeSource, monkeypatch: Any
) -> None:
    """Warps share the parts of a row, and lanes load one or two; whoever merges what, the bits are the same."""
    monkeypatch.setenv("CUFLASH_NUM_SM", str(num_sm))
    tiles = mla_wgmma.tiling(make_problem(1, 1, heads, 1, headdim_v + 64, headdim_v=headdim_v), Device(num_sm, 90))
    assert tiles is not None and tiles.merge_vectors == (16 if (num_sm, heads) == (132, 16) else 32)
    if vectors != tiles.merge_vectors:
        change_source("mla_wgmma.cu", _merging(12, vectors))
    case = Case(
        dtype="bfloat16", heads=(heads, 1), headdim=(headdim_v + 64, headdim_v), mla="joint", seqlens=(64 * num_sm,),
        page_size=64, sinks=True,
    )  # fmt: skip
    inputs = make_inputs(case)
    bits = set()
    for seed in range(2):
        with launched(seed) as launches:
            bits.add(b"".join(array.tobytes() for array in check(case, inputs, sim)))
        assert attention(launches).grid == (num_sm, 1, 1)
    assert len(bits) == 1


def _let_wait(who: str, parts: int, change_source: ChangeSource, **more: str) -> None:
    """Say which blocks wait for an item's others, which then will have begun; those with an odd number are "some"."""
    asked = "load_relaxed(words + kStarted)"
    until_all = f"[&] {{ while ({asked} < {parts}) continue; return {parts}u; }}()"
    answer = {"all": until_all, "some": f"(share_number() % 2 ? {until_all} : 0)", "none": "0"}[who]
    change_source("mla_wgmma.cu", {f"{asked} : 0": f"{answer} : 0", **more})


@pytest.mark.parametrize(
    ("who", "at_once", "vectors"),
    [("some", 8, 16), *(pytest.param(*more, marks=pytest.mark.slow) for more in (("all", 4, 16), ("none", 8, 32)))],
)
@pytest.mark.parametrize("arch", ["90a"])
def test_who_waits(
    who: str, at_once: int, vectors: int, sim: Backend, change_source: ChangeSource, monkeypatch: Any
) -> None:
    """Whoever waits, however many parts are loaded at once, all is merged; counters are cleared (conftest.py)."""
    monkeypatch.setenv("CUFLASH_NUM_SM", "34")
    _let_wait(who, 34, change_source, **_merging(at_once, vectors))
    case = Case(
        dtype="bfloat16", heads=(3, 1), headdim=(576, 512), mla="joint", seqlens=(64 * 34,), page_size=64, sinks=True
    )
    inputs = make_inputs(case)
    for seed in range(2):
        with launched(seed, window=34) as launches:
            check(case, inputs, sim)
        assert attention(launches).grid == (34, 1, 1)


@pytest.mark.parametrize(("parts", "heads", "vectors"), [(12, 1, 32), (18, 1, 32), (18, 1, 16), (3, 20, 16)])
@pytest.mark.parametrize("arch", ["90a"])
def test_maxima_far_below_zero(
    parts: int, heads: int, vectors: int, sim: Backend, change_source: ChangeSource, monkeypatch: Any
) -> None:
    """Sixteen or thirty-two lanes weigh fewer parts: where there is no part there is no maximum of 0 either."""
    monkeypatch.setenv("CUFLASH_NUM_SM", str(parts))
    if vectors == 16:
        change_source("mla_wgmma.cu", {**_merging(12, vectors), "? 0 : SCATTERED_PARTS": "? 0 : 0"})
    case = Case(
        dtype="bfloat16", heads=(heads, 1), headdim=(576, 512), mla="joint", seqlens=(64 * parts,), page_size=64,
        scale=1.0,
    )  # fmt: skip
    inputs = make_inputs(case)
    for name, sign in (("q", -1), ("k_cache", 1)):
        inputs[name][...] = sign * abs(inputs[name].astype(np.float32))  # in place: the values are a view of the keys
    with launched():
        check(case, inputs, sim)


@pytest.mark.parametrize(
    ("parts", "heads", "headdim_v", "who"),
    [pytest.param(*sizes, who, id=f"{sizes}, {who}",
                  marks=() if (sizes, who) in (((2, 40, 456), "all"), ((3, 20, 512), "some"), ((5, 33, 512), "all"),
                                               ((2, 128, 512), "some")) else pytest.mark.slow)
     for sizes in ((2, 40, 456), (3, 20, 512), (5, 33, 512), (2, 128, 512), (4, 16, 512), (4, 64, 456), (8, 64, 512))
     for who in ("all", "some", "none")],
)  # fmt: skip
@pytest.mark.parametrize("arch", ["90a"])
def test_pieces_of_few_parts(
    parts: int, heads: int, headdim_v: int, who: str, sim: Backend, change_source: ChangeSource, monkeypatch: Any
) -> None:
    """Blocks that wait keep a piece each and do not store it; whoever merges it, the bits are the same."""
    num_sm = 2 * parts if heads == 128 else parts
    _let_wait(who, parts, change_source)
    monkeypatch.setenv("CUFLASH_NUM_SM", str(num_sm))
    case = Case(
        dtype="bfloat16", heads=(heads, 1), headdim=(headdim_v + 64, headdim_v), mla="joint", seqlens=(parts * 100,),
        sinks=True, page_size=64,
    )  # fmt: skip
    inputs = make_inputs(case)
    rows = -(-heads // 16) * 16  # whole warps store
    pieces = 1 << (parts - 1).bit_length()
    all_parts = parts * rows * (headdim_v * 4 + 8)
    kept = parts * rows * headdim_v * 4 // pieces
    bits = set()
    for seed in range(2):
        with launched(seed, window=num_sm) as launches:
            bits.add(b"".join(array.tobytes() for array in check(case, inputs, sim)))
        launch = attention(launches)
        assert launch.grid == (num_sm, 1, 1)
        missing = all_parts - launch.counters.arrays["partials"].write_bytes
        assert missing in {"all": [kept], "some": range(1, kept), "none": [0]}[who]
    assert len(bits) == 1


@pytest.mark.parametrize("arch", ["90a"])
@pytest.mark.parametrize("mask", ["causal+left", "both"])
def test_two_blocks_side_by_side(mask: str, sim: Backend) -> None:
    """Where every block reads several items, two of them read those of the same sequence, each half of its rows."""
    case = Case(
        dtype="bfloat16", heads=(40, 1), headdim=(576, 512), mla="joint", seqlens=(300, 17, 700), seqlens_q=(3, 1, 2),
        page_size=16, **MASKS[mask],
    )  # fmt: skip
    with launched() as launches:
        check(case, make_inputs(case), sim)
    assert launches[-1].kernel == "mla_wgmma"
    wide = make_problem(4, 1, 128, 1, 576, headdim_v=512)
    for num_sm, rows, blocks in ((132, 64, 132), (7, 128, 3), (300, 64, 300), (2**16, 64, 2**12 - 1)):
        partition = kernels.choose(wide, Device(num_sm, 90), 4096)
        assert (partition.rows, partition.num_blocks) == (rows, blocks)


@pytest.mark.parametrize("arch", ["90a"])
@pytest.mark.parametrize("page_size", [64, pytest.param(8, marks=pytest.mark.slow)])
def test_tiles_scored_ahead(page_size: int, sim: Backend) -> None:
    """Where two blocks share their tiles, the second of two is scored before the first is multiplied."""
    case = Case(
        dtype="bfloat16", heads=(128, 1), headdim=(576, 512), mla="joint", seqlens=(260, 65, 129, 0, 1),
        page_size=page_size,
    )  # fmt: skip
    inputs = make_inputs(case)
    for seed in range(4):
        if seed == 3:  # maxima move in most tiles, else hardly ever
            inputs["q"] *= inputs["q"].dtype.type(8)
        with launched(seed) as launches:
            check(case, inputs, sim)
        assert attention(launches).cluster == (2, 1, 1)


@BOTH
def test_bits_with_split_size(sim: Backend, monkeypatch: Any) -> None:
    """A sequence alone, in a batch, on few blocks and on many."""
    case = Case(
        dtype="bfloat16", heads=(16, 1), headdim=(576, 512), mla="joint", seqlens=(700, 90, 300), split_size=64,
        poison=False,
    )  # fmt: skip
    inputs = make_inputs(case)
    alone = []
    for b in range(3):
        row = inputs["k_cache"][b : b + 1]
        out = cuflash.flash_attn_with_kvcache(
            inputs["q"][b : b + 1], row, row[..., :512], cache_seqlens=inputs["cache_seqlens"][b : b + 1], split_size=64
        )
        alone.append(out[0].tobytes())
    for num_sm in (1, 20):
        monkeypatch.setenv("CUFLASH_NUM_SM", str(num_sm))
        assert [row.tobytes() for row in run(case, inputs, sim)[0]] == alone


QUANTISED: list[dict[str, Any]] = [
    {"mla": "joint", "headdim": (576, 512), "kv_dtype": "float8_e4m3fn", "scales": ("none", "keys", "none"), "new": 2,
     "dtype": "bfloat16", "rotary": "half", "rotary_dim": 32, "page_size": 16, "causal": True},
    {"mla": "qv", "headdim": (64, 256), "kv_dtype": "int8", "scales": ("none", "float", "keys"), "dtype": "float32"},
    {"mla": "joint", "headdim": (320, 256), "kv_dtype": "float8_e5m2", "scales": ("heads", "one", "none"),
     "dtype": "float8_e4m3fn", "split_size": 64},
    {"mla": "joint", "headdim": (320, 256), "dtype": "float32", "heads": (3, 1)},
    {"mla": "joint", "headdim": (576, 16), "kv_dtype": "int8", "scales": ("none", "keys", "none"), "dtype": "float32"},
    {"mla": "joint", "headdim": (576, 432), "kv_dtype": "float8_e4m3fn", "scales": ("none", "keys", "none"),
     "dtype": "float32"},
]  # fmt: skip


@pytest.mark.parametrize("arch", [pytest.param("86", marks=pytest.mark.slow), "120"])  # of 99 KB
@pytest.mark.parametrize("options", QUANTISED, ids=str)
def test_codes_and_float32(options: dict[str, Any], sim: Backend) -> None:
    """Quantised caches, and joint rows of float32 that no other kernel has."""
    case = Case(**{"heads": (12, 1), "seqlens": (37, 1, 90), "seqlens_q": 2, **options})
    with launched():
        check(case, make_inputs(case), sim)


@pytest.mark.parametrize("arch", ["90a"])
@pytest.mark.parametrize("heads", [12, 128])
def test_codes_that_land_in_registers(heads: int, sim: Backend) -> None:
    """A scale for every key: of scores, and of the weights of both halves of a tile, which float16 has to hold."""
    case = Case(
        dtype="bfloat16", heads=(heads, 1), headdim=(576, 512), mla="joint", seqlens=(37, 1, 290), seqlens_q=2,
        kv_dtype="float8_e4m3fn", scales=("none", "keys", "none"), page_size=16, causal=True,
        scale=2.0**-20,
    )  # fmt: skip
    inputs = make_inputs(case)
    inputs["k_descale"] = inputs["k_descale"] * np.float32(2.0**16)
    with launched():
        check(case, inputs, sim)


# ------------------------------------------------------------------------------------------------------------- counts
@pytest.mark.parametrize("kind", ["joint", pytest.param("qv row", marks=pytest.mark.slow), "codes"])
@pytest.mark.parametrize(
    ("heads", "arch"),
    [(16, "90"), (64, "90"), (64, "90a"), (128, "90a")] + [pytest.param(heads, arch, marks=pytest.mark.slow)
     for heads in (16, 32, 64) for arch in ("80", "90", "120", "90a")
     if heads == 32 or arch == "80" or (heads, arch) in ((16, "120"), (16, "90a"))],
)  # fmt: skip
def test_counts(kind: str, heads: int, sim: Backend) -> None:
    """A latent row is asked for once, in whole sectors, and no two lanes meet in a bank."""
    lengths = (1800, 1003, 777, 1311)
    joint: dict[str, Any] = {"mla": "joint", "headdim": (576, 512)}
    options = {"joint": joint, "qv row": {"mla": "qv row", "headdim": (64, 512)},
               "codes": joint | {"kv_dtype": "float8_e4m3fn"}}[kind]  # fmt: skip
    case = Case(dtype="bfloat16", heads=(heads, 1), seqlens=lengths, page_size=64, poison=False, **options)
    with simulator.record(simulator.Checks.cheap()) as launches:
        run(case, make_inputs(case), sim)
    counters = attention(launches).counters
    caches = [counters.arrays[name] for name in ("k_cache", "v_cache") if name in counters.arrays]
    assert sum(cache.read_bytes for cache in caches) <= 1.02 * sum(lengths) * 576 * (1 if kind == "codes" else 2)
    assert sum(cache.read_sectors for cache in caches) == sum(cache.read_ideal for cache in caches)
    ideal, real = counters.wavefronts("cp.async", "ldmatrix", "ld.shared", "st.shared")
    assert real <= 1.02 * ideal
    ideal, real = counters.wavefronts("cp.async", "ldmatrix", "wgmma")
    assert real == ideal


# ------------------------------------------------------------------------------------------------------------- choice
def _family(d: int, dv: int, arch: int = 90, **options: Any) -> str:
    problem: Problem = make_problem(4, 1, 16, 1, d, headdim_v=dv, **options)
    return kernels.choose(problem, Device(132, arch), 4096).family


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_what_is_latent(arch: int) -> None:
    """Head dims alone decide: a plan does not know what its calls bring."""
    for dtype in ("float16", "bfloat16", "float32"):
        for d, dv in ((576, 512), (520, 8), (64, 256), (64, 512), (8, 264)):
            by_wgmma = arch == 90 and dv == 512 and dtype != "float32"
            assert _family(d, dv, arch, qkv_dtype=dtype) == ("mla_wgmma" if by_wgmma else "mla")
    for d, dv in ((72, 256), (64, 248), (320, 256), (96, 64), (512, 512)):
        assert _family(d, dv, arch) != "mla"


@pytest.mark.parametrize(
    ("batch", "heads", "evicts_first"),
    [(128, 16, 1), (128, 32, 1), (128, 64, 0), (128, 128, 0), (116, 64, 0), (115, 64, 1), (32, 128, 1), (1, 64, 1)],
)
def test_who_leaves_the_l2_cache_first(batch: int, heads: int, evicts_first: int) -> None:
    """No result depends on it, so nothing else would notice."""
    problem = make_problem(batch, 1, heads, 1, 64, headdim_v=512, qkv_dtype="bfloat16")
    partition = mla_wgmma.partition(problem, Device(132, 90), 4096)
    assert partition is not None
    assert f"-DEVICTS_FIRST={evicts_first}" in mla_wgmma.variant(problem, partition).options


@pytest.mark.parametrize(("page_size", "is_shared"), [(None, True), (1, False), (4, False), (8, True), (64, True)])
def test_tiles_are_shared_where_they_come_in_boxes(page_size: int | None, is_shared: bool) -> None:
    problem = make_problem(128, 1, 128, 1, 64, headdim_v=512, qkv_dtype="bfloat16", page_size=page_size)
    tiles = mla_wgmma.tiling(problem, Device(132, 90))
    assert tiles is not None and tiles.shares_tiles == is_shared


@pytest.mark.parametrize("heads", [16, 128])
@BOTH
def test_no_sequences(heads: int, sim: Backend) -> None:
    """Then there is nothing to write, but for queries that belong to none."""
    none, pages = np.zeros(0, np.int32), np.full((2, 16, 1, 576), np.nan, np.float16)
    common = {"cache_seqlens": none, "page_table": np.zeros((0, 2), np.int32), "return_softmax_lse": True}
    assert cuflash.get_scheduler_metadata(0, 1, 32, heads, 1, 576, none, "float16", 512).work().size == 0
    with launched():
        out, lse = cuflash.flash_attn_with_kvcache(
            np.ones((0, 1, heads, 576), np.float16), pages, pages[..., :512], **common
        )
        assert out.shape == (0, 1, heads, 512) and lse.shape == (0, heads, 1)
        out, lse = cuflash.flash_attn_with_kvcache(
            np.ones((3, heads, 576), np.float16), pages, pages[..., :512], cu_seqlens_q=np.zeros(1, np.int32),
            max_seqlen_q=2, **common,
        )  # fmt: skip
        assert np.all(out == 0) and np.all(lse == -np.inf)


@BOTH
def test_one_plan_for_calls_with_and_without_qv(sim: Backend) -> None:
    """The plan is not told."""
    case = Case(dtype="bfloat16", heads=(16, 1), headdim=(64, 512), mla="qv", plan="given", causal=True, seqlens_q=2)
    for kind in ("qv", None, "qv row"):
        with launched():
            check(dataclasses.replace(case, mla=kind), make_inputs(dataclasses.replace(case, mla=kind)), sim)


@pytest.mark.parametrize(("scales", "arch"), [("none", "80"), ("none", "90a"), ("of keys", "80"), ("of heads", "80")])
def test_lengths_up_to_2_31(scales: str, arch: str, sim: Backend) -> None:
    """A tile's key numbers may pass 2^31 behind the last key; a table names one page again and again."""
    rng = np.random.default_rng(1)
    length, window, page_size = 2**31 - 1, 20, 1024
    q = rng.standard_normal((1, 1, 4, 576)).astype(ml_dtypes.bfloat16)
    k = rng.standard_normal((1, page_size, 1, 576)).astype("bfloat16" if scales == "none" else ml_dtypes.float8_e4m3fn)
    shape = {"of keys": (1, page_size, 1), "of heads": (1, 1)}.get(scales)
    k_descale = None if shape is None else rng.uniform(0.5, 2, shape).astype(np.float32)
    with launched():
        out = cuflash.flash_attn_with_kvcache(
            q, k, k[..., :512], cache_seqlens=np.array([length], np.int32), window_size=(window, 0),
            page_table=np.zeros((1, 2**31 // page_size), np.int32), k_descale=k_descale, softmax_scale=0.05,
        )  # fmt: skip
    seen = np.arange(length - window - 1, length) % page_size
    rows = k[0, seen, 0].astype(np.float64)
    if k_descale is not None:
        rows *= k_descale[0, seen] if scales == "of keys" else k_descale[0, 0]
    scores = 0.05 * q[0, 0].astype(np.float64) @ rows.T
    wanted = averages(scores, rows[:, :512])
    np.testing.assert_allclose(out[0, 0].astype(np.float64), wanted, atol=0.02 * abs(wanted).max())


def test_qv_where_no_plan_expects_it() -> None:
    q, qv = np.zeros((1, 1, 2, 64), np.float32), np.zeros((1, 1, 2, 64), np.float32)
    k = np.zeros((1, 16, 1, 64), np.float32)
    with pytest.raises(ValueError, match="qv must come with a headdim of at most 64"):
        cuflash.flash_attn_with_kvcache(q, k, k, qv=qv, cache_seqlens=3)
