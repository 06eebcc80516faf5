"""The figures of docs/timing.md, measured here: start-up, the share of an epoch outside the step, augmentation.

usage: python scripts/timing.py [paths.data=DIR]     (MNIST is fetched if it is not there)
       python scripts/timing.py augment              the last part alone
       python scripts/timing.py timer                what timing a step costs, alone
       python scripts/timing.py alike [key=value]    a model against itself, 20 times, kept in results/
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import page
import torch

from implicit_bench import clock, config, machine, record
from implicit_bench.bench.rows import initial_ms
from implicit_bench.data import Dataset, Raw, ensure_torchvision
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
    rows = [
        ["`--help`", f"{command('--help'):.2f} s"],
        ["`list`", f"{command('list'):.2f} s"],
        ["`list networks`", f"{command('list', 'networks'):.2f} s"],
        ["a Tab after `train solver.`", f"{command('complete', 'implicit-bench train solver.'):.2f} s"],
        ["`train`, one step, its test and its record, logger=none", f"{command(*one, 'logger=none', times=3):.2f} s"],
        ["the same with W&B offline", f"{command(*one, times=3):.2f} s"],
    ]
    trained = record.read_record(record.find(folder, "last"))
    for k in range(1000):
        record.write_record(folder / "many" / f"deq-digits-s{k}-{k:010x}", {**trained, "run_id": f"{k:010x}"})
    many = command("runs", f"records={folder / 'many'}")
    return [*rows, ["`runs` over 1,000 records", f"{many:.2f} s"]]


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


class Noise(Dataset):
    """Random pixels in CIFAR-10's shape: what augmenting costs does not depend on them."""

    shape, classes = (3, 32, 32), 10

    def read(self, root: Path) -> Raw:
        x = torch.randint(256, (10_000, *self.shape), dtype=torch.uint8)
        return Raw(x, torch.arange(10_000) % 10, x[:10], torch.arange(10))


def augmentation(batch: int = 128, images: int = 2048, rounds: int = 60) -> list[list[str]]:
    """Crop, flip and normalise CIFAR-10's images: a batch at once on one core, against torchvision's v2 transforms an
    image at a time on all. Those are timed on one core too, and counted as if as many workers cost nothing more."""
    ensure_torchvision()
    from torchvision.transforms import v2

    cores = os.cpu_count() or 1
    data = Noise(mean=[0.4914, 0.4822, 0.4465], std=[0.2470, 0.2435, 0.2616], flip=0.5, pad=4).load("")
    one = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True),
                      v2.Normalize([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])])  # fmt: skip
    order = data.order(len(data.train), 0, 1)

    def ours() -> None:
        for _ in data.batches(data.train, batch, order, 0, images // batch, augment=(0, 1)):
            pass

    def theirs() -> None:
        for index in order[:images].split(batch):
            torch.stack([one(image) for image in data.train.x[index]])

    def ms_an_image(run: Callable[[], None], workers: int) -> dict[str, float]:
        began = time.perf_counter()
        run()
        return {"ms": (time.perf_counter() - began) * 1e3 / images / workers}

    rows = {"theirs": lambda: ms_an_image(theirs, cores), "ours": lambda: ms_an_image(ours, 1)}
    for run in rows.values():
        run()
    times = clock.interleave(rows, rounds=rounds).rows
    ratio = clock.ratio(times["theirs"]["ms"], times["ours"]["ms"])
    speed = [f"{1e3 / clock.summary(times[name]['ms'])['median']:,.0f}" for name in ("ours", "theirs")]
    what = f"CIFAR-10, batch {batch}: crop, flip, normalise"
    return [[what, *speed, f"{ratio.value:.1f}× [{ratio.low:.1f}, {ratio.high:.1f}]"]]


def timer_cost() -> list[list[str]]:
    """The marks of a step and their reading, against the cheapest step that is timed here."""
    timer = clock.StepTimer("cpu")

    def step() -> None:
        timer.start()
        for name in ("forward", "backward", "optimizer"):
            timer.lap(name)
        timer.drain()

    us = clock.unit_cost(step, device="cpu") * 1e3
    words = ("model=explicit", "gpu.threads=1")
    (ms,) = initial_ms([config.compose("bench", words).config], seconds=5)
    return [["explicit, digits, batch 32", f"{us:.2f} µs", f"{ms:.2f} ms", f"{us / ms / 1e3:.2%}"]]


def alike(words: list[str], times: int = 20) -> None:
    """`bench model=cdeq,cdeq` so often, each in a process of its own: the intervals of its ratio of training steps."""
    given = ["bench", "model=cdeq,cdeq", "memory=false", "logger=none", "gpu.threads=1", *words]
    found, environments = [], []
    with tempfile.TemporaryDirectory() as name:
        whole = [sys.executable, "-m", "implicit_bench", *given, f"paths.runs={name}"]
        for k in range(times):
            subprocess.run(whole, check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            rec = record.read_record(next(Path(name).glob("bench-*")))
            (ratio,) = rec["ratios"]
            found.append({key: ratio[key] for key in ("value", "low", "high", "n", "verdict")})
            environments.append(rec["environment"])
            print(f"{k + 1}/{times} {ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]", file=sys.stderr)
    facts = {**environments[0], "alone": [e["alone"] for e in environments]}
    file = page.ROOT / "results" / machine.folder_name(facts["hardware"]) / "alike.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"words": given, "environment": facts, "ratios": found}, indent=1) + "\n")
    inside = sum(r["low"] <= 1 <= r["high"] for r in found)
    widths = sorted((r["high"] - r["low"]) / 2 / r["value"] for r in found)
    meet = sum(a["low"] <= b["high"] and b["low"] <= a["high"] for a, b in pairwise(found))
    print(f"a model against itself: {inside} of {times} intervals have 1 in them; half-width "
          f"{statistics.median(widths):.1%} (median), {widths[-1]:.1%} at most; of {times - 1} successive pairs of "
          f"intervals {meet} overlap")  # fmt: skip


def main() -> None:
    words = [w for w in sys.argv[1:] if "=" in w]
    if "alike" in sys.argv:
        alike(words)
        return
    policy = machine.set_allocator_policy()
    torch.set_num_threads(1)
    facts = machine.fingerprint()
    alone = machine.Alone()
    config.compose("train", words)
    first, second, third = [], [], []
    if not {"augment", "timer"} & {*sys.argv}:
        with tempfile.TemporaryDirectory() as name:
            first = start_up(Path(name))
            second = epoch_share(Path(name), words)
    if "timer" not in sys.argv:
        third = augmentation()
    print(f"{facts['cores']}-core {facts['cpu']}, torch {facts['torch']}, one thread, "
          f"allocator {policy}, alone: {alone.read()}\n")  # fmt: skip
    if first:
        print(tables.markdown(["command", "median wall"], first))
        print(tables.markdown(["epoch of", "wall", "steps", "mean step", "outside", "a batch"], second))
    if "augment" not in sys.argv:
        print(tables.markdown(["step of", "its timer", "median step", "share"], timer_cost()))
    if third:
        theirs = f"torchvision v2, an image at a time, {os.cpu_count()} cores"
        print(tables.markdown(["images/s", "here, one core", theirs, "ratio"], third))


if __name__ == "__main__":
    main()
