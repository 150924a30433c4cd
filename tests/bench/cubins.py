"""Kernel variants as machine code, compiled by NVRTC for any architecture: no GPU is needed."""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuflash import cache
from cuflash.kernels.source import Variant, source
from cuflash.requirements import SIMULATOR, install

# What CuPy adds to a module's own options (cupy/cuda/compiler.py), and ptxas' account of registers and memory.
_OPTIONS = ("-ftz=true", "--device-as-default-execution-space", "--ptxas-options=-v")


class CompileError(RuntimeError):
    """NVRTC refused a variant."""


@dataclass(frozen=True)
class Cubin:
    """Machine code of a variant.

    Attributes:
        code: The ELF file.
        registers: Registers of a thread.
        local_bytes: Local memory of a thread: its stack frame, spilled registers included.
        static_shared_bytes: Shared memory that the source itself declares.
        compile_s: Processor seconds that NVRTC took.
        warm_ms: Processor milliseconds from the variant to its code in the disk cache: sources and code read, key made.
    """

    code: bytes
    registers: int
    local_bytes: int
    static_shared_bytes: int
    compile_s: float
    warm_ms: float


def cubin(variant: Variant, arch: int, fresh: bool = False) -> Cubin:
    """Return a variant's machine code, from the disk cache where it lies there.

    Args:
        variant: The variant.
        arch: Architecture, 90 for sm_90.
        fresh: Whether to compile it even if it is cached.

    Raises:
        CompileError: If NVRTC refuses it.
        ImportError: Without ``cuda.bindings`` and NVRTC.
    """
    path = _path(variant, arch)
    if fresh or not path.with_suffix(".json").exists():
        code, facts = _compile(variant, arch)
        cache.store(path, code)
        cache.store(path.with_suffix(".json"), json.dumps(facts).encode())
    start = time.process_time()
    source.cache_clear()
    code = _path(variant, arch).read_bytes()
    warm_ms = 1e3 * (time.process_time() - start)
    return Cubin(code, **json.loads(path.with_suffix(".json").read_text()), warm_ms=warm_ms)


def nvrtc_version() -> tuple[int, int]:
    """Return the version of NVRTC."""
    nvrtc = _nvrtc()
    _, major, minor = nvrtc.nvrtcVersion()
    return major, minor


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise ImportError(f"this needs NVRTC: {install(*SIMULATOR)}") from error
    return nvrtc


def _options(variant: Variant, arch: int) -> tuple[str, ...]:
    return (*variant.options, f"-arch=sm_{arch}{variant.arch_suffix}", *_OPTIONS)


def _path(variant: Variant, arch: int) -> Path:
    key = json.dumps([source(variant.file), _options(variant, arch), nvrtc_version()])
    return cache.folder() / f"{variant.kernel}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"


_warm = False  # whether NVRTC has loaded its parts, which the first compilation waits for


def most_local_bytes(variant: Variant) -> int:
    """Return the local memory that a kernel of the benchmark's shapes may use: none, but where codes land in registers.

    Of those a thread has 88: with scales, and with NVRTC 13.0, some go elsewhere.
    """
    return 80 if variant.kernel == "mla_wgmma" and ("KV_ELEMENT_BYTES", 1) in variant.defines else 0


def _compile(variant: Variant, arch: int) -> tuple[bytes, dict[str, Any]]:
    global _warm
    if not _warm:
        _warm = True
        _run("__global__ void nothing() {}", "nothing.cu", (f"-arch=sm_{arch}{variant.arch_suffix}",))
    start = time.process_time()
    code, log = _run(source(variant.file), variant.file, _options(variant, arch), str(variant))
    compile_s = time.process_time() - start
    used = re.search(r"Used (\d+) registers", log)
    stack = re.search(r"(\d+) bytes stack frame", log)
    shared = re.search(r"(\d+) bytes smem", log)
    facts = {
        "registers": int(used[1]) if used else 0,
        "local_bytes": int(stack[1]) if stack else 0,
        "static_shared_bytes": int(shared[1]) if shared else 0,
        "compile_s": compile_s,
    }
    return code, facts


def _run(text: str, name: str, options: tuple[str, ...], title: str = "") -> tuple[bytes, str]:
    nvrtc = _nvrtc()
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], [])
    encoded = [option.encode() for option in options]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1] + 1)  # more than one byte: those are Python's own objects
    nvrtc.nvrtcGetProgramLog(program, log)
    report = log.rstrip(b"\0 ").decode()
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        first = "\n".join(report.splitlines()[:8])
        raise CompileError(f"{title} does not compile with {' '.join(options)}:\n{first}")
    code = bytes(nvrtc.nvrtcGetCUBINSize(program)[1])
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(program)
    return code, report
