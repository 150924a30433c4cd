"""GPU arrays between ranks, over nccl4py (``nccl.core``), on the current stream of CuPy.

Written against nccl4py 0.6, and not run yet: this project's tests have had no GPUs to run it on.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from .fault import ContextParallelError
from .mpi import MpiTransport

_PAUSE = 5e-5
_SUCCESS, _IN_PROGRESS = 0, 7  # ncclResult_t


class NcclTransport:
    """Carries bytes of GPU memory between the ranks of an nccl4py communicator.

    What is put on a stream is not waited for: a rank that is missing shows when the host waits, in :meth:`wait`.

    Attributes:
        rank: This rank.
        size: Ranks.
        timeout: Seconds that :meth:`wait` waits.
    """

    on_device = True

    def __init__(self, comm: Any, control: MpiTransport | None, timeout: float) -> None:
        """Take the caller's communicator.

        Args:
            comm: An ``nccl.core.Communicator``; whoever made it destroys it, after the graphs that use it.
            control: What carries messages of the hosts, and can name a missing rank. Without it NCCL does.
            timeout: Seconds.

        Raises:
            ValueError: If ``control`` numbers the ranks differently.
        """
        self._comm, self._control, self.timeout = comm, control, timeout
        self.rank, self.size = int(comm.rank), int(comm.nranks)
        if control is not None and (control.rank, control.size) != (self.rank, self.size):
            raise ValueError(
                f"control must have the ranks of comm ({self.rank} of {self.size}), "
                f"got {control.rank} of {control.size}"
            )

    def gather(self, payload: bytes) -> list[bytes]:
        """Return what each rank has given: equally many bytes. The host waits."""
        if self._control is not None:
            return self._control.gather(payload)
        cupy = sys.modules["cupy"]
        received = cupy.empty((self.size, len(payload)), np.uint8)
        self.all_gather(cupy.asarray(np.frombuffer(payload, np.uint8)), received)
        self.wait()
        return [row.tobytes() for row in received.get()]

    def all_gather(self, send: Any, received: Any) -> None:
        """Put on the stream: fill ``received`` (ranks, bytes) with what each rank sends to all."""
        self._comm.allgather(send, received, stream=self._stream().ptr)

    def all_to_all(self, send: Any, received: Any) -> None:
        """Put on the stream: fill ``received`` (ranks, bytes) with what each rank sends to this one."""
        self._comm.alltoall(send, received, stream=self._stream().ptr)

    def wait(self) -> None:
        """Wait for the stream, and abort the communicator at the deadline.

        Raises:
            ContextParallelError: At the deadline, or for an error of NCCL's. What the stream has written is garbage.
        """
        event = sys.modules["cupy"].cuda.Event(disable_timing=True)
        event.record(self._stream())
        deadline = time.monotonic() + self.timeout
        while not event.done:
            state = int(self._comm.get_async_error())
            if state not in (_SUCCESS, _IN_PROGRESS):
                text = self._comm.get_last_error()
                self._comm.abort()
                raise ContextParallelError(f"NCCL has failed on rank {self.rank}: {text}")
            if time.monotonic() > deadline:
                self._comm.abort()
                raise ContextParallelError(
                    f"rank {self.rank} waited {self.timeout:g} s for the others on its stream: one of them is missing"
                )
            time.sleep(_PAUSE)

    def tell(self, text: str) -> None:
        """Abort what is under way, so that nothing waits for this rank, and let the other hosts know."""
        if self._comm.is_valid:
            self._comm.abort()
        if self._control is not None:
            self._control.tell(text)

    def end_with_care(self) -> None:
        """Do not let this process wait for the others at its end."""
        if self._comm.is_valid:
            self._comm.abort()
        if self._control is not None:
            self._control.end_with_care()

    def close(self) -> None:
        """Give back what is not the caller's."""
        if self._control is not None:
            self._control.close()

    def _stream(self) -> Any:
        return sys.modules["cupy"].cuda.get_current_stream()
