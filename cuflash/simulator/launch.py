"""Modules, kernels and launches: the face of the simulator."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import numpy as np

from .compile import compile_ptx, digest, load_machine
from .counters import PC_COUNT, REGION_COUNT, Counters
from .image import load_image
from .program import INS, SYSTEM_SHARED, Program
from .report import Finding, SimulationError, describe

__all__ = ["Checks", "Kernel", "Launch", "SimModule", "record", "replace_ptx"]

_SIZE_LIMIT = 232448  # bytes of shared memory of a block, the most that any architecture has


@dataclass(frozen=True)
class Checks:
    """Which checks a launch makes.

    Attributes:
        bounds: accesses outside of every array, writes to read-only ones.
        misalignment: addresses that are no multiples of an access' size.
        uninitialised: shared memory that is read before it is written.
        in_flight: shared memory that is read while a copy to it is under way.
        never_waited: copies that are under way when the kernel ends.
        shared_races: accesses to shared memory that no barrier orders.
        global_races: the same of global memory, and releases and acquires.
        barriers: barriers that not all threads reach, and deadlocks.
        counters: what instructions, sectors and wavefronts are counted.
        turn: global memory that is touched ahead of griddepcontrol.wait, in a kernel that has one.
    """

    bounds: bool = True
    misalignment: bool = True
    uninitialised: bool = True
    in_flight: bool = True
    never_waited: bool = True
    shared_races: bool = True
    global_races: bool = True
    barriers: bool = True
    counters: bool = True
    turn: bool = True

    @classmethod
    def all(cls) -> Checks:
        """Every check."""
        return cls()

    @classmethod
    def none(cls) -> Checks:
        """No check but bounds, which protects the process itself."""
        return cls(**{check.name: check.name == "bounds" for check in fields(cls)})

    @classmethod
    def cheap(cls) -> Checks:
        """What costs next to nothing: bounds, misalignment, barriers, counters."""
        return cls(uninitialised=False, in_flight=False, never_waited=False, shared_races=False, global_races=False)

    def bits(self) -> int:
        """The flags of runtime.hpp, whose order is that of the attributes."""
        return sum(1 << k for k, check in enumerate(fields(self)) if getattr(self, check.name))


@dataclass
class Launch:
    """One launch of a kernel: how it was made, what it counted, what it found.

    Attributes:
        kernel: the kernel's name.
        grid: blocks, (x, y, z).
        block: threads of a block.
        cluster: blocks of a cluster, (1, 1, 1) without clusters.
        shared_mem: bytes of dynamic shared memory.
        counters: what was counted.
        findings: what a check found. The launch ends there, and raises it once it is in the list of :func:`record`.
        output: what the kernel printed.
        seconds: how long the simulation took.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared_mem: int
    counters: Counters
    findings: list[Finding] = field(default_factory=list)
    output: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Settings:
    """What `record` sets for the launches within it."""

    checks: Checks = Checks.cheap()
    seed: int | None = None
    cp_async: str = "late"
    jitter: int = 0
    time_limit: float = 60.0
    window: int = 1
    launches: list[Launch] | None = None


_settings: contextvars.ContextVar[Settings | None] = contextvars.ContextVar("cuflash_simulator_settings", default=None)
_replaced: contextvars.ContextVar[Mapping[str, str] | None] = contextvars.ContextVar(
    "cuflash_simulator_replaced", default=None
)
_mutation: contextvars.ContextVar[tuple[str, Callable[[np.ndarray], np.ndarray]] | None] = contextvars.ContextVar(
    "cuflash_simulator_mutation", default=None
)
_watching: contextvars.ContextVar[list[Kernel] | None] = contextvars.ContextVar(
    "cuflash_simulator_watching", default=None
)


