"""Launches and steps as data: all that a machine needs to run them but the addresses of the arrays."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from operator import itemgetter
from struct import Struct
from typing import Any, NamedTuple

import numpy as np

from ..memory import NativeArray, strides_of
from .boxes import MAP_BYTES, Boxed
from .source import Variant, field_paths, struct_dtype

ABSENT = ""  # the array of a null pointer
_POINTER = 8  # bytes
_MOST_MAPS = 1024  # of a launch, that are kept: as many as a model has layers, and more
ROW_WARPS = 4  # warps of a block of append and merge, a row each


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        variant: The kernel.
        grid: Blocks.
        threads: Threads of a block.
        shared_bytes: Dynamic shared memory of a block.
        struct: The dtype of the kernel's one parameter.
        template: The parameter's bytes, pointers zero.
        pointers: The name of the array of each of its pointers, in their order.
        offsets: Where in the parameter each of them stands.
        boxed: The names of the arrays whose tensor maps the parameter begins with, and what they are.
    """

    variant: Variant
    grid: int
    threads: int
    shared_bytes: int
    struct: np.dtype[Any]
    template: bytes
    pointers: tuple[str, ...]
    offsets: tuple[int, ...]
    boxed: tuple[tuple[str, Boxed], ...] = ()


@dataclass(frozen=True)
class Scratch:
    """Memory that the launches of a step pass results in, and that nobody else sees.

    Attributes:
        shape: Its shape.
        dtype: Its elements.
        zeroed: Whether kernels expect zeros, and leave them behind.
        passed_on: Whether one launch writes it for another, so that no other thread may use it in between.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    zeroed: bool = False
    passed_on: bool = False

    @cached_property
    def nbytes(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Step:
    """Launches one after the other.

    Attributes:
        launches: In their order.
        scratch: By the names that pointers of the launches have for it.
    """

    launches: tuple[Launch, ...]
    scratch: tuple[tuple[str, Scratch], ...] = ()


@dataclass(frozen=True)
class BoundLaunch:
    """A launch whose arrays have places in a list.

    Attributes:
        launch: The launch; of its pointers those that are not null.
        places: The place of the array of each of its pointers.
        boxed: The place of the array of each of its tensor maps.
    """

    launch: Launch
    places: tuple[int, ...]
    boxed: tuple[int, ...] = ()

    def packing(self, count: int, scratch: Sequence[int], encode: Callable[[Boxed, int], bytes]) -> Packing:
        """Return how its parameter is made of the addresses of the call's arrays.

        Args:
            count: How many arrays the call has.
            scratch: The addresses of the scratch, whose places are behind these: they stay.
            encode: Makes a tensor map of a tensor and its address.
        """
        template = bytearray(self.launch.template)
        layout, begin = "=", MAP_BYTES * len(self.boxed)
        words: list[int] = []
        constants: list[bytes] = []
        for offset, place in zip((*self.launch.offsets, len(template)), (*self.places, None)):
            if place is not None and place >= count:
                template[offset : offset + _POINTER] = scratch[place - count].to_bytes(_POINTER, sys.byteorder)
                continue
            if offset > begin:
                layout += f"{offset - begin}s"
                words.append(count + len(constants))
                constants.append(bytes(template[begin:offset]))
            if place is not None:
                layout += "Q"
                words.append(place)
            begin = offset + _POINTER
        pack = Struct(layout).pack
        if self.boxed:
            maps = lru_cache(_MOST_MAPS)(partial(_maps, encode, [boxed for _, boxed in self.launch.boxed]))
            words, pack = [*self.boxed, *words], partial(_pack_behind_maps, maps, len(self.boxed), pack)
        return Packing(itemgetter(*words), pack, tuple(constants))


def _maps(encode: Callable[[Boxed, int], bytes], boxed: Sequence[Boxed], *addresses: int) -> bytes:
    """Return the tensor maps of tensors at their addresses."""
    return b"".join(map(encode, boxed, addresses))


def _pack_behind_maps(maps: Callable[..., bytes], count: int, pack: Callable[..., bytes], *parts: Any) -> bytes:
    """Return the tensor maps of so many addresses, which come first, and behind them what the other parts become."""
    return maps(*parts[:count]) + pack(*parts[count:])


class Packing(NamedTuple):
    """How a parameter is made: of addresses, and of the bytes between them, which never change.

    Attributes:
        words: Takes its parts out of the list of the addresses of the call's arrays, with the constants behind them.
        pack: Makes the parameter of the parts.
        constants: The bytes between the addresses.
    """

    words: Callable[[Sequence[Any]], tuple[Any, ...]]
    pack: Callable[..., bytes]
    constants: tuple[bytes, ...]


@dataclass(frozen=True)
class BoundStep:
    """A step whose arrays have places in a list: of those of the call, and behind them the scratch.

    Attributes:
        launches: In their order.
        scratch: By name.
        count: How many arrays the call has.
        ready: What a machine has prepared, by its key: see ``backends/machine.py``.
    """

    launches: tuple[BoundLaunch, ...]
    scratch: tuple[tuple[str, Scratch], ...]
    count: int
    ready: dict[Hashable, Any]


def bind(step: Step, given: Mapping[str, int | None], count: int) -> BoundStep:
    """Return a step on arrays that have places.

    Args:
        step: The step.
        given: The place of every array that its pointers name, but for scratch; None is a null pointer.
        count: How many places there are.
    """
    places = {**given, ABSENT: None, **{name: count + i for i, (name, _) in enumerate(step.scratch)}}
    launches = []
    for launch in step.launches:
        pointers = zip(launch.pointers, launch.offsets, (places[name] for name in launch.pointers))
        names, offsets, arrays = zip(*(pointer for pointer in pointers if pointer[2] is not None))
        boxed = tuple(place for name, _ in launch.boxed if (place := given[name]) is not None)
        launches.append(BoundLaunch(replace(launch, pointers=names, offsets=offsets), arrays, boxed))
    return BoundStep(tuple(launches), step.scratch, count, {})


def make_launch(
    variant: Variant,
    struct: str,
    grid: int,
    threads: int,
    shared_bytes: int,
    values: Mapping[str, Any],
    arrays: Mapping[str, str] | None = None,
    boxed: Sequence[tuple[str, Boxed]] = (),
) -> Launch:
    """Return a launch.

    Args:
        variant: The kernel.
        struct: Name of its parameter struct.
        grid: Blocks.
        threads: Threads of a block.
        shared_bytes: Dynamic shared memory of a block.
        values: Every number of the struct, by its path: ``outer.inner`` for one in a nested struct.
        arrays: The arrays of pointers that are not called as their arrays.
        boxed: The arrays of the tensor maps with which the struct begins, and what they are; none leaves zeros.

    Raises:
        TypeError: If a field is not supplied, or one that the struct does not have.
    """
    dtype = struct_dtype(variant.file, struct)
    numbers, pointers = _fields(variant.file, struct)
    wrong = numbers.keys() ^ values.keys() | set(arrays or ()) - pointers.keys()
    if wrong:
        raise TypeError(f"{struct} and what is supplied differ in {', '.join(sorted(wrong))}")
    template = bytearray(dtype.itemsize)
    for path, value in values.items():
        field, offset = numbers[path]
        template[offset : offset + field.itemsize] = np.array(value, field).tobytes()
    names = {name: name for name in pointers} | dict(arrays or {})
    return Launch(
        variant,
        grid,
        threads,
        shared_bytes,
        dtype,
        bytes(template),
        tuple(names[name] for name in pointers),
        tuple(pointers.values()),
        tuple(boxed),
    )


@lru_cache(maxsize=None)
def _fields(file: str, struct: str) -> tuple[dict[str, tuple[np.dtype[Any], int]], dict[str, int]]:
    """Return the dtypes and offsets of a struct's numbers by their paths, and the offsets of its pointers by name."""
    numbers, pointers = {}, {}
    for path, field, offset in field_paths(struct_dtype(file, struct)):
        if field == np.uint64:
            pointers[path.rpartition(".")[2]] = offset  # called as its array, whatever nested struct it stands in
        elif field.kind != "V":  # no tensor map
            numbers[path] = field, offset
    return numbers, pointers


def element_strides(array: NativeArray) -> tuple[int, ...]:
    """Return strides in elements."""
    return tuple(stride // array.itemsize for stride in strides_of(array))


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides in elements of a new array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def row_strides(name: str, strides: tuple[int, ...], ragged: bool) -> dict[str, int]:
    """Return the fields of the strides of queries or outputs: (batch, seqlen, heads, dim), or (total, heads, dim)."""
    batch = 0 if ragged else strides[0]
    return {f"{name}_batch_stride": batch, f"{name}_row_stride": strides[-3], f"{name}_head_stride": strides[-2]}
