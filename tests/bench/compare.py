"""Trees, shared prefixes, chosen keys and mixed steps on a GPU, each in several ways, beside what it should cost.

Times are measured as those of :mod:`cuflash.bench`. Some rows of every way's output are compared with float64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuflash import flash_attn_with_kvcache, get_scheduler_metadata, shared_prefix_attention
from cuflash.bench import report
from cuflash.bench.inputs import Inputs, Shape, bits, to_host
from cuflash.bench.measure import Machine, distance, roofline
from cuflash.bench.peers import MOST_ERROR, reason
from cuflash.bench.report import Record
from cuflash.bench.timing import Gpu, Sampler, medians, number_of_calls, read_us, require_gpu

_HEADS = (32, 8)
_ARRAYS = ("q", "k_cache", "v_cache", "out")

Ways = dict[str, Callable[[int], Any]]  # what is called with the number of a copy
Answers = dict[tuple[int, ...], NDArray[np.float64]]  # place in the output -> (heads, headdim)


@dataclass
class Case:
    """Something to compute, and ways to do it.

    Attributes:
        shapes: Steps that read and compute as much, for the floor.
        copies: Copies of the inputs.
        out: What all ways write to on the first copy.
        ways: The last one is what the others are compared with.
        answers: What some rows must be, of each way.
    """

    shapes: tuple[Shape, ...]
    copies: int
    out: Any
    ways: Ways
    answers: dict[str, Answers]


# ---------------------------------------------------------------------------------------------------------- the cases
def tree(machine: Machine, batch: int, keys: int, nodes: int) -> Case:
    """Verify a tree of drafts, a random one for each sequence, beside as many causal queries."""
    causal = Shape("", np.full(batch, keys), *_HEADS, queries=nodes)
    inputs, mask = Inputs.make(causal, machine.xp, machine.fill, machine.l2_bytes), random_trees(batch, nodes)
    free = replace(causal, causal=False)
    plan, tree_plan = inputs.plan(), free.plan(inputs.copies[0]["cache_seqlens"])

    def by(tree_mask: Any, i: int) -> Any:
        return flash_attn_with_kvcache(
            **inputs.copies[i], **free.options, tree_mask=tree_mask, scheduler_metadata=tree_plan
        )

    answers: dict[str, Answers] = {"tree": {}, "causal": {}}
    chain = np.tri(nodes, dtype=bool)
    for s in (0, batch - 1):
        k, v = (inputs.sequence(name, s)[0] for name in ("k_cache", "v_cache"))
        q = to_host(inputs.copies[0]["q"][s])
        for i in (0, nodes // 2, nodes - 1):
            for name, row in (("tree", mask[s, i]), ("causal", chain[i])):
                seen = np.append(np.ones(keys - nodes, bool), row)
                answers[name][s, i] = exact(q[i], k[seen], v[seen])
    return Case(
        shapes=(causal,),
        copies=len(inputs.copies),
        out=inputs.copies[0]["out"],
        ways={
            "tree, packed": partial(by, machine.xp.asarray(packed(mask))),
            "tree, bool": partial(by, machine.xp.asarray(mask)),
            "causal": lambda i: inputs.attend(i, plan),
        },
        answers={"tree, packed": answers["tree"], "tree, bool": answers["tree"], "causal": answers["causal"]},
    )


def prefix(machine: Machine, batch: int, groups: int, keys: int, own: int) -> Case:
    """Decode sequences of which groups share a prefix: read once a group, beside once a sequence."""
    members = batch // groups
    whole = Shape("", np.repeat([keys, own], [groups, batch]), *_HEADS)  # the prefixes, then the suffixes
    inputs = Inputs.make(whole, machine.xp, machine.fill, machine.l2_bytes)
    page_size, table = whole.page_size or 1, inputs.host_table
    if keys % page_size:
        raise ValueError(f"keys must be whole pages of {page_size}, got {keys}")
    prefixes, suffixes = table[:groups, : keys // page_size], table[groups:, : -(-own // page_size)]
    every = np.concatenate([np.repeat(prefixes, members, 0), suffixes], 1)

    def ints(values: NDArray[Any]) -> Any:
        return machine.xp.asarray(np.ascontiguousarray(values, np.int32))

    starts, seqlens = ints(np.arange(groups + 1) * members), ints(np.full(groups, keys))
    suffix, plain = (replace(whole, lengths=np.full(batch, n)) for n in (own, keys + own))
    shared = {
        "prefix_page_table": ints(prefixes), "prefix_seqlens": seqlens, "prefix_cu_seqlens_q": starts,
        "prefix_max_seqlen_q": members, "page_table": ints(suffixes), "cache_seqlens": ints(suffix.lengths),
        "prefix_metadata": get_scheduler_metadata(
            groups, members, keys, *_HEADS, whole.headdim, seqlens, qkv_dtype=whole.dtype, page_size=page_size,
            cu_seqlens_q=starts,
        ),
        **suffix.options,
    }  # fmt: skip
    shared["scheduler_metadata"] = suffix.plan(shared["cache_seqlens"])
    unshared = {"page_table": ints(every), "cache_seqlens": ints(plain.lengths), **plain.options}
    unshared["scheduler_metadata"] = plain.plan(unshared["cache_seqlens"])
    lses = [machine.xp.empty((_HEADS[0], batch), np.float32) for _ in inputs.copies]

    def arrays(i: int) -> dict[str, Any]:
        copy = inputs.copies[i]
        return {name: copy[name][:batch] if name in ("q", "out") else copy[name] for name in _ARRAYS}

    answers: Answers = {}
    for s in (0, batch - 1):
        k, v = (
            np.concatenate([inputs.sequence(name, s // members)[0], inputs.sequence(name, groups + s)[0]])
            for name in ("k_cache", "v_cache")
        )
        answers[s, 0] = exact(to_host(inputs.copies[0]["q"][s])[0], k, v)
    ways: Ways = {
        "prefix, then suffixes": lambda i: shared_prefix_attention(**arrays(i), **shared, prefix_lse=lses[i]),
        "one call, unshared": lambda i: flash_attn_with_kvcache(**arrays(i), **unshared),
    }
    together = replace(whole, lengths=np.full(groups, keys), queries=members, causal=False)
    return Case((together, suffix), len(inputs.copies), arrays(0)["out"], ways, dict.fromkeys(ways, answers))


def top(machine: Machine, batch: int, keys: int, chosen: int, heads: int) -> Case:
    """Attend to chosen keys of a latent cache, as pages of one key, beside a contiguous cache of just those."""
    pool = Shape("", np.full(batch, keys), heads, 1, 576, 64, 512, latent=True)
    inputs = Inputs.make(pool, machine.xp, machine.fill, machine.l2_bytes)
    listed = replace(pool, lengths=np.full(batch, chosen), page_size=1)
    alone = replace(listed, page_size=None)
    # Lists of one copy of the pool have no key in common, so that each reads from memory.
    positions = np.random.default_rng(2).permuted(np.tile(np.arange(keys), (batch, 1)), axis=1)
    page_size = pool.page_size or 1
    slots = np.take_along_axis(inputs.host_table, positions // page_size, 1) * page_size + positions % page_size
    seqlens = machine.xp.asarray(listed.lengths.astype(np.int32))
    plans = {shape: shape.plan(seqlens) for shape in (listed, alone)}
    calls: dict[Shape, list[dict[str, Any]]] = {listed: [], alone: []}
    for copy in inputs.copies:
        rows = copy["k_cache"].reshape(-1, 1, 1, pool.headdim)
        for begin in range(0, keys - chosen + 1, chosen):
            table = machine.xp.asarray(np.ascontiguousarray(slots[:, begin : begin + chosen], np.int32))
            picked = rows.view(bits(rows.dtype))[table].view(rows.dtype).reshape(batch, chosen, 1, pool.headdim)
            common = {"q": copy["q"], "out": machine.xp.empty_like(copy["out"]), "cache_seqlens": seqlens}
            calls[listed].append({**common, "k_cache": rows, "page_table": table})
            calls[alone].append({**common, "k_cache": picked})

    def attend(shape: Shape, i: int) -> Any:
        given = calls[shape][i]
        return flash_attn_with_kvcache(
            **given, v_cache=given["k_cache"][..., : shape.dim_v], **shape.options, scheduler_metadata=plans[shape]
        )

    answers: Answers = {}
    for s in (0, batch - 1):
        k = inputs.sequence("k_cache", s)[0][positions[s, :chosen]]
        answers[s, 0] = exact(to_host(inputs.copies[0]["q"][s])[0], k, k[..., : pool.dim_v])
    ways: Ways = {"pages of one key": partial(attend, listed), "contiguous": partial(attend, alone)}
    return Case((alone,), len(calls[alone]), calls[alone][0]["out"], ways, dict.fromkeys(ways, answers))


def mixed(machine: Machine, batch: int, keys: int, chunk: int, chunk_keys: int) -> Case:
    """Decode sequences and prefill a chunk of another in one call, beside two."""
    decode = Shape("", np.full(batch, keys), *_HEADS)
    prefill = replace(decode, lengths=np.array([chunk_keys]), queries=chunk)
    whole = replace(decode, lengths=np.concatenate([decode.lengths, prefill.lengths]))
    inputs = Inputs.make(whole, machine.xp, machine.fill, machine.l2_bytes)
    first = inputs.copies[0]
    seqlens, table = first["cache_seqlens"], first["page_table"]
    starts = machine.xp.asarray(np.append(np.arange(batch + 1), batch + chunk).astype(np.int32))
    plan = get_scheduler_metadata(
        batch + 1, chunk, int(whole.lengths.max()), *_HEADS, whole.headdim, seqlens, qkv_dtype=whole.dtype,
        page_size=whole.page_size, causal=True, cu_seqlens_q=starts,
    )  # fmt: skip
    plans = decode.plan(seqlens[:batch]), prefill.plan(seqlens[batch:])
    queries = [machine.xp.empty((batch + chunk, _HEADS[0], whole.headdim), first["q"].dtype) for _ in inputs.copies]
    for i, q in enumerate(queries):
        machine.fill(q, i + 1)
    outs = [machine.xp.empty_like(q) for q in queries]

    def caches(i: int) -> dict[str, Any]:
        return {name: inputs.copies[i][name] for name in ("k_cache", "v_cache")} | whole.options

    def one_call(i: int) -> None:
        flash_attn_with_kvcache(
            queries[i], **caches(i), cache_seqlens=seqlens, page_table=table, cu_seqlens_q=starts, max_seqlen_q=chunk,
            scheduler_metadata=plan, out=outs[i],
        )  # fmt: skip

    def two_calls(i: int) -> None:
        for part, rows, metadata in ((slice(batch), (batch, 1), plans[0]), (slice(batch, None), (1, chunk), plans[1])):
            q, out = (array[part].reshape(*rows, *array.shape[1:]) for array in (queries[i], outs[i]))
            flash_attn_with_kvcache(
                q,
                **caches(i),
                cache_seqlens=seqlens[part],
                page_table=table[part],
                scheduler_metadata=metadata,
                out=out,
            )

    q, answers = to_host(queries[0]), Answers()
    for s, row, seen in (
        (0, 0, keys), (batch - 1, batch - 1, keys), (batch, batch, chunk_keys - chunk + 1),
        (batch, batch + chunk // 2, chunk_keys - chunk + 1 + chunk // 2), (batch, batch + chunk - 1, chunk_keys),
    ):  # fmt: skip
        answers[(row,)] = exact(q[row], *(inputs.sequence(name, s)[0][:seen] for name in ("k_cache", "v_cache")))
    ways: Ways = {"one call": one_call, "two calls": two_calls}
    return Case((decode, prefill), len(inputs.copies), outs[0], ways, dict.fromkeys(ways, answers))


CASES: dict[str, Callable[[Machine], Case]] = {
    "tree of 64, b8 L4096": partial(tree, batch=8, keys=4096, nodes=64),
    "tree of 64, b32 L4096": partial(tree, batch=32, keys=4096, nodes=64),
    "prefix 8192 + 256, b32, 1 group": partial(prefix, batch=32, groups=1, keys=8192, own=256),
    "prefix 8192 + 256, b32, 4 groups": partial(prefix, batch=32, groups=4, keys=8192, own=256),
    "top 2048 of 8192, b32, MLA 16 heads": partial(top, batch=32, keys=8192, chosen=2048, heads=16),
    "top 2048 of 8192, b32, MLA 128 heads": partial(top, batch=32, keys=8192, chosen=2048, heads=128),
    "mixed, 64 of L4096 and 2048 queries on L8192": partial(mixed, batch=64, keys=4096, chunk=2048, chunk_keys=8192),
}


def random_trees(batch: int, nodes: int) -> NDArray[np.bool_]:
    """Return what each node of random trees sees, (batch, nodes, nodes): itself and the nodes above it."""
    rng, mask = np.random.default_rng(3), np.zeros((batch, nodes, nodes), bool)
    for node in range(nodes):
        if node:
            mask[:, node] = mask[np.arange(batch), rng.integers(0, node, batch)]
        mask[:, node, node] = True
    return mask


def packed(mask: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """Return a mask as words of 32 bits along its last axis."""
    padded = np.zeros((*mask.shape[:-1], -(-mask.shape[-1] // 32) * 32), bool)
    padded[..., : mask.shape[-1]] = mask
    return np.packbits(padded, axis=-1, bitorder="little").view("<u4")


def exact(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any]) -> NDArray[np.float64]:
    """Attend in float64 with one query (heads, d) to all of some keys and values (n, heads_kv, d)."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = np.einsum("hgd,nhd->hgn", q.reshape(k.shape[1], -1, q.shape[-1]), k) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("hgn,nhd->hgd", weights / weights.sum(-1, keepdims=True), v)
    return out.reshape(len(q), -1)