@contextlib.contextmanager
def record(
    checks: Checks | None = None,
    seed: int | None = None,
    cp_async: str = "late",
    jitter: int = 0,
    time_limit: float = 60.0,
    window: int | None = None,
) -> Iterator[list[Launch]]:
    """Records the launches of this thread and sets how they run.

    Counters are exact in fixed order. In random order lanes of a warp may part, and an instruction that they execute in
    two turns counts twice.

    Args:
        checks: the checks; all of them by default.
        seed: of a random order of lanes, warps and blocks; None for a fixed order.
        cp_async: when asynchronous copies write: "early" at once, "late" when they are waited for, "random".
        jitter: units in the last place by which approximate functions may be off, at random.
        time_limit: seconds that a launch may take.
        window: blocks (clusters) that run at the same time; 1 in fixed order and 3 in random order by default.

    Yields:
        The list to which each launch is added.
    """
    if cp_async not in ("early", "late", "random"):
        raise ValueError(f"cp_async must be 'early', 'late' or 'random', not {cp_async!r}")
    launches: list[Launch] = []
    settings = Settings(
        checks or Checks(), seed, cp_async, jitter, time_limit, window or (1 if seed is None else 3), launches
    )
    token = _settings.set(settings)
    try:
        yield launches
    finally:
        _settings.reset(token)


@contextlib.contextmanager
def replace_ptx(kernel: str, text: str) -> Iterator[None]:
    """Runs other PTX wherever a kernel of this name is launched: for mutation tests."""
    token = _replaced.set({**(_replaced.get() or {}), kernel: text})
    try:
        yield
    finally:
        _replaced.reset(token)


