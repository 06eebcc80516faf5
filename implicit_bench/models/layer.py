from __future__ import annotations

import re
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..adjoints import Adjoint, BackwardLog, Solve, Unroll
from ..adjoints.base import watched
from ..core import Field, FixedPoint, FixedSteps, OwnLoop, Solution, Solver, State, Stop
from ..solvers import Picard
from ..world import reducer
from .cells import Cell
from .inits import Init


class Iterate(NamedTuple):
    z: Tensor  # (B, D) without gradient
    t: Tensor  # (B,)
    dt: Tensor | None  # (R, 1) the step that is tried from here; None where the solver has none


class LayerOutput(NamedTuple):
    z: Tensor  # (B, D) with gradient
    start: Tensor  # (B, D) with gradient, for penalties
    solution: Solution
    backward: BackwardLog  # filled in by the backward
    F: Field  # what was solved, a FixedPoint or f itself
    solver: Solver  # by whom
    iterates: list[Iterate]  # the start and where each step led, if keep_iterates

    def calls(self, start_calls: int) -> int:
        """Evaluations of f in the forward: the start's own, the solve's, the re-attaching one."""
        return start_calls + self.solution.stats.calls + self.backward.forward_calls

    def again(self, z: Tensor, t: Tensor) -> Tensor:
        """f(z, t) once more, for a penalty: the evaluation is counted, and so is every VJP of it."""
        f = self.F.f if isinstance(self.F, FixedPoint) else self.F
        self.backward.forward_calls += 1
        out = f(z, t)
        return self.backward.watch(out.view_as(out))  # a view: the second derivative may come by f's own output

    def kept(self) -> list[Iterate]:
        if not self.iterates:
            raise ValueError("the layer kept no iterates; set layer.keep_iterates = True before it solves")
        return self.iterates

    def after(self, steps: Tensor) -> Iterate:
        """Where each row stood after so many steps, (R,) with R = 1 for all alike, each at most those it made."""
        z, t, dt = self.kept()[0]
        wanted = range(len(self.iterates)) if steps.is_cuda else set(steps.tolist())  # on CUDA the host does not look
        for k in wanted:
            new, here = self.iterates[k], steps == k
            z, t = torch.where(here.unsqueeze(1), new.z, z), torch.where(here, new.t, t)
            dt = dt if dt is None or new.dt is None else torch.where(here.unsqueeze(1), new.dt, dt)
        return Iterate(z, t, dt)


