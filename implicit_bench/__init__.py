"""implicit-bench: train implicit models and compare their wall-clock.

`from implicit_bench import solve, ImplicitLayer` for a training loop of one's own; the command line is in `cli`.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
_HOME = {"solve": "core", "ImplicitLayer": "models", "load_run": "runs", "records": "runs"}
__all__ = ["ImplicitLayer", "__version__", "load_run", "records", "solve"]


def __getattr__(name: str) -> Any:
    """Public names load torch only when asked for: `implicit-bench --help` must not."""
    if name not in _HOME:
        raise AttributeError(f"module 'implicit_bench' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
