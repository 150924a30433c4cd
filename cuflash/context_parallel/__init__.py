"""Context parallelism: sequences whose keys lie on several ranks, over mpi4py or nccl4py.

``group.py`` has the two functions; ``packing.py`` says how results travel, ``agreement.py`` what ranks compare before
they do, ``mpi.py`` and ``nccl.py`` who carries them. The page beside this file has the arithmetic.
"""

from .fault import ContextParallelError
from .group import ContextParallel

__all__ = ["ContextParallel", "ContextParallelError"]
