"""Time on a GPU: calls in CUDA graphs, beside a kernel that does nothing but read."""

from __future__ import annotations

import contextlib
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

_SOURCE = r"""
typedef unsigned int u32;
typedef unsigned long long u64;

// Reads `count` units of 16 bytes, once each and past L1; the sink keeps the compiler from leaving it out. All blocks
// go through memory side by side, or each through a slice of its own: which is faster depends on the GPU and the size.
extern "C" __global__ void __launch_bounds__(512) read_all(const uint4* from, u64 count, u32 slices, u32* sink) {
    constexpr int kInFlight = 8;
    const u64 slice = slices ? (count + gridDim.x - 1) / gridDim.x : count;
    const u64 step = slices ? blockDim.x : static_cast<u64>(gridDim.x) * blockDim.x;
    const u64 begin = slices ? blockIdx.x * slice : static_cast<u64>(blockIdx.x) * blockDim.x;
    const u64 end = slices ? min(begin + slice, count) : count;
    u32 sum = 0;
    uint4 v[kInFlight];
    for (u64 i = begin + threadIdx.x; i < end; i += kInFlight * step) {
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            v[k] = {0, 0, 0, 0};
            if (i + k * step < end) {
                asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                             : "=r"(v[k].x), "=r"(v[k].y), "=r"(v[k].z), "=r"(v[k].w)
                             : "l"(from + i + k * step));
            }
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) sum += v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
    if (sum == 0x9e3779b9u) *sink = sum;
}

// Numbers between -2 and 2 from a counter (the finaliser of MurmurHash3), of the type that is `kind`: 0 bfloat16,
// 1 float16, 2 float32, 3 a float of 8 bits (its highest exponent bit is 0), 4 int8 (between -127 and 127).
extern "C" __global__ void fill_random(void* to, u64 count, u32 seed, u32 kind) {
    const u64 step = static_cast<u64>(gridDim.x) * blockDim.x;
    for (u64 i = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
        u32 h = static_cast<u32>(i) * 0x9e3779b9u ^ static_cast<u32>(i >> 32) ^ seed;
        h = (h ^ h >> 16) * 0x85ebca6bu;
        h = (h ^ h >> 13) * 0xc2b2ae35u;
        const float x = static_cast<float>(static_cast<int>(h ^ h >> 16)) * (2.0f / 2147483648.0f);
        unsigned short half;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
        if (kind == 0) static_cast<unsigned short*>(to)[i] = static_cast<unsigned short>(__float_as_uint(x) >> 16);
        if (kind == 1) static_cast<unsigned short*>(to)[i] = half;
        if (kind == 2) static_cast<float*>(to)[i] = x;
        if (kind == 3) static_cast<unsigned char*>(to)[i] = static_cast<unsigned char>(h & 0xbf);
        if (kind == 4) static_cast<signed char*>(to)[i] = static_cast<signed char>(static_cast<int>(h % 255) - 127);
    }
}
"""


class Sampler(Protocol):
    """What can be timed again and again."""

    def sample(self) -> float:
        """Run once; return microseconds per call."""


# Operations of a multiprocessor's tensor cores per clock, on 16 bits with sums of 32, by compute capability: the rates
# in NVIDIA's data sheets of A100, H100 and B200, by their multiprocessors and clocks.
_OPERATIONS = {80: 2048, 90: 4096, 100: 8192}
_KINDS = {"bfloat16": 0, "float16": 1, "float32": 2, "uint8": 3, "int8": 4}  # of fill_random


