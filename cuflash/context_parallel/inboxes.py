"""Memory that other ranks' GPUs write to, on one host: what the kernel ``exchange`` passes results through.

A rank's inbox is CUDA memory of its own, which the others map by CUDA's IPC handles. It stays until the group ends,
since captured graphs have its address; what is too small is replaced.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import refuse_in_capture
from ..kernels.exchange import MOST_RANKS, inbox_bytes
from ..memory import NativeArray

_GRANULARITY = 2 << 20  # bytes: smaller memory shares a mapping with others', and would not begin where it does
_HANDLE_BYTES = 64

# Inboxes that other ranks may still write to; after a fault nobody knows when they no longer do.
_in_use: list[Inboxes] = []


@dataclass(frozen=True)
class Inbox:
    """One inbox of every rank.

    Attributes:
        memory: This rank's.
        addresses: (ranks,) uint64 where all of them are for this rank.
        half_bytes: What fits in at a time.
        mapped: Addresses to give back.
    """

    memory: NativeArray
    addresses: NativeArray
    half_bytes: int
    mapped: tuple[int, ...]


class Inboxes:
    """The inboxes of a group, and the word that ends all waiting for them.

    Attributes:
        stop: (1,) uint32 in host memory that the GPU sees, 0 until :meth:`end_waiting`.
    """

    def __init__(self, rank: int, size: int, gather: Callable[[bytes], list[bytes]]) -> None:
        """Make none yet.

        Args:
            rank: This rank.
            size: Ranks.
            gather: Returns what each rank has given, equally many bytes; all ranks call it at once.
        """
        cupy = sys.modules["cupy"]
        self._cupy, self._rank, self._size, self._gather = cupy, rank, size, gather
        self._inboxes: list[Inbox] = []
        pinned = cupy.cuda.alloc_pinned_memory(4)
        self._stop = np.frombuffer(pinned, np.uint32, 1)
        self._stop[0] = 0
        here = cupy.cuda.Device().id
        memory = cupy.cuda.UnownedMemory(pinned.ptr, 4, pinned, here)
        self.stop = cupy.ndarray((1,), np.uint32, cupy.cuda.MemoryPointer(memory, 0))
        _in_use.append(self)

    def open(self, half_bytes: int) -> Inbox | None:
        """Return an inbox for messages of ``half_bytes`` in all; all ranks call this at once.

        Returns:
            None, on all ranks, if a rank cannot reach another's memory: on other hosts, or without a link between GPUs.
        """
        if self._inboxes and self._inboxes[-1].half_bytes >= half_bytes:
            return self._inboxes[-1]
        refuse_in_capture("the group", "have made a call of these shapes")
        if self._size > MOST_RANKS:
            return None
        size = -(-inbox_bytes(max(half_bytes, _GRANULARITY)) // _GRANULARITY) * _GRANULARITY
        half_bytes = (size - inbox_bytes(0)) // 2 // 16 * 16
        runtime = self._cupy.cuda.runtime
        memory = self._cupy.ndarray(size, np.uint8, self._cupy.cuda.MemoryPointer(self._cupy.cuda.Memory(size), 0))
        memory.fill(0)
        self._cupy.cuda.get_current_stream().synchronize()
        handles = self._gather(_host() + _handle(self._cupy, memory))
        addresses, error = [memory.data.ptr] * self._size, False
        for rank, handle in enumerate(handles):
            if rank == self._rank:
                continue
            try:
                if not handle.startswith(_host()) or not any(handle[-_HANDLE_BYTES:]):
                    raise OSError("another host, or no handle")
                addresses[rank] = runtime.ipcOpenMemHandle(handle[-_HANDLE_BYTES:])
            except (runtime.CUDARuntimeError, OSError):
                addresses[rank], error = 0, True
        mapped = tuple(a for rank, a in enumerate(addresses) if rank != self._rank and a)
        if any(any(answer) for answer in self._gather(bytes([error]))):
            self._unmap(mapped)
            return None
        inbox = Inbox(memory, self._cupy.asarray(np.array(addresses, np.uint64)), half_bytes, mapped)
        self._inboxes.append(inbox)
        return inbox

    def end_waiting(self) -> None:
        """Let the kernels that wait for other ranks end; their results are garbage."""
        self._stop[0] = 1

    def close(self) -> None:
        """Give all memory back, after every rank has let go of it; all ranks do it at once."""
        for inbox in self._inboxes:
            self._unmap(inbox.mapped)
        self._gather(b"\0")
        self._inboxes.clear()
        _in_use.remove(self)

    def _unmap(self, mapped: tuple[int, ...]) -> None:
        for address in mapped:
            self._cupy.cuda.runtime.ipcCloseMemHandle(address)


def _host() -> bytes:
    """Return what tells this host and its start from others."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            start = file.read()
    except OSError:
        start = ""
    return hashlib.blake2b(f"{platform.node()} {start}".encode(), digest_size=16).digest()


def _handle(cupy: Any, memory: NativeArray) -> bytes:
    try:
        return bytes(cupy.cuda.runtime.ipcGetMemHandle(memory.data.ptr))
    except cupy.cuda.runtime.CUDARuntimeError:
        return bytes(_HANDLE_BYTES)
