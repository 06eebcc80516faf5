"""What adaptive ODE solvers share: the error norm, the first step, the verdict on an attempt and the next step."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..core import Field, Reduce, Solver, State


class Control(NamedTuple):
    dt: Tensor  # (R, 1) the next step
    memory: Tensor  # (R, 1) what pi control keeps of the last accepted error: safety error^(.4/k)
    t1: float
    stuck: Tensor | None = None  # (R,) systems whose step has become too small; None: none
    past: Any = None  # a method's own


class Adaptive(Solver):
    """Explicit methods that choose their step. Each step of the loop is one attempt, accepted if

    error = rms(e / (atol + rtol max|z|)) <= 1, with e = O(h^k) and k = `order`. Then
    controller=pi: h <- h .9 error^(-.7/k) previous^(.4/k), or h .9 error^(-1/k) after a rejected attempt (Gustafsson,
    ACM TOMS 17 (1991) 533, with OrdinaryDiffEq.jl's constants); controller=i: h <- h .9 error^(-1/k), no smaller after
    an accepted attempt: torchdiffeq's. Both change h by no less than .2 and no more than 10.
    Error and step size belong to a row or to the batch as `Reduce` says. The field's NaNs reject an attempt, so that
    they shrink the step until STEP_TOO_SMALL.
    """

    has_time, one_call = True, False
    order: ClassVar[int]
    safety, shrink, grow = 0.9, 0.2, 10.0
    first: float | None = None  # a first step to try, where the user of the solver knows better than an estimate

    def __init__(self, rtol: float = 1e-3, atol: float = 1e-3, controller: Literal["pi", "i"] = "pi"):
        if not (rtol >= 0 and atol > 0):
            raise ValueError(f"solver.rtol={rtol} and solver.atol={atol} must be positive")
        if controller not in ("pi", "i"):
            raise ValueError(f"solver.controller={controller!r} must be pi or i")
        self.rtol, self.atol, self.controller = float(rtol), float(atol), controller

    def init(self, F: Field, z0: Tensor, t1: float, reduce: Reduce) -> State:
        state = super().init(F, z0, t1, reduce)
        if self.first is None:
            dt = self._first_step(F, state, t1, reduce)
        else:
            dt = torch.full_like(reduce.norm(z0), min(self.first, t1))
        return state._replace(mem=Control(dt, torch.full_like(dt, self.safety), t1))

    def moves(self, state: State, going: Tensor) -> Tensor:
        return going if state.mem.stuck is None else going & ~state.mem.stuck

    def tolerance(self, size: Tensor) -> Tensor:
        """What is allowed of each number: size = |z|, overwritten."""
        return size.mul_(self.rtol).add_(self.atol)

    def error(self, e: Tensor, z: Tensor, new: Tensor, reduce: Reduce) -> Tensor:
        return reduce.rms(e.div_(self.tolerance(torch.maximum(z.abs(), new.abs()))))

    def decide(self, state: State, error: Tensor, grow: float | Tensor = 10.0) -> tuple[Verdict, Tensor, Control]:
        """The verdict, the time then (B,), and what is next."""
        dt, memory, t1 = state.mem[:3]
        k, take = self.order, Verdict(error <= 1.0)
        if self.controller == "pi":
            factor = (memory * error.pow(-0.7 / k)).clamp_min(self.shrink).clamp_max(grow)
            memory = take(self.safety * error.clamp_min(1e-4).pow(0.4 / k), memory)
        else:
            factor = (self.safety * error.pow(-1 / k)).clamp_min(1.0).clamp_max(grow)
        if not take.all:
            factor = take(factor, (self.safety * error.pow(-1 / k)).nan_to_num(0.0).clamp(self.shrink, 1.0))
        t, following = state.t + dt.squeeze(1), dt * factor
        if t1 < math.inf:
            t = torch.where(dt.squeeze(1) < t1 - state.t, t, t1)
        t = t if take.all else torch.where(take.accept.squeeze(1), t, state.t)
        if t1 < math.inf:
            following = torch.minimum(following, t1 - t[: len(dt)].unsqueeze(1))
        stuck = None
        if not take.all:
            least = torch.finfo(t.dtype).eps * t[: len(dt)].clamp_min(1e-5)
            stuck = ~(take.accept | (following > least.unsqueeze(1))).squeeze(1)
        return take, t, Control(following, memory, t1, stuck)

    @torch.no_grad()
    def _first_step(self, F: Field, state: State, t1: float, reduce: Reduce) -> Tensor:
        """Hairer, Norsett & Wanner, Solving ODEs I, II.4: (R, 1), at the cost of one evaluation."""
        z, F0, t = state[:3]
        tolerance = self.tolerance(z.abs())
        d0, d1 = reduce.rms(z / tolerance), reduce.rms(F0 / tolerance)
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp_max(t1)
        F1 = F(torch.addcmul(z, h0.to(z.dtype), F0), t + h0.squeeze(1))
        d2 = reduce.rms((F1 - F0) / tolerance) / h0
        steepest = torch.maximum(d1, d2)
        h1 = torch.where(steepest <= 1e-15, (h0 * 1e-3).clamp_min(1e-6), (0.01 / steepest) ** (1 / self.order))
        h = torch.minimum(100 * h0, h1).nan_to_num(nan=1e-6).clamp_max(t1)
        return torch.where(d1.isfinite(), h, torch.nan)  # a row that is lost already is stuck at once


class Verdict:
    """Which systems accept, (R, 1). On a CPU the host looks, so that nothing is copied where all agree."""

    def __init__(self, accept: Tensor):
        self.accept = accept
        self.count = None if accept.is_cuda else int(torch.count_nonzero(accept))
        self.all, self.none = self.count == accept.numel(), self.count == 0

    def __call__(self, new: Tensor, old: Tensor) -> Tensor:
        """torch.where(accept, new, old)"""
        if self.all:
            return new
        if self.none:
            return old
        if self.count is None or new.numel() < 2**16:
            return torch.where(self.accept, new, old)
        rejected = (~self.accept).squeeze(1).nonzero().squeeze(1)
        return new.index_copy(0, rejected, old[rejected])  # takes a third of where's time on a large state
