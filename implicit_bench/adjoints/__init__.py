"""How gradients return: one file a method, each blind to the solver that found z."""

from .backsolve import Backsolve
from .base import Adjoint, BackwardLog, Solve
from .implicit import IFT, JFB
from .phantom import Phantom
from .unrolled import Unroll

__all__ = ["IFT", "JFB", "Adjoint", "Backsolve", "BackwardLog", "Phantom", "Solve", "Unroll"]
