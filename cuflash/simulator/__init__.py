"""Runs CUDA kernels on a machine without a GPU, with the checks of a sanitizer and the counters of a profiler.

The PTX that NVRTC makes from CUDA source is decoded to the instructions of a small machine (`engine.cpp`,
`memory.cpp`, `ops.cpp`) that executes warps in lock step on the CPU: a register is an array of 32 lanes, lanes that
diverge have program counters of their own.

    mod = SimModule(source, arch="sm_90")
    kernel = mod.get_function("scale")
    with record(seed=1) as launches:
        kernel(4, 128, (x, np.float32(2), np.int32(x.size)))
    print(launches[0].counters)
"""

from .cache import cache_dir
from .compile import CompileError, CompilerNotFound, compile_ptx, find_compiler
from .counters import ArrayCount, Counters, LineCount
from .decode import UnsupportedInstruction
from .launch import Checks, Kernel, Launch, SimModule, record, replace_ptx
from .ptx import PtxError
from .report import Finding, SimulationError

__all__ = [
    "ArrayCount",
    "Checks",
    "CompileError",
    "CompilerNotFound",
    "Counters",
    "Finding",
    "Kernel",
    "Launch",
    "LineCount",
    "PtxError",
    "SimModule",
    "SimulationError",
    "UnsupportedInstruction",
    "cache_dir",
    "compile_ptx",
    "find_compiler",
    "record",
    "replace_ptx",
]
