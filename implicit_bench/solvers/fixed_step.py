"""Explicit Runge-Kutta methods of fixed steps."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core import Field, Reduce, Solver, State
from .runge_kutta import Tableau, attempt


class Clock(NamedTuple):
    k: int  # steps taken; the time is k dt, so that no rounding adds up
    t1: float


class FixedStep(Solver):
    """Steps of `dt`, the last shortened to land on the end time; to steady state, where t1 is infinite, all alike.

    No error control: the error at the end falls as dt^order, and a dt beyond the stability limit diverges.
    """

    has_time = True
    order: ClassVar[int]
    tableau: ClassVar[Tableau]

    def __init__(self, dt: float = 0.1):
        if not 0 < dt < math.inf:
            raise ValueError(f"solver.dt={dt} must be positive and finite, such as 0.1")
        self.dt = float(dt)

    def init(self, F: Field, z0: Tensor, t1: float, reduce: Reduce) -> State:
        return super().init(F, z0, t1, reduce)._replace(mem=Clock(0, t1))

    def step(self, F: Field, state: State, reduce: Reduce) -> State:
        k, t1 = state.mem
        t, dt = (k + 1) * self.dt, self.dt
        if t > t1 * (1 - 1e-9):
            t, dt = t1, max(t1 - k * self.dt, 0.0)
        z, _ = attempt(self.tableau, F, state, state.t.new_full((1, 1), dt))
        return self.at(F, z, torch.full_like(state.t, t), Clock(k + 1, t1))


class Euler(FixedStep):
    """z <- z + dt F(z): on F = f - z a Picard iteration of damping dt. Order 1, one evaluation a step, one state."""

    order = 1
    tableau = Tableau(a=((1.0,),), c=(1.0,))


class RK4(FixedStep):
    """The classical Runge-Kutta method (Kutta 1901). Order 4, four evaluations a step, 5 states of memory."""

    order, one_call = 4, False
    tableau = Tableau(
        a=((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)), c=(1 / 2, 1 / 2, 1.0, 1.0)
    )
