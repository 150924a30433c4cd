"""Draw a schedule with matplotlib, which is imported only here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .scheduling import SchedulerMetadata

# Okabe and Ito's palette without black and yellow: told apart with every kind of colour vision.
# https://jfly.uni-koeln.de/color/
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7")
_CUT_COLOUR = "black"


def plot_schedule(metadata: SchedulerMetadata, ax: Axes | None = None) -> Axes:
    """Draw what each block reads: a bar per block, coloured by sequence, a black mark where an item is cut.

    Args:
        metadata: The plan.
        ax: Where to draw; a new figure without it.

    Returns:
        The axes.

    Raises:
        ImportError: Without matplotlib.
    """
    try:
        from matplotlib import pyplot
        from matplotlib.collections import LineCollection, PolyCollection
        from matplotlib.patches import Patch
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install cuflash[plot]") from error
    if ax is None:
        _, ax = pyplot.subplots(figsize=(9, 6), layout="constrained")
    problem, work = metadata.problem, metadata.work()
    block, sequence = work["block"].astype(int), work["sequence"].astype(int)
    keys = work["key_end"] - work["key_begin"]
    used = int(block.max(initial=-1)) + 1

    # Where each line begins in the share of its block.
    through = np.cumsum(keys)
    before = through - keys
    first = np.searchsorted(block, block)  # the first line of the same block
    begin = before - before[first] if len(work) else before
    end = begin + keys
    half = 0.4 if used <= 64 else 0.5  # gaps between many bars would only flicker
    low, high = block - half, block + half
    colours = np.array(_COLOURS, object)[sequence % len(_COLOURS)]
    corners = np.stack([begin, low, end, low, end, high, begin, high], -1).reshape(-1, 4, 2)
    ax.add_collection(PolyCollection(list(corners), facecolors=list(colours), linewidths=0, antialiased=False))

    # An item is cut where the next line goes on with it in another block.
    item = np.stack([sequence, work["kv_head"], work["row_block"]], -1)
    cut = np.flatnonzero((item[1:] == item[:-1]).all(-1) & (block[1:] != block[:-1]))
    inner = np.flatnonzero(begin > 0)
    for line, x, colour, width in (
        (inner, begin, "white", 0.6),  # the next item of a block
        (cut, end, _CUT_COLOUR, 1.2),
        (cut + 1, begin, _CUT_COLOUR, 1.2),
    ):
        marks = np.stack([x[line], low[line], x[line], high[line]], -1).reshape(-1, 2, 2)
        ax.add_collection(LineCollection(list(marks), colors=colour, linewidths=width))

    longest = int(end.max(initial=0))
    if longest:
        mean = float(keys.sum()) / used
        ax.axvline(mean, color="0.3", linestyle="--", linewidth=0.8)
        ax.annotate(f"mean {mean:,.0f}", (mean, 1), (3, 2), xycoords=("data", "axes fraction"),
                    textcoords="offset points", fontsize="small", color="0.3")  # fmt: skip
    ax.set_xlim(0, max(1, longest) * 1.02)
    ax.set_ylim(max(1, used) - 0.5, -0.5)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("keys read by the block")
    ax.set_ylabel("thread block")
    ax.set_title(
        f"{problem.batch_size} sequences, {problem.num_heads_q}/{problem.num_heads_kv} heads on {used} blocks: "
        f"efficiency {100 * metadata.efficiency:.1f} %",
        loc="left", fontsize="medium", pad=16,
    )  # fmt: skip
    some = problem.batch_size <= len(_COLOURS)
    handles = [Patch(color=_COLOURS[s], label=f"sequence {s}") for s in range(problem.batch_size)] if some else []
    handles.append(Patch(color=_CUT_COLOUR, label="item cut"))
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize="small",
              title=None if some else "colours: sequences", title_fontsize="small")  # fmt: skip
    return ax
