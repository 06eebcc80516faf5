"""Figures as files. Reads plain numbers; matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

# PDFs with whole fonts (42): many a venue refuses Type 3
STYLE: Any = {"svg.hashsalt": "implicit-bench", "font.size": 9, "pdf.fonttype": 42, "legend.frameon": False,
              "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip


@contextmanager
def _drawn(*paths: Path, size: tuple[float, float]) -> Iterator[Any]:
    """A figure, saved when it is done. Same input, same bytes (SVG)."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        yield (figure := Figure(figsize=size, layout="constrained"))
        for path in paths:
            dated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
            figure.savefig(path, metadata=dated, dpi=200 if path.suffix == ".png" else "figure")


def _both(path: Path) -> list[Path]:
    return [path.with_suffix(suffix) for suffix in (".svg", ".png")]


WIDE, NARROW = 6.75, 3.25  # inches: a page's text, and one of its two columns
INK = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")  # Okabe and Ito's


def at_widths(plot: Callable[[Sequence[Path], float], None], stem: Path) -> Path:
    """STEM.svg, .png and .pdf as wide as a page, STEM-narrow.pdf as wide as a column; returns the first."""
    plot([stem.with_name(f"{stem.name}{suffix}") for suffix in (".svg", ".png", ".pdf")], WIDE)
    plot([stem.with_name(f"{stem.name}-narrow.pdf")], NARROW)
    return stem.with_name(f"{stem.name}.svg")


