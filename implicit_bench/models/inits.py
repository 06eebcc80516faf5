"""Where z starts. An init is made from the network and maps x (B, ...) to z0 (B, D).

The solver gets z0 detached: a start learns from its penalty, not through the solve.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from ..core import Field
from .networks import Network


class Init(Protocol):
    calls: int  # evaluations of f that the start costs

    def __call__(self, x: Tensor, f: Field) -> Tensor: ...


class Zero(nn.Module):
    """z0 = 0."""

    calls = 0

    def __init__(self, network: Network):
        super().__init__()
        self.size: int = network.cell.size  # type: ignore[assignment]

    def forward(self, x: Tensor, f: Field) -> Tensor:
        return x.new_zeros(len(x), self.size)


class FZero(Zero):
    """z0 = f(0, x), the start of Skip Reg. DEQ (arXiv 2201.12240): one evaluation, no parameters."""

    calls = 1

    def forward(self, x: Tensor, f: Field) -> Tensor:
        zero = super().forward(x, f)
        return f(zero, zero.new_zeros(len(zero)))


class SkipNet(nn.Module):
    """z0 = g(x) with a network of its own, the start of Skip DEQ (arXiv 2201.12240)."""

    calls = 0

    def __init__(self, network: Network):
        super().__init__()
        if not hasattr(network, "predictor"):
            raise ValueError(f"init=skip_net asks the network for predictor(), a Module from x to z0, which "
                             f"{type(network).__name__} has not; use init=f_zero or init=zero")  # fmt: skip
        self.g = network.predictor()

    def forward(self, x: Tensor, f: Field) -> Tensor:
        return self.g(x).flatten(1)
