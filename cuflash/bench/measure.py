"""What is timed: this library's attention, a kernel that only reads, and other libraries, on the same keys and values.

Every figure is the median over rounds in which all take their turn, from CUDA graphs of many calls on copies of the
inputs that together are several times the L2 cache, so that every call reads from memory. Clocks are as found. What is
wrong is not timed: this library's output is compared with the NumPy backend's, and the others' with this library's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .. import SchedulerMetadata, flash_attn_with_kvcache
from .inputs import Inputs, Shape, bits, to_host
from .peers import MOST_ERROR, Peer, reason
from .report import Record
from .timing import Sampler, medians, read_us

_CHECKED_KEYS = 1 << 20  # keys times KV heads times queries that are compared with the NumPy backend


class Machine(Protocol):
    """What measures: :class:`~cuflash.bench.timing.Gpu`, or a test's stand-in for it."""

    xp: Any

    @property
    def l2_bytes(self) -> int:
        """Size of the L2 cache."""

    @property
    def bandwidth(self) -> float:
        """Terabytes per second of a long read."""

    @property
    def tensor_rate(self) -> float | None:
        """Operations of the tensor cores in 10^12 a second, None where that is not known."""

    def fill(self, array: Any, seed: int) -> None:
        """Fill an array with random numbers."""

    def graph(self, calls: Sequence[Callable[[], Any]]) -> Sampler:
        """Return what runs all the calls when it samples."""

    def synchronise(self) -> None:
        """Wait for what runs."""

    def readers(self, size: int) -> Mapping[str, Sampler]:
        """Return plain reads of so many bytes, by names that begin with "read"."""


class Reference:
    """The NumPy backend's answer for some sequences of the first copy; needs ``CUFLASH_BACKEND`` to be auto."""

    def __init__(self, inputs: Inputs) -> None:
        shape = inputs.shape
        lengths = shape.lengths
        order = [int(lengths.argmin()), int(lengths.argmax()), *range(len(lengths))]
        self.sequences: list[int] = []
        for s in dict.fromkeys(order):
            keys = int(lengths[[*self.sequences, s]].sum())
            if not self.sequences or keys * shape.heads_kv * shape.queries <= _CHECKED_KEYS:
                self.sequences.append(s)
        self.sequences = self.sequences[:8]
        answers = []
        for s in self.sequences:
            k = inputs.sequence("k_cache", s)
            v = k[..., : shape.dim_v] if shape.latent else inputs.sequence("v_cache", s)
            q = to_host(inputs.copies[0]["q"][s : s + 1])
            scales = {name: inputs.sequence(name, s) for name in inputs.copies[0] if name.endswith("_descale")}
            answers.append(flash_attn_with_kvcache(q, k, v, **(shape.options | scales))[0].astype(np.float32))
        self.answers = np.stack(answers)

    def error(self, out: NDArray[Any]) -> float:
        """Return how far an output (batch, queries, heads, headdim) is from the answers, relative to their norm."""
        return distance(out[self.sequences], self.answers)


def distance(out: NDArray[Any], answer: NDArray[Any]) -> float:
    """Return the norm of the difference, relative to that of the answer."""
    difference = np.asarray(out, np.float32) - np.asarray(answer, np.float32)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(answer, np.float32)))


def roofline(machine: Machine, *shapes: Shape) -> Record:
    """Return what steps read and compute together, and the least time for it.

    Returns:
        ``kv_mb`` of keys and values, ``gflop``, and ``floor_us``: the longer of the times that memory needs for the
        bytes and tensor cores for the operations; ``bound`` says which.
    """
    size, operations = sum(shape.kv_bytes for shape in shapes), sum(shape.operations for shape in shapes)
    times = {"bytes": size / machine.bandwidth / 1e6}
    if machine.tensor_rate is not None:
        times["operations"] = operations / machine.tensor_rate / 1e6
    bound = max(times, key=lambda name: times[name])
    return {"kv_mb": size / 1e6, "gflop": operations / 1e9, "floor_us": times[bound], "bound": bound}


def measure(shape: Shape, machine: Machine, peers: Mapping[str, type[Peer]], rounds: int = 11) -> Record:
    """Time a shape.

    Args:
        shape: The shape.
        machine: The GPU.
        peers: Other libraries.
        rounds: Rounds, of which the median counts.

    Returns:
        What :func:`roofline` returns, and microseconds of a call: ``read_us`` of a kernel that only reads, ``given_us``
        on a plan, ``unplanned_us`` planning in the call; ``peers`` has a figure for each peer, or why there is none.

    Raises:
        ArithmeticError: If this library's output is wrong.
    """
    inputs = Inputs.make(shape, machine.xp, machine.fill, machine.l2_bytes)
    reference, metadata = Reference(inputs), inputs.plan()
    out = inputs.copies[0]["out"]
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    samplers: dict[str, Sampler] = {}

    def ours(name: str, plan: Callable[[], SchedulerMetadata]) -> None:
        graph = machine.graph([lambda i=i: inputs.attend(i, plan()) for i in range(inputs.calls)])  # type: ignore[misc]
        out.view(bits(out.dtype))[...] = np.iinfo(bits(out.dtype)).max  # NaN in every element type
        machine.synchronise()
        graph.sample()  # what is timed is what is checked
        errors[name] = reference.error(to_host(out))
        if not errors[name] < MOST_ERROR:
            raise ArithmeticError(f"{name} is wrong: relative error {errors[name]:.2g}")
        samplers[name] = graph

    ours("given", lambda: metadata)
    ours("unplanned", lambda: inputs.plan(out=metadata))
    answer = to_host(out).astype(np.float32)
    samplers |= machine.readers(shape.kv_bytes)
    for name, kind in peers.items():
        why = kind.missing() or kind.refusal(shape)
        if why:
            failed[name] = why
            continue
        try:
            peer = kind()
            peer.prepare(inputs)
            errors[name] = distance(peer.answer(), answer)
            if not errors[name] < kind.most_error(shape):
                failed[name] = f"wrong: relative error {errors[name]:.2g}"
                continue
            samplers[name] = peer.sampler(inputs.calls)
        except Exception as error:  # a peer that does not run a shape is a row without its figure
            failed[name] = reason(error)
    times = medians(samplers, rounds)
    best = min((times[name] for name in peers if name in times), default=None)
    least = roofline(machine, shape)
    return {
        **least,
        "read_us": read_us(times),
        "given_us": times["given"],
        "unplanned_us": times["unplanned"],
        "share": least["floor_us"] / times["given"],
        "to_read": times["given"] / read_us(times),
        "best_peer_us": best,
        "to_best_peer": None if best is None else times["given"] / best,
        "blocks": int(to_host(metadata.array[:1])[0]),
        "efficiency": metadata.efficiency,
        "balance": metadata.balance,
        "errors": errors,
        "peers": {name: times.get(name, failed.get(name)) for name in peers},
    }
