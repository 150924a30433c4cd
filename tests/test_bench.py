"""``python -m tests.bench``: its fields, and the figures that do not depend on how fast a machine is."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import counters, main, policies, resources, sass, schedule, workloads

from cuflash.bench import report
from cuflash.device import Device

Record = dict[str, Any]

try:
    sass._nvdisasm()
    HAS_NVDISASM = importlib.util.find_spec("cuda.bindings") is not None
except (FileNotFoundError, ModuleNotFoundError):
    HAS_NVDISASM = False
needs_nvdisasm = pytest.mark.skipif(not HAS_NVDISASM, reason="no NVRTC or nvdisasm")
IDENTITY = {"variant", "arch", "workload"}


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[Record]:
    """Run an instrument and read its JSON."""
    assert main([*arguments, "--json"]) == 0
    records: list[Record] = json.loads(capsys.readouterr().out)
    assert records and all(set(record) >= IDENTITY for record in records)
    return records


# ------------------------------------------------------------------------------------------------------- the table
def test_table_aligns_columns_and_spreads_nested_fields() -> None:
    text = report.table([{"name": "a", "x": 1.5, "more": {"y": None}}, {"name": "long", "x": 250.4, "more": {"y": 3}}])
    assert text.splitlines() == ["name      x  y", "----  -----  -", "a     1.500  -", "long    250  3"]


@pytest.mark.parametrize("instrument", ["counters", "resources", "schedule", "host", "cpu", "gpu", "compare"])
def test_every_instrument_explains_itself(instrument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([instrument, "--help"])
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- counters
def simulated(name: str, headdim: int = 128, group: int = 8, dtype: str = "bfloat16") -> Iterator[counters.Workload]:
    for workload in counters.small_workloads():
        same = workload.headdim == headdim and workload.dtype == dtype
        if workload.name == name and same and workload.num_heads_q // workload.num_heads_kv == group:
            yield workload


CASES = [
    pytest.param(workload, id=f"{workload.name} {workload.headdim}x{workload.num_heads_q // workload.num_heads_kv}")
    for workload in counters.small_workloads()
]
QUICK = [next(simulated(name)) for name in ("whole tiles", "ragged", "one sequence")]


def check_counts(record: Record) -> None:
    assert record["launches"] == 1
    assert record["sector_ratio"] == 1
    row_blocks = 2 if record["variant"].endswith("256x16") and record["rows"] == 32 else 1
    assert record["kv_bytes_ratio"] <= row_blocks * (1 if record["workload"] == "whole tiles" else 1.01)
    assert record["partial_bytes"] <= record["partial_bound"]
    if not record["variant"].startswith("float32"):
        assert record["wavefront_ratio"] == 1
        assert record["mma_ratio"] <= 1.05


@pytest.mark.parametrize("workload", QUICK, ids=lambda workload: workload.name)
def test_counts(workload: counters.Workload) -> None:
    check_counts(counters.count(workload, 90))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("workload", CASES)
def test_all_counts(workload: counters.Workload, arch: int) -> None:
    check_counts(counters.count(workload, arch))


def test_partial_results_of_real_workloads_are_few() -> None:
    records = list(counters.planned())
    assert len(records) >= 10
    assert all(record["partial_bytes"] <= record["partial_bound"] for record in records)
    assert all(record["partial_ratio"] <= 0.1 for record in records)


# ------------------------------------------------------------------------------------------------------- resources
# Warp instructions per tile of 16 keys (head dim, rows): what a first kernel of this design took, and 8 %.
MOST_INSTRUCTIONS = {
    80: {(64, 8): 140, (64, 16): 167, (64, 32): 230, (128, 8): 194, (128, 16): 234, (128, 32): 326, (256, 8): 301,
         (256, 16): 367},
    90: {(64, 8): 136, (64, 16): 165, (64, 32): 227, (128, 8): 192, (128, 16): 232, (128, 32): 327, (256, 8): 300,
         (256, 16): 383},
    120: {(64, 8): 140, (64, 16): 168, (64, 32): 227, (128, 8): 205, (128, 16): 244, (128, 32): 333, (256, 8): 331,
          (256, 16): 407},
}  # fmt: skip
KIBIBYTES_IN_FLIGHT = {80: 64, 86: 48, 89: 48, 90: 96, 100: 96, 120: 48}


def check_resources(record: Record, arch: int, headdim: int, rows: int) -> None:
    assert record["odd_descriptors"] == 0
    if headdim <= 128 or arch in (80, 90):
        assert record["local_bytes"] == 0
    if headdim <= 128 and rows == 8:
        assert record["resident_blocks"] >= 2
    least = 64 if rows == 32 and arch in (90, 100) else KIBIBYTES_IN_FLIGHT[arch]
    assert record["bytes_in_flight"] >= least * 1024
    if arch in MOST_INSTRUCTIONS:
        assert record["warp_instructions_per_tile"] <= MOST_INSTRUCTIONS[arch][headdim, rows]


@needs_nvdisasm
def test_resources(capsys: pytest.CaptureFixture[str]) -> None:
    (record,) = bench(capsys, "resources", "--arch", "90", "--headdim", "128", "--rows", "8")
    check_resources(record, 90, 128, 8)
    fields = {"registers", "shared_bytes", "resident_warps", "classes", "compile_s", "warm_ms"}
    assert set(record) >= fields
    assert record["classes"]["HMMA"] >= 16


@needs_nvdisasm
@pytest.mark.slow
@pytest.mark.parametrize("arch", list(KIBIBYTES_IN_FLIGHT))
@pytest.mark.parametrize(("headdim", "rows"), list(MOST_INSTRUCTIONS[90]))
def test_all_resources(arch: int, headdim: int, rows: int) -> None:
    (record,) = resources.measure([arch], headdims=[headdim], rows=[rows], items=["many"])
    check_resources(record, arch, headdim, rows)


# Warp instructions per 16 keys, as multiples of those for a cache of 16 bits; without scales of keys, tiles of 64 keys.
MOST_OF_A_QUANTISED_CACHE = {"float8_e4m3fn": 1.4, "float8_e5m2": 1.4, "int8": 2.0}


@needs_nvdisasm
@pytest.mark.parametrize(
    "kv_dtype",
    [pytest.param(name, marks=() if name == "int8" else pytest.mark.slow) for name in MOST_OF_A_QUANTISED_CACHE],
)
def test_resources_of_quantised_caches(kv_dtype: str) -> None:
    (wide,) = resources.measure([90], headdims=[128], rows=[8], items=["many"])
    (record,) = resources.measure([90], headdims=[128], rows=[8], items=["many"], kv_dtypes=[kv_dtype])
    assert record["tile_keys"] == 64
    most = MOST_OF_A_QUANTISED_CACHE[kv_dtype] * wide["warp_instructions_per_tile"]
    assert record["warp_instructions_per_tile"] <= most
    assert record["odd_descriptors"] == record["local_bytes"] == 0
    (scaled,) = resources.measure([90], headdims=[128], rows=[8], items=["many"], kv_dtypes=[kv_dtype], key_scales=3)
    assert scaled["warp_instructions_per_tile"] <= record["warp_instructions_per_tile"] + 40
    assert scaled["odd_descriptors"] == scaled["local_bytes"] == 0


@needs_nvdisasm
@pytest.mark.slow
@pytest.mark.parametrize("arch", (80, 89, 90, 100, 120))
@pytest.mark.parametrize("kv_dtype", MOST_OF_A_QUANTISED_CACHE)
def test_quantised_caches_never_spill(kv_dtype: str, arch: int) -> None:
    for key_scales in (0, 3):
        for record in resources.measure(
            [arch], headdims=[64, 128], rows=[8, 16], kv_dtypes=[kv_dtype], key_scales=key_scales
        ):
            assert record["odd_descriptors"] == record["local_bytes"] == 0, record


def test_counters_of_quantised_caches() -> None:
    """Bytes of keys and scales, and no two lanes at one bank where tiles are copied and read."""
    lengths = np.array([1024, 640])
    for headdim in (64, 128, 256):
        workload = counters.Workload("some", lengths, 16, 2, headdim, kv_dtype="float8_e4m3fn", key_scales=True)
        record = counters.count(workload, 90)
        assert record["kv_bytes_ratio"] <= 1.01
        assert record["scale_bytes_ratio"] <= 8 / (2 * headdim) + 0.01
        assert record["wavefront_ratio"] == 1


def test_resident_blocks_are_limited_by_each_resource() -> None:
    sm = resources.Multiprocessor(warps=64, blocks=32)
    device = Device(132, 90)
    assert sm.resident_blocks(device, registers=32, threads=32, shared_bytes=0) == 32  # blocks
    assert sm.resident_blocks(device, registers=32, threads=1024, shared_bytes=0) == 2  # warps
    assert sm.resident_blocks(device, registers=255, threads=128, shared_bytes=0) == 2  # registers
    assert sm.resident_blocks(device, registers=168, threads=128, shared_bytes=0) == 3
    assert sm.resident_blocks(device, registers=32, threads=128, shared_bytes=113 * 1024) == 2  # shared memory
    assert sm.resident_blocks(device, registers=32, threads=128, shared_bytes=114 * 1024) == 1
    assert sm.resident_blocks(device, registers=32, threads=128, shared_bytes=228 * 1024) == 0


SASS = """
.L_x_0:
        /*0000*/                   MOV R1, RZ ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0020*/              @P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0030*/                   LDSM.16.M88.4 R4, [R1] ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0050*/                   BRA.DIV UR6, `(.L_x_4) ;
        /*0060*/              @P1 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   FMUL R1, R1, R2 ;
        /*0090*/                   LDG.E R3, desc[UR5][R2.64] ;
        /*00a0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00b0*/              @P2 CALL.REL.NOINC `(.L_x_3) ;
        /*00c0*/                   EXIT ;
