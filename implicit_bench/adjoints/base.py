"""What an adjoint is: it takes a field and a way to solve it, and returns z with a gradient.

    adjoint(F, z0 (B, D), solve, wrt) -> z (B, D), Solution, BackwardLog

For an equilibrium field z is f(z*), one application of the cell after the solve, whose gradient is then corrected: an
adjoint never changes the value. An adjoint detaches the start z0, unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core import Field, Reduce, Solution, Solver, State, Status, Stop, solve


@dataclass
class BackwardLog:
    """What the backward did; filled in when it has run. What a method does not have stays None."""

    forward_calls: int = 0  # F calls of the forward that the solution does not count (the re-attaching one)
    vjps: int = 0  # vector-Jacobian products of F, all of them
    narrow: int = 0  # those of them that go to the state alone, not to parameters and x
    calls: int = 0  # F calls made again in the backward
    recorded: int = 0  # F calls, forward or backward, whose graph autograd recorded
    iterations: Tensor | None = None  # (B,) of the linear solve, or steps of the solve back in time
    residual: Tensor | None = None  # (B,) of the linear solve, relative to the right-hand side
    rhs_norm: Tensor | None = None  # (B,) |J^T g|
    status: Tensor | None = None  # (B,) core.Status of the linear solve, or of the solve back in time

    @property
    def converged(self) -> Tensor | None:
        """(B,) bool: whether the backward's own solve reached what it was to reach."""
        return None if self.status is None else self.status <= Status.REACHED_END

    def watch(self, out: Tensor) -> Tensor:
        """`out`, the output of one evaluation, of which every VJP is counted from now on."""
        if out.requires_grad:
            self.recorded += 1
            out.register_hook(self._one_more)
        return out

    def _one_more(self, g: Tensor) -> None:
        self.vjps += 1


@dataclass(frozen=True)
class Solve:
    """core.solve with its solver, stop and reduction already chosen."""

    solver: Solver
    stop: Stop
    reduce: Reduce

    def __call__(self, F: Field, z0: Tensor) -> Solution:
        return solve(F, z0, solver=self.solver, stop=self.stop, reduce=self.reduce)

    @torch.no_grad()
    def untracked(self, F: Field, z0: Tensor) -> Solution:
        return self(F, z0.detach())


def watched(solver: Solver, see: Callable[[State, bool], None]) -> Solver:
    """A copy of the solver showing `see` every state and whether a solve begins with it; its `bare` shows none."""
    copied: Any = copy(solver)
    copied.bare = bare(solver)

    def init(*args: Any) -> State:
        state = solver.init(*args)
        see(state, True)
        return state

    def step(*args: Any) -> State:
        state = solver.step(*args)
        see(state, False)
        return state

    copied.init, copied.step = init, step
    return copied


def bare(solver: Any) -> Any:
    return getattr(solver, "bare", solver)


class Adjoint:
    """Settings and one function, and what it says about itself, to be refused in a sentence where it cannot work."""

    needs_equilibrium: ClassVar[bool] = False  # it differentiates a fixed point
    needs_end_time: ClassVar[bool] = False  # it integrates back from the end
    needs_closure: ClassVar[bool] = False  # `wrt` must be all that F closes over and that needs a gradient
    through_start: bool = False  # the gradient is to reach z0
    exact: bool = False  # the gradient of the solution itself, as far as tolerances go: `check` holds it to that
    of_ours: ClassVar[tuple[str, ...]] = ()  # options that only our own solvers can follow

    def __call__(self, F: Field, z0: Tensor, solve: Solve,
                 wrt: Sequence[Tensor]) -> tuple[Tensor, Solution, BackwardLog]:  # fmt: skip
        """`wrt`: what F closes over (see needs_closure), else the layer's input x where it needs a gradient."""
        raise NotImplementedError


def reattach(F: Field, z: Tensor, log: BackwardLog) -> tuple[Tensor, Tensor]:
    """One tracked application of the map at a detached z: (zs, f(zs)), both (B, D)."""
    zs = z.detach().requires_grad_()
    log.forward_calls += 1
    with torch.enable_grad():
        return zs, log.watch(F.f(zs, zs.new_zeros(len(zs))))  # type: ignore[attr-defined]


def vjp_of(zs: Tensor, z: Tensor, log: BackwardLog) -> Callable[[Tensor], Tensor]:
    """v -> J^T v on the kept graph of z = f(zs)."""

    def vjp(v: Tensor) -> Tensor:
        log.narrow += 1
        return torch.autograd.grad(z, zs, v, retain_graph=True, allow_unused=True, materialize_grads=True)[0]

    return vjp


class Corrected(torch.autograd.Function):
    """The identity on z, whose cotangent g becomes correction(g)[0]; the rest of correction(g) goes to `wrt`.

    Corrected.apply(name, correction, z, *wrt). It holds its input's graph, never its output: no cycle.
    """

    @staticmethod
    def forward(ctx: Any, name: str, correction: Callable[[Tensor], Sequence[Tensor | None]], z: Tensor,
                *wrt: Tensor) -> Tensor:  # fmt: skip
        ctx.name, ctx.correction, ctx.roots = name, correction, (z, *wrt)
        ctx.save_for_backward(*wrt)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        assert len(ctx.saved_tensors) == len(ctx.roots) - 1  # raises where one was changed in place since
        with torch.no_grad():
            cotangents = ctx.correction(g)
        return None, None, *once(ctx.name, cotangents, g, *ctx.roots)


def once(name: str, grads: Sequence[Tensor | None], *roots: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients that depend on `roots` in ways that autograd does not know: to differentiate them again is refused.

    torch's once_differentiable lets it pass where the cotangent is a constant, that of a sum, and the result is wrong.
    """
    if not torch.is_grad_enabled():  # no create_graph
        return tuple(grads)
    found = iter(_Once.apply(name, [g for g in grads if g is not None], *roots))
    return tuple(None if g is None else next(found) for g in grads)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, grads: Sequence[Tensor], *roots: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(g.clone() for g in grads)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[None, ...]:
        raise RuntimeError(f"adjoint={ctx.name} gives first derivatives only; to differentiate twice, use "
                           "adjoint=unroll with solver=picard")  # fmt: skip
