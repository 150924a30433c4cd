"""The folder that keeps what compilers made: a cache, so whatever is wrong with it costs time and nothing else.

Each file ends in a digest of its name and of what stands before it. A file whose digest does not fit was cut short,
damaged or renamed, and is made anew; no shared object is loaded and nothing unpickled before that was looked at.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import secrets
import shutil
import tempfile
import threading
import warnings
from pathlib import Path

__all__ = ["cache_dir", "digest", "find", "folder", "keep", "store"]

_SEAL = b"\n//cuflash-sha256:"
_lock = threading.Lock()
_private: Path | None = None  # the folder of this process, once it needed one
_warned: set[Path | None] = set()


def digest(*parts: object) -> str:
    """A name made of contents."""
    h = hashlib.sha256()
    for p in parts:
        h.update(p if isinstance(p, bytes) else repr(p).encode())
        h.update(b"\0")
    return h.hexdigest()[:32]


def cache_dir() -> Path:
    """The folder of compiled kernels: CUFLASH_CACHE_DIR, else the platform's cache folder.

    A user without a home gets a folder that lasts as long as the process, and a warning.
    """
    return folder() or _private_folder(None, "")


def folder() -> Path | None:
    """The folder of compiled kernels, whether it can be used or not; None for a user without a home."""
    named = os.environ.get("CUFLASH_CACHE_DIR")
    if named:
        return Path(os.path.expanduser(named)).absolute()
    try:
        import platformdirs

        found = Path(platformdirs.user_cache_dir("cuflash", appauthor=False))
    except RuntimeError:
        return None
    except ImportError:
        found = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "cuflash"
    return found if found.is_absolute() else None  # "~" is left as it is where nobody knows the home


def _private_folder(place: Path | None, error: str) -> Path:
    """A folder for this process alone, in place of one that cannot be written; warns of it once."""
    global _private
    with _lock:
        if _private is None:
            _private = Path(tempfile.mkdtemp(prefix="cuflash-"))
            atexit.register(_remove, _private, os.getpid())
        told = place in _warned
        _warned.add(place)
    if not told:
        why = f"the cache folder {place} cannot be written ({error})" if place else "there is no home folder"
        warnings.warn(
            f"{why}: compiled kernels are kept in {_private} until this process ends, and the next one compiles them "
            "again; set CUFLASH_CACHE_DIR to a folder that can be written",
            RuntimeWarning,
            stacklevel=2,
        )
    return _private


def _remove(place: Path, process: int) -> None:
    if os.getpid() == process:  # a fork's exit is not the end
        shutil.rmtree(place, ignore_errors=True)


def store(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, whoever else does the same; whom the umask lets may read it.

    Raises:
        OSError: if it cannot be written. Nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _seal(name: str, data: bytes) -> bytes:
    return _SEAL + hashlib.sha256(name.encode() + b"\0" + data).hexdigest().encode()


def find(name: str) -> tuple[Path, bytes] | None:
    """Where a file of this name is and what it holds, if it is there and whole."""
    for place in (folder(), _private):
        if place is None:
            continue
        try:
            data = (place / name).read_bytes()
        except OSError:
            continue
        size = len(_seal(name, b""))
        if _seal(name, data[:-size]) == data[-size:]:
            return place / name, data[:-size]
    return None


def keep(name: str, data: bytes) -> Path | None:
    """Writes a file for later; where the folder cannot be written, for this process.

    Returns:
        Where it is; None if there is no room anywhere, which is no reason to do without what was made.
    """
    place = folder()
    message = ""
    if place is not None:
        try:
            store(place / name, data + _seal(name, data))
            return place / name
        except OSError as error:
            message = error.strerror or str(error)
    try:
        path = _private_folder(place, message) / name
        store(path, data + _seal(name, data))
        return path
    except OSError:
        return None
