"""What a user reads: results on stdout, progress on stderr; plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import Any

INDENT = " " * 8
FORMATS = ("text", "md", "csv", "json")
TEX = (*FORMATS, "tex")  # of `table`
QUIET = "IMPLICIT_BENCH_QUIET"  # in the environment, so that a launcher's workers are quiet too
ONE_BAR = "IMPLICIT_BENCH_BAR"  # in the environment: the process whose bar is the only one, of a sweep's many
format = "text"  # of the tables on standard output; any other than text has it to itself


@contextlib.contextmanager
def manners(quiet: bool, tables: str) -> Iterator[None]:
    """-q and format= of one command."""
    global format
    before = format, os.environ.get(QUIET)
    format = tables
    if quiet:
        os.environ[QUIET] = "1"
    try:
        yield
    finally:
        format = before[0]
        if quiet:
            os.environ.pop(QUIET)
            os.environ.update({} if before[1] is None else {QUIET: before[1]})


def progress(label: str, text: str) -> None:
    """What -q leaves out: where the work stands, on standard error."""
    if not os.environ.get(QUIET):
        say(label, text, err=True)


def say(label: str, text: str, *, err: bool = False) -> None:
    """`label   text`, the label in eight columns; further lines of the text are indented below it."""
    aside = err or format != "text"
    if aside and not err and os.environ.get(QUIET):
        return
    stream = sys.stderr if aside else sys.stdout
    lines = text.split("\n")
    if stream.isatty():
        width = max(40, shutil.get_terminal_size().columns - len(INDENT))
        lines = [part for line in lines for part in _wrapped(line, width)]
    first, *rest = lines
    style = label if not label or not _colour(stream) else f"\033[1m{label}\033[0m"
    text = "\n".join([f"{style}{' ' * (8 - len(label))}{first}", *(f"{INDENT}{line}" for line in rest)])
    print(text, file=stream, flush=True)


def hanging(head: str, text: str) -> str:
    """`head text`, wrapped on a terminal so that the text keeps its own column."""
    if not sys.stdout.isatty():
        return head + text
    first, *rest = _wrapped(text, max(30, shutil.get_terminal_size().columns - len(head)))
    return "\n".join([head + first, *(" " * len(head) + line for line in rest)])


def _wrapped(line: str, width: int) -> list[str]:
    """At spaces only, and only where needed: paths stay whole, columns of spaces as they are."""
    if len(line) <= width:
        return [line]
    return textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False, drop_whitespace=True) or [line]


def _colour(stream: Any) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def card(rows: Sequence[tuple[bool, str, str]]) -> None:
    """`✓ name  sentence` or `✗ name  sentence`, a line each; on a terminal the sentences have a column of their own."""
    width = max(len(name) for _, name, _ in rows)
    for good, name, text in rows:
        line = hanging(f"  {'✓' if good else '✗'} {name:<{width}}  ", text)
        if _colour(sys.stdout):
            line = line.replace("✓", "\033[32m✓\033[0m", 1) if good else line.replace("✗", "\033[1;31m✗\033[0m", 1)
        print(line, flush=True)


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, without an exponent where that is short; a dash for what was not measured."""
    if value is None or value != value:
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 10**digits - 0.5:
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def share(value: float | None) -> str:
    """An accuracy: three decimals."""
    return "–" if value is None else f"{value:.3f}"


class Without:
    """Standard error without the lines of another that begin so."""

    def __init__(self, beginning: str):
        self._beginning, self._stream = beginning, sys.stderr

    def write(self, text: str) -> int:
        return len(text) if text.startswith(self._beginning) else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Bar:
    """A progress bar with time left on a terminal; nothing elsewhere. Lines printed through it stay above it."""

    def __init__(self, total: int | None, unit: str, done: int = 0):
        self._progress: Any = None
        self._next = 0.0
        self._quiet = bool(os.environ.get(QUIET))
        if sys.stderr.isatty() and not self._quiet and os.environ.get(ONE_BAR) in (None, str(os.getpid())):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(TextColumn(" "), BarColumn(None), MofNCompleteColumn(), TextColumn(unit),
                                      TextColumn("{task.description}"), TextColumn("· left"), TimeRemainingColumn(),
                                      console=Console(stderr=True), auto_refresh=False, transient=True)  # fmt: skip
            self._task = self._progress.add_task("", total=total, completed=done)
            self._progress.start()

    def at(self, done: int, text: Any = str) -> None:
        """`text()` is only asked for when the bar is redrawn, five times a second at most."""
        if self._progress is not None and (now := time.perf_counter()) >= self._next:
            self._progress.update(self._task, completed=done, description=text(), refresh=True)
            self._next = now + 0.2

    def line(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
