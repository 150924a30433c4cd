"""``python -m cuflash info``: what is installed, found, cached, and what would be used."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import __version__, cache
from ..device import MAX_NUM_SM, MIN_ARCH, host_device
from . import driver, packages
from .cache import cupy_folder, files_below, summary
from .parser import program
from .text import hanging, size

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_VARIABLES = {
    "CUFLASH_BACKEND": "auto",
    "CUFLASH_NUM_SM": "132",
    "CUFLASH_ARCH": "90",
    "CUFLASH_VALIDATE": "0",
    "CUFLASH_CACHE_DIR": "",
    "CUFLASH_LOG": "",
}
_BACKENDS = ("auto", "cuda", "numpy", "sim")
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
        },
        "Optional": {
            "matplotlib": lambda: _version("matplotlib", packages.MATPLOTLIB, "pictures of schedules"),
            "mpi4py": lambda: _version("mpi4py", packages.MPI[0], "context parallelism"),
            "nccl4py": lambda: _version("nccl4py", packages.NCCL, "context parallelism on GPUs"),
            "C++ compiler": _compiler,
            "cuda-bindings": lambda: _version("cuda-bindings", packages.SIMULATOR[0], "the simulator"),
            **{
                name: lambda peer=peer: _peer(peer)  # type: ignore[misc]
                for name, peer in _peers().items()
            },
            "nvdisasm": lambda: _tool("nvdisasm", "counts of machine code"),
            "ncu": lambda: _tool("ncu", "counters of a GPU"),
            "compute-sanitizer": lambda: _tool("compute-sanitizer", "checks on a GPU"),
        },
        "Found": {"driver": _driver_row, **_gpu_rows()},
        "Cached": {"cuflash": _our_cache, "CuPy": _cupy_cache},
        "Used": {"GPU arrays": _used_on_gpu, "host arrays": _used_on_host, "simulator": _simulator, "demo": _demo},
        "Environment": {name: lambda name=name: _variable(name) for name in _variables()},  # type: ignore[misc]
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
    if name not in _BACKENDS:
        raise ValueError(f"CUFLASH_BACKEND must be one of {', '.join(_BACKENDS)}, got {name!r}")
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
def _version(package: str, requirement: str = "", purpose: str = "") -> Row:
    try:
        return Row("ok", metadata.version(package))
    except metadata.PackageNotFoundError:
        return Row("-", f"not installed{f', for {purpose}' * bool(purpose)}", packages.install(requirement or package))


def _peers() -> dict[str, Any]:
    """Return the libraries that bench times, torch's three as one."""
    from ..bench.peers import PEERS

    return {", ".join(name for name in PEERS if PEERS[name].install == p.install): p for p in PEERS.values()}


def _peer(peer: Any) -> Row:
    found = [module for module in peer.modules if importlib.util.find_spec(module)]
    return Row("ok", found[0]) if found else Row("-", "not installed, for bench to compare with", peer.install)


def _tool(name: str, purpose: str) -> Row:
    path = shutil.which(name)
    return Row("ok", path) if path else Row("-", f"not on the PATH, for {purpose}")


def _cupy() -> Row:
    command = packages.install(*packages.cuda())
    try:
        import cupy
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            return Row("-", "not installed", command)
        return Row("!!", _first_line(error), command)
    version = tuple(int(number) for number in cupy.__version__.split(".")[:2])
    if version < _MIN_CUPY:
        return Row("!!", f"{cupy.__version__} is too old", packages.install(packages.cuda().cupy))
    return Row("ok", cupy.__version__)


def _nvrtc() -> Row:
    """NVRTC as CuPy finds it, else as the simulator does."""
    try:
        from cupy.cuda import nvrtc

        major, minor = nvrtc.getVersion()
        return Row("ok", f"{major}.{minor} (through CuPy)")
    except ModuleNotFoundError:
        pass
    except Exception as error:
        return Row("!!", _first_line(error), packages.install(packages.cuda().nvrtc))
    try:
        from cuda.bindings import nvrtc as bindings

        status, major, minor = bindings.nvrtcVersion()
        return Row("ok" if not int(status) else "!!", f"{major}.{minor} (through cuda-bindings, for the simulator)")
    except ModuleNotFoundError:
        return Row("-", "not installed", packages.install(*packages.SIMULATOR))
    except Exception as error:
        return Row("!!", _first_line(error), packages.install(*packages.SIMULATOR))


def _headers() -> Row:
    """The CUDA headers that CuPy's own kernels include (those of cuflash need none)."""
    try:
        import cupy  # noqa: F401
        from cuda import pathfinder
    except ImportError:
        return Row("-", "only CuPy needs them")
    folder = pathfinder.find_nvidia_header_directory("cudart")
    return (
        Row("ok", folder) if folder else Row("!!", "CuPy will not find them", packages.install(packages.cuda().headers))
    )


