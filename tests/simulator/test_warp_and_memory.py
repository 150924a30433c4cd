"""Warp operations, matrices, loads and stores, atomics, asynchronous copies: against NumPy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from simulated import ORDERS, PREFIX, compiled, found, line_of, run

from cuflash.simulator import SimModule

LANES = np.arange(32)


def warp(body: str, *extra: Any, dtype: Any = np.uint32, n: int = 32, **settings: Any) -> np.ndarray:
    """Runs `out[lane] = v` after a body that sets v; extra arrays are a, b, ..."""
    out = np.zeros(n, dtype)
    params = "".join(f", const {ctype(x)}* {name}" for name, x in zip("abcd", extra))
    kernel = compiled(
        f'extern "C" __global__ void kernel({ctype(out)}* out{params}) {{\n'
        f"  int lane = threadIdx.x; {ctype(out)} v = 0;\n  {body}\n  out[lane] = v;\n}}"
    )
    run(kernel, 1, n, (out, *extra), **settings)
    return out


def ctype(x: np.ndarray) -> str:
    return {
        "uint32": "unsigned",
        "int32": "int",
        "float32": "float",
        "uint16": "unsigned short",
        "uint8": "unsigned char",
        "int8": "signed char",
        "float64": "double",
        "uint64": "unsigned long long",
    }[x.dtype.name]


@pytest.mark.parametrize("settings", ORDERS)
def test_shuffles(settings: dict[str, Any]) -> None:
    a = np.random.default_rng(0).integers(0, 2**32, 32, dtype=np.uint32)
    np.testing.assert_array_equal(warp("v = __shfl_xor_sync(~0u, a[lane], 5);", a, **settings), a[LANES ^ 5])
    np.testing.assert_array_equal(
        warp("v = __shfl_up_sync(~0u, a[lane], 3);", a, **settings), a[np.where(LANES >= 3, LANES - 3, LANES)]
    )
    np.testing.assert_array_equal(
        warp("v = __shfl_down_sync(~0u, a[lane], 2, 8);", a, **settings), a[np.where(LANES % 8 < 6, LANES + 2, LANES)]
    )
    np.testing.assert_array_equal(
        warp("v = __shfl_sync(~0u, a[lane], lane * 7, 16);", a, **settings), a[LANES // 16 * 16 + LANES * 7 % 16]
    )


def test_a_shuffle_says_whether_its_source_was_in_range() -> None:
    out = warp('asm("{.reg .pred p; shfl.sync.up.b32 %0|p, %0, 4, 0, -1; selp.u32 %0, 1, 0, p;}" : "+r"(v));')
    np.testing.assert_array_equal(out, LANES >= 4)


def test_votes() -> None:
    a = np.array([1, 0] * 16, np.uint32)
    assert set(warp("v = __ballot_sync(~0u, a[lane]);", a)) == {0x55555555}
    assert set(warp("v = __any_sync(~0u, a[lane] > 5) * 2 + __all_sync(~0u, a[lane] < 5);", a)) == {1}
    np.testing.assert_array_equal(warp("v = __match_any_sync(~0u, a[lane]);", a), np.where(a, 0x55555555, 0xAAAAAAAA))
    assert set(warp("int p; v = __match_all_sync(~0u, a[0], &p); v += p;", a)) == {0}
    np.testing.assert_array_equal(
        warp("if (lane % 3) v = __activemask();"), np.where(LANES % 3, sum(1 << k for k in range(32) if k % 3), 0)
    )


def test_parts_of_a_warp() -> None:
    a = np.arange(32, dtype=np.uint32)
    out = warp(
        "unsigned m = 0xffu << (lane & 24); v = a[lane]; for (int o = 4; o; o >>= 1) v += __shfl_xor_sync(m, v, o, 8);",
        a,
    )
    np.testing.assert_array_equal(out, a.reshape(4, 8).sum(1).repeat(8))
    out = warp(
        "if (lane < 16) v = __reduce_add_sync(0xffff, a[lane]); else v = __reduce_max_sync(0xffff0000, a[lane]);", a
    )
    np.testing.assert_array_equal(out, np.where(LANES < 16, a[:16].sum(), 31))


@pytest.mark.parametrize("settings", ORDERS)
def test_loops_of_different_length(settings: dict[str, Any]) -> None:
    out = warp(
        "for (int k = 0; k < lane; k++) { if (k % 3 == lane % 3) continue; v += k; if (v > 100) break; }", **settings
    )
    expected = []
    for lane in range(32):
        v = 0
        for k in range(lane):
            if k % 3 == lane % 3:
                continue
            v += k
            if v > 100:
                break
        expected.append(v)
    np.testing.assert_array_equal(out, expected)


def test_switch() -> None:
    body = (
        "switch (a[lane] % 6) {"
        + "".join(f"case {k}: v = {k * k + 1} * lane; break;" for k in range(5))
        + "default: v = 99;}"
    )
    a = np.random.default_rng(0).integers(0, 100, 32).astype(np.uint32)
    np.testing.assert_array_equal(warp(body, a), np.where(a % 6 == 5, 99, ((a % 6) ** 2 + 1) * LANES))


def test_local_arrays() -> None:
    out = warp(
        "int t[8]; for (int k = 0; k < 8; k++) t[k] = k * lane; for (int k = 0; k < 8; k++) v += t[(k * a[lane]) & 7];",
        np.arange(32, dtype=np.uint32),
    )
    np.testing.assert_array_equal(out, [sum(((k * lane) & 7) * lane for k in range(8)) for lane in range(32)])


def matrices() -> tuple[np.ndarray, SimModule]:
    source = (
        PREFIX
        + r"""
