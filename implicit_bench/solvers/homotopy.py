from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import Field, Reduce, Solver, State
from ..core.types import relative
from .anderson import Anderson
from .gmres import gmres


class Path(NamedTuple):
    a: Tensor  # (B, D): where it starts
    end: float  # the last lam
    dlam: Tensor  # (R, 1): the next step


class Homotopy(Solver):
    """Homotopy continuation (Ding et al., arXiv 2310.09583; Allgower & Georg, Numerical Continuation Methods, 1990).

    Follows H(z, lam) = z - lam f(z) - (1 - lam) a = 0 from z = a = z0 at lam = 0 to z = f(z) at lam = 1. A step to lam'
    solves (I - lam J) dz = -H(z, lam') by GMRES on products J v, to linear_rtol: on the path that is
    (f(z) - a) (lam' - lam), the paper's tangent, off it a Newton correction as well. Then come `corrector` Anderson
    steps on z <- lam' f(z) + (1 - lam') a. The step is accepted if error = |H| / |z - H| <= rtol now, and the next one
    is longer or shorter by (rtol / 2 error)^1/2 within [1/2, 2], as the tangent is off by O(dlam^2). t is lam:
    stop=end_time ends on the path, at t1 <= 1; stop=residual goes on with such steps at lam = 1. Steps belong to a row
    or to the batch as `Reduce` says.

    Cost a step: `linear_max_iter` products at most and corrector + 1 evaluations; a product counts as one evaluation
    and takes the time of about three. Memory: linear_max_iter + 2 corrector + 8 states. No gradient through its steps:
    use adjoint=ift. Where I - lam J turns singular the path turns back in lam (a fold) and is lost: steps shrink below
    min_step, STEP_TOO_SMALL. The corrector may leave the path for another root where rtol is coarse.
    """

    has_time, one_call, needs_map = True, False, True

    def __init__(self, rtol: float = 1e-2, corrector: int = 3, first_step: float = 0.1, min_step: float = 1e-4,
                 linear_rtol: float = 1e-2, linear_max_iter: int = 50):  # fmt: skip
        if not 0 < rtol < 1:
            raise ValueError(f"solver.rtol={rtol} must lie in (0, 1), such as 1e-2")
        if corrector < 1:
            raise ValueError(f"solver.corrector={corrector} must be at least 1")
        if not 0 < min_step <= first_step <= 1:
            raise ValueError(f"solver.min_step={min_step} and solver.first_step={first_step} must lie in (0, 1], the "
                             "latter no less than the former")  # fmt: skip
        if not 0 < linear_rtol < 1:
            raise ValueError(f"solver.linear_rtol={linear_rtol} must lie in (0, 1), such as 1e-2")
        if linear_max_iter < 1:
            raise ValueError(f"solver.linear_max_iter={linear_max_iter} must be at least 1")
        self.rtol, self.corrector = float(rtol), Anderson(window=corrector)
        self.first_step, self.min_step = float(first_step), float(min_step)
        self.linear_rtol, self.linear_max_iter = float(linear_rtol), linear_max_iter

    def init(self, F: Field, z0: Tensor, t1: float, reduce: Reduce) -> State:
        if 1 < t1 < math.inf:
            raise ValueError(f"stop.t1={t1} lies beyond the path of solver=homotopy, which ends at 1; use stop.t1=1.0")
        state = super().init(F, z0, t1, reduce)
        if state.F.requires_grad:
            raise ValueError("solver=homotopy has no gradient through its steps; use adjoint=ift, or torch.no_grad")
        return state._replace(mem=Path(z0, min(t1, 1.0), torch.full_like(reduce.norm(z0), self.first_step)))

    def step(self, F: Field, state: State, reduce: Reduce) -> State:
        z, (a, end, dlam) = state.z.contiguous(), state.mem  # a start that all rows share is one row in memory
        zero, lam = torch.zeros_like(state.t), state.t.unsqueeze(1)  # the map itself knows no lam
        goal = torch.where(dlam >= end - lam, end, lam + dlam)
        Fz = state.F

        def minus_H(y: Tensor, Fy: Tensor) -> Tensor:
            return (goal * Fy + (1 - goal) * (a - y)).to(y.dtype)

        def corrected(y: Tensor, t: Tensor) -> Tensor:
            nonlocal Fz
            Fz = F(y, zero)
            return minus_H(y, Fz)

        def product(v: Tensor) -> Tensor:
            """(I - lam J) v; F has the derivative J - I."""
            Fv = torch.func.jvp(lambda y: F(y, zero), (z,), (v.contiguous(),))[1]
            return (v - lam * (Fv + v)).to(v.dtype)

        ahead = gmres(product, minus_H(z, Fz), reduce, rtol=self.linear_rtol, atol=0.0, max_iter=self.linear_max_iter)
        new = self.corrector.init(corrected, z + ahead.x, math.inf, reduce)
        for _ in range(self.corrector.window):
            new = self.corrector.step(corrected, new, reduce)
        error = relative(reduce.norm(new.F), reduce.norm(new.z + new.F))
        accept = (error <= self.rtol) | (lam >= end)  # a NaN only at the end, where the loop sees it
        dlam = dlam * (self.rtol / (2 * error)).sqrt().clamp(0.5, 2.0).nan_to_num(0.5)
        z, Fz = torch.where(accept, new.z, z), torch.where(accept, Fz, state.F)
        return State(z, Fz, torch.where(accept, goal, lam).squeeze(1), Path(a, end, dlam))

    def moves(self, state: State, going: Tensor) -> Tensor:
        path = state.mem
        there = state.t >= path.end  # then the stop is a residual
        return going & (there[: len(path.dlam)] | (path.dlam >= self.min_step).squeeze(1))
