from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..core import EndTime, Field, FixedPoint, OwnLoop, Residual, Solution, Solver, State, Status, Stop, solve
from .kit import Result, check, require, tuned
from .problems import BATCH, PER_SAMPLE, Root, Watched, f64, flows, random, roots, whirl


class Case(NamedTuple):
    """One way to ask a solver: for a root, or for the state at an end time; four rows that end at different steps.

    Elementwise, so that a row's numbers are the same bits whatever the other rows are.
    """

    f: Field
    z0: Tensor
    stop: Stop
    root: bool

    def solve(self, solver: Any, f: Field | None = None, z0: Tensor | None = None) -> Solution:
        f, z0 = f or self.f, self.z0 if z0 is None else z0
        return solve(FixedPoint(f) if self.root else f, z0, solver=solver, stop=self.stop, reduce=PER_SAMPLE)


RATES = (0.4, 0.9, -1e-4, 0.7)  # a slow one, whose steps grow while others start


def _cases(solver: Any, rates: Sequence[float] = RATES) -> list[Case]:
    rate = f64(rates).unsqueeze(1)
    z0 = f64([2.0, 3.0, 4.0]).expand(len(rates), 3).clone()
    stop = Residual(max(_tol(solver), 1e-4), "rel", 1000)
    root = Case(lambda z, t: torch.tanh(rate.to(z.dtype) * z) + 0.5, z0, stop, True)
    end = Case(lambda z, t: -rate.to(z.dtype) * z, z0, EndTime(2.0, 10_000), False)
    return [root] * isinstance(solver, Solver) + [end] * _has_time(solver)


def _has_time(solver: Any) -> bool:
    """Does it integrate differential equations? One that needs a map only uses t for the path to its fixed point."""
    return isinstance(solver, OwnLoop) or bool(solver.has_time and not solver.needs_map)


def _adapts(solver: Any) -> bool:
    """Does it steer by tolerances? A foreign loop may have them without."""
    return isinstance(solver, Solver) and hasattr(solver, "rtol") and hasattr(solver, "atol")


def _tol(solver: Any) -> float:
    """A residual within reach: a solver that adapts its step hovers above its own tolerance."""
    return 10 * max(solver.rtol, solver.atol) if _adapts(solver) else 1e-6


def _names(status: Tensor) -> str:
    return " and ".join(Status(int(s)).name for s in status.unique())


@check
def step(solver: Any) -> str:
    """Asked first: what does not even step would fail all else in the same words."""
    case = _cases(solver)[0]
    F = FixedPoint(case.f)
    begun = solver.init(F, case.z0, math.inf, PER_SAMPLE)
    for name, found in (("init", begun), ("step", solver.step(F, begun, PER_SAMPLE))):
        kind = type(found).__name__
        require(isinstance(found, State),
                f"{name} returned a {kind}, not a State; end in return self.at(F, z, state.t)")  # fmt: skip
    return "init and step return a State"


@check
def fixed_point(solver: Any) -> str:
    tol, worst = _tol(solver), 0.0
    for problem, reduce in itertools.product(roots(), (PER_SAMPLE, BATCH)):
        s = solve(FixedPoint(problem.f), problem.z0, solver=solver, stop=Residual(tol, "rel", 3000), reduce=reduce)
        require((s.status == Status.CONVERGED).all(), f"{problem.name}: {_names(s.status)} after "
                 f"{int(s.stats.steps.max())} steps at a residual of {float(s.stats.residual.max()):.0e}")  # fmt: skip
        allowed = problem.gain * tol * float(problem.map(s.value).norm())
        worst = max(worst, float((s.value - problem.answer).norm()) / allowed)
        require(worst < 1.001, f"{problem.name}: {worst:.1f} times further from z* than a residual of {tol:.0e} allows")
    return f"{', '.join(p.name for p in roots())} to {tol:.0e}: error at most {worst:.2f} of what that allows"


@check
def end_time(solver: Any) -> str:
    tol, worst = max(solver.rtol, solver.atol) if _adapts(solver) else 0.01, 0.0
    for problem, reduce in itertools.product(flows(), (PER_SAMPLE, BATCH)):
        s = solve(problem.F, problem.z0, solver=solver, stop=EndTime(2.0, 10_000), reduce=reduce)
        require((s.status == Status.REACHED_END).all(), f"{problem.name}: {_names(s.status)} on the way to t = 2")
        error = float((s.value - problem.at(2.0)).abs().max())
        require(error <= 20 * tol, f"{problem.name}: off by {error:.0e} at t = 2")
        worst = max(worst, error)
    return f"{', '.join(p.name for p in flows())} at t = 2: error at most {worst:.0e}"


