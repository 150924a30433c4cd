"""The combinations of arguments of FlashAttention-3's own test of its KV cache, called as that test calls.

The grid is that of test_flash_attn_kvcache in hopper/test_flash_attn.py (bfloat16, without qv): what is None there is
None here, what is always passed is passed without its partner, too, and a window is a tensor of two numbers. A plan is
made for the capacity and always with new keys, and is used by two calls. Errors are held against float64, not torch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import reference
from conftest import BACKENDS, on
from problems import DTYPES, Backend, Case, check_cache, check_lse, check_out

import cuflash

BATCH, HEADS, DIM = 5, 6, 128
SHAPES = [(1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048), (16, 20000), (128, 128),
          (256, 512), (2048, 3577)]  # fmt: skip
AXES: dict[str, list[Any]] = {
    "shape": SHAPES,
    "kv_heads": [6, 1, 3],
    "new_kv": [False, True],
    "mask": ["none", "causal", "local"],
    "new_is_q": [True, False],
    "interleaved": [False, True],
    "fraction": [0.0, 0.5, 1.0],
    "page_size": [None, 1, 4, 128],
    "leftpad": [False, True],
    "batch_idx": [False, True],
    "varlen": [False, True],
}


@dataclass(frozen=True)
class Choice:
    """One combination; the attributes are the axes."""

    shape: tuple[int, int]
    kv_heads: int
    new_kv: bool
    mask: str
    new_is_q: bool
    interleaved: bool
    fraction: float
    page_size: int | None
    leftpad: bool
    batch_idx: bool
    varlen: bool

    @property
    def is_run(self) -> bool:
        """Whether the test does not skip it."""
        seqlen_q, seqlen_k = self.shape
        fits = self.page_size is None or seqlen_k % self.page_size == 0
        return fits and not (seqlen_q > seqlen_k and self.new_kv) and (self.new_kv or self.fraction == 0)


GRID = [choice for choice in (Choice(*values) for values in itertools.product(*AXES.values())) if choice.is_run]


def padded_lengths(longest: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(max(1, longest - 20), longest + 1, BATCH)


def starts(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int32)


def make(choice: Choice, chunked: bool, seed: int) -> tuple[dict[str, Any], int]:
    """Return the arguments of the call, but for the plan and num_splits, and the number of new keys."""
    c, rng = choice, np.random.default_rng(seed)
    (seqlen_q, seqlen_k), moves = c.shape, c.mask != "none"

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(DTYPES["bfloat16"])

    arguments: dict[str, Any] = {"q": normal(BATCH, seqlen_q, HEADS, DIM), "k": None, "v": None, "page_table": None}
    new = seqlen_q if c.new_is_q else int(rng.integers(1, seqlen_q + 1))
    arguments |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k_new", "max_seqlen_q", "cache_leftpad", "cache_batch_idx"))
    if c.varlen:
        lengths = padded_lengths(seqlen_q, rng)
        arguments |= {"cu_seqlens_q": starts(lengths), "max_seqlen_q": int(lengths.max())}
        arguments["q"] = np.concatenate([x[:n] for x, n in zip(arguments["q"], lengths, strict=True)])
    if c.new_kv:
        arguments |= {name: normal(BATCH, new, c.kv_heads, DIM) for name in "kv"}
        if c.varlen:
            lengths = padded_lengths(new, rng)
            arguments["cu_seqlens_k_new"] = starts(lengths)
            for name in "kv":
                arguments[name] = np.concatenate([x[:n] for x, n in zip(arguments[name], lengths, strict=True)])
    rows = 2 * BATCH if c.batch_idx else BATCH
    shape: tuple[int, ...] = (rows, seqlen_k)
    if c.page_size is not None:
        shape = (3 * rows * (seqlen_k // c.page_size), c.page_size)
        arguments["page_table"] = rng.permutation(shape[0]).astype(np.int32).reshape(rows, -1)
    arguments |= {name: normal(*shape, c.kv_heads, DIM) for name in ("k_cache", "v_cache")}
    rotary_dim = int(c.fraction * DIM) // 16 * 16
    most = seqlen_k - (seqlen_q if moves and rotary_dim else new) if c.new_kv else seqlen_k
    seqlens = rng.integers(0 if c.new_kv else 1, most + 1, BATCH).astype(np.int32)
    if c.leftpad:
        arguments["cache_leftpad"] = np.array([rng.integers(0, max(1, n)) for n in seqlens], np.int32)
    if c.batch_idx:
        arguments["cache_batch_idx"] = rng.permutation(rows)[:BATCH].astype(np.int32)
    positions = seqlen_k if c.page_size is None else shape[0] * c.page_size
    angles = rng.uniform(0, 2 * np.pi, (positions if rotary_dim else 0, rotary_dim // 2))
    return arguments | {
        "qv": None,
        "rotary_cos": np.cos(angles).astype(DTYPES["bfloat16"]) if rotary_dim else None,
        "rotary_sin": np.sin(angles).astype(DTYPES["bfloat16"]) if rotary_dim else None,
        "cache_seqlens": seqlens,
        "rotary_seqlens": seqlens,
        "causal": c.mask == "causal",
        "window_size": rng.integers(0, seqlen_k, 2) if c.mask == "local" else (-1, -1),
        "attention_chunk": int(rng.integers(1, 2 * seqlen_k)) if chunked else 0,
        "rotary_interleaved": c.interleaved,
    }, new


def run(choice: Choice, backend: Backend, seed: int = 0, rows: int = 60) -> None:
    """Run one combination as the test does; ``rows`` queries are compared."""
    for chunked in (False, True) if choice.mask != "none" else (False,):
        arguments, new = make(choice, chunked, seed)
        total = int(np.prod(arguments["q"].shape[:-2]))
        chosen = set(np.random.default_rng(seed).permutation(total)[:rows].tolist())
        answer = reference.attention(**arguments, only_rows=chosen)
        given = {name: backend.to_native(x) if isinstance(x, np.ndarray) and name != "window_size" else x
                 for name, x in arguments.items()}  # fmt: skip
        for num_splits, planned in itertools.product((1, 3, 0), (False, True)):
            plan = make_plan(choice, given, arguments, new, num_splits) if planned else None
            for _ in range(2 if planned else 1):
                for name in ("k_cache", "v_cache"):
                    given[name] = backend.to_native(arguments[name].copy())
                out, lse = cuflash.flash_attn_with_kvcache(
                    **given, scheduler_metadata=plan, num_splits=num_splits, return_softmax_lse=True
                )
                case = Case(dtype="bfloat16", rotary="half" if choice.fraction else None)
                check_out(case, backend.to_numpy(out), answer)
                check_lse(case, backend.to_numpy(lse), answer)
                for name in ("k_cache", "v_cache"):
                    check_cache(name, backend.to_numpy(given[name]), getattr(answer, name))


def make_plan(choice: Choice, given: dict[str, Any], arguments: dict[str, Any], new: int, num_splits: int) -> Any:
    """Plan as the test does: for the capacity, and with new keys whether there are any or not."""
    seqlen_q, seqlen_k = choice.shape
    return cuflash.get_scheduler_metadata(
        BATCH,
        given["max_seqlen_q"] if choice.varlen else seqlen_q,
        seqlen_k if choice.page_size is None else arguments["page_table"].shape[1] * choice.page_size,
        HEADS, choice.kv_heads, DIM,
        given["cache_seqlens"], arguments["q"].dtype, headdim_v=DIM, cu_seqlens_q=given["cu_seqlens_q"],
        cu_seqlens_k_new=given["cu_seqlens_k_new"], cache_leftpad=given["cache_leftpad"],
        max_seqlen_k_new=new, page_size=choice.page_size,
        causal=choice.mask == "causal", window_size=given["window_size"], attention_chunk=given["attention_chunk"],
        num_splits=num_splits,
    )  # fmt: skip


def sample(number: int, most_work: int) -> list[Choice]:
    """Return some combinations of little work."""
    small = [choice for choice in GRID if choice.shape[0] * choice.shape[1] <= most_work]
    chosen = np.random.default_rng(number).permutation(len(small))[:number]
    return [small[i] for i in chosen]


def name_of(choice: Choice | str) -> str:
    if isinstance(choice, str):
        return choice
    return ",".join(f"{name}={value}".replace(" ", "") for name, value in vars(choice).items())


def is_quick(choice: Choice, name: str) -> bool:
    return name != "sim" or (choice.shape[0] <= 3 and choice.shape[1] <= 400)


SAMPLE = [on(name, choice) for name in BACKENDS for choice in sample(24, 64 * 256) if is_quick(choice, name)]


@pytest.mark.parametrize(("backend", "choice"), SAMPLE, ids=name_of, indirect=["backend"])
def test_sample(choice: Choice, backend: Backend) -> None:
    run(choice, backend, rows=12)


GROUPS = list(itertools.product(SHAPES, AXES["kv_heads"], AXES["new_kv"], AXES["mask"]))


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_grid(group: tuple[Any, ...], backend: Backend) -> None:
    """All of it on a GPU and, where it takes seconds, on NumPy; else every so many of the group's combinations."""
    choices = [c for c in GRID if (c.shape, c.kv_heads, c.new_kv, c.mask) == group]
    work = group[0][0] * group[0][1]
    steps = {"cuda": 1, "numpy": 1 if work <= 3 * 1024 else 7 if work < 10**5 else 101, "sim": 13 + work // 500}
    for number, choice in enumerate(choices[:: min(steps[backend.name], len(choices))]):
        try:
            run(choice, backend, seed=number, rows=20)
        except Exception as error:
            raise AssertionError(name_of(choice)) from error


# ------------------------------------------------------------------------------------------------ with torch
@pytest.mark.parametrize("choice", sample(4, 3 * 1024), ids=name_of)
def test_with_tensors(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with torch's tensors, torch's dtype in the plan, and a tensor as window."""
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("CUFLASH_BACKEND", "numpy")
    arguments, new = make(choice, False, 1)
    answer = reference.attention(**arguments)

    def tensor(x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        if x.dtype == DTYPES["bfloat16"]:
            return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(x.copy())

    given = {name: tensor(x) for name, x in arguments.items()}
    plan = cuflash.get_scheduler_metadata(
        BATCH, given["max_seqlen_q"] if choice.varlen else choice.shape[0], 3 * choice.shape[1], HEADS, choice.kv_heads,
        DIM, given["cache_seqlens"], given["q"].dtype, headdim_v=DIM, cu_seqlens_q=given["cu_seqlens_q"],
        cu_seqlens_k_new=given["cu_seqlens_k_new"], cache_leftpad=given["cache_leftpad"], max_seqlen_k_new=new,
        page_size=choice.page_size, causal=given["causal"], window_size=given["window_size"],
    )  # fmt: skip
    out, lse = cuflash.flash_attn_with_kvcache(**given, scheduler_metadata=plan, return_softmax_lse=True)
    assert out.dtype == torch.bfloat16
    case = Case(dtype="bfloat16", rotary="half" if choice.fraction else None)
    check_out(case, out.view(torch.int16).numpy().view(DTYPES["bfloat16"]), answer)
    check_lse(case, lse.numpy(), answer)
