"""Decoding with JAX: outside of a jit on JAX's own memory, inside of one by a callback.

A call outside of jit takes arrays where they lie, on a GPU too, and gives new ones. JAX's own never change, so the
cache that new keys are written to is NumPy's here, and could be CuPy's. A jit has no memory to hand over while it
traces: there ``jax.pure_callback`` calls cuflash when the jit runs, by way of the host. Gradients are refused by name.

    python tests/examples/jax_loop.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import cuflash
from cuflash.compat.flash_attn_interface import flash_attn_with_kvcache, get_scheduler_metadata

LAYERS, STEPS, BATCH, CAPACITY, HEADS, KV_HEADS, DIM = 2, 2, 2, 48, 8, 2, 64


def attend_now(q: Array, k_cache: Array, v_cache: Array, lengths: Array, metadata: Array) -> Array:
    """Attend, outside of jit."""
    out: Array = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, scheduler_metadata=metadata)
    return out


@jax.custom_jvp
def attend_in_jit(q: Array, k_cache: Array, v_cache: Array, lengths: Array) -> Array:
    """Attend when the jit that this stands in runs."""
    shape = jax.ShapeDtypeStruct((*q.shape[:-1], v_cache.shape[-1]), q.dtype)

    def call(*arrays: Array) -> Array:
        out: Array = cuflash.flash_attn_with_kvcache(*arrays[:3], cache_seqlens=arrays[3])
        return out

    out: Array = jax.pure_callback(call, shape, q, k_cache, v_cache, lengths)
    return out


@attend_in_jit.defjvp
def _refuse_gradients(primals: object, tangents: object) -> None:
    raise TypeError("cuflash has no backward pass: jax.grad cannot go through attention")


@jax.jit
def wanted(q: Array, k_cache: Array, v_cache: Array, lengths: Array) -> Array:
    """The same in plain JAX."""
    k, v = (jnp.repeat(cache, HEADS // KV_HEADS, axis=2) for cache in (k_cache, v_cache))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * DIM**-0.5
    seen = jnp.arange(CAPACITY) < lengths[:, None, None, None]
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)


def main() -> None:
    """Decode a few steps both ways, and compare."""
    rng = np.random.default_rng(0)
    k_caches, v_caches = rng.standard_normal((2, LAYERS, BATCH, CAPACITY, KV_HEADS, DIM), np.float32)
    seqlens = np.array([30, 5], np.int32)
    compiled = jax.jit(attend_in_jit)
    for _ in range(STEPS):
        k_caches[:, range(BATCH), seqlens], v_caches[:, range(BATCH), seqlens] = rng.standard_normal(
            (2, LAYERS, BATCH, KV_HEADS, DIM), np.float32
        )
        seqlens += 1
        lengths = jax.device_put(seqlens)
        # Once per step, for all layers.
        metadata = get_scheduler_metadata(BATCH, 1, CAPACITY, HEADS, KV_HEADS, DIM, lengths, qkv_dtype="float32")
        for caches in zip(k_caches, v_caches, strict=True):
            k_cache, v_cache = jax.device_put(caches)
            q = jax.device_put(rng.standard_normal((BATCH, 1, HEADS, DIM), np.float32))
            answer = wanted(q, k_cache, v_cache, lengths)
            for out in (attend_now(q, k_cache, v_cache, lengths, metadata), compiled(q, k_cache, v_cache, lengths)):
                np.testing.assert_allclose(out, answer, atol=2e-3)
    for transform in (jax.jit, jax.vmap, jax.grad):
        try:
            transform(lambda q: attend_now(q, k_cache, v_cache, lengths, metadata).sum())(q)
        except TypeError as error:
            print(f"{transform.__name__}: {error}")
    try:
        jax.grad(lambda q: attend_in_jit(q, k_cache, v_cache, lengths).sum())(q)
    except TypeError as error:
        print(f"grad through the callback: {error}")
    print(f"{STEPS} steps of {LAYERS} layers on {jax.default_backend()}, as in plain JAX")


if __name__ == "__main__":
    main()
