"""The linear system of implicit differentiation, (I - J^T) lambda = J^T g, from lambda = 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import FixedPoint, Reduce, Solver, State, Status, solve
from ..solvers import Anderson, Picard
from ..solvers.gmres import gmres

BY_STEPS: dict[str, Solver] = {"anderson": Anderson(), "picard": Picard()}


class Lambda(NamedTuple):
    value: Tensor  # (B, D)
    iterations: Tensor  # (B,)
    residual: Tensor  # (B,) relative to the right-hand side
    rhs_norm: Tensor  # (B,)
    status: Tensor  # (B,)


def by_gmres(vjp: Callable[[Tensor], Tensor], g: Tensor, reduce: Reduce, rtol: float, atol: float,
             max_iter: int) -> Lambda:  # fmt: skip
    s = gmres(lambda v: v - vjp(v), vjp(g), reduce, rtol=rtol, atol=atol, max_iter=max_iter)
    short = torch.where(s.iterations < max_iter, int(Status.STALLED), int(Status.MAX_STEPS))
    status = short.masked_fill(s.converged, int(Status.CONVERGED))
    status = status.masked_fill(~s.rhs_norm.isfinite(), int(Status.NONFINITE))
    return Lambda(s.x, *(a.squeeze(1).expand(len(g)) for a in (s.iterations, s.residual, s.rhs_norm, status)))


def by_steps(solver: Solver, vjp: Callable[[Tensor], Tensor], g: Tensor, reduce: Reduce, rtol: float, atol: float,
             max_iter: int) -> Lambda:  # fmt: skip
    """A solver on F(lambda) = J^T (g + lambda) - lambda, whose value at 0 is the right-hand side."""
    stop = LinearResidual(rtol, atol, max_iter)
    s = solve(FixedPoint(lambda v, t: vjp(g + v)), torch.zeros_like(g), solver=solver, stop=stop, reduce=reduce)
    residual = reduce.norm(s.field).squeeze(1) / stop.rhs_norm.clamp_min(torch.finfo(stop.rhs_norm.dtype).tiny)
    return Lambda(s.value, s.stats.steps, residual.expand(len(g)), stop.rhs_norm.expand(len(g)), s.status)


class LinearResidual:
    """|r| <= atol + rtol |b|, tested before the first step; b is the first field seen. Its own watch, for one solve.

    The best lambda is returned. A right-hand side whose squares underflow counts as solved by zero.
    """

    t1 = math.inf
    needs_equilibrium = True
    rhs_norm: Tensor  # (R,)
    score: Tensor | None

    def __init__(self, rtol: float, atol: float, max_steps: int):
        self.rtol, self.atol, self.max_steps = rtol, atol, max_steps

    def watch(self, reduce: Reduce) -> LinearResidual:
        self.reduce = reduce
        return self

    def open(self, state: State, k: int) -> Tensor:
        self.score = self.reduce.norm(state.F).squeeze(1)
        if k == 0:
            self.rhs_norm = self.score
            self.bound = (self.atol + self.rtol * self.score).clamp_min(torch.finfo(self.score.dtype).tiny ** 0.5)
        return self.score > self.bound

    def verdict(self, state: State) -> Tensor:
        size = self.reduce.norm(state.F).squeeze(1)
        status = torch.where(size <= self.bound, int(Status.CONVERGED), int(Status.MAX_STEPS))
        return status.masked_fill(~size.isfinite(), int(Status.NONFINITE))
