"""The folder of what compilers made, which is the simulator's: it knows nothing of the rest, so that it says where."""

from __future__ import annotations

import re
from pathlib import Path

# NAME-DIGEST.KIND, or what a process that was killed has left of one: nothing else in the folder is the library's.
_NAME = r"[a-z_]+-[0-9a-f]{32,64}\.(cubin|json|pickle|ptx|so)"
_OURS = re.compile(rf"{_NAME}|\.{_NAME}\.\d+\.[0-9a-f]{{8}}")


def folder() -> Path:
    """Return the folder: ``CUFLASH_CACHE_DIR``, else ``cuflash`` in the platform's cache folder.

    Raises:
        RuntimeError: If nobody knows the user's home.
    """
    from .simulator import cache  # 60 ms, which only these functions need

    found = cache.folder()
    if found is None:
        raise RuntimeError("there is no home folder for a cache: set CUFLASH_CACHE_DIR to a folder that can be written")
    return found


def files() -> list[Path]:
    """Return the library's own files in the folder; whatever else lies there, and folders, are not among them.

    Raises:
        OSError: If the folder cannot be read.
    """
    place = folder()
    if not place.is_dir():
        return []
    return sorted(path for path in place.iterdir() if _OURS.fullmatch(path.name) and path.is_file())


def store(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, whoever else does the same.

    Raises:
        OSError: If it cannot be written. Nothing is left behind.
    """
    from .simulator import cache

    cache.store(path, data)
