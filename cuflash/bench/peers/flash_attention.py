"""FlashAttention-3, with its metadata given."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ..inputs import Inputs
from .base import TorchPeer


class FlashAttention3(TorchPeer):
    """FlashAttention-3; the wheel ``fa3-fwd`` has no paged caches and gets contiguous ones."""

    name = "FA3"
    modules = ("flash_attn_interface", "fa3_fwd_interface")
    install = "pip install fa3-fwd"
    latent = None

    def prepare(self, inputs: Inputs) -> None:
        """Make tensors and its metadata."""
        super().prepare(inputs)
        shape = inputs.shape
        has_pages = importlib.util.find_spec("flash_attn_interface") is not None and shape.page_size is not None
        of_wheel = importlib.util.find_spec("flash_attn_interface") is None
        self.library = importlib.import_module("fa3_fwd_interface" if of_wheel else "flash_attn_interface")
        self.copies = [self._arguments(inputs, i, has_pages) for i in range(len(inputs.copies))]
        headdim = shape.headdim - shape.dim_v if shape.latent else shape.headdim
        self.metadata = self.library.get_scheduler_metadata(
            len(shape.lengths), shape.queries, int(shape.lengths.max()), shape.heads_q, shape.heads_kv, headdim,
            self.copies[0]["cache_seqlens"], qkv_dtype=self.dtype, headdim_v=shape.dim_v,
            page_size=shape.page_size if has_pages else None, causal=shape.causal,
        )  # fmt: skip

    def _arguments(self, inputs: Inputs, i: int, has_pages: bool) -> dict[str, Any]:
        copy = inputs.copies[i]
        q, k, v = (copy["q"], copy["k_cache"], copy["v_cache"]) if has_pages else inputs.contiguous(i)
        tensors = {"q": self.tensor(q), "k_cache": self.tensor(k), "v_cache": self.tensor(v)}
        if inputs.shape.latent:  # its own spelling: the columns of the values are queries and keys of their own
            first = inputs.shape.dim_v
            tensors["qv"] = tensors["q"][..., :first]
            tensors["q"], tensors["k_cache"] = tensors["q"][..., first:], tensors["k_cache"][..., first:]
        tensors["cache_seqlens"] = self.tensor(copy["cache_seqlens"])
        if has_pages:
            tensors["page_table"] = self.tensor(copy["page_table"])
        return tensors

    def run(self, i: int) -> Any:
        """Call it."""
        copy = self.copies[i % len(self.copies)]
        return self.library.flash_attn_with_kvcache(
            **copy, causal=self.inputs.shape.causal, scheduler_metadata=self.metadata
        )
