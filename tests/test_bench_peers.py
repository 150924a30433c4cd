"""``cuflash bench`` without a GPU: its timing core on NumPy arrays, and peers on stand-ins for their libraries."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import reference

from cuflash import flash_attn_with_kvcache
from cuflash.bench.inputs import Inputs, Shape, read_trace
from cuflash.bench.measure import distance, measure, roofline
from cuflash.bench.peers import PEERS, NotForThis, Peer
from cuflash.bench.peers.base import TorchPeer

ROOT = Path(__file__).parents[1]
RAGGED = np.array([5, 33, 17])


def fill(array: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    if array.dtype == np.uint8:
        array[...] = rng.integers(0, 256, array.shape, np.uint8) & 0xBF
    else:
        array[...] = rng.standard_normal(array.shape, np.float32)


class Calls:
    """Runs calls one after another."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self.calls = calls

    def sample(self) -> float:
        start = time.perf_counter()
        for call in self.calls:
            call()
        return 1e6 * (time.perf_counter() - start) / len(self.calls)


class Host:
    """A machine whose arrays are NumPy's: attention runs on the NumPy backend."""

    xp = np
    l2_bytes = 1
    bandwidth = 0.01
    tensor_rate = 1.0
    fill = staticmethod(fill)
    graph = Calls

    def readers(self, size: int) -> dict[str, Calls]:
        return {"read": Calls([lambda: np.zeros(size).sum()])}

    def synchronise(self) -> None: ...


