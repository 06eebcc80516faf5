"""THE loop. Every solve of the project, forward or backward in time, root or ODE, runs through `solve`."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import Field, FixedPoint, OwnLoop, Reduce, Solution, Solver, State, Stats, Status, Stop, relative


class Counted:
    def __init__(self, F: Field):
        self.F, self.nfe = F, 0

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        return self.both(z, t)[0]

    def both(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        self.nfe += 1
        return self.F.both(z, t) if isinstance(self.F, FixedPoint) else (self.F(z, t), None)


def solve(F: Field, z0: Tensor, *, solver: Solver | OwnLoop, stop: Stop, reduce: Reduce | None = None,
          trace: bool = False) -> Solution:  # fmt: skip
    """Move z0 (B, D) with `solver` until `stop` closes every row, `stop.max_steps` steps at most.

    A row returns its best iterate where the stop ranks them (stop=residual), else its last finite one. What happens to
    it after its end is thrown away: its value is frozen bit for bit. One that is not finite ends as NONFINITE. Neither
    disturbs its neighbours, unless the batch is one system, which ends as one. Never raises for a failed solve: read
    `Solution.status`. `trace` keeps the relative residual after every step.
    On a CUDA device the question "does any row go on?" is read one step late, so that the host never waits for the
    device; the step taken in vain moves nothing and is not in `stats.nfe` (it is in `stats.calls`). Under autocast f
    alone is: states, norms and inner products keep the precision of z0.
    """
    if torch.is_autocast_enabled(z0.device.type):
        F = as_now(F, z0.device.type)
        with torch.autocast(z0.device.type, enabled=False):
            return solve(F, z0, solver=solver, stop=stop, reduce=reduce, trace=trace)
    reduce = reduce or Reduce(per_sample=False)
    if isinstance(solver, OwnLoop):  # a foreign library: end time only
        return solver.solve(F, z0, stop)
    measured = stop.needs_equilibrium or isinstance(F, FixedPoint)  # else |F| is a speed, not a residual
    F = Counted(F)
    state = solver.init(F, z0, stop.t1, reduce)
    watch, seen = stop.watch(reduce), list[Tensor]()

    def traced(state: State, k: int) -> Tensor:
        seen.append(relative_residual(state.z, state.F))
        return watch.open(state, k)

    look = traced if trace else watch.open
    look = torch.no_grad()(look) if torch.is_grad_enabled() else look
    running = look(state, 0)  # (R,): R = B rows, or the batch as one
    flag = OpenRows(z0.is_cuda)
    best = _Best(state, watch.score, flag.late)
    steps, bad = torch.zeros_like(running, dtype=torch.int64), torch.zeros_like(running)
    n_open, nfe = flag.read(running), [F.nfe]
    while n_open and len(nfe) <= stop.max_steps:
        state = solver.step(F, state, reduce)
        k = len(nfe)
        nfe.append(F.nfe)
        going = solver.moves(state, look(state, k))
        score = watch.score
        if not flag.late:
            improves = going if score is None or best.least is None else going & (score < best.least)
            if flag.read(improves if n_open == len(running) else improves & running) == n_open:
                best.at, best.least, best.fresh = state, score, running  # nothing to set aside
                continue
        alive = running & (score < torch.inf if score is not None else reduce.whole(state.finite()))
        bad = bad | (running ^ alive)
        steps = torch.where(running, k, steps)
        running = alive & going
        before, n_open = n_open, flag.read(running)
        best.see(state, score, alive, running, n_open < before)
    value = best.close(running)
    with torch.no_grad():
        steps = torch.where(running, len(nfe) - 1, steps).expand(len(z0))
        status = watch.verdict(value).masked_fill(bad, int(Status.NONFINITE))
        if solver.has_time:  # a row that neither the stop nor the cap ended: the solver gave it up
            unmet = (status == Status.MAX_STEPS) | (status == Status.REACHED_END) & (stop.t1 == torch.inf)
            status = status.masked_fill(unmet & ~running & ~bad, int(Status.STEP_TOO_SMALL))
        residual = relative_residual(value.z, value.F) if measured else value.t.new_full(value.t.shape, torch.nan)
        after = torch.arange(len(seen), device=z0.device).unsqueeze(1) > steps
        history = torch.stack(seen).masked_fill(after, torch.nan) if seen else None
        stats = Stats(steps, torch.tensor(nfe, device=z0.device)[steps], F.nfe, value.t, residual, history)
    return Solution(value.z, value.F, status.expand(len(z0)), stats)


def as_now(F: Field, kind: str) -> Field:
    """F wherever it is called, a backward too, under the autocast of now."""
    autocast = torch.autocast(kind, torch.get_autocast_dtype(kind))
    return FixedPoint(autocast(F.f)) if isinstance(F, FixedPoint) else autocast(F)


def relative_residual(z: Tensor, F: Tensor) -> Tensor:
    """|F| / |z + F| of each row, (B,): the step f(z) - z measured against f(z)."""
    rows = Reduce(per_sample=True)
    return relative(rows.norm(F), rows.norm(z + F)).squeeze(1)


class _Best:
    """The iterate that each row is to return.

    `at` is the newest state that any open row is at its best in, `fresh` says which rows; all others are set aside in
    `kept`, so that a step on which every row improves copies nothing. On CUDA, where the host does not know, every
    step sets aside.
    """

    def __init__(self, state: State, score: Tensor | None, late: bool):
        self.kept = self.at = state
        self.least, self.late = score, late
        self.fresh: Tensor | None = None  # none yet: `kept` has them all

    def see(self, new: State, score: Tensor | None, alive: Tensor, still: Tensor, ended: bool) -> None:
        """`alive` rows have a finite new state; `still` are those of them that go on; `ended`: some do not."""
        better = alive
        if score is not None and self.least is not None:
            better = alive & (score < self.least)
            self.least = torch.where(better, score, self.least)
        if self.late:
            self.kept = _put(self.kept, better, new, True)
            return
        if self.fresh is not None:
            self.kept = _put(self.kept, self.fresh & ~better, self.at)
        if ended:
            self.kept = _put(self.kept, better & ~still, new)
        self.at, self.fresh = new, better & still

    def close(self, running: Tensor) -> State:
        return self.kept if self.fresh is None else _put(self.kept, self.fresh & running, self.at)


def _put(kept: State, rows: Tensor, new: State, late: bool = False) -> State:
    """`kept` with some rows from `new`; of a large state only those are copied, and the host looks which they are."""
    if late or (len(rows) > 1 and new.z.numel() < 2**16):
        return State(*(torch.where(m, b, a) for m, a, b in zip((rows[:, None], rows[:, None], rows), kept, new)))
    index = rows.nonzero().squeeze(1)
    if len(index) in (0, len(rows)):
        return new if len(index) else kept
    return State(*(a.index_copy(0, index, b[index]) for a, b in zip(kept[:3], new[:3])))


class OpenRows:
    """How many rows are open. On a CPU now; on CUDA the count of the step before, copied without waiting."""

    def __init__(self, late: bool):
        self.late = late
        self._last: tuple[Tensor, torch.cuda.Event] | None = None

    def read(self, open_rows: Tensor) -> int:
        count = torch.count_nonzero(open_rows)
        if not self.late:
            return int(count)
        before = self._last
        host = torch.empty((), dtype=count.dtype, pin_memory=True).copy_(count, non_blocking=True)
        self._last = host, torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._last[1].record()
        if before is None:
            return 1
        before[1].synchronize()
        return int(before[0])
