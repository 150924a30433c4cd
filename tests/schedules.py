"""Random arguments of ``get_scheduler_metadata``, and what a schedule must be, from the definition of the masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Step:
    """Arguments of ``get_scheduler_metadata`` and the multiprocessors that it plans for."""

    num_sm: int
    arguments: dict[str, Any]


def random_step(rng: np.random.Generator, max_batch: int = 20, max_keys: int = 600) -> Step:
    """Draw a step: every feature that a plan knows, alone and together."""

    def sometimes(chance: float) -> bool:
        return bool(rng.random() < chance)

    batch = int(rng.integers(0, max_batch + 1))
    max_seqlen_q = int(rng.choice([0, 1, 1, 1, 1, 2, 3, 5, 16, 40]))
    heads = int(rng.integers(1, 5))
    group = int(rng.choice([1, 2, 3, 4, 7, 8, 16, 24]))
    kind = rng.choice(["equal", "any", "few", "short"])
    if kind == "equal":
        seqlens = np.full(batch, rng.integers(0, max_keys))
    elif kind == "short":
        seqlens = rng.integers(0, 20, batch)
    else:
        seqlens = rng.integers(0, max_keys, batch)
        if kind == "few":
            seqlens[rng.random(batch) < 0.7] = rng.integers(0, 3)
    arguments: dict[str, Any] = {
        "batch_size": batch,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": 2 * max_keys,
        "num_heads_q": heads * group,
        "num_heads_kv": heads,
        "headdim": int(rng.choice([64, 128, 256])),
        "cache_seqlens": seqlens.astype(np.int32),
        "causal": sometimes(0.3),
    }
    if sometimes(0.3):
        arguments["cache_leftpad"] = (seqlens * rng.random(batch)).astype(np.int32)
    if sometimes(0.3):
        arguments["cu_seqlens_q"] = _starts(rng.integers(0, max_seqlen_q + 1, batch))
    if sometimes(0.3):
        arguments["window_size"] = (int(rng.integers(-1, 150)), int(rng.integers(-1, 20)))
    if sometimes(0.2):
        arguments["attention_chunk"] = int(rng.integers(1, 200))
    if sometimes(0.2):
        arguments["max_seqlen_k_new"] = int(rng.integers(1, 8))
    elif sometimes(0.1):
        arguments["cu_seqlens_k_new"] = _starts(rng.integers(0, 8, batch))
    if sometimes(0.3):
        arguments["num_splits"] = int(rng.choice([1, 2, 3, 5, 32]))
    elif sometimes(0.3):
        arguments["split_size"] = 64 * int(rng.integers(1, 5))
    if sometimes(0.2):
        arguments["sm_margin"] = int(rng.integers(1, 50))
    return Step(int(rng.choice([1, 2, 13, 40, 132, 170])), arguments)


def lengths(arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return leftpad, valid keys and query positions of each sequence, (batch,) each."""
    batch = arguments["batch_size"]
    leftpad = arguments.get("cache_leftpad", np.zeros(batch, np.int64)).astype(np.int64)
    starts = arguments.get("cu_seqlens_k_new")
    new = np.full(batch, arguments.get("max_seqlen_k_new", 0)) if starts is None else np.diff(starts)
    starts = arguments.get("cu_seqlens_q")
    queries = np.full(batch, arguments["max_seqlen_q"]) if starts is None else np.diff(starts)
    return leftpad, arguments["cache_seqlens"] - leftpad + new, queries


def visible(arguments: dict[str, Any], rows: int, row_blocks: int) -> np.ndarray:
    """Say which slots of the cache each row block sees: bool (batch, row_blocks, slots), key by key and row by row."""
    leftpads, seqlens_k, seqlens_q = lengths(arguments)
    left, right = arguments.get("window_size", (-1, -1))
    chunk = arguments.get("attention_chunk", 0)
    group = arguments["num_heads_q"] // arguments["num_heads_kv"]
    slots = int((leftpads + seqlens_k).max(initial=0)) + 1
    seen = np.zeros((len(leftpads), row_blocks, slots), bool)
    for s, (leftpad, seqlen_k, seqlen_q) in enumerate(zip(leftpads, seqlens_k, seqlens_q, strict=True)):
        i, j = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)
        p = i + seqlen_k - seqlen_q
        sees = np.ones((seqlen_q, seqlen_k), bool)
        if arguments.get("causal"):
            sees &= j <= p
        if left >= 0:
            sees &= j >= p - left
        if right >= 0:
            sees &= j <= p + right
        if chunk:
            sees &= j // chunk == p // chunk
        for row in range(seqlen_q * group):
            seen[s, row // rows, leftpad : leftpad + seqlen_k] |= sees[row // group]
    return seen


def items(arguments: dict[str, Any], work: np.ndarray, rows: int, row_blocks: int) -> np.ndarray:
    """Return the numbers of the items of ``work()``: row blocks are taken from the front and from the back in turn."""
    group = arguments["num_heads_q"] // arguments["num_heads_kv"]
    places = np.zeros((arguments["batch_size"], row_blocks), np.int64)
    for s, seqlen_q in enumerate(lengths(arguments)[2]):
        left, place = list(range(-(-int(seqlen_q) * group // rows))), 0
        while left:
            places[s, left.pop(-1 if place % 2 else 0)] = place
            place += 1
    place = places[work["sequence"], work["row_block"]]
    return (work["sequence"] * arguments["num_heads_kv"] + work["kv_head"]).astype(np.int64) * row_blocks + place


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