class Good(Peer):
    """A peer that computes what it should, but for a factor."""

    name, modules, install = "good", ("numpy",), "pip install good"
    factor = 1.0

    def prepare(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def run(self, i: int) -> Any:
        copy = dict(self.inputs.copies[i % len(self.inputs.copies)])
        del copy["out"]
        out = reference.attention(**copy, causal=self.inputs.shape.causal).out
        return self.factor * out

    def answer(self) -> Any:
        return self.run(0)

    def sampler(self, calls: int) -> Calls:
        return Calls([lambda: None] * calls)


class Wrong(Good):
    factor = 1.02


class Rounds(Wrong):
    @classmethod
    def most_error(cls, shape: Shape) -> float:
        return 3e-2 if shape.queries == 1 else super().most_error(shape)


class Raises(Good):
    def prepare(self, inputs: Inputs) -> None:
        raise MemoryError("too  much\nfor it")


class Refuses(Good):
    def prepare(self, inputs: Inputs) -> None:
        raise NotForThis("needs two GPUs")


class Equal(Good):
    ragged = False


class Absent(Good):
    modules = ("there_is_no_such_module",)


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_BACKEND", "auto")


@pytest.mark.parametrize(
    "options",
    [{}, {"page_size": None}, {"queries": 3}, {"dtype": "float16", "page_size": 7}, {"headdim_v": 24}],
    ids=str,
)
def test_measure(options: dict[str, Any], auto: None) -> None:
    kinds: dict[str, type[Peer]] = {
        kind.__name__: kind for kind in (Good, Wrong, Rounds, Raises, Refuses, Equal, Absent)
    }
    shape = Shape("test", RAGGED, 4, 2, 16, **options)
    record = measure(shape, Host(), kinds, rounds=1)
    rounded = record["peers"].pop("Rounds")
    assert rounded == "wrong: relative error 0.02" if shape.queries > 1 else rounded > 0
    figures = [record["peers"].pop("Good"), *([rounded] if shape.queries == 1 else [])]
    assert min(figures) == record["best_peer_us"] > 0
    assert record["errors"]["Good"] < 1e-2
    assert record["peers"] == {
        "Wrong": "wrong: relative error 0.02",
        "Raises": "MemoryError: too much for it",
        "Refuses": "needs two GPUs",
        "Equal": "equal lengths only",
        "Absent": "not installed",
    }
    assert record["kv_mb"] == RAGGED.sum() * 2 * (16 + shape.dim_v) * 2 / 1e6
    assert record["floor_us"] == record["kv_mb"] / 0.01 and record["bound"] == "bytes"
    assert 0 < record["efficiency"] <= record["balance"] <= 1


@pytest.mark.parametrize(
    "options",
    [{"kv_dtype": "float8_e4m3fn"}, {"kv_dtype": "int8", "page_size": None},
     {"kv_dtype": "float8_e4m3fn", "latent": True, "heads_kv": 1, "headdim": 32, "headdim_v": 16}],
    ids=str,
)  # fmt: skip
def test_scales_per_key_and_head(options: dict[str, Any], auto: None) -> None:
    shape = Shape(**{"name": "test", "lengths": RAGGED, "heads_q": 4, "heads_kv": 2, "headdim": 16, **options},
                  key_scales=True)  # fmt: skip
    record = measure(shape, Host(), {"Good": Good}, rounds=1)
    assert record["errors"]["given"] < 1e-2 and record["peers"] == {"Good": f"no {shape.kv_dtype} cache"}
    assert (
        type("Quantised", (Good,), {"kv_dtypes": (shape.kv_dtype,), "latent": None}).refusal(shape)
        == "no scales per key"
    )
    copy = Inputs.make(shape, np, fill, 1).copies[0]
    scales = copy["k_descale"]
    assert scales.shape == copy["k_cache"].shape[:-1] and (scales >= 0).all() and len(np.unique(scales)) > 10
    assert ("v_descale" in copy) != shape.latent
    out = flash_attn_with_kvcache(**copy, **shape.options)
    del copy["out"]
    assert distance(out, reference.attention(**copy, **shape.options).out) < 1e-2


def test_measure_notices_that_it_is_wrong(monkeypatch: pytest.MonkeyPatch, auto: None) -> None:
    attend = Inputs.attend

    def late(self: Inputs, i: int, metadata: Any) -> Any:
        return (
            None if i % len(self.copies) == 0 else attend(self, i, metadata)
        )  # the first copy's output stays what it was

    monkeypatch.setattr(Inputs, "attend", late)
    with pytest.raises(ArithmeticError, match="given is wrong: relative error nan"):
        measure(Shape("test", RAGGED, 4, 2, 16), Host(), {})


def test_bytes_of_caches() -> None:
    def megabytes(*arguments: Any, **options: Any) -> float:
        return Shape("test", np.full(10, 1000), *arguments, **options).kv_bytes / 1e6

    assert megabytes(32, 8, 128) == 10_000 * 8 * 256 * 2 / 1e6
    assert megabytes(32, 8, 128, kv_dtype="float8_e4m3fn") == 10_000 * 8 * 256 / 1e6
    assert megabytes(32, 8, 192, headdim_v=128) == 10_000 * 8 * 320 * 2 / 1e6
    assert megabytes(32, 8, 128, kv_dtype="int8", key_scales=True) == 10_000 * 8 * (256 + 8) / 1e6
    assert megabytes(128, 1, 576, headdim_v=512, latent=True) == 10_000 * 576 * 2 / 1e6


def test_roofline() -> None:
    """The longer of two times, of all steps together; a query that sees fewer keys computes less."""
    chunk = Shape("chunk", np.array([4096]), 32, 8, queries=1024)
    seen = sum(range(4096 - 1023, 4097))
    assert chunk.operations == 2 * seen * 32 * 256
    assert replace(chunk, causal=False).operations == 2 * 1024 * 4096 * 32 * 256
    assert Shape("latent", np.array([100, 50]), 128, 1, 576, headdim_v=512, latent=True).operations == 300 * 128 * 1088
    decode = Shape("decode", np.full(64, 4096), 32, 8)
    machine = Host()
    machine.bandwidth, machine.tensor_rate = 4.0, 800.0
    only = roofline(machine, decode)
    assert only["bound"] == "bytes" and only["floor_us"] == decode.kv_bytes / 4e6
    both = roofline(machine, decode, replace(chunk, queries=4096))
    assert both["kv_mb"] == (decode.kv_bytes + chunk.kv_bytes) / 1e6
    assert both["bound"] == "bytes" and both["floor_us"] == both["kv_mb"] / 4
    alone = roofline(machine, chunk)
    assert alone["bound"] == "operations" and alone["floor_us"] == chunk.operations / 800e6
    machine.tensor_rate = None
    assert roofline(machine, chunk)["floor_us"] == chunk.kv_bytes / 4e6


def test_latent_values_are_views(auto: None) -> None:
    inputs = Inputs.make(Shape("test", RAGGED, 4, 1, 24, headdim_v=16, latent=True), np, fill, 1)
    copy = inputs.copies[0]
    assert np.shares_memory(copy["k_cache"], copy["v_cache"]) and copy["v_cache"].shape[-1] == 16
    q, k, v = inputs.contiguous(0)
    assert np.shares_memory(k, v) and k.shape == (3, 33, 1, 24) and copy["out"].shape == (3, 1, 4, 16)


def test_read_trace(tmp_path: Any) -> None:
    trace = tmp_path / "trace"
    trace.write_text("arrived,length\n0.5,100\n0.7, 0\n\n12\n")
    assert read_trace(str(trace)).tolist() == [100, 1, 12]
    trace.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="--trace must name a text file"):
        read_trace(str(trace))


