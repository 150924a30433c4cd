"""cuflash.compat: sglang's and FlashAttention-3's functions on torch tensors, and metadata as bare arrays."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import reference
from conftest import HAS_SIMULATOR
from problems import Backend
from sglang_calls import DIM, EXTENDED, HEADS, KV_HEADS, GraphBuffers, Server, ServerTests, latent_attention

import cuflash
from cuflash.compat import calls, plans, scheduler_metadata_size, sgl_kernel, torch_tensors
from cuflash.compat import flash_attn_interface as fa3
from cuflash.compat.sgl_kernel import flash_attn as sgl


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture(params=["float32", "bfloat16"])
def server(request: pytest.FixtureRequest, torch: Any) -> Server:
    return Server(torch, "cpu", request.param, page_size=16)


class TestServer(ServerTests):
    pass


class TestOnTorchsStream(ServerTests):
    """The same calls import tensors where torch's stream is CuPy's alone: elsewhere a capture of it would fail."""

    @pytest.fixture(autouse=True)
    def imports_are_on_it(self, torch: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        depths, imports = [0], []
        enter, export = torch_tensors.stream_of, torch.Tensor.__dlpack__

        @contextmanager
        def stream_of(x: Any) -> Iterator[None]:
            depths.append(depths[-1] + 1)
            with enter(x):
                yield
            depths.pop()

        def dlpack(tensor: Any, **options: Any) -> Any:
            imports.append(depths[-1])
            return export(tensor, **options)

        monkeypatch.setattr(torch_tensors, "stream_of", stream_of)
        monkeypatch.setattr(torch.Tensor, "__dlpack__", dlpack)
        yield
        assert imports and 0 not in imports


@pytest.mark.parametrize("page_size", [1, 64])
def test_decode_with_other_pages_sinks_softcap_and_out(torch: Any, page_size: int) -> None:
    server = Server(torch, "cpu", "bfloat16", page_size, softcap=20.0)
    sinks = torch.nn.Parameter(torch.linspace(-2, 2, HEADS).bfloat16())  # as models have them
    with torch.no_grad():
        server.decode(planned=True, sinks=sinks, given_out=True)


@pytest.mark.parametrize("batch", [2, 4])
def test_graph_buffers_with_padding(server: Server, batch: int) -> None:
    """A plain loop where a GPU has a graph: buffers of the largest batch, metadata copied into a slice of one."""
    buffers = GraphBuffers(server, batch, most=8, window=20)
    for requests in ([1], [3, 0], list(range(batch)), [2]):
        buffers.fill(requests)
        buffers.run()
        buffers.check()


def test_quantised_pool(torch: Any) -> None:
    """Queries are cast to the pool's dtype, and give bfloat16."""
    server = Server(torch, "cpu", "float8_e4m3fn", page_size=16)
    server.decode(planned=True)
    server.decode(window=10)
    server.extend(EXTENDED)


# ------------------------------------------------------------------------------------------------ MLA
@pytest.mark.parametrize("planned", [True, False], ids=["planned", "unplanned"])
@pytest.mark.parametrize("only_qv", [False, True])
def test_mla(torch: Any, only_qv: bool, planned: bool) -> None:
    latent_attention(torch, "cpu", "float16", only_qv, planned)


# ------------------------------------------------------------------------------------------------ bare metadata
def call(backend: Backend, **changes: Any) -> tuple[dict[str, Any], dict[str, Any], np.ndarray]:
    """Arguments of metadata and of the call, and the answer."""
    rng = np.random.default_rng(0)
    lengths = np.array([300, 5, 120], np.int32)
    q = rng.standard_normal((3, 2, HEADS, DIM), np.float32)
    caches = rng.standard_normal((2, 3, 320, KV_HEADS, DIM), np.float32)
    answer = reference.attention(q, *caches, cache_seqlens=lengths, causal=True)
    move = backend.to_native
    plan = {"batch_size": 3, "max_seqlen_q": 2, "max_seqlen_k": 320, "num_heads_q": HEADS, "num_heads_kv": KV_HEADS,
            "headdim": DIM, "cache_seqlens": move(lengths), "qkv_dtype": "float32", "causal": True}  # fmt: skip
    attend = {"q": move(q), "k_cache": move(caches[0]), "v_cache": move(caches[1]), "cache_seqlens": move(lengths),
              "causal": True}  # fmt: skip
    return plan | changes, attend, answer.out


