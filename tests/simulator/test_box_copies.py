"""Copies of boxes of tensors (cp.async.bulk.tensor): what they bring, and what is wrong with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from box_copies import AT, ROWS, arrays, boxed, code, expected, options, params
from simulated import ORDERS, found, run

from cuflash.simulator import SimModule
from cuflash.simulator.boxes import MAP_BYTES, tensor_map


def kernel(**how: Any) -> Any:
    return SimModule(code(), options(**how)).get_function("kernel")


def given(tensor: np.ndarray, out: np.ndarray, at: tuple[int, int, int, int]) -> np.ndarray:
    how = boxed(tensor)
    made = tensor_map(how.itemsize, tensor.ctypes.data, how.shape, how.strides, how.box)
    return params(made, out.ctypes.data, at)


@pytest.mark.parametrize("settings", ORDERS)
@pytest.mark.parametrize(("layout", "dim"), [("NHD", 128), ("HND", 128), ("NHD", 72), ("HND", 104)])
def test_a_box_is_what_the_tensor_holds(layout: str, dim: int, settings: dict[str, Any]) -> None:
    tensor = arrays(layout, dim)
    for at in AT:
        out = np.zeros((ROWS, 64), np.uint16)
        launch = run(
            kernel(), 1, 32, (given(tensor, out, at),),
            shared_mem=2 * ROWS * 128, arrays={"tensor": tensor, "out": out}, **settings,
        )  # fmt: skip
        answer = expected(tensor, at)
        np.testing.assert_array_equal(out, answer, f"{at}")
        read = launch.counters.arrays["tensor"]
        assert read.read_bytes == 2 * np.count_nonzero(answer)  # nothing beyond the tensor is read
        assert launch.counters.classes["bulk"] == 1
        if dim == 128:
            assert 32 * read.read_sectors == read.read_bytes


@pytest.mark.parametrize("settings", ORDERS)
def test_a_box_comes_to_both_blocks_of_a_cluster(settings: dict[str, Any]) -> None:
    tensor, out = arrays("HND", 128), np.zeros((2, ROWS, 64), np.uint16)
    launch = run(
        kernel(blocks=3), 2, 32, (given(tensor, out, AT[1]),),
        shared_mem=2 * ROWS * 128, cluster=2, arrays={"tensor": tensor, "out": out}, **settings,
    )  # fmt: skip
    np.testing.assert_array_equal(out, np.stack([expected(tensor, AT[1])] * 2))
    assert launch.counters.arrays["tensor"].read_bytes == out[0].nbytes  # once
    for blocks in (4, 5, 7):
        finding = found(
            kernel(blocks=blocks), 2, 32, (given(tensor, out, AT[1]),),
            shared_mem=2 * ROWS * 128, cluster=2, arrays={"tensor": tensor, "out": out}, **settings,
        )  # fmt: skip
        assert finding.check == "bounds"


def test_mistakes_are_found() -> None:
    tensor, out = arrays("NHD", 128), np.zeros((ROWS, 64), np.uint16)
    launch: dict[str, Any] = {"shared_mem": 2 * ROWS * 128, "arrays": {"tensor": tensor, "out": out}}
    right = given(tensor, out, AT[1])

    def check(kernel: Any, one: np.ndarray = right, **settings: Any) -> str:
        check: str = found(kernel, 1, 32, (one,), **launch, **settings).check
        return check

    for copies in ("late", "random", "early"):
        assert check(kernel(wait="__syncwarp();"), cp_async=copies, seed=1) in (
            "in_flight",
            "shared_race",
            "never_waited",
        )
    assert check(kernel(shift=128)) == "misalignment"
    assert check(kernel(size=ROWS * 128 + 16), time_limit=2) in ("deadlock", "time_limit", "hang")
    assert check(kernel(), params(bytes(MAP_BYTES), out.ctypes.data, AT[1])) == "bounds"


@pytest.mark.parametrize(
    "wrong",
    [
        {"address": 8}, {"strides": (24, 512, 5120)}, {"strides": (0, 512, 5120)}, {"shape": (128, 0, 2, 3)},
        {"box": (32, 16, 1, 1)}, {"box": (64, 512, 1, 1)}, {"shape": (128, 20, 2)},
    ],
    ids=str,
)  # fmt: skip
def test_a_map_that_no_driver_makes(wrong: dict[str, Any]) -> None:
    right = {"address": 0, "shape": (128, 20, 2, 3), "strides": (512, 256, 5120), "box": (64, 16, 1, 1)}
    assert len(tensor_map(2, **right)) == MAP_BYTES
    with pytest.raises(ValueError):
        tensor_map(2, **(right | wrong))