# ------------------------------------------------------------------------------------------- what peers say of shapes
REFUSALS = [
    ("cuDNN", {"lengths": RAGGED}, "equal lengths only"),
    ("cuDNN", {"queries": 2}, "no causal mask of several queries at the end"),
    ("cuDNN", {"queries": 2, "causal": False}, ""),
    ("FA2", {"dtype": "float32"}, "no float32"),
    ("FA2", {"kv_dtype": "int8"}, "no int8 cache"),
    ("FlashInfer", {"lengths": RAGGED, "queries": 4}, ""),
    ("FlashInfer", {"kv_dtype": "float8_e5m2"}, ""),
    ("FlashInfer", {"headdim": 192, "headdim_v": 128}, "one head dim only"),
    ("FlashInfer", {"page_size": None}, "paged caches only"),
    ("XQA", {"queries": 2}, "one query only"),
    ("XQA", {"page_size": 1}, "pages of 16, 32, 64 or 128"),
    ("XQA", {"kv_dtype": "float8_e5m2"}, "no float8_e5m2 cache"),
    ("FA3", {"headdim": 576, "headdim_v": 512, "heads_kv": 1, "latent": True}, ""),
    ("FlashMLA", {}, "MLA only"),
    ("FlashMLA", {"headdim": 576, "headdim_v": 512, "heads_kv": 1, "latent": True}, "pages of 64"),
    ("FlashMLA", {"headdim": 576, "headdim_v": 512, "heads_kv": 1, "latent": True, "page_size": 64}, ""),
    ("FlashInfer", {"headdim": 576, "headdim_v": 512, "heads_kv": 1, "latent": True}, ""),
    ("FlashInfer", {"headdim": 576, "headdim_v": 512, "heads_kv": 2, "latent": True}, "MLA with one KV head only"),
    (
        "FlashInfer",
        {"headdim": 576, "headdim_v": 512, "heads_kv": 1, "latent": True, "kv_dtype": "float8_e4m3fn"},
        "no float8_e4m3fn cache with MLA",
    ),
    ("FlashInfer-fa2", {"headdim": 576, "headdim_v": 512, "heads_kv": 1, "latent": True, "queries": 2}, "no MLA"),
    ("FlashInfer-fa2", {}, "several queries only"),
    ("FlashInfer-fa2", {"queries": 2}, ""),
]


@pytest.mark.parametrize(("name", "options", "why"), REFUSALS, ids=str)
def test_refusals(name: str, options: dict[str, Any], why: str) -> None:
    shape = Shape(**{"name": "test", "lengths": np.full(3, 32), "heads_q": 8, "heads_kv": 2, **options})
    assert PEERS[name].refusal(shape) == why


def test_xqa_may_round_what_it_multiplies_with_8_bits() -> None:
    shape = Shape("test", RAGGED, 8, 2)
    assert PEERS["XQA"].most_error(shape) == PEERS["FlashInfer"].most_error(shape) == 1e-2
    quantised = replace(shape, kv_dtype="float8_e4m3fn")
    assert PEERS["XQA"].most_error(quantised) == 5e-2 and PEERS["FlashInfer"].most_error(quantised) == 1e-2


def test_a_new_peer_is_a_class() -> None:
    for name, peer in PEERS.items():
        assert peer.name == name and peer.modules and peer.install.startswith("pip install ")
        assert isinstance(peer.missing(), str)


# --------------------------------------------------------------------------- peers, on stand-ins for their libraries
def attend(q: Any, k: Any, v: Any, causal: bool, scale: float) -> Any:
    """Attend in float64 for one sequence; q (queries, heads_q, d), k and v (keys, heads_kv, d)."""
    torch = sys.modules["torch"]
    group = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * scale
    if causal:
        queries, count = scores.shape[1:]
        seen = torch.arange(count)[None] <= torch.arange(queries)[:, None] + count - queries
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


