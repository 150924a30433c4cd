"""The tensor-core instructions of the kernels: a GPU and the simulator have the same lane layouts, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import wgmma_attention
from wgmma import layouts

from cuflash.kernels import source as sources

# Fragments of one warp: ldmatrix, ldmatrix.trans, movmatrix, and the product of two of them.
SOURCE = r"""
extern "C" __global__ void fragments(const uint4* tile, u32* loaded, u32* transposed, u32* moved, float* product) {
    __shared__ __align__(128) uint4 rows[64];  // 4 matrices of 8 rows of 16 bytes, A and B
    const int lane = threadIdx.x;
    rows[lane] = tile[lane];
    rows[lane + 32] = tile[lane + 32];
    __syncwarp();
    u32 a[4], b[4];
    ldmatrix_x4(a, shared_address(rows + lane));
    ldmatrix_x4_trans(b, shared_address(rows + lane));
    for (int i = 0; i < 4; ++i) {
        loaded[i * 32 + lane] = a[i];
        transposed[i * 32 + lane] = b[i];
        moved[i * 32 + lane] = movmatrix_trans(a[i]);
    }
    ldmatrix_x4(b, shared_address(rows + 32 + lane));
    float c[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    ELEMENT::mma(c, a, b[0], b[1]);
    ELEMENT::mma(c, a, b[2], b[3]);
    for (int i = 0; i < 4; ++i) product[i * 32 + lane] = c[i];
}
"""
ELEMENTS = {"Float16": np.dtype(np.float16), "BFloat16": np.dtype(ml_dtypes.bfloat16)}


def source(element: str) -> str:
    return f"{sources.source('elements.cuh')}\n{SOURCE.replace('ELEMENT', element)}"


def inputs(element: str, integers: bool) -> np.ndarray:
    """512 elements; small integers, so that no sum is rounded, or any numbers."""
    rng = np.random.default_rng(7)
    values = rng.integers(-8, 9, 512) if integers else rng.standard_normal(512)
    return values.astype(np.float32).astype(ELEMENTS[element])


def simulated(element: str, tile: np.ndarray) -> list[np.ndarray]:
    from cuflash.simulator import SimModule

    results = outputs()
    SimModule(source(element), ("-std=c++17",), arch="sm_90").get_function("fragments")(1, 32, (bits(tile), *results))
    return results


def outputs() -> list[np.ndarray]:
    return [np.zeros(128, np.uint32) for _ in range(3)] + [np.zeros(128, np.float32)]


def bits(tile: np.ndarray) -> np.ndarray:
    return tile.view(np.uint32)


def expected(tile: np.ndarray) -> list[np.ndarray]:
    """The layouts of the PTX manual: lane l holds row l / 4, columns 2 (l % 4) and + 1 of an 8 x 8 matrix."""
    matrices = tile[:256].reshape(4, 8, 8)
    others = tile[256:].reshape(4, 8, 8)
    loaded = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1)
    turned = np.ascontiguousarray(matrices.swapaxes(1, 2)).view(np.uint32).reshape(-1)
    # A holds rows 0-7 and 8-15 of columns 0-7, then of 8-15; a row of B is a row of its matrices, k fastest.
    m = matrices.astype(np.float64)
    a = np.block([[m[0], m[2]], [m[1], m[3]]])
    b = sum(np.vstack([others[i].astype(np.float64).T, others[i + 1].astype(np.float64).T]) for i in (0, 2))
    c = a @ b + np.array([[1, 2]] * 8 + [[3, 4]] * 8)[:, np.arange(8) % 2]
    lane = np.arange(32)
    product = np.stack([c[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2] for i in range(4)])
    return [loaded, turned, turned, product.astype(np.float32).reshape(-1)]


@pytest.mark.parametrize("element", ELEMENTS)
def test_on_the_simulator(element: str) -> None:
    pytest.importorskip("cuda.bindings", reason='pip install -e ".[sim]"')
    tile = inputs(element, integers=True)
    for found, wanted in zip(simulated(element, tile), expected(tile), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("integers", [True, False], ids=["integers", "any numbers"])
def test_on_a_gpu(element: str, integers: bool) -> None:
    pytest.importorskip("cuda.bindings", reason='pip install -e ".[sim]"')
    import cupy

    tile = inputs(element, integers)
    results = [cupy.asarray(x) for x in outputs()]
    kernel = cupy.RawModule(code=source(element), options=("-std=c++17",)).get_function("fragments")
    kernel((1,), (32,), (cupy.asarray(bits(tile)), *results))
    found: list[Any] = [x.get() for x in results]
    wanted = simulated(element, tile)
    for mine, theirs in zip(found[:3], wanted[:3], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    # Tensor cores add in an order and with a rounding of their own.
    np.testing.assert_allclose(found[3], wanted[3], rtol=0 if integers else 1e-5, atol=0 if integers else 1e-5)


PRODUCTS = layouts()


def of_sm_90a(code: str, name: str, shared_bytes: int, folder: Path) -> Any:
    """A kernel on the GPU; CuPy loads what NVRTC makes for sm_90a from a file."""
    import cupy
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(code, f"{name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, ("-arch=sm_90a", "-std=c++17"))
        (folder / f"{name}.cubin").write_bytes(nvrtc.getCUBIN(program))
    finally:
        nvrtc.destroyProgram(program)
    kernel = cupy.RawModule(path=str(folder / f"{name}.cubin")).get_function(name)
    kernel.max_dynamic_shared_size_bytes = shared_bytes
    return kernel


def need_sm_90a() -> None:
    import cupy

    if cupy.cuda.Device().compute_capability != "90":
        pytest.skip("wgmma is sm_90a's alone")


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_warpgroup_on_a_gpu(name: str, tmp_path: Path) -> None:
    """Small integers, whose sums are exact: every swizzle, both majors, A in registers and in shared memory.

    The same products are compared with the simulator and with NumPy in simulator/test_wgmma.py.
    """
    import cupy

    need_sm_90a()
    product = PRODUCTS[name]
    kernel = of_sm_90a(product.source, "product", len(product.image), tmp_path)
    out = cupy.asarray(product.spread(product.before))
    inputs = cupy.asarray(product.image), cupy.asarray(product.fragments())
    kernel((1,), (128,), product.arguments(out, *inputs), shared_mem=len(product.image))
    np.testing.assert_array_equal(out.get(), product.expected())


@pytest.mark.gpu
@pytest.mark.parametrize("headdim, keys, groups", [(64, 64, 1), (128, 64, 1), (128, 128, 2)])
def test_attention_of_warpgroups_on_a_gpu(headdim: int, keys: int, groups: int, tmp_path: Path) -> None:
    """The pipelined loop that simulator/test_wgmma_attention.py runs, with its fences, waits and registers."""
    import cupy

    need_sm_90a()
    for tiles in (1, 2, 5, 40):
        args, shared, wanted = wgmma_attention.arguments(headdim, keys, groups, tiles)
        kernel = of_sm_90a(wgmma_attention.source(headdim, keys, groups), "attention", shared, tmp_path)
        *arrays, out, number, scale = args
        inputs = [cupy.asarray(x.view(np.uint16)) for x in arrays]
        result = cupy.asarray(out)
        kernel((1,), (128 + 128 * groups,), (*inputs, result, number, scale), shared_mem=shared)
        np.testing.assert_allclose(result.get(), wanted, atol=2e-3)
