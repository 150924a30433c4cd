"""What ranks must agree about before they exchange results, and how they find out."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import fields
from typing import Any

import numpy as np

from ..arrays import to_host
from ..memory import NativeArray
from ..operands import Lengths, Operands
from ..problem import Problem
from .fault import ContextParallelError, name_ranks

Description = dict[str, Any]

_RECORD = struct.Struct("<I16s")  # bytes of a description, and its digest
_OWN = ("cp_rank", "page_size")  # in what fields of a problem ranks may differ
_FEW = 16  # numbers that an error shows


def agree(transport: Any, description: Description) -> None:
    """Compare descriptions of the same call on all ranks: 20 bytes if they agree, else all of it.

    Args:
        transport: Carries bytes; see ``mpi.py``.
        description: JSON values by name; the first name in which ranks differ is the one that the error has.

    Raises:
        ContextParallelError: On every rank, if they differ; it names the ranks and the field.
    """
    text = json.dumps(description).encode()
    records = transport.gather(_RECORD.pack(len(text), hashlib.blake2b(text, digest_size=16).digest()))
    if len(set(records)) == 1:
        return
    longest = max(_RECORD.unpack(record)[0] for record in records)
    all_descriptions = [json.loads(each.rstrip(b"\0")) for each in transport.gather(text.ljust(longest, b"\0"))]
    raise ContextParallelError(difference(all_descriptions), is_known=True)


def difference(descriptions: list[Description]) -> str:
    """Say in what field descriptions differ, and which ranks have which value."""
    for name in dict.fromkeys(name for description in descriptions for name in description):
        ranks: dict[str, list[int]] = {}
        for rank, description in enumerate(descriptions):
            ranks.setdefault(json.dumps(description.get(name)), []).append(rank)
        if len(ranks) > 1:
            rarest_first = sorted(ranks.items(), key=lambda item: len(item[1]))
            have = [f"{name_ranks(group)} {'has' if len(group) == 1 else 'have'} {value}"
                    for value, group in rarest_first]  # fmt: skip
            return f"ranks must agree about {name}: {', '.join(have)}"
    return "ranks must agree, and differ"


def describe_problem(problem: Problem) -> Description:
    """Describe a problem by its fields."""
    return {field.name: getattr(problem, field.name) for field in fields(Problem) if field.name not in _OWN}


def describe_lengths(lengths: Lengths) -> Description:
    """Describe lengths: one int and an array of equal numbers are the same."""
    arrays = {name: describe_values(array) for name, array in lengths.arrays.items() if array is not None}
    return arrays | {"seqlen_k_new": lengths.seqlen_k_new}


def describe_operands(operands: Operands) -> Description:
    """Describe what ranks share of a call's data: all but the caches and where results go."""
    rotary = operands.rotary
    shapes = {name: getattr(operands, name) for name in ("q", "qv", "k", "v")}
    return {
        **{name: None if array is None else describe_kind(array) for name, array in shapes.items()},
        **describe_lengths(operands.lengths),
        "softmax_scale": operands.softmax_scale,
        "softcap": operands.softcap,
        "rotary": None if rotary is None else [rotary.dim, rotary.interleaved],
        "rotary_seqlens": None if rotary is None or rotary.seqlens is None else describe_values(rotary.seqlens),
        "tree_mask": None if operands.tree_mask is None else describe_values(operands.tree_mask),
    }


def describe_kind(array: NativeArray) -> str:
    """Describe an array by its shape and elements."""
    return f"{array.dtype.name} {tuple(array.shape)}"


def describe_values(array: NativeArray) -> str | list[int]:
    """Describe an array by its values: themselves if they are few, else a digest."""
    host = np.ascontiguousarray(to_host(array))
    if host.ndim == 1 and host.size <= _FEW:
        return [int(number) for number in host]
    return f"{describe_kind(host)} {hashlib.blake2b(host.tobytes(), digest_size=8).hexdigest()}"
