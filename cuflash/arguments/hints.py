"""Other libraries' names of the arguments: a call that uses one is told ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_CACHE_SEQLENS = "cache_seqlens, the keys in the cache before an append"
_PAIR = "page_table=(indptr, indices)"
_PEERS = {
    # FlashAttention-2 and -3, sglang, vLLM, FlashMLA
    "block_table": "page_table",
    "block_tables": "page_table",
    "page_tables": "page_table",
    "seqlens": _CACHE_SEQLENS,
    "seq_lens": _CACHE_SEQLENS,
    "seqlens_k": _CACHE_SEQLENS,
    "seqused_k": _CACHE_SEQLENS,
    "context_lens": _CACHE_SEQLENS,
    "cache_lens": _CACHE_SEQLENS,
    "kv_lens": _CACHE_SEQLENS,
    "query": "q",
    "key_cache": "k_cache",
    "value_cache": "v_cache",
    "kv_cache": "k_cache and v_cache",
    "key": "k",
    "value": "v",
    "query_start_loc": "cu_seqlens_q",
    "cu_query_lens": "cu_seqlens_q",
    "max_query_len": "max_seqlen_q",
    "scale": "softmax_scale",
    "is_causal": "causal",
    "sliding_window": "window_size=(left, right)",
    "s_aux": "sinks",
    "sink": "sinks",
    "k_scale": "k_descale",
    "v_scale": "v_descale",
    "tile_scheduler_metadata": "scheduler_metadata",
    "head_dim_v": "headdim_v",
    "return_lse": "return_softmax_lse",
    "return_attn_probs": "return_softmax_lse",
    "num_heads": "num_heads_q",
    "num_heads_k": "num_heads_kv",
    "dtype": "qkv_dtype",
    # FlashInfer
    "kv_layout": "layout",
    "sm_scale": "softmax_scale",
    "logits_soft_cap": "softcap",
    "window_left": "window_size=(left, 0)",
    "num_qo_heads": "num_heads_q",
    "num_kv_heads": "num_heads_kv",
    "head_dim": "headdim",
    "head_dim_qk": "headdim",
    "qo_indptr": "cu_seqlens_q",
    "paged_kv_indptr": _PAIR,
    "paged_kv_indices": _PAIR,
    "indptr": _PAIR,
    "indices": _PAIR,
    "custom_mask": "tree_mask",
    "q_data_type": "qkv_dtype",
    "kv_data_type": "kv_dtype",
}
_OF_A_PLAN = {
    "page_table": "page_size: a plan holds whichever pages a sequence has",
    "softcap": "has_softcap",
}


def hints(function: Function) -> Function:
    """Name our argument in the TypeError about an unknown one.

    It is done outside of the function, since only the signature itself keeps unknown arguments out; a call that is
    right pays half a microsecond.

    Args:
        function: A public function.

    Returns:
        The function with its own name, documentation and signature.
    """
    parameters = inspect.signature(function).parameters

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TypeError:
            for name in kwargs.keys() - parameters.keys():
                ours = {**_PEERS, **_OF_A_PLAN}.get(name)
                if ours is not None and _first_word(ours) in parameters:
                    raise TypeError(f"{function.__name__}() has no argument {name!r}: here it is {ours}") from None
            raise

    return call  # type: ignore[return-value]


def _first_word(hint: str) -> str:
    return hint.replace(",", " ").replace(":", " ").replace("=", " ").split()[0]
