"""Kernels: from a problem to a compiled variant, its parameters and its launch.

Everything here is the same for a GPU and for the simulator. What differs is the :class:`Machine`: where memory comes
from, and who compiles and launches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .arrays import NativeArray
from .dtypes import numpy_dtype
from .planner import length_fields, mask_fields, plan_launch
from .problem import Problem
from .tiling import MAX_BLOCKS_PER_SM, Tiling

if TYPE_CHECKING:
    from .attention import Operands
    from .scheduling import SchedulerMetadata

_ELEMENTS = {"float16": "Float16", "bfloat16": "BFloat16", "float32": "Float32"}
_LOG2E = math.log2(math.e)
_LARGEST, _SMALLEST = float(np.finfo(np.float32).max), 2.0**-126  # of the float32 numbers that no kernel flushes
_COARSE_CAP = 1024  # from here on, a cap's relative error of 2^-22 is too much
_SPLIT_BYTES = 2**30  # for what split_size keeps of items that are cut
_ROW_WARPS = 4  # warps of a block of append and merge, a row each


# ------------------------------------------------------------------------------------------------------------ sources
def _folder() -> Path:
    """Where the CUDA sources are: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    return here / "kernels_cu" if (here / "kernels_cu").is_dir() else here.parent / "kernels_cu"


@lru_cache(maxsize=None)
def source(file: str) -> str:
    """Return a kernel's source with its headers inlined.

    CuPy's disk cache does not see the contents of headers, so none are left to include; ``#line`` keeps messages and
    findings pointing at the real files.
    """
    return _inlined(file, set())


def _inlined(file: str, seen: set[str]) -> str:
    if file in seen:
        return ""
    seen.add(file)
    folder = _folder()
    path = folder / file if (folder / file).exists() else folder / "include" / file
    lines = [f'#line 1 "{file}"']
    for number, line in enumerate(path.read_text().splitlines(), 1):
        include = re.match(r'\s*#include "(.+)"', line)
        if include:
            lines += [_inlined(include[1], seen), f'#line {number + 1} "{file}"']
        elif line.lstrip().startswith("#endif"):  # the group before may have been skipped with its #line
            lines += [line, f'#line {number + 1} "{file}"']
        else:
            lines.append("" if line.strip() == "#pragma once" else line)
    return "\n".join(lines)


_STRUCT = r"^struct (?:__align__\(\d+\) )?{name} {{(.*?)^}};"
_FIELD = re.compile(r"(?:const )?(?P<type>\w[\w ]*?\*?) (?P<name>\w+)")
_FIELD_TYPES = {"int": "i4", "unsigned int": "u4", "long long": "i8", "float": "f4"}


@lru_cache(maxsize=None)
def struct_dtype(file: str, struct: str) -> np.dtype[Any]:
    """Read the NumPy twin of a parameter struct from its CUDA source, so that it is written only once.

    A field is a number, a pointer or another struct of that source. Declarations end with a semicolon on their own
    line, four spaces in; functions have parentheses and are no fields.

    Raises:
        TypeError: If a field is anything else.
    """
    body = re.search(_STRUCT.format(name=struct), source(file), re.MULTILINE | re.DOTALL)
    if body is None:
        raise TypeError(f"{file} must declare the parameter struct {struct}; it does not")
    fields: list[tuple[str, Any]] = []
    for line in body[1].splitlines():
        declaration, semicolon, _ = line.partition("//")[0].partition(";")
        if not semicolon or not re.match(r" {4}\w", line) or "(" in declaration:
            continue
        field = _FIELD.fullmatch(declaration.strip())
        if field is None:
            raise TypeError(f"fields of {struct} must be declared one a line, as `type name;`; got {line.strip()!r}")
        kind = field["type"]
        if kind.endswith("*"):
            fields.append((field["name"], "u8"))
        elif kind in _FIELD_TYPES:
            fields.append((field["name"], _FIELD_TYPES[kind]))
        else:
            fields.append((field["name"], struct_dtype(file, kind)))
    return np.dtype(fields, align=True)


def field_paths(dtype: np.dtype[Any], offset: int = 0) -> Iterator[tuple[str, np.dtype[Any], int]]:
    """Yield (path, dtype, offset) of each number and pointer; one in a nested struct has the path ``outer.inner``."""
    for name in dtype.names or ():
        field, position = dtype.fields[name][:2]  # type: ignore[index]
        if field.names:
            for path, inner, place in field_paths(field, offset + position):
                yield f"{name}.{path}", inner, place
        else:
            yield name, field, offset + position


