"""A stream that is busy until the host says so: what a test puts behind it cannot have run before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_SOURCE = r"""
extern "C" __global__ void wait(volatile int* open, volatile int* expired, long long nanoseconds) {
    long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
        *expired = now - start > nanoseconds;
    } while (!*open && !*expired);
}
"""
_SECONDS = 20


class Gate:
    """Closed on a stream until :meth:`open`, or for so long that whoever waits for the stream is found out.

    Whatever is called while it is closed must have been called before: loading a kernel may wait for the whole device.
    """

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._memory = cupy.cuda.alloc_pinned_memory(8)  # the host's, which the GPU sees at the same address
        self._state = np.frombuffer(self._memory, np.int32, 2)
        self._kernel = cupy.RawKernel(_SOURCE, "wait")
        self._state[:] = 1, 0
        self._launch()
        cupy.cuda.Device().synchronize()

    def close(self, stream: Any) -> None:
        """Keep CuPy's or torch's stream from going on."""
        self._state[:] = 0
        with self._cupy.cuda.Stream.from_external(_Handle(getattr(stream, "cuda_stream", None) or stream.ptr)):
            self._launch()

    def open(self) -> None:
        """Let the stream go on; fails if it did so by itself, since somebody waited for it."""
        expired = bool(self._state[1])
        self._state[0] = 1
        assert not expired, f"the host waited for a stream that was busy for {_SECONDS} s"

    def _launch(self) -> None:
        address = self._state.ctypes.data
        self._kernel((1,), (1,), (np.uint64(address), np.uint64(address + 4), np.int64(_SECONDS * 10**9)))


@dataclass(frozen=True)
class _Handle:
    """A stream by the protocol that CuPy takes it by."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer
