"""FlashInfer: its wrappers, whose plans are made beforehand, and the XQA kernels, which need none."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import numpy as np

from ..inputs import Inputs, Shape
from .base import TorchPeer

_WORKSPACE = 256 << 20  # bytes


class _Paged(TorchPeer):
    modules = ("flashinfer",)
    # The last three are what its kernels are compiled with at first use, which takes 25 to 110 s each.
    install = "pip install flashinfer-python apache-tvm-ffi cuda-tile nvidia-cutlass-dsl"
    kv_dtypes: ClassVar[tuple[str, ...]] = ("float8_e4m3fn", "float8_e5m2")
    paged = True

    @classmethod
    def refusal(cls, shape: Shape) -> str:
        """Return why it does not run a shape, or ""."""
        return super().refusal(shape) or ("one head dim only" if shape.dim_v != shape.headdim else "")

    def prepare(self, inputs: Inputs) -> None:
        """Make tensors: queries are rows (batch * queries, heads, headdim)."""
        super().prepare(inputs)
        self.library = importlib.import_module("flashinfer")
        self.copies = [tuple(self.tensor(c[name]) for name in ("q", "k_cache", "v_cache")) for c in inputs.copies]
        self.copies = [(q.flatten(0, 1), k, v) for q, k, v in self.copies]
        self.workspace = self.torch.zeros(_WORKSPACE, dtype=self.torch.uint8, device=self.device)


class FlashInfer(_Paged):
    """The decode wrapper on tensor cores; with several queries the one for prefill."""

    name = "FlashInfer"

    def prepare(self, inputs: Inputs) -> None:
        """Plan."""
        super().prepare(inputs)
        shape = inputs.shape
        page_size = shape.page_size or 1
        pages = -(-shape.lengths // page_size)
        indices = np.concatenate([row[:count] for row, count in zip(inputs.host_table, pages, strict=True)])
        lists = np.concatenate([[0], pages.cumsum()]), indices, (shape.lengths - 1) % page_size + 1
        numbers = shape.heads_q, shape.heads_kv, shape.headdim, page_size
        options = {"q_data_type": self.dtype, "kv_data_type": self.copies[0][1].dtype}
        if shape.queries == 1:
            self.wrapper = self.library.BatchDecodeWithPagedKVCacheWrapper(self.workspace, "NHD", use_tensor_cores=True)
            self.wrapper.plan(*map(self.on_gpu, lists), *numbers, **options)
        else:
            self.wrapper = self.library.BatchPrefillWithPagedKVCacheWrapper(self.workspace, "NHD")
            starts = np.arange(len(pages) + 1) * shape.queries
            self.wrapper.plan(*map(self.on_gpu, (starts, *lists)), *numbers, causal=shape.causal, **options)

    def run(self, i: int) -> Any:
        """Run the plan."""
        q, k, v = self.copies[i % len(self.copies)]
        return self.wrapper.run(q, (k, v))


class FlashInferXqa(_Paged):
    """``trtllm_batch_decode_with_kv_cache`` with the XQA kernels."""

    name = "XQA"
    kv_dtypes = ("float8_e4m3fn",)

    @classmethod
    def refusal(cls, shape: Shape) -> str:
        """Return why it does not run a shape, or ""."""
        if shape.queries > 1:
            return "one query only"
        if shape.page_size is not None and shape.page_size not in (16, 32, 64, 128):
            return "pages of 16, 32, 64 or 128"
        return super().refusal(shape)

    def prepare(self, inputs: Inputs) -> None:
        """Make tensors of page table and lengths."""
        super().prepare(inputs)
        self.table, self.lengths = self.on_gpu(inputs.host_table), self.on_gpu(inputs.shape.lengths)
        self.function = importlib.import_module("flashinfer.decode").trtllm_batch_decode_with_kv_cache
        self.longest = int(inputs.shape.lengths.max())

    def run(self, i: int) -> Any:
        """Call it."""
        q, k, v = self.copies[i % len(self.copies)]
        return self.function(
            q, (k, v), self.workspace, self.table, self.lengths, self.longest,
            bmm1_scale=self.inputs.shape.headdim**-0.5, bmm2_scale=1.0, kv_layout="NHD", backend="xqa",
            out_dtype=self.dtype,
        )  # fmt: skip
