"""A call of ``flash_attn_with_kvcache`` that has been checked and prepared, for calls like it; see ``memo.py``."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from . import memo
from .arrays import exporter, refuse_in_capture
from .layouts import new_array
from .memory import NativeArray, address_of, is_on_device, is_same, span_of
from .metadata import SchedulerMetadata
from .operands import Operands

_CACHES = ("k_cache", "v_cache")
_DESCALES = ("k_descale", "v_descale")
_VIEWS = (*_CACHES, "q_descale", *_DESCALES)  # of what was given, and never copied
_RESULTS = ("out", "softmax_lse")  # made if they were not given


def came_as_they_are(operands: Operands, arrays: memo.Arrays) -> bool:
    """Whether no array had to be copied: a repeated call hands them on as they are."""
    return all(
        is_same(array, arrays[name])
        for name, array in operands.arrays.items()
        if array is not None and name in arrays and name not in _VIEWS
    )


class RepeatedCall:
    """A call that has been checked and prepared, for calls of the same key.

    Its arrays have places: first those that it is given, in their order, then those that it makes, and a plan.
    """

    def __init__(
        self,
        backend: Any,
        step: Any,
        words: tuple[int, ...] | None,
        operands: Operands,
        arrays: memo.Arrays,
        returns_lse: bool,
    ) -> None:
        """Remember what the call prepared, and none of the caller's arrays.

        Args:
            backend: Who runs it.
            step: The launches, with the planner's for a call without a plan.
            words: The shape of a plan's array, for a call without a plan.
            operands: The data of the first call.
            arrays: Its arrays by argument as they came, in their order.
            returns_lse: Whether it returns the LSE, too.
        """
        used = {name: array for name, array in operands.arrays.items() if array is not None}
        new = {name: used[name] for name in _RESULTS if name in used and name not in arrays}
        made = {name: used[name] for name in used if name not in arrays and name not in new}  # of numbers
        names = [*arrays, *made, *new, "plan"]
        places = {name: place for place, name in enumerate(names)}
        # What was given and has no partner is ignored.
        ignored = dict.fromkeys(operands.arrays.keys() - used.keys())
        self._backend, self._step = backend, backend.bind(step, places | ignored, len(names))
        self._plans, self._new = words is not None, [(array.shape, array.dtype.name) for array in new.values()]
        if words is not None:
            self._new.append((words, "int32"))
        self._made, self._made_addresses = list(made.values()), [address_of(array) for array in made.values()]
        self._returned = [places[name] for name in _RESULTS[: 1 + returns_lse]]
        self._results = itemgetter(*self._returned)
        self._num_given, self._q, self._gpu = len(arrays), places["q"], operands.q.data.device_id
        self._twins = [
            (places[one], places[other], address_of(arrays[one]) == address_of(arrays[other]))
            for one, other in (_CACHES, _DESCALES)
            if one in arrays and other in arrays
        ]
        pairs = {frozenset(pair): pair for pair in operands.kept_apart()}
        self._apart = [
            (places[one], places[other], *_distances(arrays[one], arrays[other]))
            for one, other in pairs.values()
            if one in arrays and other in arrays
        ]

    def fits(self, addresses: list[int]) -> bool:
        """What no key can say: that values still are the keys' own columns or are not, and what shares memory."""
        for place, other_place, is_one in self._twins:
            if (addresses[place] == addresses[other_place]) != is_one:
                return False
        for place, other_place, below, above, known in self._apart:
            distance = addresses[place] - addresses[other_place]
            if below < distance < above and distance != known:
                return False
        return True

    def __call__(
        self, arrays: list[Any], addresses: list[int], plan: SchedulerMetadata | None, foreign: dict[int, Any]
    ) -> Any:
        """Attend, on a new plan without one."""
        q = arrays[self._q]
        if self._plans:
            refuse_planning_in_capture(q)
        arrays += self._made
        addresses += self._made_addresses
        for shape, dtype in self._new:
            array, address = new_array(shape, dtype, q)
            arrays.append(array)
            addresses.append(address)
        if plan is not None:
            arrays.append(plan.array)
            addresses.append(plan.array.data.ptr)
        self._backend.repeat(self._step, self._gpu, arrays, addresses)
        if foreign:
            q = foreign.get(self._q, q)
            for place in self._returned:
                native = arrays[place]
                arrays[place] = in_kind(native, foreign.get(place, native) if place < self._num_given else None, q)
        return self._results(arrays)


def _distances(array: NativeArray, other: NativeArray) -> tuple[int, int, int]:
    """Return between which distances of an array behind another their spans meet, and the distance that they have."""
    (begin, end), (other_begin, other_end) = span_of(array), span_of(other)
    distance = address_of(array) - address_of(other)
    return other_begin - end + distance, other_end - begin + distance, distance


def in_kind(native: NativeArray, mine: Any, q: Any) -> Any:
    """Return the caller's own output, or without one an array of the queries' kind."""
    if mine is native or (mine is None and type(native) is type(q)):
        return native
    # Exported also where it was given: that makes a framework's own stream wait for the result.
    exported = exporter(q if mine is None else mine)(native)
    return exported if mine is None else mine


def refuse_planning_in_capture(q: NativeArray) -> None:
    """Raise ValueError while a graph is captured, for a call without a plan: its plan would not outlive the call."""
    if is_on_device(q):
        refuse_in_capture("scheduler_metadata", "be given")
