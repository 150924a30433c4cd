"""What the README says runs; its two set-up commands are run by ``.ci/run``."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from cuflash.cli import main

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]


def test_blocks_have_a_language_that_is_tested():
    assert {language for language, _ in BLOCKS} == {"python", "bash"}
    setup = [command for command in COMMANDS if command.startswith("python3 -m venv .venv && ")]
    assert len(setup) == 2
    others = set(COMMANDS) - set(setup)
    assert others and all(command.startswith("python -m cuflash") for command in others)


def test_python_blocks():
    """Those that need no GPU, one after the other in one namespace; ``print`` shows what a comment behind it says."""
    names: dict[str, Any] = {}
    blocks = [text for text in PYTHON if "import cupy\n" not in text]
    if any("cuflash.simulator" in text for text in blocks):
        pytest.importorskip("cuda.bindings", reason='pip install "cuflash[sim]"')
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for text in blocks:
            exec(compile(text, "README.md", "exec"), names)
    assert "efficiency" in printed.getvalue()
    for comment in ("scheduler_metadata was made for page_size=16, but this call has page_size=None", "[0. 2. 4.] []"):
        assert f"# {comment}\n" in "".join(blocks)
        assert comment in printed.getvalue()


@pytest.mark.gpu
@pytest.mark.parametrize("block", [text for text in PYTHON if "import cupy\n" in text])
def test_gpu_blocks(block):
    exec(compile(block, "README.md", "exec"), {"cuflash": __import__("cuflash")})


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python -m cuflash")])
def test_commands(command, capsys, monkeypatch, tmp_path):
    if "--plot" in command:
        pytest.importorskip("matplotlib", reason='pip install "cuflash[plot]"')
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command, comments=True)[3:]
    try:
        assert main(arguments) == 0
    except SystemExit as done:
        assert done.code == 0  # --help
    assert capsys.readouterr().out
    for picture in re.findall(r"\S+\.png", command):
        assert (tmp_path / picture).exists() and (ROOT / picture).exists()


def test_links():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"`((?:cuflash|kernels_cu|tests|notebooks|\.ci)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
