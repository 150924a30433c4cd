"""Draw a schedule with matplotlib, which is imported only here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .requirements import MATPLOTLIB, install

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of Okabe and Ito's palette, told apart with every kind of colour vision, those that have a lighter shade of their own.
# https://jfly.uni-koeln.de/color/
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")
_HATCHES = ("", "////", "....", "xxxx")  # a further five sequences each
_CUT_COLOUR = "black"
_HATCH_COLOUR = (1, 1, 1, 0.75)
_LABELLED_BLOCKS = 40  # more bars than that are too slim for text
_BRACKETED_BLOCKS = 320


def plot_work(
    work: NDArray[Any], num_blocks: int, ax: Axes | None = None, labels: bool = True, title: str | None = None
) -> Axes:
    """Draw a list of work as :meth:`SchedulerMetadata.work` gives it, of whatever schedule.

    A bar per block, coloured by sequence and hatched beyond five of them, a black mark where an item is cut. The shares
    of a block stand one behind the other. KV heads of a sequence alternate in shade. Blocks whose partial results are
    merged are joined by a bracket on the right.

    Args:
        work: Lines with the fields of ``WORK``, sorted by block.
        num_blocks: Bars to draw; those without work stay empty.
        ax: Where to draw; a new figure without it.
        labels: Whether to write "sequence:head" on the bars, if they are few.
        title: What to write above.

    Returns:
        The axes.

    Raises:
        ImportError: Without matplotlib.
    """
    labels = labels and num_blocks <= _LABELLED_BLOCKS
    try:
        from matplotlib import pyplot
        from matplotlib.collections import LineCollection, PolyCollection
        from matplotlib.colors import to_rgb
        from matplotlib.legend_handler import HandlerTuple
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(f"plot needs matplotlib: {install(MATPLOTLIB)}") from error
    if ax is None:
        _, ax = pyplot.subplots(figsize=(9, 6), layout="constrained")
    block, sequence = work["block"].astype(int), work["sequence"].astype(int)
    keys = work["key_end"] - work["key_begin"]

    # Where each line begins in the share of its block.
    through = np.cumsum(keys)
    before = through - keys
    first = np.searchsorted(block, block)  # the first line of the same block
    begin = before - before[first] if len(work) else before
    end = begin + keys
    longest = int(end.max(initial=0))
    half = 0.4 if num_blocks <= 64 else 0.5  # gaps between many bars would only flicker
    low, high = block - half, block + half

    # KV heads and row blocks alternate between the colour and a lighter one.
    full = np.array([to_rgb(colour) for colour in _COLOURS])
    shades = np.stack([full, 0.62 * full + 0.38], 1)
    colours = shades[sequence % len(_COLOURS), (work["kv_head"] + work["row_block"]) % 2]
    corners = np.stack([begin, low, end, low, end, high, begin, high], -1).reshape(-1, 4, 2)
    cycle = sequence // len(_COLOURS) % len(_HATCHES)
    for number_of_cycle, hatch in enumerate(_HATCHES):
        mine = np.flatnonzero(cycle == number_of_cycle)
        ax.add_collection(
            PolyCollection(
                list(corners[mine]), facecolors=list(colours[mine]), linewidths=0, antialiased=False,
                hatch=hatch or None, edgecolors=_HATCH_COLOUR,
            )
        )  # fmt: skip

    # An item is cut where it goes on in another line and another block.
    item = np.stack([sequence, work["kv_head"], work["row_block"]], -1)
    _, number = np.unique(item, axis=0, return_inverse=True)
    number = number.ravel()
    order = np.lexsort((work["key_begin"], number))
    here, there = order[:-1], order[1:]
    cut = (number[here] == number[there]) & (block[here] != block[there])
    inner = np.flatnonzero(begin > 0)
    for line, x, colour, width in (
        (inner, begin, "white", 0.6),  # the next item of a block
        (here[cut], end, _CUT_COLOUR, 1.2),
        (there[cut], begin, _CUT_COLOUR, 1.2),
    ):
        marks = np.stack([x[line], low[line], x[line], high[line]], -1).reshape(-1, 2, 2)
        ax.add_collection(LineCollection(list(marks), colors=colour, linewidths=width))
    if labels:
        for line in np.flatnonzero(keys > 0.05 * longest):
            ax.text((begin[line] + end[line]) / 2, block[line], f"{sequence[line]}:{work['kv_head'][line]}",
                    ha="center", va="center", fontsize="small" if num_blocks <= 20 else "x-small", clip_on=True,
                    color="white" if colours[line].mean() < 0.4 else "black",
                    bbox={"facecolor": colours[line], "linewidth": 0, "pad": 0.8} if cycle[line] else None)  # fmt: skip

    handles: list[Any] = []
    if labels:
        handles.append(
            Line2D([], [], linewidth=0, marker="$2\\!:\\!1$", markersize=12, color="0.2", label="sequence : KV head")
        )
    some = int(sequence.max(initial=-1)) < len(_COLOURS) * len(_HATCHES)
    if some:
        handles += [
            Patch(facecolor=_COLOURS[s % len(_COLOURS)], hatch=_HATCHES[s // len(_COLOURS)] or None,
                  edgecolor=_HATCH_COLOUR, linewidth=0, label=f"sequence {s}")
            for s in np.unique(sequence)
        ]  # fmt: skip
    alternating = "KV heads in turn" if not work["row_block"].any() else "KV heads and row blocks in turn"
    if (work["kv_head"] + work["row_block"]).any():
        first_colour = shades[int(sequence[0]) % len(_COLOURS)]
        handles.append(tuple(Patch(facecolor=shade) for shade in first_colour))
    handles.append(Line2D([], [], color=_CUT_COLOUR, linewidth=0, marker="|", markersize=9, label="item cut"))
    spans = _merged_spans(number[here[cut]], block[here[cut]], block[there[cut]])
    if spans and num_blocks <= _BRACKETED_BLOCKS:
        for k, (top, bottom) in enumerate(spans):
            x = 1.012 + 0.014 * (k % 2)  # neighbours may share a block
            ends = np.repeat([top - 0.25, bottom + 0.25], 2)
            ax.plot([x - 0.006, x, x, x - 0.006], ends, color=_CUT_COLOUR, linewidth=1.2, clip_on=False,
                    solid_capstyle="butt", transform=ax.get_yaxis_transform())  # fmt: skip
        handles.append(Line2D([], [], color=_CUT_COLOUR, linewidth=0, marker="$]$", markersize=9, label="parts merged"))

    if longest:
        mean = float(keys.sum()) / num_blocks
        ax.axvline(mean, color="0.3", linestyle="--", linewidth=0.8)
        ax.annotate(f"mean {mean:,.0f}", (mean, 1), (3, 2), xycoords=("data", "axes fraction"),
                    textcoords="offset points", fontsize="small", color="0.3")  # fmt: skip
    ax.set_xlim(0, max(1, longest) * 1.02)
    ax.set_ylim(num_blocks - 0.5, -0.5)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("keys read by the block")
    ax.set_ylabel("thread block")
    labelled = [alternating if isinstance(handle, tuple) else handle.get_label() for handle in handles]
    ax.legend(handles=handles, labels=labelled, loc="upper left", bbox_to_anchor=(1.04, 1), frameon=False,
              fontsize="small", title=None if some else "colours: sequences", title_fontsize="small",
              handler_map={tuple: HandlerTuple(ndivide=None)})  # fmt: skip
    if title is not None:
        ax.set_title(title, loc="left", fontsize="medium", pad=16)
    return ax


def _merged_spans(item: NDArray[Any], here: NDArray[Any], there: NDArray[Any]) -> list[tuple[int, int]]:
    """Return (first, last) block of every cut item whose blocks are neighbours, in order."""
    spans = []
    for number in np.unique(item):
        blocks = np.unique(np.concatenate([here[item == number], there[item == number]]))
        if blocks[-1] - blocks[0] == len(blocks) - 1:
            spans.append((int(blocks[0]), int(blocks[-1])))
    return sorted(spans)