"""


def test_main_loop_goes_past_what_is_seldom_needed() -> None:
    program = sass.parse(SASS)
    loop = sass.main_loop(program)
    assert [i.opcode for i in loop.path] == ["LDGSTS", "BRA", "LDSM", "HMMA", "BRA", "BRA"]
    assert loop.inner_loops == 0
    assert loop.classes() == {"LDGSTS": 1, "LDSM": 1, "HMMA": 1, "FFMA": 0, "MUFU": 0, "SHFL": 0, "BAR": 0, "other": 3}
    assert sass.odd_descriptors(program) == 1


# -------------------------------------------------------------------------------------------------------- schedule
def test_schedules_are_even_and_better_than_the_peers(capsys: pytest.CaptureFixture[str]) -> None:
    records = bench(capsys, "schedule")
    cases = {record["workload"] for record in records if "num_sm" in record}
    assert len(cases) >= 60
    rows = {record["workload"]: record for record in records if record["variant"] == "all"}
    medians = rows["median of all"]
    assert medians["balance"] > max(medians["balance_fa3"], medians["balance_flashinfer"])
    assert rows["median from 1024 keys per block on"]["balance"] >= 0.96
    assert rows["minimum from 1024 keys per block on"]["balance"] >= 0.92
    page = (Path(__file__).parents[1] / "BENCHMARKS.md").read_text()
    for name, row in rows.items():
        figures = [f"{100 * row[f'balance{policy}']:.1f} %" for policy in ("", "_fa3", "_flashinfer")]
        assert f"| {name} | {' | '.join(figures)} |" in page
    assert f"; {rows['median from 1024 keys per block on']['cases']} of them have" in page


@pytest.mark.parametrize("policy", [policies.flash_attention_3, policies.flashinfer])
def test_peers_read_every_key_once(policy: Any) -> None:
    for _, lengths in workloads.ragged():
        assert policy(lengths, 2, 132).sum() == 2 * lengths.sum()


def test_loads_of_our_plan_are_all_keys() -> None:
    lengths = np.array([5000, 3, 700])
    assert schedule.shares(lengths, 4, 132).sum() == 4 * lengths.sum()


def test_a_trace_of_lengths_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "chat.csv"
    trace.write_text("arrived,length\n" + "".join(f"{t},{100 + t}\n" for t in range(100)))
    name, lengths = next(workloads.ragged(str(trace)))
    assert name == "trace chat, requests 0 .."
    assert lengths.tolist() == list(range(100, 164))
    trace.write_text("nothing\n")
    with pytest.raises(ValueError, match="--trace must name a file"):
        next(workloads.ragged(str(trace)))


# ------------------------------------------------------------------------------------------------------ host and cpu
def test_a_repeated_call_costs_a_fraction_of_a_first_one(capsys: pytest.CaptureFixture[str]) -> None:
    records = bench(capsys, "host", "--seconds", "0.02")
    assert all(record["us_per_call"] > 0 and record["ratio_to_numpy_add"] > 0 for record in records[:2])
    times = {(record["variant"], record["workload"]): record["us_per_call"] for record in records}
    attention, planning = "attention on a plan", "get_scheduler_metadata"
    assert 2 * times[attention, "every later call"] < times[attention, "first call of its shapes"]
    foreign = times[attention, "another framework's arrays"]
    assert times[attention, "every later call"] < foreign < times[attention, "first call of its shapes"] / 2
    assert times[planning, "out=, every later call"] < times[planning, "out=, first call"]


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="no torch")
def test_numpy_beside_torch(capsys: pytest.CaptureFixture[str]) -> None:
    records = bench(capsys, "cpu", "--batch", "1", "--keys", "64", "--runs", "1")
    assert [record["variant"] for record in records] == ["float32", "bfloat16"]
    assert all(record["time_ratio"] > 0 for record in records)