def flashinfer() -> dict[str, Any]:
    """What FlashInfer's documentation says of its functions."""
    torch = sys.modules["torch"]

    class Prefill:
        def __init__(self, workspace: Any, layout: str, backend: str) -> None:
            assert layout == "NHD" and workspace.dtype == torch.uint8 and backend in ("auto", "fa2")

        def plan(self, starts_q: Any, starts: Any, pages: Any, last: Any, heads_q: int, heads_kv: int, headdim: int,
                 page_size: int, *, causal: bool, q_data_type: Any, kv_data_type: Any) -> None:  # fmt: skip
            self.args = starts_q, starts, pages, last
            self.heads, self.page_size, self.causal = (heads_q, heads_kv), page_size, causal

        def run(self, q: Any, caches: Any) -> Any:
            starts_q, starts, pages, last = self.args
            outs = []
            assert q.shape[1] == self.heads[0] and caches[0].shape[1:3] == (self.page_size, self.heads[1])
            for s in range(len(last)):
                mine = pages[starts[s] : starts[s + 1]].long()
                length = (len(mine) - 1) * self.page_size + int(last[s])
                k, v = (cache[mine].flatten(0, 1)[:length] for cache in caches)
                rows = q[starts_q[s] : starts_q[s + 1]]
                outs.append(attend(rows, k, v, self.causal, q.shape[-1] ** -0.5))
            return torch.cat(outs)

    class Decode(Prefill):
        def __init__(self, workspace: Any, layout: str, use_tensor_cores: bool, backend: str) -> None:
            super().__init__(workspace, layout, backend)
            assert use_tensor_cores and backend == "auto"

        def plan(self, starts: Any, *arguments: Any, **options: Any) -> None:  # type: ignore[override]
            super().plan(torch.arange(len(starts)), starts, *arguments, causal=False, **options)

    class Metadata:
        def __init__(self, *lists: Any) -> None:
            self.lists = lists

        @classmethod
        def csr(cls, qo_indptr: Any, kv_indptr: Any, kv_indices: Any, kv_len_arr: Any) -> Metadata:
            return cls(qo_indptr, kv_indptr, kv_indices, kv_len_arr)

    class Mla:
        def __init__(self, workspace: Any, backend: str) -> None:
            assert workspace.dtype == torch.uint8 and backend == "auto"

        def plan(self, *, metadata: Metadata, num_heads: int, head_dim_ckv: int, head_dim_kpe: int, page_size: int,
                 causal: bool, sm_scale: float, q_data_type: Any, kv_data_type: Any) -> None:  # fmt: skip
            assert q_data_type == kv_data_type
            self.args = metadata.lists, num_heads, page_size, head_dim_ckv, head_dim_ckv + head_dim_kpe
            self.causal, self.scale = causal, sm_scale

        def run(self, *, query: Any, kv_cache: Any) -> Any:
            (starts_q, starts, pages, lengths), heads, page_size, dim_v, headdim = self.args
            assert query.shape[1:] == (heads, headdim) and kv_cache.shape[1:] == (page_size, headdim)
            outs = []
            for s, length in enumerate(lengths.tolist()):
                k = kv_cache[pages[starts[s] : starts[s + 1]].long()].flatten(0, 1)[:length, None]
                outs.append(attend(query[starts_q[s] : starts_q[s + 1]], k, k[..., :dim_v], self.causal, self.scale))
            return torch.cat(outs)

    def xqa(q: Any, caches: Any, workspace: Any, table: Any, lengths: Any, longest: int, *, bmm1_scale: float,
            bmm2_scale: float, kv_layout: str, backend: str, out_dtype: Any) -> Any:  # fmt: skip
        assert (kv_layout, backend, bmm2_scale) == ("NHD", "xqa", 1.0) and longest == lengths.max()
        assert not workspace.any() and out_dtype == q.dtype
        outs = []
        for s, length in enumerate(lengths.tolist()):
            k, v = (cache[table[s].long()].flatten(0, 1)[:length] for cache in caches)
            outs.append(attend(q[s : s + 1], k, v, False, bmm1_scale))
        return torch.cat(outs)

    return {
        "flashinfer": {
            "BatchDecodeWithPagedKVCacheWrapper": Decode,
            "BatchPrefillWithPagedKVCacheWrapper": Prefill,
        },
        "flashinfer.mla": {"BatchMLAPagedAttentionWrapper": Mla, "MLAPlanMetadata": Metadata},
        "flashinfer.decode": {"trtllm_batch_decode_with_kv_cache": xqa},
    }


