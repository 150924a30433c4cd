"""What tensors on a GPU say of themselves: enough to tell a call from others and to launch it, without an import.

An import by DLPack makes another array on the same memory and lets one stream wait for the other, which takes some
microseconds for each tensor. A repeated call has no use for the array, and where both streams are one, nobody waits.
Nothing is kept of a tensor: what it says is read anew in every call. Results that such a call makes are tensors from
the start: to export CuPy's memory takes as long as the call.
"""

from __future__ import annotations

import sys
from typing import Any

from .arrays import empty_on
from .dtypes import numpy_dtype

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
        # Tensors that ask for a gradient and negated views are refused: calls with them repeat none without.
        layout = x.device, x.shape, x.stride(), x.dtype, x.requires_grad, x.is_neg()
        return (address, layout) if address else None
    except RuntimeError:  # it has no strided memory
        return None


def is_in_order(gpu: int) -> bool:
    """Whether torch's current stream is CuPy's, on the current GPU: then work on tensors is in order by itself."""
    cuda = sys.modules["cupy"].cuda
    return bool(gpu == cuda.runtime.getDevice() and torch_stream(gpu) == cuda.get_current_stream(gpu).ptr)


def torch_stream(gpu: int) -> int:
    """Return the handle of torch's current stream on a GPU.

    torch.cuda.current_stream makes an object first, which takes 4 us and not 0.2
    (https://github.com/pytorch/pytorch/pull/78165); code that Triton and Inductor generate asks like this, too.
    """
    stream: int = sys.modules["torch"]._C._cuda_getCurrentRawStream(gpu)
    return stream


def new_tensor(shape: tuple[int, ...], dtype: str, like: Any) -> Any:
    """Return a new tensor where another one lies, of torch's memory: a graph that torch captures keeps what it uses."""
    torch = sys.modules["torch"]
    return torch.empty(*shape, dtype=getattr(torch, dtype), device=like.device)


def new_array(shape: tuple[int, ...], dtype: str, like: Any) -> tuple[Any, int]:
    """Return a new array where another one lies, and its address: a tensor beside a tensor, else one of CuPy's."""
    if readers[type(like)] is NATIVE:
        array = empty_on(like.data.device_id, shape, numpy_dtype(dtype))
        return array, array.data.ptr
    tensor = new_tensor(shape, dtype, like)
    return tensor, tensor.data_ptr()
