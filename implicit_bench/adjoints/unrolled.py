from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core import Field, FixedPoint, Solution, State, Status
from .base import Adjoint, BackwardLog, Solve


class Unroll(Adjoint):
    """Automatic differentiation through every step of the solver: exact for what the solver did.

    Step sizes and the time at which a solve stops are constants. An equilibrium layer puts out f(z) of the last z,
    whose evaluation the solve has made. through_start: the gradient reaches the start as well. A row that ended as
    NONFINITE gets no gradient. Where f was not finite for some row, if only in an attempt that was rejected or after
    the row's end, 0 times infinity would spoil the gradient of every parameter: the solve is then made a second time,
    in which the graph holds f of the start in such a place.

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

        fine = torch.ones(len(z0), dtype=torch.bool, device=z0.device)  # rows whose f has been finite throughout

        def counted(z: Tensor, t: Tensor) -> Tensor:
            nonlocal fine
            log.calls += done  # a step that the backward makes again
            out = log.watch(f(z, t))
            fine = fine & State(z, out, t).finite()
            return out

        def harmless(z: Tensor, t: Tensor) -> Tensor:
            """`counted`, whose graph never sees a row at which f is not finite; two calls."""
            with torch.no_grad():
                out = counted(z, t)
            good = State(z, out, t).finite().unsqueeze(1)
            return torch.where(good, counted(torch.where(good, z, rest), t), out)

        def run(f: Field) -> tuple[Tensor, Solution]:
            s = solve(FixedPoint(f) if equilibrium else f, z0)
            bare = replace(s, value=s.value.detach(), field=s.field.detach())  # what is reported: no graph
            return s.fixed_point if equilibrium else s.value, bare

        z, solution = run(counted)
        if not bool(solve.reduce.whole(fine).all()):  # where the batch is one system, whoever has a part of it
            rest = z0.detach().nan_to_num(0.0, 0.0, 0.0)
            again, second = run(harmless)
            lost = (solution.status == Status.NONFINITE).unsqueeze(1)
            z, log.forward_calls = torch.where(lost, z.detach(), again), 2 * second.stats.calls
        done = True
        return z, solution, log
