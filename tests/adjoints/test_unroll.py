"""Differentiation through the solver's own steps: what it counts, and that the steps' derivative is the true one."""

import pytest
import torch
from problems import BATCH, PER_SAMPLE, Watched, close, contraction, f64, random, root, tanh_map, to_end

from implicit_bench.adjoints import Unroll
from implicit_bench.core import FixedPoint, FixedSteps, Residual
from implicit_bench.solvers import Anderson, Picard, TorchDiffeq, Tsit5

CTX = random(3, 4, seed=7)
ZERO = torch.zeros(3, 4).double()


def exp_field(w):
    return lambda z, t: w * z * torch.cos(t)[:, None]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_picard_unrolled_is_nested_cells(k):
    W = contraction(4, 0.8).requires_grad_()
    z, solution, log = Unroll()(tanh_map(W, CTX), ZERO, root(Picard(), FixedSteps(k)), ())
    nested = ZERO
    for _ in range(k):
        nested = torch.tanh(nested @ W + CTX)
    close(z, nested, 1e-14)
    got, wanted = (torch.autograd.grad(v.square().sum(), W)[0] for v in (z, nested))
    close(got, wanted, 1e-13)
    assert log.vjps == k == solution.stats.calls


@pytest.mark.parametrize(
    ("solver", "stop"),
    [(Anderson(window=2), FixedSteps(5)), (Anderson(damping=0.5), FixedSteps(4)), (Tsit5(1e3, 1e3), FixedSteps(6))],
    ids=["anderson", "damped", "tsit5"],
)
def test_the_derivative_is_that_of_the_steps(solver, stop):
    """Against finite differences. Tsit5's steps are constants: here 1e-4 from z = 0, then ten times more each."""

    def z_of(W, ctx):
        return Unroll()(tanh_map(W, ctx), torch.zeros(2, 3).double(), root(solver, stop), ())[0]

    W, ctx = contraction(3, 0.8).requires_grad_(), random(2, 3, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(z_of, (W, ctx), eps=1e-6, atol=1e-6)


def test_through_an_ode_solver_it_is_the_analytic_derivative():
    """z' = w z cos t: z(1) = z0 e^(w sin 1), dz/dw = z sin 1."""
    w = f64(0.8).requires_grad_()
    z0 = f64([[1.0], [3.0]])
    for solver in (Tsit5(1e-10, 1e-10), TorchDiffeq(rtol=1e-10, atol=1e-10)):
        z, _, _ = Unroll()(exp_field(w), z0, to_end(solver), ())
        exact = z0 * torch.exp(w.detach() * torch.sin(f64(1.0)))
        close(z.detach(), exact, 1e-8)
        (g,) = torch.autograd.grad(z.sum(), w)
        close(g, (exact * torch.sin(f64(1.0))).sum(), 1e-8)


@pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["per_sample", "batch"])
@pytest.mark.parametrize(
    ("solver", "unused"),
    [(Picard(), 0), (Anderson(), 0), (Tsit5(1e-5, 1e-5), 1)],
    ids=["picard", "anderson", "tsit5"],
)
def test_vjps_are_those_that_autograd_makes(solver, unused, reduce):
    """One for each call; the one that only chose Tsit5's first step has none."""
    W = contraction(4, 0.8).requires_grad_()
    watched = Watched(tanh_map(W, CTX).f)
    z, solution, log = Unroll()(FixedPoint(watched), ZERO, root(solver, Residual(1e-3, max_steps=300), reduce), ())
    assert log.vjps == 0
    z.sum().backward()
    assert log.vjps == watched.vjps == solution.stats.calls - unused
    assert watched.calls == solution.stats.calls
    assert (log.forward_calls, log.calls) == (0, 0)


@pytest.mark.parametrize("solver", [Tsit5(), TorchDiffeq(), TorchDiffeq("rk4")], ids=["tsit5", "dopri5", "rk4"])
def test_vjps_of_an_ode(solver):
    w = f64(0.8).requires_grad_()
    watched = Watched(exp_field(w))
    z, solution, log = Unroll()(watched, f64([[1.0], [3.0]]), to_end(solver, 3.0), ())
    z.sum().backward()
    assert log.vjps == watched.vjps
    assert watched.calls == solution.stats.calls
    if isinstance(solver, Tsit5):  # neither the first step's probe nor the last stage, F at the end, is in z(t1)
        assert log.vjps == solution.stats.calls - 2


def test_an_equilibrium_layer_on_a_foreign_solver_puts_out_f_of_the_end():
    W = contraction(4, 0.8).requires_grad_()
    F = tanh_map(W, CTX)
    z, solution, _ = Unroll()(F, ZERO, to_end(TorchDiffeq(rtol=1e-8, atol=1e-8), 2.0), ())
    close(z.detach(), F.f(solution.value, None).detach(), 1e-14)
    assert float(torch.autograd.grad(z.sum(), W)[0].norm()) > 0.1


def test_a_frozen_row_gets_the_gradient_of_its_own_steps():
    """Row 0 ends early; its derivative is that of its own solve, whatever the batch did afterwards."""
    rate = f64([[0.3], [0.95]])
    stop = Residual(1e-2, max_steps=500)

    def grads(rows):
        c = f64([[1.0]] * len(rows)).requires_grad_()
        F = FixedPoint(lambda z, t: rate[rows] * z + c)
        z, solution, _ = Unroll()(F, torch.zeros(len(rows), 1).double(), root(Picard(), stop), ())
        return torch.autograd.grad(z.sum(), c)[0], solution.stats.steps

    both, steps = grads([0, 1])
    alone, _ = grads([0])
    assert int(steps[0]) < int(steps[1]) / 5
    assert torch.equal(both[:1], alone)
    close(both, (1 - rate ** (steps + 1).unsqueeze(1)) / (1 - rate), 1e-12)  # sum of r^i to the last f
