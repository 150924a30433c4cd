"""Layers of latent attention (MLA, as in DeepSeek V3) on a cache of one row per token, with random weights.

The keys and values of all heads are products of one latent row of 512 numbers per token, beside a rotary key of 64 that
all heads share. The products need not be made: those of the keys are absorbed into the queries, those of the values
follow attention. What is left is attention with one KV head, whose values are the first 512 columns of its keys. The
result is compared with attention on keys and values written out.

    python tests/examples/mla_layers.py
"""

from __future__ import annotations

import numpy as np

import cuflash

LAYERS, WIDTH, HEADS = 3, 256, 16
LATENT, ROTARY, NOPE, VALUE = 512, 64, 128, 128  # columns: latent row, rotary key, a head's other key, a head's value
SCALE = (NOPE + ROTARY) ** -0.5  # of the heads as they are trained, not of the row that is cached
POSITIONS = 256


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn pairs of neighbouring columns of (tokens, heads, 64) by (tokens, 32)."""
    pairs = x[..., ::2] + 1j * x[..., 1::2]
    turned = pairs * (cos + 1j * sin)[:, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


class Layer:
    """Weights of a layer: down to the latent row, and up from it to each head's key and value."""

    def __init__(self, rng: np.random.Generator) -> None:
        def weights(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32) / np.float32(shape[-2]) ** 0.5

        self.query = weights(WIDTH, HEADS * (NOPE + ROTARY))
        self.down = weights(WIDTH, LATENT + ROTARY)
        self.key_up, self.value_up = weights(HEADS, LATENT, NOPE), weights(HEADS, LATENT, VALUE)
        self.out = weights(HEADS * VALUE, WIDTH)

    def absorbed(self, x: np.ndarray, step: cuflash.DecodeStep, number: int) -> np.ndarray:
        """Attend on the cache; x is (tokens, width)."""
        q = (x @ self.query).reshape(-1, HEADS, NOPE + ROTARY)
        # q . (latent @ key_up) is (q @ key_up.T) . latent
        latent_q = np.einsum("thn,hln->thl", q[..., :NOPE], self.key_up)
        row = (x @ self.down)[:, None]  # what is cached: (tokens, 1 KV head, 576)
        attended = step(number, np.concatenate([latent_q, q[..., NOPE:]], axis=-1), row)  # (tokens, heads, 512)
        values = np.einsum("thl,hlv->thv", attended, self.value_up)
        return values.reshape(len(x), -1) @ self.out

    def written_out(self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        """Attend with a key and a value of every head; x are all tokens of one sequence."""
        q = (x @ self.query).reshape(-1, HEADS, NOPE + ROTARY)
        down = x @ self.down
        keys = np.einsum("tl,hln->thn", down[:, :LATENT], self.key_up)
        values = np.einsum("tl,hlv->thv", down[:, :LATENT], self.value_up)
        shared = rotate(down[:, None, LATENT:], cos[: len(x)], sin[: len(x)])
        turned = rotate(q[..., NOPE:], cos[: len(x)], sin[: len(x)])
        scores = np.einsum("qhn,khn->hqk", q[..., :NOPE], keys) + np.einsum("qhr,kr->hqk", turned, shared[:, 0])
        scores = np.where(np.tri(len(x), dtype=bool), scores * SCALE, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.einsum("hqk,khv->qhv", weights, values).reshape(len(x), -1) @ self.out


def main() -> None:
    """Prefill two prompts, decode some tokens with both, and compare."""
    rng = np.random.default_rng(0)
    layers = [Layer(rng) for _ in range(LAYERS)]
    angles = np.outer(np.arange(POSITIONS), 10_000.0 ** -(np.arange(0, ROTARY, 2) / ROTARY))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    cache = cuflash.PagedKVCache(
        LAYERS, 64, 16, 1, LATENT + ROTARY, "float32", headdim_v=LATENT, latent=True, max_seqlen=POSITIONS
    )
    step = cuflash.DecodeStep(cache, HEADS, softmax_scale=SCALE, rotary_cos=cos, rotary_sin=sin)
    texts = [rng.standard_normal((length, WIDTH), np.float32) for length in (90, 33)]  # embedded
    results: list[list[np.ndarray]] = [[] for _ in texts]
    sequences, seen = [cache.add() for _ in texts], [80, 23]
    new = [text[:length] for text, length in zip(texts, seen)]
    while new:
        tokens = [len(part) for part in new]
        step.begin(sequences, tokens)  # one plan for all layers
        x = np.concatenate(new)
        for number, layer in enumerate(layers):
            x = x + layer.absorbed(x, step, number)
        step.commit()
        for result, part in zip(results, np.split(x, np.cumsum(tokens)[:-1])):
            result.append(part)
        new = [text[n : n + 1] for text, n in zip(texts, seen) if n < len(text)]
        seen = [n + 1 for n in seen]

    for text, result in zip(texts, results):
        x = text.astype(np.float64)
        for layer in layers:
            x = x + layer.written_out(x, cos, sin)
        np.testing.assert_allclose(np.concatenate(result), x, atol=1e-3)

    row, grouped = LATENT + ROTARY, 2 * 8 * 128
    all_heads = HEADS * (NOPE + ROTARY + VALUE)
    print(f"{LAYERS} layers on one plan a step agree with keys and values written out")
    print(f"numbers per token and layer: {row} latent; {grouped:,} with 8 KV heads of 128; {all_heads:,} written out")


if __name__ == "__main__":
    main()
