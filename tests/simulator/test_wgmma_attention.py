"""A pipelined attention loop of warpgroups: right and without findings in every order, and bugs planted in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from simulated import ORDERS, found, run

from cuflash.simulator import SimModule

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


def compiled(headdim: int, keys: int, groups: int, code: str = CODE) -> Any:
    sizes = f"constexpr int D = {headdim}, KEYS = {keys};\n#define GROUPS {groups}\n"
    types = "typedef unsigned u32;\ntypedef unsigned long long u64;\n"
    products = product("qk", keys, False) + product("pv", headdim, True)
    text = f'{types}{sizes}{products}#line 1 "wgmma_attention.cu"\n{code}'
    return SimModule(text, name="wgmma_attention.cu").get_function("attention")


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


@pytest.mark.parametrize("settings", ORDERS)
@pytest.mark.parametrize("headdim, keys, groups", [(64, 64, 1), (128, 64, 1), (128, 128, 2)])
def test_attention(headdim: int, keys: int, groups: int, settings: dict[str, Any]) -> None:
    kernel = compiled(headdim, keys, groups)
    for tiles in (1, 2, 5):
        args, shared, wanted = arguments(headdim, keys, groups, tiles)
        run(kernel, 1, 128 + 128 * groups, args, shared_mem=shared, **settings)
        np.testing.assert_allclose(args[3], wanted, atol=2e-3)


BUGS = {  # text: its replacement, the check
    "FENCE;  // values": ("", "warpgroup"),
    "FENCE;  // scores": ("", "warpgroup"),
    "PROXY;  // values": ("", "proxy"),
    "PROXY;  // scores": ("", "proxy"),
    "WAIT(1);  // for the scores": ("WAIT(2);", "warpgroup"),
    "WAIT(0);  // for the values": ("WAIT(1);", "warpgroup"),
    "give_back(empty_v, j);": ("", "deadlock"),
    "        softmax();\n        WAIT(0);": (
        "        softmax(); give_back(empty_v, j); if (0)\n WAIT(0);",
        "warpgroup",
    ),
    "u32 40": ("u32 48", "registers"),
}


@pytest.mark.parametrize("settings", ORDERS)
@pytest.mark.parametrize("where", BUGS)
def test_planted_bugs(where: str, settings: dict[str, Any]) -> None:
    what, check = BUGS[where]
    assert CODE.count(where) == 1
    args, shared, _ = arguments(64, 64, 1, 6)
    finding = found(compiled(64, 64, 1, CODE.replace(where, what)), 1, 256, args, shared_mem=shared, **settings)
    assert finding.check == check, finding


@pytest.mark.parametrize("settings", ORDERS)
def test_a_tile_given_back_too_early(settings: dict[str, Any]) -> None:
    wait, given = "        WAIT(0);  // for the values\n        pin(o);\n", "        give_back(empty_v, j);\n"
    assert wait + given in CODE
    args, shared, _ = arguments(64, 64, 1, 6)
    kernel = compiled(64, 64, 1, CODE.replace(wait + given, given + wait))
    assert found(kernel, 1, 256, args, shared_mem=shared, **settings).check == "shared_race"
