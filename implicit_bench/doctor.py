"""`implicit-bench doctor`: what this machine and this installation are, and one remedy for everything amiss.

Nothing raises: what cannot be looked at is a finding too. What is heavy is imported where it is looked at, so that a
broken installation is told like the rest.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from . import terminal
from .limits import cgroup, free_memory
from .mirror import key_source
from .report import tables
from .terminal import progress

NAME = "implicit-bench"
GIB = 2**30
State = Literal["ok", "warn", "bad"]
MARKS = {"ok": "✓", "warn": "!", "bad": "✗"}


class Finding(NamedTuple):
    name: str
    state: State
    text: str
    remedy: str = ""  # one sentence; of what is ok, how to have more


def examine(runs: Path, data: Path) -> list[Finding]:
    """Look at everything, which takes some five seconds."""
    progress("doctor", "looking around and measuring for a few seconds")
    found: list[Finding] = []
    for name, look in CHECKS.items():
        try:
            found += list(look(Path(runs), Path(data)))
        except Exception as error:
            text = f"cannot be examined ({type(error).__name__}: {' '.join(str(error).split())[:150]})"
            found.append(Finding(name, "bad", text, f"install {NAME} again; if it stays, report it as a bug of ours"))
    return found


def show(findings: Sequence[Finding]) -> None:
    """A line a finding with its remedy below; as a table in every other format."""
    if terminal.format != "text":
        tables.show(["what", "state", "found", "remedy"], [list(finding) for finding in findings])
        return
    for name, state, text, remedy in findings:
        mark = "·" if state == "ok" and remedy else MARKS[state]
        print(terminal.hanging(f" {mark} {name:<12} ", text))
        if remedy:
            print(terminal.hanging(f"{'':16}→ ", remedy))


def _found(name: str, text: str, remedy: str, amiss: bool = True, state: State = "warn") -> Finding:
    return Finding(name, state, text, remedy) if amiss else Finding(name, "ok", text)


# ------------------------------------------------------------------------------------------------- installation


def _packages(*_: Path) -> Iterator[Finding]:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    given = importlib.metadata.metadata(NAME)
    wanted, python = given["Requires-Python"] or "", platform.python_version()
    good = SpecifierSet(wanted).contains(python, prereleases=True)
    yield _found("python", f"{python} on {platform.platform()}" + f", and not {wanted}" * (not good),
                 f"make an environment of a Python {wanted}", not good, "bad")  # fmt: skip
    all_of = [Requirement(text) for text in given.get_all("Requires-Dist") or ()]
    needed = [r for r in all_of if r.marker is None or r.marker.evaluate({"extra": ""})]
    fine = [f"{r.name} {_version(r.name)}" for r in needed if not _wrong(r)]
    yield Finding("packages", "ok", ", ".join([f"{NAME} {given['Version']}", *fine]))
    for r in filter(_wrong, needed):
        yield Finding("packages", "bad", _wrong(r), f"pip install '{r.name}{r.specifier}'")
    for extra in given.get_all("Provides-Extra") or ():
        of = [r for r in all_of if r not in needed and r.marker and r.marker.evaluate({"extra": extra})]
        lacks = [_wrong(r) for r in of if r.name != NAME and _wrong(r)]
        text = f"[{extra}] {'; '.join(lacks) or 'installed'}"
        yield Finding("extras", "ok", text, f"pip install '{NAME}[{extra}]' adds it" if lacks else "")


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _wrong(requirement: Any) -> str:
    if (version := _version(requirement.name)) is None:
        return f"{requirement.name} is not installed"
    good = requirement.specifier.contains(version, prereleases=True)
    return "" if good else f"{requirement.name} {version} is not {requirement.specifier}"


def _configs(*_: Path) -> Iterator[Finding]:
    from .schema import config_dir

    yield Finding("configs", "ok", f"{len(list(config_dir().rglob('*.yaml')))} in {config_dir()}")


def _torch(*_: Path) -> Iterator[Finding]:
    import torch

    cuda, hidden = torch.version.cuda, os.environ.get("CUDA_VISIBLE_DEVICES")
    build = f"built for CUDA {cuda}" if cuda else "built for ROCm" if torch.version.hip else "a CPU build"
    yield Finding("torch", "ok", f"{torch.__version__}, {build}, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            text = f"{torch.cuda.get_device_name(i)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
            yield _found("gpu", text, "end what holds its memory; nvidia-smi lists it", free < total / 2)
    elif not (gpus := _gpus()):
        yield _found("gpu", "none" + ", though torch could use one" * bool(cuda),
                     "look at the driver with nvidia-smi; without a GPU, a CPU build of torch is smaller", bool(cuda))
    elif cuda:
        driver = f"update the driver, or install a torch for an older CUDA than {cuda}"
        yield Finding("gpu", "bad", f"{gpus}, which torch does not see",
                      driver if hidden is None else f"unset CUDA_VISIBLE_DEVICES, which is {hidden!r}")  # fmt: skip
    else:
        yield Finding("gpu", "bad", f"{gpus}, which a CPU build of torch cannot use",
                      "install a CUDA build of the same torch, as pytorch.org says for this platform")  # fmt: skip


def _gpus() -> str:
    """GPUs by the driver's own tool; none where there is no such thing."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return "; ".join(done.stdout.strip().splitlines()) if done.returncode == 0 else ""
    return ""


