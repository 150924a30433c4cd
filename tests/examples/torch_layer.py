"""An attention layer of torch that ``torch.compile`` takes as one operator.

cuflash reads the addresses of tensors, which a compiler does not have while it traces. As a custom operator the call
is opaque to it: ``register_fake`` says what comes out, ``mutates_args`` that the caches are written.

    python tests/examples/torch_layer.py
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from cuflash.compat.flash_attn_interface import flash_attn_with_kvcache, get_scheduler_metadata

HEADS, KV_HEADS, DIM, WIDTH, BATCH, CAPACITY = 8, 2, 64, 256, 3, 64


@torch.library.custom_op("cuflash_example::append_and_attend", mutates_args=("k_cache", "v_cache"))
def append_and_attend(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, metadata: Tensor
) -> Tensor:
    """Write new keys and values at ``lengths``, and attend."""
    out: Tensor = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True, scheduler_metadata=metadata
    )
    return out


@append_and_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, metadata: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:-1], v_cache.shape[-1]))


class Attention(nn.Module):
    """Projections around attention to a contiguous cache."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM, bias=False)
        self.outputs = nn.Linear(HEADS * DIM, WIDTH, bias=False)

    def forward(self, x: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, metadata: Tensor) -> Tensor:
        """Attend with tokens (batch, queries, WIDTH)."""
        if torch.is_grad_enabled():
            _refuse_gradients()
        q, k, v = self.inputs(x).unflatten(-1, (-1, DIM)).split([HEADS, KV_HEADS, KV_HEADS], 2)
        out = append_and_attend(q, k, v, k_cache, v_cache, lengths, metadata)
        return self.outputs(out.flatten(2))


def _refuse_gradients() -> NoReturn:
    raise RuntimeError("cuflash has no backward pass: call this layer under torch.no_grad() or torch.inference_mode()")


def main() -> None:
    """Decode a few tokens compiled and in plain torch, and compare."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layer = Attention().to(device)
    # On the host no compiler is needed for what there is to show: the layer is one graph.
    compiled: Any = torch.compile(layer, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    k_cache, v_cache = torch.zeros(2, BATCH, CAPACITY, KV_HEADS, DIM, device=device)
    lengths = torch.tensor([10, 0, 3], dtype=torch.int32, device=device)
    rows = torch.arange(BATCH, device=device)
    try:
        layer(torch.zeros(BATCH, 1, WIDTH, device=device), k_cache, v_cache, lengths, lengths)
    except RuntimeError as error:
        print(error)
    with torch.no_grad():
        keys, values = k_cache.clone(), v_cache.clone()
        for _ in range(4):
            metadata = get_scheduler_metadata(
                BATCH, 1, CAPACITY, HEADS, KV_HEADS, DIM, lengths, torch.float32, max_seqlen_k_new=1, causal=True
            )
            x = torch.randn(BATCH, 1, WIDTH, device=device)
            out = compiled(x, k_cache, v_cache, lengths, metadata)

            q, k, v = layer.inputs(x).unflatten(-1, (-1, DIM)).split([HEADS, KV_HEADS, KV_HEADS], 2)
            keys[rows, lengths], values[rows, lengths] = k[:, 0], v[:, 0]
            lengths += 1
            seen = (torch.arange(CAPACITY, device=device) < lengths[:, None])[:, None, None]
            wanted = nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=seen, enable_gqa=True
            )
            torch.testing.assert_close(out, layer.outputs(wanted.transpose(1, 2).flatten(2)), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(k_cache, keys)
    print(f"4 tokens by a compiled layer on {device}, as in plain torch")


if __name__ == "__main__":
    main()
