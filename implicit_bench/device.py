from __future__ import annotations

import contextlib
import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from . import machine
from .limits import limit_memory
from .machine import cores
from .world import here, world


def _commit() -> str | None:
    """The commit of the checkout that implicit-bench runs from, with + when it is not clean; None when installed."""
    here = Path(__file__).parent.parent
    if not (here / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(here)]
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5)
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, timeout=5).returncode
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+" if dirty else "") if commit.returncode == 0 else None


M = TypeVar("M", bound=torch.nn.Module)


class Device:
    """The gpu group: where and in which precision a run computes.

    device: auto is CUDA where there is a GPU. dtype: float32 and float64 are the dtype of everything; bfloat16 is
    autocast over float32 weights (norms and residuals stay float32). threads: CPU threads, None = all cores
    that this process may run on.
    ddp: one run over all processes that torchrun has started; each has its part of every batch, and of the cores.
    channels_last: None is yes on a CPU, where it measures fastest, if the network's flat states have that layout too.
    """

    def __init__(self, device: Literal["auto", "cpu", "cuda"] = "auto",
                 dtype: Literal["float32", "float64", "bfloat16"] = "float32", threads: int | None = None,
                 channels_last: bool | None = None, compile: bool = False, deterministic: bool = False,
                 allocator: Literal["tuned", "default"] = "tuned", ddp: bool = False):  # fmt: skip
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("gpu=cuda, but torch sees no CUDA device here; use gpu=auto or gpu=cpu")
        if threads is not None and threads < 1:
            raise ValueError(f"gpu.threads={threads} must be at least 1")
        if threads is not None and threads > 1024:  # torch dies of very many
            raise ValueError(f"gpu.threads={threads} is too many; null is one for each of the {cores()} cores")
        kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.torch = torch.device(kind)
        self.ddp, self.sharers = ddp, here() if ddp else 1  # processes of this run on this machine
        self.threads = threads or max(1, cores() // self.sharers)
        self.dtype = getattr(torch, dtype)
        self.channels_last, self.compile, self.deterministic = channels_last, compile, deterministic
        self.wants_policy = allocator == "tuned" and kind == "cpu"

    def settings(self) -> dict[str, Any]:
        """What of the group changes numbers or times, resolved for this machine: goes into the run's identity."""
        return {"device": self.torch.type, "dtype": str(self.dtype).removeprefix("torch."),
                "threads": self.threads * self.sharers, "channels_last": self.channels_last, "compile": self.compile,
                "deterministic": self.deterministic,
                "allocator": "tuned" if self.wants_policy else "default"}  # fmt: skip

    def begin(self) -> str:
        """Apply the settings to this process; returns the allocator's policy, for the record."""
        policy = machine.set_allocator_policy() if self.wants_policy else "default"
        torch.set_num_threads(self.threads)
        if self.torch.type == "cuda":
            machine.take_gpu()
        else:
            limit_memory()
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(self.deterministic)
        return policy

    def environment(self) -> dict[str, Any]:
        """`begin`, and what a record says of the machine: hardware names the folder of committed records."""
        allocator = self.begin()
        facts = machine.fingerprint()
        cuda = self.torch.type == "cuda"
        hardware = torch.cuda.get_device_name(self.torch) if cuda else f"{facts['cores']}-core {facts['cpu']}"
        versions = {}
        for package in ("implicit-bench", "torchdiffeq", "hydra-core", "omegaconf", "wandb"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        return {"hardware": hardware, **facts, "world_size": world().size, "allocator": allocator, "versions": versions,
                "git": _commit(), "alone": None}  # fmt: skip

    def place(self, model: M) -> M:
        """The model on this device, in its dtype and memory layout, its cell to be compiled at its first call."""
        if self.compile:
            model.layer.cell.compile()  # type: ignore[union-attr]
        model = model.to(self.torch, torch.float64 if self.dtype == torch.float64 else torch.float32)
        last = self.channels_last
        if last is None:
            last = self.torch.type == "cpu" and any(hasattr(m, "channels_last") for m in model.modules())
        return model.to(memory_format=torch.channels_last) if last else model  # type: ignore[call-overload]

    def images(self, x: torch.Tensor) -> torch.Tensor:
        """A batch (B, C, H, W) in the dtype and memory layout of the model."""
        if self.dtype == torch.float64:
            x = x.double()
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.bfloat16:
            return torch.autocast(self.torch.type, torch.bfloat16)
        return contextlib.nullcontext()