def _torchvision(*_: Path) -> Iterator[Finding]:
    from .data import ensure_torchvision, torchvision_shim

    ensure_torchvision()
    import torchvision

    how = ", a CUDA build beside a CPU torch, by a shim" if torchvision_shim._library is not None else ""
    yield Finding("torchvision", "ok", f"{torchvision.__version__}{how}")


# ------------------------------------------------------------------------------------------------------ machine


def cores() -> tuple[float, str]:
    """The cores that this process may use, and what limits them."""
    from . import machine

    limits = {"": float(os.cpu_count() or 1)}
    limits["its affinity"] = float(machine.cores())
    for quota, period in (text.split() for (text,) in cgroup("cpu.max")):
        if quota != "max":
            here = float(quota) / float(period)
            limits["its control group"] = min(here, limits.get("its control group", here))
    why = min(limits, key=lambda key: limits[key])
    return limits[why], why


def _cores(*_: Path) -> Iterator[Finding]:
    import torch

    from . import machine

    (usable, why), begun = cores(), machine.cores()
    threads = max(1, int(usable))
    yield _found("cores", f"{usable:g} of {os.cpu_count() or 1}" + f", by {why}" * bool(why),
                 f"give commands gpu.threads={threads}, for they start {begun} otherwise", threads < begun)  # fmt: skip
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    low = [name for name in names if (v := os.environ.get(name, "")).isdigit() and int(v) < threads]
    text = f"torch by itself would use {torch.get_num_threads()}; train and bench use gpu.threads, else {begun}"
    yield _found("threads", "; ".join([text, *(f"{name}={os.environ[name]}" for name in low)]),
                 f"unset {' and '.join(low)}, to let scripts of your own use every core", bool(low))  # fmt: skip


def _load(*_: Path) -> Iterator[Finding]:
    from .machine import Alone

    alone, average = Alone(), os.getloadavg()[0]
    time.sleep(1.1)  # less cannot be told
    busy = alone.others_cores()
    text = f"load average {average:.1f}" if busy is None else f"others keep {busy:.1f} cores busy"
    yield _found("load", text, "wait for them before timing anything, for a bench would say: NOT alone",
                 average > 0.5 if busy is None else busy >= 0.1)  # fmt: skip


