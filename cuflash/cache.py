"""The folder of what compilers made: each file is whole or not there, and named after what it was made of."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

# NAME-DIGEST.KIND: nothing else in the folder is the library's.
_OURS = re.compile(r"[a-z_]+-[0-9a-f]{32,64}\.(cubin|json|pickle|ptx|so)")


def folder() -> Path:
    """Return the folder: ``CUFLASH_CACHE_DIR``, else ``cuflash`` in the platform's cache folder."""
    named = os.environ.get("CUFLASH_CACHE_DIR")
    if named:
        return Path(named)
    try:
        import platformdirs

        return Path(platformdirs.user_cache_dir("cuflash", appauthor=False))
    except ImportError:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cuflash"


def files() -> list[Path]:
    """Return the library's own files in the folder; whatever else lies there, and folders, are not among them."""
    place = folder()
    if not place.is_dir():
        return []
    return sorted(path for path in place.iterdir() if _OURS.fullmatch(path.name) and path.is_file())


def store(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, whoever else does the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.replace(temporary, path)
