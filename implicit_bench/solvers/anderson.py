from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import Field, Reduce, Solver, State


class History(NamedTuple):
    dF: tuple[Tensor, ...]  # F_i+1 - F_i, newest last, each (B, D)
    dG: tuple[Tensor, ...]  # (z_i+1 - z_i) + damping (F_i+1 - F_i)


class Anderson(Solver):
    """Anderson acceleration (Anderson 1965; Walker & Ni, SIAM J. Numer. Anal. 2011, type II, difference form).

    gamma = argmin |F - dF gamma| over the last `window` differences; z <- z + damping F - dG gamma.
    The normal equations are scaled to a unit diagonal and get `ridge` added to it, a ridge relative to the Gram
    matrix's trace; a row whose small system is still singular falls back to a (damped) Picard step.

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
        return super().init(F, z0, t1, reduce)._replace(mem=History((), ()))

    def step(self, F: Field, state: State, reduce: Reduce) -> State:
        dF, dG = state.mem
        z = state.z.add(state.F, alpha=self.damping)
        if dF:
            z = z - reduce.combine(self._mix(dF, state.F, reduce), torch.stack(dG))
        Fz = F(z, state.t)
        df = Fz - state.F
        keep = slice(-(self.window - 1), None) if self.window > 1 else slice(0)
        mem = History((*dF[keep], df), (*dG[keep], (z - state.z).add(df, alpha=self.damping)))
        return State(z, Fz, state.t, mem)

    def _mix(self, dF: tuple[Tensor, ...], F: Tensor, reduce: Reduce) -> Tensor:
        """gamma, (R, window). The Gram matrix of the differences and F together holds the right-hand side as well."""
        gram = reduce.gram(torch.stack((*dF, F)))
        A, b = gram[:, :-1, :-1], gram[:, :-1, -1:]
        scale = A.diagonal(dim1=1, dim2=2).unsqueeze(2).clamp_min(torch.finfo(A.dtype).tiny).rsqrt()
        A = A * scale * scale.mT
        A.diagonal(dim1=1, dim2=2).add_(self.ridge)
        L, info = torch.linalg.cholesky_ex(A)
        gamma = torch.cholesky_solve(b * scale, L) * scale
        return torch.where((info == 0)[:, None, None], gamma, 0.0).squeeze(2)
