"""A serving engine in small: a torch model on ``cuflash.compat``, with a CUDA graph per batch size.

What servers do with FlashAttention-3, with another import. Once per step, outside of the layers, the batch's scheduler
metadata is computed and copied into the buffer that the graph reads; all layers run on it. Batches are padded to a few
sizes: padding has one key, and writes to page 0, which belongs to nobody. On a machine without a GPU the steps run
without graphs.

    python tests/examples/engine.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cuflash.compat import scheduler_metadata_size
from cuflash.compat.sgl_kernel.flash_attn import flash_attn_with_kvcache, get_scheduler_metadata

LAYERS, HEADS, KV_HEADS, DIM, VOCABULARY = 2, 4, 2, 32, 101
PAGES, PAGE, CONTEXT = 64, 16, 96
BATCHES = (1, 2, 4, 8)  # for which there are graphs

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q, k, v -> out, each (tokens, heads, DIM)


class Model:
    """A transformer with random weights."""

    def __init__(self, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).mul_(shape[-2] ** -0.5).to(device)

        width = HEADS * DIM
        self.tokens, self.positions = weight(VOCABULARY, width), weight(CONTEXT, width)
        self.inputs, self.outputs = weight(LAYERS, width, width + 2 * KV_HEADS * DIM), weight(LAYERS, width, width)

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Return the most likely next token of each."""
        x = self.tokens[tokens] + self.positions[positions]
        for layer in range(LAYERS):
            heads = (_norm(x) @ self.inputs[layer]).view(len(x), -1, DIM)
            x = x + attend(layer, *heads.split([HEADS, KV_HEADS, KV_HEADS], 1)).reshape(x.shape) @ self.outputs[layer]
        return (_norm(x) @ self.tokens.T).argmax(-1)


def _norm(x: Tensor) -> Tensor:
    return x * x.square().mean(-1, keepdim=True).rsqrt()


@dataclass
class Request:
    """A prompt and what follows it."""

    tokens: list[int]
    wanted: int
    pages: list[int] = field(default_factory=list)


