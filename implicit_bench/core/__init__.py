"""The mathematics of solving. Imports torch only."""

from .solve import relative_residual, solve
from .stop import EndTime, FixedSteps, Residual
from .types import Field, FixedPoint, Reduce, Solution, Solver, State, Stats, Status, Stop

__all__ = ["EndTime", "Field", "FixedPoint", "FixedSteps", "Reduce", "Residual", "Solution", "Solver", "State", "Stats",
           "Status", "Stop", "relative_residual", "solve"]  # fmt: skip
