"""Divergence, deadlock, alignment, races of other kinds; switches, orders and messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from simulated import ORDERS, PREFIX, Checks, compiled, found, run

from cuflash.simulator import (
    CompileError,
    PtxError,
    SimModule,
    SimulationError,
    UnsupportedInstruction,
    record,
    replace_ptx,
)
from cuflash.simulator.ptx import parse

OUT = np.zeros(256, np.float32)


def body(text: str, *options: str) -> Any:
    return compiled(
        f'extern "C" __global__ void kernel(float* out, int n) {{\n  int t = threadIdx.x;\n{text}\n}}\n',
        options=options,
    )


def args(n: int = 0) -> tuple[Any, ...]:
    return OUT.copy(), np.int32(n)


@pytest.mark.parametrize("settings", ORDERS)
def test_a_barrier_that_some_lanes_do_not_reach(settings: dict[str, Any]) -> None:
    finding = found(
        body('  if (t % 2 == n) __syncthreads();\n  else out[t] = 1;\n  asm volatile("bar.sync 1;");'),
        1,
        64,
        args(),
        **settings,
    )
    assert (finding.check, finding.line) == ("divergent_barrier", 3)


@pytest.mark.parametrize("settings", ORDERS)
def test_a_barrier_after_some_threads_have_left(settings: dict[str, Any]) -> None:
    finding = found(
        body("  if (t >= n) return;\n  out[t] = 1;\n  __syncthreads();\n  out[t] = 2;"), 1, 64, args(40), **settings
    )
    assert (finding.check, finding.line) == ("divergent_barrier", 5)
    assert "24 of the block's 64 threads" in finding.message
    launch = run(
        body("  if (t >= n) return;\n  out[t] = 1;\n  __syncthreads();\n  out[t] = 2;"),
        1,
        64,
        args(40),
        checks=Checks(barriers=False),
        **settings,
    )
    assert launch.findings == []


@pytest.mark.parametrize("settings", ORDERS)
def test_barriers_that_wait_for_each_other(settings: dict[str, Any]) -> None:
    finding = found(
        body('  if (t < 32) asm volatile("bar.sync 1, 64;");\n  else asm volatile("bar.sync 2, 64;");'),
        1,
        64,
        args(),
        **settings,
    )
    assert finding.check in ("deadlock", "divergent_barrier") and finding.line in (3, 4)


def test_a_shuffle_from_a_lane_that_has_left() -> None:
    finding = found(body("  if (t >= 20) return;\n  out[t] = __shfl_sync(~0u, t, n);"), 1, 32, args(25))
    assert (finding.check, finding.line) == ("divergent_warp", 4)


def test_a_shuffle_from_a_lane_that_does_not_take_part() -> None:
    finding = found(body("  if (t < 16) out[t] = __shfl_sync(0xffff, t, n);"), 1, 32, args(25))
    assert (finding.check, finding.line) == ("divergent_warp", 3)


def test_a_matrix_product_of_half_a_warp() -> None:
    finding = found(
        body(
            "  if (t < 16) return;\n  u32 r = t;\n"
            '  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(r));\n  out[t] = r;'
        ),
        1,
        32,
        args(),
    )
    assert finding.check == "divergent_warp"


def test_a_loop_that_waits_for_nothing() -> None:
    finding = found(body("  while (atomicAdd((int*)out, 0) == 0);\n"), 1, 32, args(), time_limit=0.3)
    assert (finding.check, finding.line) == ("deadlock", 3)


SPIN = r"""
extern "C" __global__ void kernel(unsigned* flag, float* data, float* out) {
  if (blockIdx.x == 0) {
    unsigned v;
    do { asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
        : "=r"(v) : "l"(flag) : "memory"); } while (v != gridDim.x - 1);
    out[threadIdx.x] = data[threadIdx.x + 1];
  } else {
    data[blockIdx.x] = blockIdx.x;
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(flag) : "memory");
  }
}
"""


@pytest.mark.parametrize("settings", ORDERS)
def test_a_block_that_waits_for_later_blocks(settings: dict[str, Any]) -> None:
    out = np.zeros(1, np.float32)
    run(compiled(SPIN), 4, 1, (np.zeros(1, np.uint32), np.zeros(4, np.float32), out), **settings)
    assert out[0] == 1


@pytest.mark.parametrize("settings", ORDERS)
def test_a_lock_within_a_warp(settings: dict[str, Any]) -> None:
    text = r"""
  __shared__ int lock, total;
  if (t == 0) { lock = 0; total = 0; }
  __syncthreads();
  bool done = false;
  while (!done) {
    if (atomicCAS(&lock, 0, 1) == 0) {
      __threadfence();
      total += t;
      __threadfence();
      atomicExch(&lock, 0);
      done = true;
    }
  }
  __syncthreads();
  if (t == 0) out[0] = total;"""
    values = args()
    run(body(text), 1, 64, values, **settings)
    assert values[0][0] == 2016


def test_misalignment() -> None:
    finding = found(body("  *(float4*)(out + t * 4 + n) = make_float4(0, 0, 0, 0);"), 1, 32, args(1))
    assert (finding.check, finding.line, finding.address) == ("misalignment", 3, "argument 0 + 4")


def test_shared_memory_begins_behind_the_drivers_own() -> None:
    """Address 0 is no place of the kernel's: an address that lacks its base is found."""
    text = "  __shared__ float s[32];\n  s[t] = n;\n  float* p = s + LESS;\n  out[t] = p[t] + shared_address(s) % 1024;"
    values = args(3)
    run(body(text.replace("LESS", "0")), 1, 32, values)
    assert (values[0][:32] == 3).all()
    finding = found(body(text.replace("LESS", "- 256")), 1, 32, args())
    assert (finding.check, finding.address, finding.thread) == ("bounds", "shared + 0", (0, 0, 0))