class ImplicitLayer(nn.Module):
    """x -> z with z = f(z, x) (field=equilibrium), or z = z(t1) of dz/dt = f(z, x, t) (field=ode), or f(z(t1), x, t1)
    of that (field=ode_then_f, the neural ODE of arXiv 2201.12240's code).

    The four choices are independent: any init, solver, stop and adjoint that make sense together; a combination that
    does not is refused with a ValueError that says what to use instead. `keep_iterates`: a tracked solve keeps all its
    states for the penalties that ask for them, (steps + 1) B D numbers.
    """

    keep_iterates: bool = False

    def __init__(self, cell: Cell, init: Init, solver: Solver, stop: Stop, adjoint: Adjoint,
                 field: Literal["equilibrium", "ode", "ode_then_f"] = "equilibrium"):  # fmt: skip
        super().__init__()
        for name, part, good, such in (
            ("a cell", cell, hasattr(cell, "begin"), "network.cell"),
            ("a solver", solver, isinstance(solver, (Solver, OwnLoop)), "Broyden()"),
            ("a stop", stop, hasattr(stop, "watch"), "Residual(1e-3)"),
            ("an adjoint", adjoint, callable(adjoint), "IFT()"),
        ):
            if not good or isinstance(part, type):
                kind = f"the class {part.__name__}" if isinstance(part, type) else repr(part)
                raise TypeError(f"ImplicitLayer wants {name} such as {such}, not {kind}")
        if field not in ("equilibrium", "ode", "ode_then_f"):
            raise ValueError(f"field={field!r} must be equilibrium, ode or ode_then_f")
        self.cell, self.init, self.field = cell, init, "equilibrium" if field == "equilibrium" else "ode"
        self.last_call = field == "ode_then_f"
        if getattr(init, "through", False):
            adjoint = copy(adjoint)
            adjoint.through_start = True
        self.solver, self.stop, self.adjoint = solver, stop, adjoint
        self._direct: tuple[Any, list[str], list[bool]] | None = None
        self._check()
        wanted = getattr(stop, "per_sample", "auto")
        if wanted is True and not cell.batch_independent:
            raise ValueError("per-sample stopping needs independent samples, but this network uses batch statistics; "
                             "use stop.per_sample=false or network.norm=group")  # fmt: skip
        if wanted is True and isinstance(solver, OwnLoop):
            raise ValueError(f"stop.per_sample=true is for our own solvers: solver={called(solver)} takes one "
                             "step size for the whole batch; use solver=tsit5 or stop.per_sample=auto")  # fmt: skip
        self.reduce = reducer(cell.batch_independent if wanted == "auto" else bool(wanted))
        if self.reduce.per_sample and getattr(adjoint, "restarts", False):
            raise ValueError("adjoint.restarts=true needs one step size for the batch; use stop.per_sample=false")

    def forward(self, x: Tensor) -> LayerOutput:
        out = self._run(x, self.solver, self.stop, self.adjoint, self.field)
        if self.training and hasattr(self.init, "observe"):
            self.init.observe(out.z.detach())
        return out

    def unrolled(self, x: Tensor, depth: int) -> LayerOutput:
        """`depth` plain applications of the cell with ordinary backpropagation: how the papers pretrain."""
        unroll = Unroll(through_start=self.adjoint.through_start)
        return self._run(x, Picard(), FixedSteps(depth), unroll, "equilibrium")

    def within(self, x: Tensor, steps: int) -> LayerOutput:
        """The layer allowed only so many applications of the cell beside those of its start, at least one."""
        if not self.solver.one_call:
            raise ValueError(
                f"solver={called(self.solver)} does not make one evaluation a step and cannot be held to "
                f"{steps}; use solver=picard or solver=anderson"
            )
        return self._run(x, self.solver, FixedSteps(steps), self.adjoint, self.field)

    def _run(self, x: Tensor, solver: Solver, stop: Stop, adjoint: Adjoint, field: str) -> LayerOutput:
        ctx = self.cell.begin(x)
        closure = adjoint.needs_closure and torch.is_grad_enabled()
        if closure:  # one tensor twice, or two of which one comes from the other, would be differentiated twice
            ctx = _map(ctx, lambda c: c.view_as(c))

        def f(z: Tensor, t: Tensor) -> Tensor:
            return self.cell(z, ctx, t)

        start, probed = self.init(x, f), self._direct
        if torch.is_autocast_enabled(start.device.type):  # f alone is in bfloat16
            start = start.to(torch.promote_types(start.dtype, torch.float32))
        if start.shape[1:] != (self.cell.size,):
            numbers = tuple(start.shape[1:])
            raise ValueError(f"the start has {numbers} numbers a sample, but cell.size is {self.cell.size}")
        F: Field = FixedPoint(f) if field == "equilibrium" else f
        kept = _Kept(solver) if self.keep_iterates and torch.is_grad_enabled() else None
        problem = Solve(kept.solver if kept else solver, stop, self.reduce)
        parameters = self.cell.parameters()  # type: ignore[attr-defined]
        learns = x.requires_grad or any(p.requires_grad for p in parameters) or adjoint.through_start
        if torch.is_grad_enabled() and learns:
            wrt = self._closed_over(ctx, start, x) if closure else [x] if x.requires_grad else []
            z, solution, log = adjoint(F, start, problem, wrt)
            log.forward_calls += closure and self._direct is not probed  # what f closes over was asked of the cell
        else:  # evaluation, or a frozen layer below a head that trains
            solution, log = problem.untracked(F, start), BackwardLog()
            z = solution.fixed_point if isinstance(F, FixedPoint) else solution.value
        if self.last_call and field == "ode":
            log.forward_calls += 1
            z = log.watch(f(z, z.new_full((len(z),), stop.t1)))
        if hasattr(self.cell, "cells"):  # of cells that differ, |f(z) - z| is no residual
            nothing = torch.full_like(solution.stats.residual, torch.nan)
            solution = replace(solution, stats=replace(solution.stats, residual=nothing))
        if self.init.calls:  # a penalty's gradient through f(0, x) is a VJP too
            log.watch(start)
        return LayerOutput(z, start, solution, log, F, solver, kept.take() if kept else [])

    def _closed_over(self, ctx: Any, z: Tensor, x: Tensor) -> list[Tensor]:
        """What f closes over: the context, and the parameters that f itself uses, not those that only `begin` does.

        The latter get their gradient through the context. One used in both places would get part of it twice. Under
        x_gradient=one_step what comes from x is a constant of the solve.
        """
        found: list[Tensor] = []
        _map(ctx, found.append)
        context = [c for c in found if c.requires_grad]
        named = {n: p for n, p in self.cell.named_parameters() if p.requires_grad}  # type: ignore[attr-defined]
        asked = list(named), x.requires_grad, len(context)
        if self._direct is None or self._direct[0] != asked:  # asked once, and again when some are frozen
            probe = self.cell(z.detach(), _map(ctx, Tensor.detach), z.new_zeros(len(z)))
            direct, through = _used([probe], named), _used(context, named)
            if both := [name for name in direct if name in through]:
                raise ValueError(
                    f"adjoint=backsolve needs each parameter in one place, but the cell's {', '.join(both)} is used by "
                    "begin and by forward; let begin return it in the context"
                )
            one_step = getattr(self.adjoint, "x_gradient", "exact") == "one_step" and x.requires_grad
            self._direct = asked, list(direct), [not (one_step and _used([c], {"x": x})) for c in context]
        names, kept = self._direct[1:]
        return [*(named[name] for name in names), *(c for c, keep in zip(context, kept) if keep)]

    def _check(self) -> None:
        name = called(self.solver)
        is_ode, own_loop = self.field == "ode", isinstance(self.solver, OwnLoop)
        if not getattr(self.cell, "injects", True):
            if not getattr(self.init, "through", False):
                raise ValueError(f"the cell does not see x, and init={called(self.init)} does not either; use "
                                 "init=stem, or init=stem_zeros with network.inject=state")  # fmt: skip
            if self.stop.needs_equilibrium and not isinstance(self.stop, FixedSteps):
                raise ValueError(f"the cell does not see x, so that stop={called(self.stop)} would find one fixed "
                                 "point for all; use model=neural_ode, or network=homo_conv")  # fmt: skip
            if self.adjoint.needs_equilibrium and not is_ode:
                raise ValueError(f"the cell sees x in its start alone, to which adjoint={called(self.adjoint)} sends "
                                 "no gradient; use adjoint=unroll")  # fmt: skip
        elif (is_ode and not self.last_call and not getattr(self.init, "through", False)
                and getattr(self.adjoint, "x_gradient", "exact") == "one_step"):  # fmt: skip
            raise ValueError("adjoint.x_gradient=one_step leaves the stem the last f alone, which field=ode does not "
                             "apply; use field=ode_then_f or adjoint.x_gradient=exact")  # fmt: skip
        if is_ode and self.stop.needs_equilibrium:
            raise ValueError(f"stop={called(self.stop)} looks for f(z) = z, but field=ode has no equilibrium "
                             "meaning; use stop=end_time or field=equilibrium")  # fmt: skip
        if is_ode and self.adjoint.needs_equilibrium:
            raise ValueError(f"adjoint={called(self.adjoint)} needs a fixed point, which field=ode does not "
                             "have; use adjoint=backsolve or adjoint=unroll")  # fmt: skip
        if own_loop and self.stop.t1 == float("inf"):
            raise ValueError(f"solver={name} integrates to an end time and cannot stop at a residual; use "
                             "solver=tsit5, or stop=end_time with a long stop.t1 such as 20")  # fmt: skip
        if self.stop.t1 < float("inf") and not self.solver.has_time:
            raise ValueError(f"solver={name} finds roots and has no time; use stop=residual or solver=tsit5")
        if isinstance(self.stop, FixedSteps) and not self.solver.one_call:
            raise ValueError(f"stop=fixed_steps counts applications of the cell, and solver={name} makes several a "
                             "step; use solver=picard or solver=anderson")  # fmt: skip
        if is_ode and self.solver.needs_map:
            raise ValueError(f"solver={name} follows a path to a fixed point, which field=ode does not have; use "
                             "field=equilibrium or solver=tsit5")  # fmt: skip
        if own_loop and (ours := [option for option in self.adjoint.of_ours if getattr(self.adjoint, option)]):
            raise ValueError(f"adjoint.{ours[0]}=true is for our own solvers, but solver={name} makes its steps "
                             f"itself; use solver=tsit5 or adjoint.{ours[0]}=false")  # fmt: skip
        if isinstance(self.adjoint, Unroll) and self.solver.needs_map:
            raise ValueError(f"solver={name} differentiates the cell to make its steps, and adjoint=unroll cannot "
                             "differentiate it twice; use adjoint=ift")  # fmt: skip
        if self.adjoint.needs_end_time and self.solver.needs_map:
            raise ValueError(f"adjoint=backsolve integrates dz/dt back in time, but solver={name} follows a path on "
                             "which t is no time; use adjoint=ift")  # fmt: skip
        if self.adjoint.needs_end_time and self.stop.t1 == float("inf"):
            raise ValueError("adjoint=backsolve integrates back from an end time; use stop=end_time or adjoint=ift")
        if hasattr(self.cell, "cells"):
            applications = getattr(self.stop, "steps", None)
            if not (isinstance(self.solver, Picard) and isinstance(self.adjoint, Unroll)
                    and applications == len(self.cell.cells)):  # fmt: skip
                raise ValueError(f"{len(self.cell.cells)} untied cells are applied once each; use solver=picard "
                                 f"adjoint=unroll stop=fixed_steps stop.steps={len(self.cell.cells)}")  # fmt: skip
            if self.adjoint.checkpoint:
                raise ValueError("adjoint.checkpoint=true applies cells again in the backward, but untied cells are "
                                 "applied once each, in turn; use adjoint.checkpoint=false")  # fmt: skip


