"""Calls that a type checker refuses, each on the line that is marked with the error: mypy runs on this file."""

from __future__ import annotations

import numpy as np

import cuflash

q = np.ones((2, 1, 8, 64), np.float32)
cache = np.ones((2, 128, 2, 64), np.float32)
lengths = np.array([100, 7], np.int32)

cuflash.flash_attn_with_kvcache(q, 1, cache)  # error: call-overload
cuflash.flash_attn_with_kvcache(q, k_cache=1, v_cache=cache)  # error: call-overload
cuflash.flash_attn_with_kvcache([1.0], cache, cache)  # error: call-overload
cuflash.flash_attn_with_kvcache(q, cache)  # error: call-overload
cuflash.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=[100, 7])  # error: call-overload
cuflash.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=100.0)  # error: call-overload
cuflash.flash_attn_with_kvcache(q, cache, cache, block_table=lengths)  # error: call-overload
cuflash.flash_attn_with_kvcache(q, cache, cache, page_table=[lengths])  # error: call-overload
cuflash.flash_attn_with_kvcache(q, cache, cache, layout="HDN")  # error: call-overload
cuflash.flash_attn_with_kvcache(q, cache, cache, window_size=5)  # error: call-overload
cuflash.flash_attn_with_kvcache(q, cache, cache, scheduler_metadata=lengths)  # error: call-overload
cuflash.flash_attn_with_kvcache(q, cache, cache, merge_with=q)  # error: call-overload
cuflash.flash_attn_with_kvcache(q, cache, cache, max_seqlen_q="1")  # error: call-overload
out, lse = cuflash.flash_attn_with_kvcache(q, cache, cache, return_softmax_lse=True).shape  # error: attr-defined
pair: tuple[object, object] = cuflash.flash_attn_with_kvcache(q, cache, cache)  # error: assignment

cuflash.get_scheduler_metadata(2, 1, 128, 8, 2, 64)  # error: call-arg
cuflash.get_scheduler_metadata(2, 1, 128, 8, 2, 64, [100, 7])  # error: arg-type
cuflash.get_scheduler_metadata(2, 1, 128, 8, 2, 64, 100, num_splits=None)  # error: arg-type
cuflash.get_scheduler_metadata(2, 1, 128, 8, 2, 64, 100, out=lengths)  # error: arg-type
cuflash.get_scheduler_metadata(2, 1, 128, 8, 2, 64, 100, softcap=30.0)  # error: call-arg
cuflash.merge_attn_states([1.0], [2.0])  # error: list-item
cuflash.merge_attn_states(q)  # error: call-arg
cuflash.compile(lengths)  # error: arg-type
