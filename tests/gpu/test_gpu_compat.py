"""cuflash.compat on torch tensors of a GPU: sglang's calls, on torch's streams and inside of ``torch.cuda.graph``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import HAS_GPU
from gate import Gate
from sglang_calls import DIM, EXTENDED, HEADS, KV_HEADS, GraphBuffers, Server, ServerTests, latent_attention

from cuflash.compat import scheduler_metadata_size, sgl_kernel
from cuflash.compat.sgl_kernel import flash_attn

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.skipif(not HAS_GPU or not torch.cuda.is_available(), reason="no GPU, or a torch without CUDA")


@pytest.fixture(params=["eager", "graph"])
def server(request: pytest.FixtureRequest) -> Server:
    return Server(torch, "cuda", "bfloat16", page_size=16, in_graph=request.param == "graph")


class TestServer(ServerTests):
    pass


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
def test_decode_with_other_pages_sinks_softcap_and_out(page_size: int, in_graph: bool) -> None:
    server = Server(torch, "cuda", "float16", page_size, softcap=20.0, in_graph=in_graph)
    sinks = torch.nn.Parameter(torch.linspace(-2, 2, HEADS, device="cuda").bfloat16())
    with torch.no_grad():
        server.decode(planned=True, sinks=sinks, given_out=True)


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
def test_quantised_pool(in_graph: bool) -> None:
    server = Server(torch, "cuda", "float8_e4m3fn", page_size=16, in_graph=in_graph)
    server.decode(planned=True)
    server.decode(window=10)
    server.extend(EXTENDED)


@pytest.mark.parametrize("warm", ["same stream", "side stream", "cold"])
def test_graphs_of_two_batch_sizes(warm: str) -> None:
    """A graph per batch size in one pool of torch's; metadata is copied into what they read, between replays."""
    server = Server(torch, "cuda", "bfloat16", page_size=16, lengths=(100, 1, 37, 64, 200, 13))
    stream, pool, graphs = torch.cuda.Stream(), torch.cuda.graph_pool_handle(), {}
    torch.cuda.synchronize()
    for batch in (6, 2):  # the largest first, as servers do
        buffers, graph = GraphBuffers(server, batch, most=8, window=20), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        if warm != "cold":
            with torch.cuda.stream(stream):
                buffers.run()
            torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=pool, **({"stream": stream} if warm == "same stream" else {})):
            buffers.run()
        graphs[batch] = buffers, graph
    server.fill_free_memory()
    for batch, requests in ((2, [1]), (6, [3, 0, 5]), (2, [4, 2]), (6, list(range(6))), (2, [0])):
        buffers, graph = graphs[batch]
        buffers.fill(requests)
        graph.replay()
        buffers.check()


@pytest.mark.parametrize("planned", [True, False], ids=["planned", "unplanned"])
@pytest.mark.parametrize("only_qv", [False, True])
def test_mla(only_qv: bool, planned: bool) -> None:
    latent_attention(torch, "cuda", "bfloat16", only_qv, planned)


def test_runs_on_torchs_stream() -> None:
    """The call waits for what torch's stream has yet to do, and torch's stream for the call, not the host."""
    server = Server(torch, "cuda", "float16", lengths=(100, 7))
    q, cache = server.normal(2, 1, HEADS, DIM), server.normal(2, 128, KV_HEADS, DIM)
    lengths = server.ints([100, 7])
    plan = {"num_heads": HEADS, "num_heads_k": KV_HEADS, "headdim": DIM, "qkv_dtype": torch.float16}
    wanted = flash_attn.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths)
    late, stream = torch.full_like(q, float("nan")), torch.cuda.Stream()
    late_lengths, gate = torch.zeros_like(lengths), Gate()

    def step() -> Any:
        late.copy_(q)
        late_lengths.copy_(lengths)
        metadata = flash_attn.get_scheduler_metadata(2, 1, 128, cache_seqlens=late_lengths, **plan)
        out = flash_attn.flash_attn_with_kvcache(
            late, cache, cache, cache_seqlens=late_lengths, scheduler_metadata=metadata
        )
        return out.clone()

    with torch.cuda.stream(stream):
        step()  # loads, and takes memory
        late.fill_(float("nan"))
        late_lengths.zero_()
        torch.cuda.synchronize()
        gate.close(stream)
        copy = step()
    gate.open()
    torch.cuda.synchronize()
    torch.testing.assert_close(copy, wanted, atol=2e-3, rtol=2e-3)


def test_metadata_is_checked_under_validate(monkeypatch: pytest.MonkeyPatch) -> None:
    q, cache = torch.zeros(2, 1, HEADS, DIM, device="cuda"), torch.zeros(2, 16, KV_HEADS, DIM, device="cuda")
    lengths = torch.tensor([3, 16], dtype=torch.int32, device="cuda")
    metadata = flash_attn.get_scheduler_metadata(2, 1, 16, HEADS, KV_HEADS, DIM, lengths, qkv_dtype=torch.float32)
    assert metadata.is_cuda and metadata.numel() <= scheduler_metadata_size(2)
    given: dict[str, Any] = {"q": q, "k_cache": cache, "v_cache": cache, "cache_seqlens": lengths}
    with pytest.raises(ValueError, match="scheduler_metadata must have shape"):
        flash_attn.flash_attn_with_kvcache(**given, scheduler_metadata=metadata[:-1])
    monkeypatch.setenv("CUFLASH_VALIDATE", "1")
    flash_attn.flash_attn_with_kvcache(**given, scheduler_metadata=metadata)
    with pytest.raises(ValueError, match="scheduler_metadata is no plan"):
        flash_attn.flash_attn_with_kvcache(**given, scheduler_metadata=torch.zeros_like(metadata))


def test_merge_state() -> None:
    rng = np.random.default_rng(0)
    outs, lses = rng.standard_normal((2, 5, 4, 64), np.float32), rng.standard_normal((2, 5, 4), np.float32)
    wanted = sgl_kernel.merge_state_v2(outs[0], lses[0], outs[1], lses[1])
    tensors = [torch.from_numpy(x).cuda() for x in (outs[0], lses[0], outs[1], lses[1])]
    for mine, theirs in zip(sgl_kernel.merge_state_v2(*tensors), wanted, strict=True):
        assert mine.is_cuda
        np.testing.assert_allclose(mine.cpu(), theirs, atol=1e-5)
