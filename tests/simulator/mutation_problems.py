"""Problems for mutation tests of the library's kernels.

    PYTHONPATH=tests python -m cuflash.simulator.mutate tests/simulator/mutation_problems.py --kernel decode

A problem is small, and a simulated GPU has few multiprocessors, so that a mutant takes some milliseconds. Together the
problems reach what a variant of each kernel does: every mask, kind of cache, query length and split, lengths on and
beside the boundaries of tiles, stale plans.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import schedules
from inputs import packed_inputs
from problems import DTYPES, Backend, Case, check_cache, check_lse, check_out, expected, make_inputs, run

import cuflash
from cuflash import kernels, planner
from cuflash.backends import sim
from cuflash.backends.sim import SimulatedMachine as Simulated
from cuflash.kernels import decode, extend, extend_wgmma, mla, mla_wgmma
from cuflash.operands import Lengths
from cuflash.simulator.mutate import Equivalent, Mutant

Arrays = tuple[np.ndarray, ...]
SIM = Backend("sim", lambda array: array, np.asarray)


@contextlib.contextmanager
def _gpu(num_sm: int, backend: str = "sim", family: ModuleType = decode) -> Iterator[None]:
    """A GPU of some multiprocessors, on which every problem runs in one kernel family."""
    os.environ.update(CUFLASH_BACKEND=backend, CUFLASH_NUM_SM=str(num_sm))
    with mock.patch.object(kernels, "FAMILIES", (family,)):
        yield


def _attention(
    case: Case,
    num_sm: int,
    nonsense: bool = False,
    family: ModuleType = decode,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Callable[[], Arrays]:
    @functools.cache
    def given() -> tuple[dict[str, Any], Any]:
        inputs = make_inputs(case)
        if change is not None:
            change(inputs)
        return inputs, expected(inputs)

    def problem() -> Arrays:
        inputs, answer = given()
        counters = []
        scratch, prepare = Simulated.scratch, Simulated.prepare

        def watched(self: Any, name: str, memory: Any) -> Any:
            array = scratch(self, name, memory)
            if name == "counters":
                counters.append(array)
            return array

        def prepared(self: Any, bound: Any, memory: Any) -> Any:
            launch = prepare(self, bound, memory)

            def launched(params: bytes, arrays: Any) -> None:
                if nonsense:  # a negative number that the device alone sees counts as 0
                    named = dict(zip(bound.launch.pointers, ([*arrays, *memory][i] for i in bound.places), strict=True))
                    lengths, leftpad = (named.get(name) for name in ("cache_seqlens", "cache_leftpad"))
                    if leftpad is not None:
                        lengths[lengths == leftpad] = -70
                        leftpad[leftpad == 0] = -9
                    else:
                        lengths[lengths == 0] = -70
                launch(params, arrays)

            return launched

        with _gpu(num_sm, family=family), mock.patch.multiple(Simulated, scratch=watched, prepare=prepared):
            out, lse, k_cache, v_cache = run(case, inputs, SIM)
        check_out(case, out, answer)
        check_lse(case, lse, answer)
        slack = int(case.kv_dtype is not None and case.rotary is not None)
        check_cache("v_cache", v_cache, answer.v_cache, slack)
        check_cache("k_cache", k_cache, answer.k_cache, slack)
        assert not any(array.any() for array in counters), "the next launch finds counters that are not 0"
        return out, lse

    return problem


# With this softmax_scale, a score of 4096 + 3 / 1024 times score_scale is rounded to 2^22, the least huge offset.
NEARLY_HUGE = 709.7822475235729


def _nearly_huge(first: int, step: int, kind: str) -> Callable[[dict[str, Any]], None]:
    """Changes inputs: scores of every `step`th head lie around the boundary of huge ones.

    They rise and fall in waves, or reach the boundary, maybe not early, and do not pass it, or pass it in few keys,
    beside which the many others still count.

    Positive ones become huge where they rise, negative ones, in every other row of the cache, where they fall, by steps
    of about 1 in log2 units. The other heads have scores far from the boundary.
    """

    def change(inputs: dict[str, Any]) -> None:
        q, k_cache = inputs["q"], inputs["k_cache"]
        rows, slots = k_cache.shape[:2]
        noise = np.random.default_rng(0)
        if kind == "waves":
            steps = np.rint(-16 * np.cos(np.arange(slots) / 60)) + noise.integers(-3, 4, slots)
        elif kind == "level":
            steps = np.minimum(noise.integers(-60, 9, slots), 3)
        elif kind == "late":
            steps = np.minimum(noise.integers(-60, 9, slots), 3) - 60 * (np.arange(slots) < 140)
        else:
            steps = np.where(np.arange(slots) % 211 == 200, noise.integers(4, 8, slots), noise.integers(-7, -4, slots))
        q[...] = 0
        q[..., 0], q[..., 1] = 8, 1
        q[..., first::step, 0] = 64
        keys = np.zeros(k_cache.shape, k_cache.dtype)
        keys[..., 0] = np.where(np.arange(rows) % 2, -64, 64)[:, None, None]
        keys[..., 1] = steps[:, None] / 1024
        seen = np.isfinite(k_cache[..., 0].astype(np.float32))
        k_cache[seen] = keys[seen]

    return change


def _few_nearly_huge(kind: str) -> Callable[[dict[str, Any]], None]:
    """The same of four heads of a sequence, those of one parity among eight, which lanes of a warp share.

    Scores of all other heads are far from the boundary. Two sequences each, of scores above and below 0, have the same.
    """

    def change(inputs: dict[str, Any]) -> None:
        _nearly_huge(0, 1, kind)(inputs)
        for b, q in enumerate(inputs["q"]):
            first = b // 4 * 8 + b // 2 % 2
            far = np.ones(q.shape[1], bool)
            far[first : first + 8 : 2] = False
            q[:, far, 0] = 8

    return change


def _grow(first: int) -> Callable[[dict[str, Any]], None]:
    """Changes inputs: keys from this slot on are larger, and every eighth query, whose maxima move there."""

    def change(inputs: dict[str, Any]) -> None:
        inputs["q"][..., ::8, :, :] *= np.array(8, inputs["q"].dtype)
        keys = inputs["k_cache"][:, first:]
        keys[np.isfinite(keys.astype(np.float32))] *= np.array(4, keys.dtype)

    return change


def _has_cluster(mutant: Mutant) -> bool:
    return mutant.cluster > 1


def _has_8_rows(mutant: Mutant) -> bool:
    """The variants of decode.cu of 8 warps and of clusters; that of many items has 4 warps, 32 rows, no cluster."""
    return mutant.kernel == "decode" and (mutant.cluster > 1 or mutant.threads == 256)


def _has_two_buffers(mutant: Mutant) -> bool:
    """The variant of 8 warps fetches the next item's queries while it reads an item."""
    return mutant.kernel == "decode" and mutant.cluster <= 1 and mutant.threads == 256


def _has_64_rows(mutant: Mutant) -> bool:
    """The variant of extend_wgmma.cu of one warpgroup that multiplies; those of 128 rows have two."""
    return mutant.kernel == "extend_wgmma" and mutant.threads == 256


