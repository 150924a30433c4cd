"""cuflash: decode attention for CuPy.

A scheduler plans one decode step once (:func:`get_scheduler_metadata`); every layer of the model then runs one kernel
on that plan (:func:`flash_attn_with_kvcache`). :class:`PagedKVCache` and :class:`DecodeStep` keep a server's pages,
lengths and plans for them. :class:`ContextParallel` spreads sequences over several GPUs or hosts.
"""

from typing import TYPE_CHECKING, Any

from .attention import flash_attn_with_kvcache
from .merging import merge_attn_states
from .metadata import SchedulerMetadata
from .paged import PagedKVCache
from .pages import OutOfPages
from .scheduling import compile, get_scheduler_metadata
from .shared_prefix import shared_prefix_attention
from .step import DecodeStep
from .varlen import flash_attn_varlen_func

if TYPE_CHECKING:
    from .context_parallel import ContextParallel, ContextParallelError

__version__ = "0.1.0"

__all__ = [
    "ContextParallel",
    "ContextParallelError",
    "DecodeStep",
    "OutOfPages",
    "PagedKVCache",
    "SchedulerMetadata",
    "__version__",
    "compile",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "merge_attn_states",
    "shared_prefix_attention",
]


def __getattr__(name: str) -> Any:
    """Import what few programs need when it is asked for."""
    if name in ("ContextParallel", "ContextParallelError"):
        from . import context_parallel

        return getattr(context_parallel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
