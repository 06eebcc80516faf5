"""Solvers and whole train steps against their floor and against torchdeq and torchdiffeq, interleaved in one process.

usage: python scripts/solver_bench.py [overhead|train|best|cell ...] [--device cuda] [--time 60] [--threads N] [--save]

overhead: time of a solve / (its evaluations x the time of the cell alone on its native tensors, no_grad).
train: forward and backward of one step at equal weights, residual and NFE. best: our best against theirs.
cell: the cell eager, channels_last, compiled. --save adds to results/<hardware>/solvers.json and .md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from implicit_bench import clock, machine
from implicit_bench.adjoints import IFT, Backsolve, Solve, Unroll
from implicit_bench.core import EndTime, FixedPoint, Reduce, Residual, solve
from implicit_bench.device import Device
from implicit_bench.models import Dense, Mdeq
from implicit_bench.report import tables
from implicit_bench.solvers import Anderson, Bosh3, Broyden, Dopri5, Picard, Tsit5, Vcab3

ROOT = Path(__file__).parent.parent


class GroupNormCell(nn.Module):
    """relu(GN(conv(relu(GN(conv(z)))) + x)): 64 channels at 16 x 16, rows independent."""

    batch_independent = True

    def __init__(self, channels: int = 64, side: int = 16):
        super().__init__()
        self.shape, self.size = (channels, side, side), channels * side * side
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = (nn.GroupNorm(8, channels) for _ in range(2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(z)).relu_()
        return self.norm2(self.conv2(y).add_(x)).relu_()


@dataclass
class Problem:
    """One fixed-point problem, as ours see it (flat) and as others do (native)."""

    name: str
    flat: Callable[[Tensor, Tensor], Tensor]
    native: Callable[[Tensor], Tensor]
    start: Tensor  # native
    reduce: Reduce
    module: nn.Module
    alone: Callable[[Any], Any] | None = None  # f on its own tensors, where a state is several
    alone_start: Any = None

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


Layout = torch.memory_format
CONTIGUOUS = torch.contiguous_format


def dense(device: torch.device, layout: Layout = CONTIGUOUS) -> Problem:
    network = Dense((1, 28, 28), 10).to(device)
    x = torch.rand(32, 1, 28, 28, device=device)
    with torch.no_grad():
        ctx = network.cell.begin(network.stem(x))
    t = torch.zeros(32, device=device)
    return Problem("dense", lambda z, t: network.cell(z, ctx, t), lambda z: network.cell(z, ctx, t),
                   torch.zeros(32, network.cell.size, device=device), Reduce(True), network.cell)  # fmt: skip


def groupnorm(device: torch.device, layout: Layout = CONTIGUOUS) -> Problem:
    cell = GroupNormCell().to(device, memory_format=layout)
    x = torch.randn(64, *cell.shape, device=device).contiguous(memory_format=layout)
    start = torch.zeros_like(x)
    with torch.no_grad():
        for _ in range(6):  # scale the last norm until the radius at the fixed point is .9
            z = start
            for _ in range(60):
                z = cell(z, x)
            cell.norm2.weight *= (0.9 / radius(lambda z: cell(z, x), z)) ** 0.8
    return Problem("groupnorm", lambda z, t: cell(z.view_as(x), x).flatten(1), lambda z: cell(z, x), start,
                   Reduce(True), cell)  # fmt: skip


def mdeq_small(device: torch.device, layout: Layout = CONTIGUOUS) -> Problem:
    """Weights after 300 training steps on CIFAR-10 (the first 250 unrolled 5 times); a batch of 64, of noise."""
    network = Mdeq((3, 32, 32), 10)
    network.load_state_dict(torch.load(ROOT / "scripts/mdeq_small_300.pt", weights_only=True))
    network = network.to(device, memory_format=layout).eval()
    cell, scales = network.cell, network.cell.scales
    with torch.no_grad():
        images = torch.randn(64, 3, 32, 32, device=device).contiguous(memory_format=layout)
        ctx = cell.begin(network.stem(images))
    zero = torch.zeros(64, cell.size, device=device)
    return Problem("mdeq_small", lambda z, t: cell(z, ctx, t), lambda z: cell(z, ctx, None), zero, Reduce(False), cell,
                   lambda zs: cell.branches(zs, ctx), scales.unpack(zero))  # peers get the flat state, as we do


CELLS = {"dense": dense, "groupnorm": groupnorm, "mdeq_small": mdeq_small}


SOLVERS: dict[str, tuple[Any, int]] = {  # the steps that make about twenty evaluations
    "picard": (Picard(), 19), "anderson": (Anderson(), 19), "broyden": (Broyden(), 19), "vcab3": (Vcab3(), 14),
    "bosh3": (Bosh3(), 6), "dopri5": (Dopri5(), 3), "tsit5": (Tsit5(), 3),
}  # fmt: skip


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
            f, z = problem.alone or problem.native, problem.start if problem.alone is None else problem.alone_start
            for _ in range(20):
                z = f(z)
            return 20

        rows = {"cell alone": floor} | {n: ours(problem, s, k) for n, (s, k) in SOLVERS.items()} | peers(problem)
        counts = {n: run() for n, run in rows.items()}
        samples = clock.interleave({n: timed(run, device) for n, run in rows.items()}, seconds=seconds, rounds=400)
        alone = samples.rows["cell alone"]["ms"]
        print(f"{name}: one f {clock.summary(alone)['median'] * 1e3:,.0f} us, {samples.rounds} rounds", flush=True)
        for row, values in samples.rows.items():
            r = clock.ratio(values["ms"], alone)
            added = (clock.summary(values["ms"])["median"] - clock.summary(alone)["median"]) * 1e3
            us = clock.summary(values["ms"])["median"] * 1e3
            found.append({"cell": name, "row": row, "calls": counts[row], "us_a_call": us, "added_us": added,
                          "overhead": r.value, "low": r.low, "high": r.high, "rounds": r.n})  # fmt: skip
            print(f"  {row:20} {counts[row]:3} calls  x{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]  +{added:,.0f} us")
        found += [{"cell": name, "row": row, "failed": why} for row, why in samples.failed.items()]
        if samples.failed:
            print(samples.failed)
    return found


@dataclass
class Step:
    """One forward and backward; counts and quality are read in a run of its own."""

    run: Callable[[], Tensor]  # -> z, with parameter gradients left in .grad
    problem: Problem
    group: str

    def __call__(self) -> int:
        for p in self.problem.module.parameters():
            p.grad = None
        self.run()
        return 1

    def gradient(self) -> Tensor:
        self()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.problem.module.parameters()]
        return torch.cat([g.flatten() for g in grads])

    def quality(self) -> dict[str, float]:
        """Evaluations of f with and without a graph, relative residual of what came out."""
        calls = [0]
        handle = self.problem.module.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        z = self.run().detach().view_as(self.problem.start)
        handle.remove()
        with torch.no_grad():
            fz = self.problem.native(z)
            rows = (fz - z).flatten(1).norm(dim=1) / fz.flatten(1).norm(dim=1)
        return {"calls": calls[0], "residual": float(rows.median())}


def our_step(problem: Problem, solver: Any, stop: Any, adjoint: Any, ode: bool = False) -> Callable[[], Tensor]:
    F: Any = (lambda z, t: problem.flat(z, t) - z) if ode else problem.F
    z0, weight = problem.start.flatten(1), _weight(problem).flatten(1)
    forward = Solve(solver, stop, problem.reduce if not ode else Reduce(False))
    wrt = [p for p in problem.module.parameters() if p.requires_grad] if ode else ()

    def run() -> Tensor:
        z = adjoint(F, z0, forward, wrt)[0]
        (z * weight).sum().backward()
        return z

    return run


def _weight(problem: Problem) -> Tensor:
    """A fixed cotangent of the size of a mean loss's."""
    generator = torch.Generator(problem.start.device).manual_seed(1)
    return torch.randn(problem.start.shape, generator=generator, device=problem.start.device) / problem.start.numel()


