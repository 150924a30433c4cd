"""CUDA sources, their compiled variants, and the parameter structs that are read from them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ..dtypes import numpy_dtype
from .boxes import MAP_BYTES

_ELEMENTS = {
    "float16": "Float16",
    "bfloat16": "BFloat16",
    "float32": "Float32",
    "float8_e4m3fn": "Float8E4M3",
    "float8_e5m2": "Float8E5M2",
    "int8": "Int8",
}


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


_STRUCT = r"^struct (?:__align__\((?P<align>\d+)\) )?{name} {{(?P<body>.*?)^}};"
_FIELD = re.compile(r"(?:const )?(?P<type>\w[\w ]*?\*?) (?P<name>\w+)")
# A tensor map is opaque. It comes before other fields: NumPy would not align it.
_FIELD_TYPES = {"int": "i4", "unsigned int": "u4", "long long": "i8", "float": "f4", "TensorMap": f"V{MAP_BYTES}"}


@lru_cache(maxsize=None)
def struct_dtype(file: str, struct: str) -> np.dtype[Any]:
    """Read the NumPy twin of a parameter struct from its CUDA source, so that it is written only once.

    A field is a number, a pointer or another struct of that source. Declarations end with a semicolon on their own
    line, four spaces in; functions have parentheses and are no fields.

    Raises:
        TypeError: If a field is anything else, or the struct ends before its alignment.
    """
    body = re.search(_STRUCT.format(name=struct), source(file), re.MULTILINE | re.DOTALL)
    if body is None:
        raise TypeError(f"{file} must declare the parameter struct {struct}; it does not")
    fields: list[tuple[str, Any]] = []
    for line in body["body"].splitlines():
        declaration, semicolon, _ = line.partition("//")[0].partition(";")
        if not semicolon or not re.match(r" {4}\w", line) or "(" in declaration:
            continue
        field = _FIELD.fullmatch(declaration.strip())
        if field is None:
            raise TypeError(f"fields of {struct} must be declared one a line, as `type name;`; got {line.strip()!r}")
        kind = field["type"]
        if kind.endswith("*"):
            fields.append((field["name"], "u8"))
        elif kind in _FIELD_TYPES:
            fields.append((field["name"], _FIELD_TYPES[kind]))
        else:
            fields.append((field["name"], struct_dtype(file, kind)))
    dtype = np.dtype(fields, align=True)
    align = int(body["align"] or 1)
    if dtype.itemsize % align:  # of which NumPy knows nothing
        raise TypeError(f"fields of {struct} must fill multiples of {align} bytes; they have {dtype.itemsize}")
    return dtype


def field_paths(dtype: np.dtype[Any], offset: int = 0) -> Iterator[tuple[str, np.dtype[Any], int]]:
    """Yield (path, dtype, offset) of each number and pointer; one in a nested struct has the path ``outer.inner``."""
    for name in dtype.names or ():
        field, position = dtype.fields[name][:2]  # type: ignore[index]
        if field.names:
            for path, inner, place in field_paths(field, offset + position):
                yield f"{name}.{path}", inner, place
        else:
            yield name, field, offset + position


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel.

    Attributes:
        kernel: Name of the ``extern "C"`` function, and of its file.
        defines: (macro, value) pairs.
        arch_suffix: "a" for code that one architecture alone runs, which its name then says: sm_90a.
    """

    kernel: str
    defines: tuple[tuple[str, str | int], ...] = ()
    arch_suffix: str = ""

    def __hash__(self) -> int:
        return self._hash  # of many small things, looked up at every launch

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}  # of this process alone

    @cached_property
    def _hash(self) -> int:
        return hash((self.kernel, self.defines, self.arch_suffix))

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


def element_defines(
    dtype: str, kv_dtype: str | None = None, out_dtype: str | None = None
) -> tuple[tuple[str, str | int], ...]:
    """Return the macros that name element types: of queries, and where given of a cache and of the output."""
    defines: list[tuple[str, str | int]] = []
    for macro, name in (("ELEMENT", dtype), ("KV_ELEMENT", kv_dtype)):
        if name is not None:
            defines += [(macro, _ELEMENTS[name]), (f"{macro}_BYTES", numpy_dtype(name).itemsize)]
    if out_dtype is not None:
        defines.append(("OUT_ELEMENT", _ELEMENTS[out_dtype]))
    return tuple(defines)
