"""The standard problems, for compute-sanitizer: every kernel and feature once, on small caches full of NaN.

Run as ``python tests/gpu/sanitize.py --under memcheck`` (or initcheck). Answers are compared with the reference, too.

racecheck and synccheck do not follow named barriers of some warps: of the wgmma kernels they report what a ``bar.sync``
of 8 warps of 12 orders, and warps that come to one barrier at two places, both of which PTX allows. So they get
``--without-wgmma``, and the same problems run by mma.sync. Of these, values wider than 256 are columns of two warps or
four, which meet at such barriers: of 24 runs of one of them, side by side, racecheck called a write in 7 unordered that
the next ``BAR.SYNC 0`` orders (H200). So it gets ``--without-meetings``. The simulator checks all kernels for races.
synccheck has room for some barriers and faults beyond: so a problem is a process and has a tool of its own, which is
told to have room for many, and synccheck gets ``--without-clusters``, whose barriers it cannot tell apart.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
os.environ["CUFLASH_BACKEND"] = "cuda"

from conftest import HAS_GPU  # noqa: E402
from problems import Backend, Case, check, make_inputs  # noqa: E402

from cuflash import kernels  # noqa: E402
from cuflash.kernels import tiles  # noqa: E402

SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--print-limit", "20", "--launch-timeout", "120")
BARRIERS = ("--num-cuda-barriers", "4096")  # room for as many; where synccheck counts them itself, it finds too few
CASES = (
    Case(dtype="bfloat16", heads=(8, 2), headdim=(128, 128), seqlens=(300, 17, 1, 0), page_size=16),
    Case(dtype="bfloat16", heads=(8, 1), headdim=(128, 128), seqlens=(1500,), plan="given"),
    Case(dtype="float16", heads=(32, 1), headdim=(64, 64), seqlens=(700, 90), page_size=1, plan="stale"),
    Case(dtype="bfloat16", heads=(16, 1), headdim=(256, 256), seqlens=(400, 65), page_size=7),
    Case(dtype="float16", heads=(40, 1), headdim=(96, 64), seqlens=(200, 33), page_size=64, layout="HND"),
    Case(dtype="float32", heads=(4, 2), headdim=(64, 64), seqlens=(300, 5), page_size=16),
    Case(dtype="float32", heads=(16, 1), headdim=(256, 256), seqlens=(90, 33)),
    Case(dtype="bfloat16", heads=(6, 2), headdim=(40, 72), seqlens=(130, 64), batch_idx=True, leftpad=True),
    Case(dtype="bfloat16", heads=(8, 2), headdim=(128, 128), seqlens=(500, 250), split_size=64, plan="reused"),
    Case(dtype="bfloat16", heads=(8, 2), headdim=(64, 64), seqlens=(600, 30), num_splits=3, plan="given"),
    Case(dtype="float16", seqlens=(77, 130), seqlens_q=5, causal=True, window=(20, 0), sinks=True),
    Case(dtype="float16", seqlens=(77, 130, 3), seqlens_q=(1, 7, 0), causal=True, softcap=3.0, page_size=3),
    Case(dtype="bfloat16", seqlens=(77, 130), seqlens_q=3, causal=True, chunk=32, scale=-0.2),
    Case(dtype="bfloat16", seqlens=(77, 130), new=1, rotary="interleaved", page_size=16, causal=True),
    Case(dtype="float16", seqlens=(40, 7), new=(3, 0), rotary="half", rotary_dim=16, leftpad=True),
    Case(dtype="float32", seqlens=(40, 7), seqlens_q=2, new=2, rotary="half", rotary_seqlens=True, causal=True),
    # Many rows.
    Case(dtype="bfloat16", heads=(32, 2), headdim=(128, 128), seqlens=(700, 33), seqlens_q=5, causal=True, page_size=8),
    Case(dtype="float16", heads=(8, 2), headdim=(128, 128), seqlens=(900, 130, 0), seqlens_q=(130, 1, 3), causal=True),
    Case(dtype="bfloat16", heads=(64, 1), headdim=(256, 256), seqlens=(400, 65), page_size=7, softcap=5.0, sinks=True),
    Case(dtype="float16", heads=(40, 1), headdim=(320, 512), seqlens=(300, 40), page_size=1, window=(90, 0)),
    Case(dtype="bfloat16", heads=(40, 1), headdim=(128, 128), seqlens=(700, 90), split_size=64, plan="stale"),
    Case(dtype="float16", heads=(8, 2), seqlens=(200, 150), seqlens_q=20, tree="words", page_size=16, csr=True),
    Case(dtype="bfloat16", heads=(40, 1), seqlens=(200, 150), negative_pages=True, page_size=16, merge="in place"),
    # Quantised caches.
    Case(dtype="bfloat16", heads=(8, 2), headdim=(128, 128), seqlens=(300, 17, 0), page_size=16,
         kv_dtype="float8_e4m3fn", scales=("none", "float", "heads")),
    Case(dtype="float16", heads=(8, 2), headdim=(64, 64), seqlens=(300, 17), kv_dtype="int8",
         scales=("none", "keys", "keys"), new=2, page_size=16, causal=True),
    Case(dtype="bfloat16", heads=(32, 1), headdim=(128, 128), seqlens=(700, 33), seqlens_q=5, causal=True,
         kv_dtype="float8_e5m2", scales=("none", "keys", "keys"), page_size=16),
    # A latent cache.
    Case(dtype="bfloat16", heads=(16, 1), headdim=(576, 512), mla="joint", seqlens=(700, 33), page_size=64),
    Case(dtype="float16", heads=(64, 1), headdim=(576, 512), mla="joint", seqlens=(500, 90), seqlens_q=2, causal=True),
    Case(dtype="bfloat16", heads=(128, 1), headdim=(576, 512), mla="joint", seqlens=(130, *[70] * 22, 0), page_size=64),
    Case(dtype="bfloat16", heads=(16, 1), headdim=(64, 512), mla="qv", seqlens=(300, 33), page_size=16, new=1),
    Case(dtype="bfloat16", heads=(16, 1), headdim=(576, 512), mla="joint", seqlens=(300, 33), page_size=16,
         kv_dtype="float8_e4m3fn", scales=("none", "float", "none")),
    Case(dtype="bfloat16", heads=(8, 2), seqlens=(300, 77), cp=(3, 1, 16), causal=True, seqlens_q=3),
)  # fmt: skip


def merge_states() -> None:
    """The kernel of ``merge_attn_states``."""
    import cupy

    import cuflash

    rng = np.random.default_rng(0)
    outs = cupy.asarray(rng.standard_normal((3, 2, 1, 8, 64), np.float32).astype(np.float16))
    lses = cupy.asarray(rng.standard_normal((3, 2, 8, 1), np.float32))
    cuflash.merge_attn_states(outs, lses)[0].get()


def main() -> int:
    """Run all; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("numbers", nargs="*", type=int, metavar="N", help="problems (default: all)")
    parser.add_argument("--without-wgmma", action="store_true", help="run all problems by other kernels")
    parser.add_argument("--without-meetings", action="store_true", help="leave out problems of which warps meet")
    parser.add_argument("--without-clusters", action="store_true", help="run all problems in blocks without clusters")
    parser.add_argument("--under", metavar="TOOL", help="run every problem under this tool of compute-sanitizer")
    arguments = parser.parse_args()
    numbers = arguments.numbers or range(len(CASES))
    if arguments.without_meetings:
        numbers = [number for number in numbers if max(CASES[number].headdim) <= 256]
    if not HAS_GPU:
        print("no GPU found")
        return 2
    if arguments.under:
        barriers = BARRIERS if arguments.under == "synccheck" else ()
        command = [*SANITIZER, "--tool", arguments.under, *barriers, sys.executable, __file__]
        options = [option for option in sys.argv[1:] if option.startswith("--without")]
        with ThreadPoolExecutor(8) as pool:
            codes = pool.map(subprocess.call, ([*command, str(number), *options] for number in numbers))
            # Codes are negative where a signal ended the problem.
            wrong = [number for number, code in zip(numbers, codes, strict=True) if code]
        print(f"problems that {arguments.under} ended: {wrong}" if wrong else f"{arguments.under} has nothing to say")
        return int(bool(wrong))
    import cupy

    if arguments.without_wgmma:
        kernels.FAMILIES = tuple(family for family in kernels.FAMILIES if not family.NAME.endswith("wgmma"))
    if arguments.without_clusters:
        tiles._cluster_shapes = lambda *_: []
    cupy.cuda.set_allocator(None)  # every array is an allocation of its own, whose bounds the sanitizer knows
    backend = Backend("cuda", cupy.asarray, cupy.asnumpy)
    for number in numbers:
        check(CASES[number], make_inputs(CASES[number]), backend)
    merge_states()
    print(f"{len(numbers)} problems are right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