def _memory(*_: Path) -> Iterator[Finding]:
    free = free_memory()
    text = "what is free cannot be told here" if free is None else f"{free / GIB:.1f} GiB free"
    yield _found("memory", text, "end other programs, or lower recipe.batch", free is not None and free < GIB)


def _allocator(*_: Path) -> Iterator[Finding]:
    from .machine import set_allocator_policy

    word = set_allocator_policy()
    means = "freed memory stays in the process" if "tuned" in word else "page faults are part of a CPU's times"
    remedy = "unset LD_PRELOAD, or compare only runs that had the same"
    yield _found("allocator", f"{word}; {means}", remedy, "preloaded" in word)


def _peak(*_: Path) -> Iterator[Finding]:
    """float32, two operations a multiply-add; on the CPU with a thread for each usable core."""
    import torch

    from . import machine

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(cores()[0])))
    try:
        for device, n in (("cpu", 1024), ("cuda", 8192))[: 1 + torch.cuda.is_available()]:
            wait, a = torch.cuda.synchronize if device == "cuda" else int, torch.randn(n, n, device=device)
            convolution = machine.convolution_gflops(device)
            product = machine.gflops(lambda: (a @ a, wait()), 2 * n**3)  # noqa: B023
            how = f"{torch.get_num_threads()} threads" if device == "cpu" else "TF32 where torch's defaults have it"
            text = f"{device}: convolution {convolution:,.0f}, matrix product {product:,.0f} GFLOP/s ({how})"
            yield Finding("peak", "ok", text)
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------- places


def _places(runs: Path, data: Path) -> Iterator[Finding]:
    for name, path in (("runs", runs), ("data", data)):
        there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        free, elsewhere = shutil.disk_usage(there).free / 1e9, f"give commands paths.{name}=DIR"
        try:
            tempfile.TemporaryFile(dir=there).close()
            yield _found(name, f"{path}/: {free:,.1f} GB free", f"free some, or {elsewhere} on another disk", free < 2)
        except OSError as error:
            state: State = "bad" if name == "runs" else "warn"
            text = f"{path}/ cannot be written ({error.strerror})"
            yield Finding(name, state, text, f"make it writable, or {elsewhere}")


def _data(runs: Path, data: Path) -> Iterator[Finding]:
    from .data import KNOWN, describe

    for name in KNOWN:
        found = describe(name, data)
        fetch = f"{found['how']} fetches it ({found['download_mb']:.0f} MB)"
        state: State = "warn" if found["state"] == "incomplete" else "ok"
        yield Finding("data set", state, f"{name} {found['state']}", fetch if found["state"] != "present" else "")


def _wandb(runs: Path, data: Path) -> Iterator[Finding]:
    version, mode, key = _version("wandb"), os.environ.get("WANDB_MODE"), key_source()
    if version is None or mode == "disabled":
        remedy = "unset WANDB_MODE to have it back" if version else "pip install wandb, or give commands logger=none"
        yield Finding("wandb", "warn", f"{version}, switched off by WANDB_MODE" if version else "not installed", remedy)
    elif mode in ("offline", "dryrun") or not key:
        why, remedy = ("no key found", "wandb login") if not key else (f"WANDB_MODE={mode}", "unset WANDB_MODE")
        yield Finding("wandb", "ok", f"{version}, offline ({why}): runs are kept in {runs}/RUN/wandb/",
                      f"`{remedy}`, then {NAME} sync uploads them")  # fmt: skip
    else:
        project = os.environ.get("WANDB_PROJECT", NAME)
        yield Finding("wandb", "ok", f"{version}, online by {key} (not tried): runs go to project {project}")


CHECKS: dict[str, Callable[[Path, Path], Iterator[Finding]]] = {
    "packages": _packages, "configs": _configs, "torch": _torch, "torchvision": _torchvision, "load": _load,
    "cores": _cores, "memory": _memory, "allocator": _allocator, "peak": _peak, "places": _places,
    "data set": _data, "wandb": _wandb,
}  # fmt: skip
