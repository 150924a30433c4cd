"""What tensors on a GPU say of themselves: enough to tell a call from others and to launch it, without an import.

An import by DLPack makes another array on the same memory and lets one stream wait for the other, which takes some
microseconds for each tensor. A repeated call has no use for the array, and where both streams are one, nobody waits.
Nothing is kept of a tensor: what it says is read anew in every call.
"""

from __future__ import annotations

import sys
from typing import Any

NATIVE = object()
"""Stands in place of a reader for CuPy's arrays, which come in as they are."""


class _Readers(dict[type, Any]):
    """What reads arrays of a type; None for all that must be imported.

    A reader returns the address, and what else decides about a call, the device first; None for what cannot be read.
    """

    def __missing__(self, kind: type) -> Any:
        cupy, torch = sys.modules.get("cupy"), sys.modules.get("torch")
        reader: Any = None
        if cupy is not None and issubclass(kind, cupy.ndarray):
            reader = NATIVE
        elif torch is not None and kind is getattr(torch, "Tensor", None):  # a subclass may mean anything
            reader = _read_tensor
        self[kind] = reader
        return reader


readers = _Readers()


def _read_tensor(x: Any) -> tuple[Any, ...] | None:
    try:
        address = x.data_ptr()
        # DLPack refuses tensors that ask for a gradient: a call with one is no repetition of a call without.
        return (address, (x.device, x.shape, x.stride(), x.dtype, x.requires_grad)) if address else None
    except RuntimeError:  # it has no strided memory
        return None


def is_in_order(gpu: int) -> bool:
    """Whether torch's current stream is CuPy's, on the current GPU: then work on tensors is in order by itself."""
    cupy, torch = sys.modules["cupy"].cuda, sys.modules["torch"].cuda
    return bool(
        gpu == cupy.runtime.getDevice() and torch.current_stream(gpu).cuda_stream == cupy.get_current_stream().ptr
    )
