"""A rank of test_context_parallel.py: ``mpiexec -n 3 python context_parallel_ranks.py SCENARIO [HOW [CASES]]``.

With ``direct`` or ``collective``, which say how results travel, each rank has a GPU of its own. CASES are numbers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import reference
from cases import DTYPES, Case
from inputs import as_uint8, make_inputs
from mpi4py import MPI
from problems import UNIT_ROUNDOFF, Backend, transfer

import cuflash
from cuflash.context_parallel.mpi import MpiTransport
from cuflash.context_parallel.nccl import NcclTransport

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
LAST = SIZE - 1
PATIENT = 60.0  # of others: a busy machine may let a rank stand still for a while
HEADS = (12, 2)  # shares for 1, 2, 3 and 4 ranks
HOW = sys.argv[2] if len(sys.argv) > 2 else ""
ON_GPUS = bool(HOW)
TIMEOUT = 6.0 if ON_GPUS else 2.0  # of ranks that wait for one that is missing

if ON_GPUS:
    import cupy
    import nccl.core

    cupy.cuda.Device(RANK).use()
    BACKEND = Backend("cuda", cupy.asarray, cupy.asnumpy)
else:
    BACKEND = Backend("numpy", lambda array: array, np.asarray)

CASES = [
    Case(seqlens=(77, 0, 1, 130), sinks=True, softcap=3.0),
    Case(seqlens=(70, 3, 64), seqlens_q=3, causal=True, new=3, rotary="half", dtype="bfloat16"),
    Case(seqlens=(66, 0, 17), seqlens_q=2, window=(19, 1), page_size=16, new=(1, 0, 5), layout="HND"),
    Case(seqlens=(40, 90), seqlens_q=(1, 5), unowned=(1, 2), chunk=17, sinks=True, merge=True),
    Case(seqlens=(33, 9, 20), seqlens_q=4, tree="words", page_size=3, csr=True, dtype="float16", merge=True),
    Case(seqlens=(50, 5), seqlens_q=(2, 3), causal=True, window=(16, 0), headdim=(96, 64), mla="joint", heads=(12, 1)),
    Case(seqlens=(50, 5), seqlens_q=2, causal=True, headdim=(64, 256), mla="qv", heads=(12, 1), batch_idx=True),
    Case(
        seqlens=(60, 9, 33),
        seqlens_q=2,
        causal=True,
        new=2,
        dtype="float8_e4m3fn",
        kv_dtype="float8_e4m3fn",
        scales=("heads", "keys", "one"),
        page_size=16,
    ),
    Case(seqlens=(20, 77), new=1, dtype="float16", kv_dtype="int8", scales=("none", "heads", "keys"), layout="HND"),
    Case(seqlens=(0, 0), seqlens_q=1),
]


# ------------------------------------------------------------------------------------------------ results
def whole_inputs(case: Case) -> dict[str, Any]:
    """Return the arguments of one call that has all keys."""
    options = {name: getattr(case, name) for name in case.__dataclass_fields__} | {"seed": 1}
    if case.heads == Case().heads:
        options["heads"] = HEADS
    inputs = make_inputs(Case(**options))
    return {name: x for name, x in inputs.items() if x is not None}


def own_inputs(case: Case, interleave: int) -> dict[str, Any]:
    """Return what this rank has of them: a cache of its own, in which its keys lie in order; the rest of it is NaN."""
    whole = whole_inputs(case)
    call = reference.Call(**{name: x for name, x in whole.items() if name not in reference.NOT_PART_OF_IT})
    sequences = reference.sequences_of(call)
    slots = reference.Slots(call.k_cache, call.layout, call.cache_batch_idx, call.page_table)
    page_size, num_heads = case.page_size or 1, call.k_cache.shape[2 if case.layout == "NHD" else 1]

    def here(position: int) -> bool:
        return position // interleave % SIZE == RANK

    longest = max((sum(map(here, range(s.seqlen + len(s.new_rows)))) for s in sequences), default=0)
    capacity = -(-(longest + 1) // page_size) * page_size
    own: dict[str, Any] = {}
    names = ["k_cache"] if case.mla == "joint" else ["k_cache", "v_cache"]
    names += [name for name in ("k_descale", "v_descale") if np.ndim(whole.get(name)) == 3]
    for name in names:
        garbage = 99 if whole[name].dtype == np.int8 else np.nan
        shape = (len(sequences), capacity, num_heads, *whole[name].shape[3:])
        cache = np.full(shape, garbage, whole[name].dtype)
        for sequence in sequences:
            held = filter(here, range(sequence.seqlen))
            for n, position in enumerate(held):
                cache[sequence.b, n] = whole[name][slots.find(sequence.b, position)]
        if case.page_size:
            cache = cache.reshape(-1, page_size, *cache.shape[2:])
        own[name] = cache if case.layout == "NHD" else np.ascontiguousarray(cache.swapaxes(1, 2))
    if case.mla == "joint":
        own["v_cache"] = own["k_cache"][..., : case.headdim[1]]
    if case.page_size:
        table = np.arange(len(sequences) * (capacity // page_size), dtype=np.int32)
        own["page_table"] = table.reshape(len(sequences), -1)
    return {name: x for name, x in whole.items() if name not in ("page_table", "cache_batch_idx")} | own


_communicators: list[Any] = []


def make_group(**options: Any) -> cuflash.ContextParallel:
    comm, others = WORLD, {}
    if ON_GPUS:
        unique_id = WORLD.bcast(nccl.core.get_unique_id() if RANK == 0 else None)
        comm = nccl.core.Communicator.init(nranks=SIZE, rank=RANK, unique_id=unique_id)
        _communicators.append(comm)
        others = {"control": WORLD, "exchange": HOW}
    group = cuflash.ContextParallel(comm, **others | {"timeout": PATIENT} | options)
    WORLD.Barrier()  # else a rank that fails at once would be heard by one that is still making the group
    return group


def make_plan(group: cuflash.ContextParallel, case: Case, inputs: dict[str, Any]) -> Any:
    q, lengths = inputs["q"], inputs["cache_seqlens"]
    names = ("cu_seqlens_q", "cu_seqlens_k_new")
    given = {name: BACKEND.to_native(inputs[name]) for name in names if name in inputs}
    return group.plan(
        len(lengths), inputs.get("max_seqlen_q", q.shape[1]), 200, q.shape[-2], case.heads[1], case.headdim[0],
        BACKEND.to_native(lengths), qkv_dtype=case.dtype, kv_dtype=case.kv_dtype, headdim_v=case.headdim[1],
        page_size=case.page_size, causal=case.causal, window_size=case.window, attention_chunk=case.chunk,
        has_softcap=case.softcap > 0, max_seqlen_k_new=max(case.appended, default=0), **given,
    )  # fmt: skip


def attend(
    group: cuflash.ContextParallel, case: Case, inputs: dict[str, Any], **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Call with arrays of the backend; return out and lse in host memory."""
    given = transfer(as_uint8(inputs, case.kv_dtype) if ON_GPUS and case.kv_dtype else inputs, BACKEND)
    results = group.attend(**given, **options, return_softmax_lse=True)
    group.wait()
    for name, result in zip(("out", "softmax_lse"), results, strict=True):
        assert name not in options or options[name] is result
    out, lse = map(BACKEND.to_numpy, results)
    return out, lse


