"""CUDA sources, their compiled variants, and the parameter structs that are read from them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ..dtypes import numpy_dtype

_ELEMENTS = {"float16": "Float16", "bfloat16": "BFloat16", "float32": "Float32"}


@lru_cache(maxsize=None)
def _folder() -> Any:
    """Where the CUDA sources are: inside the installed package, or beside it in a checkout."""
    installed = files("cuflash") / "kernels_cu"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "kernels_cu"


@lru_cache(maxsize=None)
def source(file: str) -> str:
    """Return a kernel's source with its headers inlined.

    CuPy's disk cache does not see the contents of headers, so none are left to include; ``#line`` keeps messages and
    findings pointing at the real files.
    """
    return _inlined(file, set())


def _inlined(file: str, seen: set[str]) -> str:
    """Return a file with its headers in place of their includes.

    Args:
        file: Its name.
        seen: Headers that every compilation has met so far; extended.
    """
    if file in seen:
        return ""
    path = _folder() / file
    if not path.is_file():
        path = _folder() / "include" / file
    # A header that stands in an #if may be met again outside of it: a guard, since only the compiler knows.
    guard = "CUFLASH_" + re.sub(r"\W", "_", file).upper()
    lines = [f"#ifndef {guard}", f"#define {guard}", f'#line 1 "{file}"']
    depth = 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip()
        include = re.match(r'#include "(.+)"', text)
        depth += text.startswith("#if")
        if include:
            lines += [_inlined(include[1], seen if depth == 0 else set(seen)), f'#line {number + 1} "{file}"']
        elif text.startswith("#endif"):  # the group before may have been skipped with its #line
            depth -= 1
            lines += [line, f'#line {number + 1} "{file}"']
        else:
            lines.append("" if text == "#pragma once" else line)
    seen.add(file)
    return "\n".join([*lines, "#endif"])


_FIELD = re.compile(r"^\s+(?:const )?(?P<type>\w[\w ]*?\*?) (?P<name>\w+);", re.MULTILINE)
_FIELD_TYPES = {"int": "i4", "unsigned int": "u4", "long long": "i8", "float": "f4"}


@lru_cache(maxsize=None)
def struct_dtype(file: str, struct: str) -> np.dtype[Any]:
    """Read the NumPy twin of a parameter struct from its CUDA source, so that it is written only once."""
    text = source(file)
    begin = text.index(f"struct {struct} {{")
    fields = _FIELD.finditer(text[begin : text.index("\n};", begin)])
    return np.dtype(
        [(field["name"], "u8" if field["type"].endswith("*") else _FIELD_TYPES[field["type"]]) for field in fields],
        align=True,
    )


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel.

    Attributes:
        kernel: Name of the ``extern "C"`` function, and of its file.
        defines: (macro, value) pairs.
    """

    kernel: str
    defines: tuple[tuple[str, str | int], ...] = ()

    @property
    def file(self) -> str:
        """The source file."""
        return f"{self.kernel}.cu"

    @property
    def options(self) -> tuple[str, ...]:
        """Compiler options."""
        return ("-std=c++17", *(f"-D{macro}={value}" for macro, value in self.defines))

    def __str__(self) -> str:
        return f"{self.kernel}({', '.join(f'{macro}={value}' for macro, value in self.defines)})"


def element_defines(dtype: str) -> tuple[tuple[str, str | int], ...]:
    """Return the macros that name an element type."""
    return ("ELEMENT", _ELEMENTS[dtype]), ("ELEMENT_BYTES", numpy_dtype(dtype).itemsize)