# ----------------------------------------------------------------------------------------------------------- variants
@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel.

    Attributes:
        kernel: Name of the ``extern "C"`` function, and of its file.
        defines: (macro, value) pairs.
    """

    kernel: str
    defines: tuple[tuple[str, str | int], ...] = ()

    @property
    def file(self) -> str:
        """The source file."""
        return f"{self.kernel}.cu"

    @property
    def options(self) -> tuple[str, ...]:
        """Compiler options."""
        return ("-std=c++17", *(f"-D{macro}={value}" for macro, value in self.defines))

    def __str__(self) -> str:
        return f"{self.kernel}({', '.join(f'{macro}={value}' for macro, value in self.defines)})"


@lru_cache(maxsize=1024)
def decode_variant(problem: Problem, tiling: Tiling) -> Variant:
    """Return the attention kernel for a problem: everything not named here is a run-time value."""
    return Variant(
        "decode",
        (
            *_elements(problem.qkv_dtype, problem.kv_dtype),
            ("HEAD_DIM", problem.headdim),
            ("HEAD_DIM_V", problem.headdim_v),
            ("PADDED_HEAD_DIM", tiling.headdim),
            ("PADDED_HEAD_DIM_V", tiling.headdim_v),
            ("ROWS", tiling.rows),
            ("TILE_KEYS", tiling.tile_keys),
            ("WARPS", tiling.warps),
            ("QUERY_BUFFERS", tiling.query_buffers),
            ("STAGES", tiling.stages),
            ("BLOCKS_PER_SM", tiling.blocks_per_sm),
            ("BLOCK_STATE_BYTES", tiling.block_state_bytes),
            ("CLUSTER", tiling.cluster),
            ("HAS_SOFTCAP", int(problem.has_softcap)),
            ("HAS_CHUNK", int(problem.attention_chunk > 0)),
            ("HAS_SPLIT_SIZE", int(problem.split_size is not None)),
        ),
    )


def append_variant(dtype: str) -> Variant:
    """Return the kernel that writes new keys and values, and rotates queries."""
    return Variant("append", (*_elements(dtype, dtype), ("WARPS", _ROW_WARPS)))


def merge_variant(dtype: str) -> Variant:
    """Return the kernel of ``merge_attn_states``."""
    return Variant("merge", (*_element(dtype), ("WARPS", _ROW_WARPS)))


def variants(problem: Problem, tiling: Tiling) -> tuple[Variant, ...]:
    """Return the kernels of a step: the planner's, attention's, and the append's where there is one."""
    appends = (append_variant(problem.qkv_dtype),) if problem.appends else ()
    return Variant("plan"), *appends, decode_variant(problem, tiling)


def _elements(dtype: str, kv_dtype: str) -> tuple[tuple[str, str | int], ...]:
    return *_element(dtype), ("KV_ELEMENT", _ELEMENTS[kv_dtype])


def _element(dtype: str) -> tuple[tuple[str, str | int], ...]:
    return ("ELEMENT", _ELEMENTS[dtype]), ("ELEMENT_BYTES", numpy_dtype(dtype).itemsize)


