"""Arrays at any address of a GPU: in processes of their own, since a fault would end the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
TESTS = Path(__file__).parents[1]
SCRIPT = """
import sys
import cupy
from problems import Backend
import test_alignment
backend = Backend("cuda", cupy.asarray, cupy.asnumpy)
for num_bytes in (1, 2, 4, 8, 20):
    test_alignment.every_call(sys.argv[1], num_bytes, backend)
cupy.cuda.Device().synchronize()
"""


@pytest.mark.parametrize("name", ["q", "k", "v", "rotary_cos", "rotary_sin", "sinks", "cache_seqlens", "page_table",
                                  "cache_batch_idx", "cache_leftpad", "cu_seqlens_q", "cu_seqlens_k_new",
                                  "rotary_seqlens", "k_cache", "v_cache", "out", "softmax_lse"])  # fmt: skip
def test_any_address(name: str) -> None:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "CUFLASH_BACKEND": "cuda"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