EXCHANGE = "  __shared__ float s[32];\n  s[t] = t;\n  SYNC\n  out[t] = s[31 - t];"


@pytest.mark.parametrize("settings", ORDERS)
def test_lanes_of_a_warp_need_a_barrier_too(settings: dict[str, Any]) -> None:
    run(body(EXCHANGE.replace("SYNC", "__syncwarp();")), 1, 32, args(), **settings)
    finding = found(body(EXCHANGE.replace("SYNC", 'asm volatile("" ::: "memory");')), 1, 32, args(), **settings)
    assert finding.check in ("shared_race", "uninitialised") and 6 in (finding.line, finding.other_line)
    # A shuffle is no barrier for memory.
    shuffle = 't = __shfl_sync(~0u, t, t); asm volatile("" ::: "memory");'
    finding = found(body(EXCHANGE.replace("SYNC", shuffle)), 1, 32, args(), **settings)
    assert finding.check == "shared_race"


@pytest.mark.parametrize("settings", ORDERS)
def test_what_one_lane_writes_for_all(settings: dict[str, Any]) -> None:
    text = "  __shared__ float s;\n  if (t == 0) s = n;\n  SYNC\n  out[t] = s;"
    run(body(text.replace("SYNC", "__syncwarp();")), 1, 32, args(), **settings)
    finding = found(body(text.replace("SYNC", 'asm volatile("" ::: "memory");')), 1, 32, args(), **settings)
    assert finding.check in ("shared_race", "uninitialised")


def test_half_a_warp_synchronises_only_itself() -> None:
    text = "  __shared__ float s[32];\n  s[t] = t;\n  __syncwarp(t < 16 ? 0xffff : 0xffff0000);\n  out[t] = s[t ^ n];"
    run(body(text), 1, 32, args(5))
    assert found(body(text), 1, 32, args(16)).check == "shared_race"


def test_lanes_that_write_the_same_place() -> None:
    run(body("  __shared__ float s; s = n; __syncthreads(); out[t] = s;"), 1, 32, args())
    finding = found(body("  __shared__ float s; s = t; __syncthreads(); out[t] = s;"), 1, 32, args())
    assert finding.check == "shared_race"


def test_global_memory_within_a_block() -> None:
    text = "  out[t] = t;\n  BETWEEN\n  out[128 + t] = out[127 - t];"
    run(body(text.replace("BETWEEN", "__syncthreads();")), 1, 128, args())
    finding = found(body(text.replace("BETWEEN", "")), 1, 128, args())
    assert (finding.check, finding.block) == ("global_race", (0, 0, 0))


def test_checks_can_be_switched_off() -> None:
    race = body(EXCHANGE.replace("SYNC", 'asm volatile("" ::: "memory");'))
    run(race, 1, 32, args(), checks=Checks(shared_races=False))
    run(race, 1, 32, args(), checks=Checks.cheap())
    unwritten = body("  __shared__ float s[32];\n  if (n) s[t] = 0;\n  __syncthreads();\n  out[t] = s[t];")
    values = args()
    run(unwritten, 1, 32, values, checks=Checks(uninitialised=False))
    assert np.isnan(values[0][:32]).all()  # what nothing has written shows in the values
    race(1, 32, args())  # outside of `record` the expensive checks are off


