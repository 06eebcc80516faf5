"""What else is in the loss. A penalty reads the layer's output and returns a scalar to add to the task loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as nnf

from ..core import OwnLoop
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
        if self.probability < 1 and float(torch.rand(())) >= self.probability:
            return value.new_zeros(())
        z, total = out.z.detach().to(value.dtype).requires_grad_(), value.new_zeros(())
        fz = out.again(z, out.solution.stats.t)
        for _ in range(self.probes):
            dot = (fz * torch.randn_like(z)).sum()
            (v,) = torch.autograd.grad(dot, z, create_graph=True, materialize_grads=True)
            total = total + out.backward.watch(v).square().mean()
        return self.weight / self.probes * total
