"""Work on pictures in other processes, ahead of its use."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Sequence
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
                             collate_fn=_as_it_is, worker_init_fn=_leave_signals_to_the_parent, pin_memory=pin,
                             generator=torch.Generator())  # fmt: skip
    iterator = iter(loader)  # with a generator of its own, else it would draw from the global one
    try:
        for item in iterator:
            if isinstance(item, DataError):
                raise item
            yield item
    finally:
        if loader.num_workers:
            iterator._shutdown_workers()  # now, and not when the garbage collector comes by


def _as_it_is(item: Any) -> Any:
    return item


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C, and the SIGTERM of a job scheduler, reach a whole group: the parent still wants its last batch."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