extern "C" __global__ void load(const uint4* x, u32* plain, u32* transposed, uint4* stored) {
  __shared__ uint4 rows[32], back[32];
  rows[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  u32 r[4], t[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(&rows[threadIdx.x])));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(t[0]), "=r"(t[1]), "=r"(t[2]), "=r"(t[3]) : "r"(shared_address(&rows[threadIdx.x])));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%4], {%0,%1,%2,%3};"
               :: "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "r"(shared_address(&back[threadIdx.x])) : "memory");
  for (int k = 0; k < 4; k++) { plain[k * 32 + threadIdx.x] = r[k]; transposed[k * 32 + threadIdx.x] = t[k]; }
  u32 m;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(m) : "r"(r[0]));
  plain[128 + threadIdx.x] = m;
  __syncwarp();
  stored[threadIdx.x] = back[threadIdx.x];
}
"""
    )
    return np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8), SimModule(source)


def test_matrix_loads() -> None:
    x, module = matrices()
    plain, transposed, stored = np.zeros((5, 32), np.uint32), np.zeros((4, 32), np.uint32), np.zeros_like(x)
    run(module.get_function("load"), 1, 32, (x, plain, transposed, stored))
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        for k in range(4):
            assert plain[k, lane] == int(x[k, row, column]) | int(x[k, row, column + 1]) << 16
            assert transposed[k, lane] == int(x[k, column, row]) | int(x[k, column + 1, row]) << 16
        assert plain[4, lane] == transposed[0, lane]
    np.testing.assert_array_equal(stored, x)


MMA = r"""
extern "C" __global__ void kernel(const u32* a, const u32* b, const float* c, float* d) {
  u32 fa[4], fb[2], lane = threadIdx.x;
  float acc[4];
  for (int r = 0; r < NA; r++) fa[r] = a[r * 32 + lane];
  for (int r = 0; r < NB; r++) fb[r] = b[r * 32 + lane];
  for (int r = 0; r < 4; r++) acc[r] = c[r * 32 + lane];
  OPERATION
  for (int r = 0; r < 4; r++) d[r * 32 + lane] = acc[r];
}
"""


@pytest.mark.parametrize(
    ("shape", "kind", "dtype", "arch"),
    [
        (16, "bf16", ml_dtypes.bfloat16, "sm_80"),
        (16, "f16", np.float16, "sm_90"),
        (8, "f16", np.float16, "sm_80"),
        (8, "tf32", np.float32, "sm_80"),
        (32, "e4m3", ml_dtypes.float8_e4m3fn, "sm_89"),
        (32, "e5m2", ml_dtypes.float8_e5m2, "sm_90"),
    ],
)
def test_matrix_products(shape: int, kind: str, dtype: Any, arch: str) -> None:
    rng = np.random.default_rng(0)
    e = 4 // np.dtype(dtype).itemsize
    a, b = rng.standard_normal((16, shape)).astype(dtype), rng.standard_normal((shape, 8)).astype(dtype)
    if kind == "tf32":
        a, b = ((x.view(np.uint32) & 0xFFFFE000).view(np.float32) for x in (a, b))
    c = rng.standard_normal((16, 8)).astype(np.float32)
    na, nb = 16 * shape // 32 // e, 8 * shape // 32 // e
    g, t = LANES // 4, LANES % 4
    fa = np.zeros((na, 32, e), dtype)
    fb = np.zeros((nb, 32, e), dtype)
    for r in range(na):
        for k in range(e):
            fa[r, :, k] = a[g + 8 * (r & 1), (r >> 1) * 4 * e + t * e + k]
    for r in range(nb):
        for k in range(e):
            fb[r, :, k] = b[r * 4 * e + t * e + k, g]
    fc = np.stack([c[g + 8 * (r >> 1), 2 * t + (r & 1)] for r in range(4)])
    regs = ["%0,%1,%2,%3", ",".join(f"%{4 + r}" for r in range(na)), ",".join(f"%{4 + na + r}" for r in range(nb))]
    ins = ", ".join([f'"r"(fa[{r}])' for r in range(na)] + [f'"r"(fb[{r}])' for r in range(nb)])
    outs = ", ".join(f'"+f"(acc[{r}])' for r in range(4))
    opcode = f"mma.sync.aligned.m16n8k{shape}.row.col.f32.{kind}.{kind}.f32"
    operands = ", ".join(f"{{{r}}}" for r in (*regs, regs[0]))
    asm = f'asm volatile("{opcode} {operands};" : {outs} : {ins});'
    out = np.zeros((4, 32), np.float32)
    kernel = compiled(MMA.replace("OPERATION", asm).replace("NA", str(na)).replace("NB", str(nb)), arch=arch)
    run(kernel, 1, 32, (fa.view(np.uint32), fb.view(np.uint32), fc, out))
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    expected = np.stack([exact[g + 8 * (r >> 1), 2 * t + (r & 1)] for r in range(4)])
    np.testing.assert_allclose(out, expected, atol=2e-5)


COPIES = r"""
extern "C" __global__ void kernel(const uint4* x, uint4* out) {
  __shared__ uint4 s[4][32];
  u32 lane = threadIdx.x, at = shared_address(&s[0][lane]);
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
      :: "r"(at), "l"(x + lane), "l"(policy) : "memory");
  asm volatile("cp.async.cg.shared.global.L2::128B [%0 + 512], [%1 + 512], 16, %2;"
      :: "r"(at), "l"(x + lane), "r"(lane % 17) : "memory");
  asm volatile("{.reg .pred p; setp.lt.u32 p, %2, 8; cp.async.cg.shared.global [%0], [%1], 16, p;}"
      :: "r"(at + 1024), "l"(lane < 8 ? (const uint4*)0 : x + lane), "r"(lane) : "memory");
  for (int k = 0; k < 4; k++)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
        :: "r"(at + 1536 + 4 * k), "l"((const u32*)(x + lane) + 3 - k), "r"(k == 2 ? 0 : 4) : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  for (int k = 0; k < 4; k++) out[k * 32 + lane] = s[k][lane];
}
"""


@pytest.mark.parametrize("settings", ORDERS)
def test_asynchronous_copies(settings: dict[str, Any]) -> None:
    x = np.random.default_rng(0).integers(0, 256, (2, 32, 16), dtype=np.uint8)
    out = np.zeros((4, 32, 16), np.uint8)
    run(compiled(COPIES), 1, 32, (x, out), **settings)
    np.testing.assert_array_equal(out[0], x[0])
    for lane in range(32):
        n = lane % 17
        assert (out[1, lane, :n] == x[1, lane, :n]).all() and not out[1, lane, n:].any()
    assert not out[2, :8].any()
    np.testing.assert_array_equal(out[2, 8:], x[0, 8:])
    words, got = x[0].view(np.uint32), out[3].view(np.uint32)
    np.testing.assert_array_equal(got[:, [0, 1, 3]], words[:, [3, 2, 0]])
    assert not got[:, 2].any()


LOADS = r"""
extern "C" __global__ void kernel(const uint4* x, const signed char* bytes, const unsigned short* halves, uint4* out,
                                  long long* wide) {
  u32 lane = threadIdx.x;
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(x + lane));
  out[lane] = v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2 + 8];"
      : "=r"(v.x), "=r"(v.y) : "l"(x + lane));
  out[32 + lane] = v;
  wide[lane] = bytes[lane];
  long long s;
  asm volatile("ld.global.s32 %0, [%1];" : "=l"(s) : "l"(bytes + 4 * lane));
  wide[32 + lane] = s;
  asm volatile("{.reg .b16 h; ld.global.b16 h, [%1]; cvt.u64.u16 %0, h;}" : "=l"(s) : "l"(halves + lane));
  wide[64 + lane] = s;
  asm volatile("st.global.cs.v2.b64 [%0], {%1, %2};" :: "l"(wide + 96 + 2 * lane), "l"(s), "l"(s + 1) : "memory");
}
"""


def test_loads_and_stores() -> None:
    rng = np.random.default_rng(0)
    x, signed = rng.integers(0, 2**32, (32, 4), dtype=np.uint32), rng.integers(-128, 128, 128).astype(np.int8)
    halves = rng.integers(0, 2**16, 32, dtype=np.uint16)
    out, wide = np.zeros((2, 32, 4), np.uint32), np.zeros(160, np.int64)
    run(compiled(LOADS), 1, 32, (x, signed, halves, out, wide))
    np.testing.assert_array_equal(out[0], x)
    np.testing.assert_array_equal(out[1], np.concatenate([x[:, 2:], x[:, 2:]], 1))
    np.testing.assert_array_equal(wide[:32], signed[:32])
    np.testing.assert_array_equal(wide[32:64], signed.view(np.int32))
    np.testing.assert_array_equal(wide[64:96], halves)
    np.testing.assert_array_equal(wide[96:].reshape(32, 2), np.stack([halves, halves + 1], 1))


ATOMICS = r"""
extern "C" __global__ void kernel(u32* n, int* s, float* f, u64* w) {
  __shared__ u32 count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1u);
  atomicAdd(n, threadIdx.x);
  atomicMax(n + 1, threadIdx.x * 7 % 64);
  atomicInc(n + 2, 9);
  atomicXor(n + 3, 1u << (threadIdx.x % 32));
  atomicMin(s, -(int)threadIdx.x);
  atomicAdd(f, 0.5f);
  atomicAdd(w, (u64)threadIdx.x << 32);
  atomicCAS(n + 4, threadIdx.x == 0 ? 0 : 1000 + threadIdx.x, 77);
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" :: "l"(f + 1), "f"(2.f) : "memory");
  asm volatile("red.global.add.noftz.f16x2 [%0], %1;" :: "l"(n + 6), "r"(0x3c003c00) : "memory");
  __syncthreads();
  if (threadIdx.x == 0) n[5] = count;
}
"""


@pytest.mark.parametrize("settings", ORDERS)
def test_atomics(settings: dict[str, Any]) -> None:
    n, s, f, w = np.zeros(8, np.uint32), np.zeros(1, np.int32), np.zeros(2, np.float32), np.zeros(1, np.uint64)
    launch = run(compiled(ATOMICS), 1, 64, (n, s, f, w), **settings)
    assert n.tolist()[:7] == [2016, 63, 4, 0, 77, 64, 0x54005400]
    assert (s[0], f[0], f[1], w[0]) == (-63, 32, 128, 2016 << 32)
    assert launch.counters.atomics == 2 * 11


STRUCT = r"""
struct Inner { int a[3]; float b; };
struct Params { const float* x; float* y; long long n; Inner inner; unsigned char flag; };
extern "C" __global__ void kernel(const __grid_constant__ Params p, int k) {
  if (threadIdx.x < p.n) p.y[threadIdx.x] = p.x[threadIdx.x] * p.inner.b + p.inner.a[k] + p.flag;
}
"""


def test_structs_by_value_with_pointers_inside() -> None:
    inner = np.dtype([("a", "i4", 3), ("b", "f4")], align=True)
    kind = np.dtype([("x", "u8"), ("y", "u8"), ("n", "i8"), ("inner", inner), ("flag", "u1")], align=True)
    x, y = np.arange(10, dtype=np.float32), np.zeros(10, np.float32)
    params = np.zeros((), kind)
    params["x"], params["y"], params["n"], params["flag"] = x.ctypes.data, y.ctypes.data, 10, 3
    params["inner"]["a"], params["inner"]["b"] = (1, 20, 300), 2
    launch = run(
        compiled(STRUCT), 1, 32, (params, np.int32(2)), arrays={"x": x, "y": y, "nothing": None, "empty": np.zeros(0)}
    )
    np.testing.assert_array_equal(y, 2 * x + 303)
    assert (launch.counters.arrays["x"].read_bytes, launch.counters.arrays["y"].write_bytes) == (40, 40)
    params["n"] = 11
    finding = found(compiled(STRUCT), 1, 32, (params, np.int32(2)), arrays={"x": x, "y": y})
    assert (finding.check, finding.address) == ("bounds", "x + 40 (0 bytes past its end)")
    params["n"] = 10
    y.flags.writeable = False
    finding = found(compiled(STRUCT), 1, 32, (params, np.int32(2)), arrays={"x": x, "y": y})
    assert "read-only" in finding.message and finding.address == "y + 0"


def test_global_variables_and_constants() -> None:
    source = (
        PREFIX
        + r"""
