"""Plan a decode step once: which thread block reads which keys of which sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import backends, kernels, repeat
from .arrays import checks_values, empty, import_index, is_on_device, memory_of, to_host
from .device import Device
from .planner import plan_cuts, plan_sequences, plan_words, visible_keys
from .problem import Problem, boolean, first_difference, integer, make_problem
from .tiling import Tiling, tiling

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NativeArray = Any  # numpy.ndarray | cupy.ndarray
_MAX_ITEMS = 2**30  # and rows of a KV head: int32 numbers them with room for sums

WORK = np.dtype(
    [
        ("block", np.int32),
        ("sequence", np.int32),
        ("kv_head", np.int32),
        ("row_block", np.int32),
        ("key_begin", np.int64),
        ("key_end", np.int64),
    ]
)


@dataclass(frozen=True)
class Lengths:
    """The lengths of a step, as native int32 arrays in one memory.

    Attributes:
        cache_seqlens: (batch,) keys in the cache before the append, leftpad included.
        cu_seqlens_q: (batch + 1,) first query of each sequence, or None: ``max_seqlen_q`` each.
        cu_seqlens_k_new: (batch + 1,) first new key of each sequence, or None: ``max_seqlen_k_new`` each.
        cache_leftpad: (batch,) first valid key, or None: 0.
    """

    cache_seqlens: NativeArray
    cu_seqlens_q: NativeArray | None = None
    cu_seqlens_k_new: NativeArray | None = None
    cache_leftpad: NativeArray | None = None


@dataclass(eq=False, repr=False)
class SchedulerMetadata:
    """A plan, and what it was made for. Every layer of the step takes the same one.

    The lengths in it are advisory: a plan made for other lengths makes a call slower, never wrong. The problem is
    binding. Kernels only read ``array``.

    Attributes:
        problem: The problem the plan was made for; a call with another one raises ValueError.
        device: The GPU it was made for.
        tiling: Tile sizes of the problem on the device.
        num_blocks: Thread blocks that the plan may use: the largest grid.
        max_seqlen_k: Upper bound of the key lengths as given; not binding.
        array: (words,) int32 in the memory of ``cache_seqlens``; its size depends on batch size and device alone.
        pack_gqa: As given. Query heads are always packed.
        calls: Calls on this plan that need not be checked again; see ``repeat.py``.

    Example:
        >>> import cuflash, numpy as np
        >>> meta = cuflash.get_scheduler_metadata(2, 1, 4096, 32, 8, 128, np.array([4096, 100], np.int32))
        >>> int((meta.work()["key_end"] - meta.work()["key_begin"]).sum()) == 8 * (4096 + 100)
        True
    """

    problem: Problem
    device: Device
    tiling: Tiling
    num_blocks: int
    max_seqlen_k: int
    array: NativeArray
    pack_gqa: bool | None = None
    calls: repeat.Calls = field(default_factory=dict, init=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "calls": {}}  # a copy remembers no calls: they hold functions

    def work(self) -> NDArray[Any]:
        """List what each block reads. On a GPU this copies the plan to the host.

        Returns:
            A structured array with the fields block, sequence, kv_head, row_block, key_begin, key_end, sorted by block
            and in the order of reading. Keys are slots of the cache (leftpad included), ``key_end`` is exclusive. Each
            visible key of each (sequence, KV head, row block) stands in it exactly once. With ``split_size`` every
            part of an item has a line of its own.
        """
        array = to_host(self.array)
        problem, heads, row_blocks = self.problem, self.problem.num_heads_kv, self.tiling.row_blocks
        used = int(array[0])
        cuts = plan_cuts(array, problem.batch_size)[:used]
        leftpad, seqlen_k, seqlen_q = plan_sequences(array, problem.batch_size).astype(np.int64)
        begin, end = (
            np.tile(bound.reshape(-1, 1, row_blocks), (1, heads, 1)).ravel()  # (items,)
            for bound in visible_keys(problem, self.tiling, seqlen_k, seqlen_q)
        )

        # Every item begins a part, and every cut inside an item begins another.
        inside = np.flatnonzero(cuts["key"])
        cut_item, cut_key = cuts["item"][inside].astype(np.int64), cuts["key"][inside]
        item = np.arange(len(begin))
        block = np.searchsorted(cuts["item"] + (cuts["key"] > 0), item, side="right") - 1
        part_begin = np.insert(begin, cut_item + 1, cut_key)
        part_end = np.insert(end, cut_item, cut_key)
        block, item = np.insert(block, cut_item + 1, inside), np.insert(item, cut_item + 1, cut_item)
        some = part_begin < part_end
        part_begin, part_end, block, item = part_begin[some], part_end[some], block[some], item[some]

        if problem.split_size is not None:
            size = problem.split_size
            first, count = part_begin // size, -(-part_end // size) - part_begin // size
            part = np.repeat(np.arange(len(item)), count)
            number = np.arange(len(part)) - np.repeat(np.cumsum(count) - count, count) + first[part]
            part_begin = np.maximum(part_begin[part], number * size)
            part_end = np.minimum(part_end[part], (number + 1) * size)
            block, item = block[part], item[part]

        work = np.empty(len(item), WORK)
        work["block"], work["sequence"] = block, item // (heads * row_blocks)
        work["kv_head"], work["row_block"] = item // row_blocks % heads, item % row_blocks
        work["key_begin"] = part_begin + leftpad[work["sequence"]]
        work["key_end"] = part_end + leftpad[work["sequence"]]
        return work

    @property
    def efficiency(self) -> float:
        """Visible keys / (blocks of the plan, idle ones too, x longest share in keys); 1.0 when there are no keys."""
        shares = self._shares(self.work())
        return float(shares.sum() / (self.num_blocks * shares.max())) if shares.any() else 1.0

    @property
    def balance(self) -> float:
        """The same over the blocks that are used: how even their shares are."""
        shares = self._shares(self.work())
        return float(shares.sum() / (len(shares) * shares.max())) if shares.any() else 1.0

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the shares of the blocks, coloured by sequence. Needs matplotlib.

        Args:
            ax: Where to draw; a new figure without it.

        Returns:
            The axes.

        Raises:
            ImportError: Without matplotlib.
        """
        from .plotting import plot_schedule

        return plot_schedule(self, ax)

    def __repr__(self) -> str:
        p = self.problem
        return (
            f"SchedulerMetadata(batch_size={p.batch_size}, max_seqlen_q={p.max_seqlen_q}, num_heads_q={p.num_heads_q}, "
            f"num_heads_kv={p.num_heads_kv}, headdim={p.headdim}, qkv_dtype={p.qkv_dtype!r}, "
            f"num_blocks={self.num_blocks})"
        )

    def __str__(self) -> str:
        p, row_blocks = self.problem, self.tiling.row_blocks
        work = self.work()
        shares = self._shares(work)
        items = p.batch_size * p.num_heads_kv * row_blocks
        lines = [
            ("heads", f"{p.num_heads_q} query, {p.num_heads_kv} KV, dim {p.headdim}, {p.qkv_dtype}{_mask_name(p)}"),
            ("items", f"{items} ({p.num_heads_kv} KV heads x {row_blocks} row blocks of {self.tiling.rows} rows each)"),
            ("blocks", f"{len(shares)} used of {self.num_blocks} ({self.device.num_sm} SMs, sm_{self.device.arch})"),
            ("splits", _splits_summary(work, p.batch_size)),
        ]
        if shares.any():
            longest = shares.max()
            lines += [
                ("keys/block", f"min {shares.min()}, median {np.median(shares):.0f}, max {shares.max()}"),
                (
                    "efficiency",
                    f"{100 * shares.sum() / (self.num_blocks * longest):.1f} % (keys / blocks x longest share)",
                ),
                ("balance", f"{100 * shares.mean() / longest:.1f} % (the same over used blocks)"),
            ]
        title = f"Schedule of {p.batch_size} sequences x {p.max_seqlen_q} queries"
        return "\n".join([title, *(f"  {name:<10}  {text}" for name, text in lines)])

    def _shares(self, work: NDArray[Any]) -> NDArray[np.int64]:
        """Return the keys that each block with work reads, (blocks,)."""
        shares = np.zeros(int(to_host(self.array[:1])[0]), np.int64)
        np.add.at(shares, work["block"], work["key_end"] - work["key_begin"])
        # Items without keys are work too; but a cluster has its blocks also where its item leaves them nothing.
        return shares if self.tiling.cluster == 1 else shares[shares > 0]


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
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    *,
    split_size: int | None = None,
    kv_dtype: Any = None,
    out: SchedulerMetadata | None = None,
) -> SchedulerMetadata:
    """Plan a decode step, once for all layers.

    Names, order and meaning of the arguments are those of FlashAttention-3's function of this name. One kernel launch
    without a host sync for arrays on a GPU; on the host the plan is made for the GPU that ``CUFLASH_NUM_SM`` (default
    132) and ``CUFLASH_ARCH`` (default 90) describe.

    Args:
        batch_size: Number of sequences.
        max_seqlen_q: Query positions per sequence, with ``cu_seqlens_q`` the most.
        max_seqlen_k: Upper bound of the key lengths; not binding. It tells small problems, which run on clusters.
        num_heads_q: Query heads.
        num_heads_kv: KV heads; divides ``num_heads_q``.
        headdim: Elements of a query and key row: a multiple of 8 up to 256.
        cache_seqlens: (batch,) int32 keys in the cache before an append, or one int for all sequences.
        qkv_dtype: float16, bfloat16 or float32, as a string or dtype.
        headdim_v: Elements of a value row; default ``headdim``.
        cu_seqlens_q: (batch + 1,) int32 first query of each sequence: ragged queries.
        cu_seqlens_k_new: (batch + 1,) int32 first new key of each sequence: ragged append.
        cache_leftpad: (batch,) int32 first valid key of each sequence.
        page_size: Keys per page; None for a contiguous cache.
        max_seqlen_k_new: Keys that the call appends to every sequence; 0 without append.
        causal: Whether a row sees no key after its own position (bottom right aligned).
        window_size: (left, right) keys around a row's own position that it sees, -1 for all.
        attention_chunk: A row sees only its own chunk of this many keys; 0 for no chunks.
        has_softcap: Whether the call caps scores.
        num_splits: 0 balances freely, 1 never splits an item (sequence, KV head, row block), n splits it into n parts
            at most.
        pack_gqa: Accepted and remembered; query heads are always packed.
        sm_margin: Multiprocessors left free.
        split_size: Cut every sequence at multiples of this many keys (a multiple of 64): results are then bitwise the
            same in any batch.
        kv_dtype: Element type of the cache; default ``qkv_dtype``.
        out: A plan made for the same problem, to be refilled in place: no allocation and no sync, for CUDA graphs.

    Returns:
        The plan; ``out`` if given.

    Raises:
        TypeError: For an argument of a wrong kind.
        ValueError: For a wrong value or shape, or if ``out`` was made for another problem, naming the first field
            that differs. Values of arrays are checked on the host, and on a GPU under ``CUFLASH_VALIDATE=1``.

    Example:
        >>> import cuflash, numpy as np
        >>> lengths = np.array([4096, 100, 2048], np.int32)
        >>> meta = cuflash.get_scheduler_metadata(3, 1, 4096, 32, 8, 128, lengths, page_size=16, causal=True)
        >>> meta.efficiency > 0.9
        True
        >>> lengths += 1  # the next step
        >>> meta is cuflash.get_scheduler_metadata(3, 1, 4096, 32, 8, 128, lengths, page_size=16, causal=True, out=meta)
        True
    """
    signature = None
    if isinstance(out, SchedulerMetadata):
        arrays = {
            "cache_seqlens": cache_seqlens, "cache_leftpad": cache_leftpad, "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k_new": cu_seqlens_k_new,
        }  # fmt: skip
        options = (
            batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, qkv_dtype, headdim_v, page_size,
            max_seqlen_k_new, causal, attention_chunk, has_softcap, num_splits, pack_gqa, sm_margin, split_size,
            kv_dtype,
        )  # fmt: skip
        signature, refill = repeat.find(out.calls, tuple(arrays.values()), options, window_size)
        if refill is not None:
            out.max_seqlen_k = max_seqlen_k
            refill(arrays, out.array)
            return out

    problem = make_problem(
        batch_size,
        max_seqlen_q,
        num_heads_q,
        num_heads_kv,
        headdim,
        qkv_dtype=qkv_dtype,
        kv_dtype=kv_dtype,
        headdim_v=headdim_v,
        cu_seqlens_q=cu_seqlens_q is not None,
        page_size=page_size,
        max_seqlen_k_new=max_seqlen_k_new,
        cu_seqlens_k_new=cu_seqlens_k_new is not None,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        has_softcap=has_softcap,
        num_splits=num_splits,
        split_size=split_size,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
    )
    max_seqlen_k = integer("max_seqlen_k", max_seqlen_k, 0)
    lengths = make_lengths(problem, cache_seqlens, cu_seqlens_q, cu_seqlens_k_new, cache_leftpad)
    if signature is not None and any(getattr(lengths, name) is not array for name, array in arrays.items()):
        signature = None  # one had to be copied
    metadata, refill = make_metadata(problem, lengths, max_seqlen_k, pack_gqa, out)
    if refill is not None:
        repeat.remember(metadata.calls, signature, refill)
    return metadata


