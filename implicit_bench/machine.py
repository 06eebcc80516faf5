"""The machine that numbers come from: its allocator, its fingerprint, who else works on it, its memory.

Imports torch and the standard library only; nothing here raises for want of /proc or glibc.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

_PROC = Path("/proc")


def folder_name(hardware: str) -> str:
    """Of a machine's records below results/: 2-core_AMD_EPYC, 2-core_Intel_Xeon_2.50GHz."""
    return "_".join(re.sub(r"\((R|TM)\)|\bProcessor\b|\bCPU\b|@", " ", hardware).split())


def is_cuda(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def set_allocator_policy(top_pad: bool = True) -> str:
    """Keep freed memory in the process: glibc's defaults can cost more in page faults than the mathematics does.

    No allocation by mmap, no trimming, the heap grows 256 MiB at a time; `top_pad=False` (glibc's own 128 KiB) is for a
    fresh process that measures memory. The first 8 or so tensors of a size still fault and add to the peak: the
    splinter of each aligned allocation goes to tcache, which holds 7, so the free piece beside it is a little short.
    Idempotent, never raises. Returns the word for the record: "glibc-tuned", "glibc-tuned, no top pad" or
    "default: <reason>".
    """
    try:
        libc = ctypes.CDLL(None)
        if sys.platform != "linux" or not hasattr(libc, "gnu_get_libc_version"):
            return "default: not glibc on Linux"
        if "malloc" in os.environ.get("LD_PRELOAD", ""):  # mallopt would then succeed and change nothing
            return "default: another malloc is preloaded"
        # M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD of <malloc.h>
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 * 2**20 if top_pad else 128 * 2**10)):
            if libc.mallopt(option, value) != 1:
                return f"default: mallopt({option}, {value}) refused"
        return "glibc-tuned" if top_pad else "glibc-tuned, no top pad"
    except Exception as error:  # a convenience must not end a run, whatever the platform does
        return f"default: {type(error).__name__}"


def cores() -> int:
    """Those that this process may run on: a queue, or a container, may have given it a few."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fingerprint() -> dict[str, Any]:
    """What must be equal before two records' times are compared; `gpu` is None without one."""
    try:
        info = (_PROC / "cpuinfo").read_text()
    except OSError:
        info = ""
    names = [x.partition(":")[2].strip() for x in info.splitlines() if x.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores(),
        "gpu": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


_held: list[int] = []  # open files, each locked for as long as this process lives
_gpu: int | None = None  # the one that this process has taken
_shares_gpu = False


def claim(names: Sequence[str], folder: Path) -> int | None:
    """Which of these devices nobody else on this machine has claimed: it is ours for as long as this process lives,
    however it ends. None: all are taken."""
    for i, name in enumerate(names):
        path = folder / f"implicit-bench-{name}.lock"
        try:
            import fcntl

            if not path.exists():
                os.close(os.open(path, os.O_CREAT, 0o644))
            handle = os.open(path, os.O_RDONLY)
        except (ImportError, OSError):  # no such locks here
            return 0
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            continue
        _held.append(handle)
        return i
    return None


def take_gpu() -> int:
    """Make the current GPU, once a process, one that no other run on this machine has; where each has one, the first,
    and no run of this process counts as alone."""
    global _gpu, _shares_gpu
    if _gpu is None:
        every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        mine = claim([str(getattr(gpu, "uuid", i)) for i, gpu in enumerate(every)], Path(tempfile.gettempdir()))
        _gpu, _shares_gpu = mine or 0, mine is None
        torch.cuda.set_device(_gpu)
    return _gpu


class Alone:
    """Was the machine otherwise idle? Start one before, read it after: all CPU time less ours and our descendants'."""

    def __init__(self, proc: Path = _PROC, root: int | None = None) -> None:
        self._proc, self._root = proc, root or os.getpid()  # whose descendants are ours
        self._begin, self._before = time.monotonic(), self._others_s()

    def _others_s(self) -> float | None:
        try:
            # user nice system idle iowait irq softirq steal; steal is other guests' work, and guest time is within user
            total = [int(x) for x in (self._proc / "stat").read_text().split()[1:9]]
            stat: dict[int, list[str]] = {}
            for path in self._proc.glob("[0-9]*/stat"):
                with suppress(OSError):  # it ended while we looked
                    stat[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()  # names may hold spaces
            ours = [self._root]
            for parent in ours:  # grows as it goes: children, theirs, ...
                ours += [pid for pid, fields in stat.items() if int(fields[1]) == parent]
            own = sum(int(x) for pid in ours for x in stat[pid][11:15])  # utime stime, and those of reaped children
            return (sum(total) - total[3] - total[4] - own) / os.sysconf("SC_CLK_TCK")
        except (OSError, KeyError, ValueError, IndexError):
            return None

    def others_cores(self) -> float | None:
        """Cores that others kept busy since the start; None without a sane /proc, or under 1 s (ticks are coarse)."""
        window, after = time.monotonic() - self._begin, self._others_s()
        if self._before is None or after is None or window < 1:
            return None
        cores = (after - self._before) / window
        return None if cores < -0.1 else max(0.0, cores)  # we used more than everyone: a /proc/stat that does not count

    def read(self) -> bool | None:
        """True when others used under a tenth of one core, and none of ours the GPU; None where that cannot be told."""
        if _shares_gpu:
            return False
        cores = self.others_cores()
        return None if cores is None else cores < 0.1


def told(error: BaseException) -> str:
    """An error in a line: its kind and the first line of what it says; of too little memory, what to do."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return "out of memory; lower recipe.batch, or recipe.eval_batch where it is the evaluation"
    return f"{type(error).__name__}: {text}"


def reset_peak_memory(device: str | torch.device = "cpu") -> bool:
    """Begin a new peak; False where the system does not allow it, and the peak is then that of the whole process."""
    if is_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with suppress(OSError):
        (_PROC / "self/clear_refs").write_text("5")
        return True
    return False


def peak_memory_mib(device: str | torch.device = "cpu") -> float | None:
    """Peak since the reset: torch's allocations on CUDA, else the process's resident set (VmHWM, None without /proc)"""
    if is_cuda(device):
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError):
        for line in (_PROC / "self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return None


def gflops(work: Callable[[], Any], flops: float, seconds: float = 0.8) -> float:
    """By the fastest of as many calls as fit, three at least, after one to warm up."""
    work()
    took: list[float] = []
    end = time.perf_counter() + seconds
    while len(took) < 3 or time.perf_counter() < end:
        before = time.perf_counter()
        work()
        took.append(time.perf_counter() - before)
    return flops / min(took) / 1e9


def convolution_gflops(device: str | torch.device = "cpu") -> float:
    """The peak that a network of convolutions can hope for: 3 x 3, 64 to 64 channels, in float32."""
    batch, wait = (512, torch.cuda.synchronize) if is_cuda(device) else (32, int)
    x, w = torch.randn(batch, 64, 32, 32, device=device), torch.randn(64, 64, 3, 3, device=device)
    return gflops(lambda: (torch.conv2d(x, w, padding=1), wait()), 2 * x.numel() * 64 * 9)
