"""``python -m cuflash schedule``: print, and draw, the plan for given lengths."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import SchedulerMetadata, get_scheduler_metadata
from ..device import MAX_NUM_SM, MIN_ARCH
from . import packages
from .text import aligned, bars, environment, heads, integer, integers, positive, table, width

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_SHOWN = 12  # rows of a table


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the arguments."""
    parser = subparsers.add_parser(
        "schedule",
        help="print the plan for given lengths",
        description="Print which thread block reads which keys, for any GPU; none is needed.",
    )
    parser.add_argument("--seqlens", type=integers(0), required=True, metavar="N,N,..", help="keys of each sequence")
    parser.add_argument("--heads", type=heads, default=(32, 8), metavar="Q/KV", help="heads (default 32/8)")
    parser.add_argument("--headdim", type=int, default=128, help="elements of a key (default 128)")
    parser.add_argument("--headdim-v", type=int, help="elements of a value (default headdim)")
    parser.add_argument("--dtype", default="bfloat16", help="float16, bfloat16 (default) or float32")
    parser.add_argument("--seqlen-q", type=integer(0), default=1, help="queries per sequence (default 1)")
    parser.add_argument("--page-size", type=positive, help="keys per page (default: contiguous cache)")
    parser.add_argument("--causal", action="store_true", help="causal mask")
    parser.add_argument("--window", type=integers(-1), default=(-1, -1), metavar="L,R", help="window, -1 is unbounded")
    parser.add_argument("--chunk", type=integer(0), default=0, help="attention chunk (default: none)")
    parser.add_argument(
        "--num-splits", type=integer(0), default=0, help="0 balances freely (default), n: at most n parts"
    )
    parser.add_argument("--split-size", type=int, help="cut at multiples of this many keys (a multiple of 64)")
    sms = integer(1, MAX_NUM_SM)
    parser.add_argument("--sms", type=sms, help="multiprocessors of the GPU (default CUFLASH_NUM_SM or 132)")
    arch = integer(MIN_ARCH)
    parser.add_argument("--arch", type=arch, help="its compute capability, 90 for 9.0 (default CUFLASH_ARCH or 90)")
    parser.add_argument("--all", action="store_true", help="print every row of the tables")
    parser.add_argument("--plot", metavar="FILE", help="draw the plan too (.png, .svg, .pdf)")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Plan, print, draw."""
    seqlens = np.array(arguments.seqlens, np.int64)
    num_heads_q, num_heads_kv = arguments.heads
    with environment(CUFLASH_NUM_SM=arguments.sms, CUFLASH_ARCH=arguments.arch, CUFLASH_BACKEND="numpy"):
        metadata = get_scheduler_metadata(
            len(seqlens),
            arguments.seqlen_q,
            int(seqlens.max()),
            num_heads_q,
            num_heads_kv,
            arguments.headdim,
            seqlens,
            qkv_dtype=arguments.dtype,
            headdim_v=arguments.headdim_v,
            page_size=arguments.page_size,
            causal=arguments.causal,
            window_size=tuple(arguments.window),
            attention_chunk=arguments.chunk,
            num_splits=arguments.num_splits,
            split_size=arguments.split_size,
        )
    if arguments.plot is not None:
        _plot(metadata, arguments.plot)  # first, so that a wrong file name prints nothing but its error
    work = metadata.work()
    shown = None if arguments.all else _SHOWN
    aligned(str(metadata))
    _print_table(("sequence", "keys", "parts", "blocks"), _sequence_rows(work, seqlens), shown)
    _print_table(("block", "keys", "parts", "sequence:kv_head[keys]"), _block_rows(work), shown)
    shares = np.bincount(work["block"], work["key_end"] - work["key_begin"])
    if shares.size:
        print(f"\n  keys per block, 0 to {shares.max():.0f}\n  {bars(shares, width() - 4)}")
    if arguments.plot is not None:
        print(f"\n  drawn: {arguments.plot}")
    return 0


def _sequence_rows(work: Any, seqlens: Any) -> list[tuple[Any, ...]]:
    """(sequence, keys, parts of its most cut item, first-last block) of every sequence."""
    rows: list[tuple[Any, ...]] = []
    for sequence, seqlen in enumerate(seqlens):
        mine = work[work["sequence"] == sequence]
        _, parts = np.unique(mine[["kv_head", "row_block"]], return_counts=True)
        blocks = _span(mine["block"].min(), mine["block"].max()) if mine.size else "-"
        rows.append((sequence, seqlen, parts.max(initial=0), blocks))
    return rows


def _block_rows(work: Any) -> list[tuple[Any, ...]]:
    """(block, keys, parts, what it reads) of every block that reads keys."""
    rows: list[tuple[Any, ...]] = []
    blocks, starts = np.unique(work["block"], return_index=True)
    for block, mine in zip(blocks, np.split(work, starts[1:])):
        pieces = [f"{w['sequence']}:{w['kv_head']}[{w['key_begin']}:{w['key_end']}]" for w in mine]
        if len(pieces) > 3:
            pieces[1:-1] = [".."]
        rows.append((block, (mine["key_end"] - mine["key_begin"]).sum(), len(mine), " ".join(pieces)))
    return rows


def _print_table(header: tuple[str, ...], rows: list[tuple[Any, ...]], shown: int | None) -> None:
    if not rows:
        return
    print()
    left_out = 0 if shown is None else len(rows) - shown
    if left_out > 1:
        rows = rows[:shown]
    print(table(header, rows))
    if left_out > 1:
        print(f"  .. and {left_out} more: --all")


def _span(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"


def _plot(metadata: SchedulerMetadata, file: str) -> None:
    if not file:  # matplotlib would write .png
        raise ValueError("argument --plot: must name a file, got ''")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        command = packages.install(packages.MATPLOTLIB)
        raise ValueError(f"argument --plot: needs matplotlib: {command} ({error})") from None
    figure = Figure(figsize=(9, 6), layout="constrained")
    metadata.plot(figure.subplots())
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise ValueError(f"argument --plot: {error}") from None
