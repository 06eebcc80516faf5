from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core import Field, Solution
from .base import BackwardLog, Solve, reattach
from .gmres import gmres


class IFT:
    """Implicit function theorem (Bai, Kolter & Koltun, arXiv 1909.01377): the exact gradient at a fixed point.

    z = f(z*, x) with grad; with g the incoming cotangent and J = df/dz at z*, solve (I - J^T) lambda = J^T g from
    lambda = 0 by GMRES and send g + lambda into f's own graph, so that parameters, x and everything before it get
    (I - J)^-T g. Stop at |r| <= atol + rtol |J^T g|, tested before iteration 1: with no iteration this is JFB.

    Cost: one evaluation in the forward; 1 + iterations + 1 VJPs of one kept graph. Memory: that graph and
    max_iter + 1 states, whatever the solver did. Exact only as far as the solve converged.
    """

    needs_equilibrium = True

    def __init__(self, rtol: float = 1e-2, atol: float = 0.0, max_iter: int = 50):
        if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
            raise ValueError(f"adjoint.rtol={rtol} and adjoint.atol={atol} must not be negative, nor both zero")
        if max_iter < 0:
            raise ValueError(f"adjoint.max_iter={max_iter} must not be negative")
        self.rtol, self.atol, self.max_iter = float(rtol), float(atol), max_iter

    def __call__(self, F: Field, z0: Tensor, solve: Solve,
                 wrt: Sequence[Tensor]) -> tuple[Tensor, Solution, BackwardLog]:  # fmt: skip
        with torch.no_grad():
            solution = solve(F, z0)
        zs, z = reattach(F, solution.value)
        log = BackwardLog(forward_calls=1)

        def correction(g: Tensor) -> Tensor:
            def vjp(v: Tensor) -> Tensor:
                return torch.autograd.grad(z, zs, v, retain_graph=True)[0]

            rhs = vjp(g)
            lin = gmres(lambda v: v - vjp(v), rhs, solve.reduce, rtol=self.rtol, atol=self.atol, max_iter=self.max_iter)
            B = len(rhs)
            log.vjps = 2 + lin.products  # the right-hand side, the products, and autograd's own pass through z
            log.iterations, log.residual = lin.iterations.squeeze(1).expand(B), lin.residual.squeeze(1).expand(B)
            log.rhs_norm, log.converged = lin.rhs_norm.squeeze(1).expand(B), lin.converged.squeeze(1).expand(B)
            return g + lin.x

        return _Correct.apply(z, correction), solution, log


class _Correct(torch.autograd.Function):
    """The identity, whose cotangent g becomes correction(g). It holds its input's graph, never its output: no cycle."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, correction: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.correction = correction
        return z.view_as(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.correction(g), None


class JFB:
    """Jacobian-free backpropagation (Fung et al., arXiv 2103.12803): the gradient of one application at z*.

    Cost: one evaluation in the forward, one VJP. A biased gradient: the factor (I - J)^-T is dropped.
    """

    needs_equilibrium = True

    def __call__(self, F: Field, z0: Tensor, solve: Solve,
                 wrt: Sequence[Tensor]) -> tuple[Tensor, Solution, BackwardLog]:  # fmt: skip
        with torch.no_grad():
            solution = solve(F, z0)
        return reattach(F, solution.value)[1], solution, BackwardLog(forward_calls=1, vjps=1)
