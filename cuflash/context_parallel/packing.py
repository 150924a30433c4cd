"""How outputs and LSE of some heads travel: packed in one block of bytes per pair of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arguments import common
from ..arrays import NativeArray


@dataclass(frozen=True)
class Packing:
    """The layout of a block: outputs (*rows, heads, headdim_v), then their LSE, then nothing up to whole 16 bytes.

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
        lse_bytes = 4 * self.heads * math.prod(self.rows)
        return -(-(self._out_bytes + lse_bytes) // common.UNIT) * common.UNIT

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
        return math.prod(self.rows) * self.heads * self.headdim_v * self.dtype.itemsize

    def outs(self, blocks: NativeArray) -> NativeArray:
        """Return the outputs in ``blocks`` (n, nbytes): (n, *rows, heads, headdim_v)."""
        return _view(blocks, 0, self.out_shape, self.dtype)

    def lses(self, blocks: NativeArray) -> NativeArray:
        """Return the LSE in ``blocks`` (n, nbytes): (n, batch, heads, seqlen_q) or (n, heads, total_q) float32."""
        return _view(blocks, self._out_bytes, self.lse_shape, np.dtype(np.float32))

    def fill(self, blocks: NativeArray, out: NativeArray, lse: NativeArray) -> None:
        """Pack results of all heads: block i gets the i-th share of them."""
        outs, lses = self.outs(blocks), self.lses(blocks)
        for index in range(len(blocks)):
            share = slice(index * self.heads, (index + 1) * self.heads)
            outs[index] = out[..., share, :]
            lses[index] = lse[..., share, :]


def _view(blocks: NativeArray, begin: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NativeArray:
    size = math.prod(shape) * dtype.itemsize
    return blocks[:, begin : begin + size].view(dtype).reshape(len(blocks), *shape)
