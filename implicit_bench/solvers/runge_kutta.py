"""Adaptive explicit Runge-Kutta methods with an embedded error estimate."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core import Field, Reduce, Solver, State


class Tableau(NamedTuple):
    """A first-same-as-last (FSAL) pair: the last row of `a` is b, so the last stage is F at the new state."""

    order: int
    a: tuple[tuple[float, ...], ...]  # rows of the stages 2..s
    c: tuple[float, ...]  # their times
    e: tuple[float, ...]  # b - b_hat, the error's weights


class Control(NamedTuple):
    dt: Tensor  # (R, 1) the next step
    t1: float


class RungeKutta(Solver):
    """Step-size control by h <- h clip(safety (1/error)^(1/order)), error = rms(e / (atol + rtol max|z|)).

    Error and step size belong to a row or to the batch as `Reduce` says. Cost: `stages - 1` evaluations an attempt,
    accepted or not, and 2 to start (one for the automatic first step); s + 2 states of memory. The field's NaNs reject
    a step, so that they shrink it until STEP_TOO_SMALL. Explicit: slow on stiff fields.
    """

    has_time, one_call = True, False
    tableau: ClassVar[Tableau]
    safety, shrink, grow = 0.9, 0.2, 10.0

    def __init__(self, rtol: float = 1e-3, atol: float = 1e-3):
        if not (rtol >= 0 and atol > 0):
            raise ValueError(f"solver.rtol={rtol} and solver.atol={atol} must be positive")
        self.rtol, self.atol = float(rtol), float(atol)

    def init(self, F: Field, z0: Tensor, t1: float, reduce: Reduce) -> State:
        t = torch.zeros(len(z0), dtype=torch.promote_types(z0.dtype, torch.float32), device=z0.device)
        F0 = F(z0, t)
        return State(z0, F0, t, Control(self._first_step(F, z0, F0, t, t1, reduce), t1))

    def step(self, F: Field, state: State, reduce: Reduce) -> State:
        z, k1, t, (dt, t1) = state.z, state.F, state.t, state.mem
        h = dt.to(z.dtype)
        stages = [k1]
        for row, c in zip(self.tableau.a, self.tableau.c):
            new = torch.addcmul(z, h, _sum(row, stages))
            stages.append(F(new, t + c * dt.squeeze(1)))
        with torch.no_grad():
            error = reduce.rms(h * _sum(self.tableau.e, stages) / self._scale(z, new, reduce))
            reached = torch.where((dt >= t1 - t.unsqueeze(1)).squeeze(1), t1, t + dt.squeeze(1))
            accept = (error <= 1.0) & (reached > t).unsqueeze(1)  # no where the error is NaN or the time stands still
            factor = (self.safety * error.pow(-1.0 / self.tableau.order)).clamp(self.shrink, self.grow)
            factor = torch.where(accept | (error > 1.0), factor, self.shrink)
            t = torch.where(accept.squeeze(1), reached, t)
            dt = torch.minimum(dt * factor, t1 - t.unsqueeze(1))
        return State(torch.where(accept, new, z), torch.where(accept, stages[-1], k1), t, Control(dt, t1))

    def moves(self, state: State, going: Tensor) -> Tensor:
        return going & (state.mem.dt > torch.finfo(state.t.dtype).eps * state.t.unsqueeze(1).clamp_min(1e-5)).all(1)

    @torch.no_grad()
    def _first_step(self, F: Field, z: Tensor, F0: Tensor, t: Tensor, t1: float, reduce: Reduce) -> Tensor:
        """Hairer, Norsett & Wanner, Solving ODEs I, II.4: (R, 1), at the cost of one evaluation."""
        scale = self._scale(z, z, reduce)
        d0, d1 = reduce.rms(z / scale), reduce.rms(F0 / scale)
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        F1 = F(torch.addcmul(z, h0.to(z.dtype), F0), t + h0.squeeze(1))
        d2 = reduce.rms((F1 - F0) / scale) / h0
        steepest = torch.maximum(d1, d2)
        h1 = torch.where(steepest <= 1e-15, (h0 * 1e-3).clamp_min(1e-6), (0.01 / steepest) ** (1 / self.tableau.order))
        h = torch.minimum(100 * h0, h1).nan_to_num(nan=1e-6)
        return torch.minimum(h, t1 - t.unsqueeze(1))

    def _scale(self, z: Tensor, new: Tensor, reduce: Reduce) -> Tensor:
        return self.atol + self.rtol * torch.maximum(z.abs(), new.abs())


def _sum(weights: tuple[float, ...], stages: list[Tensor]) -> Tensor:
    total = stages[0] * weights[0]
    for w, k in zip(weights[1:], stages[1:]):
        if w:
            total = total.add(k, alpha=w)
    return total


class Tsit5(RungeKutta):
    """Tsitouras 5(4), Comput. Math. Appl. 62 (2011) 770: order 5, 7 stages FSAL, 6 evaluations an attempt."""

    tableau = Tableau(
        order=5,
        c=(0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
        a=(
            (0.161,),
            (-0.008480655492356989, 0.335480655492357),
            (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
            (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
            (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
            (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774),
        ),
        e=(0.00178001105222577714, 0.0008164344596567469, -0.007880878010261995, 0.1447110071732629,
           -0.5823571654525552, 0.45808210592918697, -0.015151515151515152),
    )  # fmt: skip
