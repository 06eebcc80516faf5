from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import Field, Reduce, Solver, State
from .memory import remember_change
from .picard import damped


class History(NamedTuple):
    """The last differences in a ring: entry i of every part is of the same step."""

    steps: int
    dF: Tensor  # (B, window, D): F_i+1 - F_i
    dG: Tensor  # (B, window, D): (z_i+1 - z_i) + damping (F_i+1 - F_i)
    gram: Tensor  # (R, window, window): <dF_i, dF_j>, the diagonal with its ridge
    b: Tensor  # (R, window): <dF_i, F>


class Anderson(Solver):
    """Anderson acceleration (Anderson 1965; Walker & Ni, SIAM J. Numer. Anal. 2011, type II, difference form).

    gamma = argmin |F - dF gamma| over the last `window` differences; z <- z + damping F - dG gamma.
    The normal equations' diagonal is multiplied by 1 + ridge: a ridge relative to each difference's own size, as if the
    Gram matrix were scaled to trace `window` first. A row whose system is singular all the same (its Cholesky factor
    does not exist) falls back to a (damped) Picard step.

    Cost: one evaluation a step; 2 window + 2 states of memory. Fails on strongly nonlinear or expansive maps: lower
    `damping`. Differentiating through it (adjoint=unroll) near the solution is ill-conditioned: use Picard there.
    """

    def __init__(self, window: int = 5, damping: float = 1.0, ridge: float = 1e-6):
        if window < 1:
            raise ValueError(f"solver.window={window} must be at least 1")
        if not 0 < damping <= 1:
            raise ValueError(f"solver.damping={damping} must lie in (0, 1]")
        if not ridge >= 0:
            raise ValueError(f"solver.ridge={ridge} must not be negative")
        self.window, self.damping, self.ridge = window, float(damping), float(ridge)

    def init(self, F: Field, z0: Tensor, t1: float, reduce: Reduce) -> State:
        state = super().init(F, z0, t1, reduce)
        stack = z0.new_empty(len(z0), self.window, z0.shape[1])
        gram = reduce.products(stack[:, :, :0], stack[:, :, :0])
        return state._replace(mem=History(0, stack, torch.empty_like(stack), gram, torch.zeros_like(gram[:, 0])))

    def step(self, F: Field, state: State, reduce: Reduce) -> State:
        k, dF, dG, gram, b = state.mem
        used, slot = min(k, self.window), k % self.window
        before = z = damped(state, self.damping)
        if used:
            A, right = gram[:, :used, :used], b[:, :used].neg()
            L, info = torch.linalg.cholesky_ex(A)
            singular = (info != 0).unsqueeze(1)  # a row that stands still
            if A.requires_grad:  # nothing of it may reach autograd, where even a cotangent of zero becomes NaN
                right = right.masked_fill(singular, 0.0)
                L = torch.linalg.cholesky(torch.where(singular.unsqueeze(2), torch.eye(used).to(A), A))
            gamma = torch.cholesky_solve(right.unsqueeze(2), L).squeeze(2)
            z = reduce.combine(gamma.masked_fill(singular, 0.0), dG[:, :used]).add_(z)
        new = self.at(F, z, state.t)
        dF = remember_change(dF, slot, new.F, state.F)
        dG = remember_change(dG, slot, damped(new, self.damping), before)
        used, df = min(k + 1, self.window), dF[:, slot]
        row = reduce.dots(dF[:, :used], df)
        if row.requires_grad:
            gram, b = gram.clone(), b.clone()
        gram[:, slot, :used] = gram[:, :used, slot] = row
        gram[:, slot, slot] *= 1 + self.ridge
        b[:, :used] += row  # <dF_i, F> follows F without another pass; its error lives as long as its difference
        b[:, slot] = reduce.dots(df.unsqueeze(1), new.F).squeeze(1)
        return new._replace(mem=History(k + 1, dF, dG, gram, b))