# ---------------------------------------------------------------------------------------------------------- measuring
def measure(name: str, case: Case, machine: Machine, rounds: int) -> Iterator[Record]:
    """Yield a record of each way.

    Raises:
        ArithmeticError: If a way's output is wrong.
    """
    least = roofline(machine, *case.shapes)
    size = int(1e6 * least["kv_mb"])
    calls = number_of_calls(3 + size / 4e6, case.copies)
    samplers: dict[str, Sampler] = {}
    errors = {}
    for way, attend in case.ways.items():
        graph = machine.graph([partial(attend, i % case.copies) for i in range(calls)])
        case.out.view(bits(case.out.dtype))[...] = np.iinfo(bits(case.out.dtype)).max  # NaN in every element type
        machine.synchronise()
        graph.sample()  # what is timed is what is checked
        out, answers = to_host(case.out), case.answers[way]
        errors[way] = distance(np.stack([out[place] for place in answers]), np.stack(list(answers.values())))
        if not errors[way] < MOST_ERROR:
            raise ArithmeticError(f"{way} is wrong: relative error {errors[way]:.2g}")
        samplers[way] = graph
    times = medians(samplers | dict(machine.readers(size)), rounds)
    last = times[list(case.ways)[-1]]
    for way in case.ways:
        figures = {"us": times[way], "to_last": times[way] / last, "to_floor": times[way] / least["floor_us"]}
        yield {"variant": way, "arch": "", "workload": name, **figures, **least, "read_us": read_us(times),
               "rel_error": errors[way]}  # fmt: skip


