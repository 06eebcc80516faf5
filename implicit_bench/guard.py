"""A mistake, or a machine that fails, is one sentence on standard error and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from .help import PROG
from .schema import UsageError


def guarded(run: Callable[[], int]) -> int:
    """An exit code, with one sentence for what is the user's or the machine's doing; the rest is ours, a traceback."""
    from .lock import RunLocked

    try:
        if os.getcwd() not in sys.path:  # a user's own modules; console scripts and launchers' workers leave it out
            sys.path.append(os.getcwd())
        code = run()
        sys.stdout.flush()
        return code
    except UsageError as mistake:
        return refuse(mistake, 2)
    except BrokenPipeError:  # as in `implicit-bench list | head -3`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (or the interpreter complains when it flushes at exit)
        return 0
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
