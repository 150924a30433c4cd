"""What a peer is: a name, what it needs, which shapes it runs, and a call."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..inputs import QUANTISED, Inputs, Shape
from ..timing import Sampler, TorchGraph

MOST_ERROR = 1e-2  # of an output's norm: bfloat16 rounds to 2^-8
_FLOATS = ("float8_e4m3fn", "float8_e5m2")


class NotForThis(Exception):
    """A peer does not run such a shape, or not on this machine."""


class Peer(ABC):
    """Another library's decode attention; an object is one measurement.

    Attributes:
        name: What tables and ``--peers`` call it.
        modules: Top-level modules of which one must be there.
        install: A command that installs it.
        dtypes: Element types of the queries that it takes.
        kv_dtypes: Quantised element types of the cache that it takes.
        paged: Whether it reads paged caches as they are; else it gets a contiguous copy.
        ragged: Whether sequences may differ in length.
        latent: Whether it reads values that are the first elements of the keys' own rows, and those only.
        causal_queries: Whether it runs several causal queries per sequence, the last of which sees all keys.
    """

    name: ClassVar[str]
    modules: ClassVar[tuple[str, ...]]
    install: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float16")
    kv_dtypes: ClassVar[tuple[str, ...]] = ()
    paged: ClassVar[bool] = False
    ragged: ClassVar[bool] = True
    latent: ClassVar[bool | None] = False
    causal_queries: ClassVar[bool] = True

    @classmethod
    def missing(cls) -> str:
        """Return what is not installed, or "" if all is there."""
        return "" if any(importlib.util.find_spec(module) for module in cls.modules) else "not installed"

    @classmethod
    def refusal(cls, shape: Shape) -> str:
        """Return why it does not run a shape, or ""."""
        if shape.dtype not in cls.dtypes:
            return f"no {shape.dtype}"
        if shape.kv_dtype in QUANTISED and shape.kv_dtype not in cls.kv_dtypes:
            return f"no {shape.kv_dtype} cache"
        if shape.key_scales:
            return "no scales per key"
        if cls.paged and shape.page_size is None:
            return "paged caches only"
        if not cls.ragged and not shape.uniform:
            return "equal lengths only"
        if cls.latent is not None and cls.latent != shape.latent:
            return "MLA only" if cls.latent else "no MLA"
        if not cls.causal_queries and shape.queries > 1 and shape.causal:
            return "no causal mask of several queries at the end"
        return ""

    @classmethod
    def most_error(cls, shape: Shape) -> float:
        """Return the error, of an output's norm, from which on its output is wrong and not merely rounded."""
        return MOST_ERROR

    @abstractmethod
    def prepare(self, inputs: Inputs) -> None:
        """Make what calls need, plans included."""

    @abstractmethod
    def run(self, i: int) -> Any:
        """Call it once, on copy ``i`` modulo their number."""

    @abstractmethod
    def answer(self) -> NDArray[Any]:
        """Return the output for the first copy on the host, (batch, queries, heads, headdim)."""

    @abstractmethod
    def sampler(self, calls: int) -> Sampler:
        """Return what times it."""


class TorchPeer(Peer):
    """A peer that takes torch's tensors. ``run`` returns its output, ``shaped`` brings that into our order."""

    torch: Any
    device: ClassVar[str] = "cuda"

    @classmethod
    def missing(cls) -> str:
        """Return what is not installed, torch included, or ""."""
        if super().missing():
            return "not installed"
        if importlib.util.find_spec("torch") is None:
            return "needs torch"
        return "" if importlib.import_module("torch").cuda.is_available() else "needs a torch with CUDA"

    def prepare(self, inputs: Inputs) -> None:
        """Import torch."""
        self.torch = importlib.import_module("torch")
        self.inputs = inputs
        self.dtype = getattr(self.torch, inputs.shape.dtype)

    def shaped(self, out: Any) -> Any:
        """Return an output as (batch, queries, heads, headdim)."""
        shape = self.inputs.shape
        return out.reshape(len(shape.lengths), shape.queries, shape.heads_q, shape.dim_v)

    def answer(self) -> NDArray[Any]:
        """Return the output for the first copy."""
        result: NDArray[np.float32] = self.shaped(self._quietly(0)).float().cpu().numpy()
        return result

    def sampler(self, calls: int) -> Sampler:
        """Capture calls in a CUDA graph of torch's."""
        return TorchGraph(self.torch, [lambda i=i: self._quietly(i) for i in range(calls)])  # type: ignore[misc]

    def tensor(self, array: Any) -> Any:
        """Return a tensor on an array's memory; quantised caches are stored as bytes."""
        tensor = self.torch.from_dlpack(array)
        kv_dtype = self.inputs.shape.kv_dtype
        return tensor.view(getattr(self.torch, kv_dtype)) if array.dtype == np.uint8 and kv_dtype in _FLOATS else tensor

    def on_gpu(self, array: NDArray[Any]) -> Any:
        """Return a copy on the GPU, as int32."""
        return self.torch.from_numpy(array.astype(np.int32)).to(self.device)

    def _quietly(self, i: int) -> Any:
        with warnings.catch_warnings(), self.torch.no_grad():
            warnings.simplefilter("ignore")
            return self.run(i)


def reason(error: BaseException) -> str:
    """Say in a few words why a peer has no figure."""
    if isinstance(error, NotForThis):
        return str(error)
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text}"[:200]