def torchdeq_step(problem: Problem, f: str, b: str, n: int, m: int, f_tol: float, b_tol: float) -> Callable[[], Tensor]:
    from torchdeq import get_deq

    deq = get_deq(f_solver=f, f_max_iter=n, f_tol=f_tol, f_stop_mode="rel",
                  b_solver=b, b_max_iter=m, b_tol=b_tol, b_stop_mode="rel", ift=True)  # fmt: skip
    weight = _weight(problem)

    def run() -> Tensor:
        out, _ = deq(problem.native, problem.start)
        (out[-1] * weight).sum().backward()
        return out[-1]

    return run


def torchdiffeq_step(problem: Problem, adjoint: bool) -> Callable[[], Tensor]:
    from torchdiffeq import odeint, odeint_adjoint

    times, weight = torch.tensor([0.0, 1.0], device=problem.start.device), _weight(problem)
    params = tuple(p for p in problem.module.parameters() if p.requires_grad)
    how: dict[str, Any] = {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3}

    def F(t: Tensor, z: Tensor) -> Tensor:
        return problem.native(z) - z

    def run() -> Tensor:
        if adjoint:
            z = odeint_adjoint(F, problem.start, times, adjoint_params=params, **how)[-1]
        else:
            z = odeint(F, problem.start, times, **how)[-1]
        (z * weight).sum().backward()
        return z

    return run


