"""The whole DEQ path against torchdeq 0.1 (arXiv 2310.18605) on the same weights: fixed point and gradients."""

import pytest
import torch
from problems import PER_SAMPLE, close, contraction, random

from implicit_bench.adjoints import IFT, JFB, Phantom, Solve
from implicit_bench.core import FixedPoint, Residual
from implicit_bench.solvers import Anderson, Broyden, Picard

torchdeq = pytest.importorskip("torchdeq")
PAIRS = {"fixed_point_iter": Picard(), "anderson": Anderson(), "broyden": Broyden()}


def setting():
    torch.manual_seed(0)
    W, U, x = contraction(12, 0.85), random(12, 12, seed=1), random(6, 12, seed=2)
    for tensor in (W, U, x):
        tensor.requires_grad_()
    return W, U, x


def theirs(weight, **how):
    W, U, x = setting()
    settings = {"f_max_iter": 300, "f_tol": 1e-12, "f_stop_mode": "rel", "b_stop_mode": "rel", **how}
    deq = torchdeq.get_deq(**settings)
    out, info = deq(lambda z: torch.tanh(z @ W + x @ U), torch.zeros_like(x))
    (out[-1] * weight).sum().backward()
    return out[-1].detach(), (W.grad, U.grad, x.grad), info


def ours(weight, solver, adjoint):
    W, U, x = setting()
    xU = x @ U
    forward = Solve(solver, Residual(1e-12, max_steps=300), PER_SAMPLE)
    z, solution, log = adjoint(FixedPoint(lambda z, t: torch.tanh(z @ W + xU)), torch.zeros_like(x), forward, ())
    (z * weight).sum().backward()
    return z.detach(), (W.grad, U.grad, x.grad), solution, log


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("linear", ["gmres", "anderson", "picard"])
def test_the_exact_gradient_is_theirs(name, linear):
    weight = random(6, 12, seed=3)
    z, grads, _ = theirs(weight, f_solver=name, b_solver="fixed_point_iter", b_max_iter=400, b_tol=1e-12, ift=True)
    mine = ours(weight, PAIRS[name], IFT(rtol=1e-12, max_iter=400, linear=linear))
    close(mine[0], z, 1e-9)
    for got, wanted in zip(mine[1], grads):
        close(got, wanted, 1e-8)


@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (5, 0.5), (3, 0.8)])
def test_the_phantom_gradient_is_theirs(steps, damping):
    weight = random(6, 12, seed=3)
    _, grads, _ = theirs(weight, f_solver="broyden", ift=False, grad=steps, tau=damping)
    mine = ours(weight, Picard(), Phantom(steps, damping))
    for got, wanted in zip(mine[1], grads):
        close(got, wanted, 1e-8)
    if steps == 1:
        for got, wanted in zip(ours(weight, Picard(), JFB())[1], grads):
            close(got, wanted, 1e-8)


def test_picards_steps_are_theirs():
    """The same quotient at the same tolerance: their step count is the worst sample's, and ours is that sample's."""
    weight = random(6, 12, seed=3)
    _, _, info = theirs(weight, f_solver="fixed_point_iter", f_tol=1e-6, ift=True, b_max_iter=50, b_tol=1e-6)
    W, U, x = setting()
    xU = x @ U
    forward = Solve(Picard(), Residual(1e-6, max_steps=300), PER_SAMPLE)
    with torch.no_grad():
        solution = forward(FixedPoint(lambda z, t: torch.tanh(z @ W + xU)), torch.zeros_like(x))
    assert int(info["nstep"].max()) == int(solution.stats.nfe.max())
    own_end = info["rel_trace"][torch.arange(6), solution.stats.nfe]  # their first entry is a placeholder
    torch.testing.assert_close(own_end, solution.stats.residual, rtol=1e-6, atol=0)