def lines(paths: Sequence[Path], width: float, series: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
          x: str, y: str, title: str, log: bool = False, level: float | None = None) -> None:  # fmt: skip
    """Curves (xs, ys) by label, all of a label in one colour, and where they have as many points their mean before
    them; `level` as a dotted line."""
    series = {label: curves for label, curves in series.items() if curves}
    beside, size = (3, 7) if width >= WIDE else (2, 6)
    with _drawn(*paths, size=(width, 0.55 * width + 0.17 * math.ceil(len(series) / beside))) as figure:
        axes = figure.subplots()
        for k, (label, curves) in enumerate(series.items()):
            style = {"color": INK[k % len(INK)], "linestyle": ("-", "--")[k // len(INK) % 2],
                     "marker": "o" if max(len(xs) for xs, _ in curves) == 1 else "", "markersize": 4}  # fmt: skip
            whole = len({len(xs) for xs, _ in curves}) == 1 < len(curves)
            for i, (xs, ys) in enumerate(curves):
                shown = [y if y > 0 else math.nan for y in ys] if log else ys
                axes.plot(xs, shown, linewidth=0.5 if whole else 1.2, alpha=0.4 if whole else 1,
                          label=label if i == 0 and not whole else None, **style)  # fmt: skip
            if whole:
                xs, ys = ([fmean(at) for at in zip(*each)] for each in zip(*curves))
                axes.plot(xs, [y if y > 0 or not log else math.nan for y in ys], linewidth=1.4, label=label, **style)
        if log:
            axes.set_yscale("log")
        if level is not None:
            axes.axhline(level, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel(x)
        axes.set_ylabel(textwrap.fill(y, int(6 * width)))
        figure.suptitle(textwrap.fill(title, int(14 * width)), fontsize=9)
        figure.legend(loc="outside lower center", ncols=beside, fontsize=size, columnspacing=1)


def amounts(paths: Sequence[Path], width: float, bars: Mapping[str, float], of: str, title: str) -> None:
    """Horizontal bars of one quantity, by label."""
    with _drawn(*paths, size=(width, 0.9 + 0.3 * len(bars))) as figure:
        axes = figure.subplots()
        axes.barh(range(len(bars)), [*bars.values()], color=INK[0], height=0.6)
        for row, value in enumerate(bars.values()):
            axes.annotate(f"{value:,.4g}", (value, row), xytext=(4, 0), textcoords="offset points", va="center")
        _labels(axes, [*bars], width)
        axes.set_xlim(0, max(bars.values()) * 1.2)
        axes.set_xlabel(textwrap.fill(of, int(14 * width)))
        figure.suptitle(textwrap.fill(title, int(14 * width)), fontsize=9)


def _labels(axes: Any, names: Sequence[str], width: float) -> None:
    """Of horizontal bars, the first above: beside them, or where a column has no room for that over them."""
    axes.set_ylim(len(names) - 0.5, -0.9)
    if width >= WIDE:
        axes.set_yticks(range(len(names)), names)
        return
    axes.set_yticks([])
    for row, name in enumerate(names):
        axes.annotate(name, (0, row - 0.34), xycoords=("axes fraction", "data"), xytext=(1, 0),
                      textcoords="offset points", va="bottom", fontsize=6,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.2})  # fmt: skip


class Bar(NamedTuple):
    """A ratio with its 95 % interval, `low` and `high` alike where there is none."""

    label: str
    value: float
    low: float
    high: float
    paper: str = ""  # as Claim.paper has it: 1.52×, or of several tables 0.95–1.52×
    stuck: bool = False  # solves of one of the two did not converge: starred, and in no verdict's colour

    @property
    def published(self) -> list[float]:
        return [float(value) for value in self.paper.rstrip("×").split("–") if value]


def ratio_bars(paths: Sequence[Path], width: float, bars: Sequence[Bar], title: str,
               of: str = "median ratio of paired rounds, 95 % interval") -> None:  # fmt: skip
    """Horizontal bars of ratios, from 1 and by factors, with their intervals and what the paper has."""
    with _drawn(*paths, size=(width, 0.9 + 0.42 * len(bars))) as figure:
        axes = figure.subplots()
        rows = range(len(bars))
        values = [b.value for b in bars]
        errors = [[b.value - b.low for b in bars], [b.high - b.value for b in bars]]
        colours = ["#d9d9d9" if b.stuck else "#4c72b0" if 1 < b.low < b.high else "#c44e52" if b.low < b.high < 1 else
                   "#999999" for b in bars]  # fmt: skip
        axes.set_xscale("log")
        axes.barh(rows, [value - 1 for value in values], left=1, xerr=errors, color=colours, height=0.6,
                  error_kw={"elinewidth": 1, "capsize": 2})  # fmt: skip
        axes.axvline(1, color="black", linewidth=0.8)
        for row, bar in zip(rows, bars):
            axes.annotate(f"{bar.value:.2f}×", (max(bar.high, 1), row), xytext=(4, 0), textcoords="offset points",
                          va="center")  # fmt: skip
            if bar.published:  # at the bar's lower edge, clear of the figure beside it
                axes.plot(bar.published, [row + 0.3] * len(bar.published), color="black", linewidth=0.8, marker="D",
                          markersize=4, markerfacecolor="white", gid=f"published-{row}")  # fmt: skip
        _labels(axes, [b.label + "*" * b.stuck for b in bars], width)
        ends = [1.0, *(end for b in bars for end in (b.low, b.high, *b.published))]
        least, most = min(ends), max(ends)
        axes.set_xlim(least / 1.15, most * (most / least) ** (0.2 if width >= WIDE else 0.35) * 1.2)
        ticks = [n * 10.0**k for k in range(-3, 4) for n in (1, 2, 5) if least / 1.15 <= n * 10.0**k <= most * 1.15]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        beside = "; ◇ what the paper has" if any(b.published for b in bars) else ""
        beside += "; * not converged, which decides nothing" if any(b.stuck for b in bars) else ""
        figure.supxlabel(textwrap.fill(f"{of}{beside}", int(14 * width)), fontsize=9)
        figure.suptitle(textwrap.fill(title, int(14 * width)), fontsize=9)


def residuals(path: Path, traces: Mapping[str, Any], tol: float | None, title: str) -> list[Path]:
    """Relative residual against solver step: (steps + 1, B) a solver, its median and the band from 10 % to 90 %; the
    tolerance that the model was trained with as a line."""
    if not traces:
        return []
    with _drawn(*_both(path), size=(5, 3.4)) as figure:
        axes = figure.subplots()
        for name, trace in traces.items():
            filled = trace.clone()
            for k in range(1, len(filled)):  # a row that has ended stays where it is
                filled[k] = filled[k].where(filled[k] == filled[k], filled[k - 1])
            low, middle, high = (filled.nanquantile(q, dim=1).numpy() for q in (0.1, 0.5, 0.9))
            (line,) = axes.semilogy(range(len(middle)), middle, label=name)
            axes.fill_between(range(len(middle)), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_xlabel("solver step")
        axes.set_ylabel("|f(z) - z| / |f(z)|")
        if tol is not None:
            axes.axhline(tol, color="black", linewidth=0.8, linestyle=":", label="stop.tol")
        axes.set_title(f"{title}: median, 10 to 90 % of images", fontsize=9)
        axes.legend()
    return _both(path)


def most_and_least(path: Path, images: Any, seen: Any, title: str, each: int = 8) -> list[Path]:
    """The images that took the fewest and the most evaluations, with their labels. images uint8 (N, C, H, W)."""
    order = seen.nfe.argsort(stable=True)
    each = min(each, len(order) // 2)
    if not each:
        return []
    with _drawn(*_both(path), size=(0.9 * each, 2.6)) as figure:
        figure.suptitle(f"{title}: fewest evaluations above, most below", fontsize=8)
        rows = figure.subplots(2, each, squeeze=False)
        for axes_row, index in zip(rows, (order[:each], order.flip(0)[:each])):
            for axes, i in zip(axes_row, index.tolist()):
                image = images[i].permute(1, 2, 0).cpu().numpy()
                axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray_r")
                axes.set_axis_off()
                said = int(seen.predicted[i])
                mark = f"{int(seen.y[i])}" if said == int(seen.y[i]) else f"{int(seen.y[i])}, said {said}"
                axes.set_title(f"{int(seen.nfe[i])} f\n{mark}", fontsize=7)
    return _both(path)