SOURCES = [Path(__file__).parents[2] / "kernels_cu" / folder for folder in ("", "include", "include/ptx")]
EQUIVALENT = (
    Equivalent(
        "a row block that a sequence does not have has no keys: a cut in it is one at its end, whatever it costs",
        file=r"plan\.cu",
        source=r"place \* p\.rows <",
        call=r"overhead_at = ",
        kind="lt -> le",
        context=r"\nld\.global\.u32 .*\nmul\.wide\.s32 .*\nsetp\.lt\.s64 .*$",
        kernel="plan",
    ),
    Equivalent(
        "one warpgroup has all rows: none lets tiles pass",
        unreached=True,
        call=r"block\.ring\.(full|empty)\[place\.slot\]",
        variants=_has_64_rows,
    ),
    Equivalent(
        "one warpgroup has all rows, fewer than lie together: the place of the group is 0",
        file=r"(swizzle|rows_tiles)\.cuh",
        kind="add -> sub",
        operands=r"(^|\n)and\.b32 %r\d+, %r\d+, -8192$",
        variants=_has_64_rows,
    ),
    Equivalent(
        "a tile is scored again: its scores are waited for with all that is under way",
        file=r"wgmma\.cuh",
        source=r"wgmma\.wait_group",
        kind="drop a wait|wait for one group less",
        context=r"selp\.u32 .*\nsetp\.eq\.s32 .*\n@%p\d+ bra .*\n(mov\.u32 .*\n)?wgmma\.wait_group\S* 0$",
        kernel="extend_wgmma",
    ),
    Equivalent(
        "before maxima move the scores are waited for with all that is under way",
        file=r"wgmma\.cuh",
        source=r"wgmma\.wait_group",
        kind="drop a wait|wait for one group less",
        context=r"\nor\.pred .*\nwgmma\.wait_group\S* 0$",
        kernel="extend_wgmma",
    ),
    Equivalent(
        "a sink of -inf that is added where no key is seen: the LSE is -inf and the output 0 with it and without",
        file=r"combine\.cuh",
        source=r"sink > -infinity\(\) \?",
        kind="gt -> ge",
    ),
    Equivalent(
        "four rows at once have four parts at most: one pass, which begins with part 0",
        file=r"combine\.cuh",
        source=r"number = exists \? parts\.count - begin",
        call=r"merge_parts<4, 4>",
        kind="sub -> add",
    ),
    Equivalent(
        "a cache without a page table: it is not asked where that decides whether a key is there",
        file=r"paging\.cuh",
        source=r"page_indptr && !cache\.page_table",
        call=r"place\.enter\(p\.cache, s\.sequence\)",
        unreached=True,
    ),
    Equivalent(
        "with split_size no block waits for others: the last one merges",
        file=r"memory\.cuh",
        kind="drop an atomic",
        operands=r"(^|\n)add\.s64 %rd\d+, %rd\d+, 8\n",
        kernel="extend.*",
        unreached=True,
    ),
    Equivalent(
        "parameters are fetched ahead of their use: what they are decides about a sleep of no time alone",
        file=r"stream\.cuh",
        source=r"any \|= |nanosleep",
    ),
    Equivalent(
        "a negative quotient is raised to 0, however it is rounded",
        file=r"plan\.cu",
        source=r"slack = max\(0ll",
        kind="add -> sub",
        context=r"shr\.u64 (%\w+), %\w+, 63\nadd\.s64 %\w+, %\w+, \1$",
    ),
    Equivalent(
        "the term that rounds a signed quotient towards zero is 0, since no dividend here is negative",
        kind="add -> sub",
        context=r"(shr\.s(32|64) (%\w+), %\w+, (31|63)\nshr\.u\2 (%\w+), \3, \d+|shr\.u(32|64) (%\w+), %\w+, (31|63))\n"
        r"(.*\n)?add\.s\d+ %\w+, %\w+, (\5|\7)$",
        file=r"(decode|plan|merge)\.cu"
        r"|(ptx/\w+|scan|swizzle|combine|merge_warps|mma|segment|fragment|loader|queries)\.cuh"
        r"|(rows_tiles|rows_together|rows_queries)\.cuh",
    ),
    Equivalent(
        "the difference of equal numbers is the 0 of the other choice",
        file="lengths.cuh",
        source=r"return end > begin \?",
        kind="gt -> ge",
    ),
    Equivalent(
        "p - left is 0, the other choice, where p equals left",
        file="mask.cuh",
        source=r"p > window_left",
        kind="gt -> ge",
        instruction=r"setp\.gt\.s32 %p\d+, %r\d+, %r\d+",
    ),
    Equivalent(
        "the larger of 1 and the number of rows is 1 either way where that is 1",
        file=r"decode\.cu",
        source=r"max\(s\.valid_rows, 1\)",
        kind="gt -> ge",
    ),
    Equivalent(
        "nothing hidden is the 0 of the other choice",
        file="mask.cuh",
        source=r"hidden = max\(hidden, behind - window_right",
        kind="gt -> ge",
        instruction=", 0$",
    ),
    Equivalent(
        "a variant of 8 rows has one row block: what is subtracted instead of added is its first row, 0",
        file=r"(segment|softmax|combine)\.cuh|decode\.cu",
        source=r"query_of\(p, (s|segment)\.first_row \+|packed = s\.first_row \+ row",
        kind="add -> sub",
        operands=r"(^|\n)(shl\.b32 .*, 3|ld\.shared\.(v\d\.)?u32 .*)$",
        variants=_has_8_rows,
    ),
    Equivalent(
        "a second pass over the queries, which a block with more threads than chunks does not make",
        file="queries.cuh",
        source=r"i \+= kThreads|Rows::offset\(row",
        kind="add -> sub|lt -> le",
        instruction=r"add\.s32 %r\d+, %r\d+, (128|256)$|setp\.lt\.s32 %p\d+, %r\d+, -(64|192)$",
        variants=_has_8_rows,
    ),
    Equivalent(
        "rows without keys have begin 0 and an end of at most 0; an end below its begin is raised to it",
        file="mask.cuh",
        source=r"first_query > last_query \|\| begin >= end",
        kind="or -> and|ge -> gt",
        kernel="decode",
    ),
    Equivalent(
        "a variant of 8 rows has one row block, whose last row is the last query: no key is hidden from it",
        file="mask.cuh",
        source=r"window_right >= 0|return lengths\.seqlen_k - hidden",
        call=r"end = last_visible\(",
        kind="lt -> le|sub -> add",
        variants=_has_8_rows,
    ),
    Equivalent(
        "likewise, where the compiler asks for the window's right side first",
        file="segment.cuh",
        source=r"if \(s\.valid_rows > 0\)",
        kind="lt -> le",
        instruction=", 0$",
        variants=_has_8_rows,
    ),
    Equivalent(
        "a variant of 8 rows has one row block, whose last row is the last query: no key is hidden from rows behind it",
        file="fast_divisor.cuh",
        source=r"__umulhi\(number << 1",
        kind="add -> sub",
        context=r"shr\.u32 .*\nadd\.s32 .*\nshl\.b32 (%r\d+), %r\d+, 1\nadd\.s32 %r\d+, \1, -2$",
        variants=_has_8_rows,
    ),
    Equivalent(
        "of the number of rows a loader uses the last one alone: in a variant of 8 rows, nothing is hidden behind it",
        file="segment.cuh",
        source=r"s\.valid_rows = max\(0",
        kind="min -> max",
        variants=lambda mutant: _has_8_rows(mutant) and mutant.copy > 0,
    ),
    Equivalent(
        "a variant of 8 rows has one row group, whose first row is 0",
        file="merge_warps.cuh",
        source=r"row = g \* 8 \+ i / kVectors",
        kind="add -> sub",
        instruction=r", %r\d+$",
        variants=_has_8_rows,
    ),
    Equivalent(
        "a thread's number is never -128: more threads than vectors of a row group, of which no thread has two",
        file="merge_warps.cuh",
        source=r"i < 8 \* kVectors; i \+= kThreads",
        kind="lt -> le",
        instruction=", -128$",
        variants=_has_8_rows,
    ),
    Equivalent(
        "one pass over the vectors of a row group: the comparison has read the old value, the new one is never used",
        file="merge_warps.cuh",
        source=r"i < 8 \* kVectors; i \+= kThreads",
        kind="add -> sub",
        instruction=", (128|256)$",
    ),
    Equivalent(
        "one more pass over no parts adds zeros",
        file="combine.cuh",
        source=r"begin < parts\.count; begin \+= kWide",
        kind="gt -> ge",
        instruction=r", %r\d+$",
    ),
    Equivalent(
        "one more split that does not exist adds zeros",
        file="combine.cuh",
        source=r"is_next = begin \+ i < parts\.count",
        kind="ge -> gt",
    ),
    Equivalent(
        "all splits that exist count as before, those that do not add zeros",
        file="combine.cuh",
        source=r"is_next = begin \+ i < parts\.count",
        kind="add -> sub",
        kernel="extend.*",
    ),
    Equivalent(
        "four rows at once are merged in one pass, before which all is 0",
        file="combine.cuh",
        source=r"r \* kLanes \+ i\)",
        call=r"scale\(o\[r\], kRowsAtOnce == 1 \? before",
        kind="shuffle from another lane",
    ),
    Equivalent(
        "where the sink equals the largest score, either may be the maximum: results differ by rounding at most",
        file="combine.cuh",
        source=r"state\.sum != 0\.0f && above >= 0\.0f",
        kind="ge -> gt",
    ),
    Equivalent(
        "zero_of_each_lane() is 0",
        file=r"decode\.cu",
        source=r"zero_of_each_lane\(\)|int h = -2|to = ring",
        kind="add -> sub",
        operands=r"(^|\n)and\.b32 %r\d+, %r\d+, %r\d+$",
    ),
    Equivalent(
        "h is even",
        file="loader.cuh",
        source=r"exists = is_tile &&",
        kind="gt -> ge",
        instruction=", -1$",
    ),
    Equivalent(
        "of a segment's fields, `visible` is read with split_size alone",
        file=r"decode\.cu",
        source=r"block\.segments\[buffer\] = segment",
        kind="drop a store",
        variants=lambda mutant: _has_two_buffers(mutant) and mutant.copy == 4,
    ),
    Equivalent(
        "where all queries are there before one is flipped, each piece of a row is flipped by one thread or another",
        file="swizzle.cuh",
        kind="and -> or",
        context=r"add\.s32 .*\nshr\.s32 .*, 3\nshl\.b32 .*, 7\nand\.b32 .*, 7$",
        variants=_has_two_buffers,
    ),
    Equivalent(
        "a part that begins at the item's end is empty: it ends there, or where it begins",
        file="schedule.cuh",
        source=r"key >= \(unsigned\)keys\.end",
        kind="lt -> le|and -> or",
        kernel="decode",
    ),
    Equivalent(
        "with tiles of 16 keys, lanes 16 to 31 repeat what lanes 0 to 15 look up: a shuffle from 8 lanes back is one "
        "from 8 lanes on",
        file=r"decode\.cu",
        source=r"int h = -2|to = ring",
        kind="add -> sub",
        instruction=", 8$",
        variants=_has_cluster,
    ),
    Equivalent(
        "a part of a cluster is no negative number of keys: the term that rounds the quotient towards zero is 0",
        file="schedule.cuh",
        source=r"\* part / parts",
        kind="add -> sub",
        context=r"shr\.u64 (%rd\d+), %rd\d+, 62\nadd\.s64 %rd\d+, %rd\d+, \1$",
        kernel="decode",
    ),
    Equivalent(
        "a part that begins at the item's first key: the larger of both is that key",
        file="schedule.cuh",
        source=r"key <= \(unsigned\)keys\.begin",
        kind="gt -> ge",
        kernel="decode",
    ),
    Equivalent(
        "with tiles of 32 keys, a lane is its own remainder: what is subtracted is 0",
        file="segment.cuh",
        source=r"ShareWalker\(const Share& share\)",
        kind="sub -> add",
        context=r"and\.b32 (%r\d+), %r\d+, -32\nsub\.s32 %r\d+, %r\d+, \1$",
    ),
    Equivalent(
        "with tiles of 16 keys, lanes 16 to 31 look up rows that no copy asks them for",
        file=r"decode\.cu",
        source=r"int h = -2",
        kind="sub -> add",
        context=r"and\.b32 (%r\d+), %r\d+, -16\nsub\.s32 %r\d+, %r\d+, \1$",
        variants=_has_cluster,
    ),
    Equivalent(
        "32 rows have more chunks than the block has threads",
        file=r"decode\.cu",
        source=r"warp = threadIdx\.x / 32",
        kind="gt -> ge",
        instruction=", 255$",
        variants=lambda mutant: not _has_8_rows(mutant),
    ),
    Equivalent(
        "with tiles of 32 keys: a shuffle from 16 lanes back is one from 16 lanes on",
        file=r"(segment|loader|mma|registers)\.cuh|decode\.cu",
        source=r"\+\+item;|key_? [+-]= kWarps \* kTileKeys|u32 slot = ring|\*= alpha\[g\]|mad\.wide\.u32",
        kind="add -> sub",
        instruction=r"add\.s32 .*, 16$",
        variants=lambda mutant: not _has_cluster(mutant),
    ),
    Equivalent(
        "a key of a cut is 0 or a multiple of 16",
        file="segment.cuh",
        source=r"item (>|==) share\.end\.item",
        kind="lt -> le",
        instruction=", 1$",
    ),
    Equivalent(
        "a window begins at most 7 keys behind the beginning of a segment of 8 rows: further keys are not its first",
        file="softmax.cuh",
        source=r"key < begin \|\|",
        kind="lt -> le",
        operands=r"^add\.s32 %r\d+, %r\d+, (8|16|24)\nselp",
        variants=_has_8_rows,
    ),
    Equivalent(
        "the window of a row of row group g begins at most 8 g + 7 keys behind the beginning of its segment: no key of "
        "an eighth e > g of a tile is its first one",
        file="softmax.cuh",
        source=r"key < begin \|\|",
        kind="lt -> le",
        operands=r"\nselp",
        variants=lambda mutant: not _has_8_rows(mutant) and mutant.copy % 4 > mutant.copy // 8,
    ),
    Equivalent(
        "more than 2^31 - 1 keys: the host refuses them, and no cache holds them",
        file="lengths.cuh",
        source=r"min\(new_keys, most - keys\)",
        kind="sub -> add|drop.*",
        instruction=r"sub\.s32",
        kernel="decode|extend",
    ),
    Equivalent(
        "a variant of 8 rows has one row group: nothing waits for a second one",
        file="merge_warps.cuh",
        source=r"if \(g > 0\) __syncthreads",
        kind="drop a barrier",
        unreached=True,
        variants=_has_8_rows,
    ),
    Equivalent(
        "one pass for 16 vectors of a row: the comparison has read the old value, the new one is never used",
        file="combine.cuh",
        source=r"int vector = lane; vector <",
        kind="add -> sub",
        instruction=", 32$",
    ),
    Equivalent(
        "a score that equals the threshold: the warp looks at its maxima, and none moves",
        file="softmax.cuh",
        source=r"exceeds \|= lane_maximum",
        kind="gt -> ge",
    ),
    Equivalent(
        "the way of huge maxima moves maxima that are not huge with the same results",
        file="softmax.cuh",
        source=r"some_huge \|= is_huge",
        kind="and -> or",
        kernel="decode",
    ),
    Equivalent(
        "a walker's key never is the end of its share's part: cuts that fell together are dropped, and a split that is "
        "not the item's last one in a share ends before the share does",
        file="segment.cuh",
        source=r"kHasSplitSize && key >= part_end",
        kind="ge -> gt",
        instruction=r"%r\d+$",
    ),
    Equivalent(
        "a score that equals the threshold and is finite, others are huge: either maximum is right, results differ by "
        "rounding at most",
        file="softmax.cuh",
        source=r"moves = top > threshold_",
        kind="gt -> ge|leu -> ltu",
    ),
    Equivalent(
        "64-bit division, whose 32-bit shortcut gives the same quotient: without it no result changes",
        file=r"(plan|merge)\.cu|schedule\.cuh",
        kind="and -> or",
        instruction=r"and\.b64 .*, -4294967296$",
    ),
    Equivalent(
        "the choice between 64-bit and 32-bit division; fewer than 2^32 rows, whose LSEs alone fill 16 GiB, fit both",
        file=r"merge\.cu",
        source=r"row (%|/) p\.heads|row >= rows",
        kind="or -> and|eq -> ne|invert a branch",
        context=r"or\.b64 (.*\n){0,3}.*$",
    ),
    Equivalent(
        "64-bit division for more than 2^32 rows",
        file=r"merge\.cu",
        source=r"row (%|/) p\.heads|row >= rows",
        unreached=True,
    ),
    Equivalent(
        "the host refuses a merge of no parts",
        file=r"merge\.cu",
        source=r"i < p\.states|return lse == infinity",
        kind="gt -> ge",
        instruction=r"s32 .*, 0$",
    ),
    Equivalent(
        "a mask of parts has no heads: their step is 0",
        file=r"merge\.cu",
        source=r"return batch \* s\.batch",
        call=r"p\.mask \?",
        kind="add -> sub",
        context=r"mul\.lo\.s64 (%rd\d+), .*\nadd\.s64 %rd\d+, %rd\d+, \1$",
    ),
    Equivalent(
        "an address of the mask that is only compared with null; no row lies as many bytes behind the mask's first one "
        "as that lies behind null",
        file=r"merge\.cu",
        source=r"p\.mask \?",
        kind="add -> sub",
        context=r"add\.s64 %rd\d+, %rd\d+, (%rd\d+)\nadd\.s64 %rd\d+, %rd\d+, \1$",
    ),
    Equivalent(
        "the logarithm of infinity or of tiny numbers: a sum of exp(lse - maximum) is 1 to the number of parts",
        file=r"merge\.cu",
        source="logf",
        kind="lt -> le",
        instruction="2139095040|0f00800000",
    ),
    Equivalent(
        "all lanes of the warp hold the same value for the same word",
        file=r"plan\.cu|scan\.cuh",
        source=r"lane == 0\) (warp_cuts|starts)|value \+= other",
        kind="ne -> eq|invert a branch",
        instruction=r"setp\.ne\.s32 %p\d+, %r\d+, 0|@%p",
    ),
    Equivalent(
        "the place of a row block is not negative: the term that rounds its half towards zero is 0",
        file="schedule.cuh",
        source=r"return place % 2",
        kind="add -> sub",
        context=r"shr\.u32 (%r\d+), %r\d+, 31\nadd\.s32 %r\d+, %r\d+, \1$",
    ),
    Equivalent(
        "a sequence without rows has no row block behind the first place, whether it counts as having one or none",
        file="schedule.cuh",
        source=r"row_blocks = \(num_rows - 1\)",
        kind="add -> sub",
        context=r"shr\.u32 (%r\d+), %r\d+, \d+\nadd\.s32 %r\d+, %r\d+, \1$",
        kernel="decode|extend.*|mla.*",
    ),
    Equivalent(
        "a variant of 8 rows has one row block: behind a sequence without rows the next item is one further",
        file=r"segment\.cuh",
        source=r"is_empty = ",
        kind="lt -> le|gt -> ge",
        operands=r"shl\.b32 .*, 3(\n|$)",
    ),
    Equivalent(
        "a variant of 8 rows has one row block: the next item is one further, by either way",
        file=r"segment\.cuh",
        source=r"is_empty \?",
        kind="sub -> add|swap a selection",
        variants=_has_8_rows,
    ),
    Equivalent(
        "a variant of 8 rows, or of mla.cu of 16, has one row block, whose place is 0: what is asked of other places "
        "makes 0 of it, too",
        file="schedule.cuh",
        source=r"place == 0\) return 0|row_blocks = \(num_rows - 1\)|row_blocks - 1 - place",
        variants=lambda mutant: _has_8_rows(mutant) or (mutant.kernel == "mla" and mutant.threads == 128),
    ),
    Equivalent(
        "without a mask, what a row block sees is all keys also where the mask is asked",
        file=r"plan\.cu",
        source=r"mask = p\.mask|cuts \+ p\.num_blocks",
        kind="gt -> ge",
        instruction=", -1$",
        operands=r"^and\.b32 ",
    ),
    Equivalent(
        "pairs of an odd number of row blocks: their longest one is not read",
        file=r"plan\.cu",
        source=r"p\.row_blocks % 2 == 0 && place % 2 == 0",
        kind="and -> or",
        operands=r"^ld\.param",
    ),
    Equivalent(
        "as many items as blocks: a share is one item, by either formula",
        file=r"plan\.cu",
        source=r"items <= blocks \|\|",
        kind="le -> lt",
    ),
    Equivalent(
        "slices behind the last sequence: the cost before them is the total or more, and no cut lies there",
        file=r"plan\.cu",
        source=r"place = s < p\.batch_size \?",
        kind="gt -> ge",
    ),
    Equivalent(
        "without blocks there are no cuts that could depend on what an item costs",
        file=r"plan\.cu",
        source=r"even = shortest >= longest|if \(!even\)",
        kind="ge -> gt|invert a branch",
        variants=lambda mutant: mutant.copy == 0,
    ),
    Equivalent(
        "a search among the slices of at least 32 threads",
        file=r"plan\.cu",
        source=r"before \+ blockDim\.x \+ 1",
        kind="lt -> le",
        instruction=r", 2$",
    ),
    Equivalent(
        "one more pass, behind the last block, in which no cut is kept",
        file=r"plan\.cu",
        source=r"first < blocks",
        kind="lt -> le",
        instruction=r"setp\.lt\.s32 %p\d+, %r\d+, %r\d+$",
    ),
    Equivalent(
        "a key is 0 or a multiple of 16",
        file=r"plan\.cu",
        source=r"if \(cut\.key > 0\)",
        kind="lt -> le",
        instruction=", 1$",
    ),
    Equivalent(
        "what a row sees ends behind its beginning, except that of rows before the first key, which begins at 0",
        file="mask.cuh",
        source=r"first_query > last_query \|\| begin >= end",
        kind="ge -> gt",
        kernel="plan",
    ),
)
MANY = (0, 64, 15, 16, 17, 40, 33, 0, 128, 5)
LENGTHS = (
    (1,),
    (2600,),
    (33, 700),
    (31, 32, 0, 1),
    (1100, 15, 1500),
    MANY,
    (65,),
    (300, 511, 513),
    tuple(range(0, 140, 7)),
)
# Of each, problems with one, two and five queries of a sequence need other heads to have the rows of one variant.
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"page_size": 1, "plan": "stale"},
    {"page_size": 16, "layout": "HND", "leftpad": True},
    {"page_size": 3, "sinks": True, "batch_idx": True},
    {"queries": 2, "causal": True, "plan": "given"},
    {"queries": 2, "window": (19, 3), "leftpad": True},
    {"page_size": 64, "window": (100, 0), "plan": "reused"},
    {"window": (700, 3), "leftpad": True, "batch_idx": True},
    {"scale": 0.0, "plan": "stale", "page_size": 48},
    {"scale": -0.2, "sinks": True},
    {"scale": 12.0, "page_size": 16, "batch_idx": True},
    {"queries": 2, "scale": -3.0, "sinks": True, "causal": True, "plan": "stale", "leftpad": True},
    {"ragged": True, "queries": 2, "causal": True, "page_size": 16, "sinks": True},
    {"ragged": True, "queries": 2, "leftpad": True, "window": (5, 1), "plan": "stale"},
    {"queries": 5, "causal": True, "page_size": 3, "layout": "HND"},
    {"queries": 5, "window": (2, 3), "batch_idx": True, "plan": "given"},
    {"queries": 5, "window": (40, -1), "leftpad": True},
    {"queries": 2, "new": 2, "rotary": "half", "page_size": 16, "causal": True},
    {"new": "ragged", "leftpad": True, "page_size": 3, "batch_idx": True},
)
SPLITS: tuple[dict[str, Any], ...] = (
    {"split_size": 64},
    {"split_size": 128, "layout": "HND", "sinks": True},
    {"split_size": 192, "leftpad": True, "plan": "stale"},
    {"split_size": 256, "queries": 2, "window": (300, 0), "page_size": 16, "scale": 5.0},
    {"split_size": 64, "queries": 5, "causal": True, "plan": "stale"},
    {"split_size": 64, "plan": "stale", "queries": 2, "window": (90, 3)},
    {"split_size": 128, "scale": -0.3, "ragged": True, "queries": 2, "window": (70, 5)},
    {"split_size": 64, "plan": "given"},
)
MANY_ROWS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True, "page_size": 16},
    {"causal": True, "page_size": 3, "leftpad": True, "plan": "stale"},
    {"window": (40, 3), "layout": "HND", "sinks": True},
    {"window": (90, 0), "page_size": 64, "batch_idx": True, "plan": "given"},
    {"negative_pages": True, "page_size": 16, "scale": -0.3},
    {"merge": True, "causal": True, "plan": "reused"},
    {"merge": "in place", "csr": True, "page_size": 16, "window": (20, -1)},
    {"new": 3, "causal": True, "scale": 8.0, "strided": True},
    {"scale": 0.0, "plan": "stale", "num_splits": 3},
    {"scale": 3e6, "causal": True},  # maxima that are subtracted from scores
    {"new": "ragged", "window": (30, 5), "page_size": 16, "leftpad": True},
    {"unowned": (3, 2), "sinks": True, "merge": True},
)
TREES: tuple[dict[str, Any], ...] = (
    {},
    {"page_size": 16, "negative_pages": True},
    {"leftpad": True, "sinks": True},
    {"merge": True, "new": 2, "page_size": 3},
    {"scale": -2.0, "plan": "stale"},
)
MANY_ROWS_SPLITS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True, "page_size": 16},
    {"window": (100, 2), "leftpad": True, "plan": "stale"},
    {"plan": "long", "sinks": True},
    {"scale": 6.0, "merge": True, "plan": "given"},
    {"window": (300, 0), "scale": -0.3, "page_size": 3, "batch_idx": True},
)
LATENT: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True, "page_size": 16},
    {"window": (40, 1), "leftpad": True, "sinks": True},
    {"page_size": 3, "negative_pages": True, "scale": -0.1, "plan": "stale"},
    {"csr": True, "page_size": 64, "merge": True, "batch_idx": True},
    {"new": 2, "causal": True, "page_size": 16, "plan": "given"},
    {"scale": 0.0, "merge": "in place", "plan": "reused"},
    {"scale": 0.3, "strided": True, "layout": "HND"},
)
MERGES: tuple[dict[str, Any], ...] = (
    {"merge": True},
    {"merge": "in place", "ragged": True, "queries": 2, "unowned": (3, 2), "sinks": True},
)
# Pages of negative numbers are cleared in tiles of which rows see different keys: with many short sequences, often.
NEGATIVE: dict[str, Any] = {"negative_pages": True, "csr": True, "page_size": 16, "queries": 5, "causal": True}
SHORT = (40, 20, 33, 50, 47, 20, 60, 16)
# Heads by queries: rows of a row block of 8, and of 32, of which some problems have two.
HEADS: dict[int, dict[int, tuple[tuple[int, int], ...]]] = {
    8: {1: ((8, 1), (6, 2), (1, 1), (7, 1), (2, 2)), 2: ((4, 1), (6, 2)), 5: ((1, 1), (2, 2)), 8: ((1, 1),)},
    32: {
        1: ((40, 1), (34, 2), (33, 1), (28, 1), (20, 1), (44, 1)),
        2: ((20, 1), (24, 2), (32, 1)),
        3: ((17, 1),),
        5: ((7, 1), (16, 1), (4, 1)),
        32: ((1, 1), (2, 1)),
    },
}


