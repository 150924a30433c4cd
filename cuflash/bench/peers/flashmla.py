"""FlashMLA's dense decode."""

from __future__ import annotations

import importlib
from typing import Any

from ..inputs import Inputs, Shape
from .base import TorchPeer


class FlashMla(TorchPeer):
    """FlashMLA on pages of 64."""

    name = "FlashMLA"
    modules = ("flash_mla",)
    install = "pip install git+https://github.com/deepseek-ai/FlashMLA"
    paged = True
    latent = True

    @classmethod
    def refusal(cls, shape: Shape) -> str:
        """Return why it does not run a shape, or ""."""
        if why := super().refusal(shape):
            return why
        if (shape.headdim, shape.dim_v, shape.heads_kv) != (576, 512, 1):
            return "head dims 576 and 512, one KV head"
        return "" if shape.page_size == 64 else "pages of 64"

    def prepare(self, inputs: Inputs) -> None:
        """Make tensors and its metadata."""
        super().prepare(inputs)
        shape = inputs.shape
        self.library = importlib.import_module("flash_mla")
        self.copies = [tuple(self.tensor(c[name]) for name in ("q", "k_cache")) for c in inputs.copies]
        self.table, self.lengths = self.on_gpu(inputs.host_table), self.on_gpu(shape.lengths)
        self.metadata = self.library.get_mla_metadata(self.lengths, shape.queries * shape.heads_q, 1)

    def run(self, i: int) -> Any:
        """Call it."""
        q, k = self.copies[i % len(self.copies)]
        out, _ = self.library.flash_mla_with_kvcache(
            q, k, self.table, self.lengths, self.inputs.shape.dim_v, *self.metadata, causal=self.inputs.shape.causal
        )
        return out
