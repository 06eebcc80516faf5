from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core import EndTime, Field, FixedPoint, OwnLoop, Reduce, Solution, Solver, solve
from ..core.solve import as_now
from .base import Adjoint, BackwardLog, Corrected, Solve


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

    Cost: one evaluation with graph and one VJP for each call of the augmented field. Memory: one such graph and the
    solver's states, each of 2 B D + |theta| numbers, whatever the number of steps. The gradient is that of the
    differential equation, not of the steps that the forward took; it drifts off where the field is not reversible.
    """

    needs_end_time = True
    needs_closure = True
    exact = True
    of_ours = ("unit_cotangent", "seminorm")

    def __init__(self, max_steps: int = 1000, unit_cotangent: bool = False, seminorm: bool = False):
        if max_steps < 1:
            raise ValueError(f"adjoint.max_steps={max_steps} must be at least 1")
        self.max_steps, self.unit_cotangent, self.seminorm = max_steps, unit_cotangent, seminorm

    def __call__(self, F: Field, z0: Tensor, forward: Solve,
                 wrt: Sequence[Tensor]) -> tuple[Tensor, Solution, BackwardLog]:  # fmt: skip
        log = BackwardLog()
        solver: Any = forward.solver
        if isinstance(solver, OwnLoop):
            return self._foreign(F, z0.detach(), forward, wrt, log)
        solution = forward.untracked(F, z0)
        kind, t1 = z0.device.type, forward.stop.t1
        as_forward = as_now(F, kind) if torch.is_autocast_enabled(kind) else F

        def correction(g: Tensor) -> list[Tensor | None]:
            return [None, *self._back(as_forward, solver, t1, solution, g, wrt, log)]

        z = Corrected.apply("backsolve", correction, solution.value, *wrt)
        return self._output(F, z, t1, log), solution, log

    def _back(self, F: Field, solver: Solver, t1: float, solution: Solution, g: Tensor, wrt: Sequence[Tensor],
              log: BackwardLog) -> list[Tensor]:  # fmt: skip
        """dL/d(wrt) from g = dL/dz at the time each row reached; on their one clock s, t = reached (1 - s / t1)."""
        z1, reached = solution.value, solution.stats.t
        n, sizes, pace = z1.numel(), [w.numel() for w in wrt], (reached / t1).to(z1.dtype).unsqueeze(1)
        cut_short = bool((reached < t1).any())

        def augmented(row: Tensor, s: Tensor) -> Tensor:
            z = row[0, :n].view_as(z1).detach().requires_grad_()
            a = row[0, n : 2 * n].view_as(z1)
            with torch.enable_grad():
                dz = F(z, (t1 - s) * (reached / t1))
            if cut_short:
                a = pace * a
            grads = torch.autograd.grad(dz, (z, *wrt), a, allow_unused=True, materialize_grads=True)
            dz = pace * dz if cut_short else dz
            return torch.cat([-dz.detach().to(row.dtype).flatten(), *(grad.flatten() for grad in grads)]).unsqueeze(0)

        whole = Reduce(per_sample=False)
        size = whole.rms(g).clamp_min(torch.finfo(g.dtype).tiny) if self.unit_cotangent else g.new_ones(1, 1)
        row = torch.cat([z1.flatten(), (g / size).flatten(), g.new_zeros(sum(sizes))]).unsqueeze(0)
        reduce = Seminorm(2 * n) if self.seminorm else whole
        done = solve(augmented, row, solver=solver, stop=EndTime(t1, self.max_steps), reduce=reduce)
        log.vjps += done.stats.calls
        log.calls += done.stats.calls
        log.iterations, log.status = done.stats.steps.expand(len(z1)), done.status.expand(len(z1))
        theta = done.value[0, 2 * n :].split(sizes)
        return [grad.view_as(w) * size.squeeze() for grad, w in zip(theta, wrt)]

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
            return F(z, t)

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
