"""A server in small: requests arrive over time, are batched as they run, and leave when their answer is complete.

The model is a toy, of random weights. Each answer is compared with the one that the same request gets alone.

    python tests/examples/serving_loop.py
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

import cuflash

LAYERS, HEADS, KV_HEADS, DIM, WORDS, END = 2, 4, 2, 32, 100, 0
PAGES, PAGE_SIZE, LONGEST_ANSWER = 24, 8, 12


@dataclass
class Request:
    """A prompt that arrives at some step, and its answer so far."""

    arrives: int
    prompt: list[int]
    answer: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.answer) == LONGEST_ANSWER or self.answer[-1:] == [END]


class Model:
    """Embedding, layers of attention, and the most likely next word."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        width = HEADS * DIM

        def weights(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32) / np.float32(width) ** 0.5

        self.words = rng.standard_normal((WORDS, width), np.float32)
        self.wq, self.wo = weights(LAYERS, width, width), weights(LAYERS, width, width)
        self.wk, self.wv = weights(2, LAYERS, width, KV_HEADS * DIM)

    def __call__(self, tokens: list[int], step: cuflash.DecodeStep) -> np.ndarray:
        """Return the next word after each of the tokens."""
        x = self.words[tokens]
        for layer in range(LAYERS):
            q = (x @ self.wq[layer]).reshape(-1, HEADS, DIM)
            k, v = ((x @ w[layer]).reshape(-1, KV_HEADS, DIM) for w in (self.wk, self.wv))
            x = x + step(layer, q, k, v).reshape(x.shape) @ self.wo[layer]
        return (x @ self.words.T).argmax(axis=1)


def serve(model: Model, requests: list[Request]) -> int:
    """Answer all requests; return how many ran together at most."""
    cache = cuflash.PagedKVCache(LAYERS, PAGES, PAGE_SIZE, KV_HEADS, DIM, "float32", xp=np)
    step = cuflash.DecodeStep(cache, HEADS)
    coming = sorted(requests, key=lambda request: request.arrives)
    running: dict[int, Request] = {}  # by sequence
    now = most = 0
    while coming or running:
        new: dict[int, list[int]] = {sequence: request.answer[-1:] for sequence, request in running.items()}
        while coming and coming[0].arrives <= now:
            longest = len(coming[0].prompt) + LONGEST_ANSWER
            if longest > cache.page_size * cache.num_free_pages:
                break  # it waits until others leave
            sequence = cache.add(longest)
            running[sequence] = coming.pop(0)
            new[sequence] = running[sequence].prompt
        now += 1
        if not new:
            continue
        most = max(most, len(new))
        step.begin(list(new), [len(tokens) for tokens in new.values()])
        words = model([token for tokens in new.values() for token in tokens], step)
        step.commit()
        last = np.cumsum([len(tokens) for tokens in new.values()]) - 1  # each sequence's last token
        for sequence, word in zip(new, words[last]):
            running[sequence].answer.append(int(word))
        gone = [sequence for sequence in new if running[sequence].done]
        cache.free(gone)
        for sequence in gone:
            del running[sequence]
    assert cache.num_free_pages == PAGES
    return most


def main() -> None:
    """Serve twenty requests together, and each alone."""
    rng = np.random.default_rng(1)
    model = Model()
    arrivals = rng.integers(0, 40, 20).tolist()
    prompts = [rng.integers(1, WORDS, rng.integers(1, 60)).tolist() for _ in arrivals]
    requests = [Request(arrives, prompt) for arrives, prompt in zip(arrivals, prompts)]
    most = serve(model, requests)
    assert most > 2
    for request in requests:
        alone = Request(0, request.prompt)
        serve(model, [alone])
        assert alone.answer == request.answer, (alone, request)
    print(f"{len(requests)} requests, up to {most} at a time; each answer is the one that it gets alone")


if __name__ == "__main__":
    main()
