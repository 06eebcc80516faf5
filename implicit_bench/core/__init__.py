"""The mathematics of solving. Imports torch only."""

from .solve import relative_residual, solve
from .stop import EndTime, FixedSteps, Residual
from .types import Field, FixedPoint, OwnLoop, Reduce, Solution, Solver, State, Stats, Status, Stop, Watch

__all__ = ["EndTime", "Field", "FixedPoint", "FixedSteps", "OwnLoop", "Reduce", "Residual", "Solution", "Solver",
           "State", "Stats", "Status", "Stop", "Watch", "relative_residual", "solve"]  # fmt: skip
