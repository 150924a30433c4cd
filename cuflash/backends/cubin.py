"""Machine code by NVRTC, kept by content in CuPy's disk cache: for architectures that CuPy does not compile for."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from cupy.cuda import nvrtc

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
    if not (path.exists() and digest.exists() and _digest(path.read_bytes()) == digest.read_bytes()):
        code = _compile(text, options)
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, code)
        _write(digest, _digest(code))
    return path


def _digest(code: bytes) -> bytes:
    return hashlib.sha256(code).hexdigest().encode()


def _write(path: Path, content: bytes) -> None:
    """Write a file at once: other processes see all of it or nothing."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)


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
