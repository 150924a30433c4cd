"""ContextParallel: the two functions of the library for sequences whose keys lie on several ranks."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np

from .. import arguments, backends
from ..arguments.common import expect_apart, expect_shape, import_codes, output
from ..arrays import check_way_back, checks_values, empty, exporter, import_array, refuse_in_capture
from ..attention import flash_attn_with_kvcache
from ..dtypes import FLOAT_DTYPES, dtype_name, numpy_dtype
from ..kernels.exchange import exchange_launch, half_bytes
from ..mask import Shard
from ..memory import NativeArray, is_on_device, memory_of
from ..metadata import SchedulerMetadata
from ..packing import Packing
from ..problem import boolean, integer, real
from ..scheduling import get_scheduler_metadata
from .agreement import Description, agree, describe_kind, describe_lengths, describe_operands, describe_problem
from .fault import ContextParallelError
from .mpi import MpiTransport
from .nccl import NcclTransport

_INT32_MAX = 2**31 - 1
_PLACE = ("cp_world_size", "cp_rank", "cp_interleave")
_signatures = {function: inspect.signature(function) for function in (get_scheduler_metadata, flash_attn_with_kvcache)}


class ContextParallel:
    """Attention to sequences whose keys lie on several ranks: every rank attends to its own, results are merged.

    Position p of a sequence lives in the cache of rank ``(p // interleave) % world_size``, in order. ``plan`` and
    ``attend`` take the arguments of ``get_scheduler_metadata`` and ``flash_attn_with_kvcache``; all ranks make the same
    calls. Lengths, queries, new keys and masks are those of whole sequences and the same everywhere; caches, page
    tables and ``cache_batch_idx`` are the rank's own. Each rank writes those of the new keys that it holds. Sinks and
    ``merge_with`` count once: what rank 0 gives.

    A call packs each rank's outputs and LSE into one block per peer, makes one exchange, and merges what has come. The
    parts are merged in the order of the ranks, so that repeated runs are bitwise the same. On a GPU calls of a group
    follow each other on one stream.

    Ranks that disagree, fail or are missing end in a :class:`ContextParallelError` on every other rank, within
    ``timeout`` and by name; then the group refuses further calls. Plans are compared once, calls on host arrays always,
    and calls on a GPU if ``CUFLASH_VALIDATE=1``, since that means to wait. Used as a context manager, a group also
    tells the others when its block ends by an error of any kind.

    Attributes:
        rank: This rank.
        world_size: Ranks.
        shard: Which positions this rank holds: ``shard.held(n)`` is how many of the first n.
        exchange: "direct" or "collective", how results travel.

    Example:
        >>> import cuflash, numpy as np
        >>> from mpi4py import MPI  # doctest: +SKIP
        >>> with cuflash.ContextParallel(MPI.COMM_WORLD, interleave=16) as group:  # doctest: +SKIP
        ...     meta = group.plan(1, 1, 4096, 32, 8, 128, lengths, qkv_dtype="float16")
        ...     out = group.attend(q, k_cache, v_cache, cache_seqlens=lengths, scheduler_metadata=meta)
    """

    def __init__(
        self,
        comm: Any,
        *,
        interleave: int = 1,
        queries: str = "replicated",
        heads: str = "share",
        wire_dtype: Any = None,
        exchange: str = "auto",
        timeout: float = 30.0,
        control: Any = None,
    ) -> None:
        """Make a group of all ranks of a communicator; every rank does it at once.

        Args:
            comm: An mpi4py communicator, for host arrays, or an ``nccl.core.Communicator`` of nccl4py, for GPU arrays.
                Whoever made it also destroys it, after the CUDA graphs that use it.
            interleave: Neighbouring positions that a rank holds.
            queries: "replicated": every rank has the queries of all heads. "share": the rank's share of them, in the
                order of the ranks, which are gathered first.
            heads: "share": a rank gets the results of its share of the query heads. "all": every rank gets all.
            wire_dtype: Elements of outputs between ranks: float16, bfloat16 or float32; by default those of the
                queries. Only float32 queries can have others than their own.
            exchange: How results travel between GPUs. "collective": by NCCL. "direct": each GPU writes into the others'
                memory, which takes one host whose GPUs reach each other. "auto": direct where it works, else the
                collective; the attribute says which.
            timeout: Seconds that ranks wait for each other.
            control: With nccl4py, an mpi4py communicator of the same ranks that carries what the hosts say to each
                other. Without it that goes through NCCL, which cannot tell which rank is missing.

        Raises:
            TypeError: If ``comm`` is neither.
            ValueError: For a wrong option.
            ContextParallelError: If ranks are missing, or have other options or another version.
        """
        options = {
            "queries": (queries, ("replicated", "share")),
            "heads": (heads, ("share", "all")),
            "exchange": (exchange, ("auto", "direct", "collective")),
        }
        for name, (value, known) in options.items():
            if value not in known:
                raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")
        timeout = real("timeout", timeout)
        if timeout <= 0:
            raise ValueError(f"timeout must be above 0, got {timeout}")
        interleave = integer("interleave", interleave, 1, _INT32_MAX)
        self._queries, self._heads, self._wire = queries, heads, None
        if wire_dtype is not None:
            name = dtype_name("wire_dtype", wire_dtype)
            if name not in FLOAT_DTYPES:
                raise ValueError(f"wire_dtype must be one of {', '.join(FLOAT_DTYPES)}, got {name}")
            self._wire = numpy_dtype(name)
        self._fault: str | None = None
        self._calls = 0
        self._memory: dict[tuple[str, tuple[int, ...], str, str], NativeArray] = {}
        self._transport = _transport(comm, control, timeout)
        self.rank, self.world_size = self._transport.rank, self._transport.size
        with self._together():
            interleave = integer("interleave", interleave, 1, _INT32_MAX // self.world_size)
            self.shard = Shard(self.world_size, self.rank, interleave)
            from .. import __version__

            self._agree({
                "call": "ContextParallel", "version": __version__, "world_size": self.world_size,
                "interleave": interleave, "queries": queries, "heads": heads,
                "wire_dtype": None if self._wire is None else self._wire.name, "exchange": exchange,
                "timeout": timeout, "CUFLASH_VALIDATE": os.environ.get("CUFLASH_VALIDATE", "0"),
            })  # fmt: skip
            self._inboxes = None
            if exchange != "collective" and self._transport.on_device:
                self._inboxes = self._transport.open_inboxes()
            self.exchange = "collective" if self._inboxes is None else "direct"
            if exchange not in ("auto", self.exchange):
                raise ContextParallelError("exchange='direct' takes GPUs of one host that reach each other's memory",
                                           is_known=True)  # fmt: skip

    def plan(self, *args: Any, **kwargs: Any) -> SchedulerMetadata:
        """Plan a step; see ``get_scheduler_metadata``.

        The ranks compare problem and lengths. On a GPU the lengths are compared under ``CUFLASH_VALIDATE=1``, and a
        refill (``out=``) compares nothing without it: it may be part of a CUDA graph.

        Args:
            *args: Those of ``get_scheduler_metadata``.
            **kwargs: Likewise. Lengths and ``num_heads_q`` are whole ones.

        Returns:
            The plan of this rank's keys; ``out`` if given.

        Raises:
            ContextParallelError: If ranks disagree, or do not answer.
        """
        given = self._bind(get_scheduler_metadata, args, kwargs)
        with self._together():
            plan = get_scheduler_metadata(**given)
            validates = checks_values(is_on_device(plan.array))
            if validates or given["out"] is None:
                description = {"call": "plan", "refills": given["out"] is not None, **describe_problem(plan.problem)}
                if validates:
                    # Ints become arrays as those of a call do; the plan has been made of checked ones.
                    description |= describe_lengths(arguments.lengths(plan.problem, given, given["max_seqlen_k_new"]))
                self._agree(description)
            return plan

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        """Attend to all keys of all ranks; see ``flash_attn_with_kvcache``.

        Args:
            *args: Those of ``flash_attn_with_kvcache``.
            **kwargs: Likewise. ``q`` has all heads, or the rank's share of them (``queries``); ``out`` and
                ``softmax_lse`` have the rank's share of the heads, or all (``heads``), and are contiguous; ``sinks``
                and ``merge_with`` have all.

        Returns:
            The merged output of the rank's share of the heads, or of all; with ``return_softmax_lse`` also its LSE.

        Raises:
            ContextParallelError: If ranks disagree, have failed, or do not answer. The output is not written then; new
                keys may have been.
        """
        given = self._bind(flash_attn_with_kvcache, args, kwargs)
        boolean("return_softmax_lse", given["return_softmax_lse"])
        with self._together():
            return self._attend(given)

    def wait(self) -> None:
        """Wait for what this rank has put on its GPU's current stream, at most for the group's timeout.

        A rank that is missing makes the stream of the others wait for ever: this finds out. On host arrays nothing is
        ever under way.

        Raises:
            ContextParallelError: At the deadline. All results since the last wait are garbage then.
        """
        with self._together():
            self._transport.wait()

    def close(self) -> None:
        """End the group; all ranks do it at once. Further calls are refused."""
        with self._together():
            self._transport.wait()  # other ranks' GPUs may still write to this one's
            self._agree({"call": "close"})
        self._fault = "it has been closed"
        self._transport.close()

    def __enter__(self) -> ContextParallel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._fail(error)
        elif self._fault is None:
            self.close()

    # -------------------------------------------------------------------------------------------- faults
    @contextmanager
    def _together(self) -> Iterator[None]:
        """Run what all ranks do at once; an error ends the group, here and everywhere."""
        if self._fault is not None:
            raise ContextParallelError(f"this group refuses calls: {self._fault}", is_known=True)
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        if self._fault is None:
            is_ours = isinstance(error, ContextParallelError)
            self._fault = str(error) if is_ours else f"{type(error).__name__}: {error}"
            if is_ours and error.is_known:  # type: ignore[attr-defined]
                self._transport.end_with_care()
            else:
                self._transport.tell(self._fault)

    def _agree(self, description: Description) -> None:
        self._calls += 1
        agree(self._transport, {**description, "number of the call": self._calls})

    # -------------------------------------------------------------------------------------------- a call
    def _bind(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments by name, with the group's own place among the ranks."""
        bound = _signatures[function].bind(*args, **kwargs)
        for name in _PLACE:
            if name in bound.arguments:
                raise TypeError(f"{name} is the group's, and must not be given")
        bound.apply_defaults()
        shard = self.shard
        return bound.arguments | dict(zip(_PLACE, (shard.world_size, shard.rank, shard.interleave)))

    def _attend(self, given: dict[str, Any]) -> Any:
        like = given["q"]
        q, codes = import_codes("q", like, "float8_e4m3fn")
        dtype = q.dtype if codes is None else numpy_dtype("bfloat16")  # of outputs
        if is_on_device(q) != self._transport.on_device:
            places = ("in host memory", "on a GPU")
            raise ValueError(
                f"q must be {places[self._transport.on_device]}, where the communicator's arrays are, "
                f"got one {places[is_on_device(q)]}"
            )
        v_cache = import_array("v_cache", given["v_cache"])
        for name, array, dimensions in (("q", q, (3, 4)), ("v_cache", v_cache, (4,))):
            if array.ndim not in dimensions:
                rule = " or ".join(map(str, dimensions))
                raise ValueError(f"{name} must have {rule} dimensions, got shape {array.shape}")
        if self._queries == "share":
            q = self._gather_queries(q, v_cache.shape[-1], given)
        parts = self.world_size if self._heads == "share" else 1
        num_heads, headdim_v = q.shape[-2], v_cache.shape[-1]
        if num_heads % parts:
            raise ValueError(
                f'q must have a multiple of {parts} heads, a share per rank, got {num_heads}: or heads="all"'
            )
        packing = Packing(q.shape[:-2], num_heads // parts, headdim_v, self._wire_dtype(dtype))
        out = output("out", given["out"], q, packing.out_shape, dtype)
        lse = output("softmax_lse", given["softmax_lse"], q, packing.lse_shape, np.dtype(np.float32))
        for name, array in (("out", out), ("softmax_lse", lse)):
            if given[name] is None:
                check_way_back("q", like, array)
            else:  # q and merge_with have been read when results are written
                expect_apart(name, array, {x: given[x] for x in given if x not in (name, "q", "merge_with")})

        blocks = self._kept("send", (parts, packing.nbytes), np.uint8, q)
        partial, partial_lse = packing.in_place(blocks)
        is_packed = packing.dtype == dtype
        if not is_packed:
            partial = self._kept("out", partial.shape, dtype, q)
            partial_lse = self._kept("softmax_lse", partial_lse.shape, np.float32, q)
        self._attend_here(given | {"q": q, "out": partial, "softmax_lse": partial_lse, "return_softmax_lse": True})
        if not is_packed:
            packing.fill(blocks, partial, partial_lse)

        if packing.nbytes:
            self._exchange(packing, blocks, out, lse)
        results = [
            mine if (mine := given[name]) is not None else exporter(like)(array)
            for name, array in (("out", out), ("softmax_lse", lse))
        ]
        return tuple(results) if given["return_softmax_lse"] else results[0]

    def _exchange(self, packing: Packing, blocks: NativeArray, out: NativeArray, lse: NativeArray) -> None:
        """Send each rank its block, and merge what comes from all into ``out`` and ``lse``."""
        size, parts = self.world_size, len(blocks)
        if self._inboxes is not None and packing.dtype == out.dtype:
            inbox = self._inboxes.open(half_bytes(packing, size))
            launch = exchange_launch(packing, self.rank, size, parts > 1, inbox.half_bytes)
            backends.select(out).exchange(launch, {
                "partial": blocks, "inbox": inbox.memory, "inboxes": inbox.addresses, "stop": self._inboxes.stop,
                "out": out, "softmax_lse": lse,
            })  # fmt: skip
            return
        received = self._kept("received", (size, packing.nbytes), np.uint8, blocks)
        if parts == 1:
            self._transport.all_gather(blocks[0], received)
        else:
            self._transport.all_to_all(blocks, received)
        merge_blocks(packing.outs(received), packing.lses(received), out, lse)

    def _attend_here(self, given: dict[str, Any]) -> None:
        """Attend to this rank's keys, after the ranks have agreed about the call."""
        counted_once = {name: given[name] is not None for name in ("sinks", "merge_with")}
        if self.rank:
            given |= dict.fromkeys(counted_once)
        if checks_values(self._transport.on_device):
            problem, operands = arguments.attention(given, arguments.plan_of(given["scheduler_metadata"]))
            self._agree({"call": "attend", **describe_problem(problem), **describe_operands(operands), **counted_once})
        flash_attn_with_kvcache(**given)

    def _gather_queries(self, q: NativeArray, headdim_v: int, given: dict[str, Any]) -> NativeArray:
        """Return the queries of all heads, and put the ``qv`` of all heads in its place."""
        qv = given["qv"]
        shares = [q] if qv is None else [q, import_array("qv", qv)]
        for share in shares[1:]:
            expect_shape("qv", share, (*q.shape[:-1], headdim_v))
        if checks_values(self._transport.on_device):
            self._agree({"call": "attend", "q and qv": [describe_kind(share) for share in shares]})
        # Side by side, so that there is one exchange.
        dims = [share.shape[-1] for share in shares]
        send = self._kept("queries", (*q.shape[:-1], sum(dims)), q.dtype, q)
        send[..., : dims[0]] = q
        if qv is not None:
            send[..., dims[0] :] = shares[1]
        received = self._kept("all queries", (self.world_size, send.nbytes), np.uint8, q)
        if send.size:
            self._transport.all_gather(send.reshape(-1).view(np.uint8), received)
        axes = len(q.shape) - 2
        by_rank = received.view(q.dtype).reshape(self.world_size, *send.shape)  # (ranks, *rows, heads, dims)
        by_head = by_rank.transpose(*range(1, axes + 1), 0, axes + 1, axes + 2)
        heads = self.world_size * q.shape[-2]
        whole = self._kept("whole queries", (*q.shape[:-2], heads, sum(dims)), q.dtype, q)
        whole.reshape(by_head.shape)[...] = by_head
        if qv is not None:
            given["qv"] = whole[..., dims[0] :]
        return whole[..., : dims[0]]

    def _wire_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        if self._wire is None or self._wire == dtype:
            return dtype
        if dtype.name != "float32":
            raise ValueError(f"wire_dtype must be that of the queries unless they are float32, got {self._wire.name} "
                             f"for {dtype.name}: a rank's results have no more bits than its queries")  # fmt: skip
        return self._wire

    def _kept(self, name: str, shape: tuple[int, ...], dtype: Any, like: NativeArray) -> NativeArray:
        """Return memory for a call; on a GPU the group keeps it for calls of these shapes, since graphs may use it."""
        if not is_on_device(like):
            return empty(shape, dtype, like)
        key = (name, shape, np.dtype(dtype).name, memory_of(like))
        array = self._memory.get(key)
        if array is None:
            refuse_in_capture("the group", "have made a call of these shapes")
            array = self._memory[key] = empty(shape, dtype, like)
        return array


def merge_blocks(outs: NativeArray, lses: NativeArray, out: NativeArray, lse: NativeArray) -> None:
    """Merge what the ranks have sent, in their order."""
    if outs.dtype != out.dtype:
        outs = outs.astype(out.dtype)
    if out.ndim == 3:  # the merge knows batches only
        outs, lses, out, lse = outs[:, None], lses[:, None], out[None], lse[None]
    backends.select(out).merge(outs, lses, None, out, lse, False)


def _transport(comm: Any, control: Any, timeout: float) -> Any:
    """Return what carries the bytes of a communicator."""
    origin = type(comm).__module__.partition(".")[0]
    if origin == "mpi4py":
        if control is not None:
            raise ValueError("control must be None for an mpi4py communicator, which carries all messages")
        return MpiTransport(comm, timeout)
    if origin == "nccl":
        return NcclTransport(comm, None if control is None else MpiTransport(control, timeout), timeout)
    raise TypeError(f"comm must be a communicator of mpi4py or nccl4py, got {type(comm).__name__}")