def flash_attention_3(paged: bool) -> dict[str, Any]:
    """FlashAttention-3's interface, or that of the wheel, which has no pages."""
    torch = sys.modules["torch"]

    def get_scheduler_metadata(batch: int, queries: int, keys: int, heads_q: int, heads_kv: int, headdim: int,
                               lengths: Any, *, qkv_dtype: Any, headdim_v: int, page_size: int | None,
                               causal: bool) -> Any:  # fmt: skip
        assert paged or page_size is None
        return batch, queries, heads_q, heads_kv, headdim, headdim_v, page_size, causal

    def flash_attn_with_kvcache(q: Any, k_cache: Any, v_cache: Any, cache_seqlens: Any, page_table: Any = None,
                                qv: Any = None, *, causal: bool, scheduler_metadata: Any) -> Any:  # fmt: skip
        page_size = None if page_table is None else k_cache.shape[1]
        sizes = len(q), q.shape[1], q.shape[2], k_cache.shape[2], q.shape[3], v_cache.shape[3], page_size, causal
        assert scheduler_metadata == sizes
        outs = []
        scale = (q.shape[-1] + (0 if qv is None else qv.shape[-1])) ** -0.5
        for s, length in enumerate(cache_seqlens.tolist()):
            rows = [c[s] if page_table is None else c[page_table[s].long()].flatten(0, 1) for c in (k_cache, v_cache)]
            k, v = (x[:length] for x in rows)
            query = q[s]
            if qv is not None:
                query, k = torch.cat([qv[s], query], -1), torch.cat([v, k], -1)
            outs.append(attend(query, k, v, causal, scale))
        return torch.stack(outs)

    functions = {"get_scheduler_metadata": get_scheduler_metadata, "flash_attn_with_kvcache": flash_attn_with_kvcache}
    return {"flash_attn_interface" if paged else "fa3_fwd_interface": functions}


def flash_mla() -> dict[str, Any]:
    """FlashMLA's interface."""
    torch = sys.modules["torch"]

    def get_mla_metadata(lengths: Any, rows: int, heads_kv: int) -> Any:
        return (rows, heads_kv), len(lengths)

    def flash_mla_with_kvcache(q: Any, cache: Any, table: Any, lengths: Any, head_dim_v: int, metadata: Any,
                               num_splits: Any, *, causal: bool) -> Any:  # fmt: skip
        assert metadata == (q.shape[1] * q.shape[2], 1) and num_splits == len(q)
        outs = []
        for s, length in enumerate(lengths.tolist()):
            k = cache[table[s].long()].flatten(0, 1)[:length]
            outs.append(attend(q[s], k, k[..., :head_dim_v], causal, q.shape[-1] ** -0.5))
        return torch.stack(outs), None

    return {"flash_mla": {"get_mla_metadata": get_mla_metadata, "flash_mla_with_kvcache": flash_mla_with_kvcache}}


LATENT = {"headdim": 24, "headdim_v": 16, "heads_kv": 1, "latent": True}
RUNS = [
    ("FlashInfer", flashinfer, {}),
    ("FlashInfer", flashinfer, {"queries": 3, "page_size": 1}),
    ("FlashInfer", flashinfer, {"queries": 3, "causal": False}),
    ("FlashInfer", flashinfer, LATENT),
    ("FlashInfer", flashinfer, {**LATENT, "queries": 2}),
    ("FlashInfer-fa2", flashinfer, {"queries": 3}),
    ("XQA", flashinfer, {}),
    ("FA3", lambda: flash_attention_3(False), {"queries": 2}),
    ("FA3", lambda: flash_attention_3(True), {"queries": 2}),
    ("FA3", lambda: flash_attention_3(True), {"page_size": None}),
    ("FA3", lambda: flash_attention_3(False), LATENT),
    ("FlashMLA", flash_mla, {**LATENT, "queries": 2}),
    ("cuDNN", dict, {"lengths": np.full(3, 33)}),
    ("cuDNN", dict, {"lengths": np.full(3, 20), "queries": 2, "causal": False, "page_size": None}),
]


@pytest.mark.parametrize(("name", "library", "options"), RUNS)
def test_peers(name: str, library: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, auto: None) -> None:
    """What a peer hands to its library is the problem that we solve."""
    pytest.importorskip("torch")
    for module, functions in library().items():
        fake = ModuleType(module)
        fake.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, module, fake)
        fake.__spec__ = type("Spec", (), {})()  # type: ignore[assignment]
    monkeypatch.setattr(TorchPeer, "device", "cpu")
    sizes = {"heads_kv": 2, "headdim": 16, "page_size": 4, "dtype": "float32", **options}
    shape = Shape(**{"name": "test", "lengths": RAGGED, "heads_q": 4, **sizes})
    inputs = Inputs.make(shape, np, fill, 1)
    kind = PEERS[name]
    if name == "cuDNN":
        monkeypatch.setattr(kind, "backend", "MATH")
    peer = kind()
    peer.prepare(inputs)
    copy = {key: value for key, value in inputs.copies[0].items() if key != "out"}
    expected = reference.attention(**copy, causal=shape.causal).out
    assert distance(peer.answer(), expected) < 1e-5
