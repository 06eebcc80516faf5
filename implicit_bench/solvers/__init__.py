"""How z moves: one file a family, each a record of settings with `init` and `step`; the loop is core.solve."""

from .anderson import Anderson
from .broyden import Broyden
from .fixed_step import RK4, Euler, FixedStep
from .gmres import gmres
from .homotopy import Homotopy
from .picard import Picard
from .runge_kutta import Bosh3, Dopri5, RungeKutta, Tableau, Tsit5
from .torchdiffeq import TorchDiffeq
from .vcab3 import Vcab3

__all__ = ["RK4", "Anderson", "Bosh3", "Broyden", "Dopri5", "Euler", "FixedStep", "Homotopy", "Picard", "RungeKutta",
           "Tableau", "TorchDiffeq", "Tsit5", "Vcab3", "gmres"]  # fmt: skip
