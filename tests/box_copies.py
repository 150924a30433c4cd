"""A kernel that copies one box of a tensor (cp.async.bulk.tensor), and what it brings."""

from __future__ import annotations

import numpy as np

from cuflash.kernels.boxes import MAP_BYTES, Boxed
from cuflash.kernels.source import source

ROWS = 16
SOURCE = r"""
struct __align__(64) Params {
    TensorMap map;
    unsigned short* out;  // (blocks, ROWS, 64)
    int column, row, head, page;
};
extern "C" __global__ void kernel(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ u64 full;
    const u32 box = shared_address(shared) + SHIFT;
    if (threadIdx.x == 0) init_barrier(full, 32);
    __syncwarp();
    const bool is_elected = elect_lane();
    if (is_elected) expect_bytes(full, BYTES);
#if BLOCKS > 0
    fence_barrier_init();
    cluster_arrive();
    cluster_wait();
    if (is_elected && blockIdx.x == 0) {
        copy_box_to_blocks(box, p.map, p.column, p.row, p.head, p.page, full, BLOCKS, eviction_policy());
    }
#else
    if (is_elected) copy_box(box, p.map, p.column, p.row, p.head, p.page, full, eviction_policy());
#endif
    arrive(full);
    WAIT
    unsigned short* const out = p.out + blockIdx.x * ROWS * 64;
    for (int i = threadIdx.x; i < ROWS * 64; i += 32) out[i] = reinterpret_cast<unsigned short*>(shared + SHIFT)[i];
#if BLOCKS > 0
    cluster_arrive();
    cluster_wait();
#endif
}
"""
PARAMS = np.dtype(
    {
        "names": ["map", "out", "column", "row", "head", "page"],
        "formats": [f"V{MAP_BYTES}", "u8", "i4", "i4", "i4", "i4"],
        "offsets": [0, 128, 136, 140, 144, 148],
        "itemsize": 192,
    }
)


def code() -> str:
    """The kernel's source: its options say ROWS, SHIFT, BYTES and WAIT."""
    headers = "\n".join(source(f"ptx/{name}.cuh") for name in ("boxes", "barriers", "cluster", "copies"))
    return f"{headers}\n{SOURCE}"


def options(
    wait: str = "wait_for_phase(full, 0);", shift: int = 0, size: int = ROWS * 128, blocks: int = 0
) -> tuple[str, ...]:
    """The compiler's options; ``blocks`` of a cluster get the box from its first one, a bit each."""
    values = {"ROWS": ROWS, "SHIFT": shift, "BYTES": size, "WAIT": wait, "BLOCKS": blocks}
    return (*(f"-D{name}={value}" for name, value in values.items()), "-std=c++17")


def boxed(tensor: np.ndarray) -> Boxed:
    """How a cache (pages, slots, heads, dim) is copied in boxes."""
    pages, slots, heads, dim = tensor.shape
    page, slot, head, _ = tensor.strides
    return Boxed(2, (dim, slots, heads, pages), (slot, head, page), (64, ROWS, 1, 1))


def params(tensor_map: bytes, out: int, at: tuple[int, int, int, int]) -> np.ndarray:
    """The parameter of a copy: what lies at (column, row, head, page) goes to an address."""
    one = np.zeros((), PARAMS)
    for name, value in zip(PARAMS.names or (), (np.void(tensor_map), out, *at), strict=True):
        one[name] = value
    return one


def expected(tensor: np.ndarray, at: tuple[int, int, int, int]) -> np.ndarray:
    """The box in the 128-byte swizzle: chunk c of row r lies at c ^ r % 8; zeros beyond the tensor."""
    column, row, head, page = at
    box = np.zeros((ROWS, 64), tensor.dtype)
    pages, slots, heads, dim = tensor.shape
    for r in range(ROWS):
        if 0 <= row + r < slots and 0 <= head < heads and 0 <= page < pages:
            there = tensor[page, row + r, head, column : column + 64]
            box[r, : len(there)] = there
    chunks = box.reshape(ROWS, 8, 8)
    return np.stack([chunks[r, np.arange(8) ^ r % 8] for r in range(ROWS)]).reshape(ROWS, 64)


def arrays(layout: str, dim: int) -> np.ndarray:
    rng = np.random.default_rng(dim)
    if layout == "NHD":
        return rng.integers(1, 2**16, (3, 20, 2, dim)).astype(np.uint16)
    return np.moveaxis(rng.integers(1, 2**16, (3, 2, 20, dim)).astype(np.uint16), 1, 2)


AT = [
    (0, 0, 0, 0),
    (64, 3, 1, 2),
    (64, 4, 0, 1),
    (0, 12, 1, 1),
    (0, -5, 0, 0),
    (0, 0, 0, -1),
    (0, 0, 2, 0),
    (0, 0, 0, 3),
]