# ----------------------------------------------------------------------------------------------------------- launches
class Machine(Protocol):
    """What a GPU and the simulator do differently."""

    def address(self, array: NativeArray) -> int:
        """Return the address of an array's first element."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NativeArray:
        """Return memory that lives at least until the launches so far have run."""

    def workspace(self, partials: int, counters: int) -> tuple[NativeArray, NativeArray]:
        """Return float32 memory for partial results, and int32 counters that are 0."""

    def launch(
        self,
        variant: Variant,
        grid: int,
        threads: int,
        shared_bytes: int,
        params: np.ndarray,
        arrays: dict[str, NativeArray],
    ) -> None:
        """Launch a kernel; ``arrays`` names all memory that it may touch."""


class Launch:
    """A launch that lacks nothing but the addresses of its arrays: all else that it passes follows from shapes."""

    def __init__(
        self, variant: Variant, struct: str, grid: int, threads: int, shared_bytes: int, values: Mapping[str, Any]
    ) -> None:
        """Fill in the parameters.

        Args:
            variant: The kernel.
            struct: Name of its parameter struct. The name of a pointer is that of the array it is given, whatever
                struct it stands in.
            grid: Blocks.
            threads: Threads of a block.
            shared_bytes: Dynamic shared memory of a block.
            values: Fields of the struct that are not pointers, by their paths; those that are missing are 0.
        """
        self._shape = variant, grid, threads, shared_bytes
        self._dtype = struct_dtype(variant.file, struct)
        fields = {path: (dtype, offset) for path, dtype, offset in field_paths(self._dtype)}
        template = bytearray(self._dtype.itemsize)
        for path, value in values.items():
            dtype, offset = fields[path]
            template[offset : offset + dtype.itemsize] = np.array(value, dtype).tobytes()
        self._template = bytes(template)
        pointers = {path.rpartition(".")[2]: offset for path, (dtype, offset) in fields.items() if dtype == np.uint64}
        self._pointers = list(pointers)
        # Pointers side by side are packed at once.
        self._runs: list[tuple[Callable[..., None], int, slice]] = []
        offsets = list(pointers.values())
        begin = 0
        for end in range(1, len(offsets) + 1):
            if end == len(offsets) or offsets[end] != offsets[end - 1] + 8:
                self._runs.append((Struct(f"{end - begin}Q").pack_into, offsets[begin], slice(begin, end)))
                begin = end

    def __call__(self, machine: Machine, arrays: Mapping[str, NativeArray | None]) -> None:
        """Launch.

        Args:
            machine: Where.
            arrays: The arrays by the names of their parameters; None is a null pointer.
        """
        mine = {name: arrays[name] for name in self._pointers}
        address = machine.address
        params = bytearray(self._template)  # a copy: other threads may launch at the same time
        addresses = [0 if array is None else address(array) for array in mine.values()]
        for pack, offset, run in self._runs:
            pack(params, offset, *addresses[run])
        machine.launch(*self._shape, np.frombuffer(params, self._dtype), mine)


class Attention:
    """The launches of a call: attention on a plan, and before it the append if there are new keys.

    They fit every call on this plan whose arrays have the same shapes, strides and dtypes.
    """

    def __init__(self, problem: Problem, operands: Operands, metadata: SchedulerMetadata) -> None:
        """Prepare the launches; of the operands only shapes, strides and numbers count."""
        self._append = None if operands.k is None else _append_launch(problem, operands)
        self._rotated = None if operands.rotary_cos is None else (operands.q.shape, operands.q.dtype)
        self._decode = None
        if operands.out.size:
            tiling = metadata.tiling
            slots, max_splits = 2 * metadata.num_blocks, 0
            if problem.split_size:
                max_splits = _max_splits(problem, operands, metadata)
                slots += _cut_items(problem, metadata) * max_splits
            partials = slots * tiling.rows * (problem.headdim_v + 2)
            # A cluster merges in its shared memory.
            self._workspace = (partials, metadata.device.num_sm * MAX_BLOCKS_PER_SM) if tiling.cluster == 1 else None
            self._decode = _decode_launch(problem, operands, metadata, slots, max_splits)

    def __call__(self, machine: Machine, arrays: dict[str, NativeArray | None]) -> None:
        """Launch on the arrays of a call; see :func:`named`, whose result is changed."""
        if self._append is not None:
            arrays["q_rotated"] = machine.empty(*self._rotated) if self._rotated else None
            self._append(machine, arrays)
            if self._rotated:
                arrays["q"] = arrays["q_rotated"]
        if self._decode is not None:
            arrays["partials"] = arrays["counters"] = None
            if self._workspace:
                arrays["partials"], arrays["counters"] = machine.workspace(*self._workspace)
            self._decode(machine, arrays)


def named(operands: Operands, metadata: SchedulerMetadata) -> dict[str, NativeArray | None]:
    """Return the arrays of a call by the names of the parameters that take them."""
    arrays = {**operands.__dict__, **operands.lengths.__dict__}
    arrays["plan"] = metadata.array
    return arrays


def plan(problem: Problem, tiling: Tiling, num_blocks: int, words: int) -> Launch:
    """Return the launch of the planner: one block, whatever the batch."""
    threads, shared_bytes, values = plan_launch(problem, tiling, num_blocks, words)
    return Launch(Variant("plan"), "PlanParams", 1, threads, shared_bytes, values)


def aligned(machine: Machine, operands: Operands) -> Operands:
    """Return operands whose queries and new keys the kernels can read; copies of those that they cannot."""
    copies = {}
    for name in ("q", "k", "v"):
        array = getattr(operands, name)
        if array is not None:
            copy = _aligned(machine, array)
            if copy is not array:
                copies[name] = copy
    return replace(operands, **copies) if copies else operands


def _cut_items(problem: Problem, metadata: SchedulerMetadata) -> int:
    """Return how many items a plan cuts at most."""
    items = problem.batch_size * problem.num_heads_kv * metadata.tiling.row_blocks
    return min(items, metadata.num_blocks)


def _max_splits(problem: Problem, operands: Operands, metadata: SchedulerMetadata) -> int:
    """Return the splits that an item may have if it is cut, with ``split_size``: items with more stay whole."""
    assert problem.split_size is not None
    pages, page_size = 1 if operands.page_table is None else operands.page_table.shape[1], operands.k_cache.shape[1]
    longest = max(1, min(metadata.max_seqlen_k, pages * page_size))
    slot_bytes = 4 * metadata.tiling.rows * (problem.headdim_v + 2)
    room = _SPLIT_BYTES // (slot_bytes * max(1, _cut_items(problem, metadata)))
    return min(-(-longest // problem.split_size), max(1, room))


def _decode_launch(
    problem: Problem, operands: Operands, metadata: SchedulerMetadata, slots: int, max_splits: int
) -> Launch:
    tiling, ragged = metadata.tiling, problem.cu_seqlens_q
    q, lse = operands.q, operands.softmax_lse
    lse_strides = (0, 0, 0) if lse is None else _strides(lse)
    # Rotated queries are new memory.
    q_strides = _strides(q) if operands.rotary_cos is None else _contiguous_strides(q.shape)
    values: dict[str, Any] = {
        **_row_strides("q", q_strides, ragged),
        **_row_strides("out", _strides(operands.out), ragged),
        "lse_head_stride": lse_strides[-2],
        "lse_batch_stride": 0 if ragged else lse_strides[0],
        **length_fields(problem),
        **_cache_fields(operands),
        **mask_fields(problem),
        "batch_size": problem.batch_size,
        "total_q": operands.out.shape[0] if ragged else 0,
        "num_heads_kv": problem.num_heads_kv,
        "group": problem.group,
        "row_blocks": tiling.row_blocks,
        **_divisor_fields("by_num_heads_kv", problem.num_heads_kv),
        **_divisor_fields("by_group", problem.group),
        **_divisor_fields("by_row_blocks", tiling.row_blocks),
        "split_size": problem.split_size or 0,
        "max_splits": max_splits,
        "slots_by_item": problem.batch_size * problem.num_heads_kv * tiling.row_blocks <= metadata.num_blocks,
        "num_slots": slots,
    }
    values |= _score_values(operands.softmax_scale, operands.softcap if problem.has_softcap else 0.0)
    if operands.softmax_scale <= 0 and not problem.has_softcap:
        values["query_flip"] = 0x80008000 if operands.q.itemsize == 2 else 0x80000000
        values["query_keep"] = 0xFFFFFFFF if operands.softmax_scale else 0
    variant = decode_variant(problem, tiling)
    return Launch(variant, "DecodeParams", metadata.num_blocks, 32 * tiling.warps, tiling.shared_bytes, values)


def _score_values(softmax_scale: float, softcap: float) -> dict[str, float]:
    """Return what the kernel does to the products of queries and keys; every number is one that float32 holds."""
    values: dict[str, float] = {}
    lse_scale = abs(softmax_scale)
    if softcap:
        lse_scale = 1.0
        values["score_cap"] = min(softcap, _LARGEST)
        values["cap_scale"] = softmax_scale
        values["cap_inverse"] = min(2.0**64 / softcap, _LARGEST)
        tanh_scale = 2 * _LOG2E * softmax_scale / softcap
        values["tanh_scale"] = max(-_LARGEST, min(tanh_scale, _LARGEST))
        values["cap_exactly"] = softcap >= _COARSE_CAP or abs(tanh_scale) < _SMALLEST
    # A scale of zero hides no key: keep it positive, so that a masked score, -inf, stays one.
    score_scale = min(max(lse_scale * _LOG2E, _SMALLEST), _LARGEST)
    values["score_scale"], values["score_slack"] = score_scale, min(8 / score_scale, _LARGEST)
    values["lse_scale"] = lse_scale
    return values


def _append_launch(problem: Problem, operands: Operands) -> Launch | None:
    """Return the launch that writes new keys and values into the cache, and rotates the queries if the call does."""
    q, cos = operands.q, operands.rotary_cos
    k: NativeArray = operands.k
    query_tokens, new_tokens = 0 if cos is None else math.prod(q.shape[:-2]), math.prod(k.shape[:-2])
    rows = query_tokens * problem.num_heads_q + 2 * new_tokens * problem.num_heads_kv
    if not rows:
        return None
    values: dict[str, Any] = {
        **_row_strides("q", _strides(q), problem.cu_seqlens_q),
        **length_fields(problem),
        **_cache_fields(operands),
        "batch_size": problem.batch_size,
        "query_tokens": query_tokens,
        "new_tokens": new_tokens,
        "num_heads_q": problem.num_heads_q,
        "num_heads_kv": problem.num_heads_kv,
        "headdim": problem.headdim,
        "headdim_v": problem.headdim_v,
        "rotary_dim": 0 if cos is None else 2 * cos.shape[1],
        "rotary_interleaved": operands.rotary_interleaved,
        "rotary_moves": operands.rotary_moves,
    }
    for name, new in (("k", k), ("v", operands.v)):
        strides = _strides(new)
        values[f"{name}_batch_stride"] = 0 if problem.cu_seqlens_k_new else strides[0]
        values[f"{name}_token_stride"], values[f"{name}_new_head_stride"] = strides[-3], strides[-2]
    grid = -(-rows // _ROW_WARPS)
    return Launch(append_variant(problem.qkv_dtype), "AppendParams", grid, 32 * _ROW_WARPS, 0, values)


def merge(machine: Machine, outs: NativeArray, lses: NativeArray, out: NativeArray, lse: NativeArray) -> None:
    """Launch the merge of partial results: outs (states, batch, queries, heads, headdim), contiguous."""
    if out.size == 0:
        return
    values = dict(zip(("states", "batch_size", "queries", "heads", "headdim"), outs.shape, strict=True))
    grid = -(-math.prod(outs.shape[1:-1]) // _ROW_WARPS)
    launch = Launch(merge_variant(outs.dtype.name), "MergeParams", grid, 32 * _ROW_WARPS, 0, values)
    launch(machine, {"outs": outs, "lses": lses, "out": out, "lse": lse})


def _cache_fields(operands: Operands) -> dict[str, int]:
    """Return the values of a field ``cache``, a KVCache of paging.cuh."""
    page_table, page_size = operands.page_table, operands.k_cache.shape[1]
    values = {
        "cache.page_table_stride": 0 if page_table is None else _strides(page_table)[0],
        "cache.page_size": page_size,
        "cache.capacity": page_size if page_table is None else min(page_table.shape[1] * page_size, 2**31 - 1),
        **_divisor_fields("cache.by_page_size", page_size),
    }
    for name, cache in (("k", operands.k_cache), ("v", operands.v_cache)):
        for axis, stride in zip(("page", "row", "head"), cache.strides, strict=False):
            values[f"cache.{name}.{axis}"] = stride // 16
    return values


def _divisor_fields(path: str, divisor: int) -> dict[str, int]:
    """Return the values of a FastDivisor: n // divisor == n * magic >> (31 + shift) for 0 <= n < 2**31.

    The magic has 32 bits (Granlund and Montgomery, "Division by invariant integers using multiplication" (1994),
    theorem 4.2).
    """
    shift = (max(divisor, 1) - 1).bit_length()
    return {f"{path}.magic": -(-(1 << (31 + shift)) // max(divisor, 1)), f"{path}.shift": shift}


def _strides(array: NativeArray) -> tuple[int, ...]:
    """Return strides in elements."""
    return tuple(stride // array.itemsize for stride in array.strides)


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides in elements of a new array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _row_strides(name: str, strides: tuple[int, ...], ragged: bool) -> dict[str, int]:
    """Return the fields of the strides of queries or outputs: (batch, seqlen, heads, dim), or (total, heads, dim)."""
    batch = 0 if ragged else strides[0]
    return {f"{name}_batch_stride": batch, f"{name}_row_stride": strides[-3], f"{name}_head_stride": strides[-2]}


def _aligned(machine: Machine, q: NativeArray) -> NativeArray:
    """Return queries or new keys whose rows begin at multiples of 16 bytes; a copy where the caller's do not."""
    if (
        machine.address(q) % 16 == 0
        and all(stride % 16 == 0 for stride in q.strides[:-1])
        and (q.strides[-1] == q.itemsize)
    ):
        return q
    copy = machine.empty(q.shape, q.dtype)
    copy[...] = q
    return copy
