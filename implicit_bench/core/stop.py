"""When a solve ends: at a residual, at an end time, or after a fixed number of cell applications."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .types import Reduce, State, Status


class Residual:
    """End where |F| <= tol |z + F| (norm=rel) or |F| <= tol (norm=abs), with F = f(z) - z; max_steps steps at most.

    per_sample: each row ends on its own residual; `auto` does so where the network's samples are independent.
    The residual is the one known after the last step, so testing it costs no evaluation.
    """

    t1 = math.inf
    needs_equilibrium = True

    def __init__(self, tol: float = 1e-2, norm: Literal["rel", "abs"] = "rel", max_steps: int = 50,
                 per_sample: bool | Literal["auto"] = "auto"):  # fmt: skip
        if not 0 < tol < math.inf:
            raise ValueError(f"stop.tol={tol} must be positive and finite, such as 1e-2")
        if norm not in ("rel", "abs"):
            raise ValueError(f"stop.norm={norm!r} must be rel or abs")
        if max_steps < 1:
            raise ValueError(f"stop.max_steps={max_steps} must be at least 1")
        self.tol, self.norm, self.max_steps, self.per_sample = float(tol), norm, max_steps, per_sample

    def open(self, state: State, k: int, reduce: Reduce) -> Tensor:
        size, bound = self._measure(state, reduce)
        return (size > bound) & size.isfinite()

    def verdict(self, state: State, reduce: Reduce) -> Tensor:
        size, bound = self._measure(state, reduce)
        status = torch.where(size > bound, int(Status.MAX_STEPS), int(Status.CONVERGED))
        return status.masked_fill(~(size + bound).isfinite(), int(Status.NONFINITE))  # inf <= inf is no convergence

    @torch.no_grad()
    def _measure(self, state: State, reduce: Reduce) -> tuple[Tensor, Tensor]:
        size = reduce.norm(state.F)
        bound = reduce.norm(state.z + state.F) * self.tol if self.norm == "rel" else torch.full_like(size, self.tol)
        return size.squeeze(1), bound.squeeze(1)


class EndTime:
    """End at t = t1; the last step lands on it. max_steps attempts (accepted or not) at most."""

    needs_equilibrium = False

    def __init__(self, t1: float = 1.0, max_steps: int = 1000, per_sample: bool | Literal["auto"] = "auto"):
        if not 0 < t1 < math.inf:
            raise ValueError(f"stop.t1={t1} must be positive and finite")
        self.t1, self.max_steps, self.per_sample = float(t1), max_steps, per_sample

    def open(self, state: State, k: int, reduce: Reduce) -> Tensor:
        return reduce.whole(state.finite()) & (state.t < self.t1)

    def verdict(self, state: State, reduce: Reduce) -> Tensor:
        return torch.where(state.t < self.t1, int(Status.MAX_STEPS), int(Status.REACHED_END))


class FixedSteps:
    """`steps` applications of the cell from the start, whatever the residual: the budget of an explicit network.

    The start's own evaluation is the first of them, so that with Picard the output f(z) is `steps` nested cells.
    """

    t1 = math.inf
    needs_equilibrium = True

    def __init__(self, steps: int = 10, per_sample: bool | Literal["auto"] = "auto"):
        if steps < 1:
            raise ValueError(f"stop.steps={steps} must be at least 1")
        self.steps, self.max_steps, self.per_sample = steps, steps - 1, per_sample

    def open(self, state: State, k: int, reduce: Reduce) -> Tensor:
        return reduce.whole(state.F.detach().sum(1).isfinite()) & (k < self.max_steps)

    def verdict(self, state: State, reduce: Reduce) -> Tensor:
        return torch.full(state.t.shape, int(Status.REACHED_END), device=state.z.device)
