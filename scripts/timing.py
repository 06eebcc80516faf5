"""The figures of docs/timing.md, measured here: start-up, the share of an epoch outside the step, dense solves.

usage: python scripts/timing.py [paths.data=DIR]     (MNIST is fetched if it is not there)
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from implicit_bench import clock, config, machine, record
from implicit_bench.adjoints.base import reattach
from implicit_bench.core import FixedPoint, Reduce, Residual, solve
from implicit_bench.models import Dense
from implicit_bench.report import tables
from implicit_bench.solvers import Anderson, Picard, Tsit5, gmres

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


def dense() -> tuple[list[list[str]], float, float]:
    """Dense MNIST cell, batch 32, one thread: what a solver adds to each evaluation, a linear iteration to each VJP."""
    torch.manual_seed(0)
    network, images = Dense((1, 28, 28), 10), torch.rand(32, 1, 28, 28)
    ctx = network.cell.begin(network.stem(images)).detach()
    F = FixedPoint(lambda z, t: network.cell(z, ctx, t))
    z0, t = torch.zeros(32, 128), torch.zeros(32)
    rows = []
    with torch.no_grad():
        f = clock.unit_cost(lambda: F.f(z0, t), device="cpu") * 1e3
        for solver in (Picard(), Anderson(), Tsit5()):
            for per_sample in (True, False):
                how: dict[str, Any] = {"solver": solver, "stop": Residual(1e-2), "reduce": Reduce(per_sample)}
                calls = solve(F, z0, **how).stats.calls
                us = clock.unit_cost(lambda: solve(F, z0, **how), device="cpu") * 1e3  # noqa: B023
                rows.append([type(solver).__name__.lower(), "sample" if per_sample else "batch", str(calls),
                             f"{us:,.0f} µs", f"{us / calls - f:.0f} µs"])  # fmt: skip
        z = solve(F, z0, solver=Anderson(), stop=Residual(1e-4)).value
    zs, fz = reattach(F, z)
    v = torch.randn_like(fz)
    vjp = clock.unit_cost(lambda: torch.autograd.grad(fz, zs, v, retain_graph=True), device="cpu") * 1e3
    for per_sample in (True, False):

        def linear() -> Any:
            def product(w: torch.Tensor) -> torch.Tensor:
                return w - torch.autograd.grad(fz, zs, w, retain_graph=True)[0]

            return gmres(product, v, Reduce(per_sample), rtol=1e-2, atol=0.0, max_iter=50)  # noqa: B023

        with torch.no_grad():
            products, us = linear().products, clock.unit_cost(linear, device="cpu") * 1e3
        rows.append(["gmres", "sample" if per_sample else "batch", str(products), f"{us:,.0f} µs",
                     f"{us / products - vjp:.0f} µs"])  # fmt: skip
    return rows, f, vjp


def main() -> None:
    policy = machine.set_allocator_policy()
    torch.set_num_threads(1)
    facts = machine.fingerprint()
    words = [w for w in sys.argv[1:] if "=" in w]
    config.compose("train", words)
    with tempfile.TemporaryDirectory() as name:
        first = start_up(Path(name))
        second = epoch_share(Path(name), words)
    alone = machine.Alone()
    rows, f, vjp = dense()
    print(f"{facts['cores']}-core {facts['cpu']}, torch {facts['torch']}, one thread, "
          f"allocator {policy}, alone: {alone.read()}\n")  # fmt: skip
    print(tables.markdown(["command", "median wall"], first))
    print(tables.markdown(["epoch of", "wall", "steps", "mean step", "outside", "a batch"], second))
    print(f"Dense cell, batch 32: one f {f:.1f} µs, one VJP {vjp:.1f} µs.\n")
    print(tables.markdown(["solver", "one system is a", "calls", "solve", "added a call"], rows))


if __name__ == "__main__":
    main()
