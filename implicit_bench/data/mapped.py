"""One copy of a data set for all processes of a node: fetched, checked and decoded once, then mapped from files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

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


def mapped(folder: Path, make: Callable[[], tuple[Sequence[Tensor], str]]) -> tuple[list[Tensor], str]:
    """The tensors that `make` makes, and a word about them, from the files in `folder`; made and kept there if need be.

    The memory is the page cache's, shared by all who map it; what a process writes into it stays its own. A folder that
    cannot be written costs nothing but that.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, RuntimeError):
        return _read(folder)
    tensors, word = make()
    try:
        _write(folder, tensors, word)
        return _read(folder)
    except OSError:
        return [*tensors], word


def _read(folder: Path) -> tuple[list[Tensor], str]:
    index: dict[str, Any] = json.loads((folder / "index.json").read_text())
    found = []
    for k, (dtype, shape) in enumerate(index["tensors"]):
        kind, size = getattr(torch, dtype), math.prod(shape)
        path = folder / str(k)
        if path.stat().st_size != size * kind.itemsize:
            raise ValueError(f"{path} is not whole")
        found.append(torch.from_file(str(path), False, size, dtype=kind).view(shape) if size else
                     torch.empty(shape, dtype=kind))  # fmt: skip
    return found, index["word"]


def _write(folder: Path, tensors: Sequence[Tensor], word: str) -> None:
    """The folder is there whole or not at all."""
    folder.parent.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        for k, tensor in enumerate(tensors):
            (work / str(k)).write_bytes(tensor.contiguous().numpy().data)
        index = {"tensors": [[str(t.dtype).removeprefix("torch."), [*t.shape]] for t in tensors], "word": word}
        (work / "index.json").write_text(json.dumps(index))
        work.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)  # one that could not be read
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