@pytest.mark.parametrize("max_seqlen_k", [1, 320, 2**31 - 1])
def test_nothing_follows_from_the_longest_keys(
    backend: Backend, max_seqlen_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUFLASH_NUM_SM", "132")  # so many that the library's own plan has clusters for 320 keys
    plan, attend, answer = call(backend, max_seqlen_k=max_seqlen_k)
    own = cuflash.get_scheduler_metadata(**plan)
    assert (own.partition.cluster > 1) == (max_seqlen_k == 320) or own.device.arch < 90
    metadata = fa3.get_scheduler_metadata(**plan)
    assert type(metadata) is type(attend["q"]) and metadata.dtype == np.int32
    buffer = backend.to_native(np.full(scheduler_metadata_size(64), -1, np.int32))
    buffer[: metadata.size] = metadata
    for _ in range(2):  # a call leaves it as it is
        out = fa3.flash_attn_with_kvcache(**attend, scheduler_metadata=buffer[: metadata.size])
        np.testing.assert_allclose(backend.to_numpy(out), answer, atol=2e-5)
    np.testing.assert_array_equal(backend.to_numpy(buffer[: metadata.size]), backend.to_numpy(metadata))


def test_jax() -> None:
    """Arrays that never change: the buffer is another one after every copy."""
    jax = pytest.importorskip("jax")
    lengths = np.array([300, 5, 120], np.int32)
    rng = np.random.default_rng(0)
    q, cache = rng.standard_normal((3, 2, HEADS, DIM), np.float32), rng.standard_normal((3, 320, 2, DIM), np.float32)
    seqlens = jax.numpy.array(lengths)
    metadata = fa3.get_scheduler_metadata(3, 2, 320, HEADS, 2, DIM, seqlens, qkv_dtype="float32")
    assert isinstance(metadata, jax.Array)
    buffer = jax.numpy.zeros(scheduler_metadata_size(8), "int32").at[: metadata.size].set(metadata)
    q_jax, cache_jax = jax.numpy.array(q), jax.numpy.array(cache)
    out, lse, *_ = fa3.flash_attn_with_kvcache(
        q_jax, cache_jax, cache_jax, cache_seqlens=seqlens, scheduler_metadata=buffer[: metadata.size],
        return_softmax_lse=True,
    )  # fmt: skip
    assert isinstance(out, jax.Array) and isinstance(lse, jax.Array)
    answer = reference.attention(q, cache, cache, cache_seqlens=lengths)
    np.testing.assert_allclose(out, answer.out, atol=2e-5)
    np.testing.assert_allclose(lse, answer.lse, atol=2e-5)


def test_a_copied_plan_is_that_of_the_library(backend: Backend) -> None:
    """And it is used: shares of another plan give other bits, if not other numbers."""
    if backend.name == "numpy":
        pytest.skip("NumPy has no use for a plan")
    plan, attend, answer = call(backend)
    own = cuflash.get_scheduler_metadata(**plan | {"max_seqlen_k": 2**31 - 1})
    metadata = fa3.get_scheduler_metadata(**plan)
    np.testing.assert_array_equal(backend.to_numpy(metadata), backend.to_numpy(own.array))
    stale = fa3.get_scheduler_metadata(**plan | {"cache_seqlens": backend.to_native(np.array([9, 300, 1], np.int32))})
    assert (backend.to_numpy(stale) != backend.to_numpy(metadata)).any()
    out = fa3.flash_attn_with_kvcache(**attend, scheduler_metadata=metadata)
    bits = cuflash.flash_attn_with_kvcache(**attend, scheduler_metadata=own)
    np.testing.assert_array_equal(backend.to_numpy(out), backend.to_numpy(bits))
    out = fa3.flash_attn_with_kvcache(**attend, scheduler_metadata=stale)
    np.testing.assert_allclose(backend.to_numpy(out), answer, atol=2e-5)


WRONG = {
    "longer": (lambda x: np.append(x, x[:1]), "shape"),
    "shorter": (lambda x: x[:-1].copy(), "shape"),
    "two dimensions": (lambda x: x[None], "shape"),
    "int64": (lambda x: x.astype(np.int64), "int32"),
    "strided": (lambda x: np.repeat(x, 2)[::2], "contiguous"),
    "not filled": (lambda x: np.zeros_like(x), "no plan"),
    "garbage": (lambda x: np.full_like(x, -1), "no plan"),
    "begins late": (lambda x: np.where(np.arange(len(x)) == 8, 1, x), "no plan"),
    "large garbage": (lambda x: np.full_like(x, 2**30), "no plan"),
}


@pytest.mark.parametrize("change", WRONG)
def test_arrays_that_are_no_plan(backend: Backend, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_VALIDATE", "1")
    plan, attend, _ = call(backend)
    make, message = WRONG[change]
    array = backend.to_native(make(backend.to_numpy(fa3.get_scheduler_metadata(**plan))))
    if change == "strided":
        array = array[: len(array)] if not hasattr(array, "get") else array.repeat(2)[::2]
    with pytest.raises((TypeError, ValueError), match=f"scheduler_metadata.*{message}"):
        fa3.flash_attn_with_kvcache(**attend, scheduler_metadata=array)


@pytest.mark.parametrize(
    "other", [{"batch_size": 4}, {"num_heads_q": 4 * HEADS, "num_heads_kv": 2 * KV_HEADS}, {"max_seqlen_q": 33}]
)
def test_plans_of_other_problems(backend: Backend, other: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_VALIDATE", "1")
    plan, attend, _ = call(backend)
    plan |= other
    if "batch_size" in other:
        plan["cache_seqlens"] = backend.to_native(np.array([300, 5, 120, 7], np.int32))
    metadata = fa3.get_scheduler_metadata(**plan)
    with pytest.raises(ValueError, match="scheduler_metadata"):
        fa3.flash_attn_with_kvcache(**attend, scheduler_metadata=metadata)


@pytest.mark.parametrize("seed", range(4))
def test_no_plan_is_refused_that_fits(seed: int) -> None:
    """The check of contents knows every plan, whatever its shapes and lengths are: none is refused."""
    rng = np.random.default_rng(seed)
    for _ in range(20):
        batch, kv_heads = int(rng.integers(0, 40)), int(rng.choice([1, 2, 8]))
        heads, queries = kv_heads * int(rng.choice([1, 4, 16])), int(rng.choice([0, 1, 2, 5, 70]))
        lengths = rng.integers(0, 3000, batch).astype(np.int32) * rng.integers(0, 2, batch).astype(np.int32)
        options = {"causal": bool(rng.integers(2)), "num_splits": int(rng.choice([0, 1, 3]))}
        metadata = fa3.get_scheduler_metadata(
            batch, queries, 3000, heads, kv_heads, 64, lengths, qkv_dtype="float16", **options
        )
        q, cache = np.zeros((batch, queries, heads, 64), np.float16), np.zeros((batch, 1, kv_heads, 64), np.float16)
        fa3.flash_attn_with_kvcache(
            q, cache, cache, cache_seqlens=np.minimum(lengths, 1), scheduler_metadata=metadata, **options
        )


def test_one_length_and_none_on_a_bare_plan(backend: Backend) -> None:
    plan, attend, _ = call(backend)
    metadata = fa3.get_scheduler_metadata(**plan)
    for number in (77, None):
        attend["cache_seqlens"] = number
        wanted = cuflash.flash_attn_with_kvcache(**attend)
        out = fa3.flash_attn_with_kvcache(**attend, scheduler_metadata=metadata)
        np.testing.assert_allclose(backend.to_numpy(out), backend.to_numpy(wanted), atol=2e-5)


def test_size_of_a_buffer() -> None:
    for batch in (0, 1, 3, 1000):
        lengths = np.ones(batch, np.int32)
        assert fa3.get_scheduler_metadata(batch, 1, 1, 8, 2, 64, lengths).size <= scheduler_metadata_size(batch)
    with pytest.raises(ValueError, match="batch_size"):
        scheduler_metadata_size(-1)


# ------------------------------------------------------------------------------------------------ their interfaces
def test_returns_are_theirs(torch: Any) -> None:
    q, kv = torch.randn(2, 3, 4, 64), torch.randn(2, 9, 2, 64)
    assert fa3.flash_attn_with_kvcache(q, kv, kv).shape == q.shape
    out, lse, *rest = fa3.flash_attn_with_kvcache(q, kv, kv, return_softmax_lse=True)
    assert out.shape == q.shape and lse.shape == (2, 4, 3) and [type(x) for x in rest] == [torch.Tensor] * 2
    out, lse = fa3.flash_attn_func(q, kv, kv, causal=True, return_attn_probs=True)
    answer = reference.attention(q.numpy(), kv.numpy(), kv.numpy(), cache_seqlens=np.array([9, 9]), causal=True)
    np.testing.assert_allclose(out, answer.out, atol=2e-5)
    np.testing.assert_allclose(lse, answer.lse, atol=2e-5)


def test_varlen_with_used_lengths_and_pages(torch: Any) -> None:
    """FlashAttention-3's and sglang's, on keys that are used in part."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, h, 32), np.float32) for n, h in ((5, 4), (20, 2), (20, 2)))
    starts_q, starts_k, used = (np.array(x, np.int32) for x in ([0, 3, 3, 5], [0, 8, 12, 20], [6, 0, 8]))
    k[6:12] = v[6:12] = np.nan
    table = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 0, 0, 0, 0], [12, 13, 14, 15, 16, 17, 18, 19]], np.int32)
    answer = reference.attention(
        q, k[:, None], v[:, None], page_table=table, cache_seqlens=used, cu_seqlens_q=starts_q, max_seqlen_q=3,
        window_size=(4, 0),
    )  # fmt: skip
    tensors = [torch.from_numpy(x) for x in (q, k, v, starts_q, starts_k)]
    lengths = torch.from_numpy(used)
    options: dict[str, Any] = {"seqused_k": lengths, "window_size": (4, 0)}
    out = fa3.flash_attn_varlen_func(*tensors, 3, 8, **options)
    np.testing.assert_allclose(out, answer.out, atol=2e-5)
    options |= {"max_seqlen_q": 3, "page_table": torch.from_numpy(table), "return_softmax_lse": True}
    tensors[1:3] = [x[:, None] for x in tensors[1:3]]
    out, lse, *_ = sgl.flash_attn_varlen_func(*tensors[:4], None, **options)
    np.testing.assert_allclose(out, answer.out, atol=2e-5)
    np.testing.assert_allclose(lse, answer.lse, atol=2e-5)


def test_merge_state(torch: Any) -> None:
    rng = np.random.default_rng(0)
    v_a, v_b = rng.standard_normal((2, 5, 4, 64), np.float32)
    s_a, s_b = rng.standard_normal((2, 5, 4), np.float32)
    s_a[0] = -np.inf
    s_a[1] = s_b[1] = -np.inf
    weight_a, weight_b = np.exp(s_a.astype(np.float64))[..., None], np.exp(s_b.astype(np.float64))[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = np.nan_to_num((v_a * weight_a + v_b * weight_b) / (weight_a + weight_b))
        total = np.log(weight_a + weight_b)[..., 0]
    for convert in (lambda x: x, torch.from_numpy):
        states = [convert(x) for x in (v_a, s_a, v_b, s_b)]
        out, lse = sgl_kernel.merge_state_v2(*states)
        assert type(out) is type(states[0]) and lse.shape == (5, 4)
        np.testing.assert_allclose(out, wanted, atol=2e-5)
        np.testing.assert_allclose(lse, total, atol=2e-5)
        given = convert(np.full_like(v_a, np.nan)), convert(np.full_like(s_a, np.nan))
        again = sgl_kernel.merge_state_v2(*states, *given)
        assert again[0] is given[0] and again[1] is given[1]
        np.testing.assert_array_equal(given[0], out)
        np.testing.assert_array_equal(given[1], lse)


@pytest.mark.parametrize("name", ["v_a", "s_a", "v_b", "s_b", "v_merged", "s_merged"])
@pytest.mark.parametrize("kind", ["list", "shape", "other kind"])
def test_merge_state_names_what_is_wrong(kind: str, name: str, torch: Any) -> None:
    """Before anything is written."""
    given = {n: torch.ones((5, 4, 64) if n.startswith("v") else (5, 4)) for n in ("v_a", "s_a", "v_b", "s_b")}
    given |= {"v_merged": torch.full((5, 4, 64), 7.0), "s_merged": torch.full((5, 4), 7.0)}
    written = given["v_merged"]
    wrong = {"list": [1.0], "shape": torch.ones(3), "other kind": given[name].numpy()}[kind]
    if (kind, name) == ("other kind", "v_a"):
        name = "s_a"  # is then the first of another kind
        given["v_a"] = wrong
    else:
        given[name] = wrong
    with pytest.raises((TypeError, ValueError), match=f"^{name} must "):
        sgl_kernel.merge_state(**given)
    assert (written == 7).all()


@pytest.mark.parametrize("name", ["v_a", "s_a", "v_b", "s_b", "v_merged", "s_merged"])
@pytest.mark.parametrize("wrong", [np.float16, np.ndarray, 1.0, np.float32(1)], ids=str)
def test_merge_state_takes_no_classes_and_numbers(wrong: Any, name: str) -> None:
    """A class has a shape, which is no tuple."""
    given = {n: np.ones((5, 4, 64) if n.startswith("v") else (5, 4), np.float32) for n in ("v_a", "s_a", "v_b", "s_b")}
    with pytest.raises((TypeError, ValueError), match=f"^{name} must "):
        sgl_kernel.merge_state(**given | {name: wrong})


WRONG_LSES: dict[str, Any] = {
    "integers": np.zeros((5, 4), np.int32),
    "another width": np.zeros((5, 4), np.float64),
    "read-only": np.broadcast_to(np.float32(0), (5, 4)),
    "overlapping": np.lib.stride_tricks.as_strided(np.zeros(4, np.float32), (5, 4), (0, 4)),
}


@pytest.mark.parametrize("wrong", WRONG_LSES)
def test_merge_state_checks_where_the_lse_goes(wrong: str) -> None:
    """Before anything is written."""
    v, s, written = np.ones((5, 4, 64), np.float32), np.ones((5, 4), np.float32), np.full((5, 4, 64), 7, np.float32)
    with pytest.raises((TypeError, ValueError), match="^s_merged must "):
        sgl_kernel.merge_state(v, s, v, s, written, WRONG_LSES[wrong])
    assert (written == 7).all()


def test_merge_state_refuses_an_lse_in_the_output() -> None:
    v, s, written = np.ones((5, 4, 64), np.float32), np.ones((5, 4), np.float32), np.full((5, 4, 64), 7, np.float32)
    with pytest.raises(ValueError, match="^s_merged must share no memory with v_merged"):
        sgl_kernel.merge_state(v, s, v, s, written, written[..., 0])
    assert (written == 7).all()


def test_merge_state_into_an_lse_of_any_strides() -> None:
    v, s, lse = np.ones((5, 4, 64), np.float32), np.zeros((5, 4), np.float32), np.zeros((4, 10), np.float32).T[::2]
    assert sgl_kernel.merge_state(v, s, v, s, None, lse)[1] is lse
    np.testing.assert_allclose(lse, np.log(2), rtol=1e-6)


@pytest.mark.parametrize("wrong", ["integers", "gradient", "expanded"])
def test_merge_state_checks_tensors_where_the_lse_goes(wrong: str, torch: Any) -> None:
    v, s, written = torch.ones(5, 4, 64), torch.ones(5, 4), torch.full((5, 4, 64), 7.0)
    lse = {
        "integers": torch.zeros(5, 4, dtype=torch.int32), "gradient": torch.zeros(5, 4, requires_grad=True),
        "expanded": torch.zeros(1, 4).expand(5, 4),
    }[wrong]  # fmt: skip
    with pytest.raises((TypeError, ValueError), match="^s_merged "):
        sgl_kernel.merge_state(v, s, v, s, written, lse)
    assert (written == 7).all()


def test_names_and_order_are_theirs() -> None:
    ours = list(inspect.signature(cuflash.flash_attn_with_kvcache).parameters)
    theirs = list(inspect.signature(fa3.flash_attn_with_kvcache).parameters)
    assert theirs == [*ours[: ours.index("return_softmax_lse") + 1], "sinks"]
    last = ["sinks", "score_mod", "aux_tensors", "ver", "only_qv", "out"]
    assert list(inspect.signature(sgl.flash_attn_with_kvcache).parameters) == [*theirs[:-1], *last]
    packed, theirs = (list(inspect.signature(module.flash_attn_varlen_func).parameters) for module in (cuflash, fa3))
    assert theirs == [*packed[: packed.index("sm_margin") + 1], "return_attn_probs"]
    plan = list(inspect.signature(fa3.get_scheduler_metadata).parameters)
    assert list(inspect.signature(sgl.get_scheduler_metadata).parameters) == [
        {"num_heads_q": "num_heads", "num_heads_kv": "num_heads_k"}.get(name, name) for name in plan
    ]


def test_errors(torch: Any) -> None:
    q, kv = torch.randn(2, 1, 4, 64, requires_grad=True), torch.randn(2, 9, 2, 64)
    with pytest.raises(RuntimeError, match="q requires a gradient.*no_grad"):
        fa3.flash_attn_func(q, kv, kv)
    with pytest.raises(RuntimeError, match="k_cache requires a gradient.*no_grad"):
        fa3.flash_attn_with_kvcache(q.detach(), kv.clone().requires_grad_(), kv)
    with torch.inference_mode():
        assert not fa3.flash_attn_with_kvcache(q, kv, kv).requires_grad
    q = q.detach()
    with pytest.raises(NotImplementedError, match="score_mod"):
        sgl.flash_attn_with_kvcache(q, kv, kv, score_mod=max)
    with pytest.raises(ValueError, match="ver must be 3 or 4, got 2"):
        sgl.flash_attn_with_kvcache(q, kv, kv, ver=2)
    with pytest.raises(ValueError, match="qv"):
        sgl.flash_attn_with_kvcache(None, None, kv, only_qv=True)
    starts = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="flash_attn_varlen_func: seqused_q"):
        fa3.flash_attn_varlen_func(q[0], kv[0], kv[0], starts, starts, 1, 1, seqused_q=starts[1:])
    with pytest.raises(TypeError, match="cache_seqlens must be an array"):
        fa3.get_scheduler_metadata(2, 1, 9, 4, 2, 64, 9)
    with pytest.raises(ValueError, match="q must have shape"):
        fa3.flash_attn_with_kvcache(q[0, 0], kv, kv)


# ------------------------------------------------------------------------------------------------ the kernels
@pytest.mark.skipif(not HAS_SIMULATOR, reason="no simulator")
@pytest.mark.parametrize("pattern", ["decode", "cascade", "prefix_chunks", "graph buffers", "latent attention"])
def test_kernels(torch: Any, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those calls that depend on a plan or on what compat makes of arguments, on the simulator."""
    monkeypatch.setenv("CUFLASH_BACKEND", "sim")
    monkeypatch.setenv("CUFLASH_NUM_SM", "8")
    server = Server(torch, "cpu", "float16", page_size=16, lengths=(40, 1, 17))
    if pattern == "decode":
        server.decode(planned=True)
    elif pattern == "cascade":
        server.cascade(branches=2, depth=3)
    elif pattern == "latent attention":
        latent_attention(torch, "cpu", "float16", only_qv=False, planned=True)
    elif pattern == "prefix_chunks":
        server.prefix_chunks((5, 1, 8))
    else:
        buffers = GraphBuffers(server, 2, most=4, window=20)
        for requests in ([1], [2, 0]):
            buffers.fill(requests)
            buffers.run()
            buffers.check()


@pytest.mark.skipif(not HAS_SIMULATOR, reason="no simulator")
def test_captured_calls_without_a_plan(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They plan for themselves, in the caller's memory; here as if a graph were captured."""
    made = []
    monkeypatch.setattr(torch_tensors, "is_captured", lambda x: True)
    monkeypatch.setattr(calls, "make_plan", lambda *given: made.append(1) or plans.make_plan(*given))
    monkeypatch.setenv("CUFLASH_BACKEND", "sim")
    monkeypatch.setenv("CUFLASH_NUM_SM", "8")
    server = Server(torch, "cpu", "float16", page_size=16, lengths=(40, 1, 17))
    server.decode(window=10)
    server.prefix_chunks((5, 1, 8))
    assert len(made) == 3

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 3, heads, DIM), np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS))
    caches = rng.standard_normal((2, 2, 40, KV_HEADS, DIM), np.float32)
    for lengths in (np.array([30, 4], np.int32), 20):
        answer = reference.attention(q, *caches, k=k, v=v, cache_seqlens=np.broadcast_to(lengths, 2), causal=True)
        tensors = [torch.from_numpy(x.copy()) for x in (q, *caches, k, v)]
        given = torch.from_numpy(lengths) if isinstance(lengths, np.ndarray) else lengths
        out = fa3.flash_attn_with_kvcache(*tensors, cache_seqlens=given, causal=True)
        np.testing.assert_allclose(out, answer.out, atol=2e-5)
        np.testing.assert_array_equal(tensors[1], answer.k_cache)
    answer = reference.attention(q, *caches, cache_seqlens=np.array([40, 40]))
    np.testing.assert_allclose(fa3.flash_attn_with_kvcache(*tensors[:1], *map(torch.from_numpy, caches)), answer.out,
                               atol=2e-5)  # fmt: skip
    assert len(made) == 6


@pytest.mark.parametrize("lengths", [{}, {"cache_seqlens": 2**31}], ids=["none", "one"])
def test_more_keys_than_can_be_counted_on_a_bare_plan(lengths: dict[str, int]) -> None:
    q, cache = np.zeros((1, 1, 1, 8), np.float32), np.zeros((1, 2**16, 1, 8), np.float32)
    metadata = fa3.get_scheduler_metadata(
        1, 1, 100, 1, 1, 8, np.array([50], np.int32), qkv_dtype="float32", page_size=2**16
    )
    with pytest.raises(ValueError, match="^cache_seqlens must be"):
        fa3.flash_attn_with_kvcache(
            q, cache, cache, page_table=np.zeros((1, 2**15), np.int32), scheduler_metadata=metadata, **lengths
        )


class Bare:
    """What DLPack asks of an object, and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **_: Any) -> Any:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def test_packed_keys_of_any_kind() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((20, heads, 64), np.float32) for heads in (4, 2, 2))
    starts = np.array([0, 13, 20], np.int32)
    wanted = fa3.flash_attn_varlen_func(q, k, v, starts, starts, 13, 13, causal=True)
    bare = [Bare(x) for x in (q, k, v, starts, starts)]
    np.testing.assert_array_equal(fa3.flash_attn_varlen_func(*bare, 13, 13, causal=True), wanted)
    np.testing.assert_array_equal(
        fa3.flash_attn_func(*map(Bare, (q[None], k[None], v[None])))[0],
        fa3.flash_attn_func(q[None], k[None], v[None])[0],
    )


def test_what_tells_its_shape_by_dlpack_alone() -> None:
    """One length or none on a bare plan; scratch beside the LSE, which no array need be able to make of itself."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, heads, 64), np.float32) for n, heads in ((1, 4), (20, 2), (20, 2)))
    metadata = fa3.get_scheduler_metadata(2, 1, 20, 4, 2, 64, np.array([20, 20], np.int32), qkv_dtype="float32")
    for number in (13, None):
        wanted = cuflash.flash_attn_with_kvcache(q, k, v, cache_seqlens=number, return_softmax_lse=True)
        found = fa3.flash_attn_with_kvcache(
            *map(Bare, (q, k, v)), cache_seqlens=number, scheduler_metadata=metadata, return_softmax_lse=True
        )
        for one, other in zip(found, wanted, strict=False):
            np.testing.assert_allclose(one, other, atol=2e-5)
    jax = pytest.importorskip("jax")
    _, lse, *scratch = fa3.flash_attn_with_kvcache(jax.numpy.asarray(q), k, v, return_softmax_lse=True)
    assert [type(x) for x in scratch] == [type(lse)] * 2
    with pytest.raises(TypeError, match="^q must"):
        fa3.flash_attn_with_kvcache([1.0], k, v, cache_seqlens=13, scheduler_metadata=metadata)
    with pytest.raises(TypeError, match="^k_cache must"):
        fa3.flash_attn_with_kvcache(q, None, v, scheduler_metadata=metadata)
    with pytest.raises(TypeError, match="^q must"):
        sgl.flash_attn_with_kvcache([1.0], None, v, qv=q, only_qv=True)


@pytest.mark.parametrize("quantised", [False, True])
def test_values_that_are_keys(quantised: bool) -> None:
    """With only_qv new values are new keys, and their scale is both's."""
    rng = np.random.default_rng(0)
    q, new = rng.standard_normal((2, 1, 4, 64), np.float32), rng.standard_normal((2, 1, 2, 64), np.float32)
    cache, lengths = rng.standard_normal((2, 64, 2, 64), np.float32), np.array([40, 7], np.int32)
    given: dict[str, Any] = {"cache_seqlens": lengths, "softmax_scale": 0.125}
    if quantised:
        cache = (20 * cache).astype(np.int8)
        given |= {"v_descale": 0.05}
    else:
        given |= {"v": new}
    same = {("k_descale" if name == "v_descale" else "k" if name == "v" else name): x for name, x in given.items()}
    mine, theirs = cache.copy(), cache.copy()
    wanted = cuflash.flash_attn_with_kvcache(q, mine, mine, **same)
    found = sgl.flash_attn_with_kvcache(None, None, theirs, qv=q, only_qv=True, **given)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(theirs, mine)
    if not quantised:
        np.testing.assert_array_equal(theirs[0, 40], new[0, 0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": [1.0]}, {"k": np.zeros((1, 20, 2, 64), np.float32)}, {"k": np.zeros((20, 2, 32), np.float32)}, {"v": 3},
        {"cu_seqlens_k": np.array(0)}, {"cu_seqlens_k": np.array([0.0, 13, 20])}, {"cu_seqlens_k": np.array([0, 20])},
        {"cu_seqlens_k": np.array([0, 13, 21])}, {"cu_seqlens_k": np.array([2, 13, 20])},
        {"cu_seqlens_k": np.array([0, 13, 9])}, {"seqused_k": np.array([1, 2, 3])}, {"seqused_k": np.array([3, 20])},
        {"seqused_k": np.array([14, 3])}, {"seqused_k": np.array([3, -1])},
        {"seqused_k": np.array(3)}, {"return_attn_probs": 1}, {"k": None}, {"v": None},
        {"cu_seqlens_k": np.array(["0", "13", "20"])}, {"cu_seqlens_k": np.array(["a", "b", "c"])},
        {"cu_seqlens_k": np.zeros(3, [("a", np.int32)])}, {"cu_seqlens_k": np.array([0, np.nan, 20])},
        {"seqused_k": np.array([np.nan, 3])}, {"seqused_k": np.array(["3", "3"])},
    ],
    ids=str,
)  # fmt: skip
def test_errors_about_packed_keys_name_them(wrong: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((20, heads, 64), np.float32) for heads in (4, 2, 2))
    starts = np.array([0, 13, 20], np.int32)
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "cu_seqlens_q": starts, "cu_seqlens_k": starts}
    with pytest.raises((TypeError, ValueError), match=rf"^{next(iter(wrong))} must "):
        fa3.flash_attn_varlen_func(**given | {"max_seqlen_q": 13, "max_seqlen_k": 13} | wrong)


