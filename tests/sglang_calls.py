"""Calls as sglang's FlashAttention backend makes them, on torch tensors, and what they must give.

Written from what that backend does, not from its code (sgl-project/sglang, ``flashattention_backend.py`` of its
attention layers): a pool of token slots, of which a request has pages; slot 0 belongs to nobody, and padding reads
it. Every call is held against one that lists the slots that each query sees, so that masks, cascades and virtual
batches have nothing in common with their answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference

from cuflash.compat import scheduler_metadata_size
from cuflash.compat.sgl_kernel import merge_state_v2
from cuflash.compat.sgl_kernel.flash_attn import (
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)

HEADS, KV_HEADS, DIM, CONTEXT = 8, 2, 64, 256
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
EXTENDED = (30, 1, 37, 5)  # new tokens of the requests of an extend
SCALES = np.array([0.5, 1.75], np.float32)  # of a quantised pool, one per KV head
Seen = list[np.ndarray]  # for every query the slots that it sees


def to_numpy(x: Any) -> np.ndarray:
    """Return a tensor's values, also of dtypes that NumPy does not have."""
    host, name = x.detach().cpu(), str(x.dtype).removeprefix("torch.")
    if hasattr(ml_dtypes, name):
        import torch

        return host.view(torch.uint8).numpy().view(getattr(ml_dtypes, name))
    return host.numpy()