def step_pairs(problem: Problem) -> dict[str, Step]:
    """Equal evaluations both ways: 15 forward, one to re-attach, 8 VJPs in the linear solve."""
    n, m = 15, 8
    rows = {}
    for name, theirs in (("picard", "fixed_point_iter"), ("anderson", "anderson"), ("broyden", "broyden")):
        solver = {"picard": Picard(), "anderson": Anderson(), "broyden": Broyden()}[name]
        linear = "gmres" if name == "broyden" else name
        b = m + 1 if name != "broyden" else m
        stop, adjoint = Residual(1e-12, max_steps=n - 1), IFT(1e-12, max_iter=m, linear=linear)
        rows[f"{name} ours"] = Step(our_step(problem, solver, stop, adjoint), problem, name)
        f_max = n - 1 if name == "broyden" else n
        rows[f"{name} torchdeq"] = Step(torchdeq_step(problem, theirs, theirs, f_max, b, 1e-12, 1e-12), problem, name)
    dopri5 = Dopri5(1e-3, 1e-3, controller="i")
    for name, adjoint in (("dopri5 direct", Unroll()), ("dopri5 adjoint", Backsolve())):
        rows[f"{name} ours"] = Step(our_step(problem, dopri5, EndTime(1.0), adjoint, ode=True), problem, name)
        rows[f"{name} torchdiffeq"] = Step(torchdiffeq_step(problem, "adjoint" in name), problem, name)
    return rows


def best_rows(problem: Problem) -> dict[str, Step]:
    """Everything either side offers, each stopped at a relative residual of 1e-3 and a linear one of 1e-2."""
    rows = {}
    for name, solver in (("picard", Picard()), ("anderson", Anderson()), ("broyden", Broyden()), ("vcab3", Vcab3())):
        for linear in ("gmres", "anderson", "picard"):
            run = our_step(problem, solver, Residual(1e-3, max_steps=100), IFT(1e-2, max_iter=50, linear=linear))
            rows[f"ours {name} + {linear}"] = Step(run, problem, "best")
    for f in ("fixed_point_iter", "anderson", "broyden"):
        for b in ("fixed_point_iter", "anderson", "broyden"):
            rows[f"torchdeq {f} + {b}"] = Step(torchdeq_step(problem, f, b, 100, 50, 1e-3, 1e-2), problem, "best")
    return rows


def train(device: torch.device, seconds: float, cells: list[str],
          make: Callable[[Problem], dict[str, Step]]) -> list[dict[str, Any]]:  # fmt: skip
    found = []
    for name in cells:
        torch.manual_seed(0)
        problem = CELLS[name](device)
        rows = make(problem)
        exact = Step(our_step(problem, Anderson(), Residual(1e-6, max_steps=200), IFT(1e-5, max_iter=200)), problem, "")
        truths = {False: exact.gradient()}
        facts = {}
        for row, step in rows.items():
            ode = "dopri5" in row
            if ode not in truths:  # the gradient of another problem
                fine = our_step(problem, Dopri5(1e-5, 1e-5), EndTime(1.0), Unroll(checkpoint=True), ode=True)
                truths[ode] = Step(fine, problem, "").gradient()
            error = float((step.gradient() - truths[ode]).norm() / truths[ode].norm())
            facts[row] = {**step.quality(), "gradient_error": error}
        samples = clock.interleave({n: timed(step, device) for n, step in rows.items()}, seconds=seconds, rounds=200)
        print(f"{name}: {samples.rounds} rounds", flush=True)
        for row, values in samples.rows.items():
            ms = clock.summary(values["ms"])["median"]
            first = next(n for n, s in rows.items() if s.group == rows[row].group)
            r = clock.ratio(values["ms"], samples.rows[first]["ms"])
            found.append({"cell": name, "row": row, "ms": ms, "against": first, "ratio": r.value, "low": r.low,
                          "high": r.high, "rounds": r.n, **facts[row]})  # fmt: skip
            print(f"  {row:34} {ms:9.2f} ms  x{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]  {facts[row]['calls']:3} f  "
                  f"residual {facts[row]['residual']:.1e}  gradient error {facts[row]['gradient_error']:.1e}")
        for row, why in samples.failed.items():
            print(f"  {row:34} failed: {why}")
    return found


LAPS = ("f ms", "f with graph ms", "VJP ms")
VARIANTS = {"eager": (CONTIGUOUS, False), "channels_last": (torch.channels_last, False),
            "compiled": (CONTIGUOUS, True), "channels_last, compiled": (torch.channels_last, True)}  # fmt: skip