class _Kept:
    """The states that a copy of `solver` passes, until they are taken: a backward may step it again."""

    def __init__(self, solver: Solver):
        self.solver, self.open = watched(solver, self._see), True
        self.iterates: list[Iterate] = []

    def _see(self, state: State, begins: bool) -> None:
        if not self.open:
            return
        if begins:  # adjoint=unroll may solve twice
            self.iterates.clear()
        dt = getattr(state.mem, "dt", None)
        self.iterates.append(Iterate(state.z.detach(), state.t.detach(), None if dt is None else dt.detach()))

    def take(self) -> list[Iterate]:
        self.open = False
        return self.iterates


def called(part: Any) -> str:
    """The name that a part has on the command line: EndTime is end_time, FZero f_zero."""
    if isinstance(part, OwnLoop) and hasattr(part, "method"):
        return f"torchdiffeq/{part.method}"
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(part).__name__).lower()


def _used(outputs: list[Tensor], named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which of the named tensors the outputs depend on."""
    total = sum(out.sum() for out in outputs)
    if not named or not isinstance(total, Tensor) or not total.requires_grad:
        return {}
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True, retain_graph=True)
    return {name: p for (name, p), g in zip(named.items(), grads) if g is not None}


def _map(ctx: Any, fn: Callable[[Tensor], Any]) -> Any:
    """`fn` on every tensor of a cell's context: tensors in tuples, lists and dicts."""
    if isinstance(ctx, Tensor):
        return fn(ctx)
    if isinstance(ctx, dict):
        return {key: _map(value, fn) for key, value in ctx.items()}
    if isinstance(ctx, (tuple, list)):
        values = [_map(value, fn) for value in ctx]
        return type(ctx)(*values) if hasattr(ctx, "_fields") else type(ctx)(values)
    return ctx
