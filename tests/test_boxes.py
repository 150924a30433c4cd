"""Tiles that come in boxes: on which caches they do, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import numpy as np
import pytest
from conftest import ChangeSource
from inputs import packed_inputs
from problems import Backend, Case, check, make_inputs

import cuflash
from cuflash import kernels, simulator
from cuflash.kernels import attention, boxes, extend_wgmma, mla_wgmma
from cuflash.kv_cache import KVCache

pytestmark = pytest.mark.skipif(importlib.util.find_spec("cuda.bindings") is None, reason="no simulator")
SIM = Backend("sim", lambda array: array, np.asarray)
MANY = Case(dtype="bfloat16", heads=(8, 2), headdim=(128, 128), seqlens=(300, 33, 0, 1), seqlens_q=9, causal=True)
BOXED = boxes.Boxed(2, (64, 16, 2, 3), (256, 128, 4096), (64, 16, 1, 1))
NO_BOXES = {"box_rows": 0, "box_step": 1, "is_packed": 0}
LATENT = Case(dtype="float16", heads=(16, 1), headdim=(576, 512), mla="joint", seqlens=(200, 65, 1), page_size=64)


@pytest.fixture(autouse=True)
def wgmma(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FAMILIES", (extend_wgmma, mla_wgmma))
    for name, value in (("ARCH", "90"), ("BACKEND", "sim"), ("NUM_SM", "4")):
        monkeypatch.setenv(f"CUFLASH_{name}", value)


def attended(case: Case, number: int = 0) -> tuple[int, Any]:
    """Check a case; return how many boxes were copied, and the output's bits."""
    inputs = make_inputs(case)
    with simulator.record(seed=case.seed, cp_async=("random", "early", "late")[number % 3]) as launches:
        out, lse = check(case, inputs, SIM)
    launch = next(one for one in launches if one.kernel in ("extend_wgmma", "mla_wgmma"))
    return launch.counters.classes.get("bulk", 0), (out.tobytes(), lse.tobytes())


# Of a change to a case: whether boxes are copied then.
CHANGES: dict[str, tuple[Case, dict[str, Any], bool]] = {
    "contiguous": (MANY, {}, True),
    "pages of 1": (MANY, {"page_size": 1}, False),
    "pages of 4": (MANY, {"page_size": 4}, False),
    "pages of 8": (MANY, {"page_size": 8}, True),
    "pages of 16": (MANY, {"page_size": 16}, True),
    "pages of 24": (MANY, {"page_size": 24}, True),
    "pages of 48, HND": (MANY, {"page_size": 48, "layout": "HND"}, True),
    "pages of 128": (MANY, {"page_size": 128}, True),
    "leftpad": (MANY, {"leftpad": True}, True),
    "leftpad, pages": (MANY, {"leftpad": True, "page_size": 16, "seqlens": (700, 33, 0, 1)}, True),
    "negative pages": (MANY, {"negative_pages": True, "page_size": 16}, True),
    "csr": (MANY, {"csr": True, "page_size": 16, "batch_idx": True}, True),
    "strided": (MANY, {"strided": True, "page_size": 32}, True),
    "window": (MANY, {"window": (100, 0), "page_size": 16}, True),
    "head dims without whole lines": (MANY, {"headdim": (72, 40), "page_size": 16}, True),
    "wide head dims": (MANY, {"headdim": (256, 192), "page_size": 16}, True),
    "other head dims": (MANY, {"headdim": (64, 128), "dtype": "float16"}, True),
    "128 rows": (MANY, {"seqlens_q": 40, "page_size": 16, "seqlens": (400, 129, 0)}, True),
    "append": (MANY, {"new": 9, "page_size": 16, "rotary": "half"}, True),
    "splits": (MANY, {"split_size": 64, "page_size": 16}, True),
    "tree": (MANY, {"tree": "words", "causal": False, "page_size": 16}, True),
    "codes": (MANY, {"kv_dtype": "float8_e4m3fn", "page_size": 16}, False),
    "latent": (LATENT, {}, True),
    "latent, contiguous": (LATENT, {"page_size": None}, True),
    "latent, pages of 1": (LATENT, {"page_size": 1}, False),
    "latent, in two arrays": (LATENT, {"mla": "qv", "headdim": (64, 512), "page_size": 16}, True),
    "latent, two blocks": (LATENT, {"heads": (128, 1), "seqlens": (200, 65, 1, 128, 0, 330), "causal": True}, True),
    "latent, two blocks, a window": (
        LATENT,
        {"heads": (128, 1), "seqlens_q": 3, "window": (90, 0), "causal": True},
        True,
    ),
    "latent, two blocks, pages of 1": (LATENT, {"heads": (128, 1), "page_size": 1, "softcap": 3.0}, False),
    "latent, two blocks, merged": (
        LATENT,
        {"heads": (128, 1), "merge": True, "sinks": True, "seqlens": (99, 330)},
        True,
    ),
    "latent, two blocks, leftpad": (
        LATENT,
        {"heads": (256, 1), "page_size": 16, "leftpad": True, "plan": "stale"},
        True,
    ),
    # Nodes on both sides of the end of a tile of 64 keys.
    "latent, tree": (LATENT, {"tree": "bool", "causal": False, "seqlens_q": 9}, True),
    "latent, two blocks, tree": (
        LATENT,
        {"heads": (128, 1), "tree": "words", "causal": False, "seqlens_q": 3, "seqlens": (194, 65, 9)},
        True,
    ),
    "latent, narrower": (LATENT, {"mla": "qv", "headdim": (40, 448), "page_size": 8}, True),
}


