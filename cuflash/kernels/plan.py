"""The planner's launch: one block, whatever the batch."""

from __future__ import annotations

from ..operands import Lengths
from ..partition import Partition
from ..planner import PLAN_CUTS, largest_divisor
from ..problem import Problem
from .fields import length_fields, mask_fields
from .launch import Launch, make_launch
from .source import Variant

VARIANT = Variant("plan")


def plan_launch(problem: Problem, partition: Partition, lengths: Lengths, words: int) -> Launch:
    """Return the launch that fills a plan of ``words`` int32."""
    batch, row_blocks, num_blocks = problem.batch_size, partition.row_blocks, partition.num_blocks
    units = batch * row_blocks
    # A thread for every unit and for every cut, as far as a block goes.
    threads = min(1024, -(-max(units, num_blocks) // 32) * 32)
    slice_sequences = max(1, -(-batch // threads))
    slice_shift = max(1, min(threads // max(1, batch), row_blocks)).bit_length() - 1
    values = {
        **length_fields(problem, lengths),
        **mask_fields(problem),
        "batch_size": batch,
        "num_heads_kv": problem.num_heads_kv,
        "group": problem.group,
        "rows": partition.rows,
        "row_blocks": row_blocks,
        "num_blocks": num_blocks,
        "num_cuts": (words - PLAN_CUTS - 3 * batch) // 4,
        "divisor": largest_divisor(units * problem.num_heads_kv, num_blocks),
        "cluster": partition.cluster,
        "num_splits": problem.num_splits,
        "split_size": problem.split_size or 0,
        "grain": problem.split_size or partition.grain,
        "min_share": partition.min_share,
        "most_parts": partition.most_parts,
        "parted_share": partition.parted_share,
        "few_blocks": partition.few_blocks,
        "overhead": partition.overhead,
        "overhead_rows": partition.overhead_rows,
        "overhead_short": partition.overhead_short,
        "short_share": partition.short_share,
        "longest_share": partition.longest_share,
        "longest_excess": partition.longest_excess,
        "slice_sequences": slice_sequences,
        "slice_shift": slice_shift,
        "slice_units": slice_sequences * row_blocks if slice_sequences > 1 else -(-row_blocks >> slice_shift),
    }
    shared_bytes = 8 * (threads + 1) + 8 * num_blocks + 4 * -(-num_blocks // 32)
    return make_launch(VARIANT, "PlanParams", 1, threads, shared_bytes, values)
