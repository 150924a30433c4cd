"""Counters against hand calculations."""

from __future__ import annotations

import numpy as np
import pytest
from simulated import ORDERS, compiled, line_of, run

KERNEL = r"""
extern "C" __global__ void kernel(const float4* rows, const float* table, float* out, int stride) {
  __shared__ float4 tile[64];
  __shared__ float column[32 * 33];
  copy16(&tile[threadIdx.x], &rows[threadIdx.x]);
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  float v = table[threadIdx.x * stride];  // table
  if (threadIdx.x < 32) {
    column[threadIdx.x * 32] = v;  // conflict
    __syncwarp();
    v += column[0];  // broadcast
    v += tile[threadIdx.x].x;  // 16 apart
  }
  out[threadIdx.x] = v;
}
"""


@pytest.mark.parametrize("settings", ORDERS)
def test_a_hand_calculation(settings: dict[str, object]) -> None:
    rows, table, out = np.zeros((64, 4), np.float32), np.zeros(64 * 3, np.float32), np.zeros(64, np.float32)
    arrays = {"rows": rows, "table": table, "out": out}
    launch = run(compiled(KERNEL), 1, 64, (rows, table, out, np.int32(3)), arrays=arrays, **settings)
    c = launch.counters
    # 64 copies of 16 bytes: 1024 bytes, 32 sectors
    assert (c.arrays["rows"].read_bytes, c.arrays["rows"].read_sectors, c.arrays["rows"].read_ideal) == (1024, 32, 32)
    # each warp reads 32 floats that lie 12 bytes apart: 12 sectors, where 4 would do
    assert (c.arrays["table"].read_bytes, c.arrays["table"].read_sectors, c.arrays["table"].read_ideal) == (256, 24, 8)
    assert (c.arrays["out"].write_bytes, c.arrays["out"].write_sectors, c.arrays["out"].write_ideal) == (256, 8, 8)
    lines = {line: count for (_, line), count in c.by_line.items()}
    conflict, broadcast, apart = (lines[line_of(KERNEL, mark)] for mark in ("conflict", "broadcast", "16 apart"))
    assert (conflict.shared_ideal, conflict.shared_real) == (1, 32)  # all lanes in one bank
    assert (broadcast.shared_ideal, broadcast.shared_real) == (1, 1)  # one word for all
    assert (apart.shared_ideal, apart.shared_real) == (1, 4)  # lanes 8 apart share a bank
    # and the copies: two warps of four wavefronts
    assert (c.shared_ideal, c.shared_real) == (8 + 1 + 1 + 1, 8 + 32 + 1 + 4)
    assert (c.barriers, c.mma, c.atomics) == (2, 0, 0)
    assert c.classes["cp.async"] == 2
    assert c.classes["st.shared"] == 1
    assert c.classes["ld.shared"] == 2
    assert c.classes["warp_sync"] == 1


def test_views_of_one_buffer_count_from_its_start() -> None:
    source = 'extern "C" __global__ void kernel(const float* x, float* out) { out[threadIdx.x] = x[threadIdx.x]; }'
    buffer, out = np.zeros(1024, np.float32), np.zeros(32, np.float32)
    for start, sectors in ((0, 4), (8, 4), (4, 5)):
        launch = run(compiled(source), 1, 32, (buffer[start:], out), arrays={"x": buffer[start:]})
        assert launch.counters.arrays["x"].read_sectors == sectors
        assert launch.counters.arrays["argument 1"].write_sectors == 4


# Bytes of a load, the address of lane l, and what ncu counts on an H200: wavefronts, and bank conflicts among them.
PATTERNS = [
    (8, "0", 1, 0), (8, "l / 16 * 8", 1, 0), (8, "l / 16 * 128", 2, 1), (8, "l % 2 * 8", 1, 0),
    (8, "l % 2 * 128", 2, 1), (8, "l % 16 * 8", 2, 0), (8, "l / 2 * 8", 1, 0), (8, "l % 4 * 8", 2, 0),
    (8, "l * 8", 2, 0),
    (16, "0", 2, 0), (16, "l / 8 * 16", 2, 0), (16, "l / 8 * 128", 4, 2), (16, "l % 8 * 16", 4, 0),
    (16, "l / 4 * 16", 2, 0), (16, "l % 2 * 16", 2, 0), (16, "l / 16 * 16", 2, 0), (16, "l % 4 * 16", 4, 0),
    (16, "l % 16 * 16", 4, 0), (16, "l / 2 * 16", 2, 0), (16, "l * 16", 4, 0),
    (4, "0", 1, 0), (4, "l * 4", 1, 0), (4, "l * 8", 2, 1),
]  # fmt: skip
LOADING = r"""
extern "C" __global__ void kernel(unsigned* out) {
  extern __shared__ float4 s[];
  const unsigned l = threadIdx.x;
  s[2 * l] = s[2 * l + 1] = make_float4(1, 2, 3, 4);
  __syncwarp();
  const char* from = reinterpret_cast<const char*>(s) + (ADDRESS);
  unsigned x[4] = {};
  LOAD  // load
  out[l] = x[0];
}
"""


@pytest.mark.parametrize(("size", "address", "wavefronts", "conflicts"), PATTERNS)
def test_wavefronts_of_vectors_are_those_of_a_gpu(size: int, address: str, wavefronts: int, conflicts: int) -> None:
    vector = {4: "", 8: ".v2", 16: ".v4"}[size]
    into = ", ".join(f"%{i}" for i in range(size // 4))
    outputs = ", ".join(f'"=r"(x[{i}])' for i in range(size // 4))
    load = f'asm volatile("ld.shared{vector}.u32 {{{into}}}, [%{size // 4}];" : {outputs} : "r"(shared_address(from)));'
    text = LOADING.replace("ADDRESS", address).replace("LOAD", load)
    counters = run(compiled(text), 1, 32, (np.zeros(32, np.uint32),), shared_mem=1024).counters
    line = next(count for (_, number), count in counters.by_line.items() if number == line_of(text, "load"))
    assert (line.shared_real, line.shared_real - line.shared_ideal) == (wavefronts, conflicts)
