"""A network and a solver of one's own: nothing here is known to implicit-bench before it reads configs/."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from implicit_bench.core import Field, Reduce, Solver, State


class Context(NamedTuple):
    W: Tensor  # (D, D), its norm at most `lipschitz`
    Ux: Tensor  # (B, D)


class ContractiveCell(nn.Module):
    """f(z, x) = tanh(W z + U x + b) with |W| <= lipschitz < 1: one fixed point, and z <- f(z) finds it from anywhere.

    |W|, its largest singular value, is bounded from above by Gram iteration (Delattre et al., arXiv 2305.16173):
    G <- G^T G four times from W, then |W| <= |G|_F^(1/16). `begin` does this, so that it is done once a solve.
    """

    batch_independent = True

    def __init__(self, size: int, lipschitz: float):
        super().__init__()
        self.size, self.lipschitz = size, lipschitz
        self.weight = nn.Parameter(torch.randn(size, size) / size**0.5)
        self.U = nn.Linear(size, size)

    def begin(self, x: Tensor) -> Context:
        W = self.weight / self.weight.norm()
        G = W
        for _ in range(4):
            G = G.mT @ G
        return Context(self.lipschitz * W / G.norm() ** (1 / 16), self.U(x))

    def forward(self, z: Tensor, ctx: Context, t: Tensor) -> Tensor:
        return torch.tanh(nnf.linear(z, ctx.W) + ctx.Ux)


class Contractive(nn.Module):
    """Flat images -> linear, relu -> the contractive cell -> linear."""

    def __init__(self, shape: tuple[int, int, int], classes: int, hidden: int = 64, lipschitz: float = 0.9):
        super().__init__()
        if not 0 < lipschitz < 1:
            raise ValueError(f"network.lipschitz={lipschitz} must lie between 0 and 1")
        pixels = shape[0] * shape[1] * shape[2]
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU())
        self.cell = ContractiveCell(hidden, lipschitz)
        self.head = nn.Linear(hidden, classes)

    def predictor(self) -> nn.Module:
        return nn.Sequential(nn.Linear(self.cell.size, self.cell.size), nn.Tanh())


class Aitken(Solver):
    """z <- z + w F(z) whose damping w follows the secant (Irons & Tuck, Int. J. Numer. Methods Eng. 1, 1969).

    w <- -w <dF, F> / |dF|^2, where F is the field before the step and dF its change, held within [least, most].
    Cost: one evaluation a step, two states of memory. On a map with one rate it ends after two steps.
    """

    def __init__(self, damping: float = 0.5, least: float = 0.1, most: float = 2.0):
        if not 0 < least <= damping <= most:
            raise ValueError(f"solver.damping={damping} must lie between solver.least={least} and solver.most={most}")
        self.damping, self.least, self.most = damping, least, most

    def init(self, F: Field, z0: Tensor, t1: float, reduce: Reduce) -> State:
        state = super().init(F, z0, t1, reduce)
        return state._replace(mem=torch.full_like(reduce.norm(state.F), self.damping))  # (R, 1)

    def step(self, F: Field, state: State, reduce: Reduce) -> State:
        w = state.mem
        new = self.at(F, state.z + (w * state.F).to(state.z.dtype), state.t)
        before, dF = state.F.detach(), (new.F - state.F).detach()  # to adjoint=unroll w is a constant
        secant = -w * reduce.dots(dF.unsqueeze(1), before) / reduce.norm(dF).square()
        return new._replace(mem=secant.nan_to_num(self.damping).clamp(self.least, self.most))
