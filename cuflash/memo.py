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

from .arrays import import_device_array
from .layouts import NATIVE, is_in_order, readers
from .memory import NativeArray

_MOST = 64  # calls that a plan remembers
# os.environ as it lies beneath: two look-ups through it take 2 us, a fifth of a call.
_environment: Any = os.environ._data  # type: ignore[attr-defined]
_VALIDATE, _BACKEND = (os.environ.encodekey(name) for name in ("CUFLASH_VALIDATE", "CUFLASH_BACKEND"))
_PLAIN = frozenset((type(None), bool, int, float, str))  # types of which the value says everything

Function = TypeVar("Function", bound=Callable[..., Any])
Result = TypeVar("Result")
Arrays = dict[str, NativeArray]
Key = list[Any]


class Again(Protocol):
    """Does again what a call did, for calls of the same key."""

    def fits(self, addresses: list[int]) -> bool:
        """Whether it may: what no key can say."""

    def __call__(self, arrays: list[Any], addresses: list[int], plan: Any, foreign: dict[int, Any]) -> Any:
        """Return what the call returns; see :func:`spell`. The lists are its own, to be extended."""


class Calls(dict[Hashable, Again]):
    """Calls by their keys.

    Attributes:
        last: The key and the call that were found last. Most calls are like the one before, and to compare two keys
            takes a third of the time of a look-up. One tuple, so that other threads see both or neither.
    """

    last: tuple[Key | None, Again | None] = None, None

    def find(self, key: Key) -> Again | None:
        """Return the call of a key, None if it is not remembered or cannot be compared."""
        try:
            again = self.get(tuple(key))
        except TypeError:
            return None
        if again is not None:
            self.last = key, again
        return again

    def remember(self, key: Key, again: Again) -> None:
        """Remember a call, if its key can be compared."""
        if len(self) >= _MOST:
            self.clear()
        try:
            self[tuple(key)] = again
        except TypeError:
            pass

    def clear(self) -> None:
        """Forget all calls."""
        super().clear()
        self.last = None, None


unplanned = Calls()  # calls without a plan


class Plan:
    """What a plan has that calls are remembered by.

    Attributes:
        calls: Those that were given it.
        max_seqlen_k: What decides about a call and changes when the plan is refilled.
    """

    calls: Calls
    max_seqlen_k: int


Spelling = tuple[Key | None, Plan | None, list[Any], list[int], dict[int, Any]]
_UNKNOWN: Spelling = None, None, [], [], {}


