"""THE loop. Every solve of the project, forward or backward in time, root or ODE, runs through `solve`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .types import Field, FixedPoint, Reduce, Solution, Solver, State, Stats, Status, Stop


class Counts(NamedTuple):
    steps: Tensor
    nfe: Tensor
    calls: int


class Counted:
    """A field that counts its calls. `nfe` is what the statistics report."""

    def __init__(self, F: Field):
        self.F, self.nfe = F, 0

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        self.nfe += 1
        return self.F(z, t)


def solve(F: Field, z0: Tensor, *, solver: Solver, stop: Stop, reduce: Reduce | None = None) -> Solution:
    """Move z0 (B, D) with `solver` until `stop` closes every row, `stop.max_steps` steps at most.

    A row that has ended is frozen bit for bit; a row whose new state is not finite keeps its last finite one and ends
    as NONFINITE; neither disturbs its neighbours, unless the batch is one system, which ends as one. Never raises for
    a failed solve: read `Solution.status`.
    On a CUDA device the question "does any row go on?" is read one step late, so that the host never waits for the
    device; the step taken in vain moves nothing and is not in `stats.nfe` (it is in `stats.calls`).
    """
    reduce = reduce or Reduce(per_sample=False)
    measured = stop.needs_equilibrium or isinstance(F, FixedPoint)  # else |F| is a speed, not a residual
    if hasattr(solver, "integrate"):  # a foreign library that owns its loop: end time only
        return _whole(F, z0, solver, stop)
    F = Counted(F)
    state = solver.init(F, z0, stop.t1, reduce)
    B = z0.shape[0]
    running = stop.open(state, 0, reduce).expand(B)
    nfe = torch.full((B,), F.nfe, device=z0.device)
    steps = torch.zeros_like(nfe)
    bad = torch.zeros_like(running)
    flag = OpenRows(z0.is_cuda)
    n_open, k = flag.read(running), 0
    while n_open and k < stop.max_steps:
        new = solver.step(F, state, reduce)
        k += 1
        still = stop.open(new, k, reduce)
        n_open = flag.read(still & running)
        if n_open == B and not flag.late:  # nobody ended: nothing to freeze
            state = new
            continue
        finite = reduce.whole(new.finite())
        bad = bad | (running & ~finite)
        state = _merge(running & finite, new, state)
        nfe = torch.where(running, F.nfe, nfe)
        steps = torch.where(running, k, steps)
        running = running & still & finite
        if not flag.late:
            n_open = flag.read(running)
    nfe = torch.where(running, F.nfe, nfe)
    steps = torch.where(running, k, steps)
    counts = Counts(steps, nfe, F.nfe)
    return _solution(state, _verdict(state, solver, bad, stop, reduce), counts, measured)


def relative_residual(z: Tensor, F: Tensor) -> Tensor:
    """|F| / |z + F| of each row, (B,): the step f(z) - z measured against f(z)."""
    rows = Reduce(per_sample=True)
    return (rows.norm(F) / rows.norm(z + F).clamp_min(torch.finfo(torch.float32).tiny)).squeeze(1)


@torch.no_grad()
def _verdict(state: State, solver: Solver, bad: Tensor, stop: Stop, reduce: Reduce) -> Tensor:
    status = stop.verdict(state, reduce).expand_as(bad)
    if hasattr(solver, "stuck"):
        gave_up = solver.stuck(state) & (status == Status.MAX_STEPS)
        status = status.masked_fill(gave_up, int(Status.STEP_TOO_SMALL))
    return status.masked_fill(bad | ~reduce.whole(state.finite()), int(Status.NONFINITE))


def _solution(state: State, status: Tensor, counts: Counts, measured: bool) -> Solution:
    with torch.no_grad():
        residual = relative_residual(state.z, state.F) if measured else state.t.new_full(state.t.shape, torch.nan)
    return Solution(state.z, state.F, status, Stats(*counts, residual), state.mem)


def _whole(F: Field, z0: Tensor, solver: Solver, stop: Stop) -> Solution:
    equilibrium, F = isinstance(F, FixedPoint), Counted(F)
    z = solver.integrate(F, z0, stop.t1)  # type: ignore[attr-defined]
    t = z.new_full((len(z),), stop.t1)
    end = State(z, F(z, t) if equilibrium else torch.zeros_like(z), t)  # f(z) is the output of an equilibrium layer
    nfe = torch.full((len(z),), F.nfe, device=z0.device)
    with torch.no_grad():
        status = torch.where(end.finite(), int(Status.REACHED_END), int(Status.NONFINITE))
        field = end.F if equilibrium else torch.full_like(z, float("nan"))
        residual = relative_residual(z, field)
    return Solution(z, field, status, Stats(nfe, nfe, F.nfe, residual))


def _merge(rows: Tensor, new: State, old: State) -> State:
    at = rows.unsqueeze(1)
    return State(torch.where(at, new.z, old.z), torch.where(at, new.F, old.F), torch.where(rows, new.t, old.t),
                 new.mem)  # fmt: skip


class OpenRows:
    """How many rows are open. On a CPU now; on CUDA the count of the step before, copied without waiting."""

    def __init__(self, late: bool):
        self.late = late
        self._host: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def read(self, open_rows: Tensor) -> int:
        count = torch.count_nonzero(open_rows)
        if not self.late:
            return int(count)
        before, event = self._host, self._event
        self._host = torch.empty((), dtype=count.dtype, pin_memory=True)
        self._host.copy_(count, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()
        if before is None or event is None:
            return 1
        event.synchronize()
        return int(before)
