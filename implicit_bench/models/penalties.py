"""What else is in the loss. A penalty reads the layer's output and returns a scalar to add to the task loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as nnf

from ..core import Field, FixedPoint, OwnLoop, Solver
from ..solvers import Bosh3, Tableau, Vcab3
from ..solvers.runge_kutta import attempt, weighted
from ..world import first_ones, reducer
from .layer import ImplicitLayer, LayerOutput, called

Loss = Callable[[Tensor], Tensor]
"""The task loss () of the head on a state (B, D)."""


class Penalty(Protocol):
    """It may have, besides: `iterates = True`, if it reads out.iterates, and `check(layer)`, which raises a ValueError
    where the layer does not suit it."""

    def __call__(self, out: LayerOutput, loss: Loss) -> Tensor: ...


def prepare(layer: ImplicitLayer, penalties: Mapping[str, Penalty]) -> None:
    """Have the layer keep its iterates if a penalty asks for them; refuse what does not suit it with a ValueError."""
    for name, penalty in penalties.items():
        asks = bool(getattr(penalty, "iterates", False))
        if asks and isinstance(layer.solver, OwnLoop):
            raise ValueError(f"penalty=[{name}] needs the iterates of the solve, which solver={called(layer.solver)} "
                             "keeps to itself; use solver=dopri5")  # fmt: skip
        if hasattr(penalty, "check"):
            penalty.check(layer)
        layer.keep_iterates = layer.keep_iterates or asks


class Weighted:
    """A penalty of ours, and a weight that is not negative."""

    iterates: ClassVar[bool] = False
    evaluates: ClassVar[bool] = True  # f, once more than the solve
    twice: ClassVar[bool] = False  # it differentiates f, and training it then

    def __init__(self, weight: float):
        if not weight >= 0:
            raise ValueError(f"{self._key('weight')}={weight} must not be negative")
        self.weight = float(weight)

    def check(self, layer: ImplicitLayer) -> None:
        if self.evaluates and hasattr(layer.cell, "cells"):
            raise ValueError(f"penalty=[{called(self)}] evaluates the cell again, but untied cells are applied once "
                             "each, in turn; use penalty=[none]")  # fmt: skip

    def _key(self, setting: str) -> str:
        return f"penalty.{called(self)}.{setting}"


class Skip(Weighted):
    """weight * mean |z* - z0| over state and batch (arXiv 2201.12240; its text writes a norm, its code this mean).

    The gradient reaches both the start and z*. weight: .01 in the paper's text and CIFAR-10 code, 5 in its MNIST code.
    Cost: no evaluation.
    """

    evaluates = False

    def __init__(self, weight: float = 0.01):
        super().__init__(weight)

    def __call__(self, out: LayerOutput, loss: Loss) -> Tensor:
        return self.weight * (out.z - out.start).abs().mean()


class InitFit(Weighted):
    """weight * mean of SmoothL1(z0 - z*) over state and batch: how the start of HomoODE learns (arXiv 2310.09583).

    SmoothL1(d) = d^2 / 2 where |d| < 1, else |d| - 1/2. Other than Skip's, the gradient reaches the start alone: z* is
    a target. Cost: no evaluation (with init=f_zero one VJP, of f(0, x)).
    """

    evaluates = False

    def __init__(self, weight: float = 1.0):
        super().__init__(weight)

    def __call__(self, out: LayerOutput, loss: Loss) -> Tensor:
        dtype = out.solution.value.dtype  # under autocast start and z may be narrower
        return self.weight * nnf.smooth_l1_loss(out.start.to(dtype), out.z.detach().to(dtype))


class Jacobian(Weighted):
    """weight * mean of (eps^T J)^2 over state and batch, eps ~ N(0, I) and J = df/dz at z*: on average |J|_F^2 / D.

    Hutchinson's estimate of a sample's |J|_F^2, by `probes` draws of eps; a J small in norm makes a solve short and
    stable. z* is a constant: the gradient reaches parameters and x through f's derivative alone. field=ode: J of f at
    z(t1). `probability`: of a step to be penalised at all, else it costs nothing.

    Bai et al., arXiv 2106.14342, whose code divides by the number of elements, too: weight .4 with probability .02 on
    CIFAR-10 (large), .98 to 2 on WikiText-103. arXiv 2201.12240: weight 1, one probe, for the MNIST network alone.

    Cost: one evaluation; for each probe one VJP, and in the backward the derivative of that VJP, counted as one more,
    which takes the time of about two. Memory: the graphs of the evaluation and of its VJPs. Draws are from torch's
    global generators, which a checkpoint keeps.
    """

    twice = True

    def __init__(self, weight: float = 1.0, probes: int = 1, probability: float = 1.0):
        super().__init__(weight)
        if probes < 1:
            raise ValueError(f"{self._key('probes')}={probes} must be at least 1")
        if not 0 < probability <= 1:
            raise ValueError(f"{self._key('probability')}={probability} must lie in (0, 1]")
        self.probes, self.probability = probes, float(probability)

    def __call__(self, out: LayerOutput, loss: Loss) -> Tensor:
        value = out.solution.value
        if self.probability < 1 and float(first_ones(torch.rand((), device=value.device))) >= self.probability:
            return value.new_zeros(())
        z, total = out.z.detach().to(value.dtype).requires_grad_(), value.new_zeros(())
        fz = out.again(z, out.solution.stats.t)
        for _ in range(self.probes):
            dot = (fz * torch.randn_like(z)).sum()
            (v,) = torch.autograd.grad(dot, z, create_graph=True, materialize_grads=True)
            total = total + out.backward.watch(v).square().mean()
        return self.weight / self.probes * total


class Correction(Weighted):
    """weight * sum over i = 0 .. n - 1 of gamma^(n - i) loss(f(z_i)): the head is to be right on the way to z*, too.

    The sparse fixed-point correction of DEQ-Flow (Bai et al., arXiv 2204.08442): the task loss and this are its code's
    sum over n + 1 predictions, in which z* has weight 1, gamma = .8, each prediction being one tracked application of f
    to a detached iterate; torchdeq (arXiv 2310.18605) has the same. Theirs are the iterates at equal parts of the
    largest number of steps, and the best so far; here they are those of each sample after the part (i + 1) / (n + 1),
    rounded down, of the steps that it made, as a solve may end long before its cap.

    Cost: n evaluations, n VJPs. Memory: their n graphs and the iterates of the solve, (steps + 1) B D numbers.
    """

    iterates = True

    def __init__(self, weight: float = 1.0, n: int = 2, gamma: float = 0.8):
        super().__init__(weight)
        if n < 1:
            raise ValueError(f"{self._key('n')}={n} must be at least 1")
        if not 0 < gamma <= 1:
            raise ValueError(f"{self._key('gamma')}={gamma} must lie in (0, 1]")
        self.n, self.gamma = n, float(gamma)

    def check(self, layer: ImplicitLayer) -> None:
        super().check(layer)
        if layer.field == "ode":
            raise ValueError("penalty=[correction] is for iterates of a fixed point, which field=ode does not have; "
                             "use penalty=[local_error] or field=equilibrium")  # fmt: skip

    def __call__(self, out: LayerOutput, loss: Loss) -> Tensor:
        total, steps = out.solution.value.new_zeros(()), out.solution.stats.steps
        for i in range(self.n):
            z, t, _ = out.after((i + 1) * steps // (self.n + 1))
            total = total + self.gamma ** (self.n - i) * loss(out.again(z, t))
        return self.weight * total


class LocalError(Weighted):
    """weight * mean over rows of |h| rms(e), e the embedded error of one step h from z(t), at a random t of the solve.

    Local regularisation (Pal, Edelman & Rackauckas, arXiv 2303.02262): fields that are easy to integrate need fewer
    evaluations, whatever the adjoint. One accepted step of each row, or of the batch where it is one system, is drawn
    (their biased sampling: the solver's own times), and taken again from its detached state; t and h are constants. The
    gradient reaches parameters and x through the evaluations of that step alone. vcab3 knows no such error, and has
    Bosh3's taken, as at its start.
    Ours: h is the step that the solve took, where theirs is a new first step from z(t); and e is not divided by the
    tolerance, as in their code, so that the penalty does not change with it. Their weights, 100 falling to 10, are of
    e / (.05 + .05 |z|).

    Cost: as many evaluations as the method has stages (tsit5 and dopri5 7, bosh3 and vcab3 4), and as many VJPs.
    Memory: their graphs and the iterates of the solve, (steps + 1) B D numbers. Zero, at no cost, where no ODE solver
    was at work: in pretraining. The draw is from torch's global generators, which a checkpoint keeps.
    """

    iterates = True

    def __init__(self, weight: float = 100.0):
        super().__init__(weight)

    def check(self, layer: ImplicitLayer) -> None:
        super().check(layer)
        if _embedded(layer.solver) is None:
            raise ValueError(f"penalty=[local_error] needs a solver that estimates its error, and "
                             f"solver={called(layer.solver)} does not; use solver=tsit5 or solver=vcab3")  # fmt: skip

    def __call__(self, out: LayerOutput, loss: Loss) -> Tensor:
        tableau = _embedded(out.solver)
        if tableau is None:
            return out.solution.value.new_zeros(())
        t = torch.stack([kept.t for kept in out.kept()])
        h = out.iterates[0].dt
        assert h is not None  # (R, 1), with R = 1 where the batch is one system
        ended = torch.arange(len(t), device=t.device).unsqueeze(1) >= out.solution.stats.steps  # a row's solve is over
        accepted = (t.diff(dim=0, append=t[-1:]) > 0) & ~ended
        drawn = torch.rand(len(t), len(h), device=t.device)
        drawn = drawn if len(h) == len(out.z) else first_ones(drawn)
        chance = drawn.where(accepted[:, : len(h)], -1.0)
        z, t, h = out.after(chance.argmax(0))
        assert h is not None
        h = h.where(accepted.any(0)[: len(h)].unsqueeze(1), 0.0)  # a row that accepted none has no error
        F: Field = FixedPoint(out.again) if isinstance(out.F, FixedPoint) else out.again
        new, stages = attempt(tableau, F, Solver.at(F, z, t), h)
        stages.append(F(new, t + h.squeeze(1)))
        e = weighted(tableau.e, stages) * h
        return self.weight * (h * reducer(len(h) == len(z)).rms(e)).mean()


def _embedded(solver: Solver) -> Tableau | None:
    """The pair of methods whose difference is the solver's error, if it has one."""
    tableau = Bosh3.tableau if isinstance(solver, Vcab3) else getattr(solver, "tableau", None)
    return tableau if tableau is not None and tableau.e else None
