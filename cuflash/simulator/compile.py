"""Compilers: NVRTC for the kernels, a C++ compiler for the machine."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from .cache import cache_dir, digest, find, keep, store

__all__ = [
    "CompileError",
    "CompilerNotFound",
    "cache_dir",
    "compile_ptx",
    "digest",
    "find_compiler",
    "load_machine",
    "machine_is_built",
    "sources",
    "store",
]

_INSTALL = 'pip install "cuda-bindings>=13,<14" "nvidia-cuda-nvrtc>=13,<14"'  # as cuflash/requirements.py has it

_SOURCES = ("engine.cpp", "memory.cpp", "races.cpp", "async.cpp", "boxes.cpp", "wgmma.cpp", "proxy.cpp", "ops.cpp")
# Sources that need the architecture's own features: wgmma and setmaxnreg exist on sm_90a alone.
_OWN_FEATURES = re.compile(r"\b(wgmma\.|setmaxnreg\.|__CUDA_ARCH_FEAT_SM90_ALL)")
# What CuPy's RawModule adds to the options of its user; without them the simulated kernel is another kernel.
_CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")


class CompileError(RuntimeError):
    """A compiler refused its source."""


class CompilerNotFound(RuntimeError):
    """NVRTC or a C++ compiler is missing."""


# -- C++


def _works(command: Sequence[str]) -> bool:
    try:
        return subprocess.run([*command, "--version"], capture_output=True, timeout=60, check=False).returncode == 0
    except OSError:
        return False


@lru_cache(maxsize=None)
def find_compiler() -> tuple[str, ...]:
    """The C++ compiler as a command.

    Returns:
        The first that works of CXX, CC, g++, clang++ and the `ziglang` wheel.

    Raises:
        CompilerNotFound: saying what to install.
    """
    for name in ("CXX", "CC"):
        value = os.environ.get(name)
        if value and _works(shlex.split(value)):
            return tuple(shlex.split(value))
    for name in ("g++", "clang++"):
        found = shutil.which(name)
        if found and _works([found]):
            return (found,)
    try:
        import ziglang  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        raise CompilerNotFound(
            "the simulator needs a C++ compiler to build its machine once: install g++ or clang++, set CXX, "
            "or `pip install ziglang`"
        ) from None
    return (sys.executable, "-m", "ziglang", "c++")


def _flags() -> list[str]:
    flags = [
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fwrapv",
        "-ftree-vectorize",
        "-fvisibility=hidden",
    ]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-march=native")
    return flags


def _processor() -> str:
    """What -march=native depends on, so that machines that share a cache folder do not share machine code."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        pass
    return platform.processor()


def sources(*suffixes: str) -> dict[str, bytes]:
    """The package's own files by name, wherever it was imported from: a folder or a zip file."""
    here = sorted((f for f in files(__package__).iterdir() if f.name.endswith(suffixes)), key=lambda f: f.name)
    return {f.name: f.read_bytes() for f in here}


@lru_cache(maxsize=None)
def _machine_name() -> str:
    """What the machine's file is called in the cache: after all that it depends on."""
    compiler = find_compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    texts = sources(".cpp", ".hpp")
    return f"machine-{digest(texts, _flags(), compiler, version, _processor(), platform.machine())}.so"


def machine_is_built() -> bool:
    """Whether the machine is in the cache, or is to be built when it is first used."""
    return find(_machine_name()) is not None


@lru_cache(maxsize=None)
def load_machine() -> ctypes.CDLL:
    """Builds the machine, or finds it in the cache, and loads it."""
    name = _machine_name()
    found = find(name)
    if found is not None:
        try:
            return ctypes.CDLL(str(found[0]))
        except OSError:  # whole, and yet not to be loaded from there: a file system without execution
            pass
    with tempfile.TemporaryDirectory(prefix="cuflash-") as folder:
        library = _build(Path(folder), sources(".cpp", ".hpp"), [*find_compiler(), *_flags()])
        kept = keep(name, library.read_bytes())
        try:
            return ctypes.CDLL(str(kept or library))
        except OSError:
            return ctypes.CDLL(str(library))


