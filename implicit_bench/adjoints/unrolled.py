from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..core import Field, Solution
from ..core.types import FixedPoint
from .base import BackwardLog, Solve


class Unroll:
    """Automatic differentiation through every step of the solver: exact for what the solver did.

    Cost: one VJP of F for each call that z depends on (one that only chose the first step's size is none), and the
    graphs of all of them in memory. Step sizes and the time at which a solve stops are constants. An equilibrium layer
    puts out f(z) of the last z, whose evaluation the solve has made.
    """

    needs_equilibrium = False

    def __call__(self, F: Field, z0: Tensor, solve: Solve,
                 wrt: Sequence[Tensor]) -> tuple[Tensor, Solution, BackwardLog]:  # fmt: skip
        log = BackwardLog()
        equilibrium = isinstance(F, FixedPoint)
        f = F.f if isinstance(F, FixedPoint) else F

        def count(g: Tensor) -> None:
            log.vjps += 1

        def counted(z: Tensor, t: Tensor) -> Tensor:
            out = f(z, t)
            if out.requires_grad:
                out.register_hook(count)
            return out

        solution = solve(FixedPoint(counted) if equilibrium else counted, z0)
        return solution.fixed_point if equilibrium else solution.value, solution, log
