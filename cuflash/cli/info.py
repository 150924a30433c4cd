"""``python -m cuflash info``: what is installed, found, cached, and what would be used."""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .. import __version__
from ..device import host_device
from .text import size, width

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_VARIABLES = {
    "CUFLASH_BACKEND": "auto",
    "CUFLASH_NUM_SM": "132",
    "CUFLASH_ARCH": "90",
    "CUFLASH_VALIDATE": "0",
    "CUFLASH_CACHE_DIR": "",
}
_MIN_CUPY = (14, 2)


class Row(NamedTuple):
    """One fact.

    Attributes:
        state: "ok", "-" for something optional that is missing, or "!!" for something broken.
        text: What there is.
        remedy: What to do about it, or "".
    """

    state: str
    text: str
    remedy: str = ""


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the arguments: there are none."""
    return subparsers.add_parser(
        "info",
        help="what is installed, found, cached, and what would be used",
        description="Say what is installed, found and cached, what would be used, and how to get what is missing.",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print all facts; a fact that cannot be found out shows its error."""
    sections: dict[str, dict[str, Callable[[], Row]]] = {
        "Installed": {
            "Python": lambda: Row("ok", f"{platform.python_version()} ({sys.executable})"),
            "cuflash": lambda: Row("ok", f"{__version__} ({Path(__file__).parents[1]})"),
            "NumPy": lambda: _version("numpy"),
            "ml_dtypes": lambda: _version("ml_dtypes"),
            "CuPy": _cupy,
            "NVRTC": _nvrtc,
            "CUDA headers": _headers,
            "C++ compiler": _compiler,
            "matplotlib": lambda: _version("matplotlib", "plot"),
        },
        "Found": {"driver": _driver_row, **_gpu_rows()},
        "Cached": {"by CuPy": _cupy_cache, "by simulator": _simulator_cache},
        "Used": {"GPU arrays": _used_on_gpu, "host arrays": _used_on_host, "simulator": _simulator, "demo": _demo},
        "Environment": {name: lambda name=name: _variable(name) for name in _VARIABLES},  # type: ignore[misc]
    }
    for title, facts in sections.items():
        print(title)
        for name, fact in facts.items():
            try:
                row = fact()
            except Exception as error:  # whatever is broken belongs in the report
                row = Row("!!", f"{type(error).__name__}: {error}")
            _print_row(name, row)
        print()
    return 0


def backend_in_use() -> tuple[str, str]:
    """Return the backend that the demo runs on, and why: ``CUFLASH_BACKEND``, or CUDA if there is a GPU.

    Raises:
        ValueError: If ``CUFLASH_BACKEND`` names no backend, or CUDA and there is no GPU.
    """
    name = os.environ.get("CUFLASH_BACKEND") or "auto"
    host = host_device()
    simulated = f"the CUDA kernels, simulated on the CPU for {host.num_sm} SMs of sm_{host.arch}"
    if name == "sim":
        return name, simulated
    on_cpu = f"NumPy on {_cores()}"
    if name == "numpy":
        return name, on_cpu
    if name not in ("auto", "cuda"):
        raise ValueError(f"CUFLASH_BACKEND must be one of auto, cuda, numpy, sim, got {name!r}")
    try:
        import cupy

        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
        return "cuda", f"{properties['name'].decode()}, CuPy {cupy.__version__}"
    except Exception as error:
        why = "CuPy is not installed" if isinstance(error, ImportError) else _first_line(error)
        if name == "cuda":
            raise ValueError(f"backend cuda needs a GPU and CuPy: {why}") from error
        return "numpy", f"{on_cpu} (no GPU: {why})"


# ---------------------------------------------------------------------------------------------------------- installed
def _version(package: str, extra: str = "") -> Row:
    try:
        return Row("ok", metadata.version(package))
    except metadata.PackageNotFoundError:
        return Row("-", "not installed", _install(extra))


def _cupy() -> Row:
    try:
        import cupy
    except ImportError as error:
        broken = not isinstance(error, ModuleNotFoundError) or error.name != "cupy"
        return Row("!!" if broken else "-", _first_line(error) if broken else "not installed", _install(_cuda_extra()))
    version = tuple(int(number) for number in cupy.__version__.split(".")[:2])
    old = version < _MIN_CUPY
    return Row("!!" if old else "ok", cupy.__version__ + " is too old" * old, _install(_cuda_extra()) if old else "")


def _nvrtc() -> Row:
    """NVRTC as CuPy finds it, else as the simulator does."""
    try:
        from cupy.cuda import nvrtc

        major, minor = nvrtc.getVersion()
        return Row("ok", f"{major}.{minor} (through CuPy)")
    except ModuleNotFoundError:
        pass
    except Exception as error:
        return Row("!!", _first_line(error), _install(_cuda_extra()))
    try:
        from cuda.bindings import nvrtc as bindings

        status, major, minor = bindings.nvrtcVersion()
        return Row("ok" if not int(status) else "!!", f"{major}.{minor} (through cuda-bindings, for the simulator)")
    except ModuleNotFoundError:
        return Row("-", "not installed", _install("sim"))
    except Exception as error:
        return Row("!!", _first_line(error), _install("sim"))


def _headers() -> Row:
    """The CUDA headers that CuPy's own kernels include (those of cuflash need none)."""
    try:
        import cupy  # noqa: F401
        from cuda import pathfinder
    except ImportError:
        return Row("-", "only CuPy needs them")
    folder = pathfinder.find_nvidia_header_directory("cudart")
    return Row("ok", folder) if folder else Row("!!", "CuPy will not find them", _install(_cuda_extra()))


