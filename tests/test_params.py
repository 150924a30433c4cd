"""The parameter structs: the NumPy twin that is read from a CUDA source has the compiler's own size and offsets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuflash import kernels
from cuflash.device import Device
from cuflash.kernels import launch as launches
from cuflash.kernels import source as sources
from cuflash.kernels.exchange import exchange_variant
from cuflash.kernels.launch import Scratch, Step, bind, make_launch
from cuflash.kernels.merge import merge_variant
from cuflash.kernels.source import Variant, field_paths
from cuflash.problem import make_problem
from cuflash.simulator import SimModule

KERNELS = {name: f"{name.capitalize()}Params" for name in ("plan", "decode", "append", "merge", "exchange")}
KERNELS |= {"extend_wgmma": "TiledParams", "mla_wgmma": "TiledParams"}
_PROBLEM = make_problem(1, 1, 64, 8, 64, qkv_dtype="bfloat16")
_MANY_ROWS = make_problem(1, 99, 64, 8, 64, qkv_dtype="bfloat16")
_LATENT = make_problem(1, 1, 64, 1, 576, headdim_v=512, qkv_dtype="bfloat16")
VARIANTS = (
    *(
        variant
        for problem in (_PROBLEM, _MANY_ROWS, _LATENT)
        for variant in kernels.variants(problem, kernels.choose(problem, Device(132, 90)), True)
    ),
    merge_variant("bfloat16"),
    exchange_variant("bfloat16"),
)

NESTED = """
struct Divisor {
    unsigned int magic;
    int shift;
    __device__ int divide(int number) const { return number >> shift; }
};

struct Rows {  // a pointer behind a number
    int count;
    const int* table;  // (rows,)
};

struct NestedParams {
    const float* first;
    int number;
    Divisor divisor;  // a struct; of
    Rows rows;
    float* last;
};
extern "C" __global__ void nested(const __grid_constant__ NestedParams p, long long* out) {
    out[0] = p.first[1] + 10 * p.number + 100 * p.divisor.magic + 1000 * p.divisor.shift;
    out[1] = p.rows.count + 10 * p.rows.table[2];
    p.last[3] = 7.0f;
}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder of sources in the place of the library's."""
    monkeypatch.setattr(sources, "_folder", lambda: tmp_path)
    for cached in (sources.source, sources.struct_dtype, launches._fields):
        cached.cache_clear()
    yield tmp_path
    for cached in (sources.source, sources.struct_dtype, launches._fields):
        cached.cache_clear()


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_twin_has_the_compilers_layout(kernel: str) -> None:
    file, struct = f"{kernel}.cu", KERNELS[kernel]
    dtype = sources.struct_dtype(file, struct)
    fields = list(field_paths(dtype))
    offsets = "\n".join(f"    *out++ = __builtin_offsetof({struct}, {path});" for path, _, _ in fields)
    sizes = "\n".join(f"    *out++ = sizeof((({struct}*)0)->{path});" for path, _, _ in fields)
    variant = next(v for v in VARIANTS if v.kernel == kernel)
    code = (
        f"{sources.source(file)}\n"
        f'extern "C" __global__ void layout(int* out) {{\n    *out++ = sizeof({struct});\n{offsets}\n{sizes}\n}}'
    )
    out = np.full(1 + 2 * len(fields), -1, np.int32)
    SimModule(code, variant.options).get_function("layout")(1, 1, (out,))
    expected = [dtype.itemsize, *(offset for *_, offset in fields), *(field.itemsize for _, field, _ in fields)]
    assert out.tolist() == expected


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_field_is_overlooked(kernel: str) -> None:
    """Every declaration of a struct, and of the structs in it, is a field of its twin."""
    text = sources.source(f"{kernel}.cu")

    def check(struct: str, dtype: np.dtype[Any]) -> None:
        begin = re.search(rf"^struct (__align__\(\d+\) )?{struct} {{", text, re.MULTILINE)
        assert begin
        body = text[begin.end() : text.index("\n};", begin.end())]
        declarations = re.findall(r"^ {4}(?:const )?(\w[\w ]*\*?) (\w+);", body, re.MULTILINE)
        assert [name for _, name in declarations] == list(dtype.names or ())
        for kind, name in declarations:
            if dtype[name].names:
                check(kind, dtype[name])

    check(KERNELS[kernel], sources.struct_dtype(f"{kernel}.cu", KERNELS[kernel]))


