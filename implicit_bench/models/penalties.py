"""What else is in the loss. A penalty reads the layer's output and returns a scalar to add to the task loss."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.nn import functional as nnf

from .layer import LayerOutput


class Penalty(Protocol):
    def __call__(self, out: LayerOutput) -> Tensor: ...


class Skip:
    """weight * mean |z* - z0| over state and batch (arXiv 2201.12240; its text writes a norm, its code this mean).

    The gradient reaches both the start and z*. weight: .01 in the paper's text and CIFAR-10 code, 5 in its MNIST code.
    """

    def __init__(self, weight: float = 0.01):
        if not weight >= 0:
            raise ValueError(f"penalty.skip.weight={weight} must not be negative")
        self.weight = float(weight)

    def __call__(self, out: LayerOutput) -> Tensor:
        return self.weight * (out.z - out.start).abs().mean()


class InitFit:
    """weight * smooth L1 (beta 1) of z0 against the solution, a mean over state and batch: how HomoODE's start learns
    (arXiv 2310.09583, weight 1). The gradient reaches the start alone."""

    def __init__(self, weight: float = 1.0):
        if not weight >= 0:
            raise ValueError(f"penalty.init_fit.weight={weight} must not be negative")
        self.weight = float(weight)

    def __call__(self, out: LayerOutput) -> Tensor:
        return self.weight * nnf.smooth_l1_loss(out.start, out.z.detach())