def gathered(out: np.ndarray, lse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares of all ranks side by side."""
    outs, lses = zip(*WORLD.allgather((out, lse)), strict=True)
    return np.concatenate(outs, -2), np.concatenate(lses, -2)


def check(case: Case, found: tuple[np.ndarray, np.ndarray], answer: reference.Answer, what: str) -> None:
    """Compare with the definition: each part may be rounded once, and their sum once more."""
    out, lse = found
    u = UNIT_ROUNDOFF[case.out_dtype]
    with np.errstate(invalid="ignore"):
        error = np.abs(out.astype(np.float64) - answer.out)
    assert out.shape == answer.out.shape and out.dtype == DTYPES[case.out_dtype], what
    assert (error <= (3 * u + 1e-5) * answer.magnitude).all(), f"{what}: {error.max()}"
    np.testing.assert_allclose(lse, answer.lse, rtol=1e-6, atol=1e-2 if case.rotary or case.softcap else 2e-5)


def same(a: Any, b: Any) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def results() -> None:
    """Every mask, several queries, append, empty ranks, ragged batches; shares of the heads and all of them."""
    shares = {i: make_group(interleave=i) for i in (1, 16, 64)}
    other = {"direct": "collective", "collective": "direct"}.get(HOW, "auto")
    everything = make_group(interleave=16, heads="all", queries="share", exchange=other)
    for number in map(int, sys.argv[3:] or range(len(CASES))):
        case = CASES[number]
        answer = WORLD.bcast(
            reference.attention(**whole_inputs(case)) if number % SIZE == RANK else None, number % SIZE
        )
        for interleave, group in shares.items():
            what = f"{case}, interleave {interleave}"
            inputs = own_inputs(case, interleave)
            plan = make_plan(group, case, inputs) if number % 2 else None
            first = attend(group, case, inputs, scheduler_metadata=plan)
            check(case, gathered(*first), answer, what)
            out, lse = (BACKEND.to_native(np.zeros_like(x)) for x in first)
            again = attend(group, case, own_inputs(case, interleave), out=out, softmax_lse=lse)
            assert same(first, again), what
            if interleave == 16:
                inputs = own_inputs(case, interleave)
                share = inputs["q"].shape[-2] // SIZE
                mine = slice(RANK * share, (RANK + 1) * share)
                inputs |= {name: inputs[name][..., mine, :] for name in ("q", "qv") if name in inputs}
                assert same(attend(everything, case, inputs), gathered(*first)), what
        if not number:
            nothing = {
                name: x[:0] for name, x in inputs.items() if name in ("q", "k_cache", "v_cache", "cache_seqlens")
            }
            assert attend(group, case, nothing)[0].shape == (0, 1, HEADS[0] // SIZE, 64)
    split_size(shares[16])
    lossy_wire()
    other_arguments(shares[1])
    for group in (*shares.values(), everything):
        group.close()
    with contextlib.suppress(cuflash.ContextParallelError):
        attend(everything, case, inputs)
        raise AssertionError("a closed group must refuse calls")
    if not ON_GPUS:  # where groups that failed would take the communicator with them
        results_in_other_arrays()
        wrong_shapes()


def split_size(group: cuflash.ContextParallel) -> None:
    """A sequence's bits are the same alone and beside others."""
    case = Case(seqlens=(300, 40, 190), heads=HEADS)
    inputs = own_inputs(case, 16)
    out, lse = attend(group, case, inputs, split_size=64)
    for b in range(3):
        alone = {name: inputs[name][b : b + 1] for name in ("q", "k_cache", "v_cache", "cache_seqlens")}
        alone_out, alone_lse = attend(group, case, alone, split_size=64)
        assert same((alone_out[0], alone_lse[0]), (out[b], lse[b]))


def lossy_wire() -> None:
    """float32 queries may send their outputs in 16 bits; the LSE stays float32."""
    case = Case(heads=HEADS)
    group = make_group(wire_dtype="float16")
    answer = reference.attention(**whole_inputs(case))
    out, lse = gathered(*attend(group, case, own_inputs(case, 1)))
    assert out.dtype == np.float32
    np.testing.assert_allclose(lse, answer.lse, rtol=1e-6, atol=2e-5)
    assert (np.abs(out - answer.out) <= 2.0**-10 * answer.magnitude + 1e-6).all()
    group.close()


def other_arguments(group: cuflash.ContextParallel) -> None:
    """What is refused before anybody is asked."""
    for error, options in [(TypeError, {"cp_rank": 0}), (TypeError, {"no_such": 1})]:
        with contextlib.suppress(error):
            attend(group, CASES[0], own_inputs(CASES[0], 1), **options)
            raise AssertionError(options)
    with contextlib.suppress(TypeError):
        group.attend(**transfer(own_inputs(CASES[0], 1), BACKEND), return_softmax_lse="yes")
        raise AssertionError("return_softmax_lse")
    for options in ({"queries": "mine"}, {"heads": "none"}, {"interleave": 0}, {"wire_dtype": "int8"}):
        with contextlib.suppress(ValueError):
            make_group(**options)
            raise AssertionError(options)
    if not ON_GPUS:
        most = (2**31 - 1) // SIZE  # of positions that ranks take turns in
        make_group(interleave=most).close()
        try:
            make_group(interleave=most + 1)
        except ValueError as error:
            assert "interleave must be" in str(error) and "cp_" not in str(error), error
        else:
            raise AssertionError("interleave")


def wrong_shapes() -> None:
    """Arrays of too few dimensions are refused by name before anything is exchanged."""
    q, cache, nothing = (np.zeros(shape, np.float32) for shape in ((1, 2, 4, 64), (1, 9, 1, 64), ()))
    for queries in ("replicated", "share"):
        for name, array in [("q", q[0, 0]), ("q", q[0, 0, 0]), ("q", nothing), ("v_cache", nothing)]:
            group = make_group(heads="all", queries=queries)
            try:
                group.attend(**{"q": q, "k_cache": cache, "v_cache": cache, "cache_seqlens": 9} | {name: array})
            except ValueError as error:
                assert f"{name} must have " in str(error), error
            else:
                raise AssertionError(name)
    group = make_group(queries="share")
    try:
        group.attend(q, cache, cache, cache_seqlens=9, qv=nothing)
    except ValueError as error:
        assert "qv must have shape" in str(error), error
    else:
        raise AssertionError("qv")


def results_in_other_arrays() -> None:
    """A result may lie where the queries or the other results are; nothing else of the caller's is written over."""
    memory = np.zeros((1, 32, 1, 64), np.float32)
    given = {name: np.zeros((1, length, 1, 64), np.float32) for name, length in [("q", 2), ("k_cache", 9)]}
    given |= {"v_cache": given["k_cache"].copy(), "cache_seqlens": np.array([9], np.int32)}
    out, lse = memory[:, 4:6], memory[0, 5, :, 62:].reshape(1, 1, 2)
    lengths = memory[0, 4, 0, :1].view(np.int32)
    wrong: list[tuple[str, str, dict[str, Any]]] = [
        ("out", "k_cache", {"k_cache": memory, "out": out}),
        ("out", "v_cache", {"v_cache": memory, "k_cache": memory.copy(), "out": out}),
        ("out", "cache_seqlens", {"cache_seqlens": lengths, "out": out}),
        ("out", "softmax_lse", {"out": out, "softmax_lse": lse}),
        ("softmax_lse", "sinks", {"sinks": lse[0, 0, 1:], "softmax_lse": lse}),
        ("softmax_lse", r"page_table[1]", {
            "page_table": (np.array([0, 1], np.int32), lse[0, 0, 1:].view(np.int32)), "softmax_lse": lse,
        }),
    ]  # fmt: skip
    for name, other, arrays in wrong:
        group = make_group(heads="all")
        before = memory.copy()
        try:
            group.attend(**given | arrays)
        except ValueError as error:
            assert f"{name} must share no memory with {other}" in str(error), error
        else:
            raise AssertionError(f"{name} in {other}")
        assert same([memory], [before])
    with make_group(heads="all") as group:
        q, lse = given["q"].copy(), np.zeros((1, 1, 2), np.float32)
        assert group.attend(**given | {"q": q}, out=q, merge_with=(q, lse), softmax_lse=lse) is q


# ------------------------------------------------------------------------------------------------ faults
@contextlib.contextmanager
def fault(*texts: str) -> Iterator[None]:
    """Expect the error of a group, with these words."""
    try:
        yield
    except cuflash.ContextParallelError as error:
        for text in texts:
            assert text in str(error), f"{text!r} is not in {error}"
    else:
        raise AssertionError(f"no error: {texts}")


def disagreements() -> None:
    """Another problem, another version, other lengths: every rank hears who has what, and the group is over."""
    if ON_GPUS:
        os.environ["CUFLASH_VALIDATE"] = "1"  # else calls are not compared
    q, cache = np.ones((2, 1, HEADS[0], 64), np.float32), np.ones((2, 40, HEADS[1], 64), np.float32)
    lengths = np.array([70, 9], np.int32)
    one = RANK == LAST

    def native(arguments: dict[str, Any]) -> dict[str, Any]:
        return {name: BACKEND.to_native(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}

    def plan(group: cuflash.ContextParallel, **options: Any) -> Any:
        arguments = {"headdim": 64, "cache_seqlens": lengths} | options
        return group.plan(2, 1, 80, *HEADS, qkv_dtype="float32", **native(arguments))

    def call(group: cuflash.ContextParallel, **options: Any) -> Any:
        arguments = {"q": q, "k_cache": cache, "v_cache": cache, "cache_seqlens": lengths} | options
        return group.attend(**native(arguments))

    ranks = f"rank {LAST} has"
    for function, options, field in [
        (plan, {"headdim": 96}, "headdim"),
        (plan, {"causal": True, "attention_chunk": 5}, "attention_chunk"),
        (plan, {"cache_seqlens": np.array([70, 8], np.int32)}, "cache_seqlens"),
        (call, {"cache_seqlens": 70}, "cache_seqlens"),
        (call, {"softcap": 2.0}, "has_softcap"),
        (call, {"softmax_scale": 0.5}, "softmax_scale"),
        (call, {"q": q[:, :, :4]}, "num_heads_q") if 4 % SIZE == 0 else (call, {"window_size": (3, 0)}, "window_size"),
        (call, {"sinks": q[0, 0, :, 0]}, "sinks"),
    ]:
        group = make_group()
        with fault("must agree about", field, ranks):
            function(group, **(options if one else {}))
        with fault("refuses calls", field):
            call(group)
    group = make_group()
    with fault("must agree about call", '"plan"', '"attend"'):
        (plan if one else call)(group)
    version, cuflash.__version__ = cuflash.__version__, "0.0.1" if one else cuflash.__version__
    with fault("version", ranks, '"0.0.1"'):
        make_group()
    cuflash.__version__ = version
    with fault("interleave", ranks):
        make_group(interleave=2 if one else 1)
    # One rank's arguments are wrong: it has its own error, the others hear of it.
    group = make_group()
    try:
        call(group, softcap=-1.0) if one else call(group)
    except ValueError as error:
        assert one and "softcap" in str(error)
    except cuflash.ContextParallelError as error:
        assert not one and f"rank {LAST} has failed: ValueError: softcap" in str(error)
    with fault("refuses calls"):
        call(group)
    # A rank fails outside of the library.
    try:
        with make_group() as group:
            plan(group)
            if one:
                raise KeyError("mine")
            call(group)
    except KeyError:
        assert one
    except cuflash.ContextParallelError as error:
        assert not one and f"rank {LAST} has failed: KeyError: 'mine'" in str(error)
    print("done", flush=True)


@contextlib.contextmanager
def timed() -> Iterator[None]:
    """Say how long it takes to hear of a fault."""
    begin = time.monotonic()
    try:
        yield
    except cuflash.ContextParallelError as error:
        print(f"{time.monotonic() - begin:.1f} s: {error}\n", end="", flush=True)
        raise


def one_is_missing(what: str) -> None:
    """The last rank does something else than to call; all others hear its name in time."""
    WORLD.Barrier()  # they may have started one after the other
    q, cache = (BACKEND.to_native(np.ones(shape, np.float32)) for shape in ((1, 1, 12, 64), (1, 40, 1, 64)))
    with make_group() as patient:  # compiles
        patient.attend(q, cache, cache, cache_seqlens=40)
    group = make_group(timeout=TIMEOUT)
    lengths = BACKEND.to_native(np.full(1, 40, np.int32))
    plan = group.plan(1, 1, 40, 12, 1, 64, lengths, qkv_dtype="float32")

    def call() -> Any:
        return group.attend(q, cache, cache, cache_seqlens=lengths, scheduler_metadata=plan)

    call()
    group.wait()
    if what == "never replays":
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            out = call()
            group.wait()
            stream.begin_capture()
            group.attend(q, cache, cache, cache_seqlens=lengths, scheduler_metadata=plan, out=out)
            captured = stream.end_capture()
        call = captured.launch
    if RANK == LAST:
        if what == "raises":
            raise RuntimeError("outside of the group")
        if what == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    with timed():
        call()
        group.wait()


def stuck() -> None:
    """A stream that never ends, on a machine without a GPU: whoever waits for it hears who does not."""
    event = types.SimpleNamespace(record=lambda stream: None, done=False)
    cuda = types.SimpleNamespace(Event=lambda **_: event, get_current_stream=lambda: None)
    sys.modules["cupy"] = types.SimpleNamespace(cuda=cuda)  # type: ignore[assignment]
    comm = types.SimpleNamespace(
        rank=RANK, nranks=SIZE, is_valid=True, get_async_error=lambda: 0, abort=lambda: setattr(comm, "is_valid", False)
    )
    transport = NcclTransport(comm, MpiTransport(WORLD, TIMEOUT), TIMEOUT)
    if RANK == LAST:
        time.sleep(60)
    with timed():
        try:
            transport.wait()
        finally:
            transport.tell("over")
            assert not comm.is_valid


def graph() -> None:
    """A step of several layers in one CUDA graph, exchanges included; on GPUs alone."""
    case = Case(seqlens=(300, 40, 190), heads=HEADS, dtype="float16", page_size=16)
    group = make_group(interleave=16)
    inputs = own_inputs(case, 16)
    answer = reference.attention(**whole_inputs(case))
    given, plan = transfer(inputs, BACKEND), make_plan(group, case, inputs)
    # An odd number: inboxes take turns, and a replay begins with the one that another ended with.
    outs = [cupy.empty((3, 1, HEADS[0] // SIZE, 64), np.float16) for _ in range(33)]

    def step() -> None:
        for out in outs:
            group.attend(**given, out=out, scheduler_metadata=plan)

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        step()
        group.wait()
        stream.begin_capture()
        step()
        captured = stream.end_capture()
        for _ in range(3):
            for out in outs:
                out.fill(0)
            captured.launch(stream)
            captured.launch(stream)
            group.wait()
            for out in outs:
                whole = np.concatenate(WORLD.allgather(out.get()), -2)
                assert (np.abs(whole - answer.out) <= 2.0**-9 * answer.magnitude).all()
    del captured  # before the communicator
    group.close()


if __name__ == "__main__":
    if sys.argv[1] in ("results", "disagreements", "stuck", "graph"):
        globals()[sys.argv[1]]()
    else:
        one_is_missing(sys.argv[1])
    for comm in _communicators:
        comm.destroy()
