"""Which keys a row sees, as data and as three functions: first, end and hidden.

The CUDA twin is ``kernels_cu/include/mask.cuh``. Everything that hides keys from rows stands in these two files: the
planner, the NumPy backend and the kernels ask them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ENDLESS = 2**40  # more keys than there are, and room for sums


@dataclass(frozen=True)
class Shard:
    """Which positions of a sequence a cache holds, in context parallelism; one rank holds them all.

    Position p lives in the cache of rank (p // interleave) % world_size, in order.

    Attributes:
        world_size: Ranks.
        rank: Whose keys these are.
        interleave: Neighbouring positions that a rank holds.
    """

    world_size: int = 1
    rank: int = 0
    interleave: int = 1

    def held(self, position: Any) -> Any:
        """Return how many of the positions before ``position`` (an int or an array) the rank holds."""
        if self.world_size == 1:
            return position
        rounds, rest = np.divmod(np.maximum(position, 0), self.world_size * self.interleave)
        return rounds * self.interleave + np.clip(rest - self.rank * self.interleave, 0, self.interleave)

    def position(self, key: Any) -> Any:
        """Return the position of the rank's key number ``key``."""
        if self.world_size == 1:
            return key
        rounds, rest = np.divmod(key, self.interleave)
        return (rounds * self.world_size + self.rank) * self.interleave + rest

    def holds(self, position: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return for each position whether the rank holds it."""
        return position // self.interleave % self.world_size == self.rank


@dataclass(frozen=True)
class Mask:
    """Which keys a row sees. Query i of sq stands at position p = i + sk - sq among the sk keys (aligned at the end).

    Positions are those of the whole sequence, keys are numbered as they lie in the cache: in context parallelism a
    cache holds some of them.

    What a row sees is an interval, and neither of its ends moves backwards from one position to the next: the first
    and the last row of a block bound what all of its rows see.

    Attributes:
        left: Keys before its own position that a row sees, -1 for all.
        right: Keys after it, -1 for all; 0 is the causal mask.
        chunk: A row sees only its own chunk of this many keys, 0 for no chunks.
        shard: Which positions the cache holds.
    """

    left: int = -1
    right: int = -1
    chunk: int = 0
    shard: Shard = Shard()

    @property
    def hides(self) -> bool:
        """Whether a row may see less than all keys of its sequence."""
        return self.left >= 0 or self.right >= 0 or self.chunk > 0

    def first(self, position: Any) -> Any:
        """Return the first key that a row at ``position`` (an int or an array) sees, were the keys without end."""
        begin = np.maximum(position - self.left, 0) if self.left >= 0 else np.zeros_like(position)
        # Floor division, since chunks also lie at negative positions.
        return self.shard.held(np.maximum(begin, position // self.chunk * self.chunk) if self.chunk else begin)

    def end(self, position: Any, seqlen_k: Any) -> Any:
        """Return the end of the keys that a row at ``position`` sees of ``seqlen_k``; it may lie before the first."""
        end = (
            np.minimum(seqlen_k, position + (self.right + 1)) if self.right >= 0 else seqlen_k + np.zeros_like(position)
        )
        return self.shard.held(np.minimum(end, (position // self.chunk + 1) * self.chunk) if self.chunk else end)

    def hidden(self, position: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return (rows, keys): what rows at ``position`` (rows,) do not see of ``keys`` (keys,)."""
        position = position[:, None]
        return (keys < self.first(position)) | (keys >= self.end(position, _ENDLESS))
