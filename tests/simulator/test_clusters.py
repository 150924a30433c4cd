"""Thread-block clusters, distributed shared memory, mbarriers, bulk copies, programmatic launches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from simulated import ORDERS, compiled, found, line_of, run

CLUSTER = r"""
__device__ __forceinline__ u32 rank() { u32 r; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
__device__ __forceinline__ u32 mapped(const void* p, u32 r) {
  u32 a;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(shared_address(p)), "r"(r));
  return a;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void init(u64* bar, u32 n) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(bar)), "r"(n) : "memory");
}
__device__ __forceinline__ void expect(u64* bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;"
      :: "r"(shared_address(bar)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void arrive(u64* bar) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" :: "r"(shared_address(bar)) : "memory");
}
__device__ __forceinline__ void arrive_with_copies(u64* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(shared_address(bar)) : "memory");
}
__device__ __forceinline__ void wait_parity(u64* bar, u32 parity) {
  asm volatile("{\n.reg .pred p;\nAGAIN:\n"
               "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%0], %1;\n"
               "@p bra DONE;\nbra AGAIN;\nDONE:\n}"
               :: "r"(shared_address(bar)), "r"(parity) : "memory");
}
"""


def kernel_of(source: str, *options: str) -> Any:
    return compiled(CLUSTER + '#line 1 "planted.cu"\n' + source, options=options)


EXCHANGE = r"""
extern "C" __global__ void __cluster_dims__(4) kernel(const float* x, float* out) {
  __shared__ float mine[64];
  mine[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];  // own
#ifndef FORGOTTEN
  cluster_sync();
#endif
  float sum = 0;
  for (u32 r = 0; r < 4; r++) {
    float v;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(mapped(mine + threadIdx.x, r)) : "memory");  // peer
    sum += v;
  }
#ifndef EARLY
  cluster_sync();
#endif
  out[blockIdx.x * 64 + threadIdx.x] = sum;
}
"""


@pytest.mark.parametrize("settings", ORDERS)
def test_distributed_shared_memory(settings: dict[str, Any]) -> None:
    x, out = np.random.default_rng(0).standard_normal((3, 4, 64)).astype(np.float32), np.zeros((3, 4, 64), np.float32)
    run(kernel_of(EXCHANGE), 12, 64, (x, out), **settings)
    np.testing.assert_allclose(out, np.broadcast_to(x.sum(1, keepdims=True), out.shape), rtol=1e-5, atol=1e-6)
    finding = found(kernel_of(EXCHANGE, "-DFORGOTTEN"), 12, 64, (x, out), **settings)
    assert finding.check in ("shared_race", "uninitialised", "bounds")
    assert {finding.line, finding.other_line} & {line_of(EXCHANGE, "peer"), line_of(EXCHANGE, "own")}


def test_a_block_that_exits_while_others_read_its_shared_memory() -> None:
    x, out = np.zeros((4, 64), np.float32), np.zeros((4, 64), np.float32)
    finding = found(kernel_of(EXCHANGE, "-DEARLY"), 4, 64, (x, out))
    assert finding.check == "bounds" and "exited" in finding.message


FROM_ZERO = r"""
extern "C" __global__ void __cluster_dims__(2) kernel(const float* x, float* out) {
  __shared__ float theirs[32];
  const u32 own = shared_address(theirs + threadIdx.x);
#ifdef OF_ZERO
  u32 distance;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(distance) : "r"(0), "r"(rank() ^ 1));
#else
  const u32 distance = mapped(theirs, rank() ^ 1) - shared_address(theirs);
#endif
  cluster_sync();
  const u32 at = blockIdx.x * 32 + threadIdx.x;
  asm volatile("st.shared::cluster.f32 [%0], %1;" :: "r"(own + distance), "f"(x[at]) : "memory");
  cluster_sync();
  out[at] = theirs[threadIdx.x];
}
"""


def test_how_far_it_is_to_another_block() -> None:
    """On a GPU what mapa makes of 0 is as far for the first block of a cluster alone."""
    x, out = np.random.default_rng(1).standard_normal((2, 32)).astype(np.float32), np.zeros((2, 32), np.float32)
    run(kernel_of(FROM_ZERO), 2, 32, (x, out))
    np.testing.assert_array_equal(out, x[::-1])
    assert found(kernel_of(FROM_ZERO, "-DOF_ZERO"), 2, 32, (x, out)).check == "bounds"


PUSH = r"""
// every block sends its row to all others with st.async; an mbarrier counts the bytes
extern "C" __global__ void kernel(const float* x, float* out) {
  __shared__ float rows[2][32];
  __shared__ u64 bar;
  u32 blocks = 2, me = rank();
#ifdef SENDERS_EXIT
  if (threadIdx.x == 0) { init(&bar, 1); if (me == 0) expect(&bar, 4 * 32 * blocks); }
#else
  if (threadIdx.x == 0) { init(&bar, 1); expect(&bar, 4 * 32 * blocks); }
#endif
#ifdef RELAXED
#ifndef NO_FENCE
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  cluster_sync();
#endif
#ifdef SENDERS_EXIT
  blocks = 1;  // all send to block 0, and leave
#endif
  for (u32 r = 0; r < blocks; r++)
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
                 :: "r"(mapped(&rows[me][threadIdx.x], r)), "r"(__float_as_uint(x[blockIdx.x * 32 + threadIdx.x])),
                    "r"(mapped(&bar, r)) : "memory");