def variants(device: torch.device, seconds: float, cells: list[str]) -> list[dict[str, Any]]:
    """f without and with a graph, and a VJP, of the cell as it is laid out and compiled."""
    found = []
    for name in cells:
        rows = {}
        for variant, (layout, compiled) in VARIANTS.items():
            torch.manual_seed(0)
            problem = CELLS[name](device, layout)
            if compiled:
                problem.module.compile()
            rows[variant] = _priced(problem, device)
            rows[variant]()  # compiles
        samples = clock.interleave(rows, seconds=seconds, rounds=200)
        print(f"{name}: {samples.rounds} rounds", flush=True)
        for row, values in samples.rows.items():
            ms = {lap: clock.summary(v)["median"] for lap, v in values.items()}
            r = clock.ratio(*([sum(t) for t in zip(*s.values())] for s in (values, samples.rows["eager"])))
            found.append({"cell": name, "row": row, **ms, "ratio": r.value, "low": r.low, "high": r.high,
                          "rounds": r.n})  # fmt: skip
            print(f"  {row:24}" + "".join(f"  {lap} {t:8.3f}" for lap, t in ms.items())
                  + f"  x{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]")  # fmt: skip
        for row, why in samples.failed.items():
            print(f"  {row:24} failed: {why}")
    return found


def _priced(problem: Problem, device: torch.device) -> Callable[[], dict[str, float]]:
    timer = clock.StepTimer(device)

    def measure() -> dict[str, float]:
        z = problem.start.detach().requires_grad_()
        v = torch.ones_like(z)
        timer.start()
        with torch.no_grad():
            problem.native(z)
        timer.lap("f ms")
        out = problem.native(z)
        timer.lap("f with graph ms")
        torch.autograd.grad(out, z, v)
        timer.lap("VJP ms")
        return timer.read()

    return measure


PARTS: dict[str, Callable[[torch.device, float, list[str]], list[dict[str, Any]]]] = {
    "overhead": overhead, "train": partial(train, make=step_pairs), "best": partial(train, make=best_rows),
    "cell": variants,
}  # fmt: skip


def page(facts: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> str:
    """The Markdown of what was measured, a table a part."""
    text = (f"# Solvers against their floor and their peers\n\n{facts['hardware']}, torch {facts['torch']}, "
            f"{facts['threads']} threads, allocator {facts['allocator']}, alone: {facts['alone']}. "
            "By `python scripts/solver_bench.py --save`; 95 % intervals of paired rounds.\n")  # fmt: skip
    for part, rows in found.items():
        good = [r for r in rows if "failed" not in r]
        span = [f"{r.get('overhead', r.get('ratio')):.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in good]
        if part == "overhead":
            columns = ["cell", "solver", "calls", "time a call", "x the cell alone", "added a call"]
            cells = [[r["cell"], r["row"], str(r["calls"]), f"{r['us_a_call']:,.0f} us", s, f"{r['added_us']:,.0f} us"]
                     for r, s in zip(good, span)]  # fmt: skip
        elif part == "cell":
            columns = ["cell", "variant", *LAPS, "x eager, in all"]
            cells = [[r["cell"], r["row"], *(f"{r[lap]:.3f}" for lap in LAPS), s] for r, s in zip(good, span)]
        else:
            columns = ["cell", "row", "ms", "x its first row", "f calls", "residual", "gradient error"]
            cells = [[r["cell"], r["row"], f"{r['ms']:.2f}", s, str(r["calls"]), f"{r['residual']:.1e}",
                      f"{r['gradient_error']:.1e}"] for r, s in zip(good, span)]  # fmt: skip
        text += f"\n## {part}\n\n{tables.markdown(columns, cells)}"
    return text


def save(folder: Path, facts: dict[str, Any], found: dict[str, list[dict[str, Any]]], cells: list[str]) -> None:
    """Beside what an earlier run of the same machine, torch and threads measured of other cells and parts."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "solvers.json"
    old = json.loads(path.read_text()) if path.exists() else {"environment": {}}
    before = old.pop("environment")
    if any(before.get(key) != facts[key] for key in ("torch", "threads", "allocator")):
        old = {}
    facts["alone"] = facts["alone"] and before.get("alone", True)
    whole = {}
    for part in PARTS:
        kept = [row for row in old.get(part, []) if part not in found or row["cell"] not in cells]
        whole[part] = sorted(kept + found.get(part, []), key=lambda row: list(CELLS).index(row["cell"]))
    path.write_text(json.dumps({"environment": facts, **whole}, indent=1) + "\n")
    (folder / "solvers.md").write_text(page(facts, {part: rows for part, rows in whole.items() if rows}))


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
    cells = args.cells.split(",")
    found = {part: PARTS[part](device.torch, args.time, cells) for part in args.parts or PARTS}
    facts["alone"] = alone.read()
    print(f"{facts['hardware']}, torch {facts['torch']}, {device.threads} threads, allocator {facts['allocator']}, "
          f"alone: {facts['alone']}, {time.time() - began:.0f} s")  # fmt: skip
    if args.save:
        save(ROOT / "results" / machine.folder_name(str(facts["hardware"])), facts, found, cells)


if __name__ == "__main__":
    main()
