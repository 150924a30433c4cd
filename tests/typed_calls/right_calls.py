"""Calls that a type checker takes: mypy runs on this file, nothing else does."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import cuflash
from cuflash.array_types import Array

q: NDArray[np.float32] = np.ones((2, 1, 8, 64), np.float32)
cache: NDArray[np.float32] = np.ones((2, 128, 2, 64), np.float32)
lengths: NDArray[np.int32] = np.array([100, 7], np.int32)

meta: cuflash.SchedulerMetadata = cuflash.get_scheduler_metadata(2, 1, 128, 8, 2, 64, lengths, qkv_dtype="float32")
meta = cuflash.get_scheduler_metadata(2, 1, 128, 8, 2, 64, 100, np.float32, page_size=None, window_size=(5, None))

# The output is of the queries' kind, alone or with the LSE.
out: NDArray[np.float32] = cuflash.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths)
out = cuflash.flash_attn_with_kvcache(q, cache, cache, return_softmax_lse=False, scheduler_metadata=meta)
pair: tuple[NDArray[Any], NDArray[Any]] = cuflash.flash_attn_with_kvcache(
    q, cache, cache, cache_seqlens=5, return_softmax_lse=True, layout="NHD", softcap=30.0
)
cuflash.flash_attn_with_kvcache(q, cache, cache, page_table=lengths[None], out=out)
cuflash.flash_attn_with_kvcache(q, cache, cache, page_table=(lengths, lengths), merge_with=pair)

merged: tuple[NDArray[np.float32], NDArray[np.float32]] = cuflash.merge_attn_states([out, out], [lengths, lengths])
merged = cuflash.merge_attn_states(out, lengths)
number: int = cuflash.compile(meta)


def any_kind(x: Array, flag: bool) -> None:
    """Arrays of any framework, and a flag that is known at run time alone."""
    result = cuflash.flash_attn_with_kvcache(x, x, x, x, x, cache_seqlens=x, k_descale=1.0, return_softmax_lse=flag)
    if isinstance(result, tuple):
        result[0].__dlpack__()
    else:
        result.__dlpack__()
