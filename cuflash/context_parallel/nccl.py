"""GPU arrays between ranks, over nccl4py (``nccl.core``), on the current stream of CuPy."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import numpy as np

from .fault import ContextParallelError, name_ranks
from .inboxes import Inboxes
from .mpi import MpiTransport

_PAUSE = 5e-5
_MOST_OF_ABORT = 1.0  # seconds that an abort is waited for which may wait for a graph
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
        self._inboxes: Inboxes | None = None
        self._aborting: threading.Thread | None = None
        self._is_captured = False
        self.rank, self.size = int(comm.rank), int(comm.nranks)
        if control is not None and (control.rank, control.size) != (self.rank, self.size):
            raise ValueError(
                f"control must have the ranks of comm ({self.rank} of {self.size}), "
                f"got {control.rank} of {control.size}"
            )

    def open_inboxes(self) -> Inboxes | None:
        """Return memory of this rank that the others' GPUs write to, or None on all ranks; all of them call this."""
        self._inboxes = Inboxes(self.rank, self.size, self.gather)
        if self._inboxes.open(0) is None:
            self._inboxes.close()
            self._inboxes = None
        return self._inboxes

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
        self._comm.allgather(send, received, stream=self._collective_stream())

    def all_to_all(self, send: Any, received: Any) -> None:
        """Put on the stream: fill ``received`` (ranks, bytes) with what each rank sends to this one."""
        self._comm.alltoall(send, received, stream=self._collective_stream())

    def wait(self) -> None:
        """Wait for the stream, and abort the communicator at the deadline.

        With ``control``, half of the timeout is kept for finding out who is missing: whoever waits, too, has said so by
        then.

        Raises:
            ContextParallelError: At the deadline, for an error of NCCL's, or if a rank tells that it has failed. What
                the stream has written is garbage.
        """
        event = sys.modules["cupy"].cuda.Event(disable_timing=True)
        event.record(self._stream())
        patience = self.timeout if self._control is None else self.timeout / 2
        deadline = time.monotonic() + patience
        while not event.done:
            if self._control is not None:
                self._control.listen()
            state = int(self._comm.get_async_error())
            if state not in (_SUCCESS, _IN_PROGRESS):
                text = self._comm.get_last_error()
                self._abort()
                raise ContextParallelError(f"NCCL has failed on rank {self.rank}: {text}")
            if time.monotonic() > deadline:
                missing = [] if self._control is None else self._control.missing(patience)
                self._abort()
                if missing:
                    raise ContextParallelError(f"{name_ranks(missing)} did not answer within {self.timeout:g} s")
                raise ContextParallelError(
                    f"rank {self.rank} waited {self.timeout:g} s for the others on its stream: one of them is missing"
                )
            time.sleep(_PAUSE)

    def tell(self, text: str) -> None:
        """Abort what is under way, so that nothing waits for this rank, and let the other hosts know."""
        self._abort()
        if self._control is not None:
            self._control.tell(text)

    def end_with_care(self) -> None:
        """Do not let this process wait for the others at its end."""
        self._abort()
        if self._control is not None:
            self._control.end_with_care()

    def close(self) -> None:
        """Give back what is not the caller's."""
        if self._inboxes is not None:
            self._inboxes.close()
        if self._control is not None:
            self._control.close()

    def _abort(self) -> None:
        """End what waits for other ranks, on the GPU and in NCCL, once."""
        if self._inboxes is not None:
            self._inboxes.end_waiting()
        if self._aborting is None and self._comm.is_valid:
            # NCCL ends its kernels at once, and then waits for the last graph that holds the communicator. Without one
            # it ends soon, and whoever destroys the communicator next finds that nothing is left to do.
            self._aborting = threading.Thread(target=self._comm.abort, daemon=True)
            self._aborting.start()
            self._aborting.join(_MOST_OF_ABORT if self._is_captured else self.timeout)

    def _collective_stream(self) -> int:
        """Return the handle of the current stream, and remember whether a graph gets hold of the communicator."""
        stream = self._stream()
        self._is_captured = self._is_captured or bool(stream.is_capturing())
        return int(stream.ptr)

    def _stream(self) -> Any:
        return sys.modules["cupy"].cuda.get_current_stream()
