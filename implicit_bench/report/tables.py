"""Tables as text and Markdown. Reads plain rows; never runs a model."""

from __future__ import annotations

from collections.abc import Sequence


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
