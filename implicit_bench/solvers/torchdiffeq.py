from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import Field, FixedPoint, Solution, State, Stats, Status, Stop, relative_residual
from ..core.solve import Counted

FAILURES = {"underflow in dt": Status.STEP_TOO_SMALL, "non-finite values": Status.NONFINITE,
            "max_num_steps": Status.MAX_STEPS}  # fmt: skip


class TorchDiffeq:
    """torchdiffeq's solvers (https://github.com/rtqichen/torchdiffeq), which own their loop: stop=end_time only.

    One step-size sequence for the whole batch. Adaptive methods steer by rtol and atol; dopri5 costs 6 evaluations an
    attempt and 2 to start, and memory for 7 stages and the interpolant. Methods of fixed steps take steps of
    `step_size`, or one step over the whole interval without it. A failed solve (its assertions) comes back as NaN, with
    a status that says why, one that fails in the backward of its adjoint as its AssertionError; stop.max_steps caps the
    attempts of Runge-Kutta methods, forward. Its steps are not known: stats.steps are evaluations.
    """

    has_time, one_call, needs_map = True, False, False

    def __init__(self, method: str = "dopri5", rtol: float = 1e-3, atol: float = 1e-3, step_size: float | None = None):
        from torchdiffeq._impl.odeint import SOLVERS
        from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver
        from torchdiffeq._impl.solvers import FixedGridODESolver

        if method not in SOLVERS:
            raise ValueError(f"solver.method={method!r} is not one of torchdiffeq's: {', '.join(SOLVERS)}")
        if step_size is not None and not issubclass(SOLVERS[method], FixedGridODESolver):
            raise ValueError(f"solver.step_size={step_size} is for fixed steps, but {method} chooses its own; "
                             "use solver.rtol and solver.atol")  # fmt: skip
        if step_size is not None and not step_size > 0:
            raise ValueError(f"solver.step_size={step_size} must be positive, such as 0.1")
        self.method, self.rtol, self.atol = method, float(rtol), float(atol)
        self.adapts = issubclass(SOLVERS[method], RKAdaptiveStepsizeODESolver)
        self.options = {} if step_size is None else {"step_size": float(step_size)}

    def solve(self, F: Field, z0: Tensor, stop: Stop, wrt: Sequence[Tensor] | None = None) -> Solution:
        """As core.solve does it; an equilibrium layer puts out f(z), so that its field is evaluated at the end."""
        equilibrium, F = isinstance(F, FixedPoint), Counted(F)
        z, failed = self.integrate(F, z0, stop, wrt)
        t = z.new_full((len(z),), stop.t1)
        end = State(z, F(z, t) if equilibrium else torch.zeros_like(z), t)
        nfe = torch.full((len(z),), F.nfe, device=z0.device)
        with torch.no_grad():
            status = torch.where(end.finite(), int(Status.REACHED_END), int(failed))
            field = end.F if equilibrium else torch.full_like(z, torch.nan)
            return Solution(z, field, status, Stats(nfe, nfe, F.nfe, t, relative_residual(z, field)))

    def integrate(self, F: Field, z0: Tensor, stop: Stop, wrt: Sequence[Tensor] | None) -> tuple[Tensor, Status]:
        """z(t1), (B, D), and why it is NaN. With `wrt`, by torchdiffeq's continuous adjoint, else by autograd."""
        from torchdiffeq import odeint, odeint_adjoint

        def field(t: Tensor, z: Tensor) -> Tensor:
            return F(z, t.expand(len(z)))

        times = torch.tensor([0.0, stop.t1], dtype=z0.dtype, device=z0.device)
        options = {**self.options, "max_num_steps": stop.max_steps} if self.adapts else self.options
        settings: dict[str, Any] = dict(method=self.method, rtol=self.rtol, atol=self.atol, options=options)
        try:
            if wrt is None:
                return odeint(field, z0, times, **settings)[-1], Status.NONFINITE
            settings |= {"adjoint_params": tuple(wrt), "adjoint_options": self.options}
            return odeint_adjoint(field, z0, times, **settings)[-1], Status.NONFINITE
        except AssertionError as error:
            failed = next((status for start, status in FAILURES.items() if str(error).startswith(start)), None)
            if failed is None:
                raise  # the field's own
            # with a graph always: torch's GroupNorm ends the process in a backward whose input wants no gradient
            zero = z0.new_zeros((), requires_grad=torch.is_grad_enabled())
            return torch.full_like(z0, float("nan")) * sum((w.sum() for w in wrt or ()), zero), failed
