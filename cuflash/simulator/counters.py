"""What a launch counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .program import Program

__all__ = ["ArrayCount", "Counters", "LineCount"]

PC_COUNT = np.dtype(
    [(n, "u8") for n in ("executed", "lanes", "shared_ideal", "shared_real", "sectors", "sectors_ideal", "bytes")]
)
REGION_COUNT = np.dtype(
    [(n, "u8") for n in ("read_bytes", "read_sectors", "read_ideal", "write_bytes", "write_sectors", "write_ideal")]
)


@dataclass(frozen=True)
class ArrayCount:
    """Global-memory traffic of one array.

    Attributes:
        read_bytes: bytes that lanes asked for.
        read_sectors: sectors of 32 bytes that were read.
        read_ideal: the fewest sectors that hold the bytes.
        write_bytes: bytes that lanes wrote.
        write_sectors: sectors that were written.
        write_ideal: the fewest sectors that hold the bytes.
    """

    read_bytes: int = 0
    read_sectors: int = 0
    read_ideal: int = 0
    write_bytes: int = 0
    write_sectors: int = 0
    write_ideal: int = 0


@dataclass
class LineCount:
    """Counts of one source line.

    Attributes:
        executed: warp instructions.
        shared_ideal: wavefronts of shared memory if no bank conflicted.
        shared_real: wavefronts with the conflicts that there were.
        sectors: sectors of global memory, of 32 bytes.
        sectors_ideal: the fewest sectors that hold the bytes.
        bytes: bytes of global memory that lanes asked for.
    """

    executed: int = 0
    shared_ideal: int = 0
    shared_real: int = 0
    sectors: int = 0
    sectors_ideal: int = 0
    bytes: int = 0


class Counters:
    """Counters of a launch.

    Attributes:
        arrays: global-memory traffic by array name.
        classes: warp instructions by class, such as "mma", "ldmatrix", "ld.global", "fp32", "int".
        shared_ideal: wavefronts of shared memory if no bank conflicted.
        shared_real: wavefronts with the conflicts that there were.
    """

    def __init__(self, program: Program, pcs: np.ndarray, regions: Mapping[str, Sequence[int]]) -> None:
        self._program = program
        self._pcs = pcs
        self.arrays = {name: ArrayCount(*row) for name, row in regions.items()}
        classes: dict[str, int] = defaultdict(int)
        for name, n in zip(program.classes, pcs["executed"].tolist()):
            if n and name:
                classes[name] += n
        self.classes = dict(classes)
        self.shared_ideal = int(pcs["shared_ideal"].sum())
        self.shared_real = int(pcs["shared_real"].sum())

    @property
    def instructions(self) -> int:
        """Warp instructions."""
        return sum(self.classes.values())

    @property
    def mma(self) -> int:
        """Matrix products of a warp."""
        return self.classes.get("mma", 0)

    @property
    def wgmma(self) -> int:
        """Matrix products of a warpgroup, counted once for each of its four warps, as a GPU counts HGMMA."""
        return self.classes.get("wgmma", 0)

    @property
    def barriers(self) -> int:
        """Block and cluster barriers, counted once for each warp."""
        return self.classes.get("barrier", 0)

    @property
    def atomics(self) -> int:
        """Atomic instructions, counted once for each warp."""
        return self.classes.get("atomic", 0)

    def wavefronts(self, *classes: str) -> tuple[int, int]:
        """Wavefronts of shared memory of the instructions of some classes: ideal and real."""
        chosen = np.isin(self._program.classes, classes)
        return int(self._pcs["shared_ideal"][chosen].sum()), int(self._pcs["shared_real"][chosen].sum())

    @property
    def by_line(self) -> dict[tuple[str, int], LineCount]:
        """Counts by source file and line."""
        out: dict[tuple[str, int], LineCount] = {}
        for loc, row in zip(self._program.locs, self._pcs.tolist()):
            if loc is None or not any(row):
                continue
            line = out.setdefault((self._program.files.get(loc.file, "?"), loc.line), LineCount())
            executed, _, ideal, real, sectors, sectors_ideal, size = row
            line.executed += executed
            line.shared_ideal += ideal
            line.shared_real += real
            line.sectors += sectors
            line.sectors_ideal += sectors_ideal
            line.bytes += size
        return out

    def __repr__(self) -> str:
        shared = f"{self.shared_real}/{self.shared_ideal}"
        return f"Counters(instructions={self.instructions}, shared={shared}, arrays={self.arrays})"
