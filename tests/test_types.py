"""What a type checker says of calls: right ones pass, each wrong one is an error on its line."""

from __future__ import annotations

import inspect
import re
import sys
import typing
from pathlib import Path

import pytest

import cuflash

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[int, str]]:
    """What mypy says of both files: by file and line the kind of the error."""
    mypy = pytest.importorskip("mypy.api", reason='pip install -e ".[lint]"')
    files = [str(HERE / "typed_calls" / name) for name in ("right_calls.py", "wrong_calls.py")]
    options = ["--config-file", str(HERE.parent / "pyproject.toml"), "--no-error-summary", "--hide-error-context"]
    said, crash, _ = mypy.run([*options, *files])
    assert not crash, crash
    found: dict[str, dict[int, str]] = {Path(file).name: {} for file in files}
    for file, line, kind in re.findall(r"(\w+\.py):(\d+): error: .*\[([\w-]+)\]$", said, re.MULTILINE):
        found[file][int(line)] = kind
    return found


def test_right_calls(errors: dict[str, dict[int, str]]) -> None:
    assert not errors["right_calls.py"]


def test_wrong_calls(errors: dict[str, dict[int, str]]) -> None:
    lines = (HERE / "typed_calls" / "wrong_calls.py").read_text().splitlines()
    marked = {n: m[1] for n, line in enumerate(lines, 1) if (m := re.search(r"# error: ([\w-]+)$", line))}
    assert len(marked) > 20
    assert errors["wrong_calls.py"] == marked


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads is new in Python 3.11")
def test_overloads_are_those_of_the_function() -> None:
    """Names, order, defaults and annotations, but for what makes the difference."""
    function = inspect.unwrap(cuflash.flash_attn_with_kvcache)
    mine = inspect.signature(function).parameters
    overloads = typing.get_overloads(function)
    assert len(overloads) == 3
    for overload in overloads:
        theirs = inspect.signature(overload).parameters
        assert {name: p.default for name, p in theirs.items() if name != "return_softmax_lse"} == {
            name: p.default for name, p in mine.items() if name != "return_softmax_lse"
        }
        assert [name for name in theirs if name != "return_softmax_lse"] == [
            name for name in mine if name != "return_softmax_lse"
        ]
        for name, parameter in mine.items():
            if name not in ("q", "return_softmax_lse"):
                assert theirs[name].annotation == parameter.annotation, name
