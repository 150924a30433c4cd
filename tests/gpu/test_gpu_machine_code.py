"""The machine code that NVRTC makes on this machine: kernels of the benchmark's shapes use hardly any local memory.

On one host the same NVRTC has made other code of the same source and options: of mla_wgmma.cu with 408 stores to local
memory, right, and at half the speed. So each machine has to look for itself.
"""

from __future__ import annotations

import pytest
from bench import cubins, gpu

import cuflash
from cuflash import kernels

pytestmark = pytest.mark.gpu

_LOCAL_SIZE_BYTES = 3  # CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES


@pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in gpu.shapes().items()])
def test_no_local_memory(shape: gpu.Shape) -> None:
    import cupy
    from cupy_backends.cuda.api import driver

    from cuflash.backends import cuda

    plan: cuflash.SchedulerMetadata = shape.plan(cupy.asarray(shape.lengths.astype("int32")))
    for variant in kernels.variants(plan.problem, plan.partition, appends=False):
        function = cuda._function(variant, cupy.cuda.Device().id)
        local_bytes = driver.funcGetAttribute(_LOCAL_SIZE_BYTES, function.ptr)
        assert local_bytes <= cubins.most_local_bytes(variant), variant
