"""The cache folder: whatever is wrong with it, kernels run."""

from __future__ import annotations

import os
import pwd
import resource
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cuflash import simulator
from cuflash.simulator import SimModule, cache
from cuflash.simulator.compile import load_machine

CODE = 'extern "C" __global__ void one(float* x) { x[threadIdx.x] = SCALE * x[threadIdx.x]; }\n'
ROOT = Path(simulator.__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    load_machine()  # from the folder that the tests share
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_private", None)
    monkeypatch.setattr(cache, "_warned", set())
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What is not expected to warn does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def works(scale: int = 3) -> None:
    x = np.arange(32, dtype=np.float32)
    SimModule(CODE.replace("SCALE", f"{scale}.0f")).get_function("one")(1, 32, (x,))
    np.testing.assert_array_equal(x, np.arange(32) * scale)


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "emptied":
        path.write_bytes(b"")
    elif how == "halved":
        path.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


@pytest.mark.parametrize("how", ["emptied", "halved", "flipped"])
def test_damaged_files_are_made_anew(folder: Path, how: str) -> None:
    works()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name.split("-")[0] for name in files} == {"ptx", "image"}
    for name in files:
        damage(folder / name, how)
    works()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


@pytest.mark.parametrize("how", ["emptied", "halved", "flipped"])
def test_a_damaged_machine_is_not_loaded(folder: Path, how: str) -> None:
    path = cache.keep("machine-x.so", bytes(range(256)) * 100)
    assert path is not None and cache.find("machine-x.so") == (path, bytes(range(256)) * 100)
    damage(path, how)
    assert cache.find("machine-x.so") is None


def test_exchanged_files_are_made_anew(folder: Path) -> None:
    """Whole, each of them, and under the other's name."""
    works(3)
    works(4)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for kind in ("ptx", "image"):
        one, other = folder.glob(f"{kind}-*")
        one.write_bytes(files[other.name])
        other.write_bytes(files[one.name])
    works(3)
    works(4)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_a_halved_machine_does_not_kill_the_process(folder: Path) -> None:
    built = Path(load_machine()._name)
    folder.mkdir()
    data = built.read_bytes()
    (folder / built.name).write_bytes(data[: len(data) // 2])
    # Where a compiler would work for half a minute there is what it has made before.
    code = (
        "import pathlib, sys; from cuflash.simulator import compile; "
        "compile._build = lambda *_: pathlib.Path(sys.argv[1]); print(compile.load_machine().sim_sizes())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(built)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    assert (folder / built.name).stat().st_size > len(data) // 2


def test_a_folder_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("a file, where a folder should be")
    with pytest.warns(RuntimeWarning, match="CUFLASH_CACHE_DIR") as caught:
        works(3)
        works(4)
    assert len(caught) == 1 and str(folder) in str(caught[0].message)
    private = cache._private
    assert private is not None and stat.S_IMODE(private.stat().st_mode) == 0o700
    works(3)  # and finds it there
    assert len(list(private.iterdir())) == 4
    shutil.rmtree(private)


def test_nobody_knows_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("CUFLASH_CACHE_DIR", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(RuntimeWarning, match="CUFLASH_CACHE_DIR") as caught:
        works(3)
        assert cache.cache_dir() == cache._private
    assert len(caught) == 1
    assert list(tmp_path.iterdir()) == []
    assert cache._private is not None
    shutil.rmtree(cache._private)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_others_may_read_it(folder: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        works()
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {mode}


def test_a_full_disk(folder: Path) -> None:
    """No file may have more than 300 bytes here, so that writing fails half way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.warns(RuntimeWarning, match="CUFLASH_CACHE_DIR"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
        try:
            works()
            works()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(folder.iterdir()) == []
    assert cache._private is not None and list(cache._private.iterdir()) == []
    shutil.rmtree(cache._private)


def test_a_tilde_is_the_home(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CUFLASH_CACHE_DIR", "~/kernels")
    monkeypatch.chdir(tmp_path)
    works()
    assert simulator.cache_dir() == tmp_path / "kernels"
    assert [path.name for path in tmp_path.iterdir()] == ["kernels"]


def test_an_image_of_another_version_is_made_anew(folder: Path) -> None:
    works()
    (image,) = folder.glob("image-*")
    cache.keep(image.name, b"no pickle")
    works()


def test_compiling_leaves_pythons_objects_alone(tmp_path: Path) -> None:
    """NVRTC writes its empty log, one zero byte, to memory of its own: Python has but one object for a blank."""
    program = f"from cuflash.simulator import compile_ptx; compile_ptx({CODE!r}, ('-DSCALE=2',)); print(bytes([32])[0])"
    environment = os.environ | {"CUFLASH_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "32\n"
