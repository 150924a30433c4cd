"""Sparse decoding: each query attends to the keys that an indexer has chosen for it, as in DeepSeek V3.2 and GLM.

There is no call of its own for it. A list of chosen tokens is a page table of pages of one key: a paged cache seen as
pages of one token is the same memory, and each query is a sequence of as many keys as were chosen for it. Which keys
those are is the indexer's business, so the call is not causal. Here on a latent cache; one with KV heads works alike.

    python tests/examples/sparse_top_k.py
"""

from __future__ import annotations

import numpy as np

import cuflash

HEADS, LATENT, ROTARY, PAGE_SIZE, TOP = 16, 512, 64, 64, 128
SCALE = (128 + 64) ** -0.5


def chosen_slots(scores: np.ndarray, lengths: np.ndarray, page_table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the TOP highest-scoring keys of each row lie in the cache, and how many there are.

    Args:
        scores: (rows, keys) of the indexer.
        lengths: (rows,) keys that there are.
        page_table: (rows, pages) of the cache.
    """
    scores = np.where(np.arange(scores.shape[1]) < lengths[:, None], scores, -np.inf)
    keys = np.argsort(-scores)[:, :TOP]
    slots = np.take_along_axis(page_table, keys // PAGE_SIZE, 1) * PAGE_SIZE + keys % PAGE_SIZE
    return slots.astype(np.int32), np.minimum(lengths, TOP).astype(np.int32)


def main() -> None:
    """Decode one step of several layers and compare with attention written out."""
    rng = np.random.default_rng(0)
    layers, lengths = 2, np.array([1000, 50, 700], np.int32)  # the second has fewer keys than may be chosen
    batch, pages_each = len(lengths), -(-int(lengths.max()) // PAGE_SIZE)
    pages = rng.permutation(batch * pages_each).astype(np.int32).reshape(batch, pages_each)
    cache = rng.standard_normal((layers, pages.size, PAGE_SIZE, 1, LATENT + ROTARY), np.float32)

    # The plan knows how many keys are read, not which: it is made once a step, as ever.
    counts = np.minimum(lengths, TOP).astype(np.int32)
    meta = cuflash.get_scheduler_metadata(
        batch, 1, TOP, HEADS, 1, LATENT + ROTARY, counts, "float32", headdim_v=LATENT, page_size=1
    )
    print(f"planned for {counts.tolist()} of {lengths.tolist()} keys")
    for layer in range(layers):
        q = rng.standard_normal((batch, 1, HEADS, LATENT + ROTARY), np.float32)
        slots, counts = chosen_slots(rng.standard_normal((batch, pages_each * PAGE_SIZE)), lengths, pages)
        rows = cache[layer].reshape(-1, 1, 1, LATENT + ROTARY)  # the same memory, in pages of one token
        out = cuflash.flash_attn_with_kvcache(
            q, rows, rows[..., :LATENT], cache_seqlens=counts, page_table=slots, softmax_scale=SCALE,
            scheduler_metadata=meta,
        )  # fmt: skip
        for i in range(batch):
            keys = cache[layer].reshape(-1, LATENT + ROTARY)[slots[i, : counts[i]]].astype(np.float64)
            assert len(np.unique(slots[i, : counts[i]])) == counts[i]
            scores = q[i, 0] @ keys.T * SCALE
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            expected = weights @ keys[:, :LATENT] / weights.sum(axis=-1, keepdims=True)
            np.testing.assert_allclose(out[i, 0], expected, atol=1e-4)
        # Where all keys are chosen, attention is dense.
        dense = cuflash.flash_attn_with_kvcache(
            q, cache[layer], cache[layer][..., :LATENT], cache_seqlens=lengths, page_table=pages, softmax_scale=SCALE
        )
        few = lengths <= TOP
        np.testing.assert_allclose(out[few], dense[few], atol=1e-4)
    print(f"{layers} layers agree with attention written out, and where all keys are chosen with the dense call")


if __name__ == "__main__":
    main()
