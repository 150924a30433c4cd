"""The family of few rows, ``decode.cu``: keys are the rows of the matrix product, packed query rows its columns."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from ..device import Device
from ..metadata import SchedulerMetadata
from ..operands import Operands
from ..partition import Partition
from ..problem import Problem
from .attention import PLAIN, Form, attention_defines, attention_launch
from .launch import Launch, Scratch
from .source import Variant
from .tiles import PADDED_HEADDIMS, Tiling, tiling

NAME = "decode"
_PARTED_SHARE = 960  # where shares would have 1024 keys and more, the whole GPU is used


def partition(problem: Problem, device: Device, max_seqlen_k: int | None) -> Partition | None:
    """Return how the family cuts a problem for a device; None if it cannot."""
    if max(problem.headdim, problem.headdim_v) > PADDED_HEADDIMS[-1]:
        return None
    tiles = tiling(problem, device, max_seqlen_k)
    max_blocks = tiles.max_blocks(problem, device)
    sizes = tiles.rows, tiles.row_blocks, max_blocks, tiles.cluster, tiles
    # One block merges all parts of an item. And two multiprocessors share their way to memory, for which one block of 8
    # warps is enough: b1 L50000 8/1 takes 17.0 us on 132 blocks, on 80 16.7, on 66 14.3, on 44 13.3 (H200).
    few_blocks = device.num_sm // 2 if tiles.blocks_per_sm == 1 else 0
    partition = Partition(NAME, *sizes, parted_share=_PARTED_SHARE, few_blocks=few_blocks)
    # Keys of 8 bits: shares of as many bytes as with 16. What an item costs beside reading stays what it is, and that
    # is more keys, also of long shares.
    if problem.is_quantised:
        return replace(partition, min_share=128, overhead=8)
    return partition


@lru_cache(maxsize=1024)
def decode_variant(problem: Problem, tiles: Tiling, form: Form = PLAIN) -> Variant:
    """Return the attention kernel for a problem; see :func:`cuflash.kernels.attention.attention_defines`."""
    own = (
        ("HEAD_DIM", problem.headdim),
        ("PADDED_HEAD_DIM", tiles.headdim),
        ("WARPS", tiles.warps),
        ("QUERY_BUFFERS", tiles.query_buffers),
    )
    return Variant(NAME, attention_defines(problem, tiles, own, form))


def variant(problem: Problem, partition: Partition, form: Form = PLAIN) -> Variant:
    """Return the kernel of a partition."""
    return decode_variant(problem, partition.tiles, form)


def launch(
    problem: Problem, operands: Operands, metadata: SchedulerMetadata, arrays: dict[str, str]
) -> tuple[Launch, dict[str, Scratch]]:
    """Return the launch and the scratch that it needs; see :func:`cuflash.kernels.attention.attention_launch`."""
    kernel = variant(problem, metadata.partition, Form.of(operands))
    return attention_launch(kernel, problem, operands, metadata, arrays)
