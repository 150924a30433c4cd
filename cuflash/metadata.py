"""SchedulerMetadata: a plan, what it was made for, and what can be read from it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .arrays import to_host
from .device import Device
from .memo import Calls, Plan
from .memory import NativeArray
from .partition import Partition
from .planner import plan_cuts, plan_sequences, row_blocks_at, visible_keys
from .problem import Problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


@dataclass(eq=False, repr=False)
class SchedulerMetadata(Plan):
    """A plan, and what it was made for. Every layer of the step takes the same one.

    The lengths in it are advisory: a plan made for other lengths makes a call slower, never wrong. The problem is
    binding. Kernels only read ``array``.

    Attributes:
        problem: The problem the plan was made for; a call with another one raises ValueError.
        device: The GPU it was made for.
        partition: The kernel family that runs it, and how that cuts the problem. It follows from the problem, the
            device and the first ``max_seqlen_k``; refills keep it, since a graph may have been captured with it.
        max_seqlen_k: Upper bound of the key lengths as given last; not binding.
        array: (words,) int32 in the memory of ``cache_seqlens``; its size depends on batch size and device alone.
        pack_gqa: As given. Query heads are always packed.
        appends: Whether the plan was made for a call with new keys; not binding.

    Example:
        >>> import cuflash, numpy as np
        >>> lengths = np.array([4096, 100], np.int32)
        >>> meta = cuflash.get_scheduler_metadata(2, 1, 4096, 32, 8, 128, lengths)
        >>> int((meta.work()["key_end"] - meta.work()["key_begin"]).sum()) == 8 * (4096 + 100)
        True
    """

    problem: Problem
    device: Device
    partition: Partition
    max_seqlen_k: int
    array: NativeArray
    pack_gqa: bool | None = None
    appends: bool = False
    # What calls have left here, for themselves: who need not be checked again (memo.py), and small arrays that captured
    # graphs may use, by (size, number).
    calls: Calls = field(default_factory=Calls, init=False)
    kept: dict[tuple[int, int], NativeArray] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._first_max_seqlen_k, self._has_warned = self.max_seqlen_k, False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "calls": Calls(), "kept": {}}  # a copy remembers no calls: they hold functions

    @property
    def num_blocks(self) -> int:
        """Thread blocks that the plan was made for, the largest grid."""
        return self.partition.num_blocks

    def work(self) -> NDArray[Any]:
        """List what each block reads. On a GPU this copies the plan to the host.

        Returns:
            A structured array with the fields block, sequence, kv_head, row_block, key_begin, key_end, sorted by block
            and in the order of reading. Keys are slots of the cache (leftpad included), ``key_end`` is exclusive. Each
            visible key of each (sequence, KV head, row block) stands in it exactly once. With ``split_size`` every
            split of an item has a line of its own.
        """
        array = to_host(self.array)
        problem, heads, row_blocks = self.problem, self.problem.num_heads_kv, self.partition.row_blocks
        used = int(array[0])
        cuts = plan_cuts(array, problem.batch_size)[:used]
        leftpad, seqlen_k, seqlen_q = plan_sequences(array, problem.batch_size).astype(np.int64)
        begin, end = (
            np.tile(bound.reshape(-1, 1, row_blocks), (1, heads, 1)).ravel()  # (items,)
            for bound in visible_keys(problem, self.partition, seqlen_k, seqlen_q)
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
        work["kv_head"] = item // row_blocks % heads
        work["row_block"] = row_blocks_at(problem, self.partition, seqlen_q)[work["sequence"], item % row_blocks]
        work["key_begin"] = part_begin + leftpad[work["sequence"]]
        work["key_end"] = part_end + leftpad[work["sequence"]]
        return work

    @property
    def efficiency(self) -> float:
        """How well blocks are used, as visible keys / (``num_blocks`` x longest share in keys); 1 without keys."""
        return _evenness(self._shares(self.work()), self.num_blocks)

    @property
    def balance(self) -> float:
        """How even the shares are, as visible keys / (used blocks x longest share in keys); 1 without keys.

        A block is used if it has items, which may all be without keys and are then not in :meth:`work`; a block of a
        cluster if it reads keys.
        """
        shares = self._shares(self.work())
        return _evenness(shares, len(shares))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the shares of the blocks, coloured by sequence. Needs matplotlib.

        Args:
            ax: Where to draw; a new figure without it.

        Returns:
            The axes.

        Raises:
            ImportError: Without matplotlib.
        """
        from .plotting import plot_work

        p, work = self.problem, self.work()
        used = int(work["block"].max(initial=-1)) + 1
        title = (
            f"{p.batch_size} sequences, {p.num_heads_q}/{p.num_heads_kv} heads on {used} of {self.num_blocks} blocks: "
            f"efficiency {100 * self.efficiency:.1f} %"
        )
        return plot_work(work, max(1, used), ax, title=title)

    def __repr__(self) -> str:
        p = self.problem
        return (
            f"SchedulerMetadata(batch_size={p.batch_size}, max_seqlen_q={p.max_seqlen_q}, num_heads_q={p.num_heads_q}, "
            f"num_heads_kv={p.num_heads_kv}, headdim={p.headdim}, qkv_dtype={p.qkv_dtype!r}, "
            f"num_blocks={self.num_blocks})"
        )

    def __str__(self) -> str:
        p, rows, row_blocks = self.problem, self.partition.rows, self.partition.row_blocks
        work = self.work()
        shares = self._shares(work)
        items = p.batch_size * p.num_heads_kv * row_blocks
        lines = [
            ("heads", f"{p.num_heads_q} query, {p.num_heads_kv} KV, dim {p.headdim}, {_dtypes(p)}{_mask_name(p)}"),
            ("kernel", f"{self.partition.family}, row blocks of {rows} rows"),
            ("items", f"{items} ({p.num_heads_kv} KV heads x {row_blocks} row blocks each)"),
            ("blocks", f"{len(shares)} used of {self.num_blocks} ({self.device.num_sm} SMs, sm_{self.device.arch})"),
            ("splits", _splits_summary(work, p.batch_size)),
        ]
        if shares.any():
            efficiency, balance = _evenness(shares, self.num_blocks), _evenness(shares, len(shares))
            lines += [
                ("keys/block", f"min {shares.min()}, median {np.median(shares):.0f}, max {shares.max()}"),
                ("efficiency", f"{100 * efficiency:.1f} % (keys / all blocks x longest share)"),
                ("balance", f"{100 * balance:.1f} % (keys / used blocks x longest share)"),
            ]
        title = f"Schedule of {p.batch_size} sequences x {p.max_seqlen_q} queries"
        return "\n".join([title, *(f"  {name:<10}  {text}" for name, text in lines)])

    def _shares(self, work: NDArray[Any]) -> NDArray[np.int64]:
        """Return the keys that each used block reads, (blocks,)."""
        shares = np.zeros(int(to_host(self.array[:1])[0]), np.int64)
        np.add.at(shares, work["block"], work["key_end"] - work["key_begin"])
        # Items without keys are work too; but a cluster has its blocks also where its item leaves them nothing.
        return shares if self.partition.cluster == 1 else shares[shares > 0]


def lengthen(plan: SchedulerMetadata, max_seqlen_k: int) -> None:
    """Take the bound of a refill; warn once if it exceeds that which the plan's tiles were chosen for."""
    plan.max_seqlen_k = max_seqlen_k
    if max_seqlen_k > plan._first_max_seqlen_k and not plan._has_warned:
        plan._has_warned = True
        warnings.warn(
            f"max_seqlen_k={max_seqlen_k} exceeds {plan._first_max_seqlen_k}, for which this plan chose its tiles: "
            f"it stays right, but a plan made for the longest keys to come may be much faster",
            RuntimeWarning,
            stacklevel=5,
        )


def _evenness(shares: NDArray[np.int64], blocks: int) -> float:
    return float(shares.sum() / (blocks * shares.max())) if shares.any() else 1.0


def _dtypes(problem: Problem) -> str:
    return f"{problem.qkv_dtype} on {problem.kv_dtype}" if problem.is_quantised else problem.qkv_dtype


def _mask_name(problem: Problem) -> str:
    left, right = problem.window_size
    names = ["causal"] if right == 0 else []
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
