"""When a solve ends: at a residual, at an end time, or after a fixed number of cell applications."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .types import Reduce, State, Status, relative

PerSample = bool | Literal["auto"]


class Residual:
    """End where |F| <= tol |z + F| (norm=rel) or |F| <= tol (norm=abs), with F = f(z) - z; max_steps steps at most.

    per_sample: each row ends on its own residual; `auto` does so where the network's samples are independent.
    best: return the iterate of the least residual, not the last. Nothing here costs an evaluation.
    patience: end as STALLED if within 3 tol and the last so many are within a factor of 1.3 (0: never); protect: if so
    many times the first times the numbers in the state (0: never). arXiv 2201.12240's deq_default has 30 and 1e3.
    """

    t1 = math.inf
    needs_equilibrium = True

    def __init__(self, tol: float = 1e-2, norm: Literal["rel", "abs"] = "rel", max_steps: int = 50,
                 per_sample: PerSample = "auto", best: bool = True,
                 patience: int = 0, protect: float = 0.0):  # fmt: skip
        if not 0 < tol < math.inf:
            raise ValueError(f"stop.tol={tol} must be positive and finite, such as 1e-2")
        if norm not in ("rel", "abs"):
            raise ValueError(f"stop.norm={norm!r} must be rel or abs")
        if max_steps < 1:
            raise ValueError(f"stop.max_steps={max_steps} must be at least 1")
        if patience < 0 or not protect >= 0:
            raise ValueError(f"stop.patience={patience} and stop.protect={protect} must not be negative; 0 is never")
        self.tol, self.norm, self.max_steps, self.per_sample = float(tol), norm, max_steps, per_sample
        self.best, self.patience, self.protect = best, patience, float(protect)

    def watch(self, reduce: Reduce) -> ResidualWatch:
        return (Impatient if self.patience or self.protect else ResidualWatch)(self, reduce)


class ResidualWatch:  # the score is the residual, relative or absolute as the stop has it
    def __init__(self, stop: Residual, reduce: Reduce):
        self.stop, self.reduce = stop, reduce
        self.score: Tensor | None = None

    def open(self, state: State, k: int) -> Tensor:
        residual = self.residual(state)
        if self.stop.best:
            self.score = residual
            return residual > self.stop.tol
        return (residual > self.stop.tol) & (residual < math.inf)

    def residual(self, state: State) -> Tensor:
        size = self.reduce.norm(state.F)
        if self.stop.norm == "rel":
            fz = state.z + state.F if state.fz is None else state.fz
            size = relative(size, self.reduce.norm(fz))
        return size.squeeze(1)

    def verdict(self, state: State) -> Tensor:
        """Stricter than `open`: a norm that overflowed is no convergence, though what is divided by it is zero."""
        residual = self.residual(state)
        status = torch.where(residual > self.stop.tol, int(Status.MAX_STEPS), int(Status.CONVERGED))
        sane = (residual + self.reduce.norm(state.z + state.F).squeeze(1)).isfinite()
        return status.masked_fill(~sane, int(Status.NONFINITE))


class Impatient(ResidualWatch):
    """With the papers' two ways to give up."""

    def open(self, state: State, k: int) -> Tensor:
        residual, protect, patience = self.residual(state), self.stop.protect, self.stop.patience
        self.score = residual if self.stop.best else None
        if k == 0:
            self.limit = residual * (protect * self.reduce.numbers(state.z) or torch.inf)
            self.stalled, self.recent = residual.new_zeros(len(residual), dtype=torch.bool), list[Tensor]()
        open_rows = (residual > self.stop.tol) & (residual < math.inf)
        self.stalled = self.stalled | (open_rows & (residual >= self.limit))
        self.recent = [*self.recent, residual][-patience:] if patience else []
        if len(self.recent) == patience > 0:
            window = torch.stack(self.recent)
            self.stalled |= open_rows & (residual <= 3 * self.stop.tol) & (window.amax(0) < 1.3 * window.amin(0))
        return open_rows & ~self.stalled

    def verdict(self, state: State) -> Tensor:
        status = super().verdict(state)
        return status.masked_fill((status == Status.MAX_STEPS) & self.stalled, int(Status.STALLED))


class EndTime:
    """End at t = t1; the last step lands on it. max_steps attempts (accepted or not) at most."""

    needs_equilibrium = False

    def __init__(self, t1: float = 1.0, max_steps: int = 1000, per_sample: PerSample = "auto"):
        if not 0 < t1 < math.inf:
            raise ValueError(f"stop.t1={t1} must be positive and finite")
        self.t1, self.max_steps, self.per_sample = float(t1), max_steps, per_sample

    def watch(self, reduce: Reduce) -> ClockWatch:
        return ClockWatch(self.t1, Status.MAX_STEPS, reduce)


class FixedSteps:
    """`steps` applications of the cell from the start, whatever the residual: the budget of an explicit network.

    The start's own evaluation is the first of them, so that with Picard the output f(z) is `steps` nested cells.
    """

    t1 = math.inf
    needs_equilibrium = True

    def __init__(self, steps: int = 10, per_sample: PerSample = "auto"):
        if steps < 1:
            raise ValueError(f"stop.steps={steps} must be at least 1")
        self.steps, self.max_steps, self.per_sample = steps, steps - 1, per_sample

    def watch(self, reduce: Reduce) -> ClockWatch:
        return ClockWatch(self.t1, Status.REACHED_END, reduce)


class ClockWatch:  # ends at t1 or at the cap, whatever the residual
    score: Tensor | None = None

    def __init__(self, t1: float, at_cap: Status, reduce: Reduce):
        self.t1, self.at_cap, self.reduce = t1, at_cap, reduce

    def open(self, state: State, k: int) -> Tensor:
        return self.reduce.whole(state.finite() & (state.t < self.t1))

    def verdict(self, state: State) -> Tensor:
        status = torch.where(self.reduce.whole(state.t < self.t1), int(self.at_cap), int(Status.REACHED_END))
        return status.masked_fill(~self.reduce.whole(state.finite()), int(Status.NONFINITE))
