"""FlashAttention-3's ``flash_attn_interface``: names, arguments and returns as there, forward only.

https://github.com/Dao-AILab/flash-attention, ``hopper/flash_attn_interface.py``.

Example:
    >>> import numpy as np
    >>> from cuflash.compat.flash_attn_interface import flash_attn_with_kvcache, get_scheduler_metadata
    >>> q, lengths = np.ones((2, 1, 8, 64), np.float16), np.array([100, 7], np.int32)
    >>> k_cache, v_cache = np.ones((2, 2, 128, 2, 64), np.float16)
    >>> metadata = get_scheduler_metadata(2, 1, 128, 8, 2, 64, lengths, qkv_dtype="float16", causal=True)
    >>> for layer in range(2):
    ...     out = flash_attn_with_kvcache(
    ...         q, k_cache, v_cache, cache_seqlens=lengths, causal=True, scheduler_metadata=metadata
    ...     )
    >>> out.shape
    (2, 1, 8, 64)
"""

from __future__ import annotations

from typing import Any

from ..problem import boolean
from . import calls

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache", "get_scheduler_metadata"]

Window = tuple[int | None, int | None]


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Any,
    qkv_dtype: Any = "bfloat16",
    headdim_v: int | None = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k_new: Any = None,
    cache_leftpad: Any = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int | None = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Any:
    """Plan a step: see :func:`cuflash.get_scheduler_metadata` for the arguments.

    Returns:
        An int32 array of the kind of ``cache_seqlens``, to be handed to calls as it is or copied.
    """
    return calls.metadata(
        batch_size=batch_size, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, num_heads_q=num_heads_q,
        num_heads_kv=num_heads_kv, headdim=headdim, cache_seqlens=cache_seqlens, qkv_dtype=qkv_dtype,
        headdim_v=headdim_v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k_new=cu_seqlens_k_new, cache_leftpad=cache_leftpad,
        page_size=page_size, max_seqlen_k_new=max_seqlen_k_new, causal=causal, window_size=window_size,
        attention_chunk=attention_chunk, has_softcap=has_softcap, num_splits=num_splits, pack_gqa=pack_gqa,
        sm_margin=sm_margin,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    qv: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    page_table: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k_new: Any = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float | None = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Any = None,
) -> Any:
    """Attend to a KV cache: see :func:`cuflash.flash_attn_with_kvcache` for the arguments.

    ``scheduler_metadata`` is what :func:`get_scheduler_metadata` returned, or a copy of it.

    Returns:
        out, or (out, softmax_lse, *rest) with ``return_softmax_lse``.
    """
    return calls.attend(
        q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, qv=qv, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad,
        page_table=page_table, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k_new=cu_seqlens_k_new, max_seqlen_q=max_seqlen_q,
        rotary_seqlens=rotary_seqlens, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
        softmax_scale=softmax_scale, causal=causal, window_size=window_size, attention_chunk=attention_chunk,
        softcap=softcap, rotary_interleaved=rotary_interleaved, scheduler_metadata=scheduler_metadata,
        num_splits=num_splits, pack_gqa=pack_gqa, sm_margin=sm_margin, return_softmax_lse=return_softmax_lse,
        sinks=sinks,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Any = None,
    seqused_k: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: Window = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float | None = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Attend to keys that lie one sequence behind the other, (total_k, heads_kv, headdim); forward only.

    ``seqused_q`` is not implemented; ``deterministic`` speaks of gradients.

    Returns:
        out, or (out, softmax_lse) with ``return_attn_probs``.
    """
    boolean("deterministic", deterministic)
    result = calls.attend_varlen(
        q, k, v, cu_seqlens_k, seqused_q, seqused_k, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, softmax_scale=softmax_scale, causal=causal, qv=qv, q_descale=q_descale,
        k_descale=k_descale, v_descale=v_descale, window_size=window_size, attention_chunk=attention_chunk,
        softcap=softcap, num_splits=num_splits, pack_gqa=pack_gqa, sm_margin=sm_margin,
        return_softmax_lse=boolean("return_attn_probs", return_attn_probs),
    )  # fmt: skip
    return result[:2] if return_attn_probs else result


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: Window = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float | None = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Attend to a dense batch, (batch, seqlen_k, heads_kv, headdim); forward only.

    Returns:
        out, or (out, softmax_lse) with ``return_attn_probs``.
    """
    boolean("deterministic", deterministic)
    result = calls.attend_varlen(
        q, k, v, None, None, None, softmax_scale=softmax_scale, causal=causal, qv=qv, q_descale=q_descale,
        k_descale=k_descale, v_descale=v_descale, window_size=window_size, attention_chunk=attention_chunk,
        softcap=softcap, num_splits=num_splits, pack_gqa=pack_gqa, sm_margin=sm_margin,
        return_softmax_lse=boolean("return_attn_probs", return_attn_probs),
    )  # fmt: skip
    return result[:2] if return_attn_probs else result
