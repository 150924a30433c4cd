"""A fixed batch whose sequences come and go, beside a host copy of every byte of its caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from problems import UNIT_ROUNDOFF, Backend, expected

import cuflash

BATCH, LAYERS, PAGE, HEADS, KV_HEADS, DIM, TABLE = 8, 3, 4, 8, 2, 64, 6

INACTIVE = ("negative pages", "negative pages of a list", "ragged append")
"""How rows that nobody has write nowhere."""


class PaddedBatch:
    """A decode step of several layers, of which the arrays stay where they are: a CUDA graph may hold them.

    All pages begin as NaN of different bits: a key read from a page that nobody owns, or has not written, shows in an
    output, and a byte that moved shows in the caches.

    Args:
        backend: Where the arrays live.
        inactive: Of ``INACTIVE``. With a ragged append the page numbers of inactive rows are 0, which is somebody's.
        dtype: Element type, float16 or float32.
    """

    def __init__(self, backend: Backend, inactive: str, dtype: str = "float16") -> None:
        self.backend, self.dtype = backend, dtype
        self.is_ragged = inactive == "ragged append"
        self.rng = np.random.default_rng(0)
        pages = BATCH * TABLE + 5  # of which five are never anybody's
        self.free = [int(page) for page in self.rng.permutation(pages)[: BATCH * TABLE]]
        self.owned: list[list[int]] = [[] for _ in range(BATCH)]
        self.active, self.lengths = np.zeros(BATCH, bool), np.zeros(BATCH, np.int32)

        nan = {"float16": 0x7E00, "float32": 0x7FC00000}[dtype]
        shape = (2, LAYERS, pages, PAGE, KV_HEADS, DIM)  # keys, values
        self.bits = f"u{np.dtype(dtype).itemsize}"
        self.mirror = self.rng.integers(0, 512, shape).astype(self.bits) | np.array(nan, self.bits)
        self.mirror = self.mirror.view(dtype)
        self.caches = backend.to_native(self.mirror.copy())

        new = (LAYERS, BATCH, KV_HEADS, DIM) if self.is_ragged else (LAYERS, BATCH, 1, KV_HEADS, DIM)
        shapes = {"q": (LAYERS, BATCH, 1, HEADS, DIM), "k": new, "v": new, "out": (LAYERS, BATCH, 1, HEADS, DIM)}
        self.inputs = {name: np.zeros(shape, dtype) for name, shape in shapes.items() if name != "out"}
        self.inputs |= {"cache_seqlens": self.lengths.copy(), "page_table": self._table()}
        if self.is_ragged:
            self.inputs["cu_seqlens_k_new"] = np.zeros(BATCH + 1, np.int32)
        self.arrays = {name: backend.to_native(array.copy()) for name, array in self.inputs.items()}
        self.out = backend.to_native(np.zeros(shapes["out"], dtype))
        self.indptr = np.arange(BATCH + 1, dtype=np.int32) * TABLE if inactive == "negative pages of a list" else None
        self.native_indptr = None if self.indptr is None else backend.to_native(self.indptr)
        self.plan = self._plan(backend.to_native(np.full(BATCH, TABLE * PAGE - 1, np.int32)), None)

    def _plan(self, lengths: Any, out: cuflash.SchedulerMetadata | None) -> cuflash.SchedulerMetadata:
        return cuflash.get_scheduler_metadata(
            BATCH, 1, TABLE * PAGE, HEADS, KV_HEADS, DIM, lengths, qkv_dtype=self.dtype, page_size=PAGE,
            max_seqlen_k_new=1, cu_seqlens_k_new=self.arrays.get("cu_seqlens_k_new"), out=out,
        )  # fmt: skip

    def step(self) -> None:
        """Refill the plan and run all layers: what a graph captures."""
        self._plan(self.arrays["cache_seqlens"], self.plan)
        for layer in range(LAYERS):
            cuflash.flash_attn_with_kvcache(
                **self._call(self.arrays, self.caches, layer, self.native_indptr), scheduler_metadata=self.plan,
                out=self.out[layer],
            )  # fmt: skip

    def run(self, step: Callable[[], Any], steps: int) -> None:
        """Let sequences start, grow, end and be replaced; check outputs and all bytes of the caches after each step."""
        started = ended = 0
        for number in range(steps):
            before = self.active.copy()
            self._come_and_go()
            started, ended = started + (self.active > before).sum(), ended + (before > self.active).sum()
            self._feed()
            step()
            self.check(f"step {number}")
            self.lengths[self.active] += 1
        assert started > BATCH / 2 and ended > 1

    def check(self, when: str) -> None:
        """Compare the outputs of active rows, and the caches bit by bit, with what the step must have done."""
        out, caches = self.backend.to_numpy(self.out), self.backend.to_numpy(self.caches)
        for layer in range(LAYERS):
            answer = expected(self._call(self.inputs, self.mirror, layer, self.indptr))
            error = np.abs(out[layer].astype(np.float64) - answer.out)[self.active]
            bound = (2 * UNIT_ROUNDOFF[self.dtype] + 1e-5) * answer.magnitude[self.active]
            assert (error <= bound).all(), f"{when}: output of layer {layer} is off by {error.max():.2g}"
        for row, b in enumerate(np.flatnonzero(self.active)):
            page, slot = self.owned[b][self.lengths[b] // PAGE], self.lengths[b] % PAGE
            for cache, name in zip(self.mirror, ("k", "v"), strict=True):
                cache[:, page, slot] = self.inputs[name][:, row] if self.is_ragged else self.inputs[name][:, b, 0]
        different = (caches.view(self.bits) != self.mirror.view(self.bits)).any((-1, -2))
        places = [tuple(map(int, place)) for place in np.argwhere(different)]
        assert not places, f"{when}: (k or v, layer, page, slot) differ: {places[:8]}"

    def _call(self, arrays: dict[str, Any], caches: Any, layer: int, indptr: Any) -> dict[str, Any]:
        """Return the arguments of a layer's call, on the host or where the arrays live."""
        call = {name: array[layer] if name in ("q", "k", "v") else array for name, array in arrays.items()}
        if indptr is not None:
            call["page_table"] = (indptr, call["page_table"].reshape(-1))
        return call | {"k_cache": caches[0, layer], "v_cache": caches[1, layer]}

    def _come_and_go(self) -> None:
        for b in range(BATCH):
            if self.active[b] and (self.lengths[b] == TABLE * PAGE or self.rng.random() < 0.1):
                self.free += self.owned[b]
                self.active[b], self.lengths[b], self.owned[b] = False, 0, []
            elif not self.active[b] and self.rng.random() < 0.5:
                self._start(b)
            if self.active[b] and self.lengths[b] % PAGE == 0:
                self.owned[b].append(self.free.pop())

    def _start(self, b: int) -> None:
        """Give a row to a sequence, whose prompt is in its pages."""
        length = int(self.rng.integers(0, 2 * PAGE))
        self.active[b], self.lengths[b] = True, length
        self.owned[b] = [self.free.pop() for _ in range(-(-length // PAGE))]
        for n in range(length):
            page, slot = self.owned[b][n // PAGE], n % PAGE
            self.mirror[:, :, page, slot] = self._normal((2, LAYERS, KV_HEADS, DIM))
            self.caches[:, :, page, slot] = self.backend.to_native(self.mirror[:, :, page, slot].copy())

    def _feed(self) -> None:
        """Write the inputs of a step where the calls read them; those of inactive rows are NaN."""
        active = np.flatnonzero(self.active)
        new = np.arange(len(active)) if self.is_ragged else active
        for name, rows in (("q", active), ("k", new), ("v", new)):
            array = self.inputs[name]
            array[...] = np.nan
            array[:, rows] = self._normal(array[:, rows].shape)
        self.inputs["cache_seqlens"][...], self.inputs["page_table"][...] = self.lengths, self._table()
        if self.is_ragged:
            self.inputs["cu_seqlens_k_new"][1:] = self.active.cumsum()
        for name, array in self.inputs.items():
            self.arrays[name][...] = self.backend.to_native(array.copy())

    def _table(self) -> np.ndarray:
        table = np.full((BATCH, TABLE), 0 if self.is_ragged else -1, np.int32)
        for row, pages in zip(table, self.owned, strict=True):
            row[: len(pages)] = pages
        return table

    def _normal(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.rng.standard_normal(shape, np.float32).astype(self.dtype)