def _case(options: dict[str, Any], rows: int, seqlens: tuple[int, ...], seed: int, **more: Any) -> Case:
    options = {"queries": 1, **options, **more}
    queries = options.pop("queries")
    heads = HEADS[rows][queries][seed % len(HEADS[rows][queries])]
    if options.pop("ragged", False):
        options["seqlens_q"] = tuple((queries, 0, 1)[b % 3] for b in range(len(seqlens)))
    else:
        options["seqlens_q"] = queries
    if options.get("new") == "ragged":
        options["new"] = tuple((3, 0, 5)[b % 3] for b in range(len(seqlens)))
    return Case(dtype="bfloat16", heads=heads, seqlens=seqlens, seed=seed, **options)


def _cases() -> Iterator[tuple[Case, int]]:
    """Cases and numbers of multiprocessors.

    They belong to three variants: few items, of which each has a block of 8 warps or more, and 8 rows; many items on
    few multiprocessors, also in splits of fixed size, with 32 rows; clusters.
    """
    for k, options in enumerate(OPTIONS):
        for n in range(4):
            seqlens = LENGTHS[(4 * k + n) % len(LENGTHS)]
            seed = 4 * k + n
            case = _case(options, 8, seqlens, seed, num_splits=(1000, 40, 1000)[seed % 3])
            items = len(seqlens) * case.heads[1]
            yield case, items + (0, 3, 37, 50)[seed % 4]
            if n % 2 == 0:
                case = _case(options, 32, seqlens, seed + 1)
                yield case, 1 + (len(seqlens) * case.heads[1] - 1) // (2, 3)[k % 2]
            if n % 2 == 1:
                case = _case(options, 8, (640, *seqlens[:3]), seed + 2)
                yield case, 5 * len(case.seqlens) * case.heads[1]
    # As many parts as the loads of a merge that are in flight, up to twice as many, and more than a warp has lanes.
    for n in range(15, 36, 2):
        yield _case({"num_splits": 1000}, 8, (2600,), n), n
        yield _case({"num_splits": 1000, "queries": 2, "sinks": True}, 8, (2700, 3), n), n + 1
    yield _case({"split_size": 64}, 32, tuple(64 * n - 3 for n in range(15, 36)), 0), 7
    parts = range(2, 17)  # together as many as multiprocessors; with split_size, a block's splits are one part
    yield _case({}, 32, (*(64 * n for n in parts), *(0,) * 130), 3), sum(parts)
    yield _case({"split_size": 64}, 32, tuple(64 * n for n in parts), 0), 60
    # Cuts of a cluster at an item's first key.
    for k, queries in enumerate((1, 2)):
        yield _case({"window": (20, 0), "queries": queries}, 8, (640, 37, 53, 69, 38), k), 25
    for k, scale in enumerate((None, 6.0)):  # the unrolled loop of 4 x 32 parts
        yield _case({"num_splits": 1000, "scale": scale}, 8, (9200,), k), 150
        yield _case({"split_size": 64, "scale": scale}, 32, (10300,), k + 3), 3
    for k, options in enumerate(MERGES):
        for n in range(2):  # copies that come late, and early
            yield _case(options, 8, (300, 33, 0), k + n, num_splits=1000), 20
            yield _case(options, 32, (300, 500, 0), k + n), 2
            yield _case(options, 8, (640, 33), k + n), 10
            yield _case({**options, "split_size": 64}, 32, (500, 0, 40), k + n), 3
    for k in range(4):
        options = {**NEGATIVE, "batch_idx": k > 1}
        yield _case(options, 8, SHORT[:5], k, num_splits=1000), 20
        yield _case(options, 8, (640, *SHORT[:4]), k), 25
        yield _case(options, 32, SHORT, k), 2
        yield _case({**options, "split_size": 64, "queries": (2, 5)[k % 2]}, 32, SHORT, k), 3
    # Items that have as many splits as there are slots for a cut, and one more.
    yield _case({"split_size": 64, "plan": "long"}, 32, (1025, 1024, 1088, 1089) * 3, 3), 4
    # Two queries among the first rows of a row block.
    yield _case({"split_size": 64, "queries": 3, "window": (40, 3)}, 32, (300, 64, 100), 0), 3
    yield _case({"queries": 3, "window": (40, 3)}, 32, (300, 64, 100), 0), 2
    # Masks that begin and end at every place of a tile.
    for k, options in enumerate(
        ({"window": (40, 3)}, {"window": (50, 2), "queries": 5}, {"causal": True, "queries": 5})
    ):
        seqlens = tuple(range(100, 132))
        yield _case({**options, "num_splits": 1000}, 8, seqlens, k), 70
        yield _case(options, 32, seqlens, k), 5
        yield _case(options, 8, (640, *seqlens), k), 5 * (1 + len(seqlens))
    # Windows that begin at every key of a tile, where no two rows see the same keys.
    for k, seqlens in enumerate((tuple(range(85, 116)), (300, 17, 40, *range(64, 100)))):
        options = {"queries": 32, "window": (20, (0, 7)[k]), "plan": ("none", "stale")[k]}
        yield _case({**options, "split_size": 64}, 32, seqlens, k), 3 + k
        yield _case({**options, "plan": "stale"}, 32, seqlens, k), 12
        yield _case({**options, "queries": 8, "num_splits": 1000}, 8, seqlens, k), 50
        yield _case({**options, "queries": 8}, 8, (640, *seqlens), k), 5 * (1 + len(seqlens))
    # A copy that is far ahead of the arithmetic walks to sequences of which everything differs.
    everything = {"ragged": True, "queries": 2, "leftpad": True, "batch_idx": True, "new": (70, 0, 130, 60, 0, 90, 10)}
    seqlens = (1300, 500, 1100, 400, 1500, 850, 700)
    for k, options in enumerate(({"causal": True}, {"queries": 5, "window": (333, 2), "page_size": 16})):
        options = {**everything, **options}
        yield _case({**options, "num_splits": 1000}, 8, tuple(2 * n for n in seqlens), 2 * k), len(seqlens)
        yield _case(options, 32, seqlens, k), 2 + k
        yield _case({**options, "split_size": (640, 512)[k]}, 32, seqlens, k), 2 + k
    # Short ones: a copy enters them while the ring is filled.
    everything |= {"unowned": (3, 2), "sinks": True, "new": (3, 0, 5, 3, 0, 5, 30)}
    short = (40, 3, 30, 9, 70, 17, 5)
    for k, queries in enumerate((2, 5)):
        for options in ({}, {"split_size": 64}):
            yield _case({**everything, **options, "queries": queries, "merge": "in place"}, 32, short, 2 * k), 1
    for seqlens, options, num_sm in (
        (short, {"num_splits": 1000}, 40),
        ((640, *short[1:]), {"merge": "in place"}, 30),
        ((640, *short[1:]), {"merge": "in place"}, 140),
    ):
        yield dataclasses.replace(_case({**everything, **options}, 8, seqlens, 0), heads=(16, 4)), num_sm
    # Sequences of an odd and of an even number of row blocks, of which some see a tile less than the last one.
    for options, heads, seqlens, queries in (
        ({}, (4, 1), (48, 312, 296, 80, 150), (32, 32, 24, 0, 5)),
        ({"split_size": 64}, (20, 1), (34, 293, 290, 80, 150), (7, 7, 6, 0, 1)),
    ):
        case = dataclasses.replace(_case(options, 32, seqlens, 0), heads=heads, seqlens_q=queries)
        yield dataclasses.replace(case, causal=True), 1
        yield dataclasses.replace(case, window=(60, 3), leftpad=True), 1
    # Row blocks that see as many keys as tiles have, or one more.
    for k, options in enumerate(({"causal": True}, {"window": (90, 1)}, {"causal": True, "split_size": 64})):
        yield _case({**options, "queries": 5}, 32, tuple(range(124, 140)), 1), 4 + k
    for k, options in enumerate(({}, {"split_size": 64})):
        yield _case({**options, "queries": 5, "causal": True}, 32, (*(129,) * 9, *(65,) * 5), 1), 2 + 3 * k
    # Row blocks of one row, behind long ones.
    for options in ({}, {"split_size": 256}):
        yield _case(options, 32, (900, 700, 800, 600), 2), 2
    # Cuts of a stale plan before the last split, in which a window begins.
    for k, seqlens in enumerate(((1300, 1200, 1400, 1250, 1100, 1500, 1210), tuple(range(1490, 1560, 10)))):
        yield _case({"split_size": 64, "plan": "stale", "window": ((90, 0), (500, 0))[k]}, 32, seqlens, 3), 3 - k
    # Many parts of an item, beside items without keys.
    for k in range(3):
        yield _case({}, 32, (*range((5 - k) * 64 + 30 * k, 17 * 64, 64), *(0,) * 130), 3), 128
    for k, parts in enumerate((6, 15, 16, 17, 33)):
        yield _case({"sinks": k == 1}, 32, (64 * parts, *(0,) * 44), 2 + k), 20
    # Parts of a cluster that are longer than its ring.
    for k, options in enumerate(({"page_size": 16}, {"page_size": 3, "leftpad": True})):
        yield _case({**options, "window": (1007, 0)}, 8, (1023, 40), k), 10 + 10 * k
    # Cuts at the beginning of the last split.
    for k, seqlens in enumerate(((1920,), (1920, 1920), (1900, 970, 960))):
        yield _case({"split_size": 64, "plan": "given"}, 32, seqlens, 3), k + 1
    # A block goes on behind a long item: its loader enters the next ones from the main loop.
    options = {"queries": 2, "ragged": True, "causal": True, "leftpad": True, "batch_idx": True}
    for first in (4128, 4144):
        yield _case({**options, "new": (16, 5, 70, 0, 9, 4)}, 8, (first, 3, 1, 3000, 7, 2000), 2), 6
    # The same where several KV heads are a quarter to 7/8 of the multiprocessors: two blocks of 4 warps on each.
    for k, more in enumerate(({}, {"page_size": 16}, {"page_size": 3, "plan": "stale"}, {"ragged": False})):
        case = _case({**options, **more, "new": (16, 5, 70, 0, 9, 4)}, 8, (9128, 3, 1, 6000, 7, 5000), k)
        yield dataclasses.replace(case, heads=(4, 2)), 14
        case = _case({**options, **more}, 8, (1128, 40, 33, 600, 17, 500), k)
        yield dataclasses.replace(case, heads=(4, 2)), (14, 20, 30, 47)[k]
    for k, window in enumerate(((1500, 3), (700, 0))):
        case = _case({"queries": 2, "window": window, "leftpad": k == 1}, 8, (2500, 2700, 1900, 2300, 20, 1800), k)
        yield dataclasses.replace(case, heads=(4, 2)), 14
    for k, options in enumerate(({"leftpad": True, "page_size": 16}, {"batch_idx": True})):
        seqlens = ((2500, 2700, 1900, 2300, 20), (1600, 2000, 2100, 1700, 300))[k]
        yield _case({**options, "queries": 5, "window": (1500, (3, 1)[k])}, 8, seqlens, k), 5 * (1 + k)
    yield _case({"queries": 5, "ragged": True, "window": (6000, 2)}, 8, (5000, 40, 9000, 9000, 40, 300), 0), 6
    # Row blocks of one row behind short ones.
    yield _case({}, 32, (40, 30, 50, 20), 2), 1
    # Keys behind the row itself, of which the first row of a block sees less; one of three runs in fixed order.
    for k in range(3):
        yield _case({"queries": 8, "window": (200, 6)}, 8, (640, 300, 41, 77 + k, 95), k), 40
        yield _case({"queries": 8, "window": (200, 6)}, 8, (1640, 300, 41, 77 + k, 995), k), 5
        yield _case({"queries": 32, "window": (90, 30), "split_size": 64}, 32, (300, 500, 40 + k), k), 1 + k
        yield _case({"queries": 32, "window": (90, 30)}, 32, (300, 500, 40 + k), k), 1 + k
    # Plans with cuts in items that are now empty, or that now begin at the last split.
    yield _case({"split_size": 64, "plan": "long"}, 32, (0, 1461, 0, 700, 0), 3), 1
    for seqlens in ((1461,) * 7, (1461,) * 15, (30, 1461) * 7 + (30,)):
        yield _case({"split_size": 64, "plan": "long", "window": (500, 0)}, 32, seqlens, 3), 4
    for k, options in enumerate(SPLITS):
        for n, seqlens in enumerate(((1,), (1300,), (640, 64, 63, 0, 65), (300, 2600), MANY)):
            yield _case(options, 32, seqlens, k + n), (1, 3, 7)[(k + n) % 3]


