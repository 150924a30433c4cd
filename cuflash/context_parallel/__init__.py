"""Context parallelism: sequences whose keys lie on several ranks, over mpi4py or nccl4py.

``group.py`` has the two functions; ``agreement.py`` says what ranks compare before them, ``mpi.py`` and ``nccl.py``
carry results, ``inboxes.py`` lets GPUs of one host do without. The page beside this file has the arithmetic.
"""

from .fault import ContextParallelError
from .group import ContextParallel

__all__ = ["ContextParallel", "ContextParallelError"]
