"""What else is in the loss. A penalty reads the layer's output and returns a scalar to add to the task loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

from torch import Tensor

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
    """A penalty of ours: its name on the command line, and a weight that is not negative."""

    iterates: ClassVar[bool] = False

    def __init__(self, weight: float):
        if not weight >= 0:
            raise ValueError(f"penalty.{called(self)}.weight={weight} must not be negative")
        self.weight = float(weight)


class Skip(Weighted):
    """weight * mean |z* - z0| over state and batch (arXiv 2201.12240; its text writes a norm, its code this mean).

    The gradient reaches both the start and z*. weight: .01 in the paper's text and CIFAR-10 code, 5 in its MNIST code.
    """

    def __init__(self, weight: float = 0.01):
        super().__init__(weight)

    def __call__(self, out: LayerOutput, loss: Loss) -> Tensor:
        return self.weight * (out.z - out.start).abs().mean()
