"""Torch's own attention: cuDNN, FlashAttention-2 and flex_attention, on contiguous caches of equal lengths."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

from ..inputs import Inputs
from .base import TorchPeer


class _Contiguous(TorchPeer):
    modules = ("torch",)
    install = "pip install torch"
    ragged = False
    causal_queries = False  # torch aligns a causal mask with the first key

    def prepare(self, inputs: Inputs) -> None:
        """Make views (batch, heads, length, headdim)."""
        super().prepare(inputs)
        copies = [inputs.contiguous(i) for i in range(len(inputs.copies))]
        self.copies = [tuple(self.tensor(x).transpose(1, 2) for x in copy) for copy in copies]

    def shaped(self, out: Any) -> Any:
        """Return an output as (batch, queries, heads, headdim)."""
        return out.transpose(1, 2)


class _Sdpa(_Contiguous):
    backend: ClassVar[str]

    def prepare(self, inputs: Inputs) -> None:
        """Find the backend."""
        super().prepare(inputs)
        self.attention = importlib.import_module("torch.nn.attention")
        self.chosen = getattr(self.attention.SDPBackend, self.backend)

    def run(self, i: int) -> Any:
        """Call ``scaled_dot_product_attention``."""
        with self.attention.sdpa_kernel(self.chosen):
            return self.torch.nn.functional.scaled_dot_product_attention(
                *self.copies[i % len(self.copies)], enable_gqa=True
            )


class TorchCudnn(_Sdpa):
    """Torch's ``scaled_dot_product_attention`` with cuDNN."""

    name, backend = "cuDNN", "CUDNN_ATTENTION"


class TorchFlash(_Sdpa):
    """Torch's ``scaled_dot_product_attention`` with its FlashAttention-2."""

    name, backend = "FA2", "FLASH_ATTENTION"


class TorchFlex(_Contiguous):
    """Torch's ``flex_attention``, compiled."""

    name = "flex"

    def prepare(self, inputs: Inputs) -> None:
        """Compile."""
        super().prepare(inputs)
        module = importlib.import_module("torch.nn.attention.flex_attention")
        self.torch._dynamo.reset()
        self.function = self.torch.compile(module.flex_attention, dynamic=False)

    def run(self, i: int) -> Any:
        """Call it."""
        return self.function(*self.copies[i % len(self.copies)], enable_gqa=True)