@pytest.mark.parametrize("scratch", [(), ("first",), ("table",), ("last", "first")], ids="-".join)
def test_nested_structs_and_pointers_anywhere(scratch: tuple[str, ...], folder: Path) -> None:
    """Also to scratch, whose addresses never change."""
    (folder / "nested.cu").write_text(NESTED)
    paths = [path for path, _, _ in field_paths(sources.struct_dtype("nested.cu", "NestedParams"))]
    assert paths == ["first", "number", "divisor.magic", "divisor.shift", "rows.count", "rows.table", "last"]
    first, table, last = np.array([0, 5], np.float32), np.array([0, 0, 4], np.int32), np.zeros(4, np.float32)
    out = np.zeros(2, np.int64)

    values = {"number": 2, "divisor.magic": 3, "divisor.shift": 4, "rows.count": 6}
    launch = make_launch(Variant("nested"), "NestedParams", 1, 1, 0, values)
    arrays = {"last": last, "table": table, "first": first}
    addresses = {name: array.ctypes.data for name, array in arrays.items()}
    own = tuple((name, Scratch(arrays[name].shape, arrays[name].dtype)) for name in scratch)
    places = {name: place for place, name in enumerate(name for name in arrays if name not in scratch)}
    (bound,) = bind(Step((launch,), own), places, len(places)).launches
    words, pack, constants = bound.packing(len(places), [addresses[name] for name in scratch], lambda *_: b"")
    params = np.frombuffer(pack(*words([*(addresses[name] for name in places), *constants])), launch.struct)
    module = SimModule(sources.source("nested.cu"), launch.variant.options)
    module.get_function("nested")(1, 1, (params, out), arrays=arrays)
    assert out.tolist() == [4325, 46]
    assert last.tolist() == [0, 0, 0, 7]


def test_a_struct_fills_its_alignment(folder: Path) -> None:
    (folder / "odd.cu").write_text("struct __align__(16) OddParams {\n    int first;\n};\n")
    with pytest.raises(TypeError, match="multiples of 16 bytes; they have 4"):
        sources.struct_dtype("odd.cu", "OddParams")


@pytest.mark.parametrize("field", ["double number", "Unknown nested", "int a, b", "int many[4]"])
def test_an_unknown_field_is_an_error(folder: Path, field: str) -> None:
    (folder / "odd.cu").write_text(f"struct OddParams {{\n    int first;\n    {field};\n}};\n")
    with pytest.raises(TypeError, match=r"double|Unknown|one a line"):
        sources.struct_dtype("odd.cu", "OddParams")


_FIELDS = field_paths(sources.struct_dtype("merge.cu", "MergeParams"))
MERGE = {path: 1 for path, field, _ in _FIELDS if field != np.uint64}


@pytest.mark.parametrize(
    ("change", "name"),
    [({"colour": 1}, "colour"), ({"heads": None}, "heads"), ({"out": 5}, "out")],
    ids=["unknown", "missing", "a pointer"],
)
def test_every_number_is_supplied_and_no_other(change: dict[str, Any], name: str) -> None:
    values = {field: value for field, value in {**MERGE, **change}.items() if value is not None}
    with pytest.raises(TypeError, match=f"MergeParams and what is supplied differ in {name}"):
        make_launch(merge_variant("float32"), "MergeParams", 1, 32, 0, values)


def test_a_header_in_a_dead_branch_is_met_again_outside_of_it(folder: Path) -> None:
    (folder / "include").mkdir()
    (folder / "include" / "number.cuh").write_text("#pragma once\nconstexpr int kNumber = 7;\n")
    (folder / "include" / "more.cuh").write_text('#pragma once\n#include "number.cuh"\n')
    for condition in ("0", "1"):
        (folder / f"branch{condition}.cu").write_text(
            f'#if {condition}\n#include "more.cuh"\n#endif\n#include "number.cuh"\n'
            'extern "C" __global__ void branch(int* out) { *out = kNumber; }\n'
        )
        out = np.zeros(1, np.int32)
        SimModule(sources.source(f"branch{condition}.cu"), ("-std=c++17",)).get_function("branch")(1, 1, (out,))
        assert out[0] == 7
