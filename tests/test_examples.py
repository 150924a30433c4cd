"""The example programs run, where what they import is installed. Each checks its own results."""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAMS = sorted((Path(__file__).parent / "examples").glob("*.py"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of torch's spin while they wait for each other, and tests run on all cores as it is."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch is not None else 0
    if torch is not None:
        torch.set_num_threads(1)
    yield
    if torch is not None:
        torch.set_num_threads(threads)


@pytest.fixture
def program(request: pytest.FixtureRequest) -> Path:
    tree = ast.parse(request.param.read_text())
    for node in tree.body:  # what a program cannot do without
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            pytest.importorskip(name)
    return Path(request.param)


@pytest.mark.parametrize("program", PROGRAMS, ids=[path.stem for path in PROGRAMS], indirect=True)
def test_program(program: Path, one_thread: None, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(program), run_name="__main__")
    assert capsys.readouterr().out
