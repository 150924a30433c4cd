"""A real model whose decode steps are one CUDA graph: torch's matrix products, CuPy's cache, attention by cuflash.

CuPy calls no cuBLAS while a stream is captured, so the products are torch's; arrays go to and fro by DLPack.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "notebooks"))
gguf = pytest.importorskip("gguf")
llama = pytest.importorskip("llama")
torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="a torch without CUDA")]

TOKENS = 24
QUESTIONS = ["Why is the sky blue?", "What is a GPU good for?", "What is the capital of France?"]


class TorchLlama:
    """Decode steps of a model: weights, activations and tokens are torch's."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.embedding, self.norm = torch.from_dlpack(model.embedding), torch.from_dlpack(model.norm)
        self.layers = [{name: torch.from_dlpack(x) for name, x in vars(layer).items()} for layer in model.layers]

    def forward(self, tokens: Any, cache: Any) -> Any:
        """Return the next token of each sequence."""
        c = self.config
        x = self.embedding[tokens]
        for i, layer in enumerate(self.layers):
            qkv = (self._normalise(x, layer["attention_norm"]) @ layer["qkv"]).view(len(x), -1, c.headdim)
            q, k, v = qkv.split([c.num_heads_q, c.num_heads_kv, c.num_heads_kv], dim=1)
            x = x + cache.attend(i, q, k, v).reshape(len(x), -1) @ layer["attention_out"]
            gate, up = (self._normalise(x, layer["mlp_norm"]) @ layer["gate_up"]).chunk(2, dim=1)
            x = x + torch.nn.functional.silu(gate) * up @ layer["down"]
        return (self._normalise(x, self.norm) @ self.embedding.T).argmax(dim=-1)

    def _normalise(self, x: Any, weight: Any) -> Any:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, self.config.norm_eps)


def test_a_graph_of_a_step_gives_the_tokens_of_eager_steps() -> None:
    import cupy

    try:
        reader = gguf.GGUFReader(llama.find_model())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    tokenizer, model = llama.Tokenizer(reader), llama.Llama(reader, cupy)
    prompts = [tokenizer.chat(question) for question in QUESTIONS]
    eager = llama.answer(model, llama.PagedCache(model, len(prompts), 128), prompts, TOKENS)
    plain = llama.answer(model, llama.PlainCache(model, len(prompts), 128), prompts, TOKENS)
    assert eager == plain

    cache, twin = llama.PagedCache(model, len(prompts), 128), TorchLlama(model)
    tokens = torch.from_dlpack(model(prompts, cache).argmax(axis=-1))
    found = [tokens.tolist()]
    cache.plan(range(len(prompts)), [TOKENS] * len(prompts))  # pages for all tokens to come
    cache.plan(range(len(prompts)), [1] * len(prompts))
    lengths = torch.from_dlpack(cache.step.cache_seqlens)

    def step() -> None:
        cache.step.plan()
        tokens.copy_(twin.forward(tokens, cache))
        lengths.add_(1)

    torch.cuda.synchronize()
    side, graph, pool = torch.cuda.Stream(), torch.cuda.CUDAGraph(), cupy.cuda.MemoryPool()
    own = cupy.cuda.Stream.from_external(side)
    with cupy.cuda.using_allocator(pool.malloc), torch.cuda.stream(side), own:
        for _ in range(3):  # compiles, loads and takes all memory that the graph needs
            step()
            found.append(tokens.tolist())
        with torch.cuda.graph(graph, stream=side):
            step()
        for _ in range(TOKENS - 4):
            graph.replay()
            found.append(tokens.tolist())
    assert [list(answer) for answer in zip(*found, strict=True)] == eager
