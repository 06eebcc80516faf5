"""Small real runs for the tests: digits, one thread, no W&B."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import forked
import torch

from implicit_bench import config
from implicit_bench.train.command import Outcome, train


def words(tmp: Path, *more: str) -> list[str]:
    return ["logger=none", "gpu.threads=1", f"paths.runs={tmp / 'runs'}", *more]


def run(tmp: Path, *more: str) -> Outcome:
    given = words(tmp, *more)
    return train(config.compose("train", given), given)


def sweep(tmp: Path, *more: str, **environment: str) -> forked.Popen:
    """`train -m` in a process of its own, in that folder."""
    argv = [sys.executable, "-m", "implicit_bench", "train", "-m", "logger=none", *more]
    return forked.Popen(argv, cwd=tmp, env={**os.environ, **environment})


def by_seed(tmp: Path) -> dict[int, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in tmp.glob("runs/*/record.json")]
    return {rec["config"]["seed"]: rec for rec in found if rec["command"] == "train"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "last.pt", weights_only=True)["model"]


def same_weights(a: Path, b: Path) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
