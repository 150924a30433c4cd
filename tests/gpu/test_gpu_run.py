"""The scripts for a machine with a GPU, as far as they go without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from bench import gpu, main
from conftest import HAS_GPU

from cuflash.bench.inputs import Inputs, Shape
from cuflash.bench.measure import Reference

HERE = Path(__file__).parent


def call(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
@pytest.mark.parametrize("script", ["run.py", "sanitize.py", "counters.py"])
def test_without_a_gpu(script: str) -> None:
    done = call(script)
    assert done.returncode == 2
    assert "no GPU found" in done.stdout


def test_unknown_parts() -> None:
    done = call("run.py", "nonsense")
    assert done.returncode == 2
    assert "no such part: nonsense; there are info, tests," in done.stderr


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_bench_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no GPU found" in captured.err


def test_shapes() -> None:
    """Each has a name of its own and the bytes that its target was set for."""
    shapes = gpu.shapes()
    assert len(shapes) > 20
    assert all(shape.name == name for name, shape in shapes.items())
    tables = {table: list(gpu.shapes(table)) for table in ("decode", "rows", "latent", "latent8", "quantised")}
    assert sum(tables.values(), []) == list(shapes)
    assert {table: len(names) for table, names in tables.items()} == {
        "decode": 21, "rows": 9, "latent": 12, "latent8": 12, "quantised": 16
    }  # fmt: skip
    for name, megabytes in (("b32 L4096 32/8", 537), ("b1 L1024 32/4", 2.1), ("b64 random 1..8192 8/1", 127)):
        assert shapes[name].kv_bytes == pytest.approx(1e6 * megabytes, rel=0.01)
    assert shapes["b128 L4096 128/1 MLA"].operations / 800e6 == pytest.approx(183, rel=0.01)  # us at 800 TFLOP/s
    assert shapes["b32 L4096 128/1 MLA 2 queries"].page_size == 64
    assert shapes["b1 L4096 32/8 float8_e4m3fn scale per key"].key_scales
    assert gpu.targets()["b32 L4096 32/8 D64"] == 63 and set(gpu.targets()) == set(shapes)
    assert shapes["b128 lognormal 32/8"].lengths.sum() == pytest.approx(195_000, rel=0.001)


def test_shapes_are_those_of_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["gpu", "--table", "rows", "--shapes", "MLA"])
    assert ended.value.code == 2
    assert "--shapes must name some of b32 L4096 32/8 8 queries, " in " ".join(capsys.readouterr().err.split())


def test_report() -> None:
    """Figures, a peer that failed, one that is nowhere, a shape that failed."""
    row = {"variant": "bfloat16 128x4", "arch": "sm_90", "workload": "b1 L16 4/1", "floor_us": 1.0}
    good = {**row, "given_us": 123.46, "share": 0.925, "to_best_peer": 0.98765,
            "peers": {"cuDNN": 130.0, "FA2": "wrong: relative error 1", "FA3": "not installed"}}  # fmt: skip
    records = [{"variant": "machine", "gpu": "some GPU"}, good, {**row, "error": "OutOfMemoryError: too much"}]
    for markdown in (False, True):
        text = "\n".join(gpu.lines(records, markdown))
        for word in ("gpu some GPU", "123.5", "92 %", "0.99", "130.0", "wrong: relative error 1", "OutOfMemoryError"):
            assert word in text
        assert text.splitlines()[-1] == "FA3: not installed"


def test_reference_of_a_sample() -> None:
    """Sequences are read from their pages; the shortest and the longest are among them."""

    class Array(np.ndarray):  # what is used of CuPy's
        def get(self) -> np.ndarray:
            return np.asarray(self)

    rng = np.random.default_rng(0)
    shape = Shape("test", np.array([40, 5, 33]), 4, 2, 64)
    inputs = Inputs(shape, [], 1)
    table = inputs.host_table
    pages = int((-(-shape.lengths // 16)).sum())
    assert sorted(np.concatenate([table[0, :3], table[1, :1], table[2, :3]])) == list(range(pages))

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size, np.float32).astype(ml_dtypes.bfloat16).view(Array)

    copy = {"q": normal(3, 1, 4, 64), "k_cache": normal(pages, 16, 2, 64), "v_cache": normal(pages, 16, 2, 64)}
    inputs.copies.append({**copy, "page_table": table.view(Array)})
    reference = Reference(inputs)
    assert reference.sequences == [1, 0, 2]
    out = np.zeros((3, 1, 4, 64))
    for s, length in enumerate(shape.lengths):
        keys, values = (
            np.concatenate(list(copy[n][table[s]]))[:length].astype(np.float64) for n in ("k_cache", "v_cache")
        )
        for h in range(4):
            scores = keys[:, h // 2] @ copy["q"][s, 0, h].astype(np.float64) / 8
            weights = np.exp(scores - scores.max())
            out[s, 0, h] = weights @ values[:, h // 2] / weights.sum()
    assert reference.error(out) < 5e-3
    assert reference.error(2 * out) == pytest.approx(1, abs=0.01)
