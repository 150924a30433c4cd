"""Calls that repeat: what one call has checked and prepared serves all that differ from it in addresses alone.

A model calls attention once per layer, with other arrays of the same shapes, and refills a plan once per step. A plan
remembers such calls by everything that decides about a call but the addresses (and, on a GPU, what the arrays hold).
Calls that plan for themselves are remembered here.

The key of a call is derived from the signature of its function: every parameter counts, as an array or as an option.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Hashable
from operator import itemgetter
from typing import Any

from .arrays import NativeArray, import_device_array, is_device_type
from .dlpack import float8_name

_MOST = 64  # calls that a plan remembers
# os.environ as it lies beneath: two look-ups through it take 2 us, a tenth of a call.
_environment: Any = os.environ._data  # type: ignore[attr-defined]
_VALIDATE, _BACKEND = (os.environ.encodekey(name) for name in ("CUFLASH_VALIDATE", "CUFLASH_BACKEND"))

Calls = dict[Hashable, Any]
Arrays = dict[str, NativeArray | None]

unplanned: Calls = {}  # calls without a plan


class Signature:
    """How the calls of one function are told apart.

    Attributes:
        arrays: Parameters that are arrays: their layouts count.
        options: All other parameters, but those that the caller says he accounts for: their values and types count.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arrays: tuple[str, ...],
        accounted_for: str,
        pairs: dict[str, tuple[str, str]] | None = None,
    ) -> None:
        """Derive the signature.

        Args:
            function: The function.
            arrays: Names of its array parameters.
            accounted_for: The parameter that chooses the memory to look in (a plan).
            pairs: Parameters that may be a pair of arrays, and the names of the two.
        """
        parameters = inspect.signature(function).parameters
        self._parts = dict(pairs or {})
        arrays += tuple(name for name in self._parts if name not in arrays)
        unknown = [name for name in (*arrays, accounted_for) if name not in parameters]
        if unknown:
            raise TypeError(f"{function.__name__} has no parameter {', '.join(unknown)}")
        self.arrays = arrays
        self.options = tuple(name for name in parameters if name not in arrays and name != accounted_for)
        self._pairs = [i for i, name in enumerate(self.options) if isinstance(parameters[name].default, tuple)]
        self._arrays_of, self._options_of = itemgetter(*arrays), itemgetter(*self.options)
        absent = tuple(part for parts in self._parts.values() for part in parts)
        self._names, self._absent = arrays + absent, (None,) * len(absent)

    def find(self, calls: Calls, given: dict[str, Any], *more: Hashable) -> tuple[Hashable | None, Any, Arrays]:
        """Find what is remembered of a call.

        Args:
            calls: Where to look.
            given: All arguments by name.
            more: What decides about the call beside its arguments.

        Returns:
            The key to remember the call by, what was remembered under it or None, and the arrays as native ones. No
            key for a call that must be checked anew whatever came before: arrays whose values are checked (on the
            host, or under ``CUFLASH_VALIDATE``), options that cannot be compared.
        """
        if _VALIDATE in _environment:
            return None, None, {}
        arrays = self._arrays_of(given) + self._absent
        for name in self._parts:
            if type(given[name]) is tuple:
                arrays = self._taken_apart(name, arrays)
        layouts: list[Hashable] = []
        native = None  # the type of the array before
        for index, x in enumerate(arrays):
            if x is None:
                layouts.append(None)
                continue
            kind = type(x)
            if kind is int or kind is float:  # stands for an array of equal numbers
                layouts.append(x)
                continue
            if kind is not native:
                if not is_device_type(kind):
                    layouts.append(float8_name(x))  # which comes as uint8
                    x = import_device_array(self._names[index], x)
                    if x is None:
                        return None, None, {}
                    arrays = (*arrays[:index], x, *arrays[index + 1 :])
                native = type(x)
            data = x.data
            # Of an address counts how it is aligned: kernels read by 16 bytes.
            layouts += x.shape, x.strides, x.dtype.num, data.device_id, data.ptr & 15
        options = self._options_of(given)
        # Types too: True == 1, but not every argument that takes the one takes the other.
        kinds = tuple(map(type, options))
        for index in self._pairs:
            if kinds[index] is tuple:
                kinds += tuple(map(type, options[index]))
        key = tuple(layouts), options, kinds, _environment.get(_BACKEND), more
        try:
            return key, calls.get(key), dict(zip(self._names, arrays))
        except TypeError:
            return None, None, {}

    def _taken_apart(self, name: str, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arrays with the two of a pair in their own places; one that is no pair stays, for an error."""
        places, parts = self._names.index, self._parts[name]
        taken = list(arrays)
        pair = taken[places(name)]
        if len(pair) == len(parts):
            taken[places(name)] = None
            for part, array in zip(parts, pair):
                taken[places(part)] = array
        return tuple(taken)


def remember(calls: Calls, key: Hashable | None, call: Any) -> None:
    """Add a call, if it has a key; the table starts anew when it is full."""
    if key is not None:
        if len(calls) >= _MOST:
            calls.clear()
        calls[key] = call
