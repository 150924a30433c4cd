"""Host arrays between ranks, over mpi4py. Every wait has a deadline, and what is missing then has a name.

Exchanges are pairs of non-blocking messages, which is what a non-blocking all-to-all does inside: a collective that
does not end cannot say whom it waits for, a message can.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .fault import ContextParallelError, name_ranks

_DATA, _FAULT, _ROLL = 18211, 18212, 18213  # tags; the first exchange takes place in the caller's communicator
_EAGER = 200  # polls without a pause: what is on its way arrives in microseconds
_PAUSE = 5e-5
_LONGEST_TEXT = 2000
_MOST_AT_EXIT = 5.0  # seconds that ranks wait for each other at the end of a program, after a fault

Bytes = NDArray[np.uint8]

# Requests that will never complete, and the memory that they may still write to.
_abandoned: list[Any] = []


class MpiTransport:
    """Carries bytes of host memory between the ranks of an mpi4py communicator.

    Attributes:
        rank: This rank.
        size: Ranks.
        timeout: Seconds that an exchange may take.
    """

    on_device = False

    def __init__(self, comm: Any, timeout: float) -> None:
        """Make a communicator of its own, so that no message of the caller's is mistaken.

        Args:
            comm: An mpi4py intracommunicator.
            timeout: Seconds that an exchange may take.

        Raises:
            ContextParallelError: If a rank does not make one, too.
        """
        self._mpi = sys.modules["mpi4py.MPI"]
        self._comm, self.timeout = comm, timeout
        self.rank, self.size = int(comm.Get_rank()), int(comm.Get_size())
        self._ends_with_care = False
        try:
            self.gather(b"\0")  # whoever is missing is known before a collective waits for it
            own, request = comm.Idup()
            self._wait({}, [request])
        except ContextParallelError:
            self.end_with_care()
            raise
        self._comm = own

    def gather(self, payload: bytes) -> list[bytes]:
        """Return what each rank has given: equally many bytes."""
        mine = np.frombuffer(payload, np.uint8)
        received = np.empty((self.size, len(payload)), np.uint8)
        self.all_gather(mine, received)
        return [row.tobytes() for row in received]

    def all_gather(self, send: Bytes, received: Bytes) -> None:
        """Fill ``received`` (ranks, bytes) with what each rank sends to all."""
        self._exchange([send] * self.size, received)

    def all_to_all(self, send: Bytes, received: Bytes) -> None:
        """Fill ``received`` (ranks, bytes) with what each rank sends to this one: row ``rank`` of its ``send``."""
        self._exchange(list(send), received)

    def tell(self, text: str) -> None:
        """Let the other ranks know that this one has failed; they hear it in the exchange that they wait in."""
        message = np.frombuffer(text.encode()[:_LONGEST_TEXT], np.uint8)
        sends = [self._comm.Isend(message, peer, _FAULT) for peer in self._peers()]
        _abandoned.append((sends, message))
        self.end_with_care()

    def end_with_care(self) -> None:
        """Do not let this process wait for ever for the others at its end, as MPI_Finalize does."""
        if not self._ends_with_care:
            self._ends_with_care = True
            atexit.register(self._end)

    def missing(self, seconds: float) -> list[int]:
        """Return the ranks that do not call this, too, within so many seconds; nothing else may follow it."""
        nothing = np.zeros((self.size, 1), np.uint8)
        sends = [self._comm.Isend(nothing[self.rank], peer, _ROLL) for peer in self._peers()]
        receives = {peer: self._comm.Irecv(nothing[peer], peer, _ROLL) for peer in self._peers()}
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._mpi.Request.Testall(list(receives.values())):
            time.sleep(_PAUSE)
        _abandoned.append((receives, sends, nothing))
        return [peer for peer, request in receives.items() if not request.Test()]

    def wait(self) -> None:
        """Nothing is ever under way when a call has returned."""

    def close(self) -> None:
        """Give the communicator back; all ranks do it at once."""
        with contextlib.suppress(self._mpi.Exception):
            self._comm.Free()

    def _peers(self) -> list[int]:
        return [peer for peer in range(self.size) if peer != self.rank]

    def _exchange(self, to: Sequence[Bytes], received: Bytes) -> None:
        received[self.rank] = to[self.rank]
        receives = {peer: self._comm.Irecv(received[peer], peer, _DATA) for peer in self._peers()}
        sends = [self._comm.Isend(to[peer], peer, _DATA) for peer in self._peers()]
        try:
            self._wait(receives, sends)
        except BaseException:
            _abandoned.append((receives, sends, received, to))
            raise

    def _wait(self, receives: dict[int, Any], others: list[Any]) -> None:
        """Wait for requests, listen for faults, and raise at the deadline."""
        requests = [*receives.values(), *others]
        deadline = time.monotonic() + self.timeout
        polls = 0
        while not self._mpi.Request.Testall(requests):
            self.listen()
            if time.monotonic() > deadline:
                silent = [peer for peer, request in receives.items() if not request.Test()] or self._peers()
                raise ContextParallelError(f"{name_ranks(silent)} did not answer within {self.timeout:g} s")
            polls += 1
            time.sleep(0 if polls < _EAGER else _PAUSE)

    def listen(self) -> None:
        """Raise if a rank has told that it has failed.

        Raises:
            ContextParallelError: With what it said.
        """
        status = self._mpi.Status()
        if self._comm.Iprobe(self._mpi.ANY_SOURCE, _FAULT, status):
            message = np.empty(status.Get_count(self._mpi.BYTE), np.uint8)
            self._comm.Recv(message, status.Get_source(), _FAULT)
            text = message.tobytes().decode(errors="replace")
            raise ContextParallelError(f"rank {status.Get_source()} has failed: {text}", is_known=True)

    def _end(self) -> None:
        """Meet the other ranks at the end of the program, or end them."""
        if self._mpi.Is_finalized():
            return
        sys.stdout.flush()
        sys.stderr.flush()
        request = self._comm.Ibarrier()
        deadline = time.monotonic() + min(self.timeout, _MOST_AT_EXIT)
        while not request.Test():
            if time.monotonic() > deadline:
                self._mpi.COMM_WORLD.Abort(1)
            time.sleep(1e-3)
