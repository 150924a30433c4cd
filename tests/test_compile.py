"""Every kernel variant compiles for every architecture; NVRTC needs no GPU.

What a variant is compiled with is what CuPy's RawModule is given: sources without includes, and the options.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from bench import cubins, gpu, sass
from bench.device import plan_for

from cuflash import kernels
from cuflash.device import Device
from cuflash.kernels import decode, extend, extend_wgmma, mla, mla_wgmma
from cuflash.kernels.append import append_variant
from cuflash.kernels.attention import Form, usual_forms
from cuflash.kernels.merge import merge_variant
from cuflash.kernels.source import Variant, source
from cuflash.kernels.tiles import tiling
from cuflash.problem import make_problem

ARCHS = (80, 86, 89, 90, 100, 120)


def in_turn(kinds: Sequence[Any]) -> list[Any]:
    """Return parameters (kind, architecture): each of those kept has one of the kinds, and others with --slow."""
    kept = (80, 90, 100, 120)
    return [
        pytest.param(kind, arch, marks=() if arch in kept and kept.index(arch) % 3 == i else pytest.mark.slow)
        for i, kind in enumerate(kinds)
        for arch in ARCHS
    ]


DTYPES = ("float16", "bfloat16", "float32")
HEADDIMS = ((64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (72, 40), (192, 128))
ROWS = (8, 16, 32)
FEATURES = (
    {},
    {"has_softcap": True},
    {"attention_chunk": 64},
    {"has_softcap": True, "attention_chunk": 64},
    {"split_size": 64},
)
STEPS = ((4, None), (1000, None), (4, 1024))  # sequences and longest of them: few, many, few in clusters


KV_DTYPES = ("float8_e4m3fn", "float8_e5m2", "int8")


def decode_variant(
    dtype: str, dims: tuple[int, int], rows: int, features: dict, step: tuple[int, int | None], arch: int
) -> Variant:
    batch, longest = step
    problem = make_problem(batch, 1, rows, 1, dims[0], headdim_v=dims[1], qkv_dtype=dtype, **features)
    return decode.decode_variant(problem, tiling(problem, Device(132, arch), longest))


def check(variant: Variant, arch: int) -> cubins.Cubin:
    """Compile; ptxas must not take an odd uniform register for a cache policy, which the GPU refuses to run."""
    code = cubins.cubin(variant, arch)
    assert code.code.startswith(b"\x7fELF")
    assert sass.odd_descriptors(sass.disassemble(code.code)) == 0
    return code


@pytest.mark.parametrize(("dtype", "arch"), in_turn(DTYPES))
def test_attention_compiles(dtype: str, arch: int) -> None:
    """Every dtype on every architecture, head dims, rows and features in turn; --slow has them all."""
    turn = itertools.cycle(itertools.product(ROWS, FEATURES, STEPS))
    for dims in HEADDIMS[(ARCHS.index(arch) + DTYPES.index(dtype)) % 3 :: 3]:
        rows, features, step = next(itertools.islice(turn, 7, None))
        check(decode_variant(dtype, dims, rows, features, step, arch), arch)


def quantised_variants(kv_dtype: str) -> Iterator[tuple[Any, ...]]:
    """Yield (query dtype, head dims, rows, features, step, KEY_SCALES), all values of each."""
    dims = ((64, 64), (80, 48), (128, 128), (192, 128), (256, 256))
    turns = zip(itertools.cycle((*DTYPES, "float8_e4m3fn")), itertools.cycle(dims), itertools.cycle(ROWS),
                itertools.cycle(FEATURES[:4]), itertools.cycle(STEPS), itertools.cycle(range(4)))  # fmt: skip
    return itertools.islice(turns, KV_DTYPES.index(kv_dtype), None)


@pytest.mark.parametrize(("kv_dtype", "arch"), in_turn(KV_DTYPES))
def test_attention_on_quantised_caches_compiles(kv_dtype: str, arch: int) -> None:
    for dtype, dims, rows, features, (batch, longest), key_scales in itertools.islice(quantised_variants(kv_dtype), 2):
        problem = make_problem(
            batch, 1, rows, 1, dims[0], headdim_v=dims[1], qkv_dtype=dtype, kv_dtype=kv_dtype, **features
        )
        form = Form(key_scales=key_scales, merges=key_scales > 1)
        check(decode.decode_variant(problem, tiling(problem, Device(132, arch), longest), form), arch)
    if arch in (80, 90):
        check(append_variant("float8_e4m3fn", kv_dtype, "bfloat16"), arch)
        check(append_variant("float16", kv_dtype), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", HEADDIMS, ids=str)
def test_every_variant_compiles(dtype: str, dims: tuple[int, int], arch: int) -> None:
    for rows, features, step in itertools.product(ROWS, FEATURES, STEPS):
        check(decode_variant(dtype, dims, rows, features, step, arch), arch)


@pytest.mark.parametrize("arch", [pytest.param(n, marks=() if n in (80, 90, 120) else pytest.mark.slow) for n in ARCHS])
def test_other_kernels_compile(arch: int) -> None:
    check(Variant("plan"), arch)
    for dtype in DTYPES:
        check(append_variant(dtype, dtype), arch)
        check(merge_variant(dtype), arch)


@pytest.mark.parametrize(("rows", "arch"), in_turn(ROWS))
def test_no_local_memory(rows: int, arch: int) -> None:
    """Registers never spill at head dim 128."""
    code = check(decode_variant("bfloat16", (128, 128), rows, {}, (1000, None), arch), arch)
    assert code.local_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", gpu.shapes().values(), ids=gpu.shapes())
def test_kernels_of_the_benchmark_use_no_local_memory(shape: gpu.Shape) -> None:
    """A GPU's own compiler is asked by the same test there."""
    with plan_for(132):
        plan = shape.plan(shape.lengths.astype("int32"))
        for variant in kernels.variants(plan.problem, plan.partition, appends=False):
            assert check(variant, 90).local_bytes <= cubins.most_local_bytes(variant), variant


