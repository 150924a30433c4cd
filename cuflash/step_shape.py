"""The shape of a step, and the index arrays that all steps of one shape use in turn."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arrays import check_way_back, empty, exporter, import_array
from .memo import Rest
from .memory import NativeArray


class StepShape(NamedTuple):
    """What a plan is made for, and a CUDA graph captured for.

    Attributes:
        batch_size: Sequences, also those that take no part.
        max_seqlen_q: New tokens of each sequence; the most of one if ragged.
        ragged: Whether sequences may bring different numbers of tokens.
        padded: Whether sequences may take no part.
    """

    batch_size: int
    max_seqlen_q: int
    ragged: bool
    padded: bool

    def view(self, given: dict[str, Any], rows: dict[str, tuple[int, int]]) -> dict[str, Any]:
        """Return arguments of a step's call as ``flash_attn_with_kvcache`` takes them.

        Args:
            given: The arguments.
            rows: (heads, dim) of each array that has tokens.
        """
        if self.ragged:
            return given
        if not hasattr(given["q"], "reshape"):
            _check_results(given)
        names = ("q", "out") if self.padded else ("q", "out", "k", "v")
        return given | {name: self._split(name, given[name], *rows[name]) for name in names if given[name] is not None}

    def _split(self, name: str, x: Any, heads: int, dim: int) -> Any:
        """View (tokens, heads, dim) as (batch_size, max_seqlen_q, heads, dim)."""
        batch, seqlen = self.batch_size, self.max_seqlen_q
        if not hasattr(x, "reshape"):  # DLPack asks for no views
            x = import_array(name, x)
        if tuple(x.shape) != (batch * seqlen, heads, dim):
            raise ValueError(f"{name} must have shape ({batch} * {seqlen}, {heads}, {dim}), got {tuple(x.shape)}")
        return x.reshape(batch, seqlen, heads, dim)

    def results(self, given: dict[str, Any], attended: Any, lse: Any) -> tuple[Any, Any]:
        """Return what a call on a :meth:`view` of these arguments gave, as the step's caller gets it."""
        q, out = given["q"], given["out"]
        if self.ragged or hasattr(q, "reshape"):
            if out is None and not self.ragged:
                out = attended.reshape(-1, *attended.shape[2:])
            return (attended if out is None else out), lse
        back = exporter(q)  # q was imported to be split, so the call did not know its kind
        if out is None:
            native = import_array("out", attended)
            out = back(native.reshape(-1, *native.shape[2:]))
        if lse is not None and given["softmax_lse"] is None:
            lse = back(import_array("softmax_lse", lse))
        return out, lse


class StepArrays:
    """Index arrays at fixed addresses, and a plan that is refilled in place.

    Args:
        shape: The steps' shape.
        xp: Where the arrays live: ``numpy`` or ``cupy``.

    Attributes:
        shape: The steps' shape.
        cache_seqlens: (batch,) int32 tokens in the cache before the step; 0 for sequences that take no part.
        cache_batch_idx: (batch,) int32 rows of the page table.
        cu_seqlens_q: (batch + 1,) int32 first new token of each sequence if ragged, else None.
        cu_seqlens_k_new: The same if ragged or padded: who takes no part appends nothing.
        meta: The plan, None before the first.
        rests: What the calls of a layer have in common, by the layer.
    """

    def __init__(self, shape: StepShape, xp: Any) -> None:
        self.shape, self._xp = shape, xp
        self.meta: Any = None
        self.rests: dict[int, Rest] = {}
        self._memory = xp.zeros(3 * shape.batch_size + 1, np.int32)  # one, so that one copy fills all
        self.cache_seqlens, self.cache_batch_idx, starts = _cut(self._memory, shape.batch_size)
        self.cu_seqlens_q = starts if shape.ragged else None
        self.cu_seqlens_k_new = starts if shape.ragged or shape.padded else None

    def fill(self, seqlens: NDArray[Any], rows: NDArray[Any], tokens: NDArray[Any]) -> None:
        """Fill the arrays for sequences that take part, of which there may be fewer than ``batch_size``."""
        number = len(seqlens)
        memory = np.zeros(self._memory.shape, np.int32)
        lengths, indices, starts = _cut(memory, self.shape.batch_size)
        lengths[:number], indices[:number] = seqlens, rows
        starts[1 : number + 1] = np.cumsum(tokens)
        starts[number + 1 :] = tokens.sum()
        self._memory[...] = self._xp.asarray(memory)  # ordered on the current stream, behind the steps before


def _check_results(given: dict[str, Any]) -> None:
    """Check what :meth:`StepShape.results` will do: of imported queries the call itself knows no kind to return."""
    q = import_array("q", given["q"])
    made = {"out": given["out"] is None, "softmax_lse": given["return_softmax_lse"] and given["softmax_lse"] is None}
    for name, dtype in (("out", q.dtype), ("softmax_lse", np.dtype(np.float32))):
        if made[name]:
            check_way_back("q", given["q"], empty((1,), dtype, q))


def _cut(memory: NativeArray, batch: int) -> tuple[NativeArray, NativeArray, NativeArray]:
    return memory[:batch], memory[batch : 2 * batch], memory[2 * batch :]
