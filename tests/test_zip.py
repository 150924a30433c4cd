"""The package works from a zip file: nothing is read by a path beside its modules."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import BACKENDS

import cuflash

SCRIPT = """
import numpy as np
import cuflash
assert ".zip" in cuflash.__file__, cuflash.__file__
rng = np.random.default_rng(0)
q = rng.standard_normal((1, 1, 2, 64), np.float32)
k, v = rng.standard_normal((2, 1, 20, 1, 64), np.float32)
out = cuflash.flash_attn_with_kvcache(q, k, v, cache_seqlens=17)
scores = q[0, 0] @ k[0, :17, 0].T / 8
weights = np.exp(scores - scores.max(-1, keepdims=True))
np.testing.assert_allclose(out[0, 0], weights / weights.sum(-1, keepdims=True) @ v[0, :17, 0], atol=1e-5)
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel has it, in a zip file."""
    package = Path(cuflash.__file__).parent
    kernels = package / "kernels_cu" if (package / "kernels_cu").exists() else package.parent / "kernels_cu"
    path = tmp_path_factory.mktemp("zip") / "cuflash.zip"
    with zipfile.ZipFile(path, "w") as file:
        for root, name in ((package, "cuflash"), (kernels, "cuflash/kernels_cu")):
            for source in sorted(root.rglob("*")):
                if source.is_file() and "__pycache__" not in source.parts:
                    file.write(source, f"{name}/{source.relative_to(root)}")
    return path


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "cuda"])
def test_call_from_a_zip_file(name: str, archive: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(archive), "CUFLASH_BACKEND": name, "CUFLASH_NUM_SM": "2"}
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", SCRIPT],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_info_from_a_zip_file(archive: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(archive)}
    command = [sys.executable, "-m", "cuflash", "info"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
