"""Machine code in CuPy's disk cache: made anew whatever is wrong with what lies there, without a GPU or CuPy."""

from __future__ import annotations

import importlib
import os
import resource
import stat
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CODE = b"machine code" * 100


@pytest.fixture
def cubin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module, whose compiler is one that counts."""
    if importlib.util.find_spec("cupy") is None:
        modules = {name: ModuleType(name) for name in ("cupy", "cupy.cuda", "cupy.cuda.nvrtc")}
        modules["cupy.cuda"].nvrtc = modules["cupy.cuda.nvrtc"]  # type: ignore[attr-defined]
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
    module = importlib.import_module("cuflash.backends.cubin")
    monkeypatch.delitem(sys.modules, "cuflash.backends.cubin")
    monkeypatch.setattr(module.nvrtc, "getVersion", lambda: (13, 0), raising=False)
    module.compiled = []
    monkeypatch.setattr(module, "_compile", lambda text, options: module.compiled.append(text) or CODE)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "kernels"))
    return module


@pytest.mark.parametrize("which", ["*.cubin", "*.sha256"])
@pytest.mark.parametrize("how", ["emptied", "halved", "deleted", "unreadable"])
def test_whatever_is_wrong_it_is_made_anew(
    which: str, how: str, cubin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cubin.cubin("text", (), "sm_90a")
    assert cubin.cubin("text", (), "sm_90a") == path and cubin.compiled == ["text"]
    (file,) = (tmp_path / "kernels").glob(which)
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path == file:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    if how == "unreadable":  # as another user's files are
        monkeypatch.setattr(Path, "read_bytes", refused)
    elif how == "deleted":
        file.unlink()
    else:
        file.write_bytes(b"" if how == "emptied" else file.read_bytes()[: file.stat().st_size // 2])
    assert cubin.cubin("text", (), "sm_90a") == path and cubin.compiled == ["text", "text"]
    monkeypatch.setattr(Path, "read_bytes", read)
    assert path.read_bytes() == CODE


def test_others_may_read_it(cubin: Any, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        cubin.cubin("text", (), "sm_90a")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "kernels").iterdir()} == {0o644}


def test_a_full_disk_is_left_as_it_was(cubin: Any, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(OSError):
            cubin.cubin("text", (), "sm_90a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "kernels").iterdir()) == []