@dataclass
class Server:
    """Requests with a pool of keys and values in one layer.

    Attributes:
        torch: The module.
        device: Where all tensors lie.
        dtype: Name of the pool's and the queries' dtype.
        page_size: Slots of a page.
        lengths: Tokens of each request.
        seed: Of all random numbers.
        scale: Factor of the scores.
        softcap: Cap of the scores.
        in_graph: Whether calls are captured by ``torch.cuda.graph``, and what counts is a replay.
    """

    torch: Any
    device: str
    dtype: str
    page_size: int = 1
    lengths: tuple[int, ...] = (100, 1, 37, 64)
    seed: int = 0
    scale: float = 0.11
    softcap: float = 0.0
    in_graph: bool = False
    graphs: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        pages = CONTEXT // self.page_size
        order = 1 + self.rng.permutation(len(self.lengths) * pages).reshape(-1, pages)
        slots = order[:, :, None] * self.page_size + np.arange(self.page_size)
        self.table = slots.reshape(len(self.lengths), CONTEXT).astype(np.int32)  # request, position -> slot
        self.req_to_token = self.tensor(self.table)
        self.scales = self.tensor(SCALES).expand((len(self.lengths), KV_HEADS)) if self.is_quantised else None
        size = (len(self.lengths) * pages + 1) * self.page_size
        self.keys, self.values = (self.normal(size, KV_HEADS, DIM) for _ in range(2))
        unused = np.ones(size, bool)
        unused[: self.page_size] = False
        for row, length in zip(self.table, self.lengths, strict=True):
            unused[row[:length]] = False
        for pool in (self.keys, self.values):
            if self.is_quantised:
                pool.view(self.torch.uint8)[self.tensor(unused)] = 0x7F  # NaN
            else:
                pool[self.tensor(unused)] = float("nan")

    @property
    def is_quantised(self) -> bool:
        return self.dtype.startswith("float8")

    def tensor(self, x: Any) -> Any:
        return self.torch.from_numpy(np.ascontiguousarray(x)).to(self.device)

    def normal(self, *shape: int) -> Any:
        return self.tensor(self.rng.standard_normal(shape, np.float32)).to(getattr(self.torch, self.dtype))

    @property
    def caches(self) -> dict[str, Any]:
        shape = (-1, self.page_size, KV_HEADS, DIM)
        return {"k_cache": self.keys.view(shape), "v_cache": self.values.view(shape)}

    def pages(self, longest: int, requests: Any = slice(None)) -> Any:
        """The page table of requests: every page_size-th slot, in pages."""
        return self.req_to_token[requests, :longest][:, :: self.page_size] // self.page_size

    def starts(self, counts: Any) -> Any:
        return self.tensor(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))

    def ints(self, x: Any) -> Any:
        return self.tensor(np.asarray(x, np.int32))

    @property
    def numbers(self) -> dict[str, Any]:
        scales = {"k_descale": self.scales, "v_descale": self.scales}
        return {"softmax_scale": self.scale, "softcap": self.softcap, **scales, "num_splits": 0, "ver": 3}

    def plan(self, batch: int, seqlens: Any, starts: Any, **options: Any) -> Any:
        """The step's metadata, as the backend computes it."""
        return get_scheduler_metadata(
            batch_size=batch, max_seqlen_q=1, max_seqlen_k=int(max(self.lengths)), num_heads=HEADS,
            num_heads_k=KV_HEADS, headdim=DIM, cache_seqlens=seqlens, qkv_dtype=getattr(self.torch, self.dtype),
            cu_seqlens_q=starts, page_size=self.page_size, causal=True, has_softcap=self.softcap > 0, num_splits=0,
            **options,
        )  # fmt: skip

    def run(self, call: Callable[[], Any]) -> Any:
        """Call; inside of a graph, on the stream that torch captures by default, if there shall be one."""
        if not self.in_graph:
            return call()
        cuda = self.torch.cuda
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            call()  # compiles
        cuda.current_stream().wait_stream(side)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            result = call()
        self.graphs.append(graph)  # its memory is that of the results
        self.fill_free_memory()
        graph.replay()
        return result

    def fill_free_memory(self) -> None:
        """Write ones over what the allocators of torch and CuPy have free: nothing that a graph uses may lie there."""
        import cupy

        sizes = [512, 4096, 1 << 16, 1 << 20, 1 << 22]
        junk = [self.torch.full((size,), 255, dtype=self.torch.uint8, device=self.device) for size in sizes * 4]
        more = [cupy.full(size, 255, np.uint8) for size in sizes * 4]
        self.torch.cuda.synchronize()
        del junk, more

    def check(self, q: Any, out: Any, seen: Seen, lse: Any = None, sinks: Any = None, only: Any = slice(None)) -> None:
        """Hold results against those over the listed slots. ``lse`` is (heads, queries)."""
        table = np.zeros((len(seen), max(map(len, seen))), np.int32)
        for row, slots in zip(table, seen, strict=True):
            row[: len(slots)] = slots
        answer = reference.attention(
            to_numpy(q)[only][:, None], to_numpy(self.keys)[:, None], to_numpy(self.values)[:, None],
            page_table=table, cache_seqlens=np.array([len(slots) for slots in seen]), softmax_scale=self.scale,
            softcap=self.softcap, sinks=None if sinks is None else to_numpy(sinks),
            **dict.fromkeys(("k_descale", "v_descale"), np.tile(SCALES, (len(seen), 1)) if self.is_quantised else None),
        )  # fmt: skip
        dtype = "bfloat16" if self.is_quantised else self.dtype
        tolerance = TOLERANCE[dtype]
        assert out.dtype == getattr(self.torch, dtype) and out.device == q.device
        np.testing.assert_allclose(
            to_numpy(out)[only].astype(np.float64), answer.out[:, 0], atol=tolerance, rtol=tolerance
        )
        if lse is not None:
            np.testing.assert_allclose(to_numpy(lse).T[only], answer.lse[:, :, 0], atol=1e-3)

    # -------------------------------------------------------------------------------------------- the calls
    def decode(
        self, window: int | None = None, planned: bool = False, sinks: Any = None, given_out: bool = False
    ) -> None:
        """One token of each request."""
        batch, seqlens = len(self.lengths), self.ints(self.lengths)
        starts, q = self.starts([1] * batch), self.normal(batch, HEADS, DIM)
        out = self.torch.full_like(q, float("nan")) if given_out else None
        metadata = self.plan(batch, seqlens, starts) if planned else None
        given = {
            "page_table": self.pages(max(self.lengths)), "cache_seqlens": seqlens, "cu_seqlens_q": starts,
            "max_seqlen_q": 1, "causal": True, "window_size": (-1, -1) if window is None else (window, 0),
            "return_softmax_lse": False, "scheduler_metadata": metadata, "sinks": sinks, "out": out,
        }  # fmt: skip
        result = self.run(lambda: flash_attn_with_kvcache(q=q, **self.caches, **given, **self.numbers))
        assert out is None or result is out
        first = [0 if window is None else max(0, n - 1 - window) for n in self.lengths]
        seen = [row[f:n] for row, f, n in zip(self.table, first, self.lengths, strict=True)]
        self.check(q, result, seen, sinks=sinks)

    def extend(self, counts: tuple[int, ...], window: int | None = None) -> None:
        """The last ``counts`` tokens of each request, prefixes from the cache."""
        starts, q = self.starts(counts), self.normal(sum(counts), HEADS, DIM)
        given = {
            "page_table": self.pages(max(self.lengths)), "cache_seqlens": self.ints(self.lengths),
            "cu_seqlens_q": starts, "cu_seqlens_k_new": self.starts(self.lengths), "max_seqlen_q": max(counts),
            "causal": True, "window_size": (-1, -1) if window is None else (window, 0), "return_softmax_lse": True,
        }  # fmt: skip
        out, lse, *_ = self.run(lambda: flash_attn_with_kvcache(q=q, **self.caches, **given, **self.numbers))
        self.check(q, out, self.causal(counts, window), lse)

    def causal(self, counts: tuple[int, ...], window: int | None = None, chunk: int = 0) -> Seen:
        """The slots that the last tokens of each request see."""
        seen = []
        for row, length, count in zip(self.table, self.lengths, counts, strict=True):
            for position in range(length - count, length):
                first = 0 if window is None else max(0, position - window)
                first = position // chunk * chunk if chunk else first
                seen.append(row[first : position + 1])
        return seen

    def cascade(self, branches: int, depth: int) -> None:
        """Drafts: a request's branches see its tokens and, each, its own ``depth`` slots; two halves are merged."""
        batch = len(self.lengths)
        spare = np.flatnonzero(np.isnan(to_numpy(self.keys)[:, 0, 0].astype(np.float32)))
        own = self.rng.permutation(spare)[: batch * branches * depth].reshape(-1, depth).astype(np.int32)
        for pool in (self.keys, self.values):
            pool[self.tensor(own.ravel())] = self.normal(own.size, KV_HEADS, DIM)
        q = self.normal(batch * branches, HEADS, DIM)
        common = {"q": q, "causal": False, "window_size": (-1, -1), "return_softmax_lse": True, **self.numbers}
        prefix = {
            "page_table": self.pages(max(self.lengths)), "cache_seqlens": self.ints(self.lengths),
            "cu_seqlens_q": self.starts([branches] * batch), "max_seqlen_q": branches,
        }  # fmt: skip
        shape = (-1, 1, KV_HEADS, DIM)
        drafts = {
            "k_cache": self.keys.view(shape), "v_cache": self.values.view(shape), "page_table": self.tensor(own),
            "cache_seqlens": self.ints([depth] * len(own)), "cu_seqlens_q": self.starts([1] * len(own)),
            "cu_seqlens_k_new": self.starts([depth] * len(own)), "max_seqlen_q": 1,
        }  # fmt: skip

        def call() -> Any:
            out, lse, *_ = flash_attn_with_kvcache(**self.caches, **prefix, **common)
            own_out, own_lse, *_ = flash_attn_with_kvcache(**drafts, **common)
            return merge_state_v2(out, lse.T.contiguous(), own_out, own_lse.T.contiguous())

        merged, total = self.run(call)
        seen = [
            np.concatenate([self.table[i // branches, : self.lengths[i // branches]], own[i]]) for i in range(len(q))
        ]
        self.check(q, merged, seen, total.T)

    def cross(self) -> None:
        """Tokens of a decoder see all of what an encoder left, some of them nothing."""
        batch, encoded = len(self.lengths), [length - 1 for length in self.lengths]
        q = self.normal(batch, HEADS, DIM)
        given = {
            "page_table": self.pages(max(encoded)), "cache_seqlens": self.ints(encoded), "causal": False,
            "cu_seqlens_q": self.starts([1] * batch), "cu_seqlens_k_new": self.starts(encoded), "max_seqlen_q": 1,
            "window_size": (-1, -1),
        }  # fmt: skip
        out = self.run(lambda: flash_attn_with_kvcache(q=q, **self.caches, **given, **self.numbers))
        self.check(q, out, [row[:n] for row, n in zip(self.table, encoded, strict=True)])

    def local(self, counts: tuple[int, ...], chunk: int) -> None:
        """Chunks of attention as virtual batches: every chunk that a request's new tokens touch is one."""
        pages = to_numpy(self.pages(max(self.lengths)))
        num_q, num_k, tables = [], [], []
        for row, length, count in zip(pages, self.lengths, counts, strict=True):
            position = length - count
            while position < length:
                begin = position // chunk * chunk
                end = min(begin + chunk, length)
                num_q.append(end - position)
                num_k.append(end - begin)
                columns = begin // self.page_size + np.arange(chunk // self.page_size)
                tables.append(row[columns.clip(max=len(row) - 1)])
                position = end
        q = self.normal(sum(counts), HEADS, DIM)
        given = {
            "page_table": self.ints(tables), "cache_seqlens": self.ints(num_k), "cu_seqlens_q": self.starts(num_q),
            "cu_seqlens_k_new": None, "max_seqlen_q": max(num_q), "causal": True, "window_size": (-1, -1),
        }  # fmt: skip
        out = self.run(lambda: flash_attn_with_kvcache(q=q, **self.caches, **given, **self.numbers))
        self.check(q, out, self.causal(counts, chunk=chunk))

    def prefix_chunks(self, counts: tuple[int, ...]) -> None:
        """Keys that lie one request behind the other: new tokens on themselves, merged with their prefixes."""
        q, starts = self.normal(sum(counts), HEADS, DIM), self.starts(counts)
        prefixes = [length - count for length, count in zip(self.lengths, counts, strict=True)]
        common = {"max_seqlen_q": max(counts), "softmax_scale": self.scale, "softcap": self.softcap,
                  "return_softmax_lse": True}  # fmt: skip
        halves = []
        for first, last, causal in ((prefixes, self.lengths, True), ([0] * len(counts), prefixes, False)):
            slots = np.concatenate([row[a:b] for row, a, b in zip(self.table, first, last, strict=True)])
            lengths = [b - a for a, b in zip(first, last, strict=True)]
            index = self.tensor(slots.astype(np.int64))
            halves.append(
                {
                    "k": self.keys[index],
                    "v": self.values[index],
                    "cu_seqlens_k": self.starts(lengths),
                    "max_seqlen_k": max(lengths),
                    "causal": causal,
                }  # fmt: skip
            )

        def call() -> Any:
            states = []
            for half in halves:
                out, lse, *_ = flash_attn_varlen_func(q=q, cu_seqlens_q=starts, **half, **common)
                states += [out, lse.T.contiguous()]
            return merge_state_v2(*states)

        merged, total = self.run(call)
        self.check(q, merged, self.causal(counts), total.T)


class ServerTests:
    """Tests of a server, wherever it runs: a fixture ``server`` says that."""

    @pytest.mark.parametrize("planned", [True, False], ids=["planned", "unplanned"])
    @pytest.mark.parametrize("window", [None, 10])
    def test_decode(self, server: Server, window: int | None, planned: bool) -> None:
        server.decode(window, planned)

    @pytest.mark.parametrize("window", [None, 10])
    def test_extend(self, server: Server, window: int | None) -> None:
        server.extend(EXTENDED, window)

    def test_cascade(self, server: Server) -> None:
        server.cascade(branches=3, depth=4)

    def test_cross_attention(self, server: Server) -> None:
        server.cross()

    def test_local_attention_as_virtual_batches(self, server: Server) -> None:
        server.local(EXTENDED, chunk=32)

    def test_keys_one_behind_the_other(self, server: Server) -> None:
        server.prefix_chunks((30, 1, 36, 64))


class GraphBuffers:
    """What the graph of one batch size reads, and the decode steps that it makes."""

    def __init__(self, server: Server, batch: int, most: int, window: int | None = None) -> None:
        torch, device = server.torch, server.device
        self.server, self.batch, self.window = server, batch, window
        ints = {"dtype": torch.int32, "device": device}
        self.seqlens, self.starts = torch.ones(most, **ints), torch.arange(most + 1, **ints)
        self.page_table = torch.zeros((most, CONTEXT // server.page_size), **ints)
        self.buffer = torch.zeros(scheduler_metadata_size(most), **ints)
        self.q = [server.normal(batch, HEADS, DIM) for _ in range(2)]  # of two layers
        self.out: list[Any] = []
        self.fill([])

    def fill(self, requests: Any) -> None:
        """Write a step's lengths, pages and metadata where the graph reads them; the rest of the batch is padding."""
        server, number = self.server, len(requests)
        self.requests = requests
        lengths = [server.lengths[request] for request in requests]
        self.seqlens.fill_(1)
        self.page_table.zero_()
        if number:
            pages = server.pages(max(lengths), self.server.tensor(np.array(requests)))
            self.seqlens[:number].copy_(server.ints(lengths))
            self.page_table[:number, : pages.shape[1]].copy_(pages)
        metadata = server.plan(self.batch, self.seqlens[: self.batch], self.starts[: self.batch + 1])
        self.size = metadata.shape[0]
        self.buffer[: self.size] = metadata
        self.buffer[self.size :] = 0

    def run(self) -> None:
        """All layers of a step: one with the step's metadata, one that has a window and none."""
        server, batch = self.server, self.batch
        common = {
            "page_table": self.page_table[:batch], "cache_seqlens": self.seqlens[:batch],
            "cu_seqlens_q": self.starts[: batch + 1], "max_seqlen_q": 1, "causal": True, **server.caches,
            **server.numbers,
        }  # fmt: skip
        window = (self.window, 0) if self.window is not None else (-1, -1)
        first = flash_attn_with_kvcache(q=self.q[0], scheduler_metadata=self.buffer[: self.size], **common)
        second = flash_attn_with_kvcache(q=self.q[1], window_size=window, **common)
        self.out = [first, second]

    def check(self) -> None:
        number = len(self.requests)
        for layer, window in ((0, None), (1, self.window)):
            first = [0 if window is None else max(0, self.server.lengths[r] - 1 - window) for r in self.requests]
            seen = [self.server.table[r, f : self.server.lengths[r]] for r, f in zip(self.requests, first, strict=True)]
            self.server.check(self.q[layer], self.out[layer], seen, only=slice(number))
            assert not bool(self.server.torch.isnan(self.out[layer]).any()), "padding gave NaN"


def latent_attention(torch: Any, device: str, dtype: str, only_qv: bool, planned: bool) -> None:
    """MLA: keys and values are views of one latent row, its last 64 columns carry the positions, or are not there."""
    rng = np.random.default_rng(0)
    batch, heads, lengths = 3, 16, np.array([40, 3, 17], np.int32)

    def normal(*shape: int) -> Any:
        return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(device, getattr(torch, dtype))

    row, q, qv = normal(12, 16, 1, 576), normal(batch, heads, 64), normal(batch, heads, 512)
    latent, rope = row[..., :512], row[..., 512:]
    table = rng.permutation(12).astype(np.int32)[:9].reshape(3, 3)
    seqlens, starts = (torch.from_numpy(x).to(device) for x in (lengths, np.arange(batch + 1, dtype=np.int32)))
    metadata = None
    if planned:
        metadata = get_scheduler_metadata(
            batch, 1, 48, heads, 1, 512 if only_qv else 64, seqlens, qkv_dtype=row.dtype, headdim_v=512,
            cu_seqlens_q=starts, page_size=16, causal=True,
        )  # fmt: skip
    out, lse, *_ = flash_attn_with_kvcache(
        q=None if only_qv else q, k_cache=None if only_qv else rope, v_cache=latent, qv=qv, only_qv=only_qv,
        page_table=torch.from_numpy(table).to(device), cache_seqlens=seqlens, cu_seqlens_q=starts, max_seqlen_q=1,
        softmax_scale=0.05, causal=True, scheduler_metadata=metadata, return_softmax_lse=True,
    )  # fmt: skip
    k_cache, v_cache = to_numpy(rope).copy(), to_numpy(latent).copy()
    answer = reference.attention(
        to_numpy(q * 0 if only_qv else q)[:, None], k_cache, v_cache, qv=to_numpy(qv)[:, None], page_table=table,
        cache_seqlens=lengths, softmax_scale=0.05,
    )  # fmt: skip
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(to_numpy(out).astype(np.float64), answer.out[:, 0], atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(to_numpy(lse).T, answer.lse[:, :, 0], atol=1e-3)
