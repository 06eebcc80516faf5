"""What an adjoint is: it takes a field and a way to solve it, and returns z with a gradient.

    adjoint(F, z0 (B, D), solve, wrt) -> z (B, D), Solution, BackwardLog

`wrt` is every tensor that F closes over and that needs a gradient: parameters and the cell's context. For an
equilibrium field z is f(z*), one application of the cell after the solve, whose gradient is then corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import Field, Reduce, Solution, Solver, Stop, solve


@dataclass
class BackwardLog:
    """What the backward did; filled in when it has run."""

    forward_calls: int = 0  # F calls of the forward that the solution does not count (the re-attaching one)
    vjps: int = 0  # vector-Jacobian products of F, all of them
    calls: int = 0  # F calls made again in the backward
    iterations: Tensor | None = None  # (B,) of the linear solve
    residual: Tensor | None = None  # (B,) of the linear solve, relative to the right-hand side
    rhs_norm: Tensor | None = None  # (B,) |J^T g|
    converged: Tensor | None = None  # (B,) bool


@dataclass(frozen=True)
class Solve:
    """core.solve with its solver, stop and reduction already chosen."""

    solver: Solver
    stop: Stop
    reduce: Reduce

    def __call__(self, F: Field, z0: Tensor) -> Solution:
        return solve(F, z0, solver=self.solver, stop=self.stop, reduce=self.reduce)


Adjoint = Callable[[Field, Tensor, Solve, Sequence[Tensor]], tuple[Tensor, Solution, BackwardLog]]


def reattach(F: Field, z: Tensor) -> tuple[Tensor, Tensor]:
    """One tracked application of the map at a detached z: (zs, f(zs)), both (B, D)."""
    zs = z.detach().requires_grad_()
    with torch.enable_grad():
        return zs, F.f(zs, zs.new_zeros(len(zs)))  # type: ignore[attr-defined]