@pytest.mark.parametrize("wrong", [{"k": None, "v": None}, {"k": None}, {"v": None}, {"q": None}], ids=str)
def test_errors_about_a_dense_batch_name_what_is_missing(wrong: dict[str, None]) -> None:
    q, kv = np.ones((2, 1, 4, 64), np.float32), np.ones((2, 9, 2, 64), np.float32)
    with pytest.raises(TypeError, match=rf"^[{''.join(wrong)}] must be an array"):
        fa3.flash_attn_func(**{"q": q, "k": kv, "v": kv} | wrong)


KINDS: dict[str, Any] = {"pack_gqa": "x", "deterministic": object(), "max_seqlen_k": "x"}


@pytest.mark.parametrize(
    ("function", "name"),
    [(fa3.flash_attn_varlen_func, name) for name in KINDS]
    + [(fa3.flash_attn_func, name) for name in ("pack_gqa", "deterministic")]
    + [(sgl.flash_attn_varlen_func, name) for name in ("pack_gqa", "max_seqlen_k")],
)
def test_arguments_that_decide_nothing_are_checked(function: Any, name: str) -> None:
    """The longest keys of sglang's function may be None."""
    q, kv, starts = np.ones((4, 4, 64), np.float32), np.ones((4, 2, 64), np.float32), np.array([0, 4], np.int32)
    given = {"q": q, "k": kv, "v": kv, "cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 4}
    if function is fa3.flash_attn_func:
        given = {"q": q[None], "k": kv[None], "v": kv[None]}
    elif function is fa3.flash_attn_varlen_func:
        given["max_seqlen_k"] = 4
    assert function(**given).shape == given["q"].shape
    with pytest.raises(TypeError, match=f"^{name} must be "):
        function(**given | {name: KINDS[name]})


@pytest.mark.parametrize("module", [fa3, sgl])
def test_whether_the_lse_is_returned_is_checked(module: Any) -> None:
    q, kv = np.ones((2, 1, 4, 64), np.float32), np.ones((2, 9, 2, 64), np.float32)
    with pytest.raises(TypeError, match="^return_softmax_lse must be True or False"):
        module.flash_attn_with_kvcache(q, kv, kv, return_softmax_lse=np.array([1, 2]))
