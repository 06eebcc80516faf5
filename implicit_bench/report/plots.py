"""Figures as files. Reads plain numbers; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def speedup_bars(path: Path, bars: Sequence[tuple[str, float, float, float]], title: str) -> None:
    """Horizontal bars of ratios with their intervals: (label, value, low, high) each. Same input, same bytes (SVG)."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "implicit-bench", "font.size": 9}):
        figure: Any = Figure(figsize=(6.75, 0.9 + 0.42 * len(bars)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        rows = range(len(bars))
        values = [b[1] for b in bars]
        errors = [[b[1] - b[2] for b in bars], [b[3] - b[1] for b in bars]]
        colours = ["#4c72b0" if b[2] > 1 else "#c44e52" if b[3] < 1 else "#999999" for b in bars]
        axes.barh(rows, values, xerr=errors, color=colours, height=0.6, error_kw={"elinewidth": 1, "capsize": 2})
        axes.axvline(1, color="black", linewidth=0.8)
        for row, (_, value, _, high) in zip(rows, bars):
            axes.annotate(f"{value:.2f}×", (high, row), xytext=(4, 0), textcoords="offset points", va="center")
        axes.set_yticks(rows, [b[0] for b in bars])
        axes.invert_yaxis()
        axes.set_xlim(0, max(b[3] for b in bars) * 1.15)
        axes.set_xlabel("ratio of medians, 95 % interval")
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None})
