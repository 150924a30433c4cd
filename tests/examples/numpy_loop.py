"""A decode loop on NumPy arrays: no GPU, no framework, and the same calls as on a GPU.

Three sequences grow by a token a step in a paged cache. Each step is planned once; its layers append and attend in one
call each. Replace ``numpy`` by ``cupy`` and it runs on a GPU.

    python tests/examples/numpy_loop.py
"""

from __future__ import annotations

import numpy as np

import cuflash

LAYERS, HEADS, KV_HEADS, DIM, PAGE, STEPS = 2, 8, 2, 64, 16, 20
DTYPE = "float32"


def main() -> None:
    """Decode, and compare the last step with attention written out."""
    rng = np.random.default_rng(0)
    lengths = np.array([300, 7, 120], np.int32)  # keys in the cache
    batch, longest = len(lengths), int(lengths.max()) + STEPS
    per_sequence = -(-longest // PAGE)
    pages = rng.permutation(batch * per_sequence).astype(np.int32).reshape(batch, per_sequence)  # anywhere
    k_cache, v_cache = rng.standard_normal((2, LAYERS, pages.size, PAGE, KV_HEADS, DIM), np.float32)

    problem = {
        "batch_size": batch, "max_seqlen_q": 1, "max_seqlen_k": longest, "num_heads_q": HEADS, "num_heads_kv": KV_HEADS,
        "headdim": DIM, "qkv_dtype": DTYPE, "page_size": PAGE, "max_seqlen_k_new": 1, "causal": True,
    }  # fmt: skip
    meta = cuflash.get_scheduler_metadata(**problem, cache_seqlens=lengths)
    for _ in range(STEPS):
        cuflash.get_scheduler_metadata(**problem, cache_seqlens=lengths, out=meta)
        for layer in range(LAYERS):
            q = rng.standard_normal((batch, 1, HEADS, DIM), np.float32)
            k, v = rng.standard_normal((2, batch, 1, KV_HEADS, DIM), np.float32)
            out = cuflash.flash_attn_with_kvcache(
                q, k_cache[layer], v_cache[layer], k, v, cache_seqlens=lengths, page_table=pages, causal=True,
                scheduler_metadata=meta,
            )  # fmt: skip
        lengths += 1

    for row in range(batch):
        keys, values = (
            cache[-1][pages[row]].reshape(-1, KV_HEADS, DIM)[: lengths[row]] for cache in (k_cache, v_cache)
        )
        for head in range(HEADS):
            scores = keys[:, head // (HEADS // KV_HEADS)] @ q[row, 0, head] * DIM**-0.5
            weights = np.exp(scores - scores.max())
            expected = weights @ values[:, head // (HEADS // KV_HEADS)] / weights.sum()
            np.testing.assert_allclose(out[row, 0, head], expected, atol=1e-4)
    print(f"{STEPS} steps of {LAYERS} layers; the last one agrees with attention written out")


if __name__ == "__main__":
    main()
