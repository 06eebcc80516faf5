"""Small real runs for the tests: digits, one thread, no W&B."""

from __future__ import annotations

from pathlib import Path

import torch

from implicit_bench import config
from implicit_bench.train.command import Outcome, train


def words(tmp: Path, *more: str) -> list[str]:
    return ["logger=none", "gpu.threads=1", f"paths.runs={tmp / 'runs'}", *more]


def run(tmp: Path, *more: str) -> Outcome:
    given = words(tmp, *more)
    return train(config.compose("train", given), given)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "last.pt", weights_only=True)["model"]


def same_weights(a: Path, b: Path) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
