"""The command line, as a person sees it."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import HAS_GPU

import cuflash
from cuflash import cache, simulator
from cuflash.bench import peers
from cuflash.cli import bench as bench_command
from cuflash.cli import driver, main, packages
from cuflash.cli import info as info_command
from cuflash.cli import schedule as schedule_command
from cuflash.cli.text import bars, seconds, size, table, wrapped

ROOT = Path(__file__).parents[1]
DEMO = ["demo", "--batch", "3", "--seqlen", "40", "--layers", "2"]


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """A terminal of 80 columns, without settings."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("CUFLASH_BACKEND", "CUFLASH_NUM_SM", "CUFLASH_ARCH", "CUFLASH_VALIDATE"):
        monkeypatch.delenv(name, raising=False)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that works; return what it prints."""
    before = dict(os.environ)
    assert main(arguments) == 0
    assert dict(os.environ) == before
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command with bad arguments; return its error."""
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    message, usage, help_line = re.fullmatch(r"(error: .*)\n(usage: .*)\n(.*)\n", captured.err, re.DOTALL).groups()
    assert usage.startswith("usage: python -m cuflash") and len(usage.splitlines()) == 1
    assert help_line.endswith("--help says more")
    assert max(map(len, captured.err.splitlines())) <= 80
    return unwrapped(message)


def unwrapped(text: str) -> str:
    """Return text without the line breaks that a narrow terminal makes necessary."""
    return re.sub(r"\s+", " ", text)


# ---------------------------------------------------------------------------------------------------------- processes
def test_as_a_module(tmp_path):
    """``python -m cuflash`` in a process of its own, in a folder that is not the repository."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cuflash.__file__).parents[1]), "PYTHONIOENCODING": "ascii"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cuflash", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)

    done = run(*DEMO)
    assert (done.returncode, done.stderr) == (0, "")
    assert "'s rounding" in done.stdout
    done = run("bogus")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "invalid choice: 'bogus'" in done.stderr


def test_version_and_help(capsys):
    for option, text in (("--version", cuflash.__version__), ("--help", "schedule")):
        with pytest.raises(SystemExit) as raised:
            main([option])
        assert raised.value.code == 0
        assert text in capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 100])
@pytest.mark.parametrize("command", ["", "demo", "info", "schedule", "bench", "cache", "replay"])
def test_help_fits_the_terminal(command, columns, capsys, monkeypatch):
    """With one line of usage that has all that must be given."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert not lines[1] and lines[0].endswith(" [options]")
    assert ("FILE" in lines[0]) == (command == "replay") and ("--seqlens" in lines[0]) == (command == "schedule")


# --------------------------------------------------------------------------------------------------------------- demo
def test_demo(capsys):
    out = call(capsys, *DEMO, "--backend", "numpy")
    assert "planned once, run by 2 layers" in out
    for name in ("backend", "sequences", "efficiency", "balance", "shares", "error", "time"):
        assert re.search(rf"^  {name} ", out, re.MULTILINE), name
    assert "the NumPy backend needs no plan" in out and "one plan" not in out and "no plan " not in out
    assert "within float32's rounding" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_demo_options(capsys, dtype):
    options = ("--heads", "6/3", "--headdim", "40", "--page-size", "7", "--dtype", dtype, "--seed", "3")
    out = call(capsys, *DEMO, *options, "--backend", "numpy")
    assert f"6 query, 3 KV, dim 40, {dtype}" in out and f"within {dtype}'s rounding" in out


def test_demo_says_why_short_shares_are_uneven(capsys):
    def out(*arguments: str) -> str:
        return unwrapped(call(capsys, "--backend", "numpy", "--layers", "1", "--headdim", "8", *arguments))

    why = "below 1024 keys a block plans cut less"
    assert why in out("--batch", "16", "--seqlen", "512")
    assert why not in out("--batch", "16", "--seqlen", "8000")  # long shares
    assert why not in out("--batch", "1", "--seqlen", "640", "--heads", "33/33")  # even ones


def test_demo_is_the_default(capsys):
    assert "planned once, run by 1 layer\n" in call(capsys, "--batch", "1", "--seqlen", "9", "--layers", "1")


