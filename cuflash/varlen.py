"""Attention on keys and values that lie packed, one sequence after another: prefill and embeddings without a cache."""

from __future__ import annotations

from typing import Any

from .arguments.common import renamed
from .array_types import Array
from .arrays import import_array
from .attention import DEFAULTS, attend_once
from .problem import boolean, integer


def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Array | None = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float | None = 0.0,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    sinks: Array | None = None,
    split_size: int | None = None,
    kv_dtype: Any = None,
    out: Array | None = None,
    softmax_lse: Array | None = None,
) -> Any:
    """Attend to packed keys and values; forward only.

    Names, order and meaning of the arguments up to ``sm_margin`` are those of FlashAttention-3's function of this name,
    in which ``num_splits`` is 1 by default and ``return_attn_probs`` follows in place of ``return_softmax_lse``. Masks,
    scales and results are those of :func:`cuflash.flash_attn_with_kvcache`, whose kernels run: packed keys are one more
    form of a cache. Each call plans for itself.

    Args:
        q: (total_q, heads_q, headdim); float16, bfloat16 or float32, or float8_e4m3fn.
        k: (total_k, heads_kv, headdim); rows must be whole 16-byte units.
        v: (total_k, heads_kv, headdim_v).
        cu_seqlens_q: (batch + 1,) int32 first query of each sequence.
        cu_seqlens_k: (batch + 1,) int32 first key of each sequence, from 0.
        max_seqlen_q: Longest query length.
        max_seqlen_k: Longest key length; not binding.
        seqused_q: Must be None: all queries of a sequence are used.
        seqused_k: (batch,) int32 keys of each sequence that are used, from its first; default: all.
        softmax_scale: Factor of the scores.
        causal: Bottom-right aligned causal mask.
        qv: As q with headdim_v, see ``flash_attn_with_kvcache``.
        q_descale: Scale of quantised queries.
        k_descale: Scale of quantised keys.
        v_descale: Scale of quantised values.
        window_size: (left, right) keys around a row's position, -1 for all.
        attention_chunk: Keys of a chunk, 0 for none.
        softcap: Cap of the scores, 0 for none.
        num_splits: As in ``get_scheduler_metadata``.
        pack_gqa: Accepted; query heads are always packed.
        deterministic: Accepted; results never depend on timing.
        sm_margin: Multiprocessors left free.
        return_softmax_lse: Whether to return the LSE too.
        sinks: (heads_q,) learnable logits.
        split_size: As in ``get_scheduler_metadata``.
        kv_dtype: Element type of quantised keys and values that come as uint8.
        out: Where to write the output, (total_q, heads_q, headdim_v).
        softmax_lse: Where to write the LSE, (heads_q, total_q) float32.

    Returns:
        The output, of q's kind; with ``return_softmax_lse`` also the LSE.

    Raises:
        TypeError: For an argument of a wrong kind.
        ValueError: For a wrong value. Nothing has been written then.

    Example:
        >>> import cuflash, numpy as np
        >>> rng = np.random.default_rng(0)
        >>> starts = np.array([0, 3, 10], np.int32)  # sequences of 3 and 7 tokens
        >>> q = rng.standard_normal((10, 4, 64), np.float32)
        >>> k, v = rng.standard_normal((2, 10, 2, 64), np.float32)
        >>> out = cuflash.flash_attn_varlen_func(q, k, v, starts, starts, 7, 7, causal=True)
        >>> out.shape
        (10, 4, 64)
    """
    boolean("deterministic", deterministic)
    longest = integer("max_seqlen_k", max_seqlen_k, 0)
    if seqused_q is not None:
        raise ValueError("seqused_q must be None: all queries of a sequence are used, got one")
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if starts is None:
            raise TypeError(f"{name} must be an array, got None")
    packed = []
    for name, x in (("k", k), ("v", v)):
        array = import_array(name, x)
        if array.ndim != 3:
            raise ValueError(f"{name} must have shape (total_k, heads_kv, headdim), got {array.shape}")
        packed.append(array[None])
    given = {
        **DEFAULTS, "q": q, "k_cache": packed[0], "v_cache": packed[1], "cu_seqlens_k": cu_seqlens_k,
        "cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q, "cache_seqlens": seqused_k, "qv": qv,
        "softmax_scale": softmax_scale, "causal": causal, "q_descale": q_descale, "k_descale": k_descale,
        "v_descale": v_descale, "window_size": window_size, "attention_chunk": attention_chunk, "softcap": softcap,
        "num_splits": num_splits, "pack_gqa": pack_gqa, "sm_margin": sm_margin, "sinks": sinks,
        "split_size": split_size, "kv_dtype": kv_dtype, "out": out, "softmax_lse": softmax_lse,
        "return_softmax_lse": return_softmax_lse,
    }  # fmt: skip
    with renamed({"k_cache": "k", "v_cache": "v", "cache_seqlens": "seqused_k"}):
        return attend_once(given, longest)
