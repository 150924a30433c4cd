"""Products of a warpgroup: layouts against the PTX manual, and planted bugs."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from simulated import ORDERS, PREFIX, compiled, found, line_of, run
from wgmma import Product, layouts, operand

from cuflash.simulator import SimModule, SimulationError, UnsupportedInstruction, compile_ptx
from cuflash.simulator.launch import mutated
from cuflash.simulator.mutate import mutants

PRODUCTS = layouts()


def launch(product: Product, **settings: Any) -> tuple[np.ndarray, Any]:
    out = product.spread(product.before)
    kernel = SimModule(product.source, name="product.cu").get_function("product")
    arguments = product.arguments(out, product.image, product.fragments())
    return out, run(kernel, 1, 128, arguments, shared_mem=len(product.image), **settings)


@pytest.mark.parametrize("name", PRODUCTS)
def test_layouts(name: str) -> None:
    product = PRODUCTS[name]
    out, _ = launch(product)
    np.testing.assert_array_equal(out, product.expected())
    again, _ = launch(product, seed=1, cp_async="random")
    np.testing.assert_array_equal(again, out)


def test_any_numbers() -> None:
    product = Product(64, "bf16", None, operand(128, True, 64, 4), 4, integers=False)
    out, _ = launch(product)
    np.testing.assert_allclose(out, product.expected(), rtol=1e-5, atol=1e-5)


def test_counters() -> None:
    """Each warp issues the product; what it reads of B is read once, 128 bytes at a time and without conflicts."""
    product = PRODUCTS["n64"]
    _, record = launch(product)
    counters = record.counters
    assert counters.wgmma == 4 * product.steps
    assert counters.wavefronts("wgmma") == (product.steps * (64 + 64) * 32 // 128,) * 2
    without = Product(64, "bf16", None, operand(0, True, 64, 1))
    without.b = operand(32, False, 64, 1)
    assert launch(without)[1].counters.wavefronts("wgmma") == (16, 16)


# A kernel whose warpgroups each take a copy of X, [64 rows of n][64 of k] in the 128-byte swizzle, as B, and ones as A.
# The planted bug replaces a line of it.
GOOD = """
#define FENCE asm volatile("wgmma.fence.sync.aligned;" ::: "memory")
#define COMMIT asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory")
#define WAIT(n) asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory")
#define PROXY asm volatile("fence.proxy.async.shared::cta;" ::: "memory")
#define PIN for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[i]) :: "memory")
__device__ __forceinline__ void product(float (&c)[4], const u32 (&f)[4], u64 b, int add = 1) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %9, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, p, 1, 1, 0;}"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(f[0]), "r"(f[1]), "r"(f[2]), "r"(f[3]), "l"(b), "r"(add));
}
extern "C" __global__ void __launch_bounds__(256) kernel(const uint4* x, float* out) {
  __shared__ __align__(1024) uint4 tile[64];
  const int t = threadIdx.x, warp = __shfl_sync(~0u, t / 32, 0);
  u64 b = (u64)(shared_address(tile) >> 4) | (u64)64 << 32 | (u64)1 << 62;
  u32 f[4];
  for (int i = 0; i < 4; ++i) f[i] = 0x3f803f80;
  float c[4] = {0, 0, 0, 0};
  if (t < 64) {
    COPY
  }
  PROXY;  // writer's
  __syncthreads();
  if (warp >= ROLE) {
    PIN;
    BEFORE
    FENCE;  // first
    product(c, f, b);
    product(c, f, b + 2);
    COMMIT;
    BETWEEN
    WAIT(0);
    PIN;
    for (int i = 0; i < 4; ++i) out[t * 4 + i] = c[i];
  }
}
"""
PARTS = {
    "COPY": "tile[t ^ (t / 8)] = x[t];",
    "ROLE": "0",
    "BEFORE": "",
    "BETWEEN": "",
}


def planted(**changes: str) -> str:
    source = GOOD
    for mark, text in {**PARTS, **{k: v for k, v in changes.items() if k in PARTS}}.items():
        source = source.replace(mark, text)
    for line in changes.get("without", "").split(";"):
        if line:
            assert line in source
            source = source.replace(f"{line};", "", 1)
    if "replace" in changes:
        old, new = changes["replace"].split(" => ")
        assert old in source
        source = source.replace(old, new)
    return source


def inputs() -> tuple[np.ndarray, np.ndarray]:
    import ml_dtypes

    x = np.random.default_rng(0).integers(-3, 4, (8, 64)).astype(ml_dtypes.bfloat16)
    return x, np.zeros((256, 4), np.float32)


def sums(x: np.ndarray, columns: int = 32) -> np.ndarray:
    """What each thread of a warpgroup has: column 2 (lane % 4) and the one beside it, twice."""
    total = x[:, :columns].astype(np.float32).sum(1)
    lane = np.arange(256) % 4 * 2
    return np.stack([total[lane], total[lane + 1]] * 2, 1)


COPIES = {
    "stores": PARTS["COPY"],
    "cp.async": "copy16(&tile[t ^ (t / 8)], &x[t]); commit(); wait<0>();",
}
READER = {"without": "  PROXY", "BEFORE": "PROXY;"}


@pytest.mark.parametrize("settings", ORDERS)
@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("fence", ["writer's", "reader's"])
def test_clean(settings: dict[str, Any], copy: str, fence: str) -> None:
    changes = {"COPY": COPIES[copy], **({} if fence == "writer's" else READER)}
    source = planted(**changes)
    x, out = inputs()
    run(compiled(source), 1, 256, (x, out), **settings)
    np.testing.assert_array_equal(out, sums(x))


BUGS: dict[str, tuple[dict[str, str], str, str]] = {
    "no proxy fence": ({"without": "  PROXY"}, "proxy", "without a fence.proxy.async"),
    "no proxy fence for cp.async": (
        {"without": "  PROXY", "COPY": COPIES["cp.async"]},
        "proxy",
        "without a fence.proxy.async",
    ),
    "a proxy fence ahead of the store": (
        {"replace": "PROXY;  // writer's => ", "COPY": "PROXY; " + COPIES["stores"]},
        "proxy",
        "without a fence.proxy.async",
    ),
    "a proxy fence of the other warpgroup": (
        {"without": "  PROXY", "BEFORE": "if (warp < 4) PROXY;"},
        "proxy",
        "without a fence.proxy.async",
    ),
    "no barrier": ({"without": "  __syncthreads()"}, "shared_race or uninitialised", ""),
    "copies that nobody waits for": (
        {"COPY": "copy16(&tile[t ^ (t / 8)], &x[t]); commit();"},
        "in_flight",
        "still writing",
    ),
    "no fence": ({"without": "    FENCE"}, "warpgroup", "no wgmma.fence comes before the first"),
    "a fence ahead of an access": (
        {"BEFORE": "FENCE; for (int i = 0; i < 4; ++i) c[i] = c[i] * 2 + t * 0.0f;", "replace": "FENCE;  // first => "},
        "warpgroup",
        "no wgmma.fence between",
    ),
    "an accumulator is read too early": ({"BETWEEN": "out[t * 4] = c[1];"}, "warpgroup", "has not been waited for"),
    "an accumulator is changed too early": ({"BETWEEN": "c[1] *= 2;"}, "warpgroup", "has not been waited for"),
    "A is changed too early": (
        {
            "BEFORE": 'for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(f[i]));',
            "BETWEEN": 'asm volatile("add.u32 %0, %0, 1;" : "+r"(f[3]));',
        },
        "warpgroup",
        "has not been waited for",
    ),
    "too lax a wait": ({"replace": "WAIT(0) => WAIT(1)"}, "warpgroup", "has not been waited for"),
    "no commit": ({"without": "    COMMIT"}, "warpgroup", "has not been waited for"),
    "memory is reused too early": (
        {"BETWEEN": 'asm volatile("bar.sync %0, 128;" :: "r"(1 + warp / 4)); if (warp < 4) tile[t % 64] = x[t % 64];'},
        "shared_race",
        "not ordered",
    ),
    "descriptors that differ in a warp": (
        {"replace": "product(c, f, b); => product(c, f, b + 2 * (t & 1));"},
        "warpgroup",
        "the descriptor of B is",
    ),
    "descriptors that differ in a warpgroup": (
        {"replace": "product(c, f, b); => product(c, f, b + 2 * (warp & 1));"},
        "warpgroup",
        "not the same in warps",
    ),
    "scale-d that differs": (
        {"replace": "product(c, f, b); => product(c, f, b, warp & 1);"},
        "warpgroup",
        "scale-d of this product",
    ),
    "a part of a warpgroup": ({"ROLE": "2"}, "warpgroup", "exits without coming to"),
    "different products": (
        {"BEFORE": "if (warp == 1) { FENCE; product(c, f, b); product(c, f, b + 2); COMMIT; WAIT(0); return; }"},
        "warpgroup",
        "is another one in warp",
    ),
    "a wait of one warp": ({"BETWEEN": "if (warp == 1) WAIT(0);"}, "warpgroup", "is another one in warp"),
    "a fence of one warp": ({"BEFORE": "if (warp == 1) FENCE;"}, "warpgroup", "is another one in warp"),
    "bits that mean nothing": ({"replace": "(u64)1 << 62 => (u64)3 << 61"}, "warpgroup", "bits that mean nothing"),
    "a base offset": ({"replace": "(u64)1 << 62 => (u64)8193 << 49"}, "warpgroup", "base offset"),
    "a pattern that starts elsewhere": (
        {"replace": "product(c, f, b); => product(c, f, b + 8);"},
        "warpgroup",
        "pattern",
    ),
    "outside of shared memory": ({"replace": "product(c, f, b); => product(c, f, b + 64);"}, "bounds", "wgmma reads"),
    "uninitialised": ({"COPY": "if (t != 8) tile[t ^ (t / 8)] = x[t];"}, "uninitialised", "nothing has written"),
}


@pytest.mark.parametrize("settings", ORDERS)
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs(bug: str, settings: dict[str, Any]) -> None:
    changes, check, message = BUGS[bug]
    finding = found(compiled(planted(**changes)), 1, 256, inputs(), **settings)
    assert finding.check in check.split(" or ") and message in finding.message, finding


def test_a_block_without_a_whole_warpgroup() -> None:
    source = planted(replace="__launch_bounds__(256) => __launch_bounds__(64)")
    finding = found(compiled(source), 1, 64, inputs())
    assert finding.check == "warpgroup" and "4 whole warps" in finding.message


def test_the_finding_names_both_places() -> None:
    source = planted(BETWEEN="out[t * 4] = c[1];")
    finding = found(compiled(source), 1, 256, inputs())
    assert finding.line == line_of(source.replace("c[1];", "c[1]; // here"), "here")
    assert finding.other_line is not None and "wgmma.mma_async" in source.splitlines()[finding.other_line - 1]


@pytest.mark.parametrize("settings", ORDERS)
def test_pipelined_products(settings: dict[str, Any]) -> None:
    """The scores of the next tile under way while this one's accumulate, across a loop's end; A in registers."""
    source = (
        GOOD.split("extern")[0]
        + """
