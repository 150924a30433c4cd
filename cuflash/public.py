"""What all calls of the public functions pass through: other libraries' names, and the journal."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from . import journal
from .arguments.hints import hint_at

Function = TypeVar("Function", bound=Callable[..., Any])

# os.environ as it lies beneath, as in memo.py: a look-up through it takes a microsecond.
_environment: Any = os.environ._data  # type: ignore[attr-defined]
_LOG = os.environ.encodekey(journal.VARIABLE)
_OFF = (None, *map(os.environ.encodevalue, journal.OFF))


def is_written_down() -> bool:
    """Whether ``CUFLASH_LOG`` asks for calls to be written down."""
    return _environment.get(_LOG) not in _OFF


def public(function: Function) -> Function:
    """Name our argument in the TypeError about an unknown one, and write calls down if ``CUFLASH_LOG`` asks.

    It is done outside of the function, since only the signature itself keeps unknown arguments out; a call that is
    right pays half a microsecond.

    Args:
        function: A public function.

    Returns:
        The function with its own name, documentation and signature.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            if is_written_down():
                bound = signature.bind(*args, **kwargs)
                return journal.write(function, bound.arguments)
            return function(*args, **kwargs)
        except TypeError:
            hint = hint_at(kwargs, signature.parameters)
            if hint is not None:
                raise TypeError(f"{function.__name__}() {hint}") from None
            raise

    return call  # type: ignore[return-value]
