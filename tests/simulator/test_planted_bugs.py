"""Ten bugs, planted one at a time: each is reported by its check at its line, and the kernel without it is clean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from simulated import ORDERS, Checks, compiled, found, line_of, run

# A ring of two stages: every thread copies 16 bytes per tile and sums up what its neighbour copied.
PIPELINE = r"""
extern "C" __global__ void kernel(const float4* x, float* out, int tiles) {
  __shared__ float4 ring[2][64];
  float sum = 0;
  copy16(&ring[0][threadIdx.x], &x[threadIdx.x]);
  commit();
  for (int t = 0; t < tiles; t++) {
    if (t + 1 < tiles)
      copy16(&ring[(t + 1) & 1][threadIdx.x], &x[(t + 1) * 64 + threadIdx.x]);  // refill
    commit();
    wait<WAIT>();
    __syncthreads();
    float4 v = ring[t & 1][63 - threadIdx.x];  // use
    sum += v.x + v.y + v.z + v.w;
#ifndef NO_BARRIER
    __syncthreads();
#endif
  }
  wait<0>();
  out[threadIdx.x] = sum;
}
"""


def pipeline(*, wait: int = 1, options: tuple[str, ...] = ()) -> Any:
    return compiled(PIPELINE, options=(f"-DWAIT={wait}", *options))


def pipeline_args(tiles: int = 5) -> tuple[Any, ...]:
    x = np.random.default_rng(0).standard_normal((tiles, 64, 4)).astype(np.float32)
    return x, np.zeros(64, np.float32), np.int32(tiles)


@pytest.mark.parametrize("settings", ORDERS)
def test_the_correct_pipeline_is_clean(settings: dict[str, Any]) -> None:
    x, out, tiles = pipeline_args()
    run(pipeline(), 1, 64, (x, out, tiles), **settings)
    np.testing.assert_allclose(out, x.sum((0, 2))[::-1], rtol=1e-5)


@pytest.mark.parametrize("settings", ORDERS)
def test_missing_barrier_before_a_stage_is_reused(settings: dict[str, Any]) -> None:
    finding = found(pipeline(options=("-DNO_BARRIER",)), 1, 64, pipeline_args(), **settings)
    assert finding.check == "shared_race"
    # cp.async is inside of copy16, which the simulator names as "inlined at"
    assert line_of(PIPELINE, "use") in (finding.line, finding.other_line)
    assert f"inlined at planted.cu:{line_of(PIPELINE, 'refill')}" in finding.text


@pytest.mark.parametrize("settings", ORDERS)
def test_too_lax_wait_group(settings: dict[str, Any]) -> None:
    finding = found(pipeline(wait=2), 1, 64, pipeline_args(), **settings)
    assert (finding.check, finding.line) == ("in_flight", line_of(PIPELINE, "use"))


def test_copies_that_nobody_waits_for() -> None:
    source = r"""
