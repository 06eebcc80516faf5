"""What this process may use of the machine: its control group's limits, and the memory that is free.

Without torch, so that `doctor` can tell it of a broken installation; nothing here raises for want of /proc.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def cgroup(*names: str) -> Iterator[list[str]]:
    """What this process's control group, and each above it that has them all, says in its files of these names."""
    place = "/"
    with suppress(OSError):
        lines = (_PROC / "self/cgroup").read_text().splitlines()
        place = next((line.partition("::")[2] for line in lines if "::" in line), "/")
    folder = _CGROUP
    for part in (".", *filter(None, place.split("/"))):
        folder = folder / part
        with suppress(OSError):
            yield [(folder / name).read_text().strip() for name in names]


def _fields(text: str) -> dict[str, int]:
    """Of a file of names and numbers: /proc/meminfo and a process's status (in KiB), a control group's memory.stat."""
    return {line[0].rstrip(":"): int(line[1]) for line in map(str.split, text.splitlines())
            if len(line) > 1 and line[1].isdigit()}  # fmt: skip


def free_memory() -> int | None:
    """Bytes that this process could still have without ending another: of the machine, and of its control group."""
    free: list[int] = []
    with suppress(OSError, KeyError):
        free.append(_fields((_PROC / "meminfo").read_text())["MemAvailable"] * 1024)
    for limit, used, stat in cgroup("memory.max", "memory.current", "memory.stat"):
        if limit != "max":
            files = _fields(stat)  # those in the cache are given up before a process is ended
            free.append(int(limit) - int(used) + files.get("active_file", 0) + files.get("inactive_file", 0))
    return min(free) if free else None


def limit_memory() -> None:
    """An allocation beyond the memory that is free now fails at once, and `machine.told` says what to do.

    Granted, as Linux would, it brings the machine to a standstill for minutes until some process is ended.
    """
    free = free_memory()
    with suppress(ImportError, OSError, KeyError, ValueError):
        import resource

        data = _fields((_PROC / "self/status").read_text())["VmData"] * 1024
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        if free is not None and (hard == resource.RLIM_INFINITY or data + free < hard):
            resource.setrlimit(resource.RLIMIT_DATA, (data + free, hard))
