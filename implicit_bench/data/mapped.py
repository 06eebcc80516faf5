"""One copy of a data set for all processes of a node: fetched, checked and decoded once, then mapped from files."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor


@contextlib.contextmanager
def one_at_a_time(root: Path) -> Iterator[None]:
    """Held by one process at a time of those that use this data root, however the one before has ended."""
    try:
        import fcntl

        handle = os.open(root / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except (ImportError, OSError):  # no such locks here, or a root that cannot be written: each for itself
        yield
        return
    try:
        yield
    finally:
        os.close(handle)


def mapped(file: Path, make: Callable[[], tuple[Sequence[Tensor], str]]) -> tuple[list[Tensor], str]:
    """The tensors that `make` makes, and a word about them, from a file of torch's; made and kept there if need be.

    The memory is the page cache's, shared by all who map it; what a process writes into it stays its own. A file that
    cannot be written costs nothing but that.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError):
        return _read(file)
    tensors, word = make()
    work = file.with_name(f"{file.name}.{os.getpid()}.new")
    try:
        file.parent.mkdir(exist_ok=True)
        whole = [t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for t in tensors]  # a view brings it all
        torch.save({"tensors": whole, "word": word}, work)
        work.replace(file)
        return _read(file)
    except (OSError, RuntimeError):  # of a full disk, too
        with contextlib.suppress(OSError):
            work.unlink(missing_ok=True)
        return [*tensors], word


def _read(file: Path) -> tuple[list[Tensor], str]:
    found = torch.load(file, mmap=True, weights_only=True)
    return found["tensors"], found["word"]