@check
def status(solver: Any) -> str:
    """What it says of a solve, against what the check works out itself from the value."""
    told: set[int] = set()
    for problem, norm, tol, cap in _hard() if isinstance(solver, Solver) else ():
        s = solve(FixedPoint(problem.f), problem.z0, solver=solver, stop=Residual(tol, norm, cap), reduce=PER_SAMPLE)
        fz = problem.map(s.value)
        size = fz.norm(dim=1)
        true = (fz - s.value).norm(dim=1) / (size if norm == "rel" else 1)
        converged, met = s.status == Status.CONVERGED, (true <= tol) & size.isfinite()
        wrong = (converged != met) & ~((true / tol - 1).abs() < 1e-6)
        require(not wrong.any(), f"{problem.name}: {_names(s.status[wrong])} at a residual of "
                 f"{float(true[wrong].amax() if wrong.any() else 0):.1e}, tolerance {tol:.0e}")  # fmt: skip
        odd = ~converged & (s.status != Status.MAX_STEPS) & math.isfinite(problem.gain)
        require(not odd.any(), f"{problem.name}: {_names(s.status[odd])} within {cap} steps, not MAX_STEPS")
        told.update(s.status.tolist())
    rate, clock = f64([[1.0, 0.0], [20.0, 0.0]]), f64([0.0, 1.0])  # the second number of a row tells the time: z' = 1
    for cap in (2, 1000) if _has_time(solver) else ():  # an end that no usual dt divides
        s = solve(lambda z, t: clock - rate * z, f64([[1.0, 0.0], [1.0, 0.0]]), solver=solver, stop=EndTime(0.97, cap),
                  reduce=PER_SAMPLE)  # fmt: skip
        for said, t in zip(s.status.tolist(), s.value[:, 1].tolist()):
            wanted = Status.REACHED_END if abs(t - 0.97) < 1e-6 else Status.MAX_STEPS
            require(said == wanted and not t > 0.971, f"{Status(said).name} at t = {t:.3f}, where the end is 0.97")
            told.add(said)
    return f"{', '.join(Status(k).name for k in sorted(told))}: each borne out by the value"


def _hard() -> list[tuple[Root, Literal["rel", "abs"], float, int]]:
    """With norms, tolerances and caps. The last two problems may end in any way, but converged only where they are."""
    stiff, start = f64([1.0, 10.0, 1e3, 1e8]), random(3, 4)
    hard = [
        Root("stiff linear field", lambda z, t: z - stiff * (z - 1), start, torch.ones_like(start), math.inf),
        Root("map without a fixed point", lambda z, t: 2 * z.abs() + 1, start, start * math.nan, math.inf),
    ]
    asked: list[tuple[Literal["rel", "abs"], float, int]] = [("rel", 1e-2, 50), ("abs", 1e-1, 50), ("rel", 1e-9, 2)]
    return [(problem, *how) for problem in (*roots(), *hard) for how in asked]


@check
def field(solver: Any) -> str:
    """State.F, from which every residual is read, against F at State.z."""
    problem, flow, worst = roots()[-1], whirl(), 0.0
    asked: list[tuple[Field, Tensor, float]] = [(FixedPoint(problem.f), problem.z0, math.inf), (flow.F, flow.z0, 2.0)]
    for F, z0, t1 in asked[: 1 + _has_time(solver)]:
        state = solver.init(F, z0, t1, PER_SAMPLE)
        for k in range(6):
            worst = max(worst, float((state.F - F(state.z, state.t)).abs().max()))
            if state.fz is not None:
                worst = max(worst, float((state.fz - state.z - state.F).abs().max()))
            require(worst < 1e-10, f"State.F is off F(State.z, State.t) by {worst:.0e} after {k} steps")
            state = solver.step(F, state, PER_SAMPLE)
    return f"State.F is F(State.z, State.t) to {worst:.0e}"


@check
def nfe(solver: Any) -> str:
    told = []
    for case in _cases(solver):
        watched = Watched(case.f)
        s = case.solve(solver, watched)
        n, steps = s.stats.calls, int(s.stats.steps.max())
        require(n == watched.calls, f"stats.calls is {n}, but the map was called {watched.calls} times")
        promised = steps + 1 if isinstance(solver, Solver) and solver.one_call else n
        require(n == promised, f"one_call promises {promised} calls in {steps} steps, but there were {n}")
        told.append(f"{n} calls {'to a residual' if case.root else 'to t = 2'}")
    return f"{', '.join(told)}: every one counted"


@check
def order(solver: Any) -> str:
    """Error against steps on the whirl at t = 3, as dt is halved or the tolerance is tightened."""
    adapts, flow, rungs = _adapts(solver), whirl(), list[tuple[float, int, float]]()
    if not adapts and not hasattr(solver, "dt"):
        return "it has neither rtol and atol nor dt to refine"
    for k in range(7):
        setting = 10.0 ** (-3 - k) if adapts else solver.dt / 2**k
        finer = tuned(solver, rtol=setting, atol=setting, dt=setting)
        s = solve(flow.F, flow.z0, solver=finer, stop=EndTime(3.0, max_steps=2000), reduce=PER_SAMPLE)
        require((s.status == Status.REACHED_END).all(), f"{_names(s.status)} on the whirl at {setting:.0e}")
        steps, error = int(s.stats.steps.max()), float((s.value - flow.at(3.0)).norm())
        rungs.append((setting, steps, error))
        if len(rungs) > 2 and (steps > 150 or error < 1e-9):
            break
    (_, m, coarse), (_, n, fine) = rungs[-3], rungs[-1]
    (loose, _, first), (tight, _, last) = rungs[0], rungs[-1]
    require(n > m, f"the whirl takes {n} steps whatever the tolerance")
    observed, promised = math.log(coarse / fine) / math.log(n / m), getattr(solver, "order", None)
    told = f"{observed:.1f} on the whirl{f', {promised} promised' if promised else ''}"
    require(observed > (promised or 1) - 0.4, f"{told}: error {coarse:.0e} in {m} steps, {fine:.0e} in {n}")
    told += f"; error {first:.0e} at {'tolerance' if adapts else 'dt'} {loose:.0e}, {last:.0e} at {tight:.0e}"
    require(not adapts or math.log(first / last) > 0.45 * math.log(loose / tight), told)
    return told