#ifdef SENDERS_EXIT
  if (me != 0) return;
#endif
#ifndef FORGOTTEN
  wait_parity(&bar, 0);
#endif
  out[blockIdx.x * 32 + threadIdx.x] = rows[0][threadIdx.x] - rows[1][31 - threadIdx.x];  // use
#ifndef SENDERS_EXIT
  cluster_sync();
#endif
}
"""


@pytest.mark.parametrize("settings", ORDERS)
def test_asynchronous_stores_to_peers(settings: dict[str, Any]) -> None:
    x, out = np.random.default_rng(0).standard_normal((2, 2, 32)).astype(np.float32), np.zeros((2, 2, 32), np.float32)
    run(kernel_of(PUSH), 4, 32, (x, out), cluster=2, **settings)
    np.testing.assert_array_equal(out, np.broadcast_to((x[:, 0] - x[:, 1, ::-1])[:, None], out.shape))
    finding = found(kernel_of(PUSH, "-DFORGOTTEN"), 4, 32, (x, out), cluster=2, **settings)
    assert finding.check in ("shared_race", "in_flight", "uninitialised")


@pytest.mark.parametrize("settings", ORDERS)
def test_senders_that_exit(settings: dict[str, Any]) -> None:
    """A store on its way needs the block that it goes to alone, and that must wait for it."""
    x, out = np.random.default_rng(0).standard_normal((2, 2, 32)).astype(np.float32), np.zeros((2, 2, 32), np.float32)
    run(kernel_of(PUSH, "-DSENDERS_EXIT"), 4, 32, (x, out), cluster=2, **settings)
    np.testing.assert_array_equal(out[:, 0], x[:, 0] - x[:, 1, ::-1])
    finding = found(kernel_of(PUSH, "-DSENDERS_EXIT", "-DFORGOTTEN"), 4, 32, (x, out), cluster=2, **settings)
    assert finding.check in ("shared_race", "in_flight", "uninitialised", "never_waited", "bounds")


@pytest.mark.parametrize("settings", ORDERS)
def test_relaxed_arrival_after_a_fence(settings: dict[str, Any]) -> None:
    """Peers may use an mbarrier whose initialisation was fenced before a relaxed arrival; without the fence, not."""
    x, out = np.random.default_rng(0).standard_normal((2, 2, 32)).astype(np.float32), np.zeros((2, 2, 32), np.float32)
    run(kernel_of(PUSH, "-DRELAXED"), 4, 32, (x, out), cluster=2, **settings)
    np.testing.assert_array_equal(out, np.broadcast_to((x[:, 0] - x[:, 1, ::-1])[:, None], out.shape))
    finding = found(kernel_of(PUSH, "-DRELAXED", "-DNO_FENCE"), 4, 32, (x, out), cluster=2, **settings)
    assert finding.check == "shared_race"


BULK = r"""
// thread 0 copies tiles in bulk through a ring of two, all threads read; results leave in bulk as well
extern "C" __global__ void kernel(const float* x, float* out, int tiles) {
  __shared__ __align__(128) float ring[2][64], result[64];
  __shared__ u64 full[2], empty[2];
  u32 t = threadIdx.x;
  if (t == 0) for (int s = 0; s < 2; s++) { init(&full[s], 1); init(&empty[s], 64); }
  __syncthreads();
  float sum = 0;
  for (int k = 0; k < tiles + 1; k++) {
    if (k < tiles && t == 0) {
#ifndef NO_EMPTY
      if (k >= 2) wait_parity(&empty[k & 1], (k / 2 - 1) & 1);
#endif
      expect(&full[k & 1], 256);
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                   :: "r"(shared_address(ring[k & 1])), "l"(x + 64 * k), "r"(256), 
                      "r"(shared_address(&full[k & 1])) : "memory");
    }
    if (k > 0) {
      int j = k - 1;
#ifndef NO_FULL
      wait_parity(&full[j & 1], (j / 2) & 1);
#endif
      sum += ring[j & 1][63 - t];  // use
      arrive(&empty[j & 1]);
    }
  }
  result[t] = sum;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (t == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
        :: "l"(out), "r"(shared_address(result)), "r"(256) : "memory");
    asm volatile("cp.async.bulk.commit_group;");