@contextlib.contextmanager
def mutated(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Iterator[None]:
    """Changes the instructions of the kernel with this key wherever it is launched."""
    token = _mutation.set((key, change))
    try:
        yield
    finally:
        _mutation.reset(token)


@contextlib.contextmanager
def watch_kernels() -> Iterator[list[Kernel]]:
    """Yields a list to which every kernel that is launched is added."""
    seen: list[Kernel] = []
    token = _watching.set(seen)
    try:
        yield seen
    finally:
        _watching.reset(token)


class _LaunchArgs(ctypes.Structure):
    """LaunchArgs of machine.hpp."""

    _fields_ = [
        ("code", ctypes.c_void_p),
        ("instructions", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("system_shared", ctypes.c_uint32),
        ("static_shared", ctypes.c_uint32),
        ("dynamic_shared", ctypes.c_uint32),
        ("local_size", ctypes.c_uint32),
        ("slots", ctypes.c_uint32),
        ("constants", ctypes.c_void_p),
        ("constant_count", ctypes.c_uint64),
        ("params", ctypes.c_void_p),
        ("params_size", ctypes.c_uint64),
        ("regions", ctypes.c_void_p),
        ("region_count", ctypes.c_uint64),
        ("region_counts", ctypes.c_void_p),
        ("pc_counts", ctypes.c_void_p),
        ("checks", ctypes.c_uint32),
        ("random", ctypes.c_uint32),
        ("jitter", ctypes.c_uint32),
        ("cp_async", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("time_limit", ctypes.c_double),
        ("finding", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("output_size", ctypes.c_uint64),
        ("output_used", ctypes.c_uint64),
        ("tables", ctypes.c_void_p),
        ("window", ctypes.c_uint32),
        ("multiprocessors", ctypes.c_uint32),
        ("registers", ctypes.c_uint32),
        ("waits", ctypes.c_uint32),
        ("release", ctypes.c_void_p),
        ("acquire", ctypes.c_void_p),
        ("signals", ctypes.c_void_p),
    ]


class RawFinding(ctypes.Structure):
    """Finding of runtime.hpp."""

    _fields_ = [
        ("kind", ctypes.c_uint32),
        ("pc", ctypes.c_uint32),
        ("block", ctypes.c_uint32),
        ("thread", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("other_pc", ctypes.c_uint32),
        ("other_block", ctypes.c_uint32),
        ("other_thread", ctypes.c_uint32),
        ("write", ctypes.c_uint32),
        ("other_write", ctypes.c_uint32),
        ("has_other", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("text", ctypes.c_char * 512),
    ]


_REGION = np.dtype([("lo", "u8"), ("hi", "u8"), ("origin", "u8"), ("id", "u4"), ("readonly", "u4")])


@lru_cache(maxsize=None)
def _python() -> tuple[int | None, ...]:
    """What the machine calls to let other threads run and to have signals handled."""
    names = ("PyEval_SaveThread", "PyEval_RestoreThread", "PyErr_CheckSignals")
    return tuple(ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name in names)


@lru_cache(maxsize=None)
def _machine() -> tuple[ctypes.PyDLL, tuple[str, ...]]:
    """The machine and the names of its handlers.

    It is called with Python's lock, which a launch gives up, and an exception of a signal's handler comes out of it.
    """
    loaded = load_machine()
    library = ctypes.PyDLL(loaded._name, handle=loaded._handle)
    library.sim_op_count.restype = ctypes.c_uint64
    library.sim_op_name.restype = ctypes.c_char_p
    library.sim_op_name.argtypes = [ctypes.c_uint64]
    library.sim_sizes.restype = ctypes.c_uint64
    library.sim_launch.argtypes = [ctypes.c_void_p]
    library.sim_launch.restype = ctypes.c_int
    sizes = library.sim_sizes()
    expected = INS.itemsize | ctypes.sizeof(_LaunchArgs) << 16 | ctypes.sizeof(RawFinding) << 32
    if sizes != expected:
        raise RuntimeError(f"the machine's structures differ from launch.py's: {sizes:#x}, {expected:#x}")
    return library, tuple(library.sim_op_name(k).decode() for k in range(library.sim_op_count()))


def _triple(value: int | Sequence[int]) -> tuple[int, int, int]:
    values = (value,) if isinstance(value, (int, np.integer)) else tuple(value)
    x, y, z = (*(int(v) for v in values), 1, 1)[:3]
    return x, y, z


def address_of(array: np.ndarray) -> int:
    """Where an array's first element lies."""
    return int(array.__array_interface__["data"][0])


@dataclass
class _Memory:
    """An array that a kernel may touch."""

    name: str
    lo: int
    hi: int
    readonly: bool
    origin: int  # where the buffer starts that the array is a view of


def _memory(name: str, array: np.ndarray, readonly: bool) -> _Memory:
    lo, hi = _span(array)
    root = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    return _Memory(name, lo, hi, readonly or not array.flags.writeable, min(lo, _span(root)[0]))


def _span(array: np.ndarray) -> tuple[int, int]:
    """The bytes from the first to the last element of a view."""
    lo = hi = address_of(array)
    for n, stride in zip(array.shape, array.strides):
        if stride < 0:
            lo += (n - 1) * stride
        else:
            hi += (n - 1) * stride
    return lo, hi + array.itemsize


class SimModule:
    """CUDA source, compiled to PTX, whose kernels run on the CPU. The counterpart of `cupy.RawModule`.

    Args:
        code: CUDA C++.
        options: of NVRTC.
        arch: the architecture to compile for.
        name: the file name in reports.
        headers: contents of #include files by name.
        ptx: PTX to run instead of compiling `code`.
    """

    def __init__(
        self,
        code: str = "",
        options: Sequence[str] = (),
        arch: str = "sm_90",
        name: str = "kernel.cu",
        headers: dict[str, str] | None = None,
        *,
        ptx: str | None = None,
    ) -> None:
        self.name = name
        self.arch = arch
        self.ptx = ptx if ptx is not None else compile_ptx(code, options, arch, name, headers)
        self.image = load_image(self.ptx, _machine()[1], cached=ptx is None)
        self._variables: dict[str, np.ndarray] = {}
        self._kernels: dict[str, Kernel] = {}
        self._place_variables()

    def _place_variables(self) -> None:
        for sym in self.image.symbols.values():
            raw = np.zeros(sym.size + 256, np.uint8)
            start = -address_of(raw) % 256
            view = raw[start : start + sym.size]
            if sym.init:
                view[:] = np.frombuffer(sym.init, np.uint8)
            self._variables[sym.name] = view
        for sym in self.image.symbols.values():
            for offset, target in sym.relocations:
                address = address_of(self._variables[target])
                self._variables[sym.name][offset : offset + 8] = np.frombuffer(address.to_bytes(8, "little"), np.uint8)

    def get_global(self, name: str) -> np.ndarray:
        """The bytes of a `__device__` or `__constant__` variable."""
        return self._variables[name]

    def get_function(self, name: str) -> Kernel:
        """A kernel by its extern "C" name."""
        if name not in self._kernels:
            known = [*self.image.programs, *self.image.errors]
            if name not in known:
                raise KeyError(f"{self.name} has no kernel {name!r}; it has {', '.join(known) or 'none'}")
            self._kernels[name] = Kernel(self, name)
        return self._kernels[name]


class Kernel:
    """A kernel of a module; call it with grid, block and arguments."""

    def __init__(self, module: SimModule, name: str) -> None:
        self.module = module
        self.name = name
        self.program: Program = module.image.program(name)
        self._constants = self.program.constants.copy()
        for row, (variable, offset) in self.program.variables.items():
            self._constants[row, 2] = address_of(module._variables[variable]) + offset
        self.key = digest(module.ptx, name)
        self._replacements: dict[str, Kernel] = {}

    @staticmethod
    def handlers() -> tuple[str, ...]:
        """The names of the machine's handlers; `op` of an instruction is an index into them."""
        return _machine()[1]

    def _replacement(self) -> Kernel:
        text = (_replaced.get() or {}).get(self.name)
        if text is None:
            return self
        if text not in self._replacements:
            self._replacements.clear()
            self._replacements[text] = SimModule(name=self.module.name, arch=self.module.arch, ptx=text).get_function(
                self.name
            )
        return self._replacements[text]

    def _pack(self, args: Sequence[Any]) -> tuple[bytes, list[_Memory], list[Any]]:
        program = self.program
        if len(args) != len(program.params):
            raise TypeError(f"{self.name} has {len(program.params)} parameters, not {len(args)}")
        packed = bytearray(program.params_size)
        memory: list[_Memory] = []
        keep: list[Any] = []
        for k, (arg, (_, offset, size)) in enumerate(zip(args, program.params)):
            if isinstance(arg, np.ndarray) and arg.dtype.names is None:
                if size != 8:
                    raise TypeError(f"argument {k} of {self.name} is an array, the parameter has {size} bytes")
                if arg.size:
                    memory.append(_memory(f"argument {k}", arg, False))
                data = address_of(arg).to_bytes(8, "little")
            elif arg is None:
                data = bytes(8)
            elif isinstance(arg, np.ndarray):
                data = arg.tobytes()
            elif isinstance(arg, np.generic):
                data = arg.tobytes()
            elif isinstance(arg, bool):
                data = bytes([arg])
            elif isinstance(arg, int):
                data = arg.to_bytes(size, "little", signed=arg < 0)
            elif isinstance(arg, float):
                data = np.array(arg, np.float64 if size == 8 else np.float32).tobytes()
            else:
                raise TypeError(
                    f"argument {k} of {self.name} is a {type(arg).__name__}; "
                    "arrays, NumPy scalars and structured arrays are taken"
                )
            if len(data) != size:
                raise TypeError(f"argument {k} of {self.name} has {len(data)} bytes, the parameter has {size}")
            packed[offset : offset + size] = data
            keep.append(arg)
        return bytes(packed), memory, keep

    def __call__(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
        cluster: None | int | Sequence[int] = None,
        arrays: Mapping[str, np.ndarray | None] | None = None,
        readonly: Collection[str] = (),
    ) -> Launch:
        """Runs the kernel.

        Args:
            grid: blocks, up to three numbers.
            block: threads of a block.
            args: NumPy arrays (pointers), NumPy scalars, and structured arrays of one element (structs by value).
            shared_mem: bytes of dynamic shared memory.
            cluster: blocks of a cluster, if the kernel has no __cluster_dims__.
            arrays: memory that the kernel may touch, by name: needed for pointers inside of structs, and gives pointer
                arguments a name.
            readonly: names of arrays that the kernel must not write; those that NumPy will not write are read-only
                anyhow.

        Returns:
            The launch, with its counters.

        Raises:
            SimulationError: with the first finding.
        """
        kernel = self._replacement()
        return kernel._launch(_triple(grid), _triple(block), args, shared_mem, cluster, dict(arrays or {}), readonly)

    def _launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Sequence[Any],
        shared_mem: int,
        cluster: None | int | Sequence[int],
        arrays: dict[str, np.ndarray | None],
        readonly: Collection[str],
    ) -> Launch:
        import time

        settings = _settings.get() or Settings()
        program = self.program
        dims = _triple(cluster) if cluster is not None else program.cluster if program.cluster[0] else (1, 1, 1)
        threads = block[0] * block[1] * block[2]
        if not 1 <= threads <= 1024:
            raise ValueError(f"a block of {threads} threads; 1 to 1024 are possible")
        if program.max_threads and threads > program.max_threads:
            raise ValueError(
                f"a block of {threads} threads; {self.name} was compiled for at most {program.max_threads} "
                "(__launch_bounds__)"
            )
        if any(g % c for g, c in zip(grid, dims)):
            raise ValueError(f"the grid {grid} is no multiple of the cluster {dims}")
        if program.static_shared + shared_mem > _SIZE_LIMIT:
            raise ValueError(
                f"{program.static_shared + shared_mem} bytes of shared memory; a block has at most {_SIZE_LIMIT}"
            )
        packed, memory, keep = self._pack(args)
        named = [_memory(name, a, name in readonly) for name, a in arrays.items() if a is not None and a.size]
        memory = named + [m for m in memory if not any(n.lo <= m.lo and m.hi <= n.hi for n in named)]
        for name, view in self.module._variables.items():
            if view.size:
                constant = self.module.image.symbols[name].space == "const"
                memory.append(_memory(name, view, constant))
        regions = _regions(memory)
        count = len(program.code)
        pc_counts = np.zeros(count, PC_COUNT)
        region_counts = np.zeros(max(len(memory), 1), REGION_COUNT)
        params = np.frombuffer(packed + bytes(16), np.uint8).copy()
        raw = RawFinding()
        output = np.zeros(1 << 16, np.uint8)
        mutation, watching = _mutation.get(), _watching.get()
        if watching is not None:
            watching.append(self)
        code = mutation[1](program.code) if mutation is not None and mutation[0] == self.key else program.code
        constants, tables = self._constants, program.tables

        request = _LaunchArgs(
            address_of(code),
            count,
            grid,
            block,
            dims,
            SYSTEM_SHARED,
            program.static_shared,
            shared_mem,
            program.local_size,
            program.slots,
            address_of(constants) if len(constants) else 0,
            len(constants),
            address_of(params),
            program.params_size,
            address_of(regions),
            len(regions),
            address_of(region_counts),
            address_of(pc_counts),
            settings.checks.bits(),
            int(settings.seed is not None),
            settings.jitter,
            {"late": 0, "early": 1, "random": 2}[settings.cp_async],
            (settings.seed or 0) & 0xFFFFFFFFFFFFFFFF,
            settings.time_limit,
            ctypes.addressof(raw),
            address_of(output),
            output.size,
            0,
            address_of(tables) if len(tables) else 0,
            settings.window,
            132,
            program.registers,
            int(program.waits),
            *_python(),
        )
        start = time.perf_counter()
        failed = _machine()[0].sim_launch(ctypes.byref(request)) if min(grid) > 0 else 0
        seconds = time.perf_counter() - start
        del keep
        variables = self.module._variables
        touched = {m.name: row for m, row in zip(memory, region_counts.tolist()) if m.name not in variables or any(row)}
        counters = Counters(program, pc_counts, touched)
        text = output[: request.output_used].tobytes().decode(errors="replace")
        launch = Launch(self.name, grid, block, dims, shared_mem, counters, [], text, seconds)
        if settings.launches is not None:
            settings.launches.append(launch)
        if text:
            print(text, end="")
        if failed:
            finding = describe(raw, program, self.module.name, grid, block, [(m.name, m.lo, m.hi) for m in memory])
            launch.findings.append(finding)
            raise SimulationError(launch.findings)
        return launch


def _regions(memory: Sequence[_Memory]) -> np.ndarray:
    """Regions sorted by address that do not overlap; where arrays share memory, the first one named has the bytes."""
    edges = sorted({m.lo for m in memory} | {m.hi for m in memory})
    rows: list[list[int]] = []
    for lo, hi in zip(edges, edges[1:]):
        owner = next((k for k, m in enumerate(memory) if m.lo <= lo and hi <= m.hi), None)
        if owner is None:
            continue
        if rows and rows[-1][1] == lo and rows[-1][2] == owner:
            rows[-1][1] = hi
        else:
            rows.append([lo, hi, owner, memory[owner].origin, int(memory[owner].readonly)])
    out = np.zeros(max(len(rows), 1), _REGION)
    for k, row in enumerate(rows):
        lo, hi, owner, origin, readonly = row
        out[k] = (lo, hi, origin, owner, readonly)
    return out[: len(rows)] if rows else out[:0]