class Engine:
    """Serves requests that come and go."""

    def __init__(self, model: Model, device: str) -> None:
        self.model, self.device = model, device
        self.caches = torch.zeros(LAYERS, 2, PAGES, PAGE, KV_HEADS, DIM, device=device)
        self.free = list(range(1, PAGES))
        # What the graphs read and write, for the largest batch.
        most, ints = BATCHES[-1], {"dtype": torch.int32, "device": device}
        self.tokens, self.positions, self.slots, self.lengths = torch.zeros(4, most, **ints)
        self.page_table = torch.zeros(most, CONTEXT // PAGE, **ints)
        self.starts = torch.arange(most + 1, **ints)
        self.metadata = torch.zeros(scheduler_metadata_size(most), **ints)
        self.next = torch.zeros(most, dtype=torch.int64, device=device)
        self.steps: dict[int, Callable[[], None]] = {}

    def prompt(self, request: Request) -> None:
        """Read a prompt, and write the first token behind it."""
        count = len(request.tokens)
        request.pages = [self.free.pop() for _ in range(-(-(count + request.wanted) // PAGE))]
        tokens = torch.tensor(request.tokens, device=self.device)
        positions = torch.arange(count, device=self.device)
        pages = torch.tensor(request.pages, dtype=torch.int32, device=self.device)
        starts = torch.tensor([0, count], dtype=torch.int32, device=self.device)
        following = self.model(
            tokens, positions, self._attention(pages[positions // PAGE] * PAGE + positions % PAGE, max_seqlen_q=count,
            page_table=pages[None], cache_seqlens=starts[1:], cu_seqlens_q=starts),
        )  # fmt: skip
        request.tokens.append(int(following[-1]))

    def decode(self, requests: list[Request]) -> None:
        """Write the next token of each request."""
        number = len(requests)
        batch = next(size for size in BATCHES if size >= number)
        last = [len(request.tokens) - 1 for request in requests]
        slots = [request.pages[p // PAGE] * PAGE + p % PAGE for request, p in zip(requests, last, strict=True)]
        columns = ([request.tokens[-1] for request in requests], last, slots, [p + 1 for p in last])
        for buffer, column, padding in zip(
            (self.tokens, self.positions, self.slots, self.lengths), columns, (0, 0, 0, 1), strict=True
        ):
            buffer[:batch] = torch.tensor(column + [padding] * (batch - number), device=self.device)
        self.page_table[:batch] = 0
        for row, request in zip(self.page_table, requests):
            row[: len(request.pages)] = torch.tensor(request.pages, device=self.device)

        if batch not in self.steps:
            self.steps[batch] = self._step(batch)
        metadata = self._metadata(batch)
        self.metadata[: metadata.numel()] = metadata
        self.steps[batch]()
        for request, token in zip(requests, self.next[:number].tolist(), strict=True):
            request.tokens.append(token)

    def _metadata(self, batch: int) -> Tensor:
        metadata: Tensor = get_scheduler_metadata(
            batch_size=batch, max_seqlen_q=1, max_seqlen_k=CONTEXT, num_heads=HEADS, num_heads_k=KV_HEADS, headdim=DIM,
            cache_seqlens=self.lengths[:batch], qkv_dtype=self.caches.dtype, cu_seqlens_q=self.starts[: batch + 1],
            page_size=PAGE, causal=True,
        )  # fmt: skip
        return metadata

    def _step(self, batch: int) -> Callable[[], None]:
        """Return what runs all layers for a batch size: a graph's replay, if there is a GPU."""
        words = self._metadata(batch).numel()  # a slice of this size is what the graph reads
        attend = self._attention(
            self.slots[:batch], page_table=self.page_table[:batch], cache_seqlens=self.lengths[:batch], max_seqlen_q=1,
            cu_seqlens_q=self.starts[: batch + 1], scheduler_metadata=self.metadata[:words],
        )  # fmt: skip

        def run() -> None:
            self.next[:batch] = self.model(self.tokens[:batch], self.positions[:batch], attend)

        if self.device != "cuda":
            return run
        self.metadata[:words] = self._metadata(batch)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # compiles and loads the kernels
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def _attention(self, slots: Tensor, **batch: Any) -> Attend:
        """Return a layer's attention, which first writes the new keys and values to their slots."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k_cache, v_cache = self.caches[layer]
            for cache, new in ((k_cache, k), (v_cache, v)):
                cache.view(-1, KV_HEADS, DIM)[slots] = new
            out: Tensor = flash_attn_with_kvcache(q, k_cache, v_cache, causal=True, **batch)
            return out

        return attend

    def serve(self, requests: list[Request]) -> None:
        """Answer all requests, as many at once as the largest batch has room for."""
        waiting, running = list(requests), list[Request]()
        while waiting or running:
            while waiting and len(running) < BATCHES[-1]:
                self.prompt(waiting[0])
                running.append(waiting.pop(0))
            self.decode(running)
            for request in [request for request in running if request.wanted <= 1]:
                running.remove(request)
                self.free += request.pages
            for request in running:
                request.wanted -= 1


def alone(model: Model, prompt: list[int], wanted: int, device: str) -> list[int]:
    """Answer one prompt by reading everything again for every token, with attention in plain torch."""
    tokens = list(prompt)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * DIM**-0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=device).triu(1)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)

    for _ in range(wanted):
        ids = torch.tensor(tokens, device=device)
        tokens.append(int(model(ids, torch.arange(len(ids), device=device), attend)[-1]))
    return tokens


@torch.no_grad()
def main() -> None:
    """Serve ten requests, and hold the answers against those of each alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model(device)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCABULARY, (5 * i + 3,), generator=generator).tolist() for i in range(10)]
    requests = [Request(list(prompt), 3 + i % 5 * 3) for i, prompt in enumerate(prompts)]
    engine = Engine(model, device)
    engine.serve(requests)
    for i, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        wanted = alone(model, prompt, len(request.tokens) - len(prompt), device)
        assert request.tokens == wanted, f"request {i}: {request.tokens} instead of {wanted}"
    print(f"{len(requests)} requests, {sum(len(r.tokens) for r in requests)} tokens, as each alone; batch sizes "
          f"{sorted(engine.steps)} on {device}{', a graph each' * (device == 'cuda')}")  # fmt: skip


if __name__ == "__main__":
    main()
