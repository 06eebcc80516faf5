"""Tables as text and Markdown. Reads plain rows; never runs a model."""

from __future__ import annotations

from collections.abc import Sequence


def text(columns: Sequence[str], rows: Sequence[Sequence[str]], indent: str = " ") -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
             for line in (columns, *rows)]  # fmt: skip
    return "\n".join(indent + line.rstrip() for line in lines)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
