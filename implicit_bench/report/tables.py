"""Tables as text, Markdown, CSV and JSON. Reads plain rows; never runs a model."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import terminal
from ..terminal import number

Spell = Mapping[str, Callable[[Any], str]]  # column -> how a value of it is written for a reader


def text(columns: Sequence[str], rows: Sequence[Sequence[str]], indent: str = " ") -> str:
    """Aligned columns: words to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]
    wordy = [any(row[i][:1].isalpha() or row[i][:1] == "(" for row in rows) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(w) if left else cell.rjust(w) for cell, w, left in zip(line, widths, wordy))
             for line in (columns, *rows)]  # fmt: skip
    return "\n".join(indent + line.rstrip() for line in lines)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


TEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"$\sim$",
       "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "±": r"$\pm$", "×": r"$\times$", "–": "--"}  # fmt: skip


LONG = 40  # letters, from where on a column of LaTeX breaks its lines


def latex(name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """A table float of booktabs, as wide as a page, its notes below it."""

    def told(text: str) -> str:
        parts = text.replace("<br>", "; ").split("--")  # a flag's, which would become a dash
        return "-{}-".join("".join(TEX.get(letter, letter) for letter in part) for part in parts)

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(told, cells)) + r" \\"

    cells = [[row[i] for row in rows if row[i]] for i in range(len(columns))]
    long = [max(map(len, each), default=0) > LONG for each in cells]
    share = 0.7 / max(sum(long), 1)
    digits = [any(cell.lstrip("~")[:1].isdigit() for cell in each) for each in cells]
    kinds = [rf"p{{{share:.2f}\textwidth}}" if w else "r" if d else "l" for w, d in zip(long, digits)]
    head = [r"% needs \usepackage{booktabs}", r"\begin{table*}", r"\centering\footnotesize",
            rf"\caption{{{told(title)}}}", rf"\label{{tab:{name}}}",
            rf"\begin{{tabular}}{{@{{}}{''.join(kinds)}@{{}}}}", r"\toprule", line(columns), r"\midrule"]  # fmt: skip
    foot = [r"\bottomrule", r"\end{tabular}", *(rf"\par\footnotesize {told(note)}" for note in notes), r"\end{table*}"]
    return "\n".join([*head, *map(line, rows), *foot]) + "\n"


def show(columns: Sequence[str], rows: Sequence[Sequence[Any]], spell: Spell | None = None,
         spare: Sequence[str | Sequence[int]] = ()) -> None:  # fmt: skip
    """Print a table on standard output in the format that the command was asked for.

    A reader gets values as `spell` writes them, a program (csv, json) the values themselves. On a terminal too narrow
    for all, the columns of `spare` (or groups of them, by their places) are left out one by one, and said to be.
    """
    format = terminal.format
    if format == "json":
        print(json.dumps([dict(zip(columns, row)) for row in rows], indent=1, default=str))
        return
    if format == "csv":
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows([columns, *rows])
        print(lines.getvalue(), end="")
        return
    spelled = [[(spell or {}).get(name, _cell)(value) for name, value in zip(columns, row)] for row in rows]
    if format == "md":
        print(markdown(columns, spelled), end="")
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    groups = [[columns.index(each)] if isinstance(each, str) else each for each in spare]
    for out in range(len(groups) + 1):
        left_out = [i for group in groups[:out] for i in group]
        keep = [i for i in range(len(columns)) if i not in left_out]
        shown = text([columns[i] for i in keep], [[row[i] for i in keep] for row in spelled])
        if width is None or max(map(len, shown.splitlines())) <= width:
            break
    print(shown)
    if width and left_out:
        gone = ", ".join(columns[group[0]] for group in groups[:out])
        said = f"({gone}: no room in {width} columns; a wider window or format=md has them)"
        print(textwrap.indent(textwrap.fill(said, width - 1), " "))


def _cell(value: Any) -> str:
    if value is None or isinstance(value, float):
        return number(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
