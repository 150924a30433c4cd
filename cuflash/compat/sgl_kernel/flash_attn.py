"""sglang's ``sgl_kernel.flash_attn``: names, arguments and returns as there.

https://github.com/sgl-project/sglang, ``sgl-kernel/python/sgl_kernel/flash_attn.py``.
"""

from __future__ import annotations

from typing import Any

from ...problem import boolean
from .. import calls

__all__ = ["flash_attn_varlen_func", "flash_attn_with_kvcache", "get_scheduler_metadata", "is_fa3_supported"]

Window = tuple[int | None, int | None]
_VERSIONS = (3, 4)


def is_fa3_supported(device: Any = None) -> bool:
    """Whether these functions run: they do on every GPU of compute capability 8.0 or higher, and on the host."""
    return True


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads: int,
    num_heads_k: int,
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
    attention_chunk: int | None = None,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Any:
    """Plan a step: see :func:`cuflash.get_scheduler_metadata` for the arguments.

    ``num_heads`` are the query heads, ``num_heads_k`` the KV heads.

    Returns:
        An int32 array of the kind of ``cache_seqlens``, to be handed to calls as it is or copied. It is longer than
        FlashAttention-3's: :func:`cuflash.compat.scheduler_metadata_size` sizes the buffer of a graph.
    """
    return calls.metadata(
        batch_size=batch_size, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, num_heads_q=num_heads,
        num_heads_kv=num_heads_k, headdim=headdim, cache_seqlens=cache_seqlens, qkv_dtype=qkv_dtype,
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
    attention_chunk: int | None = None,
    softcap: float | None = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Any = None,
    score_mod: Any = None,
    aux_tensors: Any = None,
    ver: int = 3,
    *,
    only_qv: bool = False,
    out: Any = None,
) -> Any:
    """Attend to a KV cache: see :func:`cuflash.flash_attn_with_kvcache` for the arguments.

    ``scheduler_metadata`` is what :func:`get_scheduler_metadata` returned, or a copy of it. ``ver`` is the version of
    FlashAttention, 3 or 4: the kernels are the same. With ``only_qv`` scores are ``qv . v`` alone: ``q`` and
    ``k_cache`` may be None, and metadata is made for a headdim of headdim_v. ``out`` is where to write the output.
    ``score_mod`` and ``aux_tensors`` are not implemented.

    Returns:
        out, or (out, softmax_lse, *rest) with ``return_softmax_lse``.
    """
    _refuse(score_mod=score_mod, aux_tensors=aux_tensors)
    _check_version(ver)
    if boolean("only_qv", only_qv):
        q, qv, softmax_scale = _queries_of_values(q, qv, softmax_scale)
        k_cache, k, v, k_descale = v_cache, v, None, v_descale
    return calls.attend(
        q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, qv=qv, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad,
        page_table=page_table, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k_new=cu_seqlens_k_new, max_seqlen_q=max_seqlen_q,
        rotary_seqlens=rotary_seqlens, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
        softmax_scale=softmax_scale, causal=causal, window_size=window_size, attention_chunk=attention_chunk,
        softcap=softcap, rotary_interleaved=rotary_interleaved, scheduler_metadata=scheduler_metadata,
        num_splits=num_splits, pack_gqa=pack_gqa, sm_margin=sm_margin, return_softmax_lse=return_softmax_lse,
        sinks=sinks, out=out,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    page_table: Any = None,
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
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Any = None,
    score_mod: Any = None,
    aux_tensors: Any = None,
    ver: int = 3,
    *,
    only_qv: bool = False,
    out: Any = None,
) -> Any:
    """Attend to keys that lie one sequence behind the other, (total_k, heads_kv, headdim), or in pages; forward only.

    ``seqused_q``, ``score_mod`` and ``aux_tensors`` are not implemented.

    Returns:
        out, or (out, softmax_lse, *rest) with ``return_softmax_lse``.
    """
    _refuse(score_mod=score_mod, aux_tensors=aux_tensors)
    _check_version(ver)
    if boolean("only_qv", only_qv):
        q, qv, softmax_scale = _queries_of_values(q, qv, softmax_scale)
        k, k_descale = v, v_descale
    return calls.attend_varlen(
        q, k, v, cu_seqlens_k, seqused_q, seqused_k, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, page_table=page_table, softmax_scale=softmax_scale, causal=causal, qv=qv,
        q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, window_size=window_size,
        attention_chunk=attention_chunk, softcap=softcap, num_splits=num_splits, pack_gqa=pack_gqa, sm_margin=sm_margin,
        return_softmax_lse=return_softmax_lse, sinks=sinks, out=out,
    )  # fmt: skip


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name} is not implemented")


def _check_version(ver: int) -> None:
    if not isinstance(ver, int) or ver not in _VERSIONS:
        raise ValueError(f"ver must be 3 or 4, got {ver!r}")


def _queries_of_values(q: Any, qv: Any, softmax_scale: float | None) -> tuple[Any, None, float]:
    """Return q, qv and scale of a call whose scores are of ``qv`` and the values alone: these are its keys."""
    if qv is None:
        raise ValueError("qv must be given with only_qv, got None")
    if softmax_scale is None:
        headdim = 0 if q is None else calls.shape_of("q", q)[-1]
        softmax_scale = (headdim + calls.shape_of("qv", qv)[-1]) ** -0.5
    return qv, None, softmax_scale
