"""What Hydra itself does with a command line: a sweep, and the flags that print and stop."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .help import PROG
from .schema import UsageError, config_dir, first_line
from .words import Words


def hand_over(command: str, words: Words, args: Sequence[str], task: Callable[[Any], Any]) -> None:
    """What it raises comes to us."""
    import hydra
    from hydra.errors import HydraException

    from .terminal import Without

    logging.raiseExceptions = False  # or --info ... | head prints a traceback a line
    before, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [f"{PROG} {command}", *args, *(f"--config-dir={folder}" for folder in words.search)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else it prints tracebacks of its own and exits
    try:
        with contextlib.redirect_stderr(Without("Error executing job with overrides")):  # it has been said already
            hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=command)(task)()
    except HydraException as error:
        raise UsageError(first_line(error)) from None
    except SystemExit as end:
        if end.code == 130:
            raise KeyboardInterrupt from None
        if end.code:
            raise
    finally:
        sys.argv = before
        os.environ.pop("HYDRA_FULL_ERROR")
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full
