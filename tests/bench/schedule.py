"""How evenly a plan shares out the keys, beside the plans of FlashAttention-3 and FlashInfer."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from cuflash import SchedulerMetadata
from cuflash.bench import report
from cuflash.bench.report import Record
from cuflash.device import Device
from cuflash.kernels import choose
from cuflash.operands import Lengths
from cuflash.planner import plan, plan_words
from cuflash.problem import make_problem

from . import policies, workloads

# A100, H200, RTX 5090.
_ARCHS = {108: 80, 132: 90, 170: 120}
_LONG_SHARE = 1024  # keys per block above which a share is long beside the grain of the cuts
_FIELDS = ("balance", "balance_fa3", "balance_flashinfer")


def measure(
    num_sms: Iterable[int] = tuple(_ARCHS), heads: Iterable[int] = (1, 2, 4, 8), trace: str | None = None
) -> Iterator[Record]:
    """Yield a record for every batch of lengths, number of KV heads and number of multiprocessors.

    Args:
        num_sms: Numbers of multiprocessors.
        heads: Numbers of KV heads.
        trace: A file of request lengths; see :func:`workloads.ragged`.
    """
    num_sms, heads = tuple(num_sms), tuple(heads)
    for name, lengths in workloads.ragged(trace):
        for number in heads:
            for num_sm in num_sms:
                loads = shares(lengths, number, num_sm)
                yield {
                    "variant": f"{number} KV heads, {num_sm} multiprocessors",
                    "arch": f"sm_{_ARCHS.get(num_sm, 90)}",
                    "workload": name,
                    "num_heads_kv": number,
                    "num_sm": num_sm,
                    "blocks": len(loads),
                    "keys_per_block": round(float(loads.mean())),
                    "balance": _balance(loads),
                    "balance_fa3": _balance(policies.flash_attention_3(lengths, number, num_sm)),
                    "balance_flashinfer": _balance(policies.flashinfer(lengths, number, num_sm)),
                }


def shares(lengths: NDArray[np.int64], num_heads_kv: int, num_sm: int) -> NDArray[np.int64]:
    """Return the keys that each used block of our plan reads."""
    device = Device(num_sm, _ARCHS.get(num_sm, 90))
    problem = make_problem(len(lengths), 1, 4 * num_heads_kv, num_heads_kv, 128, page_size=16)
    partition = choose(problem, device)
    array = np.zeros(plan_words(len(lengths), device), np.int32)
    plan(problem, partition, Lengths(lengths.astype(np.int32)), array)
    work = SchedulerMetadata(problem, device, partition, int(lengths.max()), array).work()
    loads = np.zeros(int(array[0]), np.int64)
    np.add.at(loads, work["block"], work["key_end"] - work["key_begin"])
    return loads


def summary(records: list[Record]) -> list[Record]:
    """Return the medians over all records, and median and minimum over those with long shares."""
    long = [record for record in records if record["keys_per_block"] >= _LONG_SHARE]
    rows = []
    for name, chosen, function in (
        ("median of all", records, np.median),
        (f"median from {_LONG_SHARE} keys per block on", long, np.median),
        (f"minimum from {_LONG_SHARE} keys per block on", long, np.min),
    ):
        if chosen:
            values = {field: float(function([record[field] for record in chosen])) for field in _FIELDS}
            rows.append({"variant": "all", "arch": "all", "workload": name, "cases": len(chosen), **values})
    return rows


def _balance(loads: NDArray[np.int64]) -> float:
    return float(loads.mean() / loads.max())


def _by_workload(records: list[Record]) -> Iterator[Record]:
    """Yield a row per workload: medians, and our least."""
    for name in dict.fromkeys(record["workload"] for record in records):
        chosen = [record for record in records if record["workload"] == name]
        medians = {field: float(np.median([record[field] for record in chosen])) for field in _FIELDS}
        keys = [record["keys_per_block"] for record in chosen]
        least = min(record["balance"] for record in chosen)
        yield {"workload": name, "keys_per_block": f"{min(keys)} .. {max(keys)}", **medians, "least": least}


_NOTES = (
    "",
    "balance: keys per used block, mean / longest, how long the slowest block lets the others wait. A row is the",
    "median over KV heads and multiprocessors, least our lowest; --json lists them all. FlashAttention-3: dynamic",
    "splits, sorted, persistent blocks; FlashInfer: binary search of the part length, two blocks per multiprocessor.",
    "No trace of real requests is included; --trace reads one.",
    "",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of ``python -m tests.bench schedule``."""
    add = parser.add_argument
    add("--num-sm", type=int, nargs="+", default=list(_ARCHS), help="multiprocessors (default: 108 132 170)")
    add("--heads", type=int, nargs="+", default=[1, 2, 4, 8], help="KV heads (default: 1 2 4 8)")
    add("--trace", metavar="FILE", help="text file of request lengths, the last number of each line")


def run(arguments: argparse.Namespace) -> int:
    """Run ``python -m tests.bench schedule``."""
    records = list(measure(arguments.num_sm, arguments.heads, arguments.trace))
    if arguments.json:
        report.write(records + summary(records), as_json=True)
    else:
        report.write(_by_workload(records), as_json=False, notes=_NOTES)
        report.write(summary(records), as_json=False)
    return 0