@pytest.mark.parametrize("is_built", [True, False])
def test_demo_on_the_simulator(is_built, capsys, monkeypatch):
    """To build it takes long, and nothing else is said meanwhile where there is no terminal."""
    pytest.importorskip("cuda.bindings", reason='pip install -e ".[sim]"')
    monkeypatch.setattr("cuflash.simulator.compile.machine_is_built", lambda: is_built)
    out = call(capsys, "--backend", "sim", "--batch", "2", "--seqlen", "30", "--layers", "1")
    assert "simulated on the CPU for 4 SMs" in out and "within bfloat16's rounding" in out
    assert ("the simulator is built first" in out) == (not is_built)


def test_demo_sees_wrong_results(capsys, monkeypatch):
    """It would not be worth much otherwise."""
    from cuflash.cli import demo

    attend = demo.flash_attn_with_kvcache

    def wrong(*arguments, **options):
        out, lse = attend(*arguments, **options)
        out[0, 0, 0, 0] *= 1.001
        return out, lse

    monkeypatch.setattr(demo, "flash_attn_with_kvcache", wrong)
    assert main([*DEMO, "--backend", "numpy"]) == 1
    assert re.search(r"WRONG: \d values beyond rounding", unwrapped(capsys.readouterr().out))


# ----------------------------------------------------------------------------------------------------------- schedule
def test_schedule(capsys):
    out = call(capsys, "schedule", "--seqlens", "4096,100,2048", "--heads", "32/8", "--sms", "132")
    meta = cuflash.get_scheduler_metadata(3, 1, 4096, 32, 8, 128, np.array([4096, 100, 2048]))
    assert str(meta) in out
    assert re.search(r"^ +0  4096 ", out, re.MULTILINE)
    assert f".. and {meta.array[0] - 12} more: --all" in out
    assert max(map(len, out.splitlines())) <= 80


def test_schedule_lists_all_blocks(capsys):
    out = call(capsys, "schedule", "--seqlens", "4096,100,2048", "--sms", "20", "--all", "--dtype", "float16")
    rows = re.findall(r"^ +(\d+) +(\d+) +\d+  \d+:\d+\[", out, re.MULTILINE)
    assert [int(block) for block, _ in rows] == list(range(len(rows)))
    assert sum(int(keys) for _, keys in rows) == 8 * (4096 + 100 + 2048)


def test_schedule_options(capsys):
    options = (
        *("--seqlens", "900,0,300", "--heads", "8", "--headdim", "64", "--headdim-v", "128", "--dtype", "bf16"),
        *("--seqlen-q", "3", "--page-size", "16", "--causal", "--window", "511,0", "--chunk", "256", "--arch", "80"),
    )
    out = call(capsys, "schedule", *options, "--num-splits", "2", "--sms", "7")
    assert "causal" in out and "chunks of 256" in unwrapped(out) and "(7 SMs, sm_80)" in out
    assert "[704:768]" in call(capsys, "schedule", "--seqlens", "768", "--heads", "1", "--split-size", "64", "--all")
    assert "0 used" not in call(capsys, "schedule", "--seqlens", "0,0")


def test_schedule_of_a_window_without_a_left_bound(capsys):
    """As the help shows it: what begins with a sign is no option."""
    out = call(capsys, "schedule", "--seqlens", "900,300", "--seqlen-q", "3", "--window", "-1,0")
    assert ", causal" in out and out == call(capsys, "schedule", "--seqlens", "900,300", "--seqlen-q", "3", "--causal")


def test_schedule_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason='pip install -e ".[plot]"')
    file = tmp_path / "schedule.png"
    assert f"drawn: {file}" in call(capsys, "schedule", "--seqlens", "500,40", "--plot", str(file))
    assert file.read_bytes().startswith(b"\x89PNG")


