"""Names of element types: one spelling for strings, NumPy, ml_dtypes and framework dtypes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

FLOAT_DTYPES = ("float16", "bfloat16", "float32")
QUANTISED_DTYPES = ("float8_e4m3fn", "float8_e5m2", "int8")
QUERY_DTYPES = (*FLOAT_DTYPES, "float8_e4m3fn")

# Not float8_e4m3, which is the name of another format: it has infinities, and no number beyond 240.
_ALIASES = {
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "float": "float32",
    "e4m3": "float8_e4m3fn",
    "fp8": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
}


def dtype_name(name: str, dtype: Any, allowed: tuple[str, ...] = FLOAT_DTYPES + QUANTISED_DTYPES) -> str:
    """Return the one spelling of a dtype, for example "bfloat16".

    Args:
        name: The argument's name, for the error.
        dtype: A string, a NumPy or ml_dtypes dtype or scalar type, or a framework's dtype (``torch.bfloat16``).
        allowed: Names that the argument may have.

    Returns:
        The canonical name.

    Raises:
        TypeError: If ``dtype`` is not a dtype.
        ValueError: If it is none of those allowed.
    """
    if dtype is None:  # for NumPy that is float64
        raise TypeError(f"{name} must be a dtype or its name, got None")
    if isinstance(dtype, str):
        text = dtype
    else:
        try:
            text = np.dtype(dtype).name
        except (TypeError, ValueError):  # ValueError: it has a dtype, which is none of NumPy's
            # torch.bfloat16 prints as "torch.bfloat16": take it without importing torch.
            text = str(dtype).rpartition(".")[2] if type(dtype).__name__ == "dtype" else ""
            if not text:
                raise TypeError(f"{name} must be a dtype or its name, got {type(dtype).__name__}") from None
    text = _ALIASES.get(text, text)
    if text not in allowed:
        hint = ": bits of bfloat16 are view(ml_dtypes.bfloat16)" if text in ("uint16", "int16") else ""
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {text!r}{hint}")
    return text


@lru_cache(maxsize=None)
def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy (or ml_dtypes) dtype of a canonical name."""
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)
