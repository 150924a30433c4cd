"""Machine code by NVRTC, kept by content in CuPy's disk cache: for architectures that CuPy does not compile for."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from cupy.cuda import nvrtc

from ..cache import store

# What CuPy adds to a module's own options.
_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")


def cubin(text: str, options: tuple[str, ...], arch: str) -> Path:
    """Return the file of a source's machine code, compiled unless it lies in the cache.

    A file is named by all that it was made from, and its digest lies beside it: one that was cut short or changed is
    made again.

    Args:
        text: The source, nothing left to include.
        options: Compiler options.
        arch: Such as "sm_90a".

    Raises:
        cupy.cuda.nvrtc.NVRTCError: If NVRTC refuses the source; its message is the compiler's.
    """
    options = (*options, f"-arch={arch}", *_OPTIONS)
    key = hashlib.sha256(json.dumps([text, options, nvrtc.getVersion()]).encode()).hexdigest()
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or "~/.cupy/kernel_cache").expanduser()
    path = folder / f"cuflash-{key[:40]}.cubin"
    digest = path.with_suffix(".sha256")
    if not _is_whole(path, digest):
        code = _compile(text, options)
        store(path, code)
        store(digest, _digest(code))
    return path


def _is_whole(path: Path, digest: Path) -> bool:
    try:
        return _digest(path.read_bytes()) == digest.read_bytes()
    except OSError:  # not there, or another user's alone
        return False


def _digest(code: bytes) -> bytes:
    return hashlib.sha256(code).hexdigest().encode()


def _compile(text: str, options: tuple[str, ...]) -> bytes:
    program = nvrtc.createProgram(text, "cuflash.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        code: bytes = nvrtc.getCUBIN(program)
        return code
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        error.args = (log.decode() if isinstance(log, bytes) else log,)
        raise
    finally:
        nvrtc.destroyProgram(program)
