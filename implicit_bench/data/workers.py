"""Work on pictures in other processes, ahead of its use."""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from .readers import DataError

MOST = 16  # where the number is auto


class Items(Protocol):
    """What can be made by number, in any process; a function of the number only."""

    def __getitem__(self, k: int) -> Any: ...


class _Guarded:
    def __init__(self, items: Items):
        self.items = items

    def __getitem__(self, k: int) -> Any:
        try:
            return self.items[k]
        except DataError as error:  # a DataLoader would wrap it in a traceback of many lines
            return error


def made(items: Items, numbers: Sequence[int], workers: int | str, pin: bool = False) -> Generator[Any, None, None]:
    """``items`` of ``numbers``, in this order, made in ``workers`` processes (0: in this one; auto: as many as cores).

    Raises DataError as an item did. However it is left, no process outlives the closed generator.
    """
    count = min(MOST, os.cpu_count() or 1) if workers == "auto" else int(workers)
    source: Any = _Guarded(items)
    loader: Any = DataLoader(source, batch_size=None, sampler=numbers, num_workers=min(count, len(numbers)),
                             collate_fn=_as_it_is, pin_memory=pin, generator=torch.Generator())  # fmt: skip
    with _signals_left_to_us():
        iterator = iter(loader)  # with a generator of its own, else it would draw from the global one
    stop = iterator._shutdown_workers if loader.num_workers else _as_it_is
    atexit.register(stop)  # for one that was never closed: workers do not hear the SIGTERM of multiprocessing's own
    try:
        for item in iterator:
            if isinstance(item, DataError):
                raise item
            yield item
    finally:
        atexit.unregister(stop)
        stop()  # now, and not when the garbage collector comes by


def _as_it_is(item: Any = None) -> Any:
    return item


@contextmanager
def _signals_left_to_us() -> Iterator[None]:
    """Processes started within never see Ctrl-C, or the SIGTERM of a job scheduler, which reach a whole group: the
    parent still wants its batch. Blocked from before they start, since a signal may come at any moment."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
