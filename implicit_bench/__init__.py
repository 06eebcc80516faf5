"""implicit-bench: train implicit models and compare their wall-clock.

`from implicit_bench import solve, ImplicitLayer` for a training loop of one's own; the command line is in `cli`.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["ImplicitLayer", "__version__", "solve"]


def __getattr__(name: str) -> Any:
    """Public names load torch only when asked for: `implicit-bench --help` must not."""
    if name == "solve":
        from .core import solve

        return solve
    if name == "ImplicitLayer":
        from .models import ImplicitLayer

        return ImplicitLayer
    raise AttributeError(f"module 'implicit_bench' has no attribute {name!r}")