_NOTES = (
    "",
    "us per call. to_last: us / that of the case's last way; floor: bytes / read bandwidth or operations / rate of the",
    "tensor cores, whichever is longer; read: a kernel that reads as many bytes; rel_error: of some rows, to float64.",
    "A tree should take at most 1.05 times causal, a shared prefix 1.1 times its floor, a mixed step 1.05 times its",
    "two calls. 32/8 heads of 128, pages of 16, bfloat16, but for MLA (576/512).",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of ``python -m tests.bench compare``."""
    add = parser.add_argument
    add("--cases", nargs="+", metavar="TEXT", help=f"those whose name contains one of these texts: {'; '.join(CASES)}")
    add("--rounds", type=int, default=11, help="rounds, of which the median counts (default: 11)")


def run(arguments: argparse.Namespace) -> int:
    """Run ``python -m tests.bench compare``; the exit code is 1 if a case failed."""
    texts: Sequence[str] = arguments.cases or [""]
    chosen = [name for name in CASES if any(text in name for text in texts)]
    if not chosen:
        raise ValueError(f"--cases must name some of {'; '.join(CASES)}; got {' '.join(texts)}")
    try:
        require_gpu()
    except RuntimeError as error:
        print(f"python -m tests.bench compare: {error}", file=sys.stderr)
        return 2
    gpu, records, failed = Gpu(), [], False
    for name in chosen:
        try:
            found = list(measure(name, CASES[name](gpu), gpu, arguments.rounds))
            records += [{**record, "arch": f"sm_{gpu.arch}"} for record in found]
        except Exception as error:  # one case must not hide the others
            failed = True
            print(f"{name}: {reason(error)}", file=sys.stderr)
        gpu.free()
        print(f"{name}: done", file=sys.stderr)
    machine = f"{gpu.facts['gpu']}, read bandwidth {gpu.bandwidth:.2f} TB/s"
    report.write(records, arguments.json, (*_NOTES, machine))
    return int(failed)
