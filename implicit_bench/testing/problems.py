"""Problems whose answers are known, and maps that count."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import Field, Reduce

PER_SAMPLE, BATCH = Reduce(per_sample=True), Reduce(per_sample=False)


class Root(NamedTuple):
    name: str
    f: Field
    z0: Tensor
    answer: Tensor
    gain: float  # |z - z*| <= gain |f(z) - z|: 1 / (1 - Lipschitz constant)

    def map(self, z: Tensor) -> Tensor:
        return self.f(z, z.new_zeros(len(z)))


class Flow(NamedTuple):
    name: str
    F: Field
    z0: Tensor
    at: Callable[[float], Tensor]  # z(t)


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def turn(angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return f64([[c, s], [-s, c]])


def contraction(n: int, norm: float, seed: int = 0) -> Tensor:
    """An unsymmetric matrix of this spectral norm."""
    A = random(n, n, seed=seed)
    return A * (norm / torch.linalg.matrix_norm(A, 2))


def linear(name: str, A: Tensor, norm: float) -> Root:
    answer = random(3, len(A), seed=1)
    return Root(name, lambda z, t: (z - answer) @ A + answer, torch.zeros_like(answer), answer, 1 / (1 - norm))


def roots() -> list[Root]:
    """Contractions: what looks for a fixed point has to find these."""
    rate, ones = f64([[0.1], [0.5], [-0.7], [0.9]]), torch.ones(4, 3, dtype=torch.float64)
    W, answer = contraction(4, 0.8), random(3, 4, seed=1).tanh() * 0.9
    c = answer.atanh() - answer @ W
    return [
        Root("rows of rates .1 to .9", lambda z, t: rate * z + 1 - rate, 3 * ones, ones, 10.0),
        linear("matrix", contraction(4, 0.9), 0.9),
        linear("rotation of |λ| .97", 0.97 * turn(1.0), 0.97),
        Root("tanh network", lambda z, t: torch.tanh(z @ W + c), torch.zeros_like(answer), answer, 5.0),
    ]


def flows() -> list[Flow]:
    z0, rate = f64([[0.2, 0.5], [0.1, 0.9]]), f64([[1.0, 0.5], [3.0, 0.1]])
    return [
        Flow("decay", lambda z, t: -rate * z, z0, lambda t: z0 * torch.exp(-rate * t)),
        Flow("rotation", lambda z, t: z @ turn(math.pi / 2), z0, lambda t: z0 @ turn(t)),
        Flow("logistic", lambda z, t: z * (1 - z), z0, lambda t: 1 / (1 + math.exp(-t) * (1 / z0 - 1))),
    ]


def whirl() -> Flow:
    """z' = |z|^2 (1 + cos(t) / 2) i z: neither linear nor autonomous, so that every coefficient of a method counts."""
    z0, quarter = f64([[1.0, 0.0]]), turn(math.pi / 2)

    def F(z: Tensor, t: Tensor) -> Tensor:
        return z.square().sum(1, keepdim=True) * (1 + t.cos() / 2).unsqueeze(1) * (z @ quarter)

    return Flow("whirl", F, z0, lambda t: z0 @ turn(t + math.sin(t) / 2))


class Watched:
    """A map that counts its calls and the VJPs that autograd makes of it."""

    def __init__(self, f: Field):
        self.f, self.calls, self.vjps = f, 0, 0

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        out = self.f(z, t)
        if out.requires_grad:
            out.register_hook(self._one_more)
        return out

    def _one_more(self, g: Tensor) -> None:
        self.vjps += 1