HUGE = "9" * 22
BAD = [
    (["bogus"], "argument COMMAND: invalid choice: 'bogus'"),
    (["info", "more"], "unrecognized arguments: more"),
    (["schedule"], "the following arguments are required: --seqlens"),
    (["schedule", "--seqlens", "1,x"], "argument --seqlens: invalid list of integers"),
    (["schedule", "--seqlens", ""], "argument --seqlens: invalid list of integers"),
    (["schedule", "--seqlens", "5,-1"], "argument --seqlens: must be in [0, 2147483647], got -1"),
    (["schedule", "--seqlens", HUGE], f"argument --seqlens: must be in [0, 2147483647], got {HUGE}"),
    (["schedule", "--seqlens", "5", "--heads", "8/"], "argument --heads: invalid heads"),
    (["schedule", "--seqlens", "5", "--heads", "7/2"], "num_heads_q must be a multiple of num_heads_kv=2, got 7"),
    (["schedule", "--seqlens", "5", "--headdim", "60"], "headdim must be a multiple of 8, got 60"),
    (["schedule", "--seqlens", "5", "--dtype", "int4"], "qkv_dtype"),
    (["schedule", "--seqlens", "5", "--sms", "0"], "argument --sms: must be in [1, 65536], got 0"),
    (["schedule", "--seqlens", "5", "--sms", HUGE], f"argument --sms: must be in [1, 65536], got {HUGE}"),
    (["schedule", "--seqlens", "5", "--arch", "70"], "argument --arch: must be in [80, 2147483647], got 70"),
    (["schedule", "--seqlens", "5", "--window", "1"], "window_size must be a pair"),
    (["schedule", "--seqlens", "5", "--split-size", "65"], "split_size must be a multiple of 64, got 65"),
    (["schedule", "--seqlens", "5", "--split-size", "64", "--num-splits", "2"], "split_size and num_splits"),
    (["schedule", "--seqlens", "5", "--page-size", "0"], "argument --page-size: must be in [1, 2147483647], got 0"),
    (
        ["schedule", "--seqlens", "5", "--window", f"-1,{HUGE}"],
        f"argument --window: must be in [-1, 2147483647], got {HUGE}",
    ),
    (["schedule", "--seqlens", "5", "--seqlen-q", "-1"], "argument --seqlen-q: must be in [0, 2147483647], got -1"),
    (["schedule", "--seqlens", "5", "--plot", "/nowhere/at/all.png"], "argument --plot: "),
    (["schedule", "--seqlens", "5", "--plot", "x.docx"], "argument --plot: "),
    (["schedule", "--seqlens", "5", "--plot", ""], "argument --plot: must name a file, got ''"),
    (["demo", "--batch", "0"], "argument --batch: must be in [1, 33554432], got 0"),
    (["demo", "--batch", HUGE], f"argument --batch: must be in [1, 33554432], got {HUGE}"),
    (["demo", "--seqlen", "2000000000"], "argument --seqlen: must be in [1, 134217727], got 2000000000"),
    (["demo", "--seed", "-1"], "argument --seed: must be in [0, 2147483647], got -1"),
    (["--layers", "two"], "argument --layers: invalid integer value: 'two'"),
    (["--heads", "7/2"], "num_heads_q must be a multiple of num_heads_kv=2, got 7"),
    (["--dtype", "float64"], "--dtype must be one of"),
    (["--dtype", "int8"], "--dtype must be one of float16, bfloat16, float32, got 'int8'"),
    (["--dtype", "float8_e4m3fn"], "--dtype must be one of float16, bfloat16, float32, got 'float8_e4m3fn'"),
    (["--backend", "gpu"], "argument --backend: invalid choice: 'gpu'"),
    (["--dtype", ""], "--dtype must be one of float16, bfloat16, float32, got ''"),
    (["--headdim", "0"], "argument --headdim: must be in [1, 2147483647], got 0"),
    (["--kv-dtype", "float32"], "--kv-dtype must be one of float8_e4m3fn, float8_e5m2, int8, got 'float32'"),
    (["--context-parallel", "--kv-dtype", "int8"], "--context-parallel must go without --kv-dtype, got int8"),
    (["--context-parallel", "--backend", "sim"], "--context-parallel must go with --backend numpy or cuda, got sim"),
    (["--context-parallel", "--headdim", "0"], "argument --headdim: must be in [1, 2147483647], got 0"),
    (["cache", "clean"], "argument action: invalid choice: 'clean'"),
    (["bench", "--seqlen", "0"], "argument --seqlen: must be in [1, 2147483647], got 0"),
    (["bench", "--seqlen", HUGE], f"argument --seqlen: must be in [1, 2147483647], got {HUGE}"),
    (["bench", "--seqlens", f"5,{HUGE}"], f"argument --seqlens: must be in [0, 2147483647], got {HUGE}"),
    (["bench", "--batch", HUGE], f"argument --batch: must be in [1, 33554432], got {HUGE}"),
    (["bench", "--seqlens", "4,5", "--batch", "3"], "--batch must be the 2 of --seqlens or left out, got 3"),
    (["bench", "--seqlens", "4,0"], "lengths must be at least --queries 1, got 0"),
    (["bench", "--seqlen", "5", "--trace", "x"], "not allowed with argument"),
    (["bench", "--trace", "/nowhere/at/all"], "--trace must name a text file"),
    (["bench", "--trace", ""], "--trace must name a text file"),
    (["bench", "--headdim", "576"], "error: headdim must be at most 512 unless values are shorter than keys, got 576"),
    (["bench", "--heads", "7/2"], "num_heads_q must be a multiple of num_heads_kv=2, got 7"),
    (["bench", "--dtype", "int4"], "--dtype must be one of"),
    (["bench", "--kv-dtype", "int4"], "argument --kv-dtype: invalid choice: 'int4'"),
    (["bench", "--peers", "FA4"], "argument --peers: invalid choice: 'FA4'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_arguments(capsys, arguments, message):
    """As argparse says it, with code 2, no traceback and nothing on stdout."""
    if "--plot" in arguments:
        pytest.importorskip("matplotlib", reason='pip install -e ".[plot]"')
    assert message in fail(capsys, *arguments)


def test_bad_environment(capsys, monkeypatch):
    monkeypatch.setenv("CUFLASH_BACKEND", "gpu")
    assert "CUFLASH_BACKEND must be one of" in fail(capsys, *DEMO)
    monkeypatch.setenv("CUFLASH_BACKEND", "auto")
    monkeypatch.setenv("CUFLASH_NUM_SM", "many")
    assert "CUFLASH_NUM_SM must be an integer, got 'many'" in fail(capsys, *DEMO)
    monkeypatch.setenv("CUFLASH_NUM_SM", HUGE)
    assert f"CUFLASH_NUM_SM must be in [1, 65536], got {HUGE}" in fail(capsys, *DEMO)


def test_too_little_memory(capsys, monkeypatch):
    """What NumPy says, and no traceback."""

    def refuse(*arguments, **options):
        raise MemoryError("Unable to allocate 64.0 GiB")

    monkeypatch.setattr(schedule_command, "get_scheduler_metadata", refuse)
    assert main(["schedule", "--seqlens", "5"]) == 1
    assert capsys.readouterr().err == "error: Unable to allocate 64.0 GiB\n"


def test_no_gpu(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "backend cuda needs a GPU and CuPy: CuPy is not installed" in fail(capsys, *DEMO, "--backend", "cuda")
    assert "NumPy on " in call(capsys, *DEMO)


# --------------------------------------------------------------------------------------------------------------- info
def test_info(capsys):
    out = call(capsys, "info")
    for title in ("Installed", "Found", "Cached", "Used", "Environment"):
        assert f"{title}\n" in out
    assert re.search(rf"^  ok cuflash +{re.escape(cuflash.__version__)}", out, re.MULTILINE)
    assert re.search(rf"^  ok NumPy +{re.escape(np.__version__)}", out, re.MULTILINE)


def test_info_says_how_to_get_what_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(driver, "version", lambda: None)
    out = call(capsys, "info")
    assert re.search(
        r'  -  CuPy +not installed\n +-> pip install "cupy-cuda13x>=14.2,<15"\s+"nvidia-cuda-nvrtc>=13', out
    )
    monkeypatch.setattr(driver, "version", lambda: 12040)
    assert '"cupy-cuda12x>=14.2,<15"' in call(capsys, "info")


def test_info_survives_what_is_broken(capsys, monkeypatch):
    """A fact that raises becomes a row with the error's text."""

    class Broken:
        __version__ = "99.0"

        def __getattr__(self, name: str) -> object:
            raise OSError(f"libcuda.so.1: {name} is broken")

    monkeypatch.setitem(sys.modules, "cupy", Broken())
    monkeypatch.setenv("CUFLASH_BACKEND", "nonsense")
    monkeypatch.setenv("CUFLASH_NUM_SM", "-4")
    monkeypatch.setattr(driver, "load", lambda: 1 / 0)
    out = call(capsys, "info")
    assert "!! driver" in out and "division by zero" in out
    assert "!! CUFLASH_NUM_SM CUFLASH_NUM_SM must be a positive integer of at most 65536, got '-4'" in unwrapped(out)
    assert "!! CUFLASH_BACKEND" in out and "nonsense" in out


def test_info_says_what_gpus_there_are(capsys, monkeypatch):
    gpus = [driver.Gpu("NVIDIA H200", 90, 132, 150_000_000_000), driver.Gpu("Tesla V100", 70, 80, 1 << 34)]
    monkeypatch.setattr(driver, "gpus", lambda: iter(gpus))
    out = call(capsys, "info")
    assert "ok GPU 0             NVIDIA H200, compute capability 9.0, 132 SMs, 150 GB" in out.replace(
        "\n" + " " * 22, ""
    )
    assert "!! GPU 1" in out and "8.0 or higher" in out


def test_advice_follows_the_installed_cupy(monkeypatch):
    """Not the driver; and a piece that is missing is advised alone."""

    def has(name: str) -> None:
        monkeypatch.setattr(packages, "_is_installed", lambda distribution: distribution == name)

    monkeypatch.setattr(driver, "version", lambda: 13000)
    has("cupy-cuda12x")
    assert packages.cuda() == packages.CUDA[12]

    class Nvrtc:
        @staticmethod
        def getVersion():
            raise RuntimeError("libnvrtc.so.12 not found")

    monkeypatch.setitem(sys.modules, "cupy", type(sys)("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", type("Cuda", (), {"nvrtc": Nvrtc}))
    assert info_command._nvrtc() == ("!!", "libnvrtc.so.12 not found", 'pip install "nvidia-cuda-nvrtc-cu12>=12.8,<13"')
    has("cupy-cuda13x")
    assert info_command._nvrtc().remedy == 'pip install "nvidia-cuda-nvrtc>=13,<14"'
    has("nothing")
    assert packages.cuda() == packages.CUDA[13]
    monkeypatch.setattr(driver, "version", lambda: 12080)
    assert packages.cuda() == packages.CUDA[12]


def test_advice_is_what_the_extras_are():
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for major, requirements in packages.CUDA.items():
        assert list(requirements) == extras[f"cuda{major}"]
    assert {*packages.SIMULATOR, packages.MATPLOTLIB} <= {*extras["sim"], *extras["plot"]}
    assert {*packages.MPI, packages.NCCL} <= {*extras["mpi"], *extras["nccl"], *extras["test"]}


def test_the_simulator_advises_what_info_advises(monkeypatch):
    for module in ("cuda", "cuda.bindings", "cupy", "cupy.cuda"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(simulator.CompilerNotFound, match=re.escape(packages.install(*packages.SIMULATOR))):
        simulator.compile._nvrtc()


def test_no_message_advises_extras():
    """``pip install "cuflash[cuda13]"`` works for nobody until there is an index that has it."""
    for path in (ROOT / "cuflash").rglob("*.py"):
        assert "install cuflash" not in path.read_text() and "cuflash[" not in path.read_text(), path


@pytest.mark.parametrize(
    ("name", "wrong", "right", "must"),
    [
        ("CUFLASH_BACKEND", "gpu", "numpy", "one of auto, cuda, numpy, sim"),
        ("CUFLASH_NUM_SM", "many", "84", "a positive integer"),
        ("CUFLASH_NUM_SM", "65537", "65536", "a positive integer of at most 65536"),
        ("CUFLASH_ARCH", "70", "120", "an integer from 80 on"),
        ("CUFLASH_VALIDATE", "yes", "1", "0 or 1"),
        ("CUFLASH_CACHE_DIR", __file__, str(Path(__file__).parent), "a folder that can be written to"),
    ],
)
def test_info_checks_its_variables(name, wrong, right, must, monkeypatch):
    monkeypatch.setenv(name, wrong)
    row = info_command._variable(name)
    assert row.state == "!!" and f"{name} must be {must}" in row.text and repr(wrong) in row.text
    monkeypatch.setenv(name, right)
    assert info_command._variable(name) == ("ok", right, "")


@pytest.mark.parametrize("name", ["CUFLASH_CACHE_DIR", "CUFLASH_LOG"])
def test_info_knows_the_home(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(name, "~/here")
    assert info_command._variable(name).state == "ok"
    monkeypatch.setenv("HOME", __file__)  # nothing can be written below a file
    assert info_command._variable(name).state == "!!"


def test_info_knows_every_variable(capsys, monkeypatch):
    named = {
        name for path in (ROOT / "cuflash").rglob("*.py") for name in re.findall(r"CUFLASH_[A-Z_]+\b", path.read_text())
    }
    assert {name for name in named if name != "CUFLASH_"} == set(info_command._VARIABLES)
    monkeypatch.setenv("CUFLASH_BAKEND", "cuda")
    assert "!! CUFLASH_BAKEND    cuda: there is no such variable" in call(capsys, "info")


def test_info_lists_optional_tools(capsys):
    out = call(capsys, "info")
    for name in ("matplotlib", "C++ compiler", "cuda-bindings", "FlashInfer", "FA3", "nvdisasm", "ncu"):
        assert re.search(rf"^  (ok|- |!!) {re.escape(name)}\b", out, re.MULTILINE) or name == "C++ compiler", name


# -------------------------------------------------------------------------------------------------------------- cache
OURS = ("ptx-" + "0" * 32 + ".ptx", "machine-" + "a1" * 16 + ".so", ".decode-" + "f" * 32 + ".cubin.17.0123abcd")
NOT_OURS = (".ptx", "notes.txt", "ptx-short.ptx", "my-" + "0" * 32 + ".py", OURS[0] + ".txt", "thesis.ptx")


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A cache folder in which other things lie too."""
    folder = tmp_path / "cache"
    (folder / "folder").mkdir(parents=True)
    (folder / "folder" / OURS[0]).write_bytes(b"not at its place")
    for name in (*OURS, *NOT_OURS):
        (folder / name).write_bytes(b"x" * 1000)
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(folder))
    return folder


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_cache(capsys, kernels):
    out = call(capsys, "cache")
    assert "3 files, 3 kB" in out and "python -m cuflash cache clear" in unwrapped(out)
    assert "3 files, 3 kB, this library's" in unwrapped(call(capsys, "info"))
    assert left(kernels) == {*OURS, *NOT_OURS, "folder"}


def test_cache_clear_deletes_the_library_s_files_alone(capsys, kernels):
    assert "deleted 3 files, 3 kB" in call(capsys, "cache", "clear", "--yes")
    assert left(kernels) == {*NOT_OURS, "folder"} and left(kernels / "folder") == {OURS[0]}
    assert "nothing to delete" in call(capsys, "cache", "clear")


@pytest.mark.parametrize(("answer", "deletes"), [("y\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_cache_clear_asks(answer, deletes, capsys, kernels, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    assert main(["cache", "clear"]) == int(not deletes)
    assert "Delete 3 files, 3 kB in " in capsys.readouterr().out
    assert (left(kernels) == {*NOT_OURS, "folder"}) is deletes


def test_cache_without_a_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "none"))
    assert "0 files, 0 B" in call(capsys, "cache")
    assert "nothing to delete" in call(capsys, "cache", "clear", "--yes")
    assert not (tmp_path / "none").exists()


def test_simulator_and_library_have_one_cache_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/at/home")
    for named in ("", "/some/where", "~/kernels", "here"):
        monkeypatch.setenv("CUFLASH_CACHE_DIR", named)
        assert cache.folder() == simulator.cache_dir()
        assert cache.folder().is_absolute() and "~" not in str(cache.folder())


@pytest.mark.parametrize("action", ["unlink", "iterdir"])
def test_cache_that_may_not_be_touched(action, capsys, kernels, monkeypatch):
    """What the system says, and no traceback."""

    def refused(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, action, refused)
    assert main(["cache", "clear", "--yes"]) == 1
    assert f"error: [Errno 13] Permission denied: '{kernels}" in unwrapped(capsys.readouterr().err)


def test_cache_without_a_home(capsys, monkeypatch):
    monkeypatch.setattr(simulator.cache, "folder", lambda: None)
    assert main(["cache"]) == 1
    assert "set CUFLASH_CACHE_DIR" in unwrapped(capsys.readouterr().err)


def test_cache_of_cupy_that_cannot_be_read(capsys, kernels, tmp_path, monkeypatch):
    (tmp_path / "of cupy").write_text("a file, where a folder should be")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "of cupy" / "kernels"))
    assert "CuPy     0 files" in call(capsys, "cache")


# -------------------------------------------------------------------------------------------------------------- bench
needs_no_gpu = pytest.mark.skipif(HAS_GPU, reason="there is a GPU")


@needs_no_gpu
def test_bench_without_cupy(capsys, monkeypatch):
    """What to install, no traceback, and the figures of ``schedule``."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    out = call(capsys, "bench", "--seqlens", "4096,100,2048")
    assert out.startswith("No times: no GPU found: CuPy cannot be imported") or out.startswith(
        "No times: no GPU found: CuPy is"
    )
    meta = cuflash.get_scheduler_metadata(3, 1, 4096, 32, 8, 128, np.array([4096, 100, 2048]), page_size=16)
    assert str(meta) in out and "balance" in out
    assert max(map(len, out.splitlines())) <= 80


@needs_no_gpu
def test_bench_says_what_to_install(capsys, monkeypatch):
    def missing() -> None:
        raise RuntimeError("no GPU found: CuPy is not installed")

    monkeypatch.setattr(bench_command, "require_gpu", missing)
    monkeypatch.setattr(driver, "version", lambda: None)
    lines = call(capsys, "bench", "--batch", "1").splitlines()
    assert lines[0] == "No times: no GPU found: CuPy is not installed."
    assert lines[1].startswith('-> pip install "cupy-cuda13x>=14.2,<15"')


@needs_no_gpu
def test_bench_of_a_trace(capsys, tmp_path):
    trace = tmp_path / "chat.csv"
    trace.write_text("arrived,length\n" + "".join(f"{t},{100 + t}\n" for t in range(100)))
    assert main(["bench", "--trace", str(trace), "--batch", "40", "--steps", "2", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["workload"].split(" keys")[0] for record in records] == [
        "chat.csv from 0, 40 x 100 to 139",
        "chat.csv from 40, 40 x 140 to 179",
    ]
    assert records[0]["kv_mb"] == sum(range(100, 140)) * 8 * 2 * 128 * 2 / 1e6
    for record in records:
        assert 0 < record["efficiency"] <= record["balance"] <= 1
        assert record["efficiency"] * record["num_blocks"] == pytest.approx(record["balance"] * record["blocks"])


@pytest.mark.parametrize("number", ["2147483648", HUGE, "9" * 5000])
def test_bench_of_a_trace_of_other_numbers(number, capsys, tmp_path):
    (tmp_path / "trace").write_text(f"5\n{number}\n7\n")
    message = f"--trace must name a file of lengths below 2**31, got {number}"
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--trace", str(tmp_path / "trace")])
    assert message in unwrapped(capsys.readouterr().err)


def test_bench_prints_times(capsys, monkeypatch):
    """A table for people: figures, what refused, what failed, what is not installed."""
    figures = {"floor_us": 100.0, "bound": "bytes", "read_us": 103.0, "given_us": 106.04, "unplanned_us": 110.0,
               "blocks": 264, "efficiency": 0.98, "balance": 0.99}  # fmt: skip
    found = {"cuDNN": 108.0, "FA2": "equal lengths only", "FA3": "not installed", "XQA": "wrong: relative error 1"}
    shape = peers.base.Shape("32 x 4096 keys", np.full(32, 4096), 32, 8)
    bench_command.print_times(shape, {**figures, "peers": found})
    bench_command._print_notes([{**figures, "peers": found}])
    out = capsys.readouterr().out
    for line in (
        "32 x 4096 keys; 537 MB of keys and values",
        "  floor              100.0 us   1.00 x  bytes / bandwidth",
        "  cuflash            106.0 us   1.06 x  on a plan: 264 blocks, efficiency 98.0%,",
        "  cuDNN              108.0 us   1.08 x",
        "  FA2                       -        -  equal lengths only",
        "  XQA                       -        -  wrong: relative error 1",
        "  FA3      pip install fa3-fwd",
    ):
        assert line in out.splitlines(), line
    assert max(map(len, out.splitlines())) <= 80
    bench_command.print_times(shape, {"error": "OutOfMemoryError: too much"})
    assert "  OutOfMemoryError: too much" in capsys.readouterr().out.splitlines()


# ---------------------------------------------------------------------------------------------------------- terminals
@pytest.mark.parametrize("columns", [60, 100])
@pytest.mark.parametrize(
    "arguments",
    [DEMO, ["info"], ["schedule", "--seqlens", "4096,100,2048,7,7,7", "--all"], ["bench"], ["cache"]],
    ids=str,
)
def test_lines_fit_the_terminal(columns, arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for line in call(capsys, *arguments).splitlines():
        assert len(line) <= columns or len(line.split()[-1]) > columns - 30, line  # a path is not broken


@pytest.mark.parametrize("arguments", [DEMO, ["schedule", "--seqlens", "40,7"]], ids=str)
def test_terminals_narrower_than_a_name(arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2")
    assert "efficiency" in call(capsys, *arguments)


def run(command: str, **options) -> subprocess.CompletedProcess[str]:
    """Run a shell's command in which ``cuflash`` is this one."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cuflash.__file__).parents[1])}
    function = f'cuflash() {{ "{sys.executable}" -m cuflash "$@"; }}; set -o pipefail; '
    return subprocess.run(
        ["bash", "-c", function + command], capture_output=True, text=True, timeout=120, env=environment, check=False
    )


@pytest.mark.skipif(os.name == "nt", reason="needs bash")
@pytest.mark.parametrize(
    "arguments", ["schedule --seqlens 4096,100", "demo --batch 2 --seqlen 9", "info", "bench --json"]
)
def test_closed_stdout(arguments):
    done = run(f"cuflash {arguments} >&-")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(os.name == "nt", reason="needs bash")
@pytest.mark.parametrize(("count", "reader"), [(5000, "head -n 1"), (1, "true")])
def test_reader_that_leaves(count, reader):
    """In the middle, or before the first line."""
    done = run(f"cuflash schedule --seqlens {','.join(['100'] * count)} --all | {reader}")
    assert done.returncode == 1 and done.stderr == ""


def test_console_script(capsys, monkeypatch):
    tomllib = pytest.importorskip("tomllib")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["cuflash"].partition(":")
    assert getattr(sys.modules[module], name) is main
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/cuflash", "schedule"])
    with pytest.raises(SystemExit):
        main()
    assert "usage: cuflash schedule --seqlens N,N,.. [options]" in capsys.readouterr().err.splitlines()


# --------------------------------------------------------------------------------------------------------------- text
def test_bars():
    assert bars([0, 1, 4, 8], 10) == " ▁▄█"
    assert bars([8, 8, 0, 0], 2) == "█ "
    assert bars([8, 8, 0, 0], 0) == bars([8, 8, 0, 0], -5) == "▄"
    assert bars([], 10) == bars([0, 0], 10) == ""


def test_table():
    assert table(("n", "name"), [(1, "one"), (10, "ten")]) == "   n  name\n   1  one\n  10  ten"
    assert table(("n", "name"), []) == "  n  name"


def test_units():
    assert [size(n) for n in (0, 999, 1500, 2_340_000, 99_000_000_000)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.34 MB",
        "99 GB",
    ]
    assert [seconds(t) for t in (1.2e-6, 0.0123, 2.5)] == ["1.2 us", "12.3 ms", "2.5 s"]


def test_wrapped(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert wrapped("  a  ", "one two three four five") == ["  a  one two three", "     four five"]
    assert wrapped("  a  ", "b   c") == ["  a  b   c"]
    assert wrapped("  a  ", "") == []
