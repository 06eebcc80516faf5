from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adjoints import BackwardLog, Solve
from ..core import EndTime, Field, FixedPoint, Reduce, Residual, Solution
from ..solvers import Picard, Tsit5
from .kit import Result, check, require, tuned
from .problems import BATCH, PER_SAMPLE, Watched, contraction, f64, random


class Learned(NamedTuple):
    """A problem with parameters w and an input x, and what a training step asks of it."""

    name: str
    f: Watched
    w: Tensor
    x: Tensor
    z0: Tensor
    solve: Solve
    plain: Tensor  # the answer as autograd sees through it, without a solver

    @property
    def F(self) -> Field:
        return self.f if self.solve.stop.t1 < math.inf else FixedPoint(self.f)

    def forward(self, adjoint: Any) -> tuple[Tensor, Solution, BackwardLog]:
        closure = [self.w, self.x] if getattr(adjoint, "needs_closure", False) else [self.x]
        return adjoint(self.F, self.z0, self.solve, closure)

    def gradients(self, z: Tensor) -> list[Tensor]:
        """Of (z g) summed, g fixed, with respect to w and x."""
        if not z.requires_grad:
            return [0 * self.w.detach(), 0 * self.x.detach()]
        g = random(*z.shape, seed=5).to(z.dtype)
        return list(torch.autograd.grad(z, (self.w, self.x), g, allow_unused=True, materialize_grads=True))


def equilibrium(reduce: Reduce, dtype: torch.dtype = torch.float64) -> Learned:
    """z = tanh(z w + x), a contraction; the answer is 200 nested applications."""
    w, x = contraction(4, 0.7).to(dtype).requires_grad_(), random(3, 4, seed=2).to(dtype).requires_grad_()
    plain = torch.zeros_like(x)
    for _ in range(200):
        plain = torch.tanh(plain @ w + x)
    stop = Residual(1e-13 if dtype == torch.float64 else 1e-5, max_steps=500)
    return Learned("fixed point", Watched(lambda z, t: torch.tanh(z @ w + x)), w, x, torch.zeros_like(x).detach(),
                   Solve(Picard(), stop, reduce), plain)  # fmt: skip


def growth(reduce: Reduce, dtype: torch.dtype = torch.float64) -> Learned:
    """z' = w x z (1 - z) to t = 1, which has a closed form."""
    w, x = f64([0.5, 2.0]).to(dtype).requires_grad_(), random(3, 2, seed=2).to(dtype).requires_grad_()
    z0, tol = torch.full_like(x, 0.2).detach(), 1e-9 if dtype == torch.float64 else 1e-5
    plain = 1 / (1 + torch.exp(-w * x) * (1 / z0 - 1))
    ode = Solve(Tsit5(tol, tol), EndTime(1.0), reduce)
    return Learned("ODE", Watched(lambda z, t: w * x * z * (1 - z)), w, x, z0, ode, plain)


def _problems(adjoint: Any, *given: Any) -> list[Learned]:
    kinds = [equilibrium] * (not getattr(adjoint, "needs_end_time", False))
    kinds += [growth] * (not getattr(adjoint, "needs_equilibrium", False))
    return [kind(*given) for kind in kinds]


