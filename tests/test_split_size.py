"""With ``split_size`` the bits of a sequence's result follow from the sequence alone; its scratch from the device."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from problems import DTYPES, Backend, Case, check_lse, check_out, expected, make_inputs

import cuflash
from cuflash.device import Device
from cuflash.kernels import attention, choose
from cuflash.kernels.tiles import tiling
from cuflash.problem import make_problem

ARCHS = (80, 86, 90, 120)


@dataclasses.dataclass(frozen=True)
class One:
    """A sequence with its own queries, keys and values.

    Attributes:
        q: (seqlen_q, heads_q, headdim).
        k: (seqlen_k, heads_kv, headdim).
        v: (seqlen_k, heads_kv, headdim_v).
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray


def _sequence(
    seed: int, seqlen_q: int, seqlen_k: int, dtype: str, heads: tuple[int, int] = (8, 2), headdim: Any = (128, 128)
) -> One:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(DTYPES[dtype])

    return One(
        normal(seqlen_q, heads[0], headdim[0]), normal(seqlen_k, heads[1], headdim[0]),
        normal(seqlen_k, heads[1], headdim[1]),
    )  # fmt: skip


def _attend(
    sequences: list[One], backend: Backend, *, dense: bool = False, capacity: int = 0, most_queries: int = 0,
    page_size: int | None = None, **options: Any,
) -> list[tuple[bytes, bytes]]:  # fmt: skip
    """Attend to sequences in one call; return the bits of each one's output and LSE."""
    lengths = [len(one.k) for one in sequences]
    rows = max(capacity, *lengths, 1)
    first = sequences[0]
    k, v = (np.full((len(sequences), rows, *x.shape[1:]), np.nan, x.dtype) for x in (first.k, first.v))
    for b, one in enumerate(sequences):
        k[b, : len(one.k)], v[b, : len(one.v)] = one.k, one.v
    options = {name: backend.to_native(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    arguments: dict[str, Any] = {"cache_seqlens": np.array(lengths, np.int32)}
    if page_size:
        columns = -(-rows // page_size)
        pages = np.random.default_rng(0).permutation(len(sequences) * columns).astype(np.int32)
        arguments["page_table"] = pages.reshape(len(sequences), columns)
        paged = []
        for x in (k, v):
            padded = np.pad(x, ((0, 0), (0, columns * page_size - rows), (0, 0), (0, 0)))
            cache = np.empty((len(sequences) * columns, page_size, *x.shape[2:]), x.dtype)
            cache[pages] = padded.reshape(len(pages), page_size, *x.shape[2:])
            paged.append(cache)
        k, v = paged
    if dense:
        arguments["q"] = np.stack([one.q for one in sequences])
    else:
        starts = np.cumsum([0, *(len(one.q) for one in sequences)]).astype(np.int32)
        arguments |= {
            "q": np.concatenate([one.q for one in sequences]),
            "cu_seqlens_q": starts,
            "max_seqlen_q": max(most_queries, *(len(one.q) for one in sequences)),
        }
    arguments |= {"k_cache": k, "v_cache": v}
    native = {name: backend.to_native(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    out, lse = cuflash.flash_attn_with_kvcache(**native, **options, return_softmax_lse=True)
    out, lse = backend.to_numpy(out), backend.to_numpy(lse)
    if dense:
        return [(out[b].tobytes(), lse[b].tobytes()) for b in range(len(sequences))]
    return [(out[a:b].tobytes(), np.ascontiguousarray(lse[:, a:b]).tobytes()) for a, b in zip(starts[:-1], starts[1:])]


def _check_invariant(subject: One, others: list[One], backend: Backend, **options: Any) -> None:
    """Hold a sequence alone against the same one in batches, by bits."""
    alone = _attend([subject], backend, **options)[0]
    few, all_of_them = [others[0], subject], [*others, subject, others[0]]
    assert _attend([subject], backend, dense=True, **options)[0] == alone, "dense"
    assert _attend([subject], backend, capacity=9000, most_queries=7, **options)[0] == alone, "capacity"
    assert _attend(few, backend, **options)[1] == alone, "beside one"
    assert _attend(all_of_them, backend, page_size=16, **options)[len(others)] == alone, "in pages, in a batch"
    assert _attend(all_of_them[::-1], backend, sm_margin=3, **options)[1] == alone, "in another order"


HEADDIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
QUICK = {  # each value of each once; kernels for one architecture take seconds to compile
    ((64, 64), "bfloat16", 120), ((96, 96), "float16", 86), ((128, 128), "float16", 90), ((128, 128), "bfloat16", 80),
    ((192, 128), "bfloat16", 90), ((256, 256), "float32", 120),
}  # fmt: skip


@pytest.mark.parametrize(
    ("headdim", "dtype", "arch"),
    [
        pytest.param(*choice, marks=() if choice in QUICK else pytest.mark.slow)
        for choice in itertools.product(HEADDIMS, DTYPES, ARCHS)
    ],
    ids=str,
)
def test_bits_follow_from_the_sequence(
    headdim: tuple[int, int], dtype: str, arch: int, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and beside sequences with more queries, more keys and none, dense and ragged, in any order."""
    monkeypatch.setenv("CUFLASH_ARCH", str(arch))
    shape = {"dtype": dtype, "headdim": headdim}
    subject = _sequence(1, 1, 1000, **shape)
    others = [_sequence(2, 4, 700, **shape), _sequence(3, 9, 1500, **shape), _sequence(4, 1, 0, **shape)]
    _check_invariant(subject, others, backend, split_size=128)


MASKS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window_size": (300, 0)},
    "both sides": {"window_size": (130, 1)},
    "chunks": {"attention_chunk": 150},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": np.linspace(-2, 3, 8, dtype=np.float32)},
}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("split_size", [64, 448])
def test_bits_follow_from_the_sequence_under_masks(
    options: dict[str, Any], seqlen_q: int, split_size: int, backend: Backend
) -> None:
    shape = {"dtype": "bfloat16", "headdim": (64, 64)}
    subject = _sequence(1, seqlen_q, 1000, **shape)
    others = [_sequence(2, 4, 700, **shape), _sequence(3, 9, 1500, **shape), _sequence(4, 1, 0, **shape)]
    _check_invariant(subject, others, backend, split_size=split_size, **options)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (16, 1), (40, 1)], ids=str)
def test_bits_follow_from_the_sequence_for_any_group(heads: tuple[int, int], backend: Backend) -> None:
    """Groups of 1, 3, 16 and 40 query heads."""
    shape = {"dtype": "float16", "headdim": (64, 64), "heads": heads}
    subject = _sequence(1, 2, 600, **shape)
    _check_invariant(subject, [_sequence(2, 5, 900, **shape)], backend, split_size=64, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whoever_folds_the_splits(dtype: str, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sequence cut into many blocks, into two, and whole in one of many."""
    shape = {"dtype": dtype, "headdim": (64, 64)}
    subject = _sequence(1, 1, 3000, **shape)
    short = [_sequence(9 + i, 1, 64 * i, **shape) for i in range(1, 30)]
    results = set()
    for num_sm in (1, 2, 5, 40):
        monkeypatch.setenv("CUFLASH_NUM_SM", str(num_sm))
        results.add(_attend([subject], backend, split_size=64)[0])
        results.add(_attend([short[0], subject, *short[1:]], backend, split_size=64)[1])
    assert len(results) == 1


def test_the_answer_is_right(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition, with items that are cut into two and many parts, or not at all."""
    for num_sm in ("1", "3", "24"):
        monkeypatch.setenv("CUFLASH_NUM_SM", num_sm)
        case = Case(
            dtype="bfloat16", seqlens=(2500, 0, 1, 64, 700), seqlens_q=(1, 2, 1, 1, 3), causal=True, sinks=True,
            page_size=16,
        )  # fmt: skip
        inputs = make_inputs(case)
        native = {k: backend.to_native(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items()}
        out, lse = cuflash.flash_attn_with_kvcache(**native, split_size=64, return_softmax_lse=True)
        answer = expected(inputs)
        check_out(case, backend.to_numpy(out), answer)
        check_lse(case, backend.to_numpy(lse), answer)


def test_stale_plans_are_right_by_bits(backend: Backend) -> None:
    """Cuts lie at multiples of split_size whatever the lengths were, and the fold does not care who does it."""
    case = Case(dtype="bfloat16", seqlens=(700, 1500, 64, 0), split_size=64, poison=False, causal=True)
    inputs = make_inputs(case)
    native = {k: backend.to_native(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items()}
    wanted = cuflash.flash_attn_with_kvcache(**native, split_size=64)
    for lengths in ([10, 10, 10, 10], [4000, 0, 0, 0], [0, 90, 9000, 2000], [1500, 700, 0, 64]):
        meta = cuflash.get_scheduler_metadata(
            4, 1, 9000, 4, 2, 64, backend.to_native(np.array(lengths, np.int32)), causal=True, split_size=64
        )
        out = cuflash.flash_attn_with_kvcache(**native, scheduler_metadata=meta)
        np.testing.assert_array_equal(backend.to_numpy(out), backend.to_numpy(wanted))


# ------------------------------------------------------------------------------------------------ tiles and scratch
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_follow_from_heads_dims_and_device(dtype: str, arch: int) -> None:
    for headdim in (64, 96, 128, 192, 256):
        for group in (1, 4, 8, 12, 16, 24, 32, 64):
            shapes = set()
            for batch, seqlen_q, most, num_sm, ragged in [
                (1, 1, 100, 132, False), (1, 7, 10**6, 132, True), (500, 1, 300, 8, False), (3, 100, None, 132, True),
            ]:  # fmt: skip
                problem = make_problem(
                    batch, seqlen_q, 2 * group, 2, headdim, qkv_dtype=dtype, split_size=256, cu_seqlens_q=ragged
                )
                shapes.add(dataclasses.replace(tiling(problem, Device(num_sm, arch), most), row_blocks=1))
            assert len(shapes) == 1


@pytest.mark.parametrize("split_size", [None, 64])
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtypes", [*zip(DTYPES, DTYPES), ("float8_e4m3fn", "int8"), ("float32", "float8_e5m2")])
def test_sixteen_rows_are_one_row_block(dtypes: tuple[str, str], arch: int, split_size: int | None) -> None:
    for headdim in ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (512, 512), (64, 512), (576, 512)):
        for group in range(1, 17):
            for seqlen_q in range(1, 16 // group + 1):
                for batch in (1, 300):
                    problem = make_problem(
                        batch, seqlen_q, 2 * group, 2, headdim[0], headdim_v=headdim[1], qkv_dtype=dtypes[0],
                        kv_dtype=dtypes[1], split_size=split_size,
                    )  # fmt: skip
                    assert choose(problem, Device(132, arch), 4096).row_blocks == 1, (headdim, group, seqlen_q)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the memory for partial results that calls on the simulator ask for, in bytes."""
    from cuflash.backends import sim

    monkeypatch.setenv("CUFLASH_BACKEND", "sim")
    monkeypatch.setenv("CUFLASH_NUM_SM", "8")
    sizes: list[int] = []
    scratch = sim.SimulatedMachine.scratch

    def spy(machine: Any, name: str, memory: Any) -> Any:
        if name == "partials":
            sizes.append(memory.nbytes)
        return scratch(machine, name, memory)

    monkeypatch.setattr(sim.SimulatedMachine, "scratch", spy)
    return sizes


SIM = Backend("sim", lambda array: array, np.asarray)


def test_scratch_does_not_depend_on_the_batch(asked: list[int]) -> None:
    shape = {"dtype": "bfloat16", "headdim": (64, 64)}
    for batch in (8, 20, 60):
        _attend([_sequence(b, 1, 100, **shape) for b in range(batch)], SIM, capacity=512, split_size=64)
    assert asked[0] == asked[1] == asked[2] < 2**20


def test_scratch_is_for_the_keys_that_there_is_room_for(asked: list[int]) -> None:
    """The bound of the key lengths may be anything."""
    case = Case(dtype="bfloat16", seqlens=(300, 64), poison=False, split_size=64)
    inputs = make_inputs(case)
    meta = cuflash.get_scheduler_metadata(
        2, 1, 2**31 - 1, 4, 2, 64, inputs["cache_seqlens"], qkv_dtype="bfloat16", split_size=64
    )
    out, lse = cuflash.flash_attn_with_kvcache(**inputs, scheduler_metadata=meta, return_softmax_lse=True)
    check_out(case, out, expected(inputs))
    assert max(asked) < 2**20


@pytest.mark.parametrize("most", [1, 4, 10**6])
def test_items_that_would_take_too_much_scratch_stay_whole(
    most: int, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read where they begin; the bits stay."""
    shape = {"dtype": "bfloat16", "headdim": (64, 64)}
    sequences = [_sequence(1, 1, 3000, **shape), _sequence(2, 2, 200, **shape), _sequence(3, 1, 900, **shape)]
    wanted = _attend(sequences, SIM, split_size=64)
    slot = 4 * 16 * (64 + 2)
    monkeypatch.setattr(attention, "SPLIT_BYTES", most * slot * 12)
    assert _attend(sequences, SIM, split_size=64) == wanted
    if most < 10:
        assert asked[-1] == (2 * 16 + 12 * most) * slot < asked[0]