extern "C" __global__ void kernel(const float4* x) {
  __shared__ float4 s[32];
  copy16(&s[threadIdx.x], &x[threadIdx.x]);
  commit();
}
"""
    finding = found(compiled(source), 1, 32, (np.zeros((32, 4), np.float32),))
    assert finding.check == "never_waited"


EARLY = r"""
extern "C" __global__ void kernel(const float4* x, float4* out) {
  __shared__ float4 s[64];
#if AHEAD == 1
  s[threadIdx.x] = x[threadIdx.x];  // load
#elif AHEAD == 2
  copy16(&s[threadIdx.x], &x[threadIdx.x]);  // copy
#elif AHEAD == 3
  if (threadIdx.x % 2)
#endif
  asm volatile("griddepcontrol.wait;" ::: "memory");
  copy16(&s[threadIdx.x], &x[threadIdx.x]);  // late
  commit();
  wait<0>();
  out[threadIdx.x] = s[threadIdx.x];
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
"""


@pytest.mark.parametrize("settings", ORDERS)
def test_memory_that_is_touched_before_the_turn_comes(settings: dict[str, Any]) -> None:
    """Kernels are launched while the one ahead still writes."""
    x = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    out = np.zeros_like(x)
    run(compiled(EARLY, options=("-DAHEAD=0",)), 1, 64, (x, out), **settings)
    np.testing.assert_array_equal(out, x)
    for early, place in (1, "load"), (2, "copy"), (3, "late"):
        finding = found(compiled(EARLY, options=(f"-DAHEAD={early}",)), 1, 64, (x, out), **settings)
        assert finding.check == "turn" and str(line_of(EARLY, place)) in finding.text
        assert early < 3 or finding.thread[0] % 2 == 0
    run(compiled(EARLY, options=("-DAHEAD=1",)), 1, 64, (x, out), checks=Checks(turn=False), **settings)


SCALE = r"""
extern "C" __global__ void kernel(const float* x, float* out, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i COMPARE n)
    out[i] = 2 * x[i];  // read
}
"""


def test_off_by_one_global_read() -> None:
    x, out = np.arange(100, dtype=np.float32), np.zeros(101, np.float32)
    run(compiled(SCALE, options=("-DCOMPARE=<",)), 4, 32, (x, out, np.int32(100)))
    np.testing.assert_array_equal(out[:100], 2 * x)
    finding = found(
        compiled(SCALE, options=("-DCOMPARE=<=",)), 4, 32, (x, out, np.int32(100)), arrays={"x": x, "out": out}
    )
    assert (finding.check, finding.line) == ("bounds", line_of(SCALE, "read"))
    assert finding.address.startswith("x + 400")
    assert (finding.block, finding.thread) == ((3, 0, 0), (4, 0, 0))


TURN = r"""
extern __shared__ float tile[];
extern "C" __global__ void kernel(const float* x, float* out, int shift) {
#ifndef UNWRITTEN
  tile[threadIdx.x + shift] = x[threadIdx.x];  // write
#else
  if (threadIdx.x > 0) tile[threadIdx.x] = x[threadIdx.x];
#endif
  __syncthreads();
  out[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x + shift];  // read
}
"""


def turn_args(shift: int = 0) -> tuple[Any, ...]:
    return np.arange(64, dtype=np.float32), np.zeros(64, np.float32), np.int32(shift)


def test_shared_overflow() -> None:
    kernel = compiled(TURN)
    args = turn_args()
    run(kernel, 1, 64, args, shared_mem=256)
    np.testing.assert_array_equal(args[1], args[0][::-1])
    finding = found(kernel, 1, 64, turn_args(1), shared_mem=256)
    assert (finding.check, finding.line) == ("bounds", line_of(TURN, "write"))
    assert finding.address == "shared tile + 256"
    assert finding.thread == (63, 0, 0)


def test_uninitialised_shared_read() -> None:
    finding = found(compiled(TURN, options=("-DUNWRITTEN",)), 1, 64, turn_args(), shared_mem=256)
    assert (finding.check, finding.line) == ("uninitialised", line_of(TURN, "read"))
    assert finding.address == "shared tile + 0"
    assert finding.thread == (63, 0, 0)


# out[16, 8] = a[16, 16] b[16, 8] from fragments that each lane gathers by itself
FRAGMENT = r"""
extern "C" __global__ void kernel(const unsigned short* a, const unsigned short* b, float* out) {
  u32 g = threadIdx.x / 4, t = threadIdx.x % 4, fa[4], fb[2];
  for (int r = 0; r < 4; r++) {
#ifdef WRONG
    u32 row = g + 8 * (r >> 1), column = 8 * (r & 1) + 2 * t;
#else
    u32 row = g + 8 * (r & 1), column = 8 * (r >> 1) + 2 * t;
#endif
    fa[r] = a[row * 16 + column] | (u32)a[row * 16 + column + 1] << 16;
  }
  for (int r = 0; r < 2; r++) fb[r] = b[(8 * r + 2 * t) * 8 + g] | (u32)b[(8 * r + 2 * t + 1) * 8 + g] << 16;
  float c[4] = {0, 0, 0, 0};
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
  for (int r = 0; r < 4; r++) out[(g + 8 * (r >> 1)) * 8 + 2 * t + (r & 1)] = c[r];
}
"""


def test_wrong_fragment_index() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((16, 8)).astype(np.float16)
    out = np.zeros((16, 8), np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    run(compiled(FRAGMENT), 1, 32, (a, b, out))
    np.testing.assert_allclose(out, exact, atol=1e-5)
    run(compiled(FRAGMENT, options=("-DWRONG",)), 1, 32, (a, b, out))
    assert abs(out - exact).max() > 0.1


# 16 rows of 128 bytes, read by ldmatrix
SWIZZLE = r"""
extern "C" __global__ void kernel(const uint4* x, u32* out) {
  __shared__ uint4 tile[16][8];
  for (int k = threadIdx.x; k < 128; k += 32) {
    int row = k / 8, column = k % 8;
    tile[row][column SWIZZLED] = x[k];  // store
  }
  __syncwarp();
  u32 r0, r1, r2, r3;
  int row = threadIdx.x % 16, column = threadIdx.x / 16;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3) : "r"(shared_address(&tile[row][column SWIZZLED])));  // load
  out[threadIdx.x] = r0 ^ r1 ^ r2 ^ r3;
}
"""


def test_missing_swizzle() -> None:
    x = np.random.default_rng(0).integers(0, 2**32, (16, 8, 4), dtype=np.uint32)
    totals = {}
    for swizzled in ("^(row % 8)", "+0"):
        launch = run(compiled(SWIZZLE, options=(f"-DSWIZZLED={swizzled}",)), 1, 32, (x, np.zeros(32, np.uint32)))
        lines = {line: count for (_, line), count in launch.counters.by_line.items()}
        # The compiler gives an asm statement the line on which it begins.
        load = lines[line_of(SWIZZLE, "load") - 1]
        assert load.shared_ideal == 4
        totals[swizzled] = load.shared_real
        # 128 x 16 bytes are 16 wavefronts; each quarter warp writes one row, whichever order its columns have
        assert lines[line_of(SWIZZLE, "store")].shared_real == lines[line_of(SWIZZLE, "store")].shared_ideal == 16
    assert totals == {"^(row % 8)": 4, "+0": 32}


SLOTS = r"""
extern "C" __global__ void kernel(float* out, int blocks) {
  out[blockIdx.x % blocks] = blockIdx.x;  // store
}
"""


@pytest.mark.parametrize("settings", ORDERS)
def test_two_blocks_write_one_slot(settings: dict[str, Any]) -> None:
    kernel = compiled(SLOTS)
    run(kernel, 4, 1, (np.zeros(4, np.float32), np.int32(4)), **settings)
    finding = found(kernel, 4, 1, (np.zeros(4, np.float32), np.int32(3)), **settings)
    assert (finding.check, finding.line, finding.other_line) == (
        "global_race",
        line_of(SLOTS, "store"),
        line_of(SLOTS, "store"),
    )
    assert {finding.block, finding.other_block} == {(0, 0, 0), (3, 0, 0)}
    assert finding.address == "argument 0 + 0"


LAST_BLOCK = r"""
extern "C" __global__ void kernel(float* partial, unsigned* arrived, float* out, int n) {
  __shared__ unsigned ticket;
  partial[blockIdx.x * blockDim.x + threadIdx.x] = blockIdx.x + threadIdx.x;  // partial
#if VARIANT != 4
  __syncthreads();
#endif
  if (threadIdx.x == 0) {
#if VARIANT == 0
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
        : "=r"(ticket) : "l"(arrived), "r"(gridDim.x - 1) : "memory");
#elif VARIANT == 1
    __threadfence();
    ticket = atomicInc(arrived, gridDim.x - 1);
    __threadfence();
#elif VARIANT == 2
    ticket = atomicInc(arrived, gridDim.x - 1);
#elif VARIANT == 3
    asm volatile("atom.release.gpu.global.inc.u32 %0, [%1], %2;"
        : "=r"(ticket) : "l"(arrived), "r"(gridDim.x - 1) : "memory");
#elif VARIANT == 4
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
        : "=r"(ticket) : "l"(arrived), "r"(gridDim.x - 1) : "memory");
