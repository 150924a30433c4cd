"""cuflash: decode attention for CuPy.

A scheduler plans one decode step once (:func:`get_scheduler_metadata`); every layer of the model then runs one kernel
on that plan (:func:`flash_attn_with_kvcache`). :class:`PagedKVCache` and :class:`DecodeStep` keep a server's pages,
lengths and plans for them.
"""

from .attention import flash_attn_with_kvcache
from .merging import merge_attn_states
from .metadata import SchedulerMetadata
from .paged import PagedKVCache
from .pages import OutOfPages
from .scheduling import compile, get_scheduler_metadata
from .shared_prefix import shared_prefix_attention
from .step import DecodeStep

__version__ = "0.1.0"

__all__ = [
    "DecodeStep",
    "OutOfPages",
    "PagedKVCache",
    "SchedulerMetadata",
    "__version__",
    "compile",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "merge_attn_states",
    "shared_prefix_attention",
]
