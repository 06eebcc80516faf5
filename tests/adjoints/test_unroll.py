"""Differentiation through the solver's own steps: what it counts, and that the steps' derivative is the true one."""

import math
from dataclasses import replace

import pytest
import torch
from problems import (
    BATCH,
    PER_SAMPLE,
    TanhCell,
    Watched,
    close,
    contraction,
    f64,
    network,
    random,
    root,
    tanh_map,
    to_end,
)

from implicit_bench.adjoints import Unroll
from implicit_bench.core import EndTime, FixedPoint, FixedSteps, Residual, Status
from implicit_bench.models import FZero, ImplicitLayer, SkipNet
from implicit_bench.solvers import RK4, Anderson, Bosh3, Dopri5, Euler, Picard, TorchDiffeq, Tsit5, Vcab3

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


@pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["per_sample", "batch"])
@pytest.mark.parametrize(
    ("solver", "per_step", "start"),
    [(Picard(), 1, 1), (Anderson(), 1, 1), (Tsit5(1e-5, 1e-5), 6, 2)],
    ids=["picard", "anderson", "tsit5"],
)
def test_checkpointed_steps_are_made_again_once_and_give_the_same_gradient(solver, per_step, start, reduce):
    def run(checkpoint):
        W = contraction(4, 0.8).requires_grad_()
        watched = Watched(tanh_map(W, CTX).f)
        stop = Residual(1e-3, max_steps=300)
        z, solution, log = Unroll(checkpoint)(FixedPoint(watched), ZERO, root(solver, stop, reduce), ())
        assert watched.calls == solution.stats.calls
        assert (log.calls, log.vjps) == (0, 0)
        gradient = torch.autograd.grad(z.square().sum(), W)[0]
        assert log.vjps == watched.vjps
        assert log.calls == watched.calls - solution.stats.calls
        return z, gradient, log, solution.stats

    z, gradient, log, stats = run(True)
    plain = run(False)
    assert torch.equal(z, plain[0])
    assert torch.equal(gradient, plain[1])
    assert log.vjps == plain[2].vjps
    steps = (stats.calls - start) // per_step
    assert int(stats.steps.max()) == steps
    assert log.calls == steps * per_step > plain[2].calls == 0


@pytest.mark.parametrize(
    ("solver", "start"),
    [(Tsit5(), 2), (Dopri5(), 2), (Bosh3(), 2), (Vcab3(), 2), (Euler(0.1), 1), (RK4(0.1), 1)],
    ids=["tsit5", "dopri5", "bosh3", "vcab3", "euler", "rk4"],
)
def test_checkpointed_steps_of_an_ode(solver, start):
    w = f64(0.8).requires_grad_()

    def grad(checkpoint):
        watched = Watched(exp_field(w))
        z, solution, log = Unroll(checkpoint)(watched, f64([[1.0], [3.0]]), to_end(solver, 3.0), ())
        grad = torch.autograd.grad(z.sum(), w)[0]
        assert watched.calls == solution.stats.calls + log.calls
        assert watched.vjps == log.vjps
        return grad, log.calls, solution.stats.calls, log.vjps

    again, plain = grad(True), grad(False)
    assert torch.equal(again[0], plain[0])
    assert again[2:] == plain[2:]
    assert 0 <= again[2] - start - again[1] <= 1  # all but the start's; the last step's F is in nobody's gradient


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradcheck(checkpoint):
    def z_of(W, ctx, z0):
        adjoint = Unroll(checkpoint, through_start=True)
        return adjoint(tanh_map(W, ctx), z0, root(Picard(), FixedSteps(4)), ())[0]

    inputs = [contraction(3, 0.8), random(2, 3, seed=5), random(2, 3, seed=6)]
    inputs = [v.requires_grad_() for v in inputs]
    assert torch.autograd.gradcheck(z_of, inputs, eps=1e-6, atol=1e-7)
    assert torch.autograd.gradgradcheck(z_of, inputs, eps=1e-6, atol=1e-6)


def test_the_start_is_reached_only_when_asked_for():
    """dz_k/dz0 = r^k on f(z) = r z + c."""
    for through, wanted in ((False, None), (True, 0.5**4)):
        z0 = f64([[1.0]]).requires_grad_()
        c = f64([[1.0]]).requires_grad_()
        F = FixedPoint(lambda z, t, c=c: 0.5 * z + c)
        z, _, _ = Unroll(through_start=through)(F, z0, root(Picard(), FixedSteps(4)), ())
        z.sum().backward()
        assert c.grad is not None
        assert z0.grad is None if wanted is None else float(z0.grad) == wanted


@pytest.mark.parametrize("init", [SkipNet, FZero])
def test_a_layers_start_learns_from_the_task_only_when_asked_to(init):
    def gradients(through, frozen=False):
        torch.manual_seed(0)
        cell = TanhCell().requires_grad_(not frozen)
        layer = ImplicitLayer(cell, init(network(cell)), Picard(), FixedSteps(3), Unroll(through_start=through))
        x = random(3, 4, seed=7)
        layer(x).z.square().sum().backward()
        nested = start = layer.init(x, lambda z, t: cell(z, cell.begin(x), t))
        nested = start if through else start.detach()
        for _ in range(3):
            nested = cell(nested, cell.begin(x), None)
        parameters = [p for p in layer.parameters() if p.requires_grad]
        wanted = torch.autograd.grad(nested.square().sum(), parameters, allow_unused=True)
        for p, w in zip(parameters, wanted):
            assert (p.grad is None) == (w is None)
            if w is not None:
                close(p.grad, w, 1e-13)
        return [p.grad for p in layer.init.parameters()]

    assert all(g is None for g in gradients(False))
    assert all(g is not None and float(g.norm()) > 0 for g in gradients(True))
    if init is SkipNet:  # which learns even below a cell that does not
        assert all(float(g.norm()) > 0 for g in gradients(True, frozen=True))


