from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core import Field, FixedPoint, Solution, Status
from .base import Adjoint, BackwardLog, Solve


class Unroll(Adjoint):
    """Automatic differentiation through every step of the solver: exact for what the solver did.

    Step sizes and the time at which a solve stops are constants. An equilibrium layer puts out f(z) of the last z,
    whose evaluation the solve has made. through_start: the gradient reaches the start as well. A row that ended as
    NONFINITE gets no gradient (else 0 times infinity would spoil that of every parameter): the solve is then made a
    second time without it. But an attempt that an adaptive method rejected because the field was NaN stays in the
    graph, and so does its NaN: use adjoint=backsolve with such a field.

    Cost: one VJP of F for each call that z depends on (one that only chose the first step's size is none). Memory: the
    graphs of all calls; with `checkpoint` (Chen et al., arXiv 1604.06174) the states of all steps and the graph of
    one step, which the backward makes again: as many calls more as the steps made.
    """

    exact = True
    of_ours = ("checkpoint",)

    def __init__(self, checkpoint: bool = False, through_start: bool = False):
        self.checkpoint, self.through_start = checkpoint, through_start

    def __call__(self, F: Field, z0: Tensor, solve: Solve,
                 wrt: Sequence[Tensor]) -> tuple[Tensor, Solution, BackwardLog]:  # fmt: skip
        log, done = BackwardLog(), False
        z0 = z0 if self.through_start else z0.detach()
        equilibrium = isinstance(F, FixedPoint)
        f = F.f if isinstance(F, FixedPoint) else F
        if self.checkpoint:
            solver = copy(solve.solver)
            step = partial(checkpoint, solver.step, use_reentrant=False, preserve_rng_state=False)
            solver.step = step  # type: ignore[method-assign]
            solve = replace(solve, solver=solver)

        def counted(z: Tensor, t: Tensor) -> Tensor:
            log.calls += done  # a step that the backward makes again
            return log.watch(f(z, t))

        def run(f: Field) -> tuple[Tensor, Solution]:
            s = solve(FixedPoint(f) if equilibrium else f, z0)
            bare = replace(s, value=s.value.detach(), field=s.field.detach())  # what is reported: no graph
            return s.fixed_point if equilibrium else s.value, bare

        z, solution = run(counted)
        lost = ((solution.status == Status.NONFINITE) & z.isfinite().all(1)).unsqueeze(1)
        if bool(lost.any()):
            rest = z0 if equilibrium else torch.zeros_like(z0)  # what f is of a row that stays where it started
            again, second = run(lambda z, t: torch.where(lost, rest, counted(z, t)))
            z, log.forward_calls = torch.where(lost, z.detach(), again), second.stats.calls
        done = True
        return z, solution, log
