from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..core import Field, Solution
from .base import Adjoint, BackwardLog, Corrected, Solve, reattach, vjp_of
from .linear import BY_STEPS, by_gmres, by_steps


class IFT(Adjoint):
    """Implicit function theorem (Bai, Kolter & Koltun, arXiv 1909.01377): the exact gradient at a fixed point.

    z = f(z*, x) with grad; with g the incoming cotangent and J = df/dz at z*, solve (I - J^T) lambda = J^T g from
    lambda = 0 and send g + lambda into f's own graph, so that parameters, x and everything before it get
    (I - J)^-T g. Stop at |r| <= atol + rtol |J^T g|, tested before iteration 1: with no iteration this is JFB.

    linear=gmres works wherever I - J is regular; picard (lambda <- J^T (g + lambda), a Neumann series) needs a
    spectral radius below 1, anderson (window 5) mostly does; they need less memory.
    x_gradient=one_step is what the code of arXiv 2201.12240 did: lambda reaches the cell's parameters, but not x, so
    that the stem gets g through one application only, a biased gradient; one VJP more.

    Cost: one evaluation in the forward; 1 + iterations + 1 VJPs of one kept graph. Memory: that graph and states,
    whatever the solver did: max_iter + 1 for gmres, 12 anderson, 2 picard. Exact as far as the forward solve converged.
    """

    needs_equilibrium = True

    def __init__(self, rtol: float = 1e-2, atol: float = 0.0, max_iter: int = 50,
                 linear: Literal["gmres", "anderson", "picard"] = "gmres",
                 x_gradient: Literal["exact", "one_step"] = "exact"):  # fmt: skip
        if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
            raise ValueError(f"adjoint.rtol={rtol} and adjoint.atol={atol} must not be negative, nor both zero")
        if max_iter < 0:
            raise ValueError(f"adjoint.max_iter={max_iter} must not be negative")
        if linear != "gmres" and linear not in BY_STEPS:
            raise ValueError(f"adjoint.linear={linear!r} must be gmres, {' or '.join(BY_STEPS)}")
        if x_gradient not in ("exact", "one_step"):
            raise ValueError(f"adjoint.x_gradient={x_gradient!r} must be exact or one_step")
        self.rtol, self.atol, self.max_iter, self.x_gradient = float(rtol), float(atol), max_iter, x_gradient
        self.exact = x_gradient == "exact"
        self.linear = by_gmres if linear == "gmres" else partial(by_steps, BY_STEPS[linear])

    def __call__(self, F: Field, z0: Tensor, solve: Solve,
                 wrt: Sequence[Tensor]) -> tuple[Tensor, Solution, BackwardLog]:  # fmt: skip
        solution, log = solve.untracked(F, z0), BackwardLog()
        zs, z = reattach(F, solution.value, log)
        bare = wrt if self.x_gradient == "one_step" else ()  # what lambda must not reach

        def correction(g: Tensor) -> list[Tensor | None]:
            lam, log.iterations, log.residual, log.rhs_norm, log.status = self.linear(
                vjp_of(zs, z, log), g.to(zs.dtype), solve.reduce, self.rtol, self.atol, self.max_iter
            )
            much = torch.autograd.grad(z, bare, lam, retain_graph=True, allow_unused=True) if bare else ()
            return [g + lam, *(None if m is None else -m for m in much)]

        return Corrected.apply("ift", correction, z, *bare), solution, log


class JFB(Adjoint):
    """Jacobian-free backpropagation (Fung et al., arXiv 2103.12803): the gradient of one application at z*.

    Cost: one evaluation in the forward, one VJP. Memory: one graph. Biased: the factor (I - J)^-T is dropped.
    """

    needs_equilibrium = True

    def __call__(self, F: Field, z0: Tensor, solve: Solve,
                 wrt: Sequence[Tensor]) -> tuple[Tensor, Solution, BackwardLog]:  # fmt: skip
        solution, log = solve.untracked(F, z0), BackwardLog(forward_calls=1)
        z = F.f(solution.value, solution.value.new_zeros(len(z0)))  # type: ignore[attr-defined]
        return log.watch(z), solution, log
