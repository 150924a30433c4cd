"""Kernels: from a problem to a compiled variant, its parameters and its launch.

Everything here is the same for a GPU and for the simulator. What differs is the :class:`Machine`: where memory comes
from, and who compiles and launches.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .arrays import NativeArray
from .dtypes import numpy_dtype
from .planner import plan_launch
from .problem import Problem
from .tiling import MAX_BLOCKS_PER_SM, Tiling

if TYPE_CHECKING:
    from .attention import Operands
    from .scheduling import Lengths, SchedulerMetadata

_ELEMENTS = {"float16": "Float16", "bfloat16": "BFloat16", "float32": "Float32"}
_LOG2E = math.log2(math.e)
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


_FIELD = re.compile(r"^\s+(?:const )?(?P<type>\w[\w ]*?\*?) (?P<name>\w+);", re.MULTILINE)
_FIELD_TYPES = {"int": "i4", "unsigned int": "u4", "long long": "i8", "float": "f4"}


@lru_cache(maxsize=None)
def struct_dtype(file: str, struct: str) -> np.dtype[Any]:
    """Read the NumPy twin of a parameter struct from its CUDA source, so that it is written only once."""
    text = source(file)
    begin = text.index(f"struct {struct} {{")
    fields = _FIELD.finditer(text[begin : text.index("\n};", begin)])
    return np.dtype(
        [(field["name"], "u8" if field["type"].endswith("*") else _FIELD_TYPES[field["type"]]) for field in fields],
        align=True,
    )


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
            *_element(problem.qkv_dtype),
            ("HEAD_DIM", problem.headdim),
            ("HEAD_DIM_V", problem.headdim_v),
            ("PADDED_HEAD_DIM", tiling.headdim),
            ("PADDED_HEAD_DIM_V", tiling.headdim_v),
            ("ROWS", tiling.rows),
            ("TILE_KEYS", tiling.tile_keys),
            ("WARPS", tiling.warps),
            ("STAGES", tiling.stages),
            ("BLOCKS_PER_SM", tiling.blocks_per_sm),
            ("BLOCK_STATE_BYTES", tiling.block_state_bytes),
            ("HAS_SOFTCAP", int(problem.has_softcap)),
            ("HAS_CHUNK", int(problem.attention_chunk > 0)),
        ),
    )


def append_variant(dtype: str) -> Variant:
    """Return the kernel that writes new keys and values, and rotates queries."""
    return Variant("append", (*_element(dtype), ("WARPS", _ROW_WARPS)))


def merge_variant(dtype: str) -> Variant:
    """Return the kernel of ``merge_attn_states``."""
    return Variant("merge", (*_element(dtype), ("WARPS", _ROW_WARPS)))


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


def plan(
    machine: Machine, problem: Problem, tiling: Tiling, num_blocks: int, lengths: Lengths, array: NativeArray
) -> None:
    """Launch the planner: one block, whatever the batch."""
    threads, shared_bytes, values = plan_launch(problem, tiling, num_blocks, array.size)
    arrays = {"plan": array, **lengths.__dict__}
    params = _params(machine, "plan.cu", "PlanParams", arrays)
    for name, value in values.items():
        params[name] = value
    machine.launch(Variant("plan"), 1, threads, shared_bytes, params, arrays)


def decode(machine: Machine, problem: Problem, operands: Operands, metadata: SchedulerMetadata) -> None:
    """Launch attention on a plan: one launch, or two where new keys are appended."""
    q = _aligned(machine, operands.q)
    if operands.k is not None:
        q = append(machine, problem, operands, q)
    if operands.out.size == 0:
        return
    tiling = metadata.tiling
    items = problem.batch_size * problem.num_heads_kv * tiling.row_blocks
    max_splits = -(-max(metadata.max_seqlen_k, 1) // problem.split_size) if problem.split_size else 0
    slots = items * max_splits if problem.split_size else 2 * metadata.num_blocks
    partials, counters = machine.workspace(
        slots * tiling.rows * (tiling.headdim_v + 2), metadata.device.num_sm * MAX_BLOCKS_PER_SM
    )

    lengths, k_cache, v_cache = operands.lengths, operands.k_cache, operands.v_cache
    arrays = {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "out": operands.out,
        "softmax_lse": operands.softmax_lse,
        "sinks": operands.sinks,
        "cache_seqlens": lengths.cache_seqlens,
        "cache_leftpad": lengths.cache_leftpad,
        "cache_batch_idx": operands.cache_batch_idx,
        "page_table": operands.page_table,
        "cu_seqlens_q": lengths.cu_seqlens_q,
        "cu_seqlens_k_new": lengths.cu_seqlens_k_new,
        "plan": metadata.array,
        "partials": partials,
        "counters": counters,
    }
    params = _params(machine, "decode.cu", "DecodeParams", arrays)
    ragged = problem.cu_seqlens_q
    _set_row_strides(params, "q", q, ragged)
    _set_row_strides(params, "out", operands.out, ragged)
    lse_strides = _strides(operands.softmax_lse)
    params["lse_head_stride"] = lse_strides[-2]
    params["lse_batch_stride"] = 0 if ragged else lse_strides[0]
    if operands.page_table is not None:
        params["page_table_stride"] = _strides(operands.page_table)[0]
    for name, cache in (("k", k_cache), ("v", v_cache)):
        for axis, stride in zip(("page", "row", "head"), cache.strides, strict=False):
            params[f"{name}_{axis}_stride"] = stride // 16
    params["page_size"] = k_cache.shape[1]
    for name, divisor in (("page_size", k_cache.shape[1]), ("group", problem.group)):
        params[f"{name}_magic"], params[f"{name}_shift"] = _multiplier(divisor)
    params["max_seqlen_q"] = problem.max_seqlen_q
    params["max_seqlen_k_new"] = problem.max_seqlen_k_new
    params["num_heads_kv"] = problem.num_heads_kv
    params["group"] = problem.group
    params["row_blocks"] = tiling.row_blocks
    params["window_left"], params["window_right"] = problem.window
    params["attention_chunk"] = problem.attention_chunk
    params["split_size"] = problem.split_size or 0
    params["max_splits"] = max_splits
    params["num_slots"] = slots
    scale = operands.softmax_scale * _LOG2E
    if problem.has_softcap:
        params["tanh_scale"] = 2 * scale / operands.softcap
        params["score_cap"] = operands.softcap * _LOG2E
        scale = 1.0
    elif scale < 0:
        params["query_flip"] = 0x80008000 if operands.q.itemsize == 2 else 0x80000000
    # A scale of zero hides no key: keep it positive, so that a masked score, -inf, stays one.
    params["score_scale"] = max(abs(scale), 1e-30)
    params["score_slack"] = 8 / max(abs(scale), 1e-30)
    variant = decode_variant(problem, tiling)
    machine.launch(variant, metadata.num_blocks, 32 * tiling.warps, tiling.shared_bytes, params, arrays)


def append(machine: Machine, problem: Problem, operands: Operands, q: NativeArray) -> NativeArray:
    """Write the new keys and values into the cache; return the queries, rotated if the call rotates."""
    k, v = _aligned(machine, operands.k), _aligned(machine, operands.v)
    cos = operands.rotary_cos
    rotates = cos is not None
    q_rotated = machine.empty(q.shape, q.dtype) if rotates else None
    lengths = operands.lengths
    arrays = {
        "q": q,
        "q_rotated": q_rotated,
        "k": k,
        "v": v,
        "k_cache": operands.k_cache,
        "v_cache": operands.v_cache,
        "rotary_cos": cos,
        "rotary_sin": operands.rotary_sin,
        "cache_seqlens": lengths.cache_seqlens,
        "rotary_seqlens": operands.rotary_seqlens,
        "cache_batch_idx": operands.cache_batch_idx,
        "page_table": operands.page_table,
        "cu_seqlens_q": lengths.cu_seqlens_q,
        "cu_seqlens_k_new": lengths.cu_seqlens_k_new,
    }
    params = _params(machine, "append.cu", "AppendParams", arrays)
    _set_row_strides(params, "q", q, problem.cu_seqlens_q)
    for name, new in (("k", k), ("v", v)):
        strides = _strides(new)
        params[f"{name}_batch_stride"] = 0 if problem.cu_seqlens_k_new else strides[0]
        params[f"{name}_token_stride"], params[f"{name}_new_head_stride"] = strides[-3], strides[-2]
    for name, cache in (("k", operands.k_cache), ("v", operands.v_cache)):
        for axis, stride in zip(("page", "row", "head"), _strides(cache), strict=False):
            params[f"{name}_{axis}_stride"] = stride
    page_size = operands.k_cache.shape[1]
    if operands.page_table is not None:
        params["page_table_stride"] = _strides(operands.page_table)[0]
        params["capacity"] = min(operands.page_table.shape[1] * page_size, 2**31 - 1)
    else:
        params["capacity"] = page_size
    query_tokens = math.prod(q.shape[:-2]) if rotates else 0
    new_tokens = math.prod(k.shape[:-2])
    params["batch_size"] = problem.batch_size
    params["query_tokens"] = query_tokens
    params["new_tokens"] = new_tokens
    params["max_seqlen_q"] = problem.max_seqlen_q
    params["max_seqlen_k_new"] = problem.max_seqlen_k_new
    params["num_heads_q"], params["num_heads_kv"] = problem.num_heads_q, problem.num_heads_kv
    params["headdim"], params["headdim_v"] = problem.headdim, problem.headdim_v
    params["page_size"] = page_size
    if cos is not None:
        params["rotary_dim"] = 2 * cos.shape[1]
    params["rotary_interleaved"] = operands.rotary_interleaved
    params["rotary_moves"] = operands.rotary_moves
    rows = query_tokens * problem.num_heads_q + 2 * new_tokens * problem.num_heads_kv
    if rows:
        machine.launch(append_variant(problem.qkv_dtype), -(-rows // _ROW_WARPS), 32 * _ROW_WARPS, 0, params, arrays)
    return q_rotated if rotates else q


def merge(machine: Machine, outs: NativeArray, lses: NativeArray, out: NativeArray, lse: NativeArray) -> None:
    """Launch the merge of partial results: outs (states, batch, queries, heads, headdim), contiguous."""
    if out.size == 0:
        return
    arrays = {"outs": outs, "lses": lses, "out": out, "lse": lse}
    params = _params(machine, "merge.cu", "MergeParams", arrays)
    params["states"], params["batch_size"], params["queries"], params["heads"], params["headdim"] = outs.shape
    rows = math.prod(outs.shape[1:-1])
    machine.launch(merge_variant(outs.dtype.name), -(-rows // _ROW_WARPS), 32 * _ROW_WARPS, 0, params, arrays)


def _multiplier(divisor: int) -> tuple[int, int]:
    """Return (magic, shift), n // divisor == n * magic >> (31 + shift) for 0 <= n < 2**31, with a magic of 32 bits.

    Granlund and Montgomery, "Division by invariant integers using multiplication" (1994), theorem 4.2.
    """
    shift = (max(divisor, 1) - 1).bit_length()
    return -(-(1 << (31 + shift)) // max(divisor, 1)), shift


def _params(machine: Machine, file: str, struct: str, arrays: dict[str, NativeArray | None]) -> np.ndarray:
    """Return a parameter struct, size 1, with the addresses of the arrays; absent arrays are null and dropped."""
    params = np.zeros(1, struct_dtype(file, struct))
    for name, array in list(arrays.items()):
        if array is None:
            del arrays[name]
        else:
            params[name] = machine.address(array)
    return params


def _strides(array: NativeArray) -> tuple[int, ...]:
    """Return strides in elements."""
    return tuple(stride // array.itemsize for stride in array.strides)


def _set_row_strides(params: np.ndarray, name: str, array: NativeArray, ragged: bool) -> None:
    """Set the strides of queries or outputs: (batch, seqlen, heads, dim), or (total, heads, dim) if ragged."""
    strides = _strides(array)
    params[f"{name}_batch_stride"] = 0 if ragged else strides[0]
    params[f"{name}_row_stride"], params[f"{name}_head_stride"] = strides[-3], strides[-2]


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
