"""The committed figures (``results.csv``), as the tables of BENCHMARKS.md and as the chart of the README."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from cuflash.bench import report

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.csv")
PAGE = ROOT / "BENCHMARKS.md"
CHART = ROOT / "notebooks" / "times.svg"

_PEERS = ("cuDNN", "FA2", "JAX", "FlashInfer", "XQA", "FA3")
_GPU = "NVIDIA H200"  # of the chart
_BARS = (
    ("cuflash", "cuflash", "#0072B2"),
    ("cuDNN", "cuDNN *", "#CC79A7"),
    ("FlashInfer", "FlashInfer", "#E69F00"),
    ("FA3", "FlashAttention-3 *", "#009E73"),
)
_SHAPES = {
    "b32 L4096 32/8": "32 sequences of 4096 keys\n32 query, 8 KV heads",
    "b128 lognormal 32/8": "128 sequences of different lengths\n32 query, 8 KV heads",
    "b64 random 1..8192 8/1": "64 sequences of 1 to 8192\n8 query heads, 1 KV head",
    "b1 L32768 32/8": "1 sequence of 32,768\n32 query, 8 KV heads",
    "b8 L2048 32/8": "8 sequences of 2048\n32 query, 8 KV heads",
    "b1 L4096 32/8": "1 sequence of 4096\n32 query, 8 KV heads",
}


def results() -> list[dict[str, str]]:
    """Return the lines of the file: gpu, shape, read, cuflash, a column per peer and planning; microseconds."""
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def table(gpu: str) -> str:
    """Return the Markdown table of a GPU."""
    measured = [line for line in results() if line["gpu"] == gpu]
    peers = [name for name in _PEERS if any(line[name] for line in measured)]
    names = ("shape", "read", "cuflash (ratio)", *peers, "planning in the call")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for line in measured:
        ratio = f" ({float(line['cuflash']) / float(line['read']):.2f})" if line["read"] else ""
        cells = [line["shape"], line["read"], line["cuflash"] + ratio]
        cells += [line[name] for name in (*peers, "planning")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(path: Path) -> None:
    """Draw the chart: times by the time of reading, so that shapes of any size share an axis.

    Raises:
        ImportError: Without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = {line["shape"]: line for line in results() if line["gpu"] == _GPU}
    # The same bytes whenever and wherever it is drawn, and text as text.
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "cuflash", "font.family": "sans-serif", "font.size": 12}
    with pyplot.rc_context(style):
        figure, ax = pyplot.subplots(figsize=(9, 6), layout="constrained")
        height = 0.8 / len(_BARS)
        for row, (shape, _) in enumerate(_SHAPES.items()):
            read = float(lines[shape]["read"])
            for i, (name, label, colour) in enumerate(_BARS):
                y = row + (i - (len(_BARS) - 1) / 2) * height
                text = lines[shape][name]
                if not text:
                    ax.text(1.02, y, f"{name}: equal lengths only", va="center", fontsize=9.5, color="0.35")
                    continue
                ax.barh(y, float(text) / read, height, color=colour, label=label if not row else None)
                ax.text(float(text) / read + 0.02, y, f"{text} µs", va="center", fontsize=9.5)
        ax.axvline(1, color="0.2", linewidth=1, linestyle="--")
        ax.set_yticks(range(len(_SHAPES)), list(_SHAPES.values()))
        ax.set_ylim(len(_SHAPES) - 0.5, -0.5)
        ax.set_xlim(0, 2.95)
        ax.set_xlabel("time of a layer / time to read its keys and values")
        ax.set_title(f"Decode attention on an {_GPU.removeprefix('NVIDIA ')}: less is better", loc="left", fontsize=14)
        ax.spines[["top", "right"]].set_visible(False)
        note = "* contiguous cache, others paged"
        ax.legend(loc="upper right", frameon=False, title=note, alignment="left", fontsize=10.5, labelspacing=0.2)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def with_tables(text: str) -> str:
    """Return the text of BENCHMARKS.md with the tables of all GPUs brought up to date."""
    for gpu in dict.fromkeys(line["gpu"] for line in results()):
        begin = text.index("| shape |", text.index(f"\n{gpu}"))
        end = text.index("\n\n", begin) + 1
        text = text[:begin] + table(gpu) + text[end:]
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of ``python -m tests.bench chart``: it has none of its own."""


def run(arguments: argparse.Namespace) -> int:
    """Run ``python -m tests.bench chart``."""
    if arguments.json:
        report.write(results(), as_json=True)
        return 0
    PAGE.write_text(with_tables(PAGE.read_text()))
    draw(CHART)
    print(f"written: {PAGE.relative_to(ROOT)}, {CHART.relative_to(ROOT)}")
    return 0