def _huge() -> Iterator[tuple[str, Callable[[], Arrays]]]:
    """Problems of decode.cu with maxima that are huge, or just are not."""
    for which in (0, 1, "waves"), (0, 1, "spikes"), (0, 1, "level"), (3, 8, "waves"), (4, 8, "waves"), (3, 8, "level"):
        for options, rows, seqlens, num_sm in (
            ({"num_splits": 1}, 8, (1300, 900), 2),
            ({"queries": 2, "causal": True}, 32, (700, 900), 2),
            ({}, 8, (1000, 900), 10),
            ({"split_size": 256}, 32, (900, 1100), 3),
        ):
            case = _case({"scale": NEARLY_HUGE, **options}, rows, seqlens, 0)
            yield f"attention nearly huge {which} {case}", _attention(case, num_sm, change=_nearly_huge(*which))
    for kind in "waves", "level":
        for options, rows, seqlens, num_sm in (
            ({"num_splits": 1}, 8, (1300,) * 4, 4),
            ({}, 32, (300,) * 16, 2),
            ({}, 8, (640,) * 4, 20),
            ({"split_size": 256}, 32, (300,) * 16, 3),
        ):
            case = dataclasses.replace(_case(options, rows, seqlens, 0), heads=(rows, 1), scale=NEARLY_HUGE)
            yield f"attention few nearly huge {kind} {case}", _attention(case, num_sm, change=_few_nearly_huge(kind))
    # Rows that have not yet seen a key, beside huge maxima.
    for options, rows, heads, queries, seqlens, num_sm in (
        ({"causal": True, "num_splits": 1}, 8, (1, 1), 8, (195, 40, 227), 3),
        ({"window": (50, 0)}, 32, (1, 1), 32, (161, 165, 170), 1),
        ({"window": (50, 0)}, 8, (1, 1), 8, (640, 161, 165, 170), 20),
        ({"window": (90, 0), "split_size": 64}, 32, (20, 1), 4, (161, 225), 2),
    ):
        case = dataclasses.replace(_case(options, rows, seqlens, 0), heads=heads, seqlens_q=queries, scale=NEARLY_HUGE)
        yield f"attention nearly huge beside none {case}", _attention(case, num_sm, change=_nearly_huge(0, 1, "waves"))


