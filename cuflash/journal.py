"""``CUFLASH_LOG``: a line of JSON for each call, with which ``cuflash replay`` runs it again, for a bug report.

Those of ``flash_attn_with_kvcache`` and ``get_scheduler_metadata`` write one, also where ``DecodeStep``,
``ContextParallel``, ``shared_prefix_attention`` or ``cuflash.compat`` makes them; those of ``flash_attn_varlen_func``,
``merge_attn_states`` and ``compile`` write none.

A line says the arguments (of arrays the layout, of index arrays what they hold, too), the kernels that ran with their
variants and launches, and how the call ended. What floating-point arrays hold is not kept: it is made up again.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from .arrays import import_array, to_host
from .dtypes import dtype_name, numpy_dtype
from .kv_cache import KVCache
from .memory import NativeArray, is_on_device, memory_of
from .metadata import SchedulerMetadata

VARIABLE = "CUFLASH_LOG"
OFF = ("", "0")
_MOST_VALUES = 2**20  # of an index array

launches: dict[int, list[Any]] = {}
"""Launches of the calls that are being written down, by thread; the backends add them."""


def write(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call a function and write a line about the call, whether it returns or raises.

    Args:
        function: The function.
        arguments: All its arguments by name.

    Returns:
        What it returns.
    """
    line: dict[str, Any] = {"call": function.__name__, "arguments": _all_described(arguments)}
    ran = launches[threading.get_ident()] = []
    begin = time.perf_counter()
    try:
        return function(**arguments)
    except Exception as error:
        line["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        del launches[threading.get_ident()]
        line["host_us"] = round(1e6 * (time.perf_counter() - begin), 1)
        line["launches"] = [
            f"{launch.variant} <<<{launch.grid}, {launch.threads}, {launch.shared_bytes}>>>" for launch in ran
        ]
        _append(json.dumps(line) + "\n")


def _append(text: str) -> None:
    where = os.environ.get(VARIABLE, "")
    if where in OFF:
        return
    try:
        if where in ("1", "stderr"):
            sys.stderr.write(text)
        else:
            with open(os.path.expanduser(where), "a") as file:  # opened anew, so that processes can share it
                file.write(text)
    except (OSError, ValueError, AttributeError) as error:  # a stderr that is closed is None, or raises ValueError
        # The call is done, and its caller needs the result.
        text = f"{VARIABLE} must name what can be written, got {where}: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=4)


def _all_described(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments as what JSON can say: each by itself, and which of them are one."""
    described = {name: _described(x) for name, x in arguments.items()}
    first: dict[int, str] = {}
    for name, x in arguments.items():
        if _is_array(described[name]) and first.setdefault(id(x), name) != name:
            described[name]["same_as"] = first[id(x)]
    caches = ("k_cache", "v_cache")
    if all(_is_array(described.get(name)) for name in caches) and _share_rows(*map(arguments.get, caches)):
        described["v_cache"].setdefault("columns_of", "k_cache")
    return described


def _is_array(described: Any) -> bool:
    return isinstance(described, dict) and "array" in described


def _share_rows(k: Any, v: Any) -> bool:
    """Whether values are the first columns of the keys' own rows."""
    try:
        return KVCache(import_array("k_cache", k), import_array("v_cache", v)).joint
    except (TypeError, ValueError, IndexError):
        return False


def _described(x: Any) -> Any:
    """Return an argument as what JSON can say."""
    if isinstance(x, np.generic):
        x = x.item()
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if isinstance(x, SchedulerMetadata):
        others = ("pack_gqa", "max_seqlen_k", "num_blocks")
        return {"plan": asdict(x.problem)} | {name: getattr(x, name) for name in others}
    if isinstance(x, (tuple, list)):
        return [_described(item) for item in x]
    try:
        array = import_array("argument", x)
    except (TypeError, ValueError):
        return _name_of(x)
    kind = {"array": array.dtype.name, "shape": list(array.shape), "strides": list(array.strides)}
    is_index = array.dtype.kind in "iub" and (array.dtype.itemsize > 1 or array.ndim < 3)  # and no cache of 8 bits
    if is_index and array.size <= _MOST_VALUES and not _captures(array):
        kind["values"] = to_host(array).tolist()
    return {**kind, "memory": memory_of(array), "of": type(x).__module__.partition(".")[0]}


def _name_of(x: Any) -> Any:
    """Return the name of an element type, or what else there is to say of something."""
    try:
        return {"other": str(x)} if hasattr(type(x), "__dlpack__") else dtype_name("argument", x)
    except (TypeError, ValueError):
        return {"other": str(x)}


def _captures(array: NativeArray) -> bool:
    """Whether looking at an array would break a capture."""
    return is_on_device(array) and bool(sys.modules["cupy"].cuda.get_current_stream().is_capturing())


# ---------------------------------------------------------------------------------------------------- running it again
def all_rebuilt(described: Mapping[str, Any], xp: Any, rng: np.random.Generator) -> dict[str, Any]:
    """Return the arguments that a line describes, but for its plan; see :func:`rebuilt`."""
    given: dict[str, Any] = {}
    for name, x in described.items():
        about = x if isinstance(x, dict) else {}
        if "same_as" in about:
            given[name] = given[about["same_as"]]
        elif "columns_of" in about:
            given[name] = given[about["columns_of"]][..., : about["shape"][-1]]
        elif "plan" not in about:
            given[name] = rebuilt(x, xp, rng)
    return given


def rebuilt(described: Any, xp: Any, rng: np.random.Generator) -> Any:
    """Return an argument made of what a line says about it.

    Args:
        described: From a line.
        xp: ``numpy`` or ``cupy``.
        rng: Where values come from that were not kept.

    Raises:
        ValueError: For an index array whose values were not kept, or what is no argument.
    """
    if isinstance(described, list):
        return tuple(rebuilt(item, xp, rng) for item in described)
    if not isinstance(described, dict):
        return described
    if "other" in described:
        return described["other"]
    name, shape, strides = described["array"], tuple(described["shape"]), described["strides"]
    dtype = numpy_dtype(name)
    if "values" in described:
        return xp.asarray(np.array(described["values"], dtype).reshape(shape))
    if dtype.kind in "iu" and dtype.itemsize > 1:
        raise ValueError("an index array's values are not in the line: it was written while a graph was captured")
    # An array whose axes lie in memory as those of the original did, with its gaps.
    steps = [abs(step) // dtype.itemsize for step in strides]
    elements = 1 + sum((size - 1) * step for size, step in zip(shape, steps)) if 0 not in shape else 0
    memory = np.empty(elements, dtype)
    memory[:] = rng.integers(0, 2, elements) if dtype.kind == "b" else _numbers(rng, elements, dtype)
    strides = [step * dtype.itemsize for step in steps]
    if xp is np:  # by the constructor: as_strided knows no float8_e5m2
        return np.ndarray(shape, dtype, memory.view(np.uint8), strides=strides)
    return xp.lib.stride_tricks.as_strided(xp.asarray(memory), shape, strides)


def _numbers(rng: np.random.Generator, size: int, dtype: np.dtype[Any]) -> Any:
    if dtype == np.uint8:
        return rng.integers(0, 0x60, size)  # float8 of moderate size
    if dtype == np.int8:
        return rng.integers(-127, 128, size)
    return rng.standard_normal(size, np.float32).astype(dtype)