extern "C" __global__ void __launch_bounds__(128) kernel(const uint4* x, float* out, int n) {
  __shared__ __align__(1024) uint4 tile[64];
  const int t = threadIdx.x;
  u64 b = (u64)(shared_address(tile) >> 4) | (u64)64 << 32 | (u64)1 << 62;
  u32 ones[4], p[4];
  for (int i = 0; i < 4; ++i) ones[i] = 0x3f803f80;
  float s[4], o[4] = {0, 0, 0, 0}, c[4];
  if (t < 64) tile[t ^ (t / 8)] = x[t];
  PROXY;
  __syncthreads();
  FENCE;
  product(s, ones, b, 0);
  COMMIT;
  WAIT(0);
  for (int j = 0; j < n; ++j) {
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(s[i]) :: "memory");
    for (int i = 0; i < 4; ++i) asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(p[i]) : "f"(s[i] > 0 ? 1.0f : 2.0f));
    FENCE;
    product(s, ones, b + 2 * (j & 1), 0);
    COMMIT;
    product(o, p, b + 2);
    COMMIT;
    WAIT(1);
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(s[i]) :: "memory");
    c[0] = s[0];
    WAIT(0);
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(o[i]) :: "memory");
  }
  for (int i = 0; i < 4; ++i) out[t * 4 + i] = o[i] + c[0] * 0;
}
"""
    )
    x, out = inputs()
    run(compiled(source), 1, 128, (x, out, np.int32(5)), **settings)
    numbers = x.astype(np.float32)
    first, second = numbers[:, :16].sum(1), numbers[:, 16:32]
    scores = [first, first, numbers[:, 16:32].sum(1), first, second.sum(1)]
    wanted = np.zeros((128, 4), np.float32)
    lane = np.arange(128) % 4 * 2
    for score in scores:
        # the weights of a row: register r holds rows g and g + 8 in turn, of columns by 8
        s = np.stack([score[lane], score[lane + 1]] * 2, 1)  # [thread][register]
        p = np.where(s > 0, 1.0, 2.0)
        for half in (0, 1):  # rows g + 8 half
            for n in (0, 1):
                column = second[lane + n]  # (128, 16)
                quad = np.arange(128) // 4 * 4
                weights = np.empty((128, 16))
                for q in range(4):
                    for k, register in ((2 * q, half), (8 + 2 * q, 2 + half)):
                        weights[:, k : k + 2] = p[quad + q, register][:, None]
                wanted[:, 2 * half + n] += (weights * column).sum(1)
    np.testing.assert_array_equal(out[:128], wanted)


REGISTERS = """
extern "C" __global__ void __launch_bounds__(384, 1) kernel(float* out) {
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (group == 0) asm volatile("setmaxnreg.dec.sync.aligned.u32 FEW;");
  else asm volatile("setmaxnreg.inc.sync.aligned.u32 MANY;");
  out[threadIdx.x] = group;
}
"""


@pytest.mark.parametrize("settings", ORDERS)
@pytest.mark.parametrize(
    "few, many, message",
    [
        (40, 232, ""),
        (56, 224, ""),
        (24, 240, ""),
        (40, 240, "want 2080 registers"),
        (36, 232, "a multiple of 8"),
        (16, 232, "from 24 to 256"),
        (176, 232, "setmaxnreg.dec to 176 from 168"),
        (40, 160, "setmaxnreg.inc to 160 from 168"),
    ],
)
def test_registers(few: int, many: int, message: str, settings: dict[str, Any]) -> None:
    kernel = compiled(REGISTERS.replace("FEW", str(few)).replace("MANY", str(many)))
    out = np.zeros(384, np.float32)
    if not message:
        run(kernel, 1, 384, (out,), **settings)
        np.testing.assert_array_equal(out, np.arange(384) // 128)
        return
    finding = found(kernel, 1, 384, (out,), **settings)
    assert finding.check == "registers" and message in finding.message


RING = (
    GOOD.split("extern")[0]
    + """
