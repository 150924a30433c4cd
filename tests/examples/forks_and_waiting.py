"""A server in small, without a model: requests arrive, wait for pages, share prompts by forking, and leave.

Written by somebody who knew README.md alone.

    python tests/examples/forks_and_waiting.py
"""

import numpy as np

import cuflash

LAYERS, HEADS, HEADS_KV, DIM, PAGES, PAGE, SLOTS = 2, 8, 2, 64, 30, 16, 4
rng = np.random.default_rng(0)
cache = cuflash.PagedKVCache(LAYERS, PAGES, PAGE, HEADS_KV, DIM, "float16", xp=np)
step = cuflash.DecodeStep(cache, HEADS)
# requests: step of arrival, tokens of the prompt, tokens of the answer, answers wanted (2: the prompt is forked)
coming = [(0, 300, 5, 1), (0, 20, 9, 1), (1, 103, 40, 2), (1, 250, 4, 1), (2, 400, 2, 1), (3, 7, 30, 1), (90, 50, 3, 2)]
wanted = sum(answer * copies for _, _, answer, copies in coming)
waiting: list[tuple[int, int, int]] = []
todo: dict[int, int] = {}
left: dict[int, int] = {}
forks: dict[int, int] = {}
# todo: next tokens of a sequence, left: answer tokens still to come
made = waits = held = now = most = 0


def random(*shape: int) -> np.ndarray:
    return rng.standard_normal((*shape, DIM)).astype("float16")


def pages_of(tokens: int) -> int:
    return -(-tokens // PAGE)


while coming or waiting or left:
    while coming and coming[0][0] <= now:
        waiting.append(coming.pop(0)[1:])
    while waiting and len(left) + sum(forks.values()) + waiting[0][2] <= SLOTS:
        prompt, answer, copies = waiting[0]
        if pages_of(prompt + answer) + (copies - 1) * (pages_of(answer) + 1) > cache.num_free_pages:
            waits += 1  # no pages: it waits for a sequence to end
            break
        waiting.pop(0)
        sequence = cache.add(prompt + answer)
        todo[sequence], left[sequence], forks[sequence] = prompt, answer, copies - 1
    now += 1
    tokens = dict(todo)
    while tokens:
        try:
            step.begin(list(tokens), list(tokens.values()))
            break
        except cuflash.OutOfPages:  # a fork has no reservation: the youngest sequence sits this step out
            tokens.popitem()
            held += 1
    assert tokens or not todo, "stuck"
    if not tokens:
        continue
    rows = sum(tokens.values())
    for layer in range(LAYERS):
        out = step(layer, random(rows, HEADS), random(rows, HEADS_KV), random(rows, HEADS_KV))
        assert out.shape == (rows, HEADS, DIM) and np.isfinite(out).all()
    step.commit()
    made, most = made + len(tokens), max(most, len(left))
    for sequence in tokens:
        todo[sequence], left[sequence] = 1, left[sequence] - 1
        for _ in range(forks.pop(sequence, 0)):  # the prompt has just been read
            child = cache.fork(sequence)
            todo[child], left[child], made = 1, left[sequence], made + 1
    done = [sequence for sequence in left if not left[sequence]]
    cache.free(done)
    for sequence in done:
        del todo[sequence], left[sequence]
assert cache.num_free_pages == PAGES and made == wanted and most <= SLOTS, (cache.num_free_pages, made, wanted, most)
print(
    f"{made} tokens in {now} steps, at most {most} at once, waits for pages: {waits}, held back: {held}: all pages free"
)
