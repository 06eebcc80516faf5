from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..core import Field, Solution
from .base import Adjoint, BackwardLog, Corrected, Solve, reattach, vjp_of


class Phantom(Adjoint):
    """Phantom gradient (Geng et al., arXiv 2111.05177): the gradient of k damped applications from z*.

    mode=unroll: z_i+1 = tau f(z_i) + (1 - tau) z_i from z_0 = z*, detached, and the gradient of z_k.
    mode=neumann: the cotangent tau sum_{i<k} (tau J^T + (1 - tau) I)^i g on one application at z*.
    The two agree where f is linear or z* exact, and tend to the exact gradient as steps grow, if the damped map
    contracts; steps=1, damping=1 is JFB. The value is f(z*) as under any adjoint, where the paper puts out z_k.

    Cost: unroll k evaluations in the forward and k VJPs, k graphs of memory; neumann one evaluation, k VJPs, one graph.
    """

    needs_equilibrium = True

    def __init__(self, steps: int = 5, damping: float = 0.5, mode: Literal["unroll", "neumann"] = "unroll"):
        if steps < 1:
            raise ValueError(f"adjoint.steps={steps} must be at least 1")
        if not 0 < damping <= 1:
            raise ValueError(f"adjoint.damping={damping} must lie in (0, 1]")
        if mode not in ("unroll", "neumann"):
            raise ValueError(f"adjoint.mode={mode!r} must be unroll or neumann")
        self.steps, self.damping, self.mode = steps, float(damping), mode

    def __call__(self, F: Field, z0: Tensor, solve: Solve,
                 wrt: Sequence[Tensor]) -> tuple[Tensor, Solution, BackwardLog]:  # fmt: skip
        solution, log = solve.untracked(F, z0), BackwardLog()
        z = (self._unroll if self.mode == "unroll" else self._neumann)(F, solution.value, log)
        return z, solution, log

    def _unroll(self, F: Any, z: Tensor, log: BackwardLog) -> Tensor:
        values = []
        for _ in range(self.steps):
            values.append(log.watch(F.f(z, z.new_zeros(len(z)))))
            z = z + self.damping * (values[-1] - z)
        log.forward_calls = self.steps
        return _Valued.apply(values[0].detach(), z)

    def _neumann(self, F: Field, z: Tensor, log: BackwardLog) -> Tensor:
        zs, z = reattach(F, z, log)

        def correction(g: Tensor) -> list[Tensor]:
            vjp, term, total = vjp_of(zs, z, log), g, g
            for _ in range(self.steps - 1):
                term = term + self.damping * (vjp(term) - term)
                total = total + term
            return [self.damping * total]

        return Corrected.apply("phantom", correction, z)


class _Valued(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, z: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        return None, g