class Gpu:
    """CuPy's current device: it makes arrays, and times calls.

    Attributes:
        xp: CuPy.
        facts: What figures depend on: the GPU, its clocks as they are, versions.

    Raises:
        RuntimeError: Without CuPy and a GPU.
    """

    def __init__(self) -> None:
        require_gpu()
        import cupy

        self.xp: Any = cupy
        self.facts = machine_facts()
        module = cupy.RawModule(code=_SOURCE, options=("-std=c++17",))
        self._read, self._fill = module.get_function("read_all"), module.get_function("fill_random")
        self._blocks = 4 * self.facts["multiprocessors"]
        self._sink = cupy.zeros(1, np.uint32)

    @property
    def arch(self) -> int:
        """Compute capability, 90 for 9.0."""
        return int(self.xp.cuda.Device().compute_capability)

    @property
    def l2_bytes(self) -> int:
        """Size of the L2 cache."""
        return int(self.facts["l2_bytes"])

    @cached_property
    def bandwidth(self) -> float:
        """Terabytes per second of a long read."""
        free, _ = self.xp.cuda.runtime.memGetInfo()
        bulk = min(max(4 << 30, 16 * self.l2_bytes), free // 4)
        time_us = read_us(medians(self.readers(bulk), rounds=5))
        self.free()
        return bulk / time_us / 1e6

    @property
    def tensor_rate(self) -> float | None:
        """Operations of all tensor cores at the highest clock, in 10^12 a second; None where it is not known."""
        hertz = 1e3 * self.xp.cuda.Device().attributes["ClockRate"]
        operations = _OPERATIONS.get(self.arch)
        return None if operations is None else operations * self.facts["multiprocessors"] * hertz / 1e12

    def fill(self, array: Any, seed: int) -> None:
        """Fill a contiguous array with random numbers between -2 and 2."""
        scrambled, kind = np.uint32(seed * 2654435761 % 2**32), np.uint32(_KINDS[array.dtype.name])
        self._fill((self._blocks,), (512,), (array, np.uint64(array.size), scrambled, kind))

    def graph(self, calls: Sequence[Callable[[], Any]]) -> Sampler:
        """Capture calls."""
        return CupyGraph(calls)

    def readers(self, size: int) -> dict[str, Sampler]:
        """Return plain reads of ``size`` bytes, at changing places of a buffer larger than the L2 cache.

        Returns:
            One of each pattern; see :func:`read_us`.
        """
        size = max(16, size // 16 * 16)
        buffer = self.xp.empty(max(5 * self.l2_bytes, 2 * size) // 16 * 16, np.uint8)
        self.fill(buffer, 1)
        places = buffer.size // size

        def call(place: int, slices: bool) -> Callable[[], None]:
            return lambda: self._read_all(buffer[place * size : (place + 1) * size], slices)

        calls = number_of_calls(3 + size / 4e6, places)
        patterns = {"read, side by side": False, "read, in slices": True}
        return {name: CupyGraph([call(i % places, slices) for i in range(calls)]) for name, slices in patterns.items()}

    def _read_all(self, array: Any, slices: bool) -> None:
        """Read a contiguous array, all blocks side by side or each in a slice of its own."""
        count = array.nbytes // 16
        blocks = max(1, min(self._blocks, -(-count // 512)))
        self._read((blocks,), (512,), (array, np.uint64(count), np.uint32(slices), self._sink))

    def synchronise(self) -> None:
        """Wait for the GPU."""
        self.xp.cuda.Device().synchronize()

    def free(self) -> None:
        """Give memory that nobody uses back to the device: other libraries have pools of their own."""
        self.xp.get_default_memory_pool().free_all_blocks()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()


def require_gpu() -> None:
    """Raise RuntimeError, saying what is missing, if there is no GPU that CuPy can use."""
    try:
        import cupy
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "cupy"
        why = "CuPy is not installed" if missing else f"CuPy cannot be imported ({error})"
        raise RuntimeError(f"no GPU found: {why}") from error
    if not cupy.cuda.is_available():
        raise RuntimeError("no GPU found: CuPy sees none")


class CupyGraph:
    """Calls of CuPy's, captured once."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        import cupy

        self._calls = calls  # a graph holds addresses alone: what lies there must stay
        self._cupy = cupy
        self._stream = cupy.cuda.Stream(non_blocking=True)
        # What the calls allocate while they are captured belongs to the graph: to a pool that nobody else uses.
        self._pool = cupy.cuda.MemoryPool()
        cupy.cuda.Device().synchronize()
        with cupy.cuda.using_allocator(self._pool.malloc), self._stream:
            for call in calls[:2]:  # compiles, loads, makes workspaces
                call()
            self._stream.synchronize()
            self._stream.begin_capture()
            try:
                for call in calls:
                    call()
            except BaseException:
                with contextlib.suppress(Exception):
                    self._stream.end_capture()
                raise
            self._graph = self._stream.end_capture()
        self.sample()

    def sample(self) -> float:
        """Replay."""
        begin, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        begin.record(self._stream)
        self._graph.launch(self._stream)
        end.record(self._stream)
        end.synchronize()
        return 1e3 * float(self._cupy.cuda.get_elapsed_time(begin, end)) / len(self._calls)


class TorchGraph:
    """Calls of torch's, captured once."""

    def __init__(self, torch: Any, calls: Sequence[Callable[[], Any]]) -> None:
        self._torch, self._calls = torch, calls  # a graph holds addresses alone: what lies there must stay
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for call in calls[:2]:
                call()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for call in calls:
                call()
        self.sample()

    def sample(self) -> float:
        """Replay."""
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * float(begin.elapsed_time(end)) / len(self._calls)


class JaxProgram:
    """Calls of JAX's, compiled to one program; JAX has no events, so this is wall time."""

    def __init__(self, jax: Any, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> None:
        self._jax, self._arguments = jax, arguments
        self._program = jax.jit(lambda copies: [function(*copy) for copy in copies])
        self.sample()
        self.sample()

    def sample(self) -> float:
        """Run the program and wait for it."""
        start = time.perf_counter()
        self._jax.block_until_ready(self._program(self._arguments))
        return 1e6 * (time.perf_counter() - start) / len(self._arguments)


def medians(samplers: Mapping[str, Sampler], rounds: int) -> dict[str, float]:
    """Return medians over rounds in which all take their turn."""
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sampler in samplers.items():
            times[name].append(sampler.sample())
    return {name: statistics.median(values) for name, values in times.items()}


def number_of_copies(size: int, l2_bytes: int) -> int:
    """Return how many copies of inputs of ``size`` bytes make sure that none is in the L2 cache when its turn comes."""
    return max(2, math.ceil(4 * l2_bytes / max(size, 1)))


def number_of_calls(expected_us: float, copies: int) -> int:
    """Return how many calls a graph needs to last for two milliseconds: 20 to 400, and at least one for each copy."""
    return max(20, copies, min(400, math.ceil(2000 / expected_us)))


def read_us(times: Mapping[str, float]) -> float:
    """Return the time of the faster pattern of :meth:`Gpu.readers`."""
    return min(time for name, time in times.items() if name.startswith("read"))


def machine_facts() -> dict[str, Any]:
    """Return what the figures depend on: GPU, clocks as they are, versions."""
    import cupy

    number = cupy.cuda.runtime.getDevice()
    properties = cupy.cuda.runtime.getDeviceProperties(number)
    driver = cupy.cuda.runtime.driverGetVersion()
    facts = {
        "gpu": properties["name"].decode(),
        "multiprocessors": properties["multiProcessorCount"],
        "l2_bytes": properties["l2CacheSize"],
        "driver_cuda": f"{driver // 1000}.{driver % 1000 // 10}",
        "cupy": cupy.__version__,
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
    }
    return {**facts, **clocks()}


def clocks() -> dict[str, str]:
    """Return clocks, power and temperature as nvidia-smi reports them; nothing is set. Empty without nvidia-smi."""
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu", "driver_version")
    command = shutil.which("nvidia-smi")
    if command is None:
        return {}
    done = subprocess.run(
        [command, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    values = done.stdout.strip().split(", ")
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}
