"""Plan a decode step once: which thread block reads which keys of which sequence."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy as np

from . import arguments, backends, kernels, memo
from .array_types import Array
from .arrays import empty
from .memory import NativeArray, is_on_device, is_same, memory_of
from .metadata import SchedulerMetadata, lengthen
from .operands import Lengths
from .planner import plan_words
from .problem import Problem, boolean, first_difference, integer, make_problem
from .public import public

_MAX_ITEMS = 2**30  # and rows of a KV head: int32 numbers them with room for sums


@public
@memo.repeatable()
def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Array | int,
    qkv_dtype: Any = "bfloat16",
    headdim_v: int | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k_new: Array | None = None,
    cache_leftpad: Array | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    attention_chunk: int | None = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    *,
    split_size: int | None = None,
    kv_dtype: Any = None,
    out: SchedulerMetadata | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_interleave: int = 1,
) -> SchedulerMetadata:
    """Plan a decode step, once for all layers.

    Names, order and meaning of the arguments are those of FlashAttention-3's function of this name. One kernel launch
    without a host sync for arrays on a GPU; on the host the plan is made for the GPU that ``CUFLASH_NUM_SM`` (default
    132) and ``CUFLASH_ARCH`` (default 90) describe.

    Args:
        batch_size: Number of sequences.
        max_seqlen_q: Query positions per sequence, with ``cu_seqlens_q`` the most.
        max_seqlen_k: Upper bound of the key lengths. The first one decides the tiles of the plan (small problems run on
            clusters); refills keep them, so make a plan that will be refilled for the longest keys to come. Not
            binding: beyond it the plan is right and may be much less even.
        num_heads_q: Query heads.
        num_heads_kv: KV heads; divides ``num_heads_q``.
        headdim: Elements of a query and key row: a multiple of 8 up to 512; up to 576 with shorter values, which then
            are the first columns of the keys. Kernels of float32 have up to 256, of keys and of values; more beside
            values that are the first columns of the keys, and 64 beside values of up to 512 (``qv``).
        cache_seqlens: (batch,) int32 keys in the cache before an append, or one int for all sequences.
        qkv_dtype: float16, bfloat16 or float32, as a string or dtype.
        headdim_v: Elements of a value row; default ``headdim``.
        cu_seqlens_q: (batch + 1,) int32 first query of each sequence: ragged queries.
        cu_seqlens_k_new: (batch + 1,) int32 first new key of each sequence: ragged append.
        cache_leftpad: (batch,) int32 first valid key of each sequence.
        page_size: Keys per page; None for a contiguous cache.
        max_seqlen_k_new: Keys that the call appends to every sequence; 0 without append. A length, and like all
            lengths advisory: the plan serves calls that append more, fewer or none.
        causal: Whether a row sees no key after its own position (bottom right aligned).
        window_size: (left, right) keys around a row's own position that it sees, -1 or None for all.
        attention_chunk: A row sees only its own chunk of this many keys; 0 or None for no chunks.
        has_softcap: Whether the call caps scores.
        num_splits: 0 balances freely, 1 never splits an item (sequence, KV head, row block), n splits it into n parts
            at most.
        pack_gqa: Accepted and remembered; query heads are always packed.
        sm_margin: Multiprocessors left free.
        split_size: Cut every sequence at multiples of this many keys (a multiple of 64): results are then bitwise the
            same in any batch.
        kv_dtype: Element type of the cache; default ``qkv_dtype``.
        out: A plan made for the same problem, to be refilled in place: no allocation and no sync, for CUDA graphs. A
            plan of a larger batch serves fewer sequences by lengths of 0.
        cp_world_size: Ranks that share every sequence, see ``flash_attn_with_kvcache``; lengths are whole ones.
        cp_rank: This rank.
        cp_interleave: Neighbouring positions that a rank holds.

    Returns:
        The plan; ``out`` if given. Binding for a call on it are batch_size, max_seqlen_q, num_heads_q, num_heads_kv,
        headdim, headdim_v, qkv_dtype, kv_dtype, page_size, causal, window_size, attention_chunk, has_softcap,
        cp_world_size, cp_rank, cp_interleave, and whether queries are ragged.

    Raises:
        TypeError: For an argument of a wrong kind.
        ValueError: For a wrong value or shape, or if ``out`` was made for another problem, naming the first field
            that differs. Values of arrays are checked on the host, and on a GPU under ``CUFLASH_VALIDATE=1``.

    Example:
        >>> import cuflash, numpy as np
        >>> lengths = np.array([4096, 100, 2048], np.int32)
        >>> problem = dict(batch_size=3, max_seqlen_q=1, max_seqlen_k=4096, num_heads_q=32)
        >>> problem |= dict(num_heads_kv=8, headdim=128, page_size=16, causal=True)
        >>> meta = cuflash.get_scheduler_metadata(**problem, cache_seqlens=lengths)
        >>> meta.balance > 0.8
        True
        >>> lengths += 1  # the next step
        >>> meta is cuflash.get_scheduler_metadata(**problem, cache_seqlens=lengths, out=meta)
        True
    """
    problem, lengths, max_seqlen_k = _check(locals())
    metadata, step = make_metadata(problem, lengths, max_seqlen_k, pack_gqa, out)
    lengthen(metadata, max_seqlen_k)
    return memo.first(metadata, None if out is None or step is None else partial(_again, step, lengths, max_seqlen_k))


def _check(given: dict[str, Any]) -> tuple[Problem, Lengths, int]:
    """Return the problem, its lengths and the bound of the key lengths."""
    scalars = (
        "batch_size", "max_seqlen_q", "num_heads_q", "num_heads_kv", "headdim", "qkv_dtype", "kv_dtype", "headdim_v",
        "page_size", "causal", "window_size", "attention_chunk", "has_softcap", "num_splits", "split_size", "pack_gqa",
        "sm_margin", "cp_world_size", "cp_rank", "cp_interleave",
    )  # fmt: skip
    problem = make_problem(**{name: given[name] for name in scalars}, cu_seqlens_q=given["cu_seqlens_q"] is not None)
    new = integer("max_seqlen_k_new", given["max_seqlen_k_new"], 0)
    max_seqlen_k = integer("max_seqlen_k", given["max_seqlen_k"], 0)
    plan = given["out"] if isinstance(given["out"], SchedulerMetadata) else None
    lengths = arguments.lengths(problem, given, new, plan)
    _warn_of_swapped(problem, lengths, max_seqlen_k)
    return problem, lengths, max_seqlen_k


def _warn_of_swapped(problem: Problem, lengths: Lengths, max_seqlen_k: int) -> None:
    """Warn of bounds that fit the lengths only if one is the other; on a GPU, reading lengths would mean to wait."""
    if max_seqlen_k >= problem.max_seqlen_q or is_on_device(lengths.cache_seqlens) or not problem.batch_size:
        return
    longest = int(lengths.cache_seqlens.max())
    if max_seqlen_k < longest <= problem.max_seqlen_q:
        warnings.warn(
            f"max_seqlen_q={problem.max_seqlen_q} and max_seqlen_k={max_seqlen_k} look swapped: cache_seqlens goes up "
            f"to {longest}",
            stacklevel=6,
        )


def compile(scheduler_metadata: SchedulerMetadata) -> int:
    """Compile and load all kernels that calls on a plan will launch, before the first call: for a server's start.

    Kernels are compiled when they are first used (some 0.5 s each) and kept by content in a disk cache, CuPy's on a
    GPU, so that another process loads them in milliseconds. A CUDA graph must be captured after its kernels are loaded.
    For a quantised cache there are kernels for scales per key and head, and for others. Those of calls with a tree mask
    or ``merge_with``, and one for keys of the one kind of scales and values of the other, are left to the first call.

    Args:
        scheduler_metadata: A plan, for whatever lengths.

    Returns:
        How many kernels had not been loaded by this process; 0 if all were there, and always 0 with NumPy.

    Raises:
        TypeError: If the argument is not a plan.
        RuntimeError: If a kernel does not compile, naming variant and architecture.

    Example:
        >>> import cuflash, numpy as np
        >>> meta = cuflash.get_scheduler_metadata(8, 1, 4096, 32, 8, 128, np.zeros(8, np.int32))
        >>> cuflash.compile(meta)
        0
    """
    if not isinstance(scheduler_metadata, SchedulerMetadata):
        raise TypeError(f"scheduler_metadata must be a SchedulerMetadata, got {type(scheduler_metadata).__name__}")
    backend, array = backends.select(scheduler_metadata.array), scheduler_metadata.array
    partition, appends = scheduler_metadata.partition, scheduler_metadata.appends
    return int(backend.prepare(kernels.variants(scheduler_metadata.problem, partition, appends), array))


class _Refill:
    """Fills a plan again, with arguments that have been checked."""

    def __init__(self, backend: Any, step: Any, max_seqlen_k: int) -> None:
        self._backend, self._step, self._max_seqlen_k = backend, step, max_seqlen_k

    def fits(self, addresses: list[int]) -> bool:
        """The key of the call says everything."""
        return True

    def __call__(
        self, arrays: list[NativeArray], addresses: list[int], plan: SchedulerMetadata, foreign: dict[int, Any]
    ) -> SchedulerMetadata:
        """Return the plan, filled."""
        array = plan.array
        self._backend.repeat(self._step, array.data.device_id, [*arrays, array], [*addresses, array.data.ptr])
        lengthen(plan, self._max_seqlen_k)
        return plan


def _again(step: Any, lengths: Lengths, max_seqlen_k: int, arrays: memo.Arrays) -> _Refill | None:
    """Return what fills a plan again; None if an array had to be copied."""
    needed = lengths.arrays
    if not all(x is None or (name in arrays and is_same(arrays[name], x)) for name, x in needed.items()):
        return None
    places = {name: place for place, name in enumerate((*arrays, "plan"))}
    backend = backends.select(lengths.cache_seqlens)
    return _Refill(backend, backend.bind(step, dict.fromkeys(needed) | places, len(places)), max_seqlen_k)


def make_metadata(
    problem: Problem,
    lengths: Lengths,
    max_seqlen_k: int,
    pack_gqa: bool | None = None,
    out: SchedulerMetadata | None = None,
) -> tuple[SchedulerMetadata, Any]:
    """Plan ``problem`` for ``lengths`` on the backend that they belong to; the arguments are checked.

    Args:
        problem: The problem.
        lengths: The lengths.
        max_seqlen_k: Upper bound of the key lengths.
        pack_gqa: As given.
        out: A plan to refill.

    Returns:
        The plan, and on a GPU the step that fills a plan of this problem.

    Raises:
        TypeError: If ``out`` is not a plan.
        ValueError: If ``out`` was made for something else, or the problem has more items than an int32 can number.
    """
    backend = backends.select(lengths.cache_seqlens)
    if pack_gqa is not None:
        pack_gqa = boolean("pack_gqa", pack_gqa)
    device = backend.device(lengths.cache_seqlens)
    # A refilled plan keeps its partition: a graph may have been captured with it.
    partition = out.partition if isinstance(out, SchedulerMetadata) else kernels.choose(problem, device, max_seqlen_k)
    items = problem.batch_size * problem.num_heads_kv * partition.row_blocks
    if max(items, problem.rows) >= _MAX_ITEMS:
        raise ValueError(
            f"batch_size * num_heads_kv * row blocks and max_seqlen_q * num_heads_q / num_heads_kv must be less than "
            f"2**30, got {items} and {problem.rows}"
        )
    if out is None:
        appends = lengths.seqlen_k_new > 0 or lengths.cu_seqlens_k_new is not None
        array = empty((plan_words(problem.batch_size, device),), np.int32, lengths.cache_seqlens)
        out = SchedulerMetadata(problem, device, partition, max_seqlen_k, array, pack_gqa, appends)
    else:
        _check_out(out, problem, device, pack_gqa, memory_of(lengths.cache_seqlens))
    return out, backend.plan(problem, partition, lengths, out.array)


def _check_out(out: SchedulerMetadata, problem: Problem, device: Any, pack_gqa: bool | None, memory: str) -> None:
    if not isinstance(out, SchedulerMetadata):
        raise TypeError(f"out must be a SchedulerMetadata, got {type(out).__name__}")
    difference = first_difference(out.problem, problem)
    if difference is None and out.pack_gqa != pack_gqa:
        difference = "pack_gqa", out.pack_gqa, pack_gqa
    if difference is None and out.device != device:
        difference = "device", out.device, device
    if difference is None and memory_of(out.array) != memory:
        difference = "where cache_seqlens lies", memory_of(out.array), memory
    if difference is not None:
        field, planned, asked = difference
        raise ValueError(f"out was made for another problem: {field} was {planned!r}, got {asked!r}")
