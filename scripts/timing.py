"""The figures of docs/timing.md, measured here: start-up, the share of an epoch outside the step.

usage: python scripts/timing.py [paths.data=DIR]     (MNIST is fetched if it is not there)
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from implicit_bench import clock, config, machine, record
from implicit_bench.report import tables

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*words: str, times: int = 5) -> float:
    """Median seconds of a whole command."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        whole = [sys.executable, "-m", "implicit_bench", *words]
        subprocess.run(whole, check=True, capture_output=True, env=ENVIRONMENT)
        found.append(time.perf_counter() - began)
    return clock.summary(found)["median"]


def start_up(folder: Path) -> list[list[str]]:
    runs = f"paths.runs={folder}"
    one = ("train", "recipe.max_steps=1", "dataset.val_size=0", "gpu.threads=1", "force=true", runs)
    return [
        ["`--help`", f"{command('--help'):.2f} s"],
        ["`list`", f"{command('list'):.2f} s"],
        ["`train`, one step, its test and its record, logger=none", f"{command(*one, 'logger=none', times=3):.2f} s"],
        ["the same with W&B offline", f"{command(*one, times=3):.2f} s"],
    ]


def epoch_share(folder: Path, words: list[str]) -> list[list[str]]:
    rows = []
    for model in ("deq", "neural_ode", "explicit"):
        given = ["train", f"model={model}", "dataset=mnist", "recipe.epochs=1", "gpu.threads=1", "logger=none", *words]
        whole = [sys.executable, "-m", "implicit_bench", *given, f"paths.runs={folder}"]
        subprocess.run(whole, check=True, env=ENVIRONMENT, stdout=sys.stderr)
        run = next(folder.glob(f"{model}-mnist-*"))
        rec = record.read_record(run)
        # every step's time is in the checkpoint: the sum, not the median, is what an epoch is made of
        times = torch.load(run / "last.pt", weights_only=True)["progress"]["times"]["step"]
        epoch, data_ms = rec["timing"]["epoch_s"], rec["timing"]["data_ms"]["median"]
        mean = sum(times) / len(times)
        rows.append([f"{model}, MNIST, batch 32", f"{epoch:.2f} s", f"{len(times):,}", f"{mean:.2f} ms",
                     f"{1 - sum(times) / 1e3 / epoch:.1%}", f"{data_ms * 1e3:.0f} µs"])  # fmt: skip
    return rows


def main() -> None:
    policy = machine.set_allocator_policy()
    torch.set_num_threads(1)
    facts = machine.fingerprint()
    alone = machine.Alone()
    words = [w for w in sys.argv[1:] if "=" in w]
    config.compose("train", words)
    with tempfile.TemporaryDirectory() as name:
        first = start_up(Path(name))
        second = epoch_share(Path(name), words)
    print(f"{facts['cores']}-core {facts['cpu']}, torch {facts['torch']}, one thread, "
          f"allocator {policy}, alone: {alone.read()}\n")  # fmt: skip
    print(tables.markdown(["command", "median wall"], first))
    print(tables.markdown(["epoch of", "wall", "steps", "mean step", "outside", "a batch"], second))


if __name__ == "__main__":
    main()
