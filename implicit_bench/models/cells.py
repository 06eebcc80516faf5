"""Cells f(z, x): what an implicit layer iterates. A cell sees a flat state (B, size) and knows its own shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch.nn.functional as nnf
from torch import Tensor, nn


class Cell(Protocol):
    """`begin` runs once a solve: what depends on x alone, dropout masks, normed weights. `forward` runs NFE times."""

    size: int  # D, numbers of state a sample
    batch_independent: bool  # False where rows interact (batch statistics)

    def begin(self, x: Tensor) -> Any: ...
    def __call__(self, z: Tensor, ctx: Any, t: Tensor) -> Tensor: ...


class DenseCell(nn.Module):
    """f(z, x) = relu(W z) + relu(U x), without bias: the first paper's MNIST cell (arXiv 2201.12240)."""

    batch_independent = True

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.W = nn.Linear(size, size, bias=False)
        self.U = nn.Linear(size, size, bias=False)

    def begin(self, x: Tensor) -> Tensor:
        return self.U(x).relu()

    def forward(self, z: Tensor, ctx: Tensor, t: Tensor) -> Tensor:
        return nnf.linear(z, self.W.weight).relu() + ctx


def make_cell(make: Callable[[], nn.Module], untied: int) -> nn.Module:
    """The cell, or `untied` different ones in turn; 0 is the tied cell."""
    if untied < 0:
        raise ValueError(f"network.untied={untied} must not be negative")
    return UntiedCell([make() for _ in range(untied)]) if untied else make()


class UntiedCell(nn.Module):
    """A different cell for each application, in turn: a residual-free explicit network of the same shape.

    Only for as many applications as there are cells: solver=picard with stop=fixed_steps.
    """

    def __init__(self, cells: Sequence[nn.Module]):
        super().__init__()
        self.cells = nn.ModuleList(cells)
        self.size: int = cells[0].size  # type: ignore[assignment]
        self.batch_independent = bool(cells[0].batch_independent)

    def begin(self, x: Tensor) -> Iterator[tuple[Any, Any]]:
        return iter([(cell, cell.begin(x)) for cell in self.cells])  # type: ignore[operator]

    def forward(self, z: Tensor, ctx: Iterator[tuple[Any, Any]], t: Tensor) -> Tensor:
        cell, own = next(ctx, (None, None))
        if cell is None:
            raise ValueError(
                f"each of the {len(self.cells)} untied cells is applied once a solve, but there was one call more; "
                f"use init=zero and at most {len(self.cells)} applications"
            )
        return cell(z, own, t)