__constant__ float table[4] = {1, 2, 4, 8};
__device__ int counter = 5;
extern "C" __global__ void kernel(float* out) {
  out[threadIdx.x] = table[threadIdx.x & 3];
  if (threadIdx.x == 0) atomicAdd(&counter, 2);
}
"""
    )
    module = SimModule(source)
    out = np.zeros(8, np.float32)
    run(module.get_function("kernel"), 1, 8, (out,))
    np.testing.assert_array_equal(out, [1, 2, 4, 8] * 2)
    assert module.get_global("counter").view(np.int32)[0] == 7


NAMED = r"""
extern "C" __global__ void kernel(const float* x, float* out, int tiles) {
  __shared__ float buffer[2][32];
  if (threadIdx.x < 32) {
    for (int t = 0; t < tiles; t++) {
      if (t >= 2) asm volatile("bar.sync %0, 64;" :: "r"(3 + (t & 1)) : "memory");
      buffer[t & 1][threadIdx.x] = x[t * 32 + threadIdx.x];  // produce
      asm volatile("bar.arrive %0, 64;" :: "r"(1 + (t & 1)) : "memory");
    }
  } else {
    float sum = 0;
    for (int t = 0; t < tiles; t++) {
#ifndef FORGOTTEN
      asm volatile("bar.sync %0, 64;" :: "r"(1 + (t & 1)) : "memory");
#else
      if (t != 1) asm volatile("bar.sync %0, 64;" :: "r"(1 + (t & 1)) : "memory");
#endif
      sum += buffer[t & 1][63 - threadIdx.x];  // consume
      if (t + 2 < tiles) asm volatile("bar.arrive %0, 64;" :: "r"(3 + (t & 1)) : "memory");
    }
    out[threadIdx.x - 32] = sum;
  }
}
"""


@pytest.mark.parametrize("settings", ORDERS)
def test_named_barriers_between_producer_and_consumer(settings: dict[str, Any]) -> None:
    x, out = np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32), np.zeros(32, np.float32)
    run(compiled(NAMED), 1, 64, (x, out, np.int32(6)), **settings)
    np.testing.assert_allclose(out, x.sum(0)[::-1], rtol=1e-5)
    finding = found(compiled(NAMED, options=("-DFORGOTTEN",)), 1, 64, (x, out, np.int32(2)), **settings)
    assert finding.check in ("shared_race", "uninitialised")
    assert line_of(NAMED, "consume") in (finding.line, finding.other_line)


def test_printf_and_assert(capsys: pytest.CaptureFixture[str]) -> None:
    source = r"""
#include <assert.h>
extern "C" __global__ void kernel(int n) {
  if (threadIdx.x == 3) printf("thread %d of %5.2f %s %llx\n", threadIdx.x, 1.5f, "words", 1ull << 40);
  assert(threadIdx.x < n);
}
"""
    kernel = compiled(
        source.replace(
            "#include <assert.h>\n",
            "#undef assert\n#define assert(x) ((x) ? (void)0 : __assertfail(#x, __FILE__, __LINE__, __func__, 1))\n",
        )
    )
    launch = run(kernel, 1, 32, (np.int32(32),))
    assert launch.output == capsys.readouterr().out == "thread 3 of  1.50 words 10000000000\n"
    finding = found(kernel, 1, 32, (np.int32(20),))
    assert finding.check == "assert" and "threadIdx.x < n" in finding.message and finding.thread == (20, 0, 0)