def _plan(seed: int) -> Callable[[], None]:
    """The planner's kernel is held to the planner in NumPy, bitwise."""
    rng = np.random.default_rng(seed)
    batch = int(rng.choice([1, 7, 33, 70]))
    arguments: dict[str, Any] = {
        "batch_size": batch,
        "max_seqlen_q": int(rng.choice([1, 1, 40])),
        "max_seqlen_k": 4096,
        "num_heads_q": 8,
        "num_heads_kv": 2,
        "headdim": 64,
        "cache_seqlens": rng.integers(0, int(rng.choice([40, 4000])), batch) if seed % 3 else np.full(batch, 640),
        "causal": bool(seed & 1),
        "window_size": (300, 0) if seed % 5 == 4 else (-1, -1),
        "num_splits": int(rng.choice([0, 0, 1, 3])),
    }
    if seed % 7 == 3:
        arguments |= {"split_size": 128, "num_splits": 0}

    return _twins(3 + 11 * (seed % 6), arguments)


def _twins(num_sm: int, arguments: dict[str, Any]) -> Callable[[], None]:
    """A plan by the kernel and by the planner in NumPy."""
    with _gpu(num_sm, "numpy"):
        twin = cuflash.get_scheduler_metadata(**arguments).array

    def problem() -> None:
        with _gpu(num_sm):
            np.testing.assert_array_equal(cuflash.get_scheduler_metadata(**arguments).array, twin)

    return problem


def _nonsense_plan(seed: int, clusters: bool) -> Callable[[], None]:
    """Numbers that the host refuses where it sees them: both planners clamp them alike."""
    rng = np.random.default_rng(seed)
    batch, low, high = 50, -(2**31), 2**31 - 1
    absent = np.zeros(batch + 1, int)
    options = {"cu_seqlens_q": absent, "cu_seqlens_k_new": absent, "max_seqlen_k": 500 if clusters else 8192}
    with _gpu(900 if clusters else 20, "numpy"):
        meta = cuflash.get_scheduler_metadata(**_step(np.zeros(batch, int), 3, max_seqlen_q=17, **options))
    assert (meta.partition.cluster > 1) == clusters
    if seed % 2:
        low, high = -100, 100
    lengths = Lengths(
        cache_seqlens=rng.integers(low, high, batch, np.int32),
        cu_seqlens_q=rng.integers(low, high, batch + 1, np.int32),
        cu_seqlens_k_new=rng.integers(low, high, batch + 1, np.int32),
        cache_leftpad=rng.integers(low, high, batch, np.int32),
    )
    twin = np.full_like(meta.array, -1)
    planner.plan(meta.problem, meta.partition, lengths, twin)

    def problem() -> None:
        array = np.full_like(meta.array, -1)
        sim.BACKEND.plan(meta.problem, meta.partition, lengths, array)
        np.testing.assert_array_equal(array, twin)

    return problem


def _step(seqlens: np.ndarray, heads: int = 3, **options: Any) -> dict[str, Any]:
    return {
        "batch_size": len(seqlens),
        "max_seqlen_q": 1,
        "max_seqlen_k": 8192,
        "num_heads_q": 4 * heads,
        "num_heads_kv": heads,
        "headdim": 64,
        "cache_seqlens": seqlens,
        **options,
    }


def _plans() -> Iterator[tuple[str, Callable[[], None]]]:
    for seed in range(24):
        yield f"plan {seed}", _plan(seed)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        step = schedules.random_step(rng, max_batch=(5, 40)[seed % 2], max_keys=(50, 600, 20000)[seed % 3])
        yield f"random plan {seed}", _twins(step.num_sm, step.arguments)
    rng = np.random.default_rng(0)
    for batch in (0, 1, 31, 32, 33, 76, 264, 993, 1025, 2100):
        yield f"plan of {batch}", _twins(132, _step(rng.integers(0, 8192, batch)))
        yield f"plan of {batch} equal", _twins(13, _step(np.full(batch, 1000), 3, num_splits=2))
    for batch in (77, 88, 231, 463):
        yield f"plan of {batch} equal on many", _twins(132, _step(np.full(batch, 1000), 3))
    for batch, max_seqlen_q in (1, 3000), (5, 700), (200, 33), (1100, 24), (1, 9000), (3, 40), (1, 17):
        seqlens = rng.integers(0, 4000, batch)
        starts = np.concatenate([[0], rng.integers(0, max_seqlen_q + 1, batch).cumsum()])
        for k, options in enumerate(({}, {"window_size": (300, 0), "cu_seqlens_q": starts}, {"attention_chunk": 99})):
            arguments = _step(seqlens, 2, max_seqlen_q=max_seqlen_q, causal=k > 0, **options)
            yield f"plan of {batch} with up to {max_seqlen_q} queries {k}", _twins(132, arguments)
    for num_splits in (1, 2, 7, 100, 263, 264, 10**6):
        arguments = _step(np.array([100_000, 5, 0, 3000, 40_000]), num_splits=num_splits)
        yield f"plan of {num_splits} splits", _twins(132, arguments)
    most = 2**31 - 1
    wide = {"window_size": (most, -1), "max_seqlen_q": 2, "attention_chunk": most}
    huge = ({}, {"num_splits": 7}, {"split_size": 64}, {"split_size": 2**30}, wide, {"max_seqlen_k_new": most})
    for k, options in enumerate(huge):
        yield f"huge plan {k}", _twins(132, _step(np.array([most, 0, most - 5, 7, most]), **options))
    yield "huge plan of few keys in the low 32 bits", _twins(132, _step(np.array((most, most, 10)), 1))
    for k, options in enumerate(({"cache_leftpad": rng.integers(0, 9, 3099)}, {"window_size": (most, -1)})):
        yield f"huge plan of slices {k}", _twins(132, _step(rng.choice((9, most), 3099), 3, **options))
    # More blocks than threads, of which some have no work.
    yield "plan of 1200 multiprocessors", _twins(1200, _step(rng.integers(0, 20_000, 401), num_splits=2))
    # Slices of several sequences of several row blocks.
    for k, options in enumerate(({"cu_seqlens_q": 8 * np.arange(1101)}, {"attention_chunk": 13})):
        step = _step(rng.integers(0, 40, 1100), 2, max_seqlen_q=24, **options)
        yield f"plan of sequences in slices {k}", _twins(132, step)
    # Sequences that have just so many rows as row blocks, or one row more, and fewer row blocks than others.
    for k, (num_sm, batch) in enumerate(((5, 4), (13, 9), (132, 60), (132, 1100))):
        starts = np.concatenate([[0], rng.choice((32, 33, 64, 65, 96, 0), batch).cumsum()])
        for causal in (False, True):
            step = _step(rng.integers(0, 900, batch), 2, max_seqlen_q=96, causal=causal, cu_seqlens_q=starts)
            yield f"plan of whole row blocks {k} {causal}", _twins(num_sm, step)
    # Where a share's slack, and what num_splits bounds, are on their boundaries.
    for num_sm, heads, seqlens, num_splits in (
        (13, 3, (797, 1385, 138), 0),
        (5, 2, (358, 232), 0),
        (2, 2, (329, 356, 11), 2),
        (2, 1, (1369, 1208), 2),
    ):
        yield f"plan of {seqlens} on {num_sm}", _twins(num_sm, _step(np.array(seqlens), heads, num_splits=num_splits))
    yield "plan of parts in windows", _twins(132, _step(np.array((4000, 900, 70)), window_size=(1000, 0), num_splits=7))
    for k, seqlens in enumerate(((600,), (513, 40), (1000, 0, 1, 64, 65), (640,))):  # clusters
        for n, options in enumerate(({}, {"causal": True, "max_seqlen_q": 17}, {"window_size": (90, 3)})):
            step = _step(np.array(seqlens), 1 + k % 2, **{**options, "max_seqlen_k": 1000})
            yield f"plan for clusters {k} {n}", _twins(132, step)
    for k, options in enumerate(({}, {"attention_chunk": 99, "causal": True, "max_seqlen_q": 40}, {"num_splits": 0})):
        seqlens = np.array((640, 900, 777))
        options |= {"cache_leftpad": np.array((3, 0, 70)), "max_seqlen_k": 1000}
        yield f"plan for clusters with leftpad {k}", _twins(400, _step(seqlens, 1, **options))
    # Row blocks before the first key, also of ragged queries, under every mask, with and without leftpad and clusters.
    masks = ({}, {"causal": True}, {"window_size": (90, 3)}, {"attention_chunk": 1}, {"attention_chunk": 13})
    shards = [
        dict(zip(("cp_world_size", "cp_rank", "cp_interleave"), shard, strict=True))
        for shard in ((3, 1, 1), (2, 0, 16), (2, 1, 100), (4, 2, 16), (4, 2, 1), (2, 1, 2), (3, 1, 100), (2, 0, 2000))
    ]
    for k, options in enumerate(masks):
        for n, shard in enumerate(shards[:3]):  # of each sequence a part of the keys
            for max_seqlen_q, max_seqlen_k in (40, 8192), (20, 1000):
                step = {**options, **shard, "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
                step = _step(np.array((700, 5, 333, 0)), 1, **step)
                yield f"plan of a shard {k} {n} up to {max_seqlen_k}", _twins(400, step)
        for n, max_seqlen_k in enumerate((8192, 8192, 1000, 1000)):
            options |= {"max_seqlen_q": 40, "max_seqlen_k": max_seqlen_k}
            if n % 2:
                options |= {"cache_leftpad": np.array((3, 0, 70, 0)), "cu_seqlens_q": np.array((0, 8, 48, 72, 76))}
                options |= {"cu_seqlens_k_new": np.array((0, 0, 3, 100, 107))}
            yield f"plan of row blocks {k} {n}", _twins(400, _step(np.array((700, 5, 333, 0)), 1, **options))
    # Pairs of row blocks that just keep whole items in a share, or just do not.
    pairs: tuple[tuple[int, int, int, tuple[int, ...], dict[str, Any]], ...] = (
        (4, 2, 64, (880, 855), {"attention_chunk": 3}),
        (1, 1, 64, (53,), {"window_size": (61, 40)}),
        (2, 2, 64, (60, 61, 61), {"attention_chunk": 1}),
        (2, 3, 32, (563,), {"window_size": (51, 40)}),
        (3, 1, 48, (482, 524), shards[3]),
        (3, 2, 48, (617,), {"window_size": (105, 40), "attention_chunk": 3, "cu_seqlens_q": (0, 39), **shards[4]}),
        (3, 3, 32, (442, 467), {"attention_chunk": 3, **shards[5]}),
        (3, 2, 64, (108, 109, 111), {"num_heads_q": 2, "window_size": (-1, 21), **shards[6]}),
        (2, 3, 45, (608, 584, 631, 606, 620), {"num_heads_q": 24, "attention_chunk": 1}),
        # The last rank of a sequence that has less than one round of positions.
        (2, 2, 16, (1000, 700), shards[7]),
        # Sequences that end with the first row block of a pair.
        (2, 1, 16, (680,) * 8 + (735,) * 8, {"cu_seqlens_q": 8 * np.arange(17)}),
        # Row blocks of one query, many of them before the first key.
        (4, 1, 40, (400,) * 30 + (19, 5), {"num_heads_q": 32, "window_size": (0, -1), "attention_chunk": 10}),
        # More keys than 32 bits count, and a pair of more than 31 bits count, which does not keep items whole.
        (8, 1, 1, (most, most - 5, most - 10, most - 15), {}),
        (2, 1, 16, (most, 2**30, most, 7), {}),
    )
    for k, (num_sm, heads, max_seqlen_q, lengths, options) in enumerate(pairs):
        options = {name: np.array(x) if name == "cu_seqlens_q" else x for name, x in options.items()}
        step = _step(np.array(lengths), heads, max_seqlen_q=max_seqlen_q, **options)
        yield f"plan of nearly equal items {k}", _twins(num_sm, step)
    yield "plan of one block", _twins(3, _step(np.array((40,)), 1))
    step = _step(np.array((851, 637)), 1, max_seqlen_q=16, causal=True, max_seqlen_k=1000)
    yield "plan for clusters and two row blocks", _twins(132, step)
    yield "plan for clusters on 8 multiprocessors", _twins(8, _step(np.array((500,)), 1, max_seqlen_k=500))
    for k, options in enumerate(({}, {"window_size": (20, 0)})):
        seqlens = np.array((most, most - 5, 7))
        yield f"huge plan for clusters {k}", _twins(400, _step(seqlens, 1, max_seqlen_k=1000, **options))
    step = _step(np.array((640, 37, 53, 69, 38)), 1, window_size=(20, 0), max_seqlen_k=1000)
    yield "plan for clusters at an item's first key", _twins(400, step)
    for seed in range(6):
        yield f"plan of nonsense {seed}", _nonsense_plan(seed, clusters=seed > 3)


def _merge(
    n: int, dim: int, shape: tuple[int, int, int], spread: float, mask: str = "", in_place: bool = False, **options: Any
) -> Callable[[], Arrays]:
    """A merge of n parts, of which a mask of parts or of each query leaves some out; maybe to where the last one is."""
    rng = np.random.default_rng(n)
    batch, queries, heads = shape
    outs = rng.standard_normal((n, batch, queries, heads, dim), np.float32).astype(np.float16)
    lses = (spread * rng.standard_normal((n, batch, heads, queries))).astype(np.float32)
    for k, (part, lse) in enumerate(zip(outs, lses, strict=True)):
        lse[:, k % heads] = -np.inf if k % 3 or not mask else np.inf  # a part without keys
        part[:, :, k % heads] = np.nan
    lses[-1][0] = outs[-1][0] = 0
    for lse in lses:
        lse[-1, -1, -1] = -np.inf  # a row without any
    if mask:
        options["mask"] = rng.random((n,) if mask == "parts" else (n, batch, queries)) < 0.7
    os.environ["CUFLASH_BACKEND"] = "numpy"
    expected_out, expected_lse = cuflash.merge_attn_states(outs, lses, **options)

    def problem() -> Arrays:
        os.environ["CUFLASH_BACKEND"] = "sim"
        parts, part_lses = outs.copy(), lses.copy()
        target = {"out": parts[-1], "lse": part_lses[-1]} if in_place else {}
        out, lse = cuflash.merge_attn_states(parts, part_lses, **options, **target)
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected_out, np.float32), 1.1e-3, 1e-5)
        return np.asarray(out), np.asarray(lse)

    return problem


