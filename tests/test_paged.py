"""The paged cache and steps on it: random sequences that come and go, against the float64 reference."""

from __future__ import annotations

import doctest
import math
import pickle
import re
import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference
from problems import UNIT_ROUNDOFF, Backend

import cuflash
from cuflash import array_types, paged, step

# Arrays of a "device" on the host: what is uploaded is a copy, as on a GPU.
FAR = SimpleNamespace(__name__="far", asarray=lambda x: np.array(x), zeros=np.zeros, ones=np.ones)


class Server:
    """A cache and steps on it, beside what must be in them: the keys and values of each sequence in a row.

    Before every step all slots that no sequence sees are poisoned, and afterwards every other byte must be as it was.
    """

    def __init__(self, seed: int, xp: Any = np, num_pages: int = 24, page_size: int = 3, dim: int = 8, **kwargs: Any):
        self.rng = np.random.default_rng(seed)
        self.layers, self.heads, self.heads_kv, self.dim = 2, 4, 2, dim
        self.latent, self.dim_v = "headdim_v" in kwargs, kwargs.pop("headdim_v", dim)
        self.cache = cuflash.PagedKVCache(
            self.layers, num_pages, page_size, self.heads_kv, dim, "float32", headdim_v=self.dim_v, latent=self.latent,
            max_sequences=6, max_seqlen=40, xp=xp, seed=seed,
        )  # fmt: skip
        self.to_native, self.to_numpy = xp.asarray, (lambda x: x.get()) if xp.__name__ == "cupy" else np.asarray
        if "rotary_dim" in kwargs:
            angle = np.outer(np.arange(80), np.arange(1, kwargs.pop("rotary_dim") // 2 + 1) / 7)
            self.rotary = {"rotary_cos": np.cos(angle).astype("float32"), "rotary_sin": np.sin(angle).astype("float32")}
            kwargs |= {name: self.to_native(table) for name, table in self.rotary.items()}
        else:
            self.rotary = {}
        self.mask = {"causal": True} | {name: kwargs[name] for name in ("causal", "window_size") if name in kwargs}
        self.step = cuflash.DecodeStep(self.cache, self.heads, **kwargs)
        empty = np.zeros((self.layers, 2, 0, self.heads_kv, dim), np.float32)
        self.empty, self.held = empty, {}  # handle: (layers, k and v, tokens, heads_kv, dim)

    # ---------------------------------------------------------------------------------------------------- operations
    def add(self, num_tokens: int) -> int:
        handle = self.cache.add(num_tokens)
        assert handle not in self.held
        assert len(self.cache.pages(handle)) == -(-num_tokens // self.cache.page_size)
        self.held[handle] = self.empty
        return handle

    def fork(self, handle: int) -> int:
        free = self.cache.num_free_pages
        fork = self.cache.fork(handle)
        assert fork not in self.held and self.cache.num_free_pages == free
        self.held[fork] = self.held[handle]
        return fork

    def truncate(self, handles: list[int], lengths: list[int]) -> None:
        self.cache.truncate(handles, lengths)
        for handle, length in zip(handles, lengths, strict=True):
            self.held[handle] = self.held[handle][:, :, :length]

    def free(self, handles: list[int]) -> None:
        self.cache.free(handles)
        for handle in handles:
            del self.held[handle]
            with pytest.raises(ValueError, match="must be in the cache"):
                self.cache.seqlens(handle)

    def run(self, handles: list[int], tokens: list[int], commit: bool = True, **options: Any) -> None:
        """One step, all of whose results are compared."""
        owned, before = self.cache._pages.references > 0, self.snapshot()
        num_tokens = tokens[0] if len(set(tokens)) == 1 and self.rng.random() < 0.5 else tokens
        self.step.begin(handles, num_tokens, **options)
        for name, array in self.snapshot().items():  # copied pages are new ones
            assert array[:, owned].tobytes() == before[name][:, owned].tobytes()
        self.poison()
        shape, total = self.step._begun.shape, sum(tokens)
        rows = total + int(self.rng.integers(3)) if shape.ragged else shape.batch_size * shape.max_seqlen_q
        lse = {}
        for layer in range(self.layers):
            q, k, v = (
                self.rng.standard_normal((rows, heads, self.dim), np.float32)
                for heads in (self.heads, self.heads_kv, self.heads_kv)
            )
            q[total:], k[total:], v[total:] = np.nan, np.nan, np.nan  # of nobody
            before = self.snapshot()
            q_, k_, v_ = self.to_native(q), self.to_native(k), None if self.latent else self.to_native(v)
            v = k[..., : self.dim_v] if self.latent else v
            if self.rng.random() < 0.5:
                given = self.to_native(np.full_like(q[..., : self.dim_v], 7))
                out = self.step(layer, q_, k_, v_, out=given)
                assert out is given
            else:
                out, lse = self.step(layer, q_, k_, v_, return_softmax_lse=True)
            out = self.to_numpy(out)
            if not shape.ragged:
                assert (out[total:] == 0).all()
            start = 0
            for handle, number in zip(handles, tokens, strict=True):
                new = slice(start, start + number)
                self.compare(layer, handle, q[new], k[new], v[new], out[new])
                start += number
            self.only_written(layer, handles, tokens, before)
        if not commit:
            return
        self.step.commit()
        for handle, number in zip(handles, tokens, strict=True):
            self.held[handle] = self.read(handle, self.held[handle].shape[2] + number)

    # --------------------------------------------------------------------------------------------------------- checks
    def compare(self, layer: int, handle: int, q: Any, k: Any, v: Any, out: np.ndarray) -> None:
        """One sequence of one layer: the output, and what has been written."""
        held = self.held[handle][layer]
        length, number = held.shape[1], len(q)
        if not number:
            return
        parts = (held[0], k), (held[1, ..., : self.dim_v], v)
        caches = [np.concatenate([part, np.full_like(new, np.nan)])[None] for part, new in parts]
        answer = reference.attention(
            q[None], *caches, k=k[None], v=v[None], cache_seqlens=[length], **self.rotary, **self.mask
        )  # fmt: skip
        assert (np.abs(out - answer.out[0]) <= 64 * UNIT_ROUNDOFF["float32"] * (answer.magnitude[0] + 1)).all()
        found = self.read(handle, length + number)[layer]
        assert np.array_equal(found[:, :length], held)
        assert np.allclose(found[0], answer.k_cache[0], rtol=0, atol=1e-6)
        assert np.array_equal(found[1, ..., : self.dim_v], answer.v_cache[0])

    def read(self, handle: int, length: int) -> np.ndarray:
        """(layers, k and v, length, heads_kv, dim) as the page table has them; of latent rows twice the keys."""
        pages, size = self.cache.pages(handle), self.cache.page_size
        at = np.arange(length)
        both = [
            self.to_numpy(array)[:, pages[at // size], at % size]
            for array in (self.cache.k, self.cache.k if self.latent else self.cache.v)
        ]
        return np.stack(both, axis=1)

    def snapshot(self) -> dict[str, np.ndarray]:
        return {name: self.to_numpy(getattr(self.cache, name)).copy() for name in ("k", "v")}

    def poison(self) -> None:
        used = np.zeros((self.cache.num_pages, self.cache.page_size), bool)
        for handle, held in self.held.items():
            at = np.arange(held.shape[2])
            used[self.cache.pages(handle)[at // self.cache.page_size], at % self.cache.page_size] = True
        for array in (self.cache.k, self.cache.v):
            array[:, self.to_native(~used)] = np.nan

    def only_written(self, layer: int, handles: list[int], tokens: list[int], before: dict[str, np.ndarray]) -> None:
        """Every byte is as before but for the new tokens' slots of one layer, each of which has one owner."""
        written = np.zeros((self.layers, self.cache.num_pages, self.cache.page_size), int)
        for handle, number in zip(handles, tokens, strict=True):
            at = np.arange(self.held[handle].shape[2], self.held[handle].shape[2] + number)
            written[layer, self.cache.pages(handle)[at // self.cache.page_size], at % self.cache.page_size] += 1
        assert written.max() <= 1
        for name, array in self.snapshot().items():
            assert array[written == 0].tobytes() == before[name][written == 0].tobytes()

    def check(self) -> None:
        """The bookkeeping: references are counted, free pages are those without, lengths and contents are right."""
        pages = self.cache._pages
        assert self.cache.sequences == sorted(self.held, key=lambda handle: handle % 6)
        held = [self.cache.pages(handle) for handle in self.cache.sequences]
        counted = np.bincount(np.concatenate([np.zeros(0, int), *held]), minlength=self.cache.num_pages)
        assert np.array_equal(pages.references, counted) and (pages.table >= 0).sum() == counted.sum()
        free = pages._free[: pages.num_free]
        assert sorted(free) == np.flatnonzero(counted == 0).tolist()
        assert all(len(set(row.tolist())) == len(row) for row in held)
        for handle, expected in self.held.items():
            length = expected.shape[2]
            assert self.cache.seqlens(handle) == length
            assert np.array_equal(self.read(handle, length), expected)
            assert (counted[self.cache.pages(handle)[-(-length // self.cache.page_size) :]] == 1).all()

    def state(self) -> bytes:
        return pickle.dumps((vars(self.cache._pages), self.cache._pages.changed.tobytes(), self.snapshot()))


def random_life(server: Server, count: int) -> Iterator[str]:
    """Random operations; those that cannot be done must change nothing. Yields the name of what was done."""
    rng = server.rng
    for _ in range(count):
        handles = list(server.held)
        some = rng.permutation(handles)[: rng.integers(1, 5)].tolist() if handles else []
        operation = rng.choice(["add", "fork", "truncate", "free", "extend"] + ["step"] * 5)
        before = server.state()
        try:
            if operation == "add":
                server.add(int(rng.integers(0, 15)))
            elif not handles:
                continue
            elif operation == "fork":
                server.fork(some[0])
            elif operation == "truncate":
                server.truncate(some, [int(rng.integers(server.held[h].shape[2] + 1)) for h in some])
            elif operation == "free":
                server.free(some[:2])
            elif operation == "extend":
                server.cache.extend(some, int(rng.integers(8)))
            else:
                kind = rng.choice(["decode", "drafts", "prefill"])
                number = {"decode": 1, "drafts": int(rng.integers(2, 5)), "prefill": 0}[kind]
                tokens = [number or int(rng.integers(0, 12)) for _ in some]
                tokens[0] = max(tokens[0], 1)
                options: dict[str, Any] = {}
                if rng.random() < 0.5:
                    options["batch_size"] = len(some) + int(rng.integers(3))
                if rng.random() < 0.3:
                    options["max_seqlen_q"] = max(tokens) + int(rng.integers(3))
                server.run(some, tokens, commit=rng.random() < 0.9, **options)
        except cuflash.OutOfPages as error:
            assert server.state() == before
            assert error.needed > error.free == server.cache.num_free_pages
            assert f"{error.free} free pages, {error.needed} are needed" in str(error)
            operation = "none"
            server.free(some[-1:])
        except ValueError as error:
            assert "max_seq" in str(error) and server.state() == before
            operation = "full"
            server.free(some[-1:])
        server.check()
        yield operation


@pytest.mark.parametrize("far", [False, True], ids=["same memory", "copied"])
@pytest.mark.parametrize(
    ("page_size", "seed"),
    [
        pytest.param(size, seed, marks=() if (size + seed) % 2 else pytest.mark.slow)
        for size in (1, 3, 16)
        for seed in range(4)
    ],
)
def test_random_lives(seed, page_size, far, monkeypatch):
    monkeypatch.setenv("CUFLASH_BACKEND", "numpy")
    num_pages = {1: 60, 3: 24, 16: 7}[page_size]
    options = [{}, {"rotary_dim": 16}, {"window_size": (5, 0), "causal": False}, {"num_splits": 2}][seed]
    server = Server(100 * seed + page_size, FAR if far else np, num_pages, page_size, 16, **options)
    done = set(random_life(server, 200))
    assert done == {"add", "fork", "truncate", "free", "extend", "step"} | (done & {"none", "full"})
    server.free(list(server.held))
    assert server.cache.num_free_pages == num_pages and not server.cache.sequences


@pytest.mark.parametrize("dims", [(16, 8), (40, 32)])
def test_random_lives_of_latent_rows(dims, monkeypatch):
    """Values are the first columns of the keys' own rows."""
    monkeypatch.setenv("CUFLASH_BACKEND", "numpy")
    server = Server(sum(dims), FAR, dim=dims[0], headdim_v=dims[1])
    assert {"fork", "step"} <= set(random_life(server, 100))


def test_a_day_of_a_server(backend: Backend):
    """Prefill, decode, fork, drafts, a padded batch and a mixed step, on every backend."""
    xp = __import__("cupy") if backend.name == "cuda" else np
    server = Server(5, xp, 24, 4, 64, rotary_dim=32)
    a, b = server.add(9), server.add(2)
    server.run([a, b], [9, 2])
    server.run([a, b], [1, 1])
    c = server.fork(a)
    server.run([c, b, a], [1, 1, 1], batch_size=4)
    server.run([a, c], [3, 3])
    server.truncate([a, c], [12, 13])
    server.free([b])
    d = server.add(5)
    server.run([a, d, c], [1, 5, 0], batch_size=4, max_seqlen_q=8)
    server.run([d], [1], batch_size=4)
    server.check()


# --------------------------------------------------------------------------------------------------------------- pages
def test_copy_on_write():
    """The last of those that share a page keeps it; the others get copies of what is in it."""
    server = Server(0, page_size=4)
    a = server.add(0)
    server.run([a], [6])
    b, c = server.fork(a), server.fork(a)
    pages = server.cache.pages(a).tolist()
    assert server.cache.pages(b).tolist() == server.cache.pages(c).tolist() == pages and len(pages) == 2
    free = server.cache.num_free_pages
    server.run([b, a], [1, 1])  # c still has it
    assert server.cache.num_free_pages == free - 2 and server.cache.pages(c).tolist() == pages
    assert len({int(server.cache.pages(x)[1]) for x in (a, b, c)}) == 3
    assert len({int(server.cache.pages(x)[0]) for x in (a, b, c)}) == 1
    server.run([c], [1])  # the only one left
    assert server.cache.num_free_pages == free - 2 and server.cache.pages(c).tolist() == pages
    server.check()

    d = server.fork(c)
    server.truncate([c], [3])  # now the first, full page of d is one that c ends in
    server.run([c], [1])
    assert server.cache.pages(c)[0] != server.cache.pages(d)[0] == pages[0]
    server.check()


def test_a_full_page_is_not_copied():
    server = Server(0, page_size=4)
    a = server.add(4)
    server.run([a], [4])
    b, free = server.fork(a), server.cache.num_free_pages
    server.run([a, b], [1, 1])
    assert server.cache.num_free_pages == free - 2
    assert server.cache.pages(a)[0] == server.cache.pages(b)[0]


def test_a_sequence_without_tokens_copies_nothing():
    server = Server(0, page_size=4)
    a = server.add(0)
    server.run([a], [6])
    b, free = server.fork(a), server.cache.num_free_pages
    server.run([a, b], [0, 1])
    assert server.cache.num_free_pages == free - 1 and server.cache.pages(a)[1] != server.cache.pages(b)[1]
    server.check()


def test_only_changed_rows_are_uploaded():
    server = Server(0, FAR, page_size=4)
    a, b = server.add(4), server.add(4)
    server.run([a, b], [3, 3])
    server.cache.page_table[:] = -7
    server.truncate([a], [0])
    server.cache.extend(a, 1)
    server.step.begin(b)  # no new page
    first, second = server.cache.page_table[server.cache.rows([a, b])].tolist()
    assert first[0] == server.cache.pages(a)[0] and set(second) == {-7}


def test_reserved_pages_are_not_shared():
    server = Server(0, page_size=4)
    a = server.add(12)
    server.run([a], [5])
    b = server.fork(a)
    assert len(server.cache.pages(a)) == 3 and len(server.cache.pages(b)) == 2
    server.check()


def test_freed_pages_are_used_again():
    cache = cuflash.PagedKVCache(1, 4, 2, 1, 8, "float32")
    a, b = cache.add(4), cache.add(4)
    pages = cache.pages(a).tolist()
    with pytest.raises(cuflash.OutOfPages, match="0 free pages, 1 are needed"):
        cache.add(1)
    cache.free(a)
    assert sorted(cache.pages(cache.add(3))) == pages and len(cache.pages(b)) == 2


def test_handles_are_never_given_twice():
    cache = cuflash.PagedKVCache(1, 4, 2, 1, 8, "float32", max_sequences=2)
    seen = set()
    for _ in range(20):
        handle = cache.add(2)
        assert handle not in seen
        seen.add(handle)
        cache.free(handle)
        for call in (cache.free, cache.fork, cache.seqlens, cache.pages, cache.rows):
            with pytest.raises(ValueError, match="must be in the cache"):
                call(handle)


# --------------------------------------------------------------------------------------------------------------- steps
def test_plans_and_arrays_stay():
    """What a CUDA graph has captured: the same plan, arrays and table for each batch size, refilled in place."""
    server = Server(1, FAR, 40)
    handles = [server.add(0) for _ in range(3)]
    server.run(handles, [5, 2, 7])
    seen: dict[int, Any] = {}
    for size in (4, 8, 4, 8):
        for number in (3, 2):
            server.run(handles[:number], [1] * number, batch_size=size)
            arrays = server.step._begun
            now = (
                arrays.meta, arrays.meta.array, arrays.cache_seqlens, arrays.cache_batch_idx, arrays.cu_seqlens_k_new,
                server.cache.page_table,
            )  # fmt: skip
            assert server.step.batch_size == size and server.step.meta is arrays.meta
            assert all(x is y for x, y in zip(seen.setdefault(size, now), now, strict=True))
            assert (arrays.cache_seqlens[number:] == 0).all()


def test_prompts_of_any_length_share_plans():
    cache = cuflash.PagedKVCache(1, 400, 2, 1, 8, "float32")
    step = cuflash.DecodeStep(cache, 1)
    for number in range(1, 300):
        handle = cache.add()
        step.begin(handle, number)
        cache.free(handle)
    assert len(step._all_arrays) == 16 + 5


def test_a_step_of_nobody():
    """To compile, or to capture a graph, before anybody is there."""
    server = Server(2)
    attend = server.step.begin([], batch_size=4)
    q, k = np.ones((4, 4, 8), np.float32), np.ones((4, 2, 8), np.float32)
    before = server.snapshot()
    assert (attend(0, q, k, k) == 0).all()
    attend.commit()
    assert all(x.tobytes() == before[name].tobytes() for name, x in server.snapshot().items())


def test_what_a_step_refuses():
    cache = cuflash.PagedKVCache(1, 8, 4, 2, 8, "float32", max_seqlen=20)
    step, a, b = cuflash.DecodeStep(cache, 4), cache.add(), cache.add()
    q, k = np.ones((2, 4, 8), np.float32), np.ones((2, 2, 8), np.float32)
    with pytest.raises(ValueError, match="begin"):
        step(0, q, k, k)
    with pytest.raises(ValueError, match="begin"):
        step.commit()
    for arguments, message in (
        (([a, a], 1), "different"),
        (([a, b], 0), "num_tokens"),
        (([a, b], [1, 2, 3]), "num_tokens must be one number or one per sequence"),
        (([a, b], [1, -1]), "num_tokens must be at least 0"),
        ((a, 21), "max_seqlen=20"),
        ((a, 2**63 - 1), r"num_tokens must be below 2\*\*62"),
        ((np.uint64(2**64 - 1), 1), r"sequences must be below 2\*\*62"),
        ((1000, 1), "must be in the cache"),
        ((-1, 1), "at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            step.begin(*arguments)
    with pytest.raises(ValueError, match="batch_size"):
        step.begin([a, b], batch_size=1)
    with pytest.raises(ValueError, match="max_seqlen_q"):
        step.begin([a, b], [1, 3], max_seqlen_q=2)
    with pytest.raises(TypeError, match="num_tokens must be integers"):
        step.begin([a, b], 1.5)
    with pytest.raises(TypeError, match="PagedKVCache"):
        cuflash.DecodeStep(None, 4)
    with pytest.raises(ValueError, match="^num_heads_q must be a multiple of the cache's num_heads_kv=2, got 7"):
        cuflash.DecodeStep(cache, 7)
    assert cache.num_free_pages == 8
    step.begin([a, b])
    with pytest.raises(ValueError, match=r"q must have shape \(2 \* 1, 4, 8\), got \(1, 4, 8\)$"):
        step(0, q[:1], k, k)
    for layer, error in ((1, ValueError), (-1, ValueError), ("0", TypeError), (True, TypeError), (None, TypeError)):
        with pytest.raises(error, match="^layer must be"):
            step(layer, q, k, k)
    for name, x in (("q", q.tolist()), ("k", 3), ("out", "out")):
        with pytest.raises(TypeError, match=f"^{name} must be an array"):
            step(**{"layer": 0, "q": q, "k": k, "v": k, name: x})
    with pytest.raises(ValueError, match="^softcap must be at least 0"):
        cuflash.DecodeStep(cache, 4, softcap=-1)
    step(0, q, k, k)
    cache.free(b)
    with pytest.raises(ValueError, match="must be in the cache"):
        step.commit()
    step.begin(a).commit()
    with pytest.raises(ValueError, match="must follow"):
        step.commit()
    step.begin(a)
    cache.truncate(a, 0)
    with pytest.raises(ValueError, match="must not change"):
        step.commit()


@pytest.mark.parametrize(
    "options",
    [
        {"causal": 1}, {"window_size": (-2, 0)}, {"window_size": 3}, {"attention_chunk": -1}, {"num_splits": -1},
        {"split_size": 65}, {"split_size": 64, "num_splits": 2}, {"sm_margin": -1}, {"softcap": -1.0},
    ],
    ids=str,
)  # fmt: skip
def test_options_are_refused_before_a_step_begins(options):
    cache = cuflash.PagedKVCache(1, 8, 16, 2, 64, "float32")
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(options))}"):
        cuflash.DecodeStep(cache, 4, **options)


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
@pytest.mark.parametrize("shape", [(2, 4, 63), (2, 3, 64), (3, 4, 64), (1, 2, 4, 64)], ids=str)
def test_a_step_says_shapes_as_they_were_given(name, shape):
    cache = cuflash.PagedKVCache(1, 8, 16, 2, 64, "float32")
    step, rows = cuflash.DecodeStep(cache, 4).begin(cache.add(), 2), {"q": (2, 4, 64), "out": (2, 4, 64)}
    given = {key: np.ones(rows.get(key, (2, 2, 64)), np.float32) for key in ("q", "k", "v", "out")}
    message = f"{name} must have shape (1 * 2, {given[name].shape[1]}, 64), got {shape}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        step(0, **given | {name: np.ones(shape, np.float32)})
    assert (given["out"] == 1).all() and not cache.k.any()


@pytest.mark.parametrize("before", [False, True], ids=["first", "another"])
def test_a_step_that_cannot_be_planned_is_none(before, monkeypatch):
    """Nor is the one before it: its index arrays are overwritten. The sequence has its pages all the same."""
    cache = cuflash.PagedKVCache(1, 8, 16, 2, 64, "float32")
    step, a = cuflash.DecodeStep(cache, 4), cache.add()
    q, k = np.ones((40, 4, 64), np.float32), np.ones((40, 2, 64), np.float32)
    if before:
        step.begin(a, 40)

    def fail(**arguments: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(cuflash, "get_scheduler_metadata", fail)
        with pytest.raises(MemoryError):
            step.begin(a, 40)
    for call in (step.commit, lambda: step(0, q, k, k)):
        with pytest.raises(ValueError, match=r"must .* begin\(\)"):
            call()
    assert cache.seqlens(a) == 0 and not cache.k.any()
    assert cache.num_free_pages == 5
    step.begin(a, 40)(0, q, k, k)
    step.commit()
    assert cache.seqlens(a) == 40 and cache.num_free_pages == 5


def test_a_step_that_is_refused_leaves_the_one_before_it():
    cache = cuflash.PagedKVCache(1, 2, 16, 2, 64, "float32")
    step, a = cuflash.DecodeStep(cache, 4), cache.add()
    step.begin(a, 20)
    with pytest.raises(cuflash.OutOfPages):
        step.begin(cache.add(), 1)
    q, k = np.ones((20, 4, 64), np.float32), np.ones((20, 2, 64), np.float32)
    step(0, q, k, k)
    step.commit()
    assert cache.seqlens(a) == 20


def test_a_call_after_the_step_has_ended():
    """It would write to the page of another sequence."""
    cache = cuflash.PagedKVCache(1, 1, 16, 2, 64, "float32")
    step, a = cuflash.DecodeStep(cache, 4), cache.add()
    q, k = np.ones((1, 4, 64), np.float32), np.ones((1, 2, 64), np.float32)
    step.begin(a)(0, q, k, k)
    step.commit()
    cache.free(a)
    step.begin(cache.add())(0, q, 2 * k, 2 * k)
    step.commit()
    with pytest.raises(ValueError, match=r"^a call must lie between begin\(\) and commit\(\)"):
        step(0, q, k, k)
    assert (cache.k[0, 0, 0] == 2).all()
    assert step.batch_size == 1 and step.meta is not None  # what the last step was


def test_none_of_a_step_means_none(backend: Backend):
    xp = __import__("cupy") if backend.name == "cuda" else np
    results = []
    for options in ({}, {"softcap": None, "window_size": None, "attention_chunk": None}):
        cache = cuflash.PagedKVCache(1, 8, 4, 2, 8, "float32", xp=xp)
        step = cuflash.DecodeStep(cache, 4, **options).begin(cache.add(), 5)
        q, k = xp.linspace(-1, 1, 160, dtype="float32").reshape(5, 4, 8), xp.ones((5, 2, 8), np.float32)
        results.append(backend.to_numpy(step(0, q, k, k * q[:, :2])))
    np.testing.assert_array_equal(*results)


def test_what_a_cache_refuses():
    make = cuflash.PagedKVCache
    for options, message in (
        ({"dtype": "int8"}, "dtype must be one of float16"),
        ({"dtype": "float16", "kv_dtype": "float32"}, "kv_dtype must be float16"),
        ({"latent": True}, "headdim_v must be less than headdim=8"),
        ({"headdim": 20}, "headdim must be a multiple of 8, got 20"),
        ({"headdim": 1000}, r"headdim must be in \[8, 576\], got 1000"),
        ({"headdim": 576, "headdim_v": 512}, "latent must be True for headdim=576, got False"),
        ({"headdim_v": 12}, "headdim_v must be a multiple of 8, got 12"),
        ({"headdim": 24, "kv_dtype": "int8"}, "headdim must be a multiple of 16 with a cache of int8, got 24"),
        ({"max_sequences": 0}, "max_sequences"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            make(1, 2, 4, 1, **{"headdim": 8} | options)
    immutable = types.ModuleType("immutable")
    immutable.zeros, immutable.ones = (lambda *shape: ()), np.ones
    for xp, got in (("numpy", "'numpy'"), (None, "None"), (math, "math"), (immutable, "immutable")):
        with pytest.raises(TypeError, match=f"^xp must be the module numpy or cupy, got {got}$"):
            make(1, 2, 4, 1, 8, xp=xp)
    cache = make(1, 2, 4, 1, 8, max_sequences=1)
    a = cache.add()
    for call in (cache.add, lambda: cache.fork(a)):
        with pytest.raises(ValueError, match="max_sequences=1"):
            call()
    with pytest.raises(ValueError, match="^seqlens must be at most"):
        cache.truncate(a, 1)
    with pytest.raises(ValueError, match="^seqlens must be one number or one per sequence"):
        cache.truncate(a, [0, 0])
    with pytest.raises(ValueError, match="^num_tokens must be one number or one per sequence"):
        cache.extend(a, [1, 1])
    with pytest.raises(ValueError, match="num_tokens"):
        cache.add(-1)
    for call in (cache.pages, cache.fork):
        for sequence, got in (([a], r"\[0\]"), ([a, a], r"\[0, 0\]"), ([], r"\[\]")):
            with pytest.raises(TypeError, match=f"^sequence must be one handle, got {got}$"):
                call(sequence)
    with pytest.raises(TypeError, match="^sequences must be integers on the host, got list: "):
        cache.seqlens([[a], [a, a]])
    for number in (-1, 2**64):
        with pytest.raises(ValueError, match=rf"^seed must be in \[0, 18446744073709551615\], got {number}$"):
            make(1, 2, 4, 1, 8, seed=number)
    for seed in ("seed", [1, 2], (), True, 1.0, np.arange(2), np.random.default_rng(0)):
        with pytest.raises(TypeError, match="^seed must be an integer, got "):
            make(1, 2, 4, 1, 8, seed=seed)
    with pytest.raises(ValueError, match=r"^num_heads_kv must be in \[1, 65536\], got 70000$"):
        make(1, 2, 4, 70000, 8)


def test_dtypes_and_layouts():
    cache = cuflash.PagedKVCache(2, 3, 4, 2, 32, kv_dtype="float8_e4m3fn", headdim_v=16)
    assert cache.k.dtype == cache.v.dtype == np.uint8 and cache.v.shape == (2, 3, 4, 2, 16)
    assert cache.k_scale.shape == cache.v_scale.shape == (2, 3, 4, 2) and cache.k_scale.dtype == np.float32
    cache = cuflash.PagedKVCache(1, 3, 4, 1, 576, headdim_v=512, latent=True, kv_dtype="int8")
    assert cache.k.dtype == np.int8 and np.shares_memory(cache.k, cache.v) and cache.v.shape[-1] == 512
    assert cache.k_scale is not None and cache.v_scale is None
    cache = cuflash.PagedKVCache(1, 3, 4, 1, 64)
    assert cache.k.dtype.name == "bfloat16" and cache.k_scale is None
    assert repr(cache) == "PagedKVCache(1 layers, 3 pages of 4 (3 free), 1 KV heads, headdim=64, bfloat16, 0 sequences)"


@pytest.mark.parametrize(
    "options", [{}, {"kv_dtype": "float8_e5m2"}, {"kv_dtype": "int8", "latent": True, "headdim_v": 16}]
)
def test_copies_are_of_all_that_a_page_has(options):
    """Keys, values and scales, of all layers, bit by bit."""
    cache = cuflash.PagedKVCache(3, 5, 4, 2, 32, "bfloat16", **options)
    arrays = [x for x in (cache.k, cache.v, cache.k_scale, cache.v_scale) if x is not None]
    rng = np.random.default_rng(0)
    for array in arrays:
        array.view(np.uint8)[...] = rng.integers(0, 256, array.view(np.uint8).shape)
    before = [x.copy() for x in arrays]
    a = cache.add()
    cache.extend(a, 6)
    cache.advance([a], np.array([0]), np.array([6]))
    b = cache.fork(a)
    cache.extend([a, b], 1)
    old, new = cache.pages(a)[1], cache.pages(b)[1]
    assert old != new
    for array, was in zip(arrays, before, strict=True):
        assert array[:, new].tobytes() == was[:, old].tobytes()
        rest = np.arange(5) != new
        assert array[:, rest].tobytes() == was[:, rest].tobytes()


@pytest.mark.parametrize("module", [array_types, paged, step])
def test_examples(module):
    results = doctest.testmod(module)
    assert results.attempted and not results.failed


def test_queries_of_another_framework():
    """What comes in is what goes out, for steps of one token each, and ragged ones."""
    torch = pytest.importorskip("torch")
    cache = cuflash.PagedKVCache(1, 8, 4, 2, 8, "float32")
    decode, handles = cuflash.DecodeStep(cache, 4), [cache.add(), cache.add()]
    rng = np.random.default_rng(0)
    for tokens in ([3, 1], [1, 1]):
        q, k, v = (rng.standard_normal((sum(tokens), heads, 8), np.float32) for heads in (4, 2, 2))
        decode.begin(handles, tokens)
        expected = decode(0, q, k, v)
        out = decode(0, *map(torch.from_numpy, (q, k, v)))
        assert isinstance(out, torch.Tensor) and np.array_equal(out.numpy(), expected)
        given = torch.zeros(out.shape)
        assert decode(0, *map(torch.from_numpy, (q, k, v)), out=given) is given and torch.equal(given, out)
        decode.commit()