@check
def nan_row(solver: Any) -> str:
    """One row runs into NaN, one starts with it; their neighbours must not notice, bit for bit."""
    second = f64([[0.0], [1.0], [0.0], [0.0]]) > 0
    for case in _cases(solver):
        z0 = case.z0.clone()
        z0[3, 1] = math.nan
        well = case.solve(solver)

        def f(z: Tensor, t: Tensor, well: Field = case.f) -> Tensor:
            return torch.where(second & (z < 1.5), math.nan, well(z, t))

        sick = case.solve(solver, f, z0)
        for name, a, b in (("value", sick.value, well.value), ("F", sick.field, well.field),
                           ("steps", sick.stats.steps, well.stats.steps)):  # fmt: skip
            require(torch.equal(a[[0, 2]], b[[0, 2]]), f"NaN leaks: the {name} of the rows beside a NaN row changes")
        gave_up = sick.status[1] in (Status.NONFINITE, Status.STEP_TOO_SMALL)
        require(gave_up, f"the row that runs into NaN ends as {_names(sick.status[1])}")
        require(sick.value[1].isfinite().all(), "the row that runs into NaN returns it, not its last finite value")
        require(sick.status[3] == Status.NONFINITE, f"the row that starts with NaN ends as {_names(sick.status[3])}")
    return "NaN rows end as NONFINITE or STEP_TOO_SMALL, the others are the same bits"


@check
def rows_alone(solver: Any) -> str:
    """Per sample, a batch is its rows solved one by one."""
    worst = 0.0
    for k, case in enumerate(_cases(solver)):
        batch = case.solve(solver)
        for i, rate in enumerate(RATES):
            row = _cases(solver, (rate,))[k].solve(solver)
            off = float((batch.value[i] - row.value[0]).abs().max())
            require(off < 1e-8, f"a row solved alone differs by {off:.0e} from the same row in a batch")
            worst = max(worst, off)
            a, b = int(batch.stats.steps[i]), int(row.stats.steps[0])
            require(a == b, f"a row takes {a} steps in a batch, {b} alone")
    return f"a row in a batch is the row alone, to {worst:.0e}"


@check
def dtype(solver: Any) -> str:
    for kind, case in itertools.product((torch.float32, torch.float64), _cases(solver)):
        s = case.solve(solver, z0=case.z0.to(kind))
        for name, got in (("value", s.value.dtype), ("F", s.field.dtype)):
            require(got == kind, f"a {kind} start comes back with a {got} {name}".replace("torch.", ""))
        require((s.status <= Status.REACHED_END).all(), f"{_names(s.status)} in {kind}".replace("torch.", ""))
    return "float32 and float64 come back as they went in"


@check
def repeat(solver: Any) -> str:
    """No state between solves: with another one in between, the same call gives the same bits."""
    for case in _cases(solver):
        z0 = case.z0.clone()
        once = case.solve(solver, z0=z0)
        require(torch.equal(z0, case.z0), "the start is written over")
        other = _cases(solver, (0.3, -0.5))
        other[min(len(other) - 1, not case.root)].solve(solver)
        twice = case.solve(solver, z0=z0)
        same = torch.equal(once.value, twice.value) and once.stats.calls == twice.stats.calls
        require(same, "the same call gives another answer the second time")
    return "the same call twice gives the same bits, and the start is left as it was"


def check_solver(solver: Any) -> list[Result]:
    """The accuracy at an end time with its own tolerances, all else with rtol = atol = 1e-3 or dt = 0.1."""
    if not isinstance(solver, (Solver, OwnLoop)):
        return [Result("solver", False, f"{type(solver).__name__} is no implicit_bench.core.Solver")]
    ours = isinstance(solver, Solver)
    timed = [end_time] * _has_time(solver) + [order] * (ours and _has_time(solver))
    alone = [field, nan_row, rows_alone] * ours  # a foreign loop has one step for all rows
    usual = tuned(solver, rtol=1e-3, atol=1e-3, dt=0.1)
    with torch.no_grad():
        if ours and not (first := step(usual)):
            return [first]
        return [each(solver if each is end_time and _adapts(solver) else usual)
                for each in ([fixed_point] * ours + timed + [status, nfe, *alone, dtype, repeat])]  # fmt: skip