def test_the_same_seed_gives_the_same_order() -> None:
    kernel = body("  out[atomicAdd((int*)out + 255, 1)] = blockIdx.x * 32 + t;")
    orders = []
    for seed in (None, 1, 1, 2):
        values = args()
        run(kernel, 4, 32, values, seed=seed)
        orders.append(values[0][:128].tolist())
    assert orders[0] == list(range(128))
    assert orders[1] == orders[2] != orders[3]
    assert sorted(orders[1]) == sorted(orders[3]) == orders[0]


def test_early_and_late_copies_differ_where_nobody_waits() -> None:
    text = r"""
  __shared__ float4 s[32];
  s[t] = make_float4(7, 7, 7, 7);
  copy16(&s[t], out + 128 + 4 * (t % 32));
  out[t] = s[t].x;"""
    for timing, value in (("early", 0), ("late", 7)):
        values = args()
        run(body(text), 1, 32, values, cp_async=timing, checks=Checks(in_flight=False, never_waited=False))
        assert (values[0][:32] == value).all()
    with pytest.raises(ValueError, match="cp_async"), record(cp_async="soon"):
        pass


def test_an_unknown_instruction_is_named() -> None:
    source = (
        PREFIX
        + 'extern "C" __global__ void kernel() {\n'
        + 'u32 x; asm volatile("txq.width.b32 %0, [%1];" : "=r"(x) : "l"(0ull)); }\n'
        + 'extern "C" __global__ void other(int* x) { *x = 1; }'
    )
    module = SimModule(source)
    with pytest.raises(UnsupportedInstruction, match=r"txq\.width\.b32 is not .*PTX line \d+"):
        module.get_function("kernel")
    x = np.zeros(1, np.int32)
    module.get_function("other")(1, 1, (x,))
    assert x[0] == 1


def test_text_that_is_no_ptx_is_an_error() -> None:
    head = ".version 8.0\n.target sm_90\n.address_size 64\n"
    with pytest.raises(PtxError, match="PTX line 4"):
        parse(head + "gibberish")
    with pytest.raises(PtxError, match="PTX line 6"):
        parse(head + ".visible .entry k()\n{\n  .nonsense 3;\n}")
    with pytest.raises(PtxError, match="does not end"):
        parse(head + ".visible .entry k()\n{\n  ret;")


def test_messages_of_nvrtc() -> None:
    with pytest.raises(CompileError, match=r"(?s)planted\.cu for sm_80 with .*-DX=1.*undeclared"):
        compiled("__global__ void kernel() { undeclared = 1; }", options=("-DX=1",), arch="sm_80")


def test_wrong_launches() -> None:
    kernel = compiled('extern "C" __global__ void __launch_bounds__(64) kernel(float* x, int n) {}')
    x = np.zeros(4, np.float32)
    with pytest.raises(TypeError, match="2 parameters, not 1"):
        kernel(1, 32, (x,))
    with pytest.raises(TypeError, match="argument 1 of kernel has 8 bytes"):
        kernel(1, 32, (x, np.float64(1)))
    with pytest.raises(TypeError, match="argument 1 of kernel is a str"):
        kernel(1, 32, (x, "1"))
    with pytest.raises(ValueError, match="at most 64"):
        kernel(1, 128, (x, np.int32(1)))
    with pytest.raises(ValueError, match="shared memory"):
        kernel(1, 32, (x, np.int32(1)), shared_mem=300_000)
    with pytest.raises(KeyError, match="has no kernel 'missing'; it has kernel"):
        compiled('extern "C" __global__ void kernel() {}', "missing")


def test_a_kernel_can_be_replaced() -> None:
    kernel = body("  out[t] = 1;")
    other = kernel.module.ptx.replace("0f3F800000", "0f40000000").replace("1065353216", "1073741824")
    assert other != kernel.module.ptx
    values = args()
    with replace_ptx("kernel", other):
        run(kernel, 1, 4, values)
    assert values[0][:4].tolist() == [2] * 4
    run(kernel, 1, 4, values)
    assert values[0][:4].tolist() == [1] * 4


def test_a_report_reads_well() -> None:
    with pytest.raises(SimulationError) as error, record():
        body("  __shared__ float s[32];\n  s[t] = t;\n  out[t] = s[31 - t];")(1, 32, args())
    assert str(error.value).splitlines()[:6] == [
        "shared_race: a read of shared memory and a write by another thread are not ordered",
        "  kernel      kernel",
        "  source      planted.cu:5",
        "  block       (0, 0, 0), thread (0, 0, 0)",
        "  address     shared s + 124",
        "  other       write at planted.cu:4, block (0, 0, 0), thread (31, 0, 0)",
    ]
