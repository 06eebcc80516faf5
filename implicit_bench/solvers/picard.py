from __future__ import annotations

from torch import Tensor

from ..core import Field, Reduce, Solver, State


class Picard(Solver):
    """Fixed-point iteration z <- z + damping F(z), that is z <- f(z) at damping 1.

    Cost: one evaluation a step, one state of memory. Linear convergence at the rate of |J| < 1; diverges beyond.
    """

    def __init__(self, damping: float = 1.0):
        if not 0 < damping <= 1:
            raise ValueError(f"solver.damping={damping} must lie in (0, 1]")
        self.damping = float(damping)

    def step(self, F: Field, state: State, reduce: Reduce) -> State:
        return self.at(F, damped(state, self.damping), state.t)


def damped(state: State, damping: float) -> Tensor:
    """z + damping F, (B, D): f(z) itself at damping 1, where it is known."""
    if state.fz is not None and damping == 1.0:
        return state.fz
    return state.z.add(state.F, alpha=damping)
