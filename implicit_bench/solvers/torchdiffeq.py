from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import Field


class TorchDiffeq:
    """torchdiffeq's solvers (https://github.com/rtqichen/torchdiffeq), which own their loop: stop=end_time only.

    One step-size sequence for the whole batch. dopri5 costs 6 evaluations an attempt and 2 to start, and memory for 7
    stages and the interpolant. A failed solve (its assertion on step size) comes back as NaN, status NONFINITE.
    """

    def __init__(self, method: str = "dopri5", rtol: float = 1e-3, atol: float = 1e-3):
        from torchdiffeq._impl.odeint import SOLVERS

        if method not in SOLVERS:
            raise ValueError(f"solver.method={method!r} is not one of torchdiffeq's: {', '.join(SOLVERS)}")
        self.method, self.rtol, self.atol = method, float(rtol), float(atol)

    def integrate(self, F: Field, z0: Tensor, t1: float, wrt: Sequence[Tensor] | None = None) -> Tensor:
        """z(t1), (B, D). With `wrt`, the gradient comes from torchdiffeq's continuous adjoint, else by autograd."""
        from torchdiffeq import odeint, odeint_adjoint

        def field(t: Tensor, z: Tensor) -> Tensor:
            return F(z, t.expand(len(z)))

        times = torch.tensor([0.0, t1], dtype=z0.dtype, device=z0.device)
        options: dict[str, Any] = {"method": self.method, "rtol": self.rtol, "atol": self.atol}
        try:
            if wrt is None:
                return odeint(field, z0, times, **options)[-1]
            return odeint_adjoint(field, z0, times, adjoint_params=tuple(wrt), **options)[-1]
        except AssertionError as error:
            if not str(error).startswith(("underflow in dt", "non-finite values", "max_num_steps")):
                raise  # the field's own
            return torch.full_like(z0, float("nan")) * sum((w.sum() for w in wrt or ()), z0.new_zeros(()))