GROWING = f64([[0.5], [3.0], [0.25]])  # z = w z^2 + c has no solution for c = 3


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("solver", [Picard(), Picard(0.9)], ids=["picard", "damped"])
@pytest.mark.parametrize("blow_up", [torch.square, torch.expm1], ids=["square", "exp"])
def test_a_row_that_diverges_does_not_spoil_the_gradient_of_the_others(solver, checkpoint, blow_up):
    """Its own is zero; without care 0 times infinity would be NaN in every parameter's."""

    def run(rows):
        w, c = f64(0.2).requires_grad_(), GROWING[rows].requires_grad_()
        watched = Watched(lambda z, t: w * blow_up(z) + c)
        stop = Residual(1e-8, max_steps=200)
        z0 = torch.zeros(len(rows), 1).double()
        z, solution, log = Unroll(checkpoint)(FixedPoint(watched), z0, root(solver, stop), ())
        assert watched.calls == solution.stats.calls + log.forward_calls
        return z, torch.autograd.grad(z.sum(), [w, c]), solution.status.tolist(), solution.fixed_point

    z, (dw, dc), status, value = run([0, 1, 2])
    assert status == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    assert bool(z.isfinite().all())
    assert torch.equal(z.detach(), value)  # the last finite z of the lost row, as without gradients
    alone, (dw_alone, dc_alone), _, _ = run([0, 2])
    assert torch.equal(z[[0, 2]], alone)
    close(dw, dw_alone, 1e-12)
    close(dc[[0, 2]], dc_alone, 1e-12)
    assert float(dc[1]) == 0


def test_a_row_of_an_ode_that_diverges_does_not_spoil_the_gradient_of_the_others():
    w, z0 = f64(1.0).requires_grad_(), f64([[-1.0], [2.0]])

    def F(z, t):
        return w * torch.expm1(300 * z)  # -w, and 1e260

    class Steps(Picard):
        """Explicit Euler, whatever the error."""

        has_time = True

        def step(self, F, state, reduce):
            t = state.t + 0.01
            z = state.z + 0.01 * state.F
            return state._replace(z=z, F=F(z, t), t=t)

    z, solution, _ = Unroll()(F, z0, root(Steps(), EndTime(0.9)), ())
    assert solution.status.tolist() == [Status.REACHED_END, Status.NONFINITE]
    (both,) = torch.autograd.grad(z.sum(), w)
    z, _, _ = Unroll()(F, z0[:1], root(Steps(), EndTime(0.9)), ())
    close(both, torch.autograd.grad(z.sum(), w)[0], 1e-14)


# ------------------------------------------------------------------------------------- where f is not finite on the way

ROW = f64([[0.0], [1.0]])


def roots_fall(w, z, t):
    """z' = -w sqrt(z): an attempt beyond z = 0 is NaN and rejected."""
    return -w * z.sqrt()


def second_is_lost(w, z, t):
    return torch.where((ROW > 0) & (z > 1.2), torch.nan, w * z)


def first_overflows(w, z, t):
    """It has converged at the start, and squares itself while the second goes on."""
    return torch.where(ROW > 0, 1 + 0.95 * w * z, w * z * z)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(
    ("f", "start", "how", "rows", "status", "wanted", "tol"),
    [
        (roots_fall, [[1.0], [2.0]], to_end(Vcab3(1e-5, 1e-5), 1.9), [0, 1], [1, 1], -0.97701, 1e-3),
        (second_is_lost, [[1.0], [1.0]], to_end(Tsit5(1e-8, 1e-8), 1.0), [0], [1, 5], math.e, 1e-6),
        (first_overflows, [[1.001], [0.0]], root(Picard(), Residual(1e-2, max_steps=300)), [1], [0, 0], None, 0),
    ],
    ids=["rejected", "stuck", "after-its-end"],
)
def test_a_row_whose_f_is_not_finite_spoils_no_gradient(checkpoint, f, start, how, rows, status, wanted, tol):
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    watched = Watched(lambda z, t: f(w, z, t))
    F = FixedPoint(watched) if f is first_overflows else watched
    z, solution, log = Unroll(checkpoint=checkpoint)(F, f64(start), replace(how, reduce=PER_SAMPLE), ())
    assert solution.status.tolist() == status
    assert watched.calls == solution.stats.calls + log.forward_calls
    (grad,) = torch.autograd.grad(z[rows].sum(), w)
    if wanted is None:  # 1 + .95 w z, so many times
        v = torch.ones((), dtype=torch.float64, requires_grad=True)
        x = torch.zeros((), dtype=torch.float64)
        for _ in range(int(solution.stats.steps[1]) + 1):
            x = 1 + 0.95 * v * x
        wanted, tol = float(torch.autograd.grad(x, v)[0]), 1e-9
    assert abs(float(grad) - wanted) <= tol * abs(wanted)
