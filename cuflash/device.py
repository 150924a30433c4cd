"""The machine a plan is made for: multiprocessors, architecture, shared memory."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .problem import integer

# Shared memory in bytes per multiprocessor and the most that one block may take, by compute capability
# (CUDA C++ Programming Guide, "Compute Capabilities").
_SHARED_MEMORY = {
    80: (164 * 1024, 163 * 1024),
    86: (100 * 1024, 99 * 1024),
    87: (164 * 1024, 163 * 1024),
    89: (100 * 1024, 99 * 1024),
    90: (228 * 1024, 227 * 1024),
    100: (228 * 1024, 227 * 1024),
    103: (228 * 1024, 227 * 1024),
    120: (100 * 1024, 99 * 1024),
    121: (100 * 1024, 99 * 1024),
}


MIN_ARCH = 80
MAX_NUM_SM = 2**16  # far beyond any GPU: a plan has room for the blocks of all


@dataclass(frozen=True)
class Device:
    """What a schedule and a kernel variant depend on.

    Attributes:
        num_sm: Multiprocessors.
        arch: Compute capability as an int: 90 for sm_90.
    """

    num_sm: int
    arch: int

    @property
    def shared_per_sm(self) -> int:
        """Shared memory of one multiprocessor, in bytes."""
        return self._shared()[0]

    @property
    def shared_per_block(self) -> int:
        """The most shared memory that one block may ask for, in bytes."""
        return self._shared()[1]

    def _shared(self) -> tuple[int, int]:
        try:
            return _SHARED_MEMORY[self.arch]
        except KeyError:
            if self.arch < MIN_ARCH:
                raise ValueError(
                    f"compute capability must be at least {MIN_ARCH / 10}, got {self.arch / 10:.1f}"
                ) from None
            # An architecture newer than this table: the smallest of the known ones is safe.
            return min(_SHARED_MEMORY.values())


def host_device() -> Device:
    """The GPU that plans on host arrays are made for.

    ``CUFLASH_NUM_SM`` sets its multiprocessors (default 132) and ``CUFLASH_ARCH`` its architecture (default 90), so
    that a schedule can be studied, and a kernel simulated, for any GPU.
    """
    return Device(_env_int("CUFLASH_NUM_SM", 132, 1, MAX_NUM_SM), _env_int("CUFLASH_ARCH", 90, MIN_ARCH))


def _env_int(name: str, default: int, *bounds: int) -> int:
    text = os.environ.get(name, "")
    try:
        number = int(text) if text else default
    except ValueError:
        raise ValueError(f"{name} must be an integer, got {text!r}") from None
    return integer(name, number, *bounds)
