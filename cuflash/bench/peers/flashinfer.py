"""FlashInfer: its wrappers, whose plans are made beforehand, and the XQA kernels, which need none."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import numpy as np

from ..inputs import QUANTISED, Inputs, Shape
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
        one_dim = shape.latent or shape.dim_v == shape.headdim
        return super().refusal(shape) or ("" if one_dim else "one head dim only")

    def prepare(self, inputs: Inputs) -> None:
        """Make tensors: queries are rows (batch * queries, heads, headdim)."""
        super().prepare(inputs)
        self.library = importlib.import_module("flashinfer")
        self.copies = [tuple(self.tensor(c[name]) for name in ("q", "k_cache", "v_cache")) for c in inputs.copies]
        self.copies = [(q.flatten(0, 1), k, v) for q, k, v in self.copies]
        self.workspace = self.torch.zeros(_WORKSPACE, dtype=self.torch.uint8, device=self.device)


class FlashInfer(_Paged):
    """The wrapper for decode on tensor cores, that for prefill if there are several queries, or that for MLA."""

    name = "FlashInfer"
    latent: ClassVar[bool | None] = None
    backend: ClassVar[str] = "auto"

    @classmethod
    def refusal(cls, shape: Shape) -> str:
        """Return why it does not run a shape, or ""."""
        if shape.latent and shape.kv_dtype in QUANTISED:
            return f"no {shape.kv_dtype} cache with MLA"
        if shape.latent and shape.heads_kv != 1:
            return "MLA with one KV head only"
        return super().refusal(shape)

    def prepare(self, inputs: Inputs) -> None:
        """Plan."""
        super().prepare(inputs)
        shape = inputs.shape
        page_size = shape.page_size or 1
        pages = -(-shape.lengths // page_size)
        starts_q = self.on_gpu(np.arange(len(pages) + 1) * shape.queries)
        starts = self.on_gpu(np.concatenate([[0], pages.cumsum()]))
        used = np.arange(inputs.host_table.shape[1]) < pages[:, None]
        indices = self.on_gpu(inputs.host_table[used])
        types = {"q_data_type": self.dtype, "kv_data_type": self.copies[0][1].dtype}
        causal = shape.causal and shape.queries > 1  # one query sees all keys, with a mask or without
        if shape.latent:
            mla = importlib.import_module("flashinfer.mla")
            self.wrapper = mla.BatchMLAPagedAttentionWrapper(self.workspace, backend=self.backend)
            self.wrapper.plan(
                metadata=mla.MLAPlanMetadata.csr(starts_q, starts, indices, self.on_gpu(shape.lengths)),
                num_heads=shape.heads_q, head_dim_ckv=shape.dim_v, head_dim_kpe=shape.headdim - shape.dim_v,
                page_size=page_size, causal=causal, sm_scale=shape.headdim**-0.5, **types,
            )  # fmt: skip
            return
        lists = starts, indices, self.on_gpu((shape.lengths - 1) % page_size + 1)
        numbers = shape.heads_q, shape.heads_kv, shape.headdim, page_size
        if shape.queries == 1:
            self.wrapper = self.library.BatchDecodeWithPagedKVCacheWrapper(
                self.workspace, "NHD", use_tensor_cores=True, backend=self.backend
            )
            self.wrapper.plan(*lists, *numbers, **types)
        else:
            self.wrapper = self.library.BatchPrefillWithPagedKVCacheWrapper(self.workspace, "NHD", backend=self.backend)
            self.wrapper.plan(starts_q, *lists, *numbers, causal=causal, **types)

    def run(self, i: int) -> Any:
        """Run the plan."""
        q, k, v = self.copies[i % len(self.copies)]
        if self.inputs.shape.latent:
            return self.wrapper.run(query=q, kv_cache=k[:, :, 0])
        return self.wrapper.run(q, (k, v))


class FlashInferFa2(FlashInfer):
    """The wrapper for prefill with the kernels for older GPUs.

    Those for Hopper, which the library takes there by itself, neither put the query heads of a KV head into the rows of
    one tile nor split the keys: with few queries the older ones are faster.
    """

    name = "FlashInfer-fa2"
    latent = False
    backend = "fa2"

    @classmethod
    def refusal(cls, shape: Shape) -> str:
        """Return why it does not run a shape, or ""."""
        return super().refusal(shape) or ("several queries only" if shape.queries == 1 else "")


class FlashInferXqa(_Paged):
    """``trtllm_batch_decode_with_kv_cache`` with the XQA kernels."""

    name = "XQA"
    kv_dtypes = ("float8_e4m3fn",)

    @classmethod
    def most_error(cls, shape: Shape) -> float:
        """Return more for caches of 8 bits: on Hopper it rounds queries and probabilities to e4m3, 3 % of the norm."""
        return 5e-2 if shape.kv_dtype in QUANTISED else super().most_error(shape)

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