def _build(folder: Path, texts: dict[str, bytes], command: list[str]) -> Path:
    for name, text in texts.items():
        (folder / name).write_bytes(text)

    def compiled(name: str) -> str:
        _run([*command, "-c", str(folder / name), "-o", str(folder / f"{name}.o")])
        return str(folder / f"{name}.o")

    with ThreadPoolExecutor(2) as threads:
        objects = list(threads.map(compiled, reversed(_SOURCES)))
    library = folder / "machine.so"
    _run([*command, "-shared", *objects, "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stderr[:3000]}")


# -- CUDA


def _nvrtc() -> tuple[str, Any]:
    try:
        from cuda.bindings import nvrtc

        return "bindings", nvrtc
    except ImportError:
        pass
    try:
        from cupy.cuda import nvrtc as cupy_nvrtc

        return "cupy", cupy_nvrtc
    except ImportError:
        raise CompilerNotFound(
            f"the simulator compiles kernels with NVRTC: {_INSTALL} (no GPU or driver is needed), or install CuPy"
        ) from None


def _checked(result: tuple[Any, ...]) -> Any:
    if int(result[0]):
        raise CompileError(f"NVRTC: {result[0]}")
    return result[1] if len(result) == 2 else result[1:]


@lru_cache(maxsize=None)
def _nvrtc_version() -> tuple[str, int, int]:
    kind, nvrtc = _nvrtc()
    try:
        major, minor = _checked(nvrtc.nvrtcVersion()) if kind == "bindings" else nvrtc.getVersion()
    except RuntimeError as error:
        raise CompilerNotFound(f"NVRTC does not load ({error}): {_INSTALL}") from error
    return kind, int(major), int(minor)


def _message(name: str, arch: str, options: Sequence[str], log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line] or lines
    return f"NVRTC cannot compile {name} for {arch} with {' '.join(options)}:\n" + "\n".join(errors[:12])


def _buffer(size: int) -> bytes:
    """Return memory that NVRTC may write: two bytes or more, since Python has but one object for each single byte."""
    return bytes(max(size, 2))


def compile_ptx(
    code: str,
    options: Sequence[str] = (),
    arch: str = "sm_90",
    name: str = "kernel.cu",
    headers: dict[str, str] | None = None,
) -> str:
    """Compiles CUDA C++ to PTX, with the options that CuPy's RawModule would use and line numbers.

    Args:
        code: the source.
        options: of NVRTC; -arch, -std and -lineinfo are added where they are missing.
        arch: such as "sm_90" or "sm_90a"; a source with wgmma or setmaxnreg makes the former the latter.
        name: the file name that messages show.
        headers: contents of #include files by name.

    Returns:
        The PTX text.

    Raises:
        CompileError: with the architecture, the options and the first errors.
        CompilerNotFound: if NVRTC is not installed.
    """
    given = tuple(options)
    full = list(given)
    headers = headers or {}
    if arch == "sm_90" and any(_OWN_FEATURES.search(text) for text in (code, *headers.values())):
        arch = "sm_90a"
    if not any(o.startswith(("-arch", "--gpu-architecture")) for o in given):
        full.append("-arch=" + arch.replace("sm_", "compute_"))
    for option in (*_CUPY_OPTIONS, "-std=c++17", "-lineinfo"):
        stem = option.split("=")[0].lstrip("-")
        if not any(o.split("=")[0].lstrip("-") == stem for o in given):
            full.append(option)
    version = _nvrtc_version()
    entry = None
    if not any(
        o.startswith(("-I", "--include-path")) for o in given
    ):  # files that are included from disk are not in the key
        entry = f"ptx-{digest(code, full, name, version, sorted(headers.items()))}.ptx"
        found = find(entry)
        if found is not None:
            return found[1].decode()
    kind, nvrtc = _nvrtc()
    if kind == "bindings":
        encoded = [o.encode() for o in full]
        program = _checked(
            nvrtc.nvrtcCreateProgram(
                code.encode(),
                name.encode(),
                len(headers),
                [v.encode() for v in headers.values()],
                [k.encode() for k in headers],
            )
        )
        status = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0]
        log = _buffer(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        if int(status):
            raise CompileError(_message(name, arch, full, log.decode(errors="replace").rstrip("\0")))
        buffer = _buffer(_checked(nvrtc.nvrtcGetPTXSize(program)))
        nvrtc.nvrtcGetPTX(program, buffer)
        nvrtc.nvrtcDestroyProgram(program)
        ptx = buffer.decode().rstrip("\0")
    else:
        handle = nvrtc.createProgram(code, name, list(headers.values()), list(headers))
        try:
            nvrtc.compileProgram(handle, tuple(full))
            ptx = nvrtc.getPTX(handle)
        except nvrtc.NVRTCError as error:
            raise CompileError(_message(name, arch, full, nvrtc.getProgramLog(handle))) from error
        finally:
            nvrtc.destroyProgram(handle)
        ptx = ptx.decode() if isinstance(ptx, bytes) else ptx
        ptx = ptx.rstrip("\0")
    if entry is not None:
        keep(entry, ptx.encode())
    return str(ptx)