def _compiler() -> Row:
    from ..simulator.compile import CompilerNotFound, find_compiler

    try:
        command = find_compiler()
    except CompilerNotFound as error:
        return Row("-", "none, the simulator needs one", str(error).partition(": ")[2])
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=False)
    return Row("ok", f"{version.stdout.splitlines()[0]} ({' '.join(command)})")


# -------------------------------------------------------------------------------------------------------------- found
def _driver_row() -> Row:
    version = driver.version()
    if version is None:
        return Row("-", "none", "a GPU needs NVIDIA's driver; without one cuflash runs on NumPy and the simulator")
    return Row("ok", f"for CUDA {version // 1000}.{version % 1000 // 10}")


def _gpu_rows() -> dict[str, Callable[[], Row]]:
    try:
        gpus = list(driver.gpus())
    except Exception as failure:
        text = _first_line(failure)
        return {"GPU": lambda: Row("!!", text)}
    if not gpus:
        return {"GPU": lambda: Row("-", "none")}
    return {f"GPU {number}": lambda gpu=gpu: _gpu_row(gpu) for number, gpu in enumerate(gpus)}  # type: ignore[misc]


def _gpu_row(gpu: driver.Gpu) -> Row:
    text = f"{gpu.name}, compute capability {gpu.arch / 10:.1f}, {gpu.num_sm} SMs, {size(gpu.memory)}"
    if gpu.arch < MIN_ARCH:
        return Row("!!", text, f"cuflash needs compute capability {MIN_ARCH / 10} or higher")
    return Row("ok", text)


# ------------------------------------------------------------------------------------------------------------- cached
def _our_cache() -> Row:
    files = cache.files()
    text = f"{summary(files)}, this library's and the simulator's ({cache.folder()})"
    return Row("ok", text, f"to clear it: {program()} cache clear") if files else Row("-", text)


def _cupy_cache() -> Row:
    files = files_below(cupy_folder())
    text = f"{summary(files)}, those of other programs too ({cupy_folder()})"
    return Row("ok", text, f"to clear it, delete {cupy_folder()}") if files else Row("-", text)


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


# -------------------------------------------------------------------------------------------------------- environment
def _variables() -> list[str]:
    """Return the variables that there are, and those that look as if they were meant to be."""
    return [*_VARIABLES, *sorted(name for name in os.environ if name.startswith("CUFLASH_") and name not in _VARIABLES)]


def _variable(name: str) -> Row:
    value = os.environ.get(name)
    if name not in _VARIABLES:
        return Row("!!", f"{value}: there is no such variable")
    if not value:
        default = _VARIABLES[name]
        return Row("-", f"not set{f', so {default}' * bool(default)}")
    wrong = _wrong(name, value)
    return Row("!!", f"{name} must be {wrong}, got {value!r}") if wrong else Row("ok", value)


def _wrong(name: str, value: str) -> str:
    """Return what a variable must be if its value is not, or ""."""
    if name == "CUFLASH_BACKEND":
        return "" if value in _BACKENDS else f"one of {', '.join(_BACKENDS)}"
    if name == "CUFLASH_VALIDATE":
        return "" if value in ("0", "1") else "0 or 1"
    if name == "CUFLASH_LOG":
        folder = Path(os.path.expanduser(value)).absolute().parent
        can_be = value in ("0", "1", "stderr") or (folder.is_dir() and os.access(folder, os.W_OK))
        return "" if can_be else "0, 1, stderr or a file that can be written"
    if name == "CUFLASH_CACHE_DIR":
        path = Path(os.path.expanduser(value))
        parents = [parent for parent in (path, *path.absolute().parents) if parent.exists()]
        can_be = parents[0].is_dir() and os.access(parents[0], os.W_OK)
        return "" if can_be else "a folder that can be written to"
    least, most, must = 1, MAX_NUM_SM, f"a positive integer of at most {MAX_NUM_SM}"
    if name == "CUFLASH_ARCH":
        least, most, must = MIN_ARCH, 2**31 - 1, f"an integer from {MIN_ARCH} on, 90 for sm_90"
    try:
        number = int(value)
    except ValueError:
        number = 0
    return "" if least <= number <= most else must


# ------------------------------------------------------------------------------------------------------------ helpers
def _cores() -> str:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{count} cores" if count != 1 else "1 core"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _print_row(name: str, row: Row) -> None:
    hanging(f"  {row.state:<2} {name:<17} ", row.text)
    hanging(f"{' ' * 23}-> ", row.remedy)
