"""The parameter structs: the NumPy twin that is read from a CUDA source has the compiler's own size and offsets."""

from __future__ import annotations

import numpy as np
import pytest

from cuflash.kernels.source import source as source_of
from cuflash.kernels.source import struct_dtype
from cuflash.simulator import SimModule


@pytest.mark.parametrize("kernel", ["plan", "decode", "append", "merge"])
def test_the_twin_has_the_compilers_layout(kernel: str) -> None:
    file, struct = f"{kernel}.cu", f"{kernel.capitalize()}Params"
    dtype = struct_dtype(file, struct)
    source = source_of(file)
    begin = source.index(f"struct {struct} {{")
    names = dtype.names or ()
    offsets = "\n".join(f"    *out++ = __builtin_offsetof({struct}, {name});" for name in names)
    sizes = "\n".join(f"    *out++ = sizeof({struct}::{name});" for name in names)
    body = f"    *out++ = sizeof({struct});\n{offsets}\n{sizes}\n"
    code = (
        source[begin : source.index("\n};", begin)] + f'\n}};\nextern "C" __global__ void layout(int* out) {{\n{body}}}'
    )
    out = np.full(1 + 2 * len(names), -1, np.int32)
    SimModule(code, ("-std=c++17",)).get_function("layout")(1, 1, (out,))
    fields = [dtype.fields[name] for name in names]  # type: ignore[index]
    assert out.tolist() == [dtype.itemsize, *(field[1] for field in fields), *(field[0].itemsize for field in fields)]


def test_no_field_is_overlooked() -> None:
    """Every declaration of a struct is a field of its twin."""
    for kernel in ("plan", "decode", "append", "merge"):
        struct = f"{kernel.capitalize()}Params"
        source = source_of(f"{kernel}.cu")
        begin = source.index(f"struct {struct} {{")
        lines = source[begin : source.index("\n};", begin)].splitlines()[1:]
        declarations = [line for line in lines if ";" in line.partition("//")[0]]
        assert len(declarations) == len(struct_dtype(f"{kernel}.cu", struct).names or ())
