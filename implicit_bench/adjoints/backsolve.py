from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core import EndTime, Field, FixedPoint, OwnLoop, Reduce, Solution, Solver, Status, solve
from .base import BackwardLog, Solve


class Backsolve:
    """The continuous adjoint (Chen et al., arXiv 1806.07366): integrate z, a = dL/dz and dL/dtheta backwards in time.

    a' = -a^T dF/dz, (dL/dtheta)' = -a^T dF/dtheta, from t1 to 0, by the solver of the forward on one flat augmented
    row [z, a, theta]; its error norm spans all of it, as in the papers' code. torchdiffeq's solvers use torchdiffeq's
    own adjoint. `max_steps` caps the attempts of the backward solve. The equation is linear in a: `unit_cotangent`
    starts it at unit size and scales the result, so that its error is controlled whatever the scale of the loss; else,
    as in torchdiffeq and SciML, cotangents of a mean loss may lie below the absolute tolerance, hardly controlled.

    Cost: one evaluation with graph and one VJP for each call of the augmented field. Memory: one such graph, whatever
    the number of steps. The gradient is that of the differential equation, not of the steps that the forward took.
    """

    needs_equilibrium = False
    needs_end_time = True
    uses_wrt = True

    def __init__(self, max_steps: int = 1000, unit_cotangent: bool = False):
        self.max_steps, self.unit_cotangent = max_steps, unit_cotangent

    def __call__(self, F: Field, z0: Tensor, forward: Solve,
                 wrt: Sequence[Tensor]) -> tuple[Tensor, Solution, BackwardLog]:  # fmt: skip
        log = BackwardLog()
        solver: Any = forward.solver
        if isinstance(solver, OwnLoop):
            return self._foreign(F, z0, forward, wrt, log)
        with torch.no_grad():
            solution = forward(F, z0)
        stop = EndTime(forward.stop.t1, self.max_steps)
        z = _Backsolve.apply(F, solver, stop, log, self.unit_cotangent, solution.value, *wrt)
        return self._output(F, z, stop.t1, log), solution, log

    def _output(self, F: Field, z: Tensor, t1: float, log: BackwardLog) -> Tensor:
        """An equilibrium layer puts out f(z) of the last z, under this adjoint as under any other."""
        if not isinstance(F, FixedPoint):
            return z
        log.forward_calls, log.vjps = 1, 1
        return F.f(z, z.new_full((len(z),), t1))

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
        adjoint: Any = SimpleNamespace(integrate=lambda G, z, t1: solver.integrate(G, z, t1, wrt))
        solution = solve(counted, z0, solver=adjoint, stop=stop)
        done = True
        z = self._output(F, solution.value, stop.t1, log)
        return z, replace(solution, value=solution.value.detach()), log


class _Backsolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, F: Field, solver: Solver, stop: EndTime, log: BackwardLog, unit: bool, z1: Tensor,
                *wrt: Tensor) -> Tensor:  # fmt: skip
        ctx.field, ctx.solver, ctx.stop, ctx.log, ctx.unit = F, solver, stop, log, unit
        ctx.save_for_backward(z1, *wrt)
        return z1.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z1, *wrt = ctx.saved_tensors
        B, D = z1.shape
        n = z1.numel()
        t1 = ctx.stop.t1

        def augmented(row: Tensor, s: Tensor) -> Tensor:
            z = row[0, :n].view(B, D).detach().requires_grad_()
            a = row[0, n : 2 * n].view(B, D)
            with torch.enable_grad():
                dz = ctx.field(z, (t1 - s).expand(B))
            grads = torch.autograd.grad(dz, (z, *wrt), a, allow_unused=True, materialize_grads=True)
            return torch.cat([-dz.detach().flatten(), *(grad.flatten() for grad in grads)]).unsqueeze(0)

        size = g.square().mean().sqrt().clamp_min(torch.finfo(g.dtype).tiny) if ctx.unit else g.new_ones(())
        row = torch.cat([z1.flatten(), (g / size).flatten(), g.new_zeros(sum(w.numel() for w in wrt))]).unsqueeze(0)
        back = solve(augmented, row, solver=ctx.solver, stop=ctx.stop, reduce=Reduce(per_sample=False))
        ctx.log.vjps += back.stats.calls
        ctx.log.calls += back.stats.calls
        ctx.log.converged = (back.status == Status.REACHED_END).expand(B)
        theta = back.value[0, 2 * n :].split([w.numel() for w in wrt])
        gradients = (grad.view(w.shape) * size for grad, w in zip(theta, wrt))
        return None, None, None, None, None, None, *gradients
