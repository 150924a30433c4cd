"""What the README and the pages beside it say runs; the README's two set-up commands are run by ``.ci/run``."""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from bench import chart

import cuflash
from cuflash.cli import main

ROOT = Path(__file__).parents[1]
# What a clone has beside the README; a package of the sources has them too.
PAGES = [
    "README.md", "notebooks/semantics.md", "notebooks/how_it_works.md", "notebooks/coming_from.md",
    "cuflash/context_parallel/README.md",
]  # fmt: skip
NOTEBOOKS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "notebooks").glob("*.ipynb"))
LINKING = [*PAGES, *NOTEBOOKS, "notebooks/api.md", "BENCHMARKS.md", "CHANGELOG.md", "kernels_cu/README.md"]


def text_of(page: str) -> str:
    """What a reader sees of a page, or of what a notebook says between its cells."""
    text = (ROOT / page).read_text()
    if not page.endswith(".ipynb"):
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def blocks_of(page: str, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert {name for name, _ in blocks} <= {"", "python", "bash", "diff"}  # without a name: not to be run
    return [text for name, text in blocks if name == language]


COMMANDS = [
    line
    for text in blocks_of("README.md", "bash")
    for line in text.replace("\\\n", "").splitlines()
    if not line.startswith("# ")
]
GPU_BLOCKS = [text for page in PAGES for text in blocks_of(page, "python") if "import cupy\n" in text]


def test_commands_are_tested():
    setup = [command for command in COMMANDS if command.startswith("python3 -m venv .venv && ")]
    assert len(setup) == 2
    others = set(COMMANDS) - set(setup)
    assert others and all(command.startswith("python -m cuflash") for command in others)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks(page):
    """Those that need no GPU, one after the other in one namespace; ``print`` shows what a comment behind it says."""
    names: dict[str, Any] = {}
    blocks = [text for text in blocks_of(page, "python") if "import cupy\n" not in text]
    if any("cuflash.simulator" in text for text in blocks):
        pytest.importorskip("cuda.bindings", reason='pip install -e ".[sim]"')
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for text in blocks:
            exec(compile(text, page, "exec"), names)
    for comment in re.findall(r"^ *print\(.*\)  # (.*)", "".join(blocks), re.MULTILINE):
        if ";" not in comment:  # a list of what is shown
            assert comment.split(": ")[0] in printed.getvalue()


def test_the_call_of_flashattention():
    """The new side of the README's comparison runs on the arrays of the first example."""
    (diff,) = blocks_of("README.md", "diff")
    new = "".join(line[1:] for line in diff.splitlines(keepends=True) if not line.startswith("-"))
    old = "".join(line[1:] for line in diff.splitlines(keepends=True) if not line.startswith("+"))
    names: dict[str, Any] = {}
    exec(compile(blocks_of("README.md", "python")[0] + new, "README.md", "exec"), names)
    assert names["out"].shape == (2, 1, 32, 128)
    assert "from flash_attn_interface import" in old and len(old) > 200


def test_the_serving_loop():
    """It serves all requests, in at most 25 lines."""
    (text,) = [text for text in blocks_of("README.md", "python") if "DecodeStep" in text]
    assert len([line for line in text.splitlines() if line.strip()]) <= 25
    names: dict[str, Any] = {}
    exec(compile(text, "README.md", "exec"), names)
    assert not names["waiting"] and not names["left"]
    assert names["cache"].num_free_pages == 60 and not names["cache"].sequences
    assert (names["out"] == 1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("block", GPU_BLOCKS)
def test_gpu_blocks(block):
    if "import torch\n" in block and not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("a torch without CUDA")
    exec(compile(block, "README.md", "exec"), {"cuflash": __import__("cuflash")})


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python -m cuflash")])
def test_commands(command, capsys, monkeypatch, tmp_path):
    if "--plot" in command:
        pytest.importorskip("matplotlib", reason='pip install -e ".[plot]"')
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command, comments=True)[3:]
    try:
        assert main(arguments) == 0
    except SystemExit as done:
        assert done.code == 0  # --help
    assert capsys.readouterr().out
    for picture in re.findall(r"\S+\.png", command):
        from matplotlib.image import imread

        drawn, committed = imread(tmp_path / picture), imread(ROOT / picture)
        assert drawn.shape == committed.shape
        differs = (abs(drawn - committed) > 0.1).any(-1)  # 0.07 is another version of matplotlib, 0.27 another plan
        assert differs.mean() < 0.15, f"{command} draws another picture"


def anchors(page: Path) -> set[str]:
    """Where links into a page can point to, as GitHub makes them of its headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    named = re.findall(r'^<a id="(.*)"></a>', text, re.MULTILINE)
    return {*named} | {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING)
def test_links(page):
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)\s]*)\)", text):
        assert target, "a link that leads nowhere"
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target
    for path in re.findall(r"`((?:cuflash|kernels_cu|tests|notebooks|\.ci)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


def test_pictures_have_alternative_texts():
    pictures = [found for page in LINKING for found in re.findall(r"!\[([^\]]*)\]", text_of(page))]
    assert len(pictures) >= 2 and all(len(text) > 40 for text in pictures)


@pytest.mark.parametrize("name", [name for name in cuflash.__all__ if not name.startswith("__")])
def test_examples_of_docstrings(name):
    """Each prints what it says."""
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(getattr(cuflash, name), name, globs={}):
        runner.run(test)
    assert not runner.failures
    assert runner.tries or name in ("ContextParallel", "ContextParallelError", "OutOfPages")


def test_tables_and_chart_are_those_of_the_committed_figures(tmp_path):
    assert chart.with_tables(chart.PAGE.read_text()) == chart.PAGE.read_text(), "python -m tests.bench chart"
    pytest.importorskip("matplotlib", reason='pip install -e ".[plot]"')
    chart.draw(tmp_path / "times.svg")
    drawn, committed = ((path.read_text()) for path in (tmp_path / "times.svg", chart.CHART))
    texts = [re.findall(r"<text[^>]*>([^<]*)", text) for text in (drawn, committed)]
    figures = next(iter(chart.results()))
    assert texts[0] == texts[1] and f"{figures['cuflash']} µs" in texts[0], "python -m tests.bench chart"


def test_the_alternative_text_of_the_chart_has_the_figures_of_its_bars():
    (text,) = re.findall(r"!\[([^\]]*)\]\(notebooks/times\.svg\)", text_of("README.md"))
    lines = {line["shape"]: line for line in chart.results() if line["gpu"] == "NVIDIA H200"}
    large, small = lines["b32 L4096 32/8"], lines["b1 L4096 32/8"]
    bars = [(large, "cuflash"), *((small, name) for name in ("cuflash", "FlashInfer", "FA3", "cuDNN"))]
    assert re.findall(r"\d\.\d+", text) == [f"{float(line[name]) / float(line['read']):.2f}" for line, name in bars]


def test_ranges_in_the_text_are_those_of_the_committed_figures():
    readme, benchmarks = (re.sub(r"\s+(> )?", " ", text_of(page)) for page in ("README.md", "BENCHMARKS.md"))
    lines = [line for line in chart.results() if line["read"]]
    h200 = [line for line in lines if line["gpu"] == "NVIDIA H200"]

    def span(lines, other):
        ratios = [float(line["cuflash"]) / float(line[other]) for line in lines if line[other]]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    large = [line for line in h200 if float(line["read"]) > 50]
    assert f"a layer of a large batch takes {span(large, 'read')} times a plain read" in readme
    assert f"On the H200 large batches take {span(large, 'read')} of the time" in text_of("kernels_cu/README.md")
    planning = [float(line["planning"]) - float(line["cuflash"]) for line in lines]
    assert f"**Planning in the call** adds {min(planning):.0f} to {max(planning):.0f} microseconds" in benchmarks
    for name, other in (("FlashAttention-3", "FA3"), ("FlashInfer", "FlashInfer"), ("cuDNN", "cuDNN")):
        assert re.search(rf"{span(h200, other)} times {name}'s", readme), (name, span(h200, other))
    for name, other in (("FlashInfer", "FlashInfer"), ("XQA", "XQA"), ("FlashAttention-3", "FA3")):
        assert re.search(rf"{span(lines, other)} of {name}'s", benchmarks), (name, span(lines, other))
