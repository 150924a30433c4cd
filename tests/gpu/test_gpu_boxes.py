"""Tensor maps of the driver, and the boxes that a GPU copies by them: what the simulator copies, byte by byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from box_copies import AT, ROWS, arrays, boxed, code, expected, options, params
from conftest import backend_of
from problems import Case, check, make_inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("layout", "dim"), [("NHD", 128), ("HND", 128), ("NHD", 72), ("HND", 104)])
def test_a_box_is_what_the_tensor_holds(layout: str, dim: int, tmp_path: Path) -> None:
    import cupy
    from cupy.cuda import nvrtc

    from cuflash.backends.driver import launcher, tensor_map

    if int(cupy.cuda.Device().compute_capability) < 90:
        pytest.skip("boxes are for sm_90 and later")
    program = nvrtc.createProgram(code(), "boxes.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*options(), "-arch=sm_90"))
        (tmp_path / "boxes.cubin").write_bytes(nvrtc.getCUBIN(program))
    finally:
        nvrtc.destroyProgram(program)
    kernel = cupy.RawModule(path=str(tmp_path / "boxes.cubin")).get_function("kernel")
    launch = launcher(kernel.kernel.ptr, 1, 32, 2 * ROWS * 128, cupy.cuda.get_current_stream().ptr, False)

    tensor = arrays(layout, dim)
    whole = cupy.zeros((tensor.nbytes // 2 + 4096,), np.uint16)  # zeros around it
    base = tensor if layout == "NHD" else np.moveaxis(tensor, 1, 2)
    whole[2048 : 2048 + base.size] = cupy.asarray(np.ascontiguousarray(base).ravel())
    one = tensor_map(boxed(tensor), whole.data.ptr + 2 * 2048)
    for at in AT:
        out = cupy.zeros((ROWS, 64), np.uint16)
        launch(params(one, out.data.ptr, at).tobytes(), None)
        np.testing.assert_array_equal(out.get(), expected(tensor, at), f"{at}")


@pytest.mark.parametrize("page_size", [None, 1, 16, 64])
@pytest.mark.parametrize("change", [{}, {"seqlens_q": 2, "causal": True}, {"window": (60, 0)}], ids=str)
def test_blocks_of_a_cluster_share_their_tiles(
    page_size: int | None, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """128 heads, and enough sequences that two blocks read a tile together."""
    case = Case(
        dtype="float16", heads=(128, 1), headdim=(576, 512), mla="joint", seqlens=(700, *range(50, 200, 6), 0, 1),
        page_size=page_size, plan="stale", **change,
    )  # fmt: skip
    monkeypatch.setenv("CUFLASH_BACKEND", "cuda")
    check(case, make_inputs(case), backend_of("cuda"))


def test_what_the_driver_refuses() -> None:
    import cupy

    from cuflash.backends.driver import tensor_map

    with pytest.raises(cupy.cuda.driver.CUDADriverError):
        tensor_map(boxed(arrays("NHD", 128)), cupy.zeros(4096, np.uint8).data.ptr + 8)
