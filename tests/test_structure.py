"""The shape of the code: nothing looks back, files stay small, every parameter is somebody's."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import cuflash
from cuflash import memo

ROOT = Path(__file__).parents[1]
TREES = {"cuflash": ROOT / "cuflash", "bench": ROOT / "tests/bench"}
MOST_LINES = {"*.py": 430, "*.cu": 320}  # of a core module and of a kernel


def test_no_two_modules_import_each_other() -> None:
    """Nor three in a circle, imports for types and inside functions included."""
    edges: dict[str, set[str]] = {}
    for top, folder in TREES.items():
        for path in folder.rglob("*.py"):
            inside = path.relative_to(folder).with_suffix("").parts
            name = ".".join([top, *(part for part in inside if part != "__init__")])
            package = name if path.stem == "__init__" else name.rpartition(".")[0]
            edges[name] = imported(ast.parse(path.read_text()), package)
    # A module may name its own package's contents: what counts is which modules those are.
    edges = {name: {module for module in found if module in edges} - {name} for name, found in edges.items()}
    assert edges["cuflash.attention"] >= {"cuflash.arguments", "cuflash.backends", "cuflash.memo"}
    # The public package imports everything; who takes public names from it (the command line) is above it.
    edges["cuflash"] = set()
    while leaves := [name for name, found in edges.items() if not found]:
        for leaf in leaves:
            del edges[leaf]
        edges = {name: found - set(leaves) for name, found in edges.items()}
    assert not edges, f"these import each other: {edges}"


def imported(tree: ast.AST, package: str) -> set[str]:
    """Return the modules that a module of a package names in its imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= names | {module} if node.module else names  # a package's own names would be a circle for all in it
    return found


@pytest.mark.parametrize("pattern", MOST_LINES)
def test_files_are_small(pattern: str) -> None:
    folder = ROOT / ("cuflash" if pattern == "*.py" else "kernels_cu")
    for path in folder.rglob(pattern):
        if "simulator" not in path.parts:
            assert len(path.read_text().splitlines()) <= MOST_LINES[pattern], path.name


def test_the_table_of_headers_has_all_of_them() -> None:
    """Each once: those of ``ptx/`` are one line."""
    page = (ROOT / "kernels_cu/README.md").read_text()
    table = page[page.index("| header |") :].split("\n\n")[0]
    named = re.findall(r"`(\w+\.cuh)`", "".join(line.split("|")[1] for line in table.splitlines()))
    assert sorted(named) == sorted(path.name for path in (ROOT / "kernels_cu/include").glob("*.cuh"))


def key(function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a call is told apart by."""
    found = memo.spell(function, args, kwargs)[0]
    assert found is not None
    return tuple(found)


@pytest.mark.parametrize(
    "function",
    [cuflash.flash_attn_with_kvcache, cuflash.get_scheduler_metadata],
    ids=lambda function: function.__name__,
)
def test_every_argument_is_part_of_a_remembered_call(function: Any) -> None:
    """Another value, an equal one of another type, none at all: a key that is not told apart is another call's."""
    parameters = inspect.signature(function).parameters
    given = {name: None if p.default is p.empty else p.default for name, p in parameters.items()}
    calls = [((), given), (tuple(given.values()), {}), ((), {})]
    for name in given:
        others = ("another", 1, True, 1.0, 2, (1, 1), (True, 1), (1, 2), (1, (1,)), ((1, 1),))
        calls += [((), given | {name: x}) for x in others if (type(x), x) != (type(given[name]), given[name])]
        calls += [((), {name: 1}), ((1,), {name: 1}), ((), {other: x for other, x in given.items() if other != name})]
    first, second, *_ = given
    calls += [((), {first: (1,), second: (2, 3)}), ((), {first: (1, 2), second: (3,)})]
    keys = [key(function.__name__, *call) for call in calls]
    assert len(set(keys)) == len(calls)
    assert keys == [key(function.__name__, *call) for call in calls]
    assert key("print", (), given) != keys[0]
