"""A pipelined attention loop of warpgroups, wgmma_attention.cu: its source for given sizes, arguments, results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

CODE = (Path(__file__).parent / "wgmma_attention.cu").read_text()


def product(name: str, n: int, fragments: bool) -> str:
    """A function that issues one product: A in registers and B MN-major, or both K-major in shared memory."""
    r = n // 2
    registers = ", ".join(f"%{i}" for i in range(r))
    a = f"{{%{r}, %{r + 1}, %{r + 2}, %{r + 3}}}" if fragments else f"%{r}"
    b = r + (4 if fragments else 1)
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4)) if fragments else '"l"(a)'
    return f"""
__device__ __forceinline__ void {name}(float (&c)[{r}], {"const u32*" if fragments else "u64"} a, u64 b, int add) {{
    asm volatile("{{.reg .pred p; setp.ne.b32 p, %{b + 1}, 0;"
                 "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{registers}}},"
                 " {a}, %{b}, p, 1, 1, {"1" if fragments else "0, 0"};}}"
                 : {", ".join(f'"+f"(c[{i}])' for i in range(r))} : {inputs}, "l"(b), "r"(add));
}}
"""


def source(headdim: int, keys: int, groups: int, code: str = CODE) -> str:
    """The kernel for a head dim, keys of a tile, and warpgroups of 64 rows each."""
    sizes = f"constexpr int D = {headdim}, KEYS = {keys};\n#define GROUPS {groups}\n"
    types = "typedef unsigned u32;\ntypedef unsigned long long u64;\n"
    products = product("qk", keys, False) + product("pv", headdim, True)
    return f'{types}{sizes}{products}#line 1 "wgmma_attention.cu"\n{code}'


def arguments(headdim: int, keys: int, groups: int, tiles: int) -> tuple[tuple[Any, ...], int, np.ndarray]:
    """The kernel's arguments, its bytes of shared memory, and what comes out."""
    rng = np.random.default_rng(0)

    def values(rows: int) -> np.ndarray:
        return rng.standard_normal((rows, headdim)).astype(ml_dtypes.bfloat16)

    q, k, v = values(64 * groups), values(tiles * keys), values(tiles * keys)
    scores = q.astype(np.float64) @ k.astype(np.float64).T / np.sqrt(headdim)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    wanted = weights / weights.sum(1, keepdims=True) @ v.astype(np.float64)
    scale = np.float32(1.4426950408889634 / np.sqrt(headdim))
    shared = 64 * headdim * 2 * groups + 4 * keys * headdim * 2
    return (q, k, v, np.zeros(q.shape, np.float32), np.int32(tiles), scale), shared, wanted
