"""Which keys a row sees, as data and as three functions: first, end and hidden.

The CUDA twin is ``kernels_cu/include/mask.cuh``. Everything that hides keys from rows stands in these two files: the
planner, the NumPy backend and the kernels ask them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Mask:
    """Which keys a row sees. Query i of sq stands at position p = i + sk - sq among the sk keys (aligned at the end).

    What a row sees is an interval, and neither of its ends moves backwards from one position to the next: the first
    and the last row of a block bound what all of its rows see.

    Attributes:
        left: Keys before its own position that a row sees, -1 for all.
        right: Keys after it, -1 for all; 0 is the causal mask.
        chunk: A row sees only its own chunk of this many keys, 0 for no chunks.
    """

    left: int = -1
    right: int = -1
    chunk: int = 0

    @property
    def hides(self) -> bool:
        """Whether a row may see less than all keys of its sequence."""
        return self.left >= 0 or self.right >= 0 or self.chunk > 0

    def first(self, position: Any) -> Any:
        """Return the first key that a row at ``position`` (an int or an array) sees, were the keys without end."""
        begin = np.maximum(position - self.left, 0) if self.left >= 0 else np.zeros_like(position)
        # Floor division, since chunks also lie at negative positions.
        return np.maximum(begin, position // self.chunk * self.chunk) if self.chunk else begin

    def end(self, position: Any, seqlen_k: Any) -> Any:
        """Return the end of the keys that a row at ``position`` sees of ``seqlen_k``; it may lie before the first."""
        end = (
            np.minimum(seqlen_k, position + (self.right + 1)) if self.right >= 0 else seqlen_k + np.zeros_like(position)
        )
        return np.minimum(end, (position // self.chunk + 1) * self.chunk) if self.chunk else end

    def hidden(self, position: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return (rows, keys): what rows at ``position`` (rows,) do not see of ``keys`` (keys,)."""
        position = position[:, None]
        return (keys < self.first(position)) | (keys >= self.end(position, np.iinfo(np.int64).max))