def compile(scheduler_metadata: SchedulerMetadata) -> int:
    """Compile and load all kernels that calls on a plan will launch, before the first call: for a server's start.

    Kernels are compiled when they are first used (some 0.5 s each) and kept by content in a disk cache, CuPy's on a
    GPU, so that another process loads them in milliseconds. A CUDA graph must be captured after its kernels are loaded.

    Args:
        scheduler_metadata: A plan, for whatever lengths.

    Returns:
        How many kernels had not been loaded by this process: 0 if all were there, and always 0 with NumPy.

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
    return int(backend.prepare(kernels.variants(scheduler_metadata.problem, scheduler_metadata.tiling), array))


def make_metadata(
    problem: Problem,
    lengths: Lengths,
    max_seqlen_k: int,
    pack_gqa: bool | None = None,
    out: SchedulerMetadata | None = None,
) -> tuple[SchedulerMetadata, Refill | None]:
    """Plan ``problem`` for ``lengths`` on the backend that they belong to; the arguments are checked.

    Args:
        problem: The problem.
        lengths: The lengths.
        max_seqlen_k: Upper bound of the key lengths.
        pack_gqa: As given.
        out: A plan to refill.

    Returns:
        The plan, and on a GPU what fills a plan of this problem again.

    Raises:
        TypeError: If ``out`` is not a plan.
        ValueError: If ``out`` was made for something else, or the problem has more items than an int32 can number.
    """
    backend = backends.select(lengths.cache_seqlens)
    if pack_gqa is not None:
        pack_gqa = boolean("pack_gqa", pack_gqa)
    device = backend.device(lengths.cache_seqlens)
    # A refilled plan keeps its tiles: a graph may have been captured with them.
    tiles = out.tiling if isinstance(out, SchedulerMetadata) else tiling(problem, device, max_seqlen_k)
    items = problem.batch_size * problem.num_heads_kv * tiles.row_blocks
    if max(items, problem.rows) >= _MAX_ITEMS:
        raise ValueError(
            f"batch_size * num_heads_kv * row blocks and max_seqlen_q * num_heads_q / num_heads_kv must be less than "
            f"2**30, got {items} and {problem.rows}"
        )
    num_blocks = tiles.max_blocks(problem, device)
    if out is None:
        array = empty((plan_words(problem.batch_size, device),), np.int32, lengths.cache_seqlens)
        out = SchedulerMetadata(problem, device, tiles, num_blocks, max_seqlen_k, array, pack_gqa)
    else:
        _check_out(out, problem, device, pack_gqa, memory_of(lengths.cache_seqlens))
        out.max_seqlen_k = max_seqlen_k
    launches = backend.plan(problem, tiles, num_blocks, lengths, out.array)
    return out, None if launches is None else Refill(backend, launches, out.array.shape)


@dataclass(frozen=True)
class Refill:
    """Fills plans of one problem, whose arguments have been checked.

    Attributes:
        backend: The backend that does it.
        launches: What the backend launches.
        shape: (words,) of a plan's array.
    """

    backend: Any
    launches: Any
    shape: tuple[int, ...]

    def __call__(self, arrays: dict[str, Any], array: NativeArray) -> None:
        """Fill ``array``; ``arrays`` holds the lengths by the names of the arguments, and then the plan, too."""
        arrays["plan"] = array
        self.backend.repeat(self.launches, arrays)


def make_lengths(
    problem: Problem,
    cache_seqlens: Any,
    cu_seqlens_q: Any = None,
    cu_seqlens_k_new: Any = None,
    cache_leftpad: Any = None,
) -> Lengths:
    """Import the lengths of a step and check them.

    Args:
        problem: The problem they belong to.
        cache_seqlens: (batch,) or one int.
        cu_seqlens_q: (batch + 1,) or None.
        cu_seqlens_k_new: (batch + 1,) or None.
        cache_leftpad: (batch,) or None.

    Raises:
        TypeError: If one is not an array of integers.
        ValueError: For a wrong shape, and for values that contradict each other, naming the argument.
    """
    batch = problem.batch_size
    q_starts = _index("cu_seqlens_q", cu_seqlens_q, batch + 1)
    new_starts = _index("cu_seqlens_k_new", cu_seqlens_k_new, batch + 1)
    leftpad = _index("cache_leftpad", cache_leftpad, batch)
    others = [array for array in (q_starts, new_starts, leftpad) if array is not None]
    if isinstance(cache_seqlens, (int, np.integer)):
        number = integer("cache_seqlens", cache_seqlens, 0)
        seqlens = empty((batch,), np.int32, others[0] if others else np.empty(0))
        seqlens[...] = number
    else:
        seqlens = _index("cache_seqlens", cache_seqlens, batch)
    lengths = Lengths(seqlens, q_starts, new_starts, leftpad)
    if any(memory_of(array) != memory_of(seqlens) for array in others):
        raise ValueError("cache_seqlens, cu_seqlens_q, cu_seqlens_k_new and cache_leftpad must be in one memory")
    if checks_values(is_on_device(seqlens)):
        _check_values(problem, lengths)
    return lengths


def _index(name: str, x: Any, size: int) -> NativeArray | None:
    """Import an index array of one dimension; None stays None except for ``cache_seqlens``."""
    if x is None and name != "cache_seqlens":
        return None
    array = import_index(name, x)
    if array.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {array.shape}")
    return array if array.flags.c_contiguous else array.copy()


def _check_values(problem: Problem, lengths: Lengths) -> None:
    seqlens = to_host(lengths.cache_seqlens)
    _refuse("cache_seqlens", "be at least 0", seqlens, seqlens < 0)
    if lengths.cache_leftpad is not None:
        leftpad = to_host(lengths.cache_leftpad)
        _refuse("cache_leftpad", "be at least 0", leftpad, leftpad < 0)
        _refuse("cache_leftpad", "be at most cache_seqlens", leftpad, leftpad > seqlens)
    for name in ("cu_seqlens_q", "cu_seqlens_k_new"):
        array = getattr(lengths, name)
        if array is not None:
            starts = to_host(array)
            _refuse(name, "begin with 0", starts, starts[:1] != 0)
            steps = np.diff(starts.astype(np.int64))
            _refuse(name, "never decrease", starts, steps < 0)
            if name == "cu_seqlens_q":
                _refuse(name, f"grow by at most max_seqlen_q={problem.max_seqlen_q}", starts,
                        steps > problem.max_seqlen_q)  # fmt: skip


def _refuse(name: str, rule: str, values: NDArray[np.int32], wrong: NDArray[np.bool_]) -> None:
    """Raise ValueError if any entry is wrong, showing the first one."""
    if wrong.any():
        index = int(wrong.argmax())
        step = f", {values[index + 1]}" if len(wrong) < len(values) and len(wrong) > 1 else ""
        raise ValueError(f"{name} must {rule}, got {values[index]}{step} at [{index}]")


def _check_out(out: SchedulerMetadata, problem: Problem, device: Device, pack_gqa: bool | None, memory: str) -> None:
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


def _mask_name(problem: Problem) -> str:
    left, right = problem.window
    names = ["causal"] if problem.causal else []
    if left >= 0 or right > 0:
        names.append(f"window ({left}, {right})")
    if problem.attention_chunk:
        names.append(f"chunks of {problem.attention_chunk}")
    return "".join(f", {name}" for name in names)


def _splits_summary(work: NDArray[Any], batch_size: int) -> str:
    """Say into how many parts the items of each sequence are cut, the most of its items."""
    new_item = np.ones(len(work), bool)  # the parts of an item follow each other
    for name in ("sequence", "kv_head", "row_block"):
        new_item[1:] &= work[name][1:] == work[name][:-1]
    new_item[1:] ^= True
    starts = np.flatnonzero(new_item)
    most = np.zeros(batch_size, np.int64)
    np.maximum.at(most, work["sequence"][starts], np.diff(starts, append=len(work)))
    if batch_size <= 8:
        return "per sequence " + (", ".join(map(str, most)) or "none")
    counts, sequences = np.unique(most, return_counts=True)
    if len(counts) <= 8:
        return "sequences by parts " + ", ".join(f"{c}: {s}" for c, s in zip(counts, sequences, strict=True))
    return f"per sequence min {most.min()}, median {np.median(most):.0f}, max {most.max()}"
