from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ..core import EndTime, Field, FixedPoint, OwnLoop, Reduce, Solution, Status, solve
from ..core.solve import as_now
from .base import Adjoint, BackwardLog, Corrected, Solve, bare, watched


class Backsolve(Adjoint):
    """The continuous adjoint (Chen et al., arXiv 1806.07366): integrate z, a = dL/dz and dL/dtheta backwards in time.

    a' = -a^T dF/dz, (dL/dtheta)' = -a^T dF/dtheta, from t1 to 0, by the solver of the forward on one flat augmented
    row [z, a, theta]; its error norm spans all of it, as in the papers' code, or with `seminorm` only z and a (Kidger,
    Chen & Lyons, arXiv 2009.09457): theta is an integral that nothing depends on, and rejects no step then.
    `max_steps` caps the attempts of the backward solve. The equation is linear in a: `unit_cotangent`
    starts it at unit size and scales the result, so that its error is controlled whatever the scale of the loss; else,
    as in torchdiffeq and SciML, cotangents of a mean loss may lie below the absolute tolerance, hardly controlled.
    A row whose forward was cut short is integrated back from the time it reached. torchdiffeq's solvers use
    torchdiffeq's own adjoint, without these options.

    What papers' code did instead, each a bias or a price of its own: `restarts` starts the solver anew at every time
    that the forward accepted, as arXiv 2201.12240's did (equal in cost only: it interpolated the forward's z, ours is
    integrated back; a step over the whole piece is tried first). `frozen`: a' = 0, so that dL/dz is that of the end
    throughout (the released adjoint of arXiv 2310.09583). x_gradient=one_step: what f has from x is a constant.

    Cost: one evaluation with graph and one VJP for each call of the augmented field. Memory: one such graph and the
    solver's states, each of 2 B D + |theta| numbers, whatever the number of steps. The gradient is that of the
    differential equation, not of the steps that the forward took; it drifts off where the field is not reversible.
    """

    needs_end_time = True
    needs_closure = True
    exact = True
    of_ours = ("unit_cotangent", "seminorm", "restarts")

    def __init__(self, max_steps: int = 1000, unit_cotangent: bool = False, seminorm: bool = False,
                 restarts: bool = False, frozen: bool = False,
                 x_gradient: Literal["exact", "one_step"] = "exact"):  # fmt: skip
        if max_steps < 1:
            raise ValueError(f"adjoint.max_steps={max_steps} must be at least 1")
        if x_gradient not in ("exact", "one_step"):
            raise ValueError(f"adjoint.x_gradient={x_gradient!r} must be exact or one_step")
        self.max_steps, self.unit_cotangent, self.seminorm = max_steps, unit_cotangent, seminorm
        self.restarts, self.frozen, self.x_gradient = restarts, frozen, x_gradient
        self.exact = x_gradient == "exact" and not frozen

    def __call__(self, F: Field, z0: Tensor, forward: Solve,
                 wrt: Sequence[Tensor]) -> tuple[Tensor, Solution, BackwardLog]:  # fmt: skip
        log = BackwardLog()
        solver: Any = forward.solver
        if isinstance(solver, OwnLoop):
            return self._foreign(F, z0 if self.through_start else z0.detach(), forward, wrt, log)
        times: list[Tensor] = []
        if self.restarts:
            assert not forward.reduce.per_sample
            forward = replace(forward, solver=watched(solver, lambda state, _: times.append(state.t)))
        solution = forward.untracked(F, z0)
        kind, t1 = z0.device.type, forward.stop.t1
        as_forward = as_now(F, kind) if torch.is_autocast_enabled(kind) else F
        start = [z0] if self.through_start else []

        def correction(g: Tensor) -> list[Tensor | None]:
            a0, *grads = self._back(as_forward, bare(solver), t1, solution, g, wrt, log, times)
            return [None, *grads, *([a0] if start else [])]

        z = Corrected.apply("backsolve", correction, solution.value, *wrt, *start)
        return self._output(F, z, t1, log), solution, log

    def _back(self, F: Field, solver: Any, t1: float, solution: Solution, g: Tensor, wrt: Sequence[Tensor],
              log: BackwardLog, times: list[Tensor]) -> list[Tensor]:  # fmt: skip
        """dL/dz0 and dL/d(wrt) from g = dL/dz at the time each row reached; on one clock s, t = reached (1 - s / t1).
        `times`: those (B,) that the forward saw, to restart at."""
        z1, reached = solution.value, solution.stats.t
        n, sizes, pace = z1.numel(), [w.numel() for w in wrt], (reached / t1).to(z1.dtype).unsqueeze(1)
        cut_short = bool((reached < t1).any())

        began = 0.0  # of the piece

        def augmented(row: Tensor, s: Tensor) -> Tensor:
            s = began + s
            z = row[0, :n].view_as(z1).detach().requires_grad_()
            a = row[0, n : 2 * n].view_as(z1)
            with torch.enable_grad():
                dz = F(z, (t1 - s) * (reached / t1))
            if cut_short:
                a = pace * a
            grads = torch.autograd.grad(dz, (z, *wrt), a, allow_unused=True, materialize_grads=True)
            if self.frozen:
                grads[0].zero_()
            dz = pace * dz if cut_short else dz
            return torch.cat([-dz.detach().to(row.dtype).flatten(), *(grad.flatten() for grad in grads)]).unsqueeze(0)

        whole = Reduce(per_sample=False)
        size = whole.rms(g).clamp_min(torch.finfo(g.dtype).tiny) if self.unit_cotangent else g.new_ones(1, 1)
        row = torch.cat([z1.flatten(), (g / size).flatten(), g.new_zeros(sum(sizes))]).unsqueeze(0)
        reduce = Seminorm(2 * n) if self.seminorm else whole
        stops = [0.0, t1]
        if times:  # where the solver begins anew, on the clock s
            share = 1 - torch.stack(times)[:, 0] / reached[0]
            stops = [*sorted({t1 * float(s) for s in share if s < 1}), t1]
            solver = copy(solver)
            solver.first = t1
        log.iterations, log.status = torch.zeros_like(solution.status), torch.zeros_like(solution.status)
        for began, end in pairwise(stops):
            done = solve(augmented, row, solver=solver, stop=EndTime(end - began, self.max_steps), reduce=reduce)
            row = done.value
            log.vjps += done.stats.calls
            log.calls += done.stats.calls
            log.recorded += done.stats.calls
            log.iterations, log.status = log.iterations + done.stats.steps, torch.maximum(log.status, done.status)
        lost = (log.status == int(Status.NONFINITE)) | (log.status == int(Status.STEP_TOO_SMALL))
        row = torch.where(lost.any(), torch.nan, row)  # no gradient, though what there is of it may be finite
        a0, theta = row[0, n : 2 * n].view_as(z1), row[0, 2 * n :].split(sizes)
        return [a0 * size, *(grad.view_as(w) * size.squeeze() for grad, w in zip(theta, wrt))]

    def _output(self, F: Field, z: Tensor, t1: float, log: BackwardLog) -> Tensor:
        """An equilibrium layer puts out f(z) of the last z, under this adjoint as under any other."""
        if not isinstance(F, FixedPoint):
            return z
        log.forward_calls = 1
        return log.watch(F.f(z, z.new_full((len(z),), t1)))

    def _foreign(self, F: Field, z0: Tensor, forward: Solve, wrt: Sequence[Tensor],
                 log: BackwardLog) -> tuple[Tensor, Solution, BackwardLog]:  # fmt: skip
        done = False

        def counted(z: Tensor, t: Tensor) -> Tensor:
            if done:  # a call made by the backward: one evaluation, one VJP
                log.calls += 1
                log.vjps += 1
                log.recorded += 1
            return F(z.detach() if done and self.frozen else z, t)

        stop: Any = forward.stop
        solver: Any = forward.solver
        solution = solver.solve(counted, z0, stop, wrt)
        done = True
        z = self._output(F, solution.value, stop.t1, log)
        return z, replace(solution, value=solution.value.detach()), log


class Seminorm(Reduce):
    """Sees the first `columns` of the one augmented row."""

    def __init__(self, columns: int):
        super().__init__(per_sample=False)
        self.columns = columns

    def norm(self, a: Tensor) -> Tensor:
        return super().norm(a[..., : self.columns])

    def rms(self, a: Tensor) -> Tensor:
        return super().rms(a[..., : self.columns])
