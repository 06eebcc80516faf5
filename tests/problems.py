"""Problems whose answers are known, for the tests of core, solvers, adjoints and models. float64 unless said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from implicit_bench.adjoints import Solve
from implicit_bench.core import EndTime, FixedPoint, Reduce, Residual
from implicit_bench.solvers import Anderson
from implicit_bench.testing.problems import BATCH, PER_SAMPLE, contraction, random

__all__ = ["BATCH", "PER_SAMPLE", "contraction", "random"]  # of the conformance kit, and what follows

TIGHT = Residual(tol=1e-13, max_steps=500)


def f64(values: Any, *repeat: int) -> Tensor:
    return (
        torch.tensor(values, dtype=torch.float64).repeat(*repeat)
        if repeat
        else torch.tensor(values, dtype=torch.float64)
    )


def with_spectrum(values: Sequence[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    n = len(values)
    Q = torch.linalg.qr(random(n, n, seed=seed))[0]
    return Q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ Q.T


def affine(rates: Sequence[float], limit: float = float("inf")) -> FixedPoint:
    """Row i: f(z) = r_i z + (1 - r_i), with z* = 1 and error r_i^k after k Picard steps; NaN where z > limit.

    Elementwise, so that a row's numbers are the same bits whatever the other rows are.
    """
    r = torch.tensor(rates, dtype=torch.float64).unsqueeze(1)

    def f(z: Tensor, t: Tensor) -> Tensor:
        rate = r.to(z.dtype)
        return torch.where(z > limit, torch.nan, rate * z + (1 - rate))

    return FixedPoint(f)


def tanh_map(W: Tensor, ctx: Tensor) -> FixedPoint:
    return FixedPoint(lambda z, t: torch.tanh(z @ W + ctx))


class Watched:
    """A map that counts its calls and the VJPs that autograd makes of it, and remembers the times it was asked at."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor]):
        self.f, self.calls, self.vjps, self.times = f, 0, 0, []

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        self.times.append(t.detach().clone())
        return _CountVjp.apply(self.f(z, t), self)


class _CountVjp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, watched: Watched) -> Tensor:
        ctx.watched = watched
        return z.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.watched.vjps += 1
        return g, None


class TanhCell(nn.Module):
    """f(z, x) = tanh(z W + x U + b): W is used by `forward` alone, U and b by `begin` alone. A contraction."""

    batch_independent = True

    def __init__(self, size: int = 4, norm: float = 0.8, seed: int = 0):
        super().__init__()
        self.size = size
        self.W = nn.Parameter(contraction(size, norm, seed))
        self.U = nn.Parameter(random(size, size, seed=seed + 1, scale=0.5))
        self.b = nn.Parameter(random(size, seed=seed + 2, scale=0.5))

    def begin(self, x: Tensor) -> Any:
        return x @ self.U + self.b

    def forward(self, z: Tensor, ctx: Any, t: Tensor) -> Tensor:
        return torch.tanh(z @ self.W + ctx)


class CentredCell(TanhCell):
    """Rows interact: the batch mean is taken out of z first."""

    batch_independent = False

    def forward(self, z: Tensor, ctx: Any, t: Tensor) -> Tensor:
        return super().forward(z - z.mean(0), ctx, t)


def network(cell: nn.Module) -> Any:
    """As much of a network as a start needs."""
    return SimpleNamespace(
        cell=cell, predictor=lambda: nn.Sequential(nn.Linear(cell.size, cell.size), nn.ReLU()).double()
    )


def counted(cell: nn.Module) -> list[None]:
    """A list that grows by one with each call of the cell from now on."""
    calls: list[None] = []
    cell.register_forward_pre_hook(lambda *_: calls.append(None))
    return calls


def root(solver: Any = None, stop: Any = TIGHT, reduce: Reduce = PER_SAMPLE) -> Solve:
    return Solve(solver or Anderson(ridge=1e-14), stop, reduce)


def to_end(solver: Any, t1: float = 1.0, reduce: Reduce = PER_SAMPLE) -> Solve:
    return Solve(solver, EndTime(t1), reduce)


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    x, y = torch.cat([v.flatten() for v in a]), torch.cat([v.flatten() for v in b])
    return float(x @ y / (x.norm() * y.norm()))


def close(a: Tensor, b: Tensor, atol: float) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)
