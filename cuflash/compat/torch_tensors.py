"""What torch's tensors need beside DLPack: torch's stream, and no gradients.

torch is not imported here: whoever hands over a tensor has done that.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from ..layouts import torch_stream


def is_tensor(x: Any) -> bool:
    """Whether an argument is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


@contextmanager
def stream_of(x: Any) -> Iterator[None]:
    """Make torch's current stream CuPy's for the length of a call, if ``x`` is a torch tensor on a GPU."""
    if not is_tensor(x) or not x.is_cuda:
        yield
        return
    import cupy

    number = x.get_device()
    with cupy.cuda.Device(number):
        with _stream(torch_stream(number), number):
            yield


@lru_cache(maxsize=None)
def _stream(pointer: int, device: int) -> Any:
    """Return CuPy's view of a stream on the current device. It is kept: CuPy destroys a stream with its last view."""
    import cupy

    return cupy.cuda.Stream.from_external(_Foreign(pointer)) if pointer else cupy.cuda.Stream.null


class _Foreign:
    """A stream as CuPy takes one over."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


def is_captured(x: Any) -> bool:
    """Whether a torch tensor is used while torch's current stream is captured."""
    return bool(is_tensor(x) and x.is_cuda and sys.modules["torch"].cuda.is_current_stream_capturing())


def without_gradient(name: str, x: Any) -> Any:
    """Return an argument; a tensor that asks for a gradient without that, if gradients are off.

    Raises:
        RuntimeError: If gradients are on: there would be none.
    """
    if not is_tensor(x) or not x.requires_grad:
        return x
    if sys.modules["torch"].is_grad_enabled():
        raise RuntimeError(
            f"{name} requires a gradient, and cuflash has no backward pass: call it under torch.no_grad() or "
            f"torch.inference_mode(), or hand over {name}.detach()"
        )
    return x.detach()


def filled(size: int, number: int, like: Any) -> Any:
    """Return an int32 tensor of equal numbers where another one lives."""
    torch = sys.modules["torch"]
    return torch.full((size,), number, dtype=torch.int32, device=like.device)
