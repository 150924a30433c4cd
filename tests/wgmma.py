"""Kernels of one warpgroup product, and where the PTX manual says that its operands lie.

The layouts are those of "Asynchronous Warpgroup Level Matrix Instructions", section "Canonical Layouts": in units of
elements, T of which are 16 bytes, an element (mn, k) lies at the sum of its digits times strides, and the byte address
is swizzled afterwards: bits 4 and up exclusive-or bits 7 and up, as many as the pattern has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

KINDS: dict[str, np.dtype] = {
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
SWIZZLES = {0: 0, 32: 3, 64: 2, 128: 1}  # bytes: number in the descriptor


@dataclass(frozen=True)
class Operand:
    """A matrix of rows (m or n) and columns (k) in shared memory.

    Attributes:
        swizzle: bytes of the pattern's row, 0 for none.
        mn_major: rows are contiguous, not columns.
        leading: the leading dimension's byte offset.
        stride: the stride dimension's byte offset.
        step: bytes from the columns of one instruction to those of the next.
        size: bytes.
    """

    swizzle: int
    mn_major: bool
    leading: int
    stride: int
    step: int
    size: int

    def descriptor(self, start: int) -> int:
        """The 64 bits for a matrix that starts at this byte."""
        fields = (start >> 4, self.leading >> 4, 0), (self.stride >> 4, 0, 0)
        return fields[0][0] | fields[0][1] << 16 | fields[1][0] << 32 | SWIZZLES[self.swizzle] << 62

    def addresses(self, rows: int, columns: int, itemsize: int, start: int) -> np.ndarray:
        """Byte addresses of all elements, (rows, columns); 32 bytes of columns are one instruction's."""
        t, deep = 16 // itemsize, 32 // itemsize
        mn, k = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
        step, k = k // deep, k % deep
        chunks = max(self.swizzle // 16, 1)  # of T elements, in a row of the pattern
        if self.mn_major:
            far = self.leading if self.swizzle else self.stride
            next_k = self.stride if self.swizzle else self.leading
            at = itemsize * (mn % t + mn // t % chunks * t + k % 8 * chunks * t)
            at = at + mn // (t * chunks) * far + k // 8 * next_k
        else:
            next_chunk = 16 if self.swizzle else self.leading
            at = mn % 8 * chunks * 16 + mn // 8 * self.stride + k % t * itemsize + k // t * next_chunk
        at = at + start + step * self.step
        return at ^ ((at >> 7) & (chunks - 1)) << 4 if self.swizzle else at


def operand(swizzle: int, mn_major: bool, rows: int, steps: int) -> Operand:
    """A matrix of 2-byte elements of an MN-major, or 32-byte columns of a K-major product, without gaps."""
    if mn_major:
        wide = max(swizzle, 16)  # bytes of rows, times 8 columns, are an atom
        blocks = -(-2 * rows // wide)
        depth = 2 * steps  # atoms along k
        if swizzle:  # atoms along k first
            return Operand(swizzle, True, depth * 8 * wide, 8 * wide, 16 * wide, blocks * depth * 8 * wide)
        return Operand(0, True, blocks * 128, 128, 2 * blocks * 128, blocks * depth * 128)
    if not swizzle:  # core matrices of 8 rows of 16 bytes, along the rows first
        return Operand(0, False, rows * 16, 128, 2 * rows * 16, 2 * steps * rows * 16)
    per_block = swizzle // 32  # instructions in a row of the pattern
    assert steps <= per_block
    return Operand(swizzle, False, 16, 8 * swizzle, 32, rows * swizzle)


def source(n: int, kind: str, a_registers: bool, transposed: tuple[bool, bool], signs: tuple[int, int] = (1, 1)) -> str:
    """A kernel of one warpgroup: d[register][thread] += A B, in as many instructions as wanted."""
    k = 32 // KINDS[kind].itemsize
    registers = n // 2
    regs = ", ".join(f"%{i}" for i in range(registers))
    where = registers
    a = f"{{%{where}, %{where + 1}, %{where + 2}, %{where + 3}}}" if a_registers else f"%{where}"
    after = where + (4 if a_registers else 1)
    turns = (
        "" if k == 32 else f", {int(transposed[1])}" if a_registers else f", {int(transposed[0])}, {int(transposed[1])}"
    )
    text = (
        f"{{.reg .pred p; setp.ne.b32 p, %{after + 1}, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind} {{{regs}}}, {a}, %{after}, p, "
        f"{signs[0]}, {signs[1]}{turns};}}"
    )
    inputs = ", ".join(f'"r"(f[{r}])' for r in range(4)) if a_registers else '"l"(a)'
    outs = ", ".join(f'"+f"(c[{i}])' for i in range(registers))
    return f"""
typedef unsigned u32;
typedef unsigned long long u64;
// image: the bytes of shared memory; fragments[step][4][thread]: A in registers; a, b: descriptors of matrices that
// start at byte 0, and what an instruction's 32 bytes of columns add to them
extern "C" __global__ void __launch_bounds__(128)
product(float* d, const uint4* image, int pieces, const u32* fragments, u64 a, u64 b, u64 a_step, u64 b_step, int steps,
        int add) {{
    extern __shared__ __align__(1024) uint4 tile[];
    const int t = threadIdx.x;
    for (int i = t; i < pieces; i += 128) tile[i] = image[i];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    const u64 base = (u32)__cvta_generic_to_shared(tile) >> 4;
    a += base;
    b += base;
    float c[{registers}];
    for (int i = 0; i < {registers}; ++i) c[i] = d[i * 128 + t];
    u32 f[4] = {{}};
    for (int s = 0; s < steps; ++s, a += a_step, b += b_step) {{
        if ({int(a_registers)})
            for (int r = 0; r < 4; ++r) f[r] = fragments[(s * 4 + r) * 128 + t];
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        asm volatile("{text}" : {outs} : {inputs}, "l"(b), "r"(add | (s > 0)));
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        for (int i = 0; i < {registers}; ++i) asm volatile("" : "+f"(c[i])::"memory");
    }}
    for (int i = 0; i < {registers}; ++i) d[i * 128 + t] = c[i];
}}
"""


@dataclass
class Product:
    """A problem: random operands, where they lie, and what comes out."""

    n: int
    kind: str
    a: Operand | None  # None: in registers
    b: Operand
    steps: int = 1
    add: bool = True
    signs: tuple[int, int] = (1, 1)
    integers: bool = True

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.n + self.steps)
        dtype = KINDS[self.kind]
        depth = self.steps * 32 // dtype.itemsize

        def values(*shape: int) -> np.ndarray:
            drawn = rng.integers(-4, 5, shape) if self.integers else rng.standard_normal(shape)
            return drawn.astype(np.float32).astype(dtype)

        self.left, self.right = values(64, depth), values(self.n, depth)
        self.before = rng.integers(-8, 9, (64, self.n)).astype(np.float32)
        a_size = -(-self.a.size // 1024) * 1024 if self.a else 0
        self.image = np.full(a_size + -(-self.b.size // 1024) * 1024, 0xFF, np.uint8)
        for matrix, where, start in ((self.left, self.a, 0), (self.right, self.b, a_size)):
            if where is not None:
                at = where.addresses(*matrix.shape, dtype.itemsize, start)
                assert len(np.unique(at)) == at.size and at.min() >= start
                data = matrix.view(np.uint8).reshape(*matrix.shape, dtype.itemsize)
                for byte in range(dtype.itemsize):
                    self.image[at + byte] = data[..., byte]
        self.b_start = a_size

    @property
    def source(self) -> str:
        """The kernel."""
        turned = (self.a is not None and self.a.mn_major, self.b.mn_major)
        return source(self.n, self.kind, self.a is None, turned, self.signs)

    def arguments(self, out: Any, image: Any, fragments: Any) -> tuple[Any, ...]:
        """The kernel's arguments; arrays as they are on its machine."""
        a = self.a.descriptor(0) if self.a else 0
        steps = np.uint64(self.a.step >> 4 if self.a else 0), np.uint64(self.b.step >> 4)
        numbers = np.uint64(a), np.uint64(self.b.descriptor(self.b_start)), *steps
        return (
            out,
            image,
            np.int32(len(self.image) // 16),
            fragments,
            *numbers,
            np.int32(self.steps),
            np.int32(self.add),
        )

    def fragments(self) -> np.ndarray:
        """A in registers, [step][4][thread]: rows 16 warp + lane / 4 (+ 8 in odd registers), columns by 4 bytes."""
        t, deep = np.arange(128), 8
        words = np.ascontiguousarray(self.left).view(np.uint32)  # (64, 8 steps)
        row = 16 * (t // 32) + t % 32 // 4
        out = [[words[row + 8 * (r & 1), s * deep + t % 4 + 4 * (r >> 1)] for r in range(4)] for s in range(self.steps)]
        return np.array(out, np.uint32)

    def spread(self, matrix: np.ndarray) -> np.ndarray:
        """A (64, n) matrix as accumulators, [register][thread]."""
        t = np.arange(128)
        r = np.arange(self.n // 2)[:, None]
        return np.ascontiguousarray(
            matrix[16 * (t // 32) + t % 32 // 4 + 8 * (r >> 1 & 1), 8 * (r >> 2) + 2 * (t % 4) + (r & 1)]
        )

    def expected(self) -> np.ndarray:
        """The accumulators."""
        product = self.signs[0] * self.signs[1] * (self.left.astype(np.float64) @ self.right.astype(np.float64).T)
        return self.spread((product + self.before * self.add).astype(np.float32))


def layouts() -> dict[str, Product]:
    """Every swizzle of both majors for A and B, A in registers, 8-bit types, and widths from 8 to 256."""
    out: dict[str, Product] = {}
    for kind in ("bf16", "f16"):
        for swizzle in SWIZZLES:
            for mn_major in (False, True):
                steps = 1 if swizzle == 32 else 2
                name = f"{kind}-{'mn' if mn_major else 'k'}-{swizzle}"
                b = operand(swizzle, mn_major, 128, steps)
                out[f"{name}-registers"] = Product(128, kind, None, b, steps)
                # A of the other major, and of another swizzle
                other = operand({0: 128, 128: 64, 64: 32, 32: 0}[swizzle], not mn_major, 64, 1)
                out[f"{name}-memory"] = Product(128, kind, other, operand(swizzle, mn_major, 128, 1), 1)
    for n in (8, 24, 64, 136, 256):
        out[f"n{n}"] = Product(n, "bf16", operand(128, False, 64, 4), operand(128, False, n, 4), 4, add=False)
    for n in (64, 256):
        out[f"n{n}-transposed"] = Product(n, "f16", operand(128, True, 64, 2), operand(128, True, n, 2), 2)
    for kind in ("e4m3", "e5m2"):
        for swizzle in (0, 128):
            a = operand(swizzle, False, 64, 2)
            out[f"{kind}-{swizzle}"] = Product(32, kind, a, operand(swizzle, False, 32, 2), 2)
        out[f"{kind}-registers"] = Product(16, kind, None, operand(64, False, 16, 2), 2)
    out["minus"] = Product(16, "bf16", operand(64, False, 64, 2), operand(64, False, 16, 2), 2, signs=(-1, 1))
    return out