__device__ __forceinline__ void wait_for(u64* bar, u32 parity) {
  asm volatile("{.reg .pred p; L: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra D; bra L; D:}"
               ::"r"(shared_address(bar)), "r"(parity) : "memory");
}
extern "C" __global__ void __launch_bounds__(384, 1) kernel(const uint4* x, float* out, int tiles) {
  __shared__ __align__(1024) uint4 ring[2][64];
  __shared__ u64 full[2], empty[2];
  const int t = threadIdx.x, group = __shfl_sync(~0u, t / 128, 0);
  if (t == 0)
    for (int i = 0; i < 2; ++i) {
      asm volatile("mbarrier.init.shared.b64 [%0], 128;" ::"r"(shared_address(full + i)) : "memory");
      asm volatile("mbarrier.init.shared.b64 [%0], 8;" ::"r"(shared_address(empty + i)) : "memory");
    }
  __syncthreads();
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    for (int j = 0; j < tiles; ++j) {
      if (j >= 2) wait_for(empty + j % 2, j / 2 % 2 ^ 1);
      if (t < 64) copy16(&ring[j % 2][t ^ (t / 8)], &x[j * 64 + t]);
      asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(full + j % 2)) : "memory");
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    float c[4] = {0, 0, 0, 0};
    u32 f[4];
    for (int i = 0; i < 4; ++i) f[i] = 0x3f803f80;
    for (int j = 0; j < tiles; ++j) {
      wait_for(full + j % 2, j / 2 % 2);
      PROXY;
      u64 b = (u64)(shared_address(ring[j % 2]) >> 4) | (u64)64 << 32 | (u64)1 << 62;
      if (group == 1) asm volatile("bar.sync %0, 256;" ::"r"(4 + j % 2) : "memory");
      else asm volatile("bar.arrive %0, 256;" ::"r"(4 + j % 2) : "memory");
      FENCE;
      for (int k = 0; k < 4; ++k) product(c, f, b + 2 * k);
      COMMIT;
      WAIT(0);
      PIN;
      u32 bar = shared_address(empty + j % 2);
      if (t % 32 == 0) asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(bar) : "memory");
    }
    asm volatile("barrier.sync %0, 128;" ::"r"(1 + group) : "memory");
    for (int i = 0; i < 4; ++i) out[(t - 128) * 4 + i] = c[i];
  }
}
"""
)


def tiles() -> tuple[np.ndarray, np.ndarray]:
    import ml_dtypes

    x = np.random.default_rng(0).integers(-3, 4, (11, 8, 64)).astype(ml_dtypes.bfloat16)
    return x, np.zeros((256, 4), np.float32)


@pytest.mark.parametrize("settings", ORDERS)
def test_producer_and_consumers(settings: dict[str, Any]) -> None:
    """A ring of tiles filled by cp.async, full and empty mbarriers, named barriers of warpgroups."""
    x, out = tiles()
    run(compiled(RING), 1, 384, (x, out, np.int32(len(x))), **settings)
    np.testing.assert_array_equal(out, sum(sums(tile, 64) for tile in x))
    # without the consumers' fence, and with a stage that is given back before it was read
    finding = found(compiled(RING.replace("      PROXY;", "")), 1, 384, (x, out, np.int32(len(x))), **settings)
    assert finding.check == "proxy"
    wait = "      WAIT(0);\n      PIN;\n"
    assert wait in RING
    early = RING.replace(wait, "").replace(
        '    asm volatile("barrier.sync', '    WAIT(0);\n    asm volatile("barrier.sync'
    )
    finding = found(compiled(early), 1, 384, (x, out, np.int32(len(x))), **settings)
    assert finding.check == "shared_race"


def test_mutants_are_killed() -> None:
    x, out = tiles()
    kernel = compiled(RING)
    run(kernel, 1, 384, (x, out, np.int32(len(x))))
    kinds = {"drop a proxy fence", "drop a commit", "drop a wait", "drop a product", "transpose B or not"}
    chosen = [m for m in mutants(kernel) if "wgmma" in m.instruction or "proxy" in m.instruction]
    assert kinds <= {m.kind for m in chosen}
    for mutant in chosen:
        again = np.zeros_like(out)
        with mutated(mutant.key, mutant.apply):
            try:
                run(kernel, 1, 384, (x, again, np.int32(len(x))), time_limit=10)
            except SimulationError:
                continue
        assert again.tobytes() != out.tobytes(), mutant


def test_a_copy_is_a_renaming() -> None:
    """What a compiler may do at a loop's end: an accumulator that is under way moves to another register."""
    ptx = compile_ptx(PREFIX + planted(), arch="sm_90a")
    number = int(re.search(r"\.reg \.f32 \s*%f<(\d+)>", ptx)[1])  # type: ignore[index]
    accumulator = re.findall(r"wgmma\.mma_async\S+\s*\{(%f\d+)", ptx)[-1]
    wait = "wgmma.wait_group.sync.aligned 0;"
    moved = ptx.replace(f"%f<{number}>", f"%f<{number + 1}>")
    there, back = f"mov.f32 %f{number}, {accumulator};", f"mov.f32 {accumulator}, %f{number};"
    x, out = inputs()
    kernel = SimModule(ptx=moved.replace(wait, f"{there}\n{wait}\n{back}")).get_function("kernel")
    run(kernel, 1, 256, (x, out))
    np.testing.assert_array_equal(out, sums(x))
    kernel = SimModule(ptx=moved.replace(wait, f"{there}\n{back}\n{wait}")).get_function("kernel")
    assert found(kernel, 1, 256, (x, out)).check == "warpgroup"


def test_a_named_barrier_is_for_whole_warps() -> None:
    source = 'extern "C" __global__ void kernel(float* x) { asm volatile("barrier.sync 1, 40;"); x[threadIdx.x] = 1; }'
    finding = found(compiled(source), 1, 64, (np.zeros(64, np.float32),))
    assert finding.check == "divergent_barrier" and "40 threads" in finding.message


def test_the_architecture_follows_from_the_source() -> None:
    source = PRODUCTS["n8"].source
    assert ".target sm_90a" in compile_ptx(source, arch="sm_90")
    assert ".target sm_90a" in compile_ptx(source, arch="sm_90a")
    plain = 'extern "C" __global__ void f() {}'
    assert ".target sm_90\n" in compile_ptx(plain, arch="sm_90")
    assert ".target sm_90a\n" in compile_ptx(plain, arch="sm_90a")


def test_what_is_not_known_is_refused() -> None:
    source = PRODUCTS["n8"].source.replace(".f32.bf16.bf16", ".f16.bf16.bf16")
    with pytest.raises(UnsupportedInstruction, match="accumulators are f32"):
        SimModule(source).get_function("product")