def spell(function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Spelling:
    """Return what a call was given, and what it is told apart by.

    Args:
        function: The function's name.
        args: Its positional arguments.
        kwargs: Its others.

    Returns:
        key: What decides about the call; None if it must be checked anew whatever came before: arrays whose values are
            checked (on the host, or under ``CUFLASH_VALIDATE``).
        plan: The plan among its arguments.
        arrays: Its arrays in their order, as native ones; but tensors themselves where no stream has to wait.
        addresses: Where they begin.
        foreign: Those that came as another framework's, by their places.
    """
    if _VALIDATE in _environment:
        return _UNKNOWN
    key: Key = [function, _environment.get(_BACKEND), *kwargs]
    plan: Plan | None = None
    arrays: list[Any] = []
    addresses: list[int] = []
    foreign: dict[int, Any] = {}
    device: Any = None  # of tensors
    given = [*args, *kwargs.values()]
    # Types come first: they say how many entries follow. And True == 1, but not every argument that takes the one takes
    # the other.
    for x in given:
        kind = type(x)
        read = readers[kind]
        if read is not NATIVE:
            if read is not None:
                said = read(x)
                if said is None:
                    return _UNKNOWN
                address, layout = said
                key += kind, address & 15, layout
                foreign[len(arrays)] = x
                arrays.append(x)
                addresses.append(address)
                device = layout[0]
                continue
            if kind in _PLAIN:
                key += kind, x
                continue
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
            x = _imported(x)
            if x is None:
                return _UNKNOWN
            kind = type(x)
        data = x.data
        address = data.ptr
        # Of an address counts how it is aligned: kernels read by 16 bytes.
        key += kind, data.device_id, address & 15, x.shape, x.strides, x.dtype
        arrays.append(x)
        addresses.append(address)
    if device is not None and device.type != "cuda":
        return _UNKNOWN
    if device is not None and not is_in_order(device.index):
        natives = _without_tensors(arrays, foreign)
        if natives is None:
            return _UNKNOWN
        arrays = natives
    return key, plan, arrays, addresses, foreign


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
        name, parameters = function.__name__, tuple(inspect.signature(function).parameters)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            key, plan, arrays, addresses, foreign = spell(name, args, kwargs)
            if key is None:
                return function(*args, **kwargs).result
            calls = unplanned if plan is None else plan.calls
            last, again = calls.last
            if key != last:
                again = calls.find(key)
            if again is not None and again.fits(addresses):
                return again(arrays, addresses, plan, foreign)
            result, prepare = function(*args, **kwargs)
            natives = None if prepare is None else _without_tensors(arrays, foreign)
            if natives is not None:
                names = _names({**dict(zip(parameters, args)), **kwargs}, pairs)
                again = prepare(dict(zip(names, natives)))
                if again is not None:
                    calls.remember(key, again)
            return result

        return call  # type: ignore[return-value]

    return decorate


def is_remembered(function: str, kwargs: dict[str, Any]) -> bool:
    """Whether a call with these arguments would be a repeated one, of which nothing is checked any more."""
    key, plan, _, addresses, _ = spell(function, (), kwargs)
    again = None if key is None else (unplanned if plan is None else plan.calls).find(key)
    return again is not None and again.fits(addresses)


class Rest:
    """Arguments that many calls of a function have in common, which are spelled once.

    So is the view that the function wants of the others: a repeated call makes none, since it works on addresses.
    """

    def __init__(self, function: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        """Spell them.

        Args:
            function: A function that is :func:`repeatable`.
            kwargs: The arguments, a plan among them. They are kept, and must stay as they are.
        """
        self._function, self._kwargs = function, kwargs
        self._key, self._plan, self._arrays, self._addresses, foreign = spell("", (), kwargs)
        if foreign:
            self._key = None  # their streams must be looked at in every call

    def __call__(self, given: dict[str, Any], view: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
        """Call the function with other arguments, too.

        Args:
            given: The arguments.
            view: Makes of them what the function takes: of arrays, views of the same memory that follow from shape and
                strides.
        """
        key, _, arrays, addresses, foreign = spell("", (), given)
        plan = self._plan
        if key is None or self._key is None or plan is None:
            return self.afresh(given, view)
        key += self._key
        arrays += self._arrays
        addresses += self._addresses
        last, again = plan.calls.last
        if key != last:
            again = plan.calls.find(key)
        if again is not None and again.fits(addresses):
            return again(arrays, addresses, plan, foreign)
        result = self.afresh(given, view)
        whole, _, _, viewed, _ = spell(self._function.__name__, (), view(given) | self._kwargs)
        again = None if whole is None or viewed != addresses else plan.calls.find(whole)
        if again is not None:
            plan.calls.remember(key, again)
        return result

    def afresh(self, given: dict[str, Any], view: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
        """Call the function, whatever is remembered here."""
        return self._function(**view(given), **self._kwargs)


def _names(given: dict[str, Any], pairs: dict[str, tuple[str, str]]) -> list[str]:
    """Return the names of the arrays among arguments, in the order of :func:`spell`."""
    parts = [zip(pairs[name], x) for name, x in given.items() if name in pairs and isinstance(x, tuple)]
    return [name for items in (given.items(), *parts) for name, x in items if _is_array(x)]


def _without_tensors(arrays: list[Any], foreign: dict[int, Any]) -> list[NativeArray] | None:
    """Import the tensors among arrays: work on the result waits for torch's stream. None if one cannot be imported."""
    natives = [_imported(x) if x is foreign.get(place) else x for place, x in enumerate(arrays)]
    return None if any(native is None for native in natives) else natives


def _imported(x: Any) -> NativeArray | None:
    """Import an array on a GPU; None for what is on the host, or what the function will refuse by its name."""
    try:
        return import_device_array("array", x)
    except (TypeError, ValueError, ImportError):
        return None


def _is_array(x: Any) -> bool:
    return hasattr(type(x), "__dlpack__")
