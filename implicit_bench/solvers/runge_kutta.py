"""Adaptive explicit Runge-Kutta methods with an embedded error estimate."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core import Field, Reduce, State
from .step_size import Adaptive


class Tableau(NamedTuple):
    """First same as last (FSAL): the last row of `a` is b, so that the last stage is F at the new state."""

    a: tuple[tuple[float, ...], ...]  # rows of the stages 2..s
    c: tuple[float, ...]  # their times
    e: tuple[float, ...] = ()  # b - b_hat, the error's weights; none in a method of fixed steps


def attempt(tableau: Tableau, F: Field, state: State, dt: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The state after a step of dt (R, 1), and all stages but the last, which is F there."""
    h = dt.to(state.z.dtype)
    stages = [state.F]
    for row, c in zip(tableau.a, tableau.c):
        new = torch.addcmul(state.z, h, weighted(row, stages))
        if len(stages) < len(tableau.a):
            stages.append(F(new, state.t + c * dt.squeeze(1)))
    return new, stages


def weighted(weights: tuple[float, ...], stages: list[Tensor]) -> Tensor:
    terms = [(w, k) for w, k in zip(weights, stages) if w]
    total = terms[0][1] * terms[0][0]
    for w, k in terms[1:]:
        total.add_(k, alpha=w)
    return total


class RungeKutta(Adaptive):
    """An FSAL pair. Cost: `stages - 1` evaluations an attempt, accepted or not, and 2 to start (one for the automatic
    first step); s + 2 states of memory. Explicit: slow on stiff fields.
    """

    tableau: ClassVar[Tableau]

    def step(self, F: Field, state: State, reduce: Reduce) -> State:
        new, stages = attempt(self.tableau, F, state, state.mem.dt)
        there = self.at(F, new, state.t + state.mem.dt.squeeze(1))
        stages.append(there.F)
        with torch.no_grad():
            e = weighted(self.tableau.e, stages).mul_(state.mem.dt)
            take, t, control = self.decide(state, self.error(e, state.z, new, reduce))
        return State(take(new, state.z), take(there.F, state.F), t, control, there.fz if take.all else None)


class Bosh3(RungeKutta):
    """Bogacki & Shampine 3(2), Appl. Math. Lett. 2 (1989) 321: order 3, 4 stages FSAL, 3 evaluations an attempt."""

    order = 3
    tableau = Tableau(
        c=(1 / 2, 3 / 4, 1.0),
        a=((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
        e=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
    )


class Dopri5(RungeKutta):
    """Dormand & Prince 5(4), J. Comput. Appl. Math. 6 (1980) 19: order 5, 7 stages FSAL, 6 evaluations an attempt.

    The error's weights are Shampine's, two thirds of theirs. So controller=i makes torchdiffeq's attempts, but for the
    last, which is shortened to land on the end where torchdiffeq interpolates.
    """

    order = 5
    tableau = Tableau(
        c=(1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
        a=(
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        e=(71 / 86400, 0.0, -142 / 50085, 71 / 2880, -5751 / 169600, 44 / 1575, -1 / 60),
    )


class Tsit5(RungeKutta):
    """Tsitouras 5(4), Comput. Math. Appl. 62 (2011) 770: order 5, 7 stages FSAL, 6 evaluations an attempt."""

    order = 5
    tableau = Tableau(
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
