from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..adjoints import Adjoint, BackwardLog, Unroll
from ..core import Field, FixedPoint, FixedSteps, Reduce, Solution, Solver, Stop, solve
from ..solvers import Picard
from .cells import Cell
from .inits import Init


class LayerOutput(NamedTuple):
    z: Tensor  # (B, D) with gradient
    start: Tensor  # (B, D) with gradient, for penalties
    solution: Solution
    backward: BackwardLog  # filled in by the backward

    def calls(self, start_calls: int) -> int:
        """Evaluations of f in the forward: the start's own, the solve's, the re-attaching one."""
        return start_calls + self.solution.stats.calls + self.backward.forward_calls


@dataclass(frozen=True)
class _Solve:
    solver: Solver
    stop: Stop
    reduce: Reduce

    def __call__(self, F: Field, z0: Tensor) -> Solution:
        return solve(F, z0, solver=self.solver, stop=self.stop, reduce=self.reduce)


class ImplicitLayer(nn.Module):
    """x -> z with z = f(z, x) (field=equilibrium), or z = z(t1) of dz/dt = f(z, x, t) (field=ode).

    The four choices are independent: any init, solver, stop and adjoint that make sense together; a combination that
    does not is refused with a ValueError that says what to use instead.
    """

    def __init__(self, cell: Cell, init: Init, solver: Solver, stop: Stop, adjoint: Adjoint,
                 field: Literal["equilibrium", "ode"] = "equilibrium"):  # fmt: skip
        super().__init__()
        self.cell, self.init, self.solver, self.stop, self.adjoint, self.field = cell, init, solver, stop, adjoint, field
        self.f = cell  # what is called NFE times; a compiled cell replaces it
        self._direct: list[Tensor] | None = None
        self._check()
        wanted = getattr(stop, "per_sample", "auto")
        if wanted is True and not cell.batch_independent:
            raise ValueError("per-sample stopping needs independent samples, but this network uses batch statistics; "
                             "use stop.per_sample=false or network.norm=group")  # fmt: skip
        self.reduce = Reduce(cell.batch_independent if wanted == "auto" else bool(wanted))

    def forward(self, x: Tensor) -> LayerOutput:
        return self._run(x, self.solver, self.stop, self.adjoint)

    def unrolled(self, x: Tensor, depth: int) -> LayerOutput:
        """`depth` plain applications of the cell with ordinary backpropagation: how the papers pretrain."""
        return self._run(x, Picard(), FixedSteps(depth), Unroll(), "equilibrium")

    def within(self, x: Tensor, steps: int) -> LayerOutput:
        """The layer allowed only so many applications of the cell; 0 gives the start itself."""
        return self._run(x, self.solver, FixedSteps(steps), self.adjoint)

    def _run(self, x: Tensor, solver: Solver, stop: Stop, adjoint: Adjoint, field: str | None = None) -> LayerOutput:
        ctx = self.cell.begin(x)

        def f(z: Tensor, t: Tensor) -> Tensor:
            return self.f(z, ctx, t)

        start = self.init(x, f)
        F: Field = FixedPoint(f) if (field or self.field) == "equilibrium" else f
        problem = _Solve(solver, stop, self.reduce)
        if torch.is_grad_enabled():
            wrt = self._closed_over(ctx, start) if getattr(adjoint, "uses_wrt", False) else ()
            z, solution, log = adjoint(F, start.detach(), problem, wrt)
        else:
            solution, log = problem(F, start), BackwardLog()
            z = solution.fixed_point if isinstance(F, FixedPoint) else solution.value
        return LayerOutput(z, start, solution, log)

    def _closed_over(self, ctx: Any, z: Tensor) -> list[Tensor]:
        """What f closes over: the context, and the parameters that f itself uses, not those that only `begin` does.

        The latter get their gradient through the context; asking for both would walk the context's graph every call.
        """
        if self._direct is None:
            probe = self.cell(z.detach(), _map(ctx, Tensor.detach), z.new_zeros(len(z)))
            parameters = list(self.cell.parameters())  # type: ignore[attr-defined]
            used = torch.autograd.grad(probe.sum(), parameters, allow_unused=True)
            self._direct = [p for p, g in zip(parameters, used) if g is not None]
        context: list[Tensor] = []
        _map(ctx, context.append)
        return [*self._direct, *(t for t in context if t.requires_grad)]

    def _check(self) -> None:
        name = type(self.solver).__name__
        is_ode = self.field == "ode"
        if is_ode and self.stop.needs_equilibrium:
            raise ValueError(f"stop={type(self.stop).__name__} looks for f(z) = z, but field=ode has no equilibrium "
                             "meaning; use stop=end_time or field=equilibrium")  # fmt: skip
        if is_ode and getattr(self.adjoint, "needs_equilibrium", False):
            raise ValueError(f"adjoint={type(self.adjoint).__name__} needs a fixed point, which field=ode does not "
                             "have; use adjoint=backsolve or adjoint=unroll")  # fmt: skip
        if getattr(self.solver, "needs_end_time", False) and self.stop.t1 == float("inf"):
            raise ValueError(f"solver={name} integrates to an end time and cannot stop at a residual; use "
                             "stop=end_time or solver=tsit5")  # fmt: skip
        if self.stop.t1 < float("inf") and not hasattr(self.solver, "tableau") and not hasattr(self.solver, "integrate"):
            raise ValueError(f"solver={name} finds roots and has no time; use stop=residual or solver=tsit5")
        if getattr(self.adjoint, "needs_end_time", False) and self.stop.t1 == float("inf"):
            raise ValueError("adjoint=backsolve integrates back from an end time; use stop=end_time or adjoint=ift")
        if hasattr(self.cell, "cells"):
            applications = getattr(self.stop, "steps", None)
            if not (isinstance(self.solver, Picard) and isinstance(self.adjoint, Unroll)
                    and applications == len(self.cell.cells)):  # fmt: skip
                raise ValueError(f"{len(self.cell.cells)} untied cells are applied once each; use solver=picard "
                                 f"adjoint=unroll stop=fixed_steps stop.steps={len(self.cell.cells)}")  # fmt: skip


def _map(ctx: Any, fn: Callable[[Tensor], Any]) -> Any:
    """`fn` on every tensor of a cell's context: tensors in tuples, lists and dicts."""
    if isinstance(ctx, Tensor):
        return fn(ctx)
    if isinstance(ctx, dict):
        return {key: _map(value, fn) for key, value in ctx.items()}
    if isinstance(ctx, (tuple, list)):
        return [_map(value, fn) for value in ctx]
    return ctx