# Each of these is a variant of the kernels of many rows, or of mla.cu, for which a survey needs some 16 problems.
def _many_rows() -> Iterator[tuple[str, Callable[[], Arrays]]]:
    """Problems of extend.cu and extend_wgmma.cu."""
    both, dims = (extend, extend_wgmma), (64, 64)
    for family in both:
        for k, options in enumerate(MANY_ROWS):
            for n, seqlens in enumerate(((200, 63, 1), (64, 129, 0, 65), (300,), (1100,))):
                # Row blocks of 128 rows. A block goes on from one item to the next; 1,100 keys are many parts.
                ragged = n != 1 or "unowned" in options
                queries = tuple((35, 0, 33, 20)[(b + n) % 4] for b in range(len(seqlens))) if ragged else 35
                case = Case(
                    dtype="bfloat16", heads=((4, 1), (8, 2))[k % 2], headdim=dims, seqlens=seqlens, seqlens_q=queries,
                    seed=4 * k + n, **options,
                )  # fmt: skip
                yield from _named(case, 12 if n == 3 else (1, 4, 9)[(k + n) % 3], family)
        for k, options in enumerate(TREES):
            for n, queries in enumerate((70, 33, (20, 0, 41), (64, 1, 3))):
                case = Case(
                    dtype="bfloat16", heads=(2, 1), headdim=dims, seqlens=(100, 64, 30), seqlens_q=queries,
                    tree=("bool", "words")[(k + n) % 2], seed=4 * k + n, **options,
                )  # fmt: skip
                yield from _named(case, (2, 5)[k % 2], family)
        for k, options in enumerate(MANY_ROWS_SPLITS):
            for n, seqlens in enumerate(((400, 64, 0), (1000,), (129, 63, 320))):
                case = Case(
                    dtype="bfloat16", heads=(20, 1), headdim=dims, seqlens=seqlens, seqlens_q=(1, 4, 9)[n],
                    split_size=64, seed=3 * k + n, **options,
                )  # fmt: skip
                yield from _named(case, (3, 8, 2)[n], family)
        yield from _more_many_rows(family)
        yield from _everything(family)
    # Warps that share rows and divide columns.
    for k, options in enumerate(MANY_ROWS):
        for n, seqlens in enumerate(((70, 33), (900,))):
            case = Case(
                dtype="float16", heads=(8, 1), headdim=(512, 512), seqlens=seqlens, seqlens_q=((9, 0), (5,))[n],
                seed=2 * k + n, **options,
            )  # fmt: skip
            yield from _named(case, (1, 16)[n], extend)


def _turns() -> Iterator[tuple[str, Callable[[], Arrays]]]:
    """Problems of two warpgroups with the same rows: segments of no tile, of one, of several rings."""
    case = Case(dtype="bfloat16", heads=(4, 1), headdim=(128, 128), seqlens_q=16)
    for k, options in enumerate((
        {"seqlens": (1500, 37, 1100), "page_size": 16},
        {"seqlens": (64, 65, 900, 0), "seqlens_q": (16, 1, 15, 9), "causal": True},
        {"seqlens": (2500,), "headdim": (72, 128), "causal": True, "merge": True},
        {"seqlens": (640, 128, 63), "tree": "words", "page_size": 16, "softcap": 3.0},
        {"seqlens": (900, 330), "seqlens_q": (15, 16), "causal": True, "scale": 0.5},
    )):  # fmt: skip
        one = dataclasses.replace(case, seed=k, **options)
        yield from _named(one, 4, extend_wgmma)
        # Whole tiles, of one warpgroup more than of the other and of both as many.
        yield from _named(dataclasses.replace(one, seqlens=(64 * (8 + k),), seqlens_q=16), 1, extend_wgmma)
        yield from _named(dataclasses.replace(one, seqlens=(1024,), seqlens_q=14), 1, extend_wgmma)
        for tiles in (2, 3):  # one more is asked for ahead, if there is one
            yield from _named(dataclasses.replace(one, seqlens=(64 * tiles,), seqlens_q=13), 1, extend_wgmma)
        if k == 4:
            yield f"extend_wgmma growing {one}", _attention(one, 4, family=extend_wgmma, change=_grow(128))


def _many_codes() -> Iterator[tuple[str, Callable[[], Arrays]]]:
    """Problems of extend.cu and extend_wgmma.cu on quantised caches: two forms of scales, maxima that move."""
    e4m3 = Case(heads=(8, 2), headdim=(128, 128), kv_dtype="float8_e4m3fn", scales=("none", "heads", "heads"))
    int8 = Case(heads=(4, 1), headdim=(64, 64), kv_dtype="int8", scales=("none", "keys", "keys"))
    ragged: dict[str, Any] = {"dtype": "bfloat16", "page_size": 16, "causal": True}
    for case, num_sm, options in (
        (e4m3, 2, {"seqlens": (300, 1, 0, 170), "seqlens_q": (10, 1, 3, 16), **ragged}),
        (int8, 1, {"seqlens": (300, 70, 129), "seqlens_q": (16, 9, 12), **ragged}),
        (e4m3, 3, {"seqlens": (500, 90), "seqlens_q": 16, "dtype": "float16", "causal": True, "scale": 0.5}),
        (int8, 4, {"seqlens": (700, 70), "seqlens_q": (16, 9), "dtype": "bfloat16", "causal": True, "scale": -0.4}),
    ):
        case = dataclasses.replace(case, **options)
        for family in (extend, extend_wgmma):
            yield from _named(case, num_sm, family)
            if case.page_size is None:
                grown = dataclasses.replace(case, scale=None)
                yield f"{family.NAME} growing {case}", _attention(grown, num_sm, family=family, change=_grow(128))


def _boxes() -> Iterator[tuple[str, Callable[[], Arrays]]]:
    """Problems of tiles that come in boxes: pages of one box of 8 to 32 slots, of several, and of parts of one."""
    rows = Case(dtype="bfloat16", heads=(8, 2), headdim=(64, 64), seqlens=(300, 33, 0, 201), causal=True)
    latent = Case(dtype="bfloat16", heads=(16, 1), headdim=(576, 512), mla="joint", seqlens=(200, 65, 130))
    pair = dataclasses.replace(latent, heads=(128, 1), seqlens=(130, *[70] * 6, 1))
    for k, (page_size, layout) in enumerate(
        ((8, "NHD"), (16, "HND"), (24, "NHD"), (32, "NHD"), (48, "HND"), (128, "NHD"), (None, "NHD"), (None, "HND"))
    ):
        options: dict[str, Any] = {"page_size": page_size, "layout": layout, "seed": k, "leftpad": k % 3 == 2}
        for queries in (9, 35):
            yield from _named(dataclasses.replace(rows, seqlens_q=queries, **options), (1, 4)[k % 2], extend_wgmma)
        yield from _named(dataclasses.replace(rows, seqlens_q=9, split_size=64, **options), 3, extend_wgmma)
        if layout == "NHD":
            yield from _named(dataclasses.replace(latent, **options), (1, 5)[k % 2], mla_wgmma)
            yield from _named(dataclasses.replace(pair, **options), 8, mla_wgmma)
    several = dataclasses.replace(pair, seqlens=(400, 65, 129, 0, 1, 190))  # tiles that are scored ahead
    for page_size in (8, 64):
        yield from _named(dataclasses.replace(several, page_size=page_size), 4, mla_wgmma)
    for first in (64, 128):  # maxima move in a second tile, and in a first one
        yield f"mla_wgmma growing {first} {several}", _attention(several, 4, family=mla_wgmma, change=_grow(first))
    for k, queries in enumerate(((9, 0, 5, 8), (70, 3, 0, 130), (16, 1, 1, 2), (40, 33, 1, 90))):
        yield f"extend_wgmma packed keys {queries}", _packed(queries, (1, 4)[k % 2])
    yield "extend_wgmma packed keys, splits", _packed((9, 0, 5, 9), 3, split_size=64)


