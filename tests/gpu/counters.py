"""The simulator's counters beside the profiler's, on three problems.

``python tests/gpu/counters.py`` runs each problem on the simulator and, under ncu, on the GPU, and compares what both
count: sectors of global memory, wavefronts of shared memory, matrix products. ``--launch NAME`` runs one on the GPU.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench.device import plan_for  # noqa: E402

import cuflash  # noqa: E402
from cuflash.bench import report  # noqa: E402

PAGE = 16


@dataclass(frozen=True)
class Problem:
    """A decode step in bfloat16 on pages of 16."""

    seqlens: tuple[int, ...]
    heads: tuple[int, int]
    headdim: int

    def arguments(self) -> dict[str, np.ndarray]:
        """Return the arrays of the call."""
        rng = np.random.default_rng(0)
        batch, pages = len(self.seqlens), [-(-length // PAGE) for length in self.seqlens]
        shape = (sum(pages), PAGE, self.heads[1], self.headdim)
        k_cache, v_cache = rng.standard_normal((2, *shape), np.float32).astype(ml_dtypes.bfloat16)
        table = np.zeros((batch, max(pages)), np.int32)
        table[np.arange(max(pages)) < np.array(pages)[:, None]] = rng.permutation(sum(pages))
        q = rng.standard_normal((batch, 1, self.heads[0], self.headdim), np.float32).astype(ml_dtypes.bfloat16)
        return {
            "q": q, "k_cache": k_cache, "v_cache": v_cache, "page_table": table,
            "out": np.empty(q.shape, q.dtype),  # memory of its own: sectors are counted from its beginning
            "cache_seqlens": np.array(self.seqlens, np.int32),
        }  # fmt: skip

    def call(self, arrays: Mapping[str, Any]) -> Any:
        """Plan and attend."""
        plan = cuflash.get_scheduler_metadata(
            len(self.seqlens), 1, max(self.seqlens), *self.heads, self.headdim, arrays["cache_seqlens"],
            page_size=PAGE, causal=True,
        )  # fmt: skip
        return cuflash.flash_attn_with_kvcache(**arrays, causal=True, scheduler_metadata=plan)


PROBLEMS = {
    "equal": Problem((1024,) * 8, (32, 8), 128),
    "ragged": Problem((5000, 17, 1200, 3000, 1, 800), (16, 2), 64),
    "one sequence": Problem((8192,), (8, 1), 256),
}
# Name here: (metric of ncu, the most by which the two may differ, relative to this figure of the simulator). The
# simulator has no caches: on a GPU lengths and page numbers hit L1, and L1 sends stores to one sector together. What a
# wavefront of copies to shared memory is, ncu and the simulator see differently; of conflicts, both see next to none.
METRICS = {
    "read_sectors": ("lts__t_sectors_srcunit_tex_op_read.sum", 0.05, "read_sectors"),
    "write_sectors": ("lts__t_sectors_srcunit_tex_op_write.sum", 0.05, "write_sectors"),
    "wavefronts": ("l1tex__data_pipe_lsu_wavefronts_mem_shared.sum", None, "wavefronts"),
    "bank_conflicts": ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum", 0.02, "wavefronts"),
    "mma": ("sm__inst_executed_pipe_tensor.sum", 0.0, "mma"),
    "dram_read_bytes": ("dram__bytes_read.sum", None, "dram_read_bytes"),
}


def simulated(problem: Problem, num_sm: int, arch: int) -> dict[str, float]:
    """Return what the simulator counts in the attention kernel."""
    from cuflash.simulator import Checks, record

    with plan_for(num_sm, arch, "sim"), record(Checks.cheap()) as launches:
        problem.call(problem.arguments())
    counters = launches[-1].counters
    # On a GPU no LSE is written that nobody asks for, and atomics are no stores.
    arrays = [a for name, a in counters.arrays.items() if name not in ("softmax_lse", "counters")]
    return {
        "read_sectors": sum(a.read_sectors for a in arrays),
        "write_sectors": sum(a.write_sectors for a in arrays),
        "wavefronts": counters.shared_real,
        "bank_conflicts": counters.shared_real - counters.shared_ideal,
        "mma": counters.mma,
        "dram_read_bytes": 32 * sum(a.read_sectors for a in arrays),
    }


def profiled(name: str, metrics: list[str], ncu: str) -> dict[str, float]:
    """Return what ncu counts in the attention kernel, by metric."""
    command = [
        ncu, "--csv", "--page", "raw", "--metrics", ",".join(metrics), "--kernel-name", "decode", "--launch-skip", "1",
        "--launch-count", "1", "--clock-control", "none", "--cache-control", "all", sys.executable, __file__,
        "--launch", name,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if done.returncode or len(lines) < 3:
        raise RuntimeError(f"ncu failed ({done.returncode}): {(done.stdout + done.stderr).strip()[-600:]}")
    header, _, values = list(csv.reader(lines))[:3]  # names, units, the launch
    row = dict(zip(header, values, strict=True))
    return {metric: float(row[metric].replace(",", "")) for metric in metrics if row.get(metric)}


def known_metrics(ncu: str) -> set[str]:
    """Return the names of the metrics that this GPU has, without the suffix of their reduction."""
    done = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True, timeout=120, check=False)
    return {line.split()[0] for line in done.stdout.splitlines() if "__" in line}


def launch(name: str) -> None:
    """Run a problem on the GPU, twice: the first call compiles."""
    import cupy

    os.environ["CUFLASH_BACKEND"] = "cuda"
    problem = PROBLEMS[name]
    arrays = {key: cupy.asarray(value) for key, value in problem.arguments().items()}
    for _ in range(2):
        problem.call(arrays)
    cupy.cuda.Device().synchronize()


def compare(ncu: str) -> list[report.Record]:
    """Return a record per problem and metric; ``ok`` is None where nothing is demanded."""
    import cupy

    device = cupy.cuda.Device()
    num_sm, arch = device.attributes["MultiProcessorCount"], int(device.compute_capability)
    known = known_metrics(ncu)
    metrics = {key: value for key, value in METRICS.items() if value[0].rpartition(".")[0] in known or not known}
    records = []
    for name, problem in PROBLEMS.items():
        ours = simulated(problem, num_sm, arch)
        theirs = profiled(name, [metric for metric, _, _ in metrics.values()], ncu)
        for key, (metric, most, scale) in metrics.items():
            ratio = theirs[metric] / ours[key] if metric in theirs and ours[key] else None
            ok = None
            if most is not None and metric in theirs:
                ok = abs(theirs[metric] - ours[key]) <= most * ours[scale]
            records.append(
                {"problem": name, "counter": key, "simulator": int(ours[key]), "ncu": theirs.get(metric),
                 "ratio": ratio, "ok": ok}
            )  # fmt: skip
    return records


def main() -> int:
    """Compare; the exit code is 1 if a counter is off, 2 without a GPU or ncu."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launch", choices=list(PROBLEMS))
    arguments = parser.parse_args()
    if arguments.launch:
        launch(arguments.launch)
        return 0
    try:
        import cupy

        found = cupy.cuda.is_available()
    except ImportError:
        found = False
    ncu = shutil.which("ncu")
    if not found or ncu is None:
        print("no GPU found" if not found else "ncu is not installed")
        return 2
    records = compare(ncu)
    report.write(records, as_json=False)
    return int(any(record["ok"] is False for record in records))


if __name__ == "__main__":
    sys.exit(main())
