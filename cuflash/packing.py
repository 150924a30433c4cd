"""How outputs and LSE of some heads travel between ranks: packed in one block of bytes per pair of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .arguments import common
from .memory import NativeArray, is_on_device


@dataclass(frozen=True)
class Packing:
    """The layout of a block: for each head its outputs (*rows, headdim_v), their LSE, and nothing up to whole 16 bytes.

    Heads are outermost, so that the blocks of all ranks, one behind the other, are one array in strides: attention
    writes them where they lie.

    Attributes:
        rows: (batch, seqlen_q), or (total_q,) of ragged queries.
        heads: Query heads of a block.
        headdim_v: Elements of an output row.
        dtype: Elements of the outputs.
    """

    rows: tuple[int, ...]
    heads: int
    headdim_v: int
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return self.heads * self.head_bytes

    @property
    def head_bytes(self) -> int:
        """Bytes of a head."""
        return -(-(self._out_bytes + 4 * math.prod(self.rows)) // common.UNIT) * common.UNIT

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the outputs."""
        return (*self.rows, self.heads, self.headdim_v)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """Shape of their LSE."""
        return common.lse_shape(self.out_shape)

    @property
    def _out_bytes(self) -> int:
        return math.prod(self.rows) * self.headdim_v * self.dtype.itemsize

    def outs(self, blocks: NativeArray) -> NativeArray:
        """Return the outputs in ``blocks`` (n, nbytes): (n, *rows, heads, headdim_v)."""
        row = self.headdim_v * self.dtype.itemsize
        *batch, last = _steps(self.rows, row)
        strides = (self.nbytes, *batch, last, self.head_bytes, self.dtype.itemsize)
        return _view(blocks, 0, self.out_shape, self.dtype, strides)

    def lses(self, blocks: NativeArray) -> NativeArray:
        """Return the LSE in ``blocks`` (n, nbytes): (n, batch, heads, seqlen_q) or (n, heads, total_q) float32."""
        *batch, last = _steps(self.rows, 4)
        strides = (self.nbytes, *batch, self.head_bytes, last)
        return _view(blocks, self._out_bytes, self.lse_shape, np.dtype(np.float32), strides)

    def in_place(self, blocks: NativeArray) -> tuple[NativeArray, NativeArray]:
        """Return outputs and LSE of the heads of all ``blocks`` as they lie there."""
        whole = replace(self, heads=len(blocks) * self.heads)
        flat = blocks.reshape(1, -1)
        return whole.outs(flat)[0], whole.lses(flat)[0]

    def fill(self, blocks: NativeArray, out: NativeArray, lse: NativeArray) -> None:
        """Pack results of all heads: block i gets the i-th share of them."""
        for target, results in zip(self.in_place(blocks), (out, lse)):
            target[...] = results


def _steps(rows: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Return the strides of contiguous rows of ``size`` bytes."""
    return tuple(size * math.prod(rows[axis + 1 :]) for axis in range(len(rows)))


def _view(
    blocks: NativeArray, begin: int, shape: tuple[int, ...], dtype: np.dtype[Any], strides: tuple[int, ...]
) -> NativeArray:
    """Return a view of contiguous blocks, (n, *shape), which begins ``begin`` bytes into the first."""
    whole = (len(blocks), *shape)
    if is_on_device(blocks):
        return type(blocks)(whole, dtype, blocks.data + begin, strides)
    if not math.prod(whole):
        return np.empty(whole, dtype)
    return np.ndarray(whole, dtype, blocks.data, begin, strides)