#ifndef NO_WAIT
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
  }
}
"""


@pytest.mark.parametrize("settings", ORDERS)
def test_bulk_copies(settings: dict[str, Any]) -> None:
    x, out = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32), np.zeros(64, np.float32)
    launch = run(kernel_of(BULK), 1, 64, (x, out, np.int32(5)), arrays={"x": x, "out": out}, **settings)
    np.testing.assert_allclose(out, x.sum(0)[::-1], rtol=1e-5)
    assert launch.counters.arrays["x"].read_bytes == x.nbytes
    assert launch.counters.arrays["out"].write_bytes == out.nbytes
    finding = found(kernel_of(BULK, "-DNO_FULL"), 1, 64, (x, out, np.int32(5)), **settings)
    assert finding.check in ("shared_race", "in_flight", "uninitialised")
    finding = found(kernel_of(BULK, "-DNO_EMPTY"), 1, 64, (x, out, np.int32(5)), **settings)
    assert finding.check in ("shared_race", "mbarrier")
    finding = found(kernel_of(BULK, "-DNO_WAIT"), 1, 64, (x, out, np.int32(5)), **settings)
    assert finding.check == "never_waited"


COPIES_ARRIVE = r"""
extern "C" __global__ void kernel(const float4* x, float* out) {
  __shared__ float4 s[64];
  __shared__ u64 bar;
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (threadIdx.x == 0) init(&bar, 64);
  __syncthreads();
  copy16(&s[threadIdx.x], &x[threadIdx.x]);
  arrive_with_copies(&bar);
#ifndef NO_WAIT
  wait_parity(&bar, 0);
#endif
  out[threadIdx.x] = s[63 - threadIdx.x].y;  // use
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
"""


COPIES_IN_ONE_GROUP = r"""
extern "C" __global__ void kernel(const float4* x, float* out) {
  __shared__ float4 s[64];
  __shared__ u64 bar;
  if (threadIdx.x == 0) init(&bar, 32);
  __syncwarp();
  copy16(&s[threadIdx.x], &x[threadIdx.x]);
  arrive_with_copies(&bar);
  copy16(&s[32 + threadIdx.x], &x[32 + threadIdx.x]);
  asm volatile("cp.async.commit_group;" ::: "memory");
  WAIT
  out[threadIdx.x] = s[threadIdx.x + SECOND * 32].y;  // use
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  wait_parity(&bar, 0);
}
"""


@pytest.mark.parametrize(
    ("wait", "second", "is_right"),
    [
        ("wait_parity(&bar, 0);", 0, True),
        ("wait_parity(&bar, 0);", 1, False),  # the barrier waits for what was started before
        ("wait_group 0", 1, True),
        ("wait_group 1", 0, False),  # both copies are one group: arriving does not end it
    ],
)
def test_arriving_at_an_mbarrier_ends_no_group(wait: str, second: int, is_right: bool) -> None:
    if wait.startswith("wait_group"):
        wait = f'asm volatile("cp.async.{wait};" ::: "memory");'
    text = COPIES_IN_ONE_GROUP.replace("WAIT", wait).replace("SECOND", str(second))
    x, out = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32), np.zeros(32, np.float32)
    if is_right:
        run(kernel_of(text), 1, 32, (x, out), cp_async="late")
        np.testing.assert_array_equal(out, x[32 * second :][:32, 1])
    else:
        assert found(kernel_of(text), 1, 32, (x, out), cp_async="late").check == "in_flight"


@pytest.mark.parametrize("settings", ORDERS)
def test_copies_that_arrive_at_an_mbarrier(settings: dict[str, Any]) -> None:
    x, out = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32), np.zeros(64, np.float32)
    run(kernel_of(COPIES_ARRIVE), 1, 64, (x, out), **settings)
    np.testing.assert_array_equal(out, x[::-1, 1])
    finding = found(kernel_of(COPIES_ARRIVE, "-DNO_WAIT"), 1, 64, (x, out), **settings)
    assert finding.check in ("shared_race", "in_flight", "uninitialised", "never_waited")
    finding = found(kernel_of(COPIES_ARRIVE.replace("&bar, 0", "&bar, 2")), 1, 64, (x, out), **settings)
    assert finding.check == "mbarrier" and "parity 2, which is 0 or 1" in finding.message
