"""The command line, as a person sees it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cuflash
from cuflash.cli import info as info_command
from cuflash.cli import main
from cuflash.cli.text import bars, seconds, size, table

DEMO = ["demo", "--batch", "3", "--seqlen", "40", "--layers", "2"]


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """A terminal of 80 columns, without settings."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("CUFLASH_BACKEND", "CUFLASH_NUM_SM", "CUFLASH_ARCH"):
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
    assert captured.err.startswith("usage: python -m cuflash")
    return captured.err.splitlines()[-1]


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


# --------------------------------------------------------------------------------------------------------------- demo
def test_demo(capsys):
    out = call(capsys, *DEMO, "--backend", "numpy")
    assert "planned once, run by 2 layers" in out
    for name in ("backend", "sequences", "efficiency", "shares", "error", "one plan", "no plan"):
        assert re.search(rf"^  {name} ", out, re.MULTILINE), name
    assert "within float32's rounding" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_demo_options(capsys, dtype):
    options = ("--heads", "6/3", "--headdim", "40", "--page-size", "7", "--dtype", dtype, "--seed", "3")
    out = call(capsys, *DEMO, *options, "--backend", "numpy")
    assert f"6 query, 3 KV, dim 40, {dtype}" in out and f"within {dtype}'s rounding" in out


def test_demo_is_the_default(capsys):
    assert "planned once, run by 1 layer\n" in call(capsys, "--batch", "1", "--seqlen", "9", "--layers", "1")


def test_demo_on_the_simulator(capsys):
    pytest.importorskip("cuda.bindings", reason='pip install "cuflash[sim]"')
    out = call(capsys, "--backend", "sim", "--batch", "2", "--seqlen", "30", "--layers", "1")
    assert "simulated on the CPU for 4 SMs" in out and "within bfloat16's rounding" in out


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
    assert re.search(r"WRONG: \d values beyond rounding", capsys.readouterr().out)


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
    assert "causal" in out and "chunks of 256" in out and "(7 SMs, sm_80)" in out
    assert "[704:768]" in call(capsys, "schedule", "--seqlens", "768", "--heads", "1", "--split-size", "64", "--all")
    assert "0 used" not in call(capsys, "schedule", "--seqlens", "0,0")


def test_schedule_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason='pip install "cuflash[plot]"')
    file = tmp_path / "schedule.png"
    assert f"drawn: {file}" in call(capsys, "schedule", "--seqlens", "500,40", "--plot", str(file))
    assert file.read_bytes().startswith(b"\x89PNG")


BAD = [
    (["bogus"], "argument COMMAND: invalid choice: 'bogus'"),
    (["info", "more"], "unrecognized arguments: more"),
    (["schedule"], "the following arguments are required: --seqlens"),
    (["schedule", "--seqlens", "1,x"], "argument --seqlens: invalid list of integers"),
    (["schedule", "--seqlens", ""], "argument --seqlens: invalid list of integers"),
    (["schedule", "--seqlens", "5,-1"], "cache_seqlens must be at least 0, got -1 at [1]"),
    (["schedule", "--seqlens", "99999999999"], "max_seqlen_k"),
    (["schedule", "--seqlens", "5", "--heads", "8/"], "argument --heads: invalid heads"),
    (["schedule", "--seqlens", "5", "--heads", "7/2"], "num_heads_q must be a multiple of num_heads_kv=2, got 7"),
    (["schedule", "--seqlens", "5", "--headdim", "60"], "headdim must be a multiple of 8, got 60"),
    (["schedule", "--seqlens", "5", "--dtype", "int4"], "qkv_dtype"),
    (["schedule", "--seqlens", "5", "--sms", "0"], "argument --sms: invalid positive integer"),
    (["schedule", "--seqlens", "5", "--arch", "70"], "compute capability must be at least 8.0"),
    (["schedule", "--seqlens", "5", "--window", "1"], "window_size must be a pair"),
    (["schedule", "--seqlens", "5", "--split-size", "65"], "split_size must be a multiple of 64, got 65"),
    (["schedule", "--seqlens", "5", "--split-size", "64", "--num-splits", "2"], "split_size and num_splits"),
    (["schedule", "--seqlens", "5", "--page-size", "0"], "page_size must be at least 1, got 0"),
    (["schedule", "--seqlens", "5", "--plot", "/nowhere/at/all.png"], "argument --plot: "),
    (["schedule", "--seqlens", "5", "--plot", "x.docx"], "argument --plot: "),
    (["demo", "--batch", "0"], "argument --batch: invalid positive integer"),
    (["--layers", "two"], "argument --layers: invalid positive integer"),
    (["--heads", "7/2"], "num_heads_q must be a multiple of num_heads_kv=2, got 7"),
    (["--dtype", "float64"], "--dtype must be one of"),
    (["--dtype", "int8"], "qkv_dtype"),
    (["--backend", "gpu"], "argument --backend: invalid choice: 'gpu'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_arguments(capsys, arguments, message):
    """As argparse says it, with code 2, no traceback and nothing on stdout."""
    if "--plot" in arguments:
        pytest.importorskip("matplotlib", reason='pip install "cuflash[plot]"')
    assert message in fail(capsys, *arguments)


def test_bad_environment(capsys, monkeypatch):
    monkeypatch.setenv("CUFLASH_BACKEND", "gpu")
    assert "CUFLASH_BACKEND must be one of" in fail(capsys, *DEMO)
    monkeypatch.setenv("CUFLASH_BACKEND", "auto")
    monkeypatch.setenv("CUFLASH_NUM_SM", "many")
    assert "CUFLASH_NUM_SM must be a positive integer, got 'many'" in fail(capsys, *DEMO)


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
    monkeypatch.setattr(info_command, "_driver_version", lambda: None)
    out = call(capsys, "info")
    assert re.search(r'  -  CuPy +not installed\n +-> pip install "cuflash\[cuda13\]"', out)
    monkeypatch.setattr(info_command, "_driver_version", lambda: 12040)
    assert 'pip install "cuflash[cuda12]"' in call(capsys, "info")


def test_info_survives_what_is_broken(capsys, monkeypatch):
    """A fact that raises becomes a row with the error's text."""

    class Broken:
        __version__ = "99.0"

        def __getattr__(self, name: str) -> object:
            raise OSError(f"libcuda.so.1: {name} is broken")

    monkeypatch.setitem(sys.modules, "cupy", Broken())
    monkeypatch.setenv("CUFLASH_BACKEND", "nonsense")
    monkeypatch.setenv("CUFLASH_NUM_SM", "-4")
    monkeypatch.setattr(info_command, "_driver", lambda: 1 / 0)
    out = call(capsys, "info")
    assert "!! driver" in out and "division by zero" in out
    assert "CUFLASH_NUM_SM must be a positive integer" in out
    assert "nonsense" in out


def test_info_says_what_gpus_there_are(capsys, monkeypatch):
    gpus = [info_command.Gpu("NVIDIA H200", 90, 132, 150_000_000_000), info_command.Gpu("Tesla V100", 70, 80, 1 << 34)]
    monkeypatch.setattr(info_command, "_gpus", lambda: iter(gpus))
    out = call(capsys, "info")
    assert "ok GPU 0             NVIDIA H200, compute capability 9.0, 132 SMs, 150 GB" in out.replace(
        "\n" + " " * 22, ""
    )
    assert "!! GPU 1" in out and "8.0 or higher" in out


# --------------------------------------------------------------------------------------------------------------- text
def test_bars():
    assert bars([0, 1, 4, 8], 10) == " ▁▄█"
    assert bars([8, 8, 0, 0], 2) == "█ "
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