def many_rows_variant(arch: int, kv_dtype: str | None = None) -> Variant:
    problem = make_problem(4, 40, 8, 2, 128, qkv_dtype="bfloat16", kv_dtype=kv_dtype, page_size=16, causal=True)
    partition = extend.partition(problem, Device(132, arch), None)
    assert partition is not None
    return extend.variant(problem, partition)


def latent_variant(arch: int, kv_dtype: str | None = None) -> Variant:
    problem = make_problem(4, 2, 64, 1, 576, headdim_v=512, qkv_dtype="bfloat16", kv_dtype=kv_dtype)
    partition = mla.partition(problem, Device(132, arch), None)
    assert partition is not None
    return mla.variant(problem, partition)


@pytest.mark.parametrize(("variant", "arch"), [(many_rows_variant, 120), (latent_variant, 90)])
def test_many_rows_compile(variant: Callable[..., Variant], arch: int) -> None:
    """By mma.sync, on architectures whose copies have a policy."""
    check(variant(arch), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("variant", [many_rows_variant, latent_variant])
def test_many_rows_compile_everywhere(variant: Callable[..., Variant], arch: int) -> None:
    for kv_dtype in (None, "float8_e4m3fn"):
        check(variant(arch, kv_dtype), arch)


def test_sources_are_whole() -> None:
    """CuPy's cache does not see headers: nothing may be left to include."""
    for file in ("plan.cu", "decode.cu", "append.cu", "merge.cu"):
        assert "#include" not in source(file)


def test_an_error_names_variant_and_architecture() -> None:
    broken = Variant("merge", (("ELEMENT", "Float17"), ("ELEMENT_BYTES", 2), ("WARPS", 4)))
    with pytest.raises(cubins.CompileError, match=r"(?s)merge.*Float17.*sm_90.*error"):
        cubins.cubin(broken, 90)


LATENT_DTYPES = (("float16", None), ("bfloat16", None), ("bfloat16", "float8_e4m3fn"))


@pytest.mark.parametrize(
    ("features", "dtypes", "heads"),
    [
        *(
            pytest.param(features, dtypes, 64, marks=() if i % 3 == j or (i, j) == (0, 2) else pytest.mark.slow)
            for i, features in enumerate(FEATURES)
            for j, dtypes in enumerate(LATENT_DTYPES)
        ),
        ({"has_softcap": True}, LATENT_DTYPES[2], 128),  # two blocks share a tile
    ],
    ids=str,
)
def test_products_of_latent_attention_run_side_by_side(
    features: dict, dtypes: tuple[str, str | None], heads: int
) -> None:
    """Serialised products wait one by one: then every one has a DEPBAR of its own."""
    dtype, kv_dtype = dtypes
    options: dict = {"headdim_v": 512, "qkv_dtype": dtype, "kv_dtype": kv_dtype, **features}
    device, problem = Device(132, 90), make_problem(4, 1, heads, 1, 576, **options)
    partition = mla_wgmma.partition(problem, device, None)
    assert partition is not None
    code = check(mla_wgmma.variant(problem, partition, Form(key_scales=3 if kv_dtype else 0)), 90)
    text = [instruction.text for instruction in sass.disassemble(code.code).instructions]
    assert sum("HGMMA" in line for line in text) == 36 + 2 * 4
    assert sum("WARPGROUP.DEPBAR" in line for line in text) == 3
    assert code.local_bytes <= 160  # in what follows the main loop


@pytest.mark.parametrize(
    ("queries", "features", "kv_dtype"),
    [
        (5, {}, None),
        (40, {"has_softcap": True}, None),
        (5, {"split_size": 64}, None),
        (40, {}, "int8"),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in (
                (40, {}, None),
                (5, {"has_softcap": True}, None),
                (40, {"split_size": 64}, None),
                (5, {}, "int8"),
            )
        ),
    ],
)
def test_products_of_many_rows_run_side_by_side(queries: int, features: dict, kv_dtype: str | None) -> None:
    """Serialised products have two instructions of a warpgroup each."""
    device, problem = (
        Device(132, 90),
        make_problem(4, queries, 8, 2, 128, qkv_dtype="bfloat16", kv_dtype=kv_dtype, causal=True, **features),
    )
    partition = extend_wgmma.partition(problem, device, None)
    assert partition is not None
    for form in usual_forms(problem, False):
        variant = extend_wgmma.variant(problem, partition, form)
        code = check(variant, 90)
        text = [instruction.text for instruction in sass.disassemble(code.code).instructions]
        products = sum("HGMMA" in line for line in text)
        assert products > 0 and sum("WARPGROUP" in line for line in text) < products
