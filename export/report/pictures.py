"""The pictures of a report, drawn by matplotlib, as SVG that stands in a page: its ink is the page's."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ptq4vit_fx.export.report.seen import Seen, View

#: Inches of a picture, at 72 points each.
WIDTH, HEIGHT = 5.0, 1.9
#: Written in the SVG, and the page's colour of text in its place.
INK = "#010203"
VALUES, GRID, FINE = "#8a94a6", "#d9480f", "#1c7ed6"
#: Of lines: mid tones, which a light and a dark page show.
PALETTE = ("#1c7ed6", "#d9480f", "#2f9e44", "#9c36b5", "#e8890c", "#0c8599", "#c2255c", "#748094")
#: More levels than so many in a view are ticks at its upper edge, as lines they would be a wall; more still, a band.
MOST_LINES, MOST_TICKS = 40, 150
#: Where a bin without values ends; powers of ten in few characters.
EMPTY, COUNTS = 0.5, {0: "1", 1: "10", 2: "100", 3: "1k", 4: "10k", 5: "100k", 6: "1M", 7: "10M", 8: "100M"}
#: matplotlib's settings are those of the process.
_DRAWING = threading.Lock()
_SETTINGS = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "path.simplify": True,
}


def histogram(seen: Seen, mark: str) -> Markup:
    """Return the histograms of a site with its grid over them; mark: tells the ids of this picture from others'."""

    def draw(figure: Figure) -> None:
        wide = [2.0, 1.0] if len(seen.views) == 2 else [1.0]
        left = 0.09
        for number, view in enumerate(seen.views):
            width = (0.985 - left) if len(wide) == 1 else (0.54 if number == 0 else 0.985 - left)
            axes = figure.add_axes((left, 0.24, width, 0.7))
            _histogram(axes, seen, view)
            left += width + 0.07
            axes.set_xlabel(("value" if seen.snr is not None else "code") if number == 0 else "where its ranges meet")

    return _svg(draw, (WIDTH, HEIGHT), mark)


def _histogram(axes: Any, seen: Seen, view: View) -> None:
    heights = np.log10(np.maximum(view.counts, EMPTY))
    edges = np.linspace(view.low, view.high, len(heights) + 1)
    axes.stairs(heights, edges, baseline=np.log10(EMPTY), fill=True, color=VALUES)
    top = int(np.ceil(heights.max())) + 1
    axes.set_ylim(np.log10(EMPTY), max(heights.max() + 0.4, 1))
    # Words of our own: matplotlib sets those of a logarithmic axis as formulas, which takes longer than all the rest.
    decades = range(0, top, 2 if top > 3 else 1)
    axes.set_yticks(decades, [COUNTS.get(decade, f"1e{decade}") for decade in decades])
    margin = 0.01 * (view.high - view.low)
    axes.set_xlim(view.low - margin, view.high + margin)
    within = seen.levels[(seen.levels >= view.low - margin) & (seen.levels <= view.high + margin)]
    fine = within < seen.threshold if seen.threshold is not None else np.zeros(len(within), bool)
    low = 0.0 if len(within) <= MOST_LINES else 0.9
    for part, colour in ((within[fine], FINE), (within[~fine], GRID)):
        if len(part) > MOST_TICKS:
            axes.axvspan(part[0], part[-1], low, 1.0, color=colour, alpha=0.5, linewidth=0)
            continue
        # One path for all: a line is broken where it is no number.
        x = np.repeat(part, 3)
        y = np.tile([low, 1.0, np.nan], len(part))
        axes.plot(x, y, color=colour, linewidth=0.5, transform=axes.get_xaxis_transform(), solid_capstyle="butt")
    axes.tick_params(length=2.5, pad=2)


def curves(lines: Sequence[Sequence[float | None]], mark: str) -> Markup:
    """Return lines over the blocks, in the order and colours of PALETTE; None: there is no point."""

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.12, 0.22, 0.865, 0.72))
        for number, line in enumerate(lines):
            numbers = [np.nan if value is None else value for value in line]
            axes.plot(range(len(numbers)), numbers, "o-", color=colour_of(number), markersize=3, linewidth=1.2)
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.tick_params(length=2.5, pad=2)

    return _svg(draw, (0.75 * WIDTH, HEIGHT), mark)


def colour_of(number: int) -> str:
    """Return the colour of a line."""
    return PALETTE[number % len(PALETTE)]


def _svg(draw: Callable[[Figure], None], size: tuple[float, float], mark: str) -> Markup:
    """Return a figure as an element of HTML: without what files need, ids unlike any other's, ink as the text's."""
    written = io.StringIO()
    with _DRAWING, mpl.rc_context({**_SETTINGS, "svg.hashsalt": mark}):
        figure = Figure(figsize=size)
        draw(figure)
        figure.savefig(
            written, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' (xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r' (width|height)="[0-9.]+pt"', "", text, count=2)
    named = set(re.findall(r"#([a-z0-9]+)[\")]", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in named else "", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"| ?font-family: [^;"]*;|<style.*?</style>', "", text, flags=re.DOTALL)
    text = re.sub(r"(\.[0-9]{2})[0-9]+", r"\1", text)
    return Markup(re.sub(r"\s*\n\s*", "\n", text.replace(INK, "currentColor")))