# What others cover as well runs with --slow alone.
_SLOW = (
    "pages of 4", "pages of 8", "pages of 24", "pages of 128", "leftpad", "strided", "window", "wide head dims",
    "other head dims", "128 rows", "append", "splits", "codes", "latent, contiguous", "latent, pages of 1",
    "latent, two blocks, a window", "latent, two blocks, merged", "latent, two blocks, leftpad", "latent, tree",
    "latent, narrower", "head dims without whole lines", "negative pages", "latent, two blocks, pages of 1",
)  # fmt: skip
assert CHANGES.keys() >= set(_SLOW)


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.slow if what in _SLOW else ()) for what in CHANGES]
)
def test_bits_are_those_of_rows_copied_one_by_one(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, change, has_boxes = CHANGES[what]
    case = dataclasses.replace(case, seed=len(what), **change)
    number, bits = attended(case, len(what))
    assert (number > 0) == has_boxes
    monkeypatch.setattr(attention, "boxed_cache", lambda cache, part_keys: (NO_BOXES, []))
    assert attended(case, len(what) + 1) == (0, bits)


@pytest.mark.parametrize("what", ["pages of 16", "latent, two blocks"])
def test_any_lane_may_be_elected(what: str, change_source: ChangeSource) -> None:
    """PTX does not say which one elect.sync chooses."""
    case, change, _ = CHANGES[what]
    first = 'asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(is_elected));'
    change_source("mla_wgmma.cu" if case.mla else "extend_wgmma.cu", {first: "is_elected = threadIdx.x % 32 == 5;"})
    number, _ = attended(dataclasses.replace(case, seed=1, **change))
    assert number > 0


@pytest.mark.parametrize("queries", [(9, 0, 5, 8), (70, 3, 0, 130)], ids=["64 rows", "128 rows"])
def test_packed_keys_come_in_boxes_of_the_same_bits(queries: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    given = packed_inputs(queries, (140, 33, 0, 201), np.float16)

    def attend(seed: int) -> tuple[int, Any]:
        with simulator.record(seed=seed, cp_async="random") as launches:
            results = cuflash.flash_attn_varlen_func(**given, causal=True, return_softmax_lse=True)
        launch = next(one for one in launches if one.kernel == "extend_wgmma")
        return launch.counters.classes.get("bulk", 0), results

    number, (out, lse) = attend(0)
    assert number > 0
    monkeypatch.setattr(attention, "boxed_cache", lambda cache, part_keys: (NO_BOXES, []))
    none, results = attend(1)
    assert none == 0
    for found, wanted in zip((out, lse), results, strict=True):
        assert found.tobytes() == wanted.tobytes()
    monkeypatch.setenv("CUFLASH_BACKEND", "numpy")
    wanted = cuflash.flash_attn_varlen_func(**given, causal=True)
    np.testing.assert_allclose(out.astype(np.float32), wanted.astype(np.float32), rtol=0, atol=4e-3)


def test_a_tensor_map_is_made_once() -> None:
    """Of an address; a plan's next layer has another one."""
    made: list[int] = []
    launch = kernels.launch.make_launch(
        kernels.source.Variant("mla_wgmma"), "TiledParams", 1, 32, 0, _zeros(), boxed=[("k", BOXED), ("v", BOXED)]
    )
    names = dict.fromkeys(launch.pointers, 0) | {"k": 1, "v": 2}
    (bound,) = kernels.launch.bind(kernels.launch.Step((launch,)), names, 3).launches

    def encode(boxed: boxes.Boxed, address: int) -> bytes:
        made.append(address)
        return address.to_bytes(boxes.MAP_BYTES, "little")

    words, pack, constants = bound.packing(3, [], encode)
    for address in (64, 128, 64, 128, 64):
        params = pack(*words([256, address, 512, *constants]))
        maps = params[: boxes.MAP_BYTES], params[boxes.MAP_BYTES : 2 * boxes.MAP_BYTES]
        assert [int.from_bytes(one, "little") for one in maps] == [address, 512]
        assert len(params) == launch.struct.itemsize
    assert sorted(made) == [64, 128, 512, 512]


def _zeros() -> dict[str, int]:
    fields = kernels.source.field_paths(kernels.source.struct_dtype("mla_wgmma.cu", "TiledParams"))
    return {path: 0 for path, field, _ in fields if field != np.uint64 and field.kind != "V"}


def test_no_map_for_what_a_driver_refuses() -> None:
    cache = np.zeros((3, 16, 2, 64), np.float16)
    table = np.zeros((1, 3), np.int32)

    def rows(k: np.ndarray) -> int:
        return boxes.boxed_cache(KVCache(k, cache, page_table=table), 16)[0]["box_rows"]

    assert rows(cache) == 16
    assert rows(np.broadcast_to(cache[:1], cache.shape)) == 0  # a stride of 0
    assert rows(cache[:, :, :1]) == 16
    assert rows(cache[:0]) == 0
    assert rows(cache[:, :12]) == 0