def _pieces() -> Iterator[tuple[str, Callable[[], Arrays]]]:
    """Problems of latent items that lie in few blocks, each of which keeps a piece of the columns."""
    latent = Case(dtype="bfloat16", heads=(40, 1), mla="joint", sinks=True, page_size=64, seqlens=())
    for parts, heads, headdim_v in (
        (2, 40, 456),
        (3, 20, 512),
        (5, 33, 512),
        (4, 64, 504),
        (2, 128, 512),
        (8, 17, 512),
    ):
        sizes: dict[str, Any] = {"heads": (heads, 1), "headdim": (headdim_v + 64, headdim_v), "seqlens": (parts * 100,)}
        yield from _named(dataclasses.replace(latent, **sizes), parts * (1 + (heads == 128)), mla_wgmma)


def _packed(queries: tuple[int, ...], num_sm: int, **options: Any) -> Callable[[], Arrays]:
    """Keys of one sequence behind another, causal, also with other options."""
    given = packed_inputs(queries, (140, 33, 0, 201), DTYPES["bfloat16"])
    attend = functools.partial(cuflash.flash_attn_varlen_func, **given, causal=True, return_softmax_lse=True, **options)
    os.environ["CUFLASH_BACKEND"] = "numpy"
    expected_out, expected_lse = attend()

    def problem() -> Arrays:
        with _gpu(num_sm, family=extend_wgmma):
            out, lse = attend()
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected_out, np.float32), 0.02, 0.02)
        return out, lse

    return problem


def _more_many_rows(family: ModuleType) -> Iterator[tuple[str, Callable[[], Arrays]]]:
    """Problems of extend.cu or extend_wgmma.cu: of each variant few."""
    base = Case(dtype="bfloat16", heads=(4, 1), headdim=(64, 64))
    tree = dataclasses.replace(base, heads=(2, 1), tree="bool")
    split = dataclasses.replace(base, heads=(17, 1), split_size=64)
    wide = Case(dtype="float16", heads=(8, 1), headdim=(512, 512))
    negative: dict[str, Any] = {"page_size": 64, "negative_pages": True}
    huge = (
        (base, {"seqlens": (900, 700), "seqlens_q": 35}),
        (tree, {"seqlens": (500, 500), "seqlens_q": 70}),
        (split, {"seqlens": (900, 700), "seqlens_q": 4, "split_size": 256}),
        (wide, {"seqlens": (500, 500), "seqlens_q": 9}),
    )
    for which in (0, 1, "waves"), (0, 1, "spikes"), (0, 1, "level"), (0, 1, "late"), (3, 8, "waves"):
        for case, options in huge:
            if family is extend or case is not wide:
                case = dataclasses.replace(case, scale=NEARLY_HUGE, **options)
                problem = _attention(case, 2, family=family, change=_nearly_huge(*which))
                yield f"{family.NAME} nearly huge {which} {case}", problem
    # Loaders find the share's first item, or others, without keys or without rows.
    empty = (0, 20, 0, 40, 64, 25, 0, 33)
    for case, num_sm, options in (
        (base, 1, {"seqlens": empty, "seqlens_q": (35, 0, 33, 20, 1, 0, 35, 40)}),
        (tree, 1, {"seqlens": empty, "seqlens_q": (70, 0, 33, 20, 66, 0, 35, 40), "unowned": (3, 2), "sinks": True}),
        (split, 1, {"seqlens": empty, "seqlens_q": (3, 0, 1, 2, 3, 0, 1, 3)}),
        (split, 1, {"seqlens": (30, 0) * 16, "seqlens_q": 3}),
        (split, 1, {"seqlens": (200, 0, 90, 70), "seqlens_q": (3, 2, 0, 3), "unowned": (3, 2)}),
        (split, 1, {"seqlens": (0, 1025, 1024), "seqlens_q": 3, "plan": "long"}),
        (tree, 3, {"seqlens": (0, 20, 900), "seqlens_q": (33, 0, 35)}),
        (split, 4, {"seqlens": (1025, 1024, 1088, 1461) * 2, "seqlens_q": 2, "plan": "long", "heads": (20, 1)}),
        (wide, 1, {"seqlens": (30, 20, 10, 64), "seqlens_q": (9, 0, 5, 17), "window": (20, 2)}),
        # A tile at the left side of windows whose values are cleared.
        (wide, 1, {"seqlens": (250, 1, 260, 1, 270), "seqlens_q": 17, "window": (150, 2), **negative}),
        # Numbers of parts that fill what is merged at once, and that do not.
        (tree, 12, {"seqlens": (1100,), "seqlens_q": 35}),
        (base, 20, {"seqlens": (1280,), "seqlens_q": 32, "num_splits": 20}),
        (base, 23, {"seqlens": (1472,), "seqlens_q": 32, "num_splits": 23}),
        (wide, 3, {"seqlens": (192,), "seqlens_q": 5, "num_splits": 3}),
        (wide, 4, {"seqlens": (256,), "seqlens_q": 5, "num_splits": 4}),
        (wide, 10, {"seqlens": (640,), "seqlens_q": 1, "num_splits": 10, "heads": (33, 1)}),
        (split, 2, {"seqlens": (192, 256, 128), "seqlens_q": 2, "heads": (20, 1)}),
        # Trees and rows that end, or begin, at many places of a tile.
        (tree, 1, {"seqlens": (57, 40), "seqlens_q": 92}),
        (tree, 5, {"seqlens": tuple(range(73, 105)), "seqlens_q": 33}),
        (tree, 1, {"seqlens": (50, 40), "seqlens_q": (8, 7), "unowned": (3, 2), "heads": (9, 1)}),
        # Trees that begin with the last key of a word, whose mask has a row of another query behind it, or none.
        (tree, 2, {"seqlens": (41, 73, 297, 105), "seqlens_q": 10, "heads": (8, 1), "tree": "words"}),
        (tree, 2, {"seqlens": (41, 73, 297), "seqlens_q": 10, "heads": (8, 1)}),
        # Masks at many places of a tile, where maxima move late.
        (base, 5, {"seqlens": tuple(range(200, 232)), "seqlens_q": 21, "window": (150, 1), "scale": 9.0}),
        (tree, 5, {"seqlens": tuple(range(200, 216)), "seqlens_q": 90, "tree": "words", "scale": 9.0}),
        (tree, 5, {"seqlens": tuple(range(90, 250, 9)), "seqlens_q": 60, "scale": -8.0}),
        (base, 1, {"seqlens": (250, 1, 260, 1, 270), "seqlens_q": 17, "window": (150, 2), "heads": (8, 1), **negative}),
        # Row blocks that are full, and one of one row.
        (split, 2, {"seqlens": (300, 200), "seqlens_q": 8, "heads": (16, 1)}),
        (tree, 2, {"seqlens": (150, 160), "seqlens_q": 128}),
        (base, 1, {"seqlens": (150, 60), "seqlens_q": 43, "heads": (3, 1), "causal": True}),
        (split, 2, {"seqlens": (150, 60, 0, 40), "seqlens_q": 3, "new": (3, 0, 70, 5), "leftpad": True}),
    ):
        if family is extend or case is not wide:
            yield from _named(dataclasses.replace(case, **options), num_sm, family)


def _everything(family: ModuleType) -> Iterator[tuple[str, Callable[[], Arrays]]]:
    """Problems of extend.cu or extend_wgmma.cu: sequences of which everything differs, masks that end everywhere."""
    base = Case(dtype="bfloat16", heads=(4, 1), headdim=(64, 64), causal=True)
    tree = dataclasses.replace(base, heads=(2, 1), tree="bool", causal=False)
    split = dataclasses.replace(base, heads=(20, 1), split_size=64)
    paged: dict[str, Any] = {"batch_idx": True, "page_size": 16}
    merged: dict[str, Any] = {**paged, "leftpad": True, "unowned": (3, 2), "sinks": True, "merge": "in place"}
    negative: dict[str, Any] = {**paged, "csr": True, "negative_pages": True}
    for case, queries in (
        (dataclasses.replace(base, heads=(4, 2)), (35, 0, 17, 1, 70, 33, 35)),
        (tree, (33, 0, 20, 1, 70, 40, 35)),
        (split, (4, 0, 1, 3, 7, 2, 4)),
    ):
        for seqlens, num_sm in ((70, 20, 30, 300, 90, 5, 150), 1), ((20, 700, 30, 300), 5):
            n = len(seqlens)
            options = {**merged, "seqlens_q": queries[n - 1 :: -1], "new": (70, 0, 3, 30, 0, 70, 9)[:n]}
            yield from _named(dataclasses.replace(case, seqlens=seqlens, **options), num_sm, family)
    for case, num_sm, options in (
        (base, 1, {"seqlens": (140, 20, 133, 150, 47, 170), "seqlens_q": (35, 17, 35, 2, 33, 20), **negative}),
        (tree, 1, {"seqlens": (140, 20, 133, 150, 47, 170), "seqlens_q": (40, 17, 33, 2, 33, 20), **negative}),
        (split, 1, {"seqlens": (40, 20, 33, 150, 47, 170), "seqlens_q": (5, 3, 4, 6, 2, 1), **negative}),
        (split, 1, {"seqlens": (140, 133, 150, 170), "seqlens_q": (5, 3, 4, 6), "split_size": 256, **negative}),
        # Parts that are merged, with others, of a batch whose sequences have the same number of queries.
        (base, 5, {"seqlens": (20, 700), "seqlens_q": 35, "merge": True}),
        (tree, 5, {"seqlens": (50, 700), "seqlens_q": 40, "merge": True}),
        (split, 5, {"seqlens": (20, 700), "seqlens_q": 3, "merge": True}),
        # Row blocks of which some see a tile less than the last one.
        (base, 1, {"seqlens": (300, 288, 200, 350), "seqlens_q": (128, 96, 0, 70)}),
        (tree, 1, {"seqlens": (300, 260, 200, 350), "seqlens_q": (256, 192, 0, 130)}),
        (split, 1, {"seqlens": (70, 201, 198, 80, 150), "seqlens_q": (13, 13, 10, 0, 1)}),
        (split, 2, {"seqlens": (384,), "seqlens_q": 2}),  # four parts
    ):
        yield from _named(dataclasses.replace(case, **options), num_sm, family)
    # What rows see begins, and ends, at every place of an item's first tile, of another one, of one whose maxima move.
    first, later = range(131, 10, -8), range(264, 135, -8)
    rows = dataclasses.replace(base, heads=(1, 1))
    narrow = dataclasses.replace(rows, causal=False, window=(3, 2))
    tails = [8 * n + k for n in range(16) for k in (1, 2)]
    for case, seqlens, queries, grows in (
        (narrow, first, 128, 0),
        (rows, later, 128, 0),
        (rows, later, 128, 128),
        (dataclasses.replace(narrow, split_size=64), first[8:], 64, 0),
        (dataclasses.replace(rows, split_size=256), range(136, 71, -8), 64, 0),
        (dataclasses.replace(rows, split_size=256), range(136, 71, -8), 64, 64),
        (tree, tails, tuple(min(33, n) for n in tails), 0),
        (tree, [128 + n for n in tails], 33, 0),
        (tree, [128 + n for n in tails], 33, 128),
    ):
        case = dataclasses.replace(case, seqlens=tuple(seqlens), seqlens_q=queries)
        problem = _attention(case, 1, family=family, change=_grow(grows) if grows else None)
        yield f"{family.NAME} edges {'growing ' * (grows > 0)}{case}", problem


