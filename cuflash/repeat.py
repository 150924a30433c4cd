"""Calls that repeat: what one call has checked and prepared serves all that differ from it in addresses alone.

A model calls attention once per layer, with other arrays of the same shapes, and refills a plan once per step. A plan
remembers such calls by their signatures: everything that decides about a call but the addresses (and, on a GPU, what
the arrays hold). Calls that plan for themselves are remembered here.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from typing import Any

from .arrays import is_device_type

_MOST = 64  # calls that a plan remembers

Calls = dict[Hashable, Any]

unplanned: Calls = {}  # calls without a plan


def find(
    calls: Calls, arrays: Sequence[Any], options: tuple[Any, ...], window_size: Any
) -> tuple[Hashable | None, Any]:
    """Find what a plan remembers of a call.

    Args:
        calls: What it remembers.
        arrays: All array arguments, None for those that are not given.
        options: All other arguments but one.
        window_size: That one, a tuple if all is well.

    Returns:
        The call's signature and what was remembered under it, or None. Without a signature the call must be checked
        anew: arrays whose values are checked (on the host, or under ``CUFLASH_VALIDATE``), arrays of other frameworks,
        options that cannot be compared.
    """
    kinds = set(map(type, arrays))
    kinds.discard(type(None))
    if len(kinds) != 1 or type(window_size) is not tuple:
        return None, None
    if not is_device_type(kinds.pop()) or "CUFLASH_VALIDATE" in os.environ:
        return None, None
    layouts = tuple([None if x is None else (x.shape, x.strides, x.dtype, x.data.device_id) for x in arrays])
    options += window_size
    # Types too: True == 1, but not every argument that takes the one takes the other.
    signature = layouts, options, tuple(map(type, options)), os.environ.get("CUFLASH_BACKEND")
    try:
        return signature, calls.get(signature)
    except TypeError:
        return None, None


def remember(calls: Calls, signature: Hashable | None, call: Any) -> None:
    """Add a call, if it has a signature; the table starts anew when it is full."""
    if signature is not None:
        if len(calls) >= _MOST:
            calls.clear()
        calls[signature] = call