def _compare(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[float, float]:
    """Relative error and cosine."""
    a, b = (torch.cat([v.flatten() for v in grads]) for grads in (got, wanted))
    return float((a - b).norm() / b.norm()), float(a @ b / (a.norm() * b.norm()))


@check
def gradient(adjoint: Any) -> str:
    """Against the derivative of the answer itself; one that is `exact` with its own tolerances tightened."""
    exact, told = bool(getattr(adjoint, "exact", False)), {}
    tight = tuned(adjoint, rtol=1e-12, atol=1e-14, max_iter=50) if exact else adjoint
    for problem in [*_problems(adjoint, BATCH), *_problems(adjoint, PER_SAMPLE)]:
        wanted, z = problem.gradients(problem.plain), problem.forward(tight)[0]
        got = problem.gradients(z)
        for name, grad in zip(("the parameters", "x"), got):
            why = "" if z.requires_grad else ": the output is detached"
            require(grad.any(), f"{problem.name}: the gradient of {name} is zero{why}")
            require(grad.isfinite().all(), f"{problem.name}: the gradient of {name} is not finite")
        error, cosine = _compare(got, wanted)
        require(not exact or error < 1e-6, f"{problem.name}: it says that it is exact, but is off by {error:.0e}")
        require(cosine > 0, f"{problem.name}: it points away from the exact gradient, cosine {cosine:.2f}")
        as_set, _ = _compare(problem.gradients(problem.forward(adjoint)[0]), wanted)
        figures = f"exact to {error:.0e}" if exact else f"off by {error:.0e}, cosine {cosine:.4f}"
        told[problem.name] = f"{figures}, {as_set:.0e} as set" if as_set > 10 * error else figures
    return "; ".join(f"{name}: {figures}" for name, figures in told.items())


@check
def value(adjoint: Any) -> str:
    """An adjoint never changes the value: f(z*), or z at the end time."""
    for problem in _problems(adjoint, PER_SAMPLE):
        with torch.no_grad():
            plain = problem.solve(problem.F, problem.z0)
        z, solution, _ = problem.forward(adjoint)
        require(torch.equal(solution.value, plain.value), f"{problem.name}: the solve differs from one without it")
        off = float((z - problem.plain).detach().abs().max())
        require(off < 1e-7, f"{problem.name}: the output is off the answer by {off:.0e}")
    return "the forward is the one without it, bit for bit"


@check
def counts(adjoint: Any) -> str:
    told = []
    for problem in [*_problems(adjoint, BATCH), *_problems(adjoint, PER_SAMPLE)]:
        z, solution, log = problem.forward(adjoint)
        problem.gradients(z)
        n = solution.stats.calls + log.forward_calls + log.calls
        for what, said, seen in (("VJPs", log.vjps, problem.f.vjps), ("calls", n, problem.f.calls)):
            require(said == seen, f"{problem.name}: the log has {said} {what}, but there were {seen}")
        told.append(f"{log.vjps} VJPs and {n} calls ({problem.name})")
    return f"{', '.join(told[len(told) // 2 :])}: every one counted"


@check
def memory(adjoint: Any) -> str:
    """Whatever it made is freed with its output, whether the backward ran or not, without the garbage collector."""

    def step(problem: Learned, backward: bool) -> list[weakref.ref[Any]]:
        z, solution, _ = problem.forward(adjoint)
        if backward:
            problem.gradients(z)
        return [weakref.ref(each) for each in (z, solution.value, problem.f)]

    gc.collect()
    gc.disable()
    try:
        for backward in (False, True):
            for k in range(len(_problems(adjoint, PER_SAMPLE))):
                refs = step(_problems(adjoint, PER_SAMPLE)[k], backward)
                alive = [name for name, ref in zip(("output", "solution", "graph"), refs) if ref() is not None]
                how = f"a step {'with' if backward else 'without'} backward"
                require(not alive, f"memory leaks: {how} leaves its {', '.join(alive)} behind")
    finally:
        gc.enable()
    return "nothing outlives a step, with backward or without"


@check
def dtype(adjoint: Any) -> str:
    for problem in _problems(adjoint, PER_SAMPLE, torch.float32):
        z, _, _ = problem.forward(adjoint)
        for name, got in (("output", z), *zip(("gradient", "gradient of x"), problem.gradients(z))):
            require(got.dtype == torch.float32, f"{problem.name}: the {name} of a float32 problem is {got.dtype}")
    return "float32 stays float32"


def check_adjoint(adjoint: Any) -> list[Result]:
    if not callable(adjoint):
        return [Result("adjoint", False, f"{type(adjoint).__name__} cannot be called as adjoint(F, z0, solve, wrt)")]
    return [each(adjoint) for each in (gradient, value, counts, memory, dtype)]
