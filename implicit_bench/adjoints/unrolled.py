from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..core import Field, Solution
from ..core.types import FixedPoint
from .base import BackwardLog, Solve


class Unroll:
    """Automatic differentiation through every step of the solver: exact for what the solver did.

    Cost: one VJP of F for each of its calls, and the graphs of all of them in memory. Step sizes and the time at which
    a solve stops are constants. An equilibrium layer puts out f(z) of the last z, whose evaluation the solve has made.
    """

    needs_equilibrium = False

    def __call__(self, F: Field, z0: Tensor, solve: Solve,
                 wrt: Sequence[Tensor]) -> tuple[Tensor, Solution, BackwardLog]:  # fmt: skip
        solution = solve(F, z0)
        z = solution.fixed_point if isinstance(F, FixedPoint) else solution.value
        return z, solution, BackwardLog(vjps=solution.stats.calls)
