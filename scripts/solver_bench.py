"""Solvers and whole train steps against their floor and against torchdeq and torchdiffeq, interleaved in one process.

usage: python scripts/solver_bench.py [overhead|train|best|cell ...] [--device cuda] [--time 60] [--threads N] [--save]

overhead: time of a solve / (its evaluations x the time of the cell alone on its native tensors, no_grad).
train: forward and backward of one step at equal weights, residual and NFE. best: our best against theirs.
cell: the cell eager, channels_last, compiled. --save writes results/<hardware>/solvers.json and .md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from implicit_bench import clock, machine
from implicit_bench.core import FixedPoint, Reduce, Residual, solve
from implicit_bench.device import Device
from implicit_bench.models import Dense
from implicit_bench.report import tables

ROOT = Path(__file__).parent.parent


class GroupNormCell(nn.Module):
    """relu(GN(conv(relu(GN(conv(z)))) + x)): 64 channels at 16 x 16, rows independent."""

    batch_independent = True

    def __init__(self, channels: int = 64, side: int = 16):
        super().__init__()
        self.shape, self.size = (channels, side, side), channels * side * side
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = (nn.GroupNorm(8, channels) for _ in range(2))

    def native(self, z: Tensor, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(z)).relu_()
        return self.norm2(self.conv2(y).add_(x)).relu_()

    def forward(self, z: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.native(z.view(-1, *self.shape), x).flatten(1)


@dataclass
class Problem:
    """One fixed-point problem, as ours see it (flat) and as others do (native)."""

    name: str
    flat: Callable[[Tensor, Tensor], Tensor]
    native: Callable[[Tensor], Tensor]
    start: Tensor  # native
    reduce: Reduce
    module: nn.Module

    @property
    def F(self) -> FixedPoint:
        return FixedPoint(self.flat)


def radius(f: Callable[[Tensor], Tensor], z: Tensor, rounds: int = 30) -> float:
    """Spectral radius of df/dz at z by power iteration with VJPs."""
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        out = f(z)
    v, growth = torch.randn_like(z), 0.0
    for _ in range(rounds):
        v = torch.autograd.grad(out, z, v / v.norm(), retain_graph=True)[0]
        growth = float(v.norm())
    return growth


def dense(device: torch.device) -> Problem:
    network = Dense((1, 28, 28), 10).to(device)
    x = torch.rand(32, 1, 28, 28, device=device)
    with torch.no_grad():
        ctx = network.cell.begin(network.stem(x))
    t = torch.zeros(32, device=device)
    return Problem("dense", lambda z, t: network.cell(z, ctx, t), lambda z: network.cell(z, ctx, t),
                   torch.zeros(32, network.cell.size, device=device), Reduce(True), network.cell)  # fmt: skip


def groupnorm(device: torch.device) -> Problem:
    cell = GroupNormCell().to(device)
    x = torch.randn(64, *cell.shape, device=device)
    start = torch.zeros_like(x)
    with torch.no_grad():
        for _ in range(6):  # scale the last norm until the radius at the fixed point is .9
            z = start
            for _ in range(60):
                z = cell.native(z, x)
            cell.norm2.weight *= (0.9 / radius(lambda z: cell.native(z, x), z)) ** 0.8
    return Problem("groupnorm", lambda z, t: cell(z, x, t), lambda z: cell.native(z, x), start, Reduce(True), cell)


CELLS = {"dense": dense, "groupnorm": groupnorm}


def our_solvers() -> dict[str, tuple[Any, int]]:
    """Solver and the steps that make about twenty evaluations."""
    from implicit_bench import solvers

    wanted = {"picard": 19, "anderson": 19, "broyden": 19, "vcab3": 14, "bosh3": 6, "dopri5": 3, "tsit5": 3}
    classes = {name.lower(): getattr(solvers, name) for name in solvers.__all__}
    return {name: (classes[name](), steps) for name, steps in wanted.items() if name in classes}


def ours(problem: Problem, solver: Any, steps: int) -> Callable[[], int]:
    stop, z0 = Residual(1e-12, max_steps=steps), problem.start.flatten(1)
    return lambda: solve(problem.F, z0, solver=solver, stop=stop, reduce=problem.reduce).stats.calls


def peers(problem: Problem) -> dict[str, Callable[[], int]]:
    """torchdeq's root solvers and torchdiffeq's, each at about twenty evaluations."""
    rows: dict[str, Callable[[], int]] = {}
    try:
        from torchdeq.solver import get_solver
    except ImportError:
        print("torchdeq is not installed (pip install -e '.[peers]'): its rows are left out")
    else:
        for ours_, theirs in (("picard", "fixed_point_iter"), ("anderson", "anderson"), ("broyden", "broyden")):
            whole = get_solver(theirs)
            count = {"broyden": 19}.get(theirs, 20)
            rows[f"torchdeq {ours_}"] = _torchdeq(problem, whole, count, 20)
    from torchdiffeq import odeint

    calls = [0]

    def F(t: Tensor, z: Tensor) -> Tensor:
        calls[0] += 1
        return problem.native(z) - z

    times = torch.tensor([0.0, 1.0], device=problem.start.device)

    def integrate(method: str) -> Callable[[], int]:
        def run() -> int:
            calls[0] = 0
            odeint(F, problem.start, times, method=method, rtol=1e-3, atol=1e-3)
            return calls[0]

        return run

    return rows | {f"torchdiffeq {m}": integrate(m) for m in ("bosh3", "dopri5")}


def _torchdeq(problem: Problem, whole: Any, max_iter: int, calls: int) -> Callable[[], int]:
    def run() -> int:
        whole(problem.native, problem.start, max_iter=max_iter, tol=1e-12, stop_mode="rel")
        return calls

    return run


def timed(run: Callable[[], int], device: torch.device) -> Callable[[], dict[str, float]]:
    timer = clock.StepTimer(device)

    def measure() -> dict[str, float]:
        timer.start()
        calls = run()
        timer.lap("ms")
        return {"ms": timer.read()["ms"] / calls}

    return measure


@torch.no_grad()
def overhead(device: torch.device, seconds: float, cells: list[str]) -> list[dict[str, Any]]:
    found = []
    for name in cells:
        torch.manual_seed(0)
        problem = CELLS[name](device)

        def floor(problem: Problem = problem) -> int:
            z = problem.start
            for _ in range(20):
                z = problem.native(z)
            return 20

        rows = {"cell alone": floor} | {n: ours(problem, s, k) for n, (s, k) in our_solvers().items()} | peers(problem)
        counts = {n: run() for n, run in rows.items()}
        samples = clock.interleave({n: timed(run, device) for n, run in rows.items()}, seconds=seconds, rounds=400)
        alone = samples.rows["cell alone"]["ms"]
        print(f"{name}: one f {clock.summary(alone)['median'] * 1e3:,.0f} us, {samples.rounds} rounds", flush=True)
        for row, values in samples.rows.items():
            r = clock.ratio(values["ms"], alone)
            added = (clock.summary(values["ms"])["median"] - clock.summary(alone)["median"]) * 1e3
            found.append({"cell": name, "row": row, "calls": counts[row], "us_a_call": clock.summary(values["ms"])["median"] * 1e3,
                          "overhead": r.value, "low": r.low, "high": r.high, "added_us": added, "rounds": r.n})  # fmt: skip
            print(f"  {row:20} {counts[row]:3} calls  x{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]  +{added:,.0f} us")
        found += [{"cell": name, "row": row, "failed": why} for row, why in samples.failed.items()]
        if samples.failed:
            print(samples.failed)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="overhead train best cell; all of them without any")
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--time", type=float, default=60.0, help="seconds for each table")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    device = Device(args.device, threads=args.threads)
    facts = device.environment()
    alone = machine.Alone()
    began = time.time()
    found = {"overhead": overhead(device.torch, args.time, args.cells.split(","))}
    facts["alone"] = alone.read()
    print(f"{facts['hardware']}, torch {facts['torch']}, {device.threads} threads, allocator {facts['allocator']}, "
          f"alone: {facts['alone']}, {time.time() - began:.0f} s")  # fmt: skip
    if args.save:
        folder = ROOT / "results" / str(facts["hardware"]).replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "solvers.json").write_text(json.dumps({"environment": facts, **found}, indent=1))


if __name__ == "__main__":
    main()
