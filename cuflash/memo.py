"""Calls that repeat: what one call has checked and prepared serves all that differ from it in addresses alone.

A model calls attention once per layer, with other arrays of the same shapes, and refills a plan once per step. A plan
remembers such calls by everything that decides about a call but the addresses (and, on a GPU, what the arrays hold).
Calls that plan for themselves are remembered here.

The key of a call is what the caller spells: every argument that he gives counts, and what he does not give is a default
that never changes. So a call costs what it gives, however many parameters its function has.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, NamedTuple, Protocol, TypeVar

from .arrays import NativeArray, device_types, import_device_array

_MOST = 64  # calls that a plan remembers
# os.environ as it lies beneath: two look-ups through it take 2 us, a fifth of a call.
_environment: Any = os.environ._data  # type: ignore[attr-defined]
_VALIDATE, _BACKEND = (os.environ.encodekey(name) for name in ("CUFLASH_VALIDATE", "CUFLASH_BACKEND"))
_PLAIN = frozenset((type(None), bool, int, float, str))  # types of which the value says everything

Function = TypeVar("Function", bound=Callable[..., Any])
Result = TypeVar("Result")
Calls = dict[Hashable, Any]
Arrays = dict[str, NativeArray]

unplanned: Calls = {}  # calls without a plan


class Plan:
    """What a plan has that calls are remembered by.

    Attributes:
        calls: Those that were given it.
        max_seqlen_k: What decides about a call and changes when the plan is refilled.
    """

    calls: Calls
    max_seqlen_k: int


class Again(Protocol):
    """Does again what a call did, for calls of the same key."""

    def fits(self, addresses: list[int]) -> bool:
        """Whether it may: what no key can say."""

    def __call__(self, arrays: list[NativeArray], addresses: list[int], plan: Any, foreign: dict[int, Any]) -> Any:
        """Return what the call returns; see :class:`Spelling`."""


class Spelling(NamedTuple):
    """What a call was given.

    Attributes:
        key: What decides about the call; None if it must be checked anew whatever came before: arrays whose values are
            checked (on the host, or under ``CUFLASH_VALIDATE``).
        plan: The plan among its arguments.
        arrays: Its arrays in their order, as native ones.
        addresses: Where they begin.
        foreign: Those that came as another framework's, by their places.
    """

    key: Hashable | None
    plan: Plan | None
    arrays: list[NativeArray]
    addresses: list[int]
    foreign: dict[int, Any]


_UNKNOWN = Spelling(None, None, [], [], {})


def spell(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Spelling:
    """Return what a call is told apart by.

    Args:
        function: The function.
        args: Its positional arguments.
        kwargs: Its others.
    """
    if _VALIDATE in _environment:
        return _UNKNOWN
    key: list[Any] = [function, _environment.get(_BACKEND), *kwargs]
    plan: Plan | None = None
    arrays: list[NativeArray] = []
    addresses: list[int] = []
    foreign: dict[int, Any] = {}
    given = [*args, *kwargs.values()]
    # Types come first: they say how many entries follow. And True == 1, but not every argument that takes the one takes
    # the other.
    for x in given:
        kind = type(x)
        if kind in _PLAIN:
            key += kind, x
            continue
        if kind not in device_types:
            if isinstance(x, Plan):
                key += kind, x.max_seqlen_k
                plan = x
                continue
            if isinstance(x, tuple):
                key += kind, len(x)
                given += x  # they come behind all others
                continue
            if not _is_array(x):
                key += kind, x
                continue
            key += kind, getattr(x, "dtype", None)  # float8 comes as uint8
            foreign[len(arrays)] = x
            try:
                x = import_device_array("array", x)
            except (TypeError, ValueError, ImportError):
                x = None  # the function refuses it by its name
            if x is None:
                return _UNKNOWN
            kind = type(x)
        data = x.data
        address = data.ptr
        # Of an address counts how it is aligned: kernels read by 16 bytes.
        key += kind, x.shape, x.strides, x.dtype.num, data.device_id, address & 15
        arrays.append(x)
        addresses.append(address)
    return Spelling(tuple(key), plan, arrays, addresses, foreign)


class _First(NamedTuple):
    result: Any
    prepare: Callable[[Arrays], Again | None] | None


def first(result: Result, prepare: Callable[[Arrays], Again | None] | None) -> Result:
    """Return what a function returns that is :func:`repeatable`.

    Args:
        result: What its caller gets.
        prepare: Returns what does the same again, given the call's arrays by name, in their order; None if nothing may.
    """
    return _First(result, prepare)  # type: ignore[return-value]


def repeatable(**pairs: tuple[str, str]) -> Callable[[Function], Function]:
    """Let calls of a function be remembered, which returns what :func:`first` makes of its result.

    Args:
        pairs: Parameters that may be a pair of arrays, and the names of the two.
    """

    def decorate(function: Function) -> Function:
        parameters = tuple(inspect.signature(function).parameters)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            key, plan, arrays, addresses, foreign = spell(function, args, kwargs)
            calls = unplanned if plan is None else plan.calls
            try:
                again = calls.get(key)
            except TypeError:  # an argument that cannot be compared
                key = again = None
            if again is not None and again.fits(addresses):
                return again(arrays, addresses, plan, foreign)
            result, prepare = function(*args, **kwargs)
            if key is not None and prepare is not None:
                names = _names({**dict(zip(parameters, args)), **kwargs}, pairs)
                again = prepare(dict(zip(names, arrays)))
                if again is not None:
                    if len(calls) >= _MOST:
                        calls.clear()
                    calls[key] = again
            return result

        return call  # type: ignore[return-value]

    return decorate


def _names(given: dict[str, Any], pairs: dict[str, tuple[str, str]]) -> list[str]:
    """Return the names of the arrays among arguments, in the order of :class:`Spelling`."""
    parts = [zip(pairs[name], x) for name, x in given.items() if name in pairs and isinstance(x, tuple)]
    return [name for items in (given.items(), *parts) for name, x in items if _is_array(x)]


def _is_array(x: Any) -> bool:
    return hasattr(type(x), "__dlpack__")