def _latent() -> Iterator[tuple[str, Callable[[], Arrays]]]:
    """Problems of mla.cu and mla_wgmma.cu: both spellings, 16 to 128 heads, caches of 16 and, of mla.cu, of 8 bits."""
    forms = (
        ("joint", 16, 1),
        ("joint", 128, 1),
        ("joint", 16, 5),
        ("qv", 16, 1),
        ("qv row", 64, 2),
        ("qv", 12, (3, 0)),
    )
    for family in mla, mla_wgmma:
        for k, options in enumerate(LATENT):
            for n, (form, heads, queries) in enumerate(forms):
                case = Case(
                    dtype="bfloat16", heads=(heads, 1), headdim=(576, 512) if form == "joint" else (64, 512),
                    seqlens=((130, 33), (65, 0))[k % 2], seqlens_q=queries, mla=form, seed=6 * k + n, **options,
                )  # fmt: skip
                yield from _named(case, (1, 5, 9)[(k + n) % 3], family)
    for k, options in enumerate(LATENT):
        for scale in ("one", "keys"):
            case = Case(
                dtype="bfloat16", heads=(16, 1), headdim=(576, 512), seqlens=(70, 17), seqlens_q=1 + k % 2, mla="joint",
                kv_dtype="float8_e4m3fn", scales=("none", scale, "none"), seed=k, **options,
            )  # fmt: skip
            yield from _named(case, (1, 5)[k % 2], mla)
    few = Case(dtype="bfloat16", heads=(16, 1), headdim=(576, 512), mla="joint")
    many = dataclasses.replace(few, heads=(64, 1))
    ragged = {"seqlens": (100, 0, 40, 64), "new": (70, 0, 9, 30), "leftpad": True, "unowned": (3, 2)}
    for family in mla, mla_wgmma:
        for case, num_sm, options in (
            (few, 7, {"seqlens": (450,), "sinks": True}),
            (many, 6, {"seqlens": (390,), "merge": True}),
            (few, 44, {"seqlens": (384, 512, 832, 1088)}),  # 6, 8, 13 and 17 parts
            (many, 6, {"seqlens": (700, 900), "seqlens_q": 2, "heads": (17, 1), "sinks": True}),
            (few, 2, {**ragged, "seqlens_q": (1, 0, 1, 1), "causal": True}),
            (many, 2, {**ragged, "seqlens_q": (3, 0, 1, 2), "window": (50, 3)}),
            (few, 3, {"seqlens": tuple(range(100, 132)), "window": (40, 0)}),
            (few, 1, {"seqlens": (0, 20, 0, 40, 64, 25, 0, 33)}),  # shares that begin without keys
            (few, 1, {"seqlens": (70, 33), "heads": (1, 1)}),  # one row
            (few, 2, {"seqlens": (70, 90, 33), "seqlens_q": (4, 0, 1), "heads": (4, 1), "window": (40, 1)}),
        ):
            yield from _named(dataclasses.replace(case, **options), num_sm, family)
        for case, options in (
            (few, {"seqlens": (500, 300)}),
            (few, {"seqlens": (300, 200), "seqlens_q": 4, "causal": True}),
        ):
            case, kind = dataclasses.replace(case, scale=NEARLY_HUGE, **options), (0, 1, "waves")
            problem = _attention(case, 2, family=family, change=_nearly_huge(*kind))
            yield f"{family.NAME} nearly huge {case}", problem
        yield from _everything_latent(family, few, many)


def _latent_codes() -> Iterator[tuple[str, Callable[[], Arrays]]]:
    """Problems of mla_wgmma.cu on caches of 8 bits, of whose tiles a block makes numbers, or two make half each."""
    case = Case(dtype="bfloat16", headdim=(576, 512), mla="joint", kv_dtype="float8_e4m3fn")
    for k, options in enumerate(LATENT):
        for n, (heads, scale) in enumerate(((40, "keys"), (128, "keys"), (20, "one"), (128, "heads"))):
            turn = (k + n) % 3
            sizes: dict[str, Any] = {
                "heads": (heads, 1), "scales": ("none", scale, "none"), "seed": 4 * k + n, "seqlens_q": (1, 2, 1)[turn],
                "seqlens": ((330, 33), (65, 0, 190), (129, 1))[turn], "page_size": (16, 1, None)[turn],
            }  # fmt: skip
            yield from _named(dataclasses.replace(case, **(sizes | options)), (1, 5, 8)[turn], mla_wgmma)
    for heads in 40, 128:
        ends = dataclasses.replace(case, heads=(heads, 1), seqlens=(63, 64, 65, 66), seqlens_q=2, causal=True)
        yield from _named(ends, 2, mla_wgmma)
        loud = dataclasses.replace(ends, seqlens=(300, 200), scales=("none", "keys", "none"), scale=0.1)
        yield from _named(loud, 4, mla_wgmma)


def _everything_latent(family: ModuleType, few: Case, many: Case) -> Iterator[tuple[str, Callable[[], Arrays]]]:
    """Problems of mla.cu or mla_wgmma.cu: sequences of which everything differs, masks that end everywhere."""
    paged: dict[str, Any] = {"batch_idx": True, "page_size": 16, "causal": True}
    merged: dict[str, Any] = {**paged, "leftpad": True, "unowned": (3, 2), "sinks": True, "merge": "in place"}
    negative: dict[str, Any] = {**paged, "csr": True, "negative_pages": True}
    four = {"heads": (4, 1)}
    short, more = (70, 20, 30, 150, 90, 5, 64), (20, 400, 30, 130)
    for case, num_sm, options in (
        (few, 1, {"seqlens": short, "seqlens_q": (2, 0, 1, 3, 1, 0, 4), "new": (9, 0, 3, 30, 0, 5, 1), **merged}),
        (few, 5, {"seqlens": more, "seqlens_q": (1, 2, 0, 3), "new": (0, 70, 3, 30), **merged, "heads": (12, 1)}),
        (many, 1, {"seqlens": short[:4], "seqlens_q": (2, 0, 1, 3), "new": (9, 0, 3, 30), **merged}),
        (many, 5, {"seqlens": more[:3], "seqlens_q": (1, 2, 1), "new": (0, 70, 3), **merged, "merge": False}),
        (few, 1, {"seqlens": (70, 20, 33, 130), "seqlens_q": (5, 3, 4, 6), **negative}),
        (many, 1, {"seqlens": (70, 20, 33, 130), "seqlens_q": (5, 3, 4, 6), "heads": (32, 1), **negative}),
        # The same of 16 rows and fewer.
        (
            few,
            1,
            {"seqlens": short, "seqlens_q": (2, 0, 1, 3, 1, 0, 4), "new": (9, 0, 3, 30, 0, 5, 1), **merged, **four},
        ),
        (few, 5, {"seqlens": more, "seqlens_q": (1, 2, 0, 3), "new": (0, 70, 3, 30), **merged, **four}),
        (few, 1, {"seqlens": (70, 20, 33, 130), "seqlens_q": (4, 3, 4, 2), **negative, **four}),
        (few, 2, {"seqlens": (70, 20, 150, 130), "seqlens_q": 4, "window": (40, 2), **four}),
        *((few, 3, {"seqlens": (192,), "heads": (heads, 1)}) for heads in (5, 6, 7)),
        # The same of parts that their blocks merge together.
        (few, 5, {"seqlens": more, "seqlens_q": (1, 2, 0, 3), "new": (0, 70, 3, 30), **merged, "merge": False}),
        # Parts that are merged, with others, of a batch whose sequences have the same number of queries.
        (few, 5, {"seqlens": (20, 700), "merge": True}),
        # Row blocks of which some see a tile less than the last one.
        (few, 1, {"seqlens": (70, 201, 198), "seqlens_q": (7, 6, 0), "causal": True, "heads": (8, 1)}),
        (many, 1, {"seqlens": (70, 201, 198), "seqlens_q": (13, 10, 0), "causal": True, "heads": (16, 1)}),
        # Items of every number of parts.
        (few, 27, {"seqlens": tuple(64 * n for n in range(2, 8))}),
        (few, 38, {"seqlens": tuple(64 * n for n in range(8, 12))}),
        (many, 16, {"seqlens": tuple(64 * n for n in (2, 3, 5, 6))}),
    ):
        yield from _named(dataclasses.replace(case, **options), num_sm, family)
    for kind in "waves", "level", "late":
        for case, seqlens, change in (
            (few, (300,) * 8, _few_nearly_huge(kind)),
            (few, (300, 200), _nearly_huge(0, 1, kind)),
            (many, (300, 200), _nearly_huge(0, 1, kind)),
            (many, (300,) * 8, _few_nearly_huge(kind)),
        ):
            case = dataclasses.replace(case, seqlens=seqlens, scale=NEARLY_HUGE)
            yield f"{family.NAME} nearly huge {kind} {case}", _attention(case, 2, family=family, change=change)
    # What rows see begins, and ends, at every place of a tile.
    for options, seqlens, queries, grows in (
        ({"window": (3, 2)}, range(67, 10, -8), 64, 0),
        ({"window": (3, 2)}, range(67, 10, -8), 16, 0),
        ({"causal": True}, range(136, 71, -8), 64, 0),
        ({"causal": True}, range(136, 71, -8), 16, 0),
        ({"causal": True}, range(136, 71, -8), 64, 64),
    ):
        case = dataclasses.replace(few, heads=(1, 1), seqlens=tuple(seqlens), seqlens_q=queries, **options)
        problem = _attention(case, 1, family=family, change=_grow(grows) if grows else None)
        yield f"{family.NAME} edges {'growing ' * (grows > 0)}{case}", problem


def _named(case: Case, num_sm: int, family: ModuleType) -> Iterator[tuple[str, Callable[[], Arrays]]]:
    if case.new == "ragged":
        case = dataclasses.replace(case, new=tuple((3, 0, 21)[b % 3] for b in range(len(case.seqlens))))
    yield f"{family.NAME} {case} on {num_sm}", _attention(case, num_sm, family=family)


def problems() -> list[tuple[str, Callable[[], Arrays | None]]]:
    """All problems by name."""
    out: list[tuple[str, Callable[[], Arrays | None]]] = [
        (f"attention {case}", _attention(case, num_sm)) for case, num_sm in _cases()
    ]
    for rows, seqlens, num_sm, leftpad in (
        (8, (0, 900, 40), 40, False),
        (8, (0, 900, 40), 40, True),
        (32, (0, 300, 40), 2, False),
        (32, (0, 300, 40), 2, True),
        (8, (0, 640), 16, False),
        (8, (0, 640), 16, True),
    ):
        # With this seed the second sequence has a leftpad of 0.
        case = _case({"num_splits": 1000 * (num_sm == 40), "leftpad": leftpad}, rows, seqlens, 34)
        out.append((f"negative lengths {case}", _attention(case, num_sm, nonsense=True)))
    out += _huge()
    out += [*_many_rows(), *_turns(), *_many_codes(), *_boxes(), *_pieces(), *_latent(), *_latent_codes()]
    out += _plans()
    shapes = (3, 2, 4), (1, 1, 1), (2, 3, 3), (1, 5, 2), (5, 1, 7)
    for n, dim in (1, 64), (2, 72), (3, 8), (4, 40), (5, 128), (6, 16), (7, 32), (8, 104), (17, 256):
        for k in range(2):
            shape, spread = shapes[(n + 2 * k) % 5], (3.0, 60.0)[k]
            out.append((f"merge {n} of {shape} {dim} {spread}", _merge(n, dim, shape, spread)))
            for mask, options in ("parts", {"in_place": True}), ("queries", {"base2": True}):
                name = f"merge {n} of {shape} {dim} {spread}, mask of {mask}, {options}"
                out.append((name, _merge(n, dim, shape, spread, mask, **options)))
    return out
