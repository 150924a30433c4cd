"""``import cuflash`` is quick, and needs nothing but NumPy and ml_dtypes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import cuflash


def run(code: str) -> str:
    """Run Python code in a fresh process; return what it prints."""
    command = [sys.executable, "-c", code]
    folder = Path(cuflash.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick():
    """What cuflash adds takes no longer than the import of NumPy and ml_dtypes twice over, in the same process.

    A ratio, since under load all times grow alike; best of three.
    """
    code = """
import time
begin = time.perf_counter()
import numpy, ml_dtypes
between = time.perf_counter()
import concurrent.futures.thread
import cuflash
print((time.perf_counter() - between) / (between - begin))
"""
    assert min(float(run(code)) for _ in range(3)) < 2


@pytest.mark.parametrize(
    "module", ["cupy", "torch", "jax", "matplotlib", "cuda", "scipy", "mpi4py", "nccl", "cuflash.simulator"]
)
def test_import_brings_nothing_else(module):
    assert run(f"import sys, cuflash; print({module!r} in sys.modules)") == "False\n"


def test_works_without_optional_packages():
    """Planning and attention on NumPy with every optional package missing."""
    out = run("""
import sys
for name in ("cupy", "torch", "jax", "matplotlib", "cuda", "scipy", "platformdirs", "mpi4py", "nccl"):
    sys.modules[name] = None  # import raises ModuleNotFoundError
import numpy as np, cuflash
q, k, v = np.ones((2, 1, 4, 64), np.float32), *np.ones((2, 2, 32, 2, 64), np.float32)
meta = cuflash.get_scheduler_metadata(2, 1, 32, 4, 2, 64, np.array([9, 3]), qkv_dtype="float32")
print(cuflash.flash_attn_with_kvcache(q, k, v, cache_seqlens=np.array([9, 3]), scheduler_metadata=meta).mean())
try:
    meta.plot()
except ImportError as error:
    print(error)
""")
    mean, message = out.splitlines()
    assert float(mean) == pytest.approx(1)
    assert 'pip install "matplotlib>=' in message


def test_public_names():
    assert set(cuflash.__all__) == {
        "ContextParallel",
        "ContextParallelError",
        "DecodeStep",
        "OutOfPages",
        "PagedKVCache",
        "SchedulerMetadata",
        "__version__",
        "compile",
        "flash_attn_varlen_func",
        "flash_attn_with_kvcache",
        "get_scheduler_metadata",
        "merge_attn_states",
        "shared_prefix_attention",
    }
    assert all(hasattr(cuflash, name) for name in cuflash.__all__)
    assert (Path(cuflash.__file__).parent / "py.typed").exists()


def test_compat_brings_nothing_else():
    """Other libraries' interfaces need none of theirs, and nobody pays for them who does not ask."""
    out = run("""
import sys, cuflash
print("cuflash.compat" in sys.modules)
import cuflash.compat.flash_attn_interface, cuflash.compat.sgl_kernel.flash_attn
print("torch" in sys.modules, "cupy" in sys.modules)
""")
    assert out == "False\nFalse False\n"