def _compiler() -> Row:
    from ..simulator.compile import CompilerNotFound, find_compiler

    try:
        command = find_compiler()
    except CompilerNotFound as error:
        return Row("-", "none, the simulator needs one", str(error).partition(": ")[2])
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=False)
    return Row("ok", f"{version.stdout.splitlines()[0]} ({' '.join(command)})")


# -------------------------------------------------------------------------------------------------------------- found
class Gpu(NamedTuple):
    """What the driver says about a GPU."""

    name: str
    arch: int
    num_sm: int
    memory: int


def _driver() -> ctypes.CDLL | None:
    """The CUDA driver, initialised; it tells what there is without CuPy."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None
    status = library.cuInit(0)
    if status:
        raise RuntimeError(f"the CUDA driver does not start: error {status}")
    return library


def _driver_version() -> int | None:
    """The CUDA version of the driver as 1000 * major + 10 * minor, or None without a driver."""
    library = _driver()
    if library is None:
        return None
    version = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _driver_row() -> Row:
    version = _driver_version()
    if version is None:
        return Row("-", "none", "a GPU needs NVIDIA's driver; without one cuflash runs on NumPy and the simulator")
    return Row("ok", f"for CUDA {version // 1000}.{version % 1000 // 10}")


def _gpus() -> Iterator[Gpu]:
    library = _driver()
    if library is None:
        return
    count = ctypes.c_int()
    library.cuDeviceGetCount(ctypes.byref(count))
    for number in range(count.value):
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        library.cuDeviceGetName(name, 256, number)
        library.cuDeviceTotalMem_v2(ctypes.byref(memory), number)

        def attribute(code: int, number: int = number) -> int:
            value = ctypes.c_int()
            library.cuDeviceGetAttribute(ctypes.byref(value), code, number)
            return value.value

        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR and _MULTIPROCESSOR_COUNT
        yield Gpu(name.value.decode(), 10 * attribute(75) + attribute(76), attribute(16), memory.value)


def _gpu_rows() -> dict[str, Callable[[], Row]]:
    try:
        gpus = list(_gpus())
    except Exception as failure:
        text = _first_line(failure)
        return {"GPU": lambda: Row("!!", text)}
    if not gpus:
        return {"GPU": lambda: Row("-", "none")}
    return {f"GPU {number}": lambda gpu=gpu: _gpu_row(gpu) for number, gpu in enumerate(gpus)}  # type: ignore[misc]


def _gpu_row(gpu: Gpu) -> Row:
    text = f"{gpu.name}, compute capability {gpu.arch / 10:.1f}, {gpu.num_sm} SMs, {size(gpu.memory)}"
    return Row("ok", text) if gpu.arch >= 80 else Row("!!", text, "cuflash needs compute capability 8.0 or higher")


# ------------------------------------------------------------------------------------------------------------- cached
def _cupy_cache() -> Row:
    return _folder(Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache"), "all of CuPy's")


def _simulator_cache() -> Row:
    from ..simulator.compile import cache_dir

    return _folder(cache_dir(), "PTX and the simulator's machine")


def _folder(path: Path, what: str) -> Row:
    files = [file.stat() for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
    return Row("ok" if files else "-", f"{len(files)} files, {size(sum(f.st_size for f in files))}, {what} ({path})")


# --------------------------------------------------------------------------------------------------------------- used
def _used_on_gpu() -> Row:
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    except ImportError:
        return Row("-", "CuPy is missing")
    except Exception as error:
        return Row("-", _first_line(error))
    return Row("ok", "CUDA kernels, compiled when first used") if count else Row("-", "no GPU")


def _used_on_host() -> Row:
    if os.environ.get("CUFLASH_BACKEND") == "sim":
        return Row("ok", "CUDA kernels on the simulator (CUFLASH_BACKEND=sim)")
    device = host_device()
    return Row("ok", f"NumPy on {_cores()}; plans for {device.num_sm} SMs of sm_{device.arch}")


def _simulator() -> Row:
    missing = [row.remedy for row in (_nvrtc(), _compiler()) if row.state != "ok"]
    if missing:
        return Row("-", "cannot run", "; ".join(missing))
    return Row("ok", "host arrays with CUFLASH_BACKEND=sim")


def _demo() -> Row:
    name, reason = backend_in_use()
    return Row("ok", f"{name}: {reason}")


def _variable(name: str) -> Row:
    value = os.environ.get(name)
    default = _VARIABLES[name]
    return Row("ok", value) if value else Row("-", f"not set{f', so {default}' * bool(default)}")


# ------------------------------------------------------------------------------------------------------------ helpers
def _cuda_extra() -> str:
    """The extra that fits the driver: CUDA 13 from driver 580 on."""
    try:
        version = _driver_version()
    except RuntimeError:
        version = None
    return "cuda12" if version is not None and version < 13000 else "cuda13"


def _install(extra: str) -> str:
    return f'pip install "cuflash[{extra}]"' if extra else "pip install cuflash"


def _cores() -> str:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{count} cores" if count != 1 else "1 core"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _print_row(name: str, row: Row) -> None:
    indent = " " * 23
    for text, mark in ((row.text, f"  {row.state:<2} {name:<17} "), (row.remedy, f"{indent}-> ")):
        if text:
            later = indent if text is row.text else f"{indent}   "
            for line in textwrap.wrap(text, width(), initial_indent=mark, subsequent_indent=later,
                                      break_long_words=False, break_on_hyphens=False):  # fmt: skip
                print(line)
