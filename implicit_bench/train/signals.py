"""A run that is asked to end finishes its step and saves. Where a queue's library wants to know, it is told afterwards.

submitit catches two signals in the job that it starts: one with which SLURM announces the end of the job's time, upon
which it puts the job into the queue again and exits, and SIGTERM, which it ignores.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..world import world


class Interrupted(Exception):
    """A signal asked for the end: the step was finished and the state saved."""


class Queue(NamedTuple):
    signal: int
    handler: Callable[[int, Any], Any]  # puts the job into the queue again, and exits


called: Queue | None = None  # the queue that asked for the end of the run, and has not been told of it yet


def queue() -> Queue | None:
    """The queue's library that this process runs under."""
    for number in (signal.SIGUSR1, signal.SIGUSR2) if hasattr(signal, "SIGUSR1") else ():
        handler = signal.getsignal(number)
        if callable(handler) and str(getattr(handler, "__module__", "")).partition(".")[0] == "submitit":
            return Queue(number, handler)
    return None


def tell_queue() -> None:
    """When the run has been put away: where a queue asked for its end, it is the queue's turn."""
    global called
    if called is not None:
        asked, called = called, None
        asked.handler(asked.signal, None)


def _main() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def finishing_on_signals() -> Iterator[Callable[[], bool]]:
    """Within, SIGINT and SIGTERM, or the queue's signal, only set a flag that the loop asks for; a second SIGINT acts
    at once."""
    asked = threading.Event()
    if not _main():
        yield asked.is_set
        return
    by = queue()

    def note(signum: int, frame: Any) -> None:
        global called
        if asked.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if by and signum == by.signal:
            called = by
        asked.set()

    caught = (signal.SIGINT, by.signal if by else signal.SIGTERM)
    before = {s: signal.signal(s, note) for s in caught}
    try:
        yield asked.is_set
    except BaseException:
        if world().size > 1 and signal.SIGTERM in before:  # torchrun's to all when one has ended: that is being told
            before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Outside the loop SIGTERM ends a run as Ctrl-C does, with a record that says so; a queue's library keeps it.

    Once: `timeout`, and schedulers, send it to a process and to its group, and the second would end the writing.
    """
    if not _main() or queue():
        yield
        return

    def end(signum: int, frame: Any) -> None:
        signal.signal(signum, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
