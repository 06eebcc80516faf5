"""How z moves: one file a family, each a record of settings with `init` and `step`; the loop is core.solve."""

from .anderson import Anderson
from .picard import Picard
from .runge_kutta import RungeKutta, Tableau, Tsit5
from .torchdiffeq import TorchDiffeq

__all__ = ["Anderson", "Picard", "RungeKutta", "Tableau", "TorchDiffeq", "Tsit5"]
