"""A mistake, or a machine that fails, is one sentence on standard error and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

from .help import PROG
from .schema import UsageError


class Unheard:
    """A standard output whose reader may go away, as in `implicit-bench list | head -3`: what is at work goes on."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._to(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        self._to(self._stream.flush)

    def _to(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what is in its buffer goes there as well
            os.close(nowhere)
            return None


def guarded(run: Callable[[], int]) -> int:
    """An exit code, with one sentence for what is the user's or the machine's doing; the rest is ours, a traceback."""
    before: Any = sys.stdout
    sys.stdout = before if isinstance(before, Unheard) else Unheard(before)
    try:
        return _guarded(run)
    finally:
        sys.stdout = before


def _guarded(run: Callable[[], int]) -> int:
    from .lock import RunLocked

    try:
        if os.getcwd() not in sys.path:  # a user's own modules; console scripts and launchers' workers leave it out
            sys.path.append(os.getcwd())
        code = run()
        sys.stdout.flush()
        return code
    except UsageError as mistake:
        return refuse(mistake, 2)
    except KeyboardInterrupt:  # a training that has begun says more
        return refuse("interrupted", 130)
    except OSError as problem:
        full = problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
        return refuse(f"{problem.filename}: {problem.strerror}" if problem.filename else problem, 1 if full else 2)
    except (ValueError, RuntimeError) as problem:
        if not type(problem).__module__.startswith("implicit_bench"):
            raise
        return refuse(problem, 1 if isinstance(problem, RunLocked) else 2)  # RecordError, DataError, CheckpointError


def refuse(problem: object, code: int) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of torchrun's processes on a machine the first speaks for all
        print(f"{PROG}: {problem}", file=sys.stderr)
    return code