#elif VARIANT == 5
    asm volatile("atom.acq_rel.cta.global.inc.u32 %0, [%1], %2;"
        : "=r"(ticket) : "l"(arrived), "r"(gridDim.x - 1) : "memory");
#endif
  }
  __syncthreads();
  if (ticket == gridDim.x - 1) {
    float sum = 0;
    for (int b = 0; b < gridDim.x; b++)
      sum += partial[b * blockDim.x + threadIdx.x];  // merge
    out[threadIdx.x] = sum;
  }
}
"""


def last_block_args() -> tuple[Any, ...]:
    return np.zeros(4 * 64, np.float32), np.zeros(1, np.uint32), np.zeros(64, np.float32), np.int32(0)


@pytest.mark.parametrize("settings", ORDERS)
@pytest.mark.parametrize("variant", [0, 1])
def test_the_last_block_reads_partial_results(variant: int, settings: dict[str, Any]) -> None:
    args = last_block_args()
    run(compiled(LAST_BLOCK, options=(f"-DVARIANT={variant}",)), 4, 64, args, **settings)
    np.testing.assert_array_equal(args[2], 6 + 4 * np.arange(64))
    assert args[1][0] == 0


@pytest.mark.parametrize("settings", ORDERS)
@pytest.mark.parametrize("variant", [2, 3, 4, 5], ids=["no fence", "no acquire", "no barrier", "block scope"])
def test_missing_fence_before_the_last_block_reads(variant: int, settings: dict[str, Any]) -> None:
    finding = found(compiled(LAST_BLOCK, options=(f"-DVARIANT={variant}",)), 4, 64, last_block_args(), **settings)
    assert finding.check == "global_race"
    assert {finding.line, finding.other_line} == {line_of(LAST_BLOCK, "merge"), line_of(LAST_BLOCK, "partial")}
    assert finding.address.startswith("argument 0 + ")
