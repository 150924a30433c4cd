"""Other libraries' decode attention on the inputs of ``bench gpu``, where they are installed and run the shape."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .gpu_timing import JaxProgram, Sampler, TorchGraph

if TYPE_CHECKING:
    from .gpu import Inputs


class NotForThis(Exception):
    """A peer does not run such a shape."""


@dataclass(frozen=True)
class Peer:
    """A peer that is ready to run.

    Attributes:
        answer: Returns its output for the first copy of the inputs, (batch, heads, headdim) float32 on the host.
        sampler: Returns what times it.
    """

    answer: Callable[[], np.ndarray]
    sampler: Callable[[], Sampler]


def torch_cudnn(inputs: Inputs) -> Peer:
    """Torch's ``scaled_dot_product_attention`` with cuDNN, on a contiguous cache."""
    return _sdpa(inputs, "CUDNN_ATTENTION")


def torch_flash(inputs: Inputs) -> Peer:
    """Torch's ``scaled_dot_product_attention`` with its FlashAttention-2, on a contiguous cache."""
    return _sdpa(inputs, "FLASH_ATTENTION")


def _sdpa(inputs: Inputs, backend: str) -> Peer:
    torch, attention = _torch(), importlib.import_module("torch.nn.attention")
    copies = _contiguous(torch, inputs)
    function = torch.nn.functional.scaled_dot_product_attention

    def call(i: int) -> Any:
        with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
            return function(*copies[i % len(copies)], enable_gqa=True)

    return _torch_peer(torch, inputs, call, lambda out: out[:, :, 0])


def flex_attention(inputs: Inputs) -> Peer:
    """Torch's ``flex_attention``, compiled, on a contiguous cache."""
    torch, module = _torch(), importlib.import_module("torch.nn.attention.flex_attention")
    copies = _contiguous(torch, inputs)
    torch._dynamo.reset()
    function = torch.compile(module.flex_attention, dynamic=False)
    return _torch_peer(
        torch, inputs, lambda i: function(*copies[i % len(copies)], enable_gqa=True), lambda out: out[:, :, 0]
    )


def jax_cudnn(inputs: Inputs) -> Peer:
    """JAX's ``dot_product_attention`` with cuDNN, on a contiguous cache; wall time of one program of many calls."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes most of the GPU's memory
    jax = importlib.import_module("jax")
    copies = [tuple(jax.dlpack.from_dlpack(x) for x in copy) for copy in _uniform(inputs)]

    def function(*copy: Any) -> Any:
        return jax.nn.dot_product_attention(*copy, implementation="cudnn")

    def answer() -> np.ndarray:
        return np.asarray(jax.jit(function)(*copies[0])[:, 0].astype(np.float32))

    return Peer(
        answer, lambda: JaxProgram(jax, function, [copies[i % len(copies)] for i in range(max(20, len(copies)))])
    )


def flashinfer(inputs: Inputs) -> Peer:
    """FlashInfer's paged decode on tensor cores; its plan is made beforehand."""
    library, torch = importlib.import_module("flashinfer"), _torch()
    shape = inputs.shape
    if shape.page_size is None:
        raise NotForThis("paged caches only")
    pages = -(-shape.lengths // shape.page_size)
    starts = np.concatenate([[0], pages.cumsum()]).astype(np.int32)
    table = inputs.host_table()
    indices = np.concatenate([row[:count] for row, count in zip(table, pages, strict=True)])
    last = (shape.lengths - 1) % shape.page_size + 1

    def device(x: np.ndarray) -> Any:
        return torch.from_numpy(x.astype(np.int32)).cuda()

    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=True
    )
    wrapper.plan(
        device(starts), device(indices), device(last), shape.heads_q, shape.heads_kv, shape.headdim, shape.page_size,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    copies = [tuple(_tensor(torch, x) for x in (c["q"][:, 0], c["k_cache"], c["v_cache"])) for c in inputs.copies]

    def call(i: int) -> Any:
        q, k, v = copies[i % len(copies)]
        return wrapper.run(q, (k, v))

    return _torch_peer(torch, inputs, call, lambda out: out)


def flash_attention_3(inputs: Inputs) -> Peer:
    """FlashAttention-3 with its metadata given; the wheel ``fa3-fwd`` has no paged caches and gets contiguous ones."""
    is_paged = importlib.util.find_spec("flash_attn_interface") is not None
    library = importlib.import_module("flash_attn_interface" if is_paged else "fa3_fwd_interface")
    torch, shape = _torch(), inputs.shape
    names = ("q", "k_cache", "v_cache", "cache_seqlens", "page_table")
    copies = [{name: _tensor(torch, c[name]) for name in names if name in c} for c in inputs.copies]
    if not is_paged:
        for i, copy in enumerate(copies):
            copy.update(zip(names, (_tensor(torch, x) for x in inputs.contiguous(i)), strict=False))
            copy.pop("page_table", None)
    metadata = library.get_scheduler_metadata(
        len(shape.lengths), 1, int(shape.lengths.max()), shape.heads_q, shape.heads_kv, shape.headdim,
        copies[0]["cache_seqlens"], qkv_dtype=torch.bfloat16,
        page_size=shape.page_size if is_paged else None, causal=True,
    )  # fmt: skip

    def call(i: int) -> Any:
        return library.flash_attn_with_kvcache(**copies[i % len(copies)], causal=True, scheduler_metadata=metadata)

    return _torch_peer(torch, inputs, call, lambda out: out[:, 0])


PEERS: dict[str, Callable[[Inputs], Peer]] = {
    "cuDNN": torch_cudnn,
    "FA2": torch_flash,
    "flex": flex_attention,
    "JAX": jax_cudnn,
    "FlashInfer": flashinfer,
    "FA3": flash_attention_3,
}


def reason(error: BaseException) -> str:
    """Say in a few words why a peer has no figure."""
    if isinstance(error, ModuleNotFoundError):
        return "not present"
    if isinstance(error, NotForThis):
        return str(error)
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text}"[:200]


# ------------------------------------------------------------------------------------------------------------ helpers
def _torch() -> Any:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise NotForThis("a torch without CUDA")
    return torch


def _tensor(torch: Any, array: Any) -> Any:
    return torch.from_dlpack(array)


def _uniform(inputs: Inputs) -> list[tuple[Any, Any, Any]]:
    """Return the copies as (batch, length, heads, headdim) arrays of CuPy's."""
    if len(set(inputs.shape.lengths.tolist())) > 1:
        raise NotForThis("equal lengths only")
    return [inputs.contiguous(i) for i in range(len(inputs.copies))]


def _contiguous(torch: Any, inputs: Inputs) -> list[tuple[Any, ...]]:
    """Return the copies as (batch, heads, length, headdim) tensors; equal lengths only."""
    return [tuple(_tensor(torch, x).transpose(1, 2) for x in copy) for copy in _uniform(inputs)]


def _torch_peer(torch: Any, inputs: Inputs, call: Callable[[int], Any], select: Callable[[Any], Any]) -> Peer:
    def quietly(i: int) -> Any:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return call(i)

    def answer() -> np.ndarray:
        result: np.ndarray = select(quietly(0)).float().cpu().numpy()
        return result

    def sampler() -> Sampler:
        return TorchGraph(torch, [lambda i=i: quietly(i) for i in range(inputs.calls)])  # type: ignore[misc]

    return Peer(answer, sampler)
