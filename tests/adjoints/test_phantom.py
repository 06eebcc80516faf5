"""The phantom gradient against its series by dense algebra, and as what lies between JFB and the exact gradient."""

import pytest
import torch
from problems import TIGHT, TanhCell, Watched, close, contraction, f64, network, random, root, tanh_map

from implicit_bench.adjoints import IFT, JFB, Phantom
from implicit_bench.core import FixedPoint, FixedSteps
from implicit_bench.models import ImplicitLayer, Zero
from implicit_bench.solvers import Anderson, Picard

X, G = random(3, 4, seed=7), random(3, 4, seed=8)
ZERO = torch.zeros(3, 4).double()
MODES = pytest.mark.parametrize("mode", ["unroll", "neumann"])
LOOSE = root(Picard(), FixedSteps(3))  # ends far from the fixed point


def gradients(adjoint, cell=None, stop=TIGHT):
    cell = cell or TanhCell()
    x = X.clone().requires_grad_()
    layer = ImplicitLayer(cell, Zero(network(cell)), Anderson(ridge=1e-14), stop, adjoint)
    return torch.autograd.grad((layer(x).z * G).sum(), [*cell.parameters(), x])


def distance(a, b):
    a, b = (torch.cat([v.flatten() for v in vs]) for vs in (a, b))
    return float((a - b).norm() / b.norm())


@MODES
@pytest.mark.parametrize("damping", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_papers_series_on_a_linear_map(mode, steps, damping):
    """dL/dc of f = z W + c is tau sum_{i<k} (tau J^T + (1 - tau) I)^i g, wherever the solve has stopped."""
    W, c = contraction(4, 0.9), X.clone().requires_grad_()
    z, _, _ = Phantom(steps, damping, mode)(FixedPoint(lambda z, t: z @ W + c), ZERO, LOOSE, ())
    (got,) = torch.autograd.grad(z, c, G)
    B = damping * W.T + (1 - damping) * torch.eye(4).double()  # row vectors: J^T g is g W^T
    wanted = damping * sum(G @ torch.linalg.matrix_power(B, i) for i in range(steps))
    close(got, wanted, 1e-13)


@pytest.mark.parametrize(("steps", "damping"), [(1, 0.5), (5, 0.5), (3, 1.0), (7, 0.3)])
def test_the_two_modes_agree_at_the_fixed_point_and_not_before(steps, damping):
    unrolled, series = (gradients(Phantom(steps, damping, mode)) for mode in ("unroll", "neumann"))
    assert distance(unrolled, series) < 1e-11
    unrolled, series = (gradients(Phantom(steps, damping, mode), stop=FixedSteps(2)) for mode in ("unroll", "neumann"))
    assert (distance(unrolled, series) > 1e-3) == (steps > 1)


def test_the_unroll_is_the_gradient_of_damped_applications():
    W = contraction(4, 0.8).requires_grad_()
    F = tanh_map(W, X)
    z, solution, _ = Phantom(4, 0.3)(F, ZERO, LOOSE, ())
    (got,) = torch.autograd.grad(z, W, G)
    h = solution.value
    for _ in range(4):
        h = 0.3 * F.f(h, None) + 0.7 * h
    close(got, torch.autograd.grad(h, W, G)[0], 1e-14)


@MODES
def test_it_tends_to_the_exact_gradient_from_jfb(mode):
    exact = gradients(IFT(1e-13, max_iter=60))
    assert all(torch.equal(a, b) for a, b in zip(gradients(Phantom(1, 1.0, mode)), gradients(JFB())))
    errors = [distance(gradients(Phantom(steps, 0.5, mode)), exact) for steps in (1, 2, 5, 10, 100)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.3 > errors[2] > 1e-3
    assert errors[-1] < 1e-9


def test_the_bias_is_the_series_remainder():
    """On f = r z + c: (1 - (1 - tau (1 - r))^k) of the exact 1 / (1 - r)."""
    r = f64([[0.5], [0.9]])
    for mode in ("unroll", "neumann"):
        c = torch.ones(2, 1).double().requires_grad_()
        z, _, _ = Phantom(5, 0.5, mode)(FixedPoint(lambda z, t, c=c: r * z + c), torch.zeros(2, 1).double(), root(), ())
        z.sum().backward()
        close(c.grad, (1 - (1 - 0.5 * (1 - r)) ** 5) / (1 - r), 1e-14)


def test_damping_tames_what_the_plain_series_blows_up():
    """An eigenvalue of -1.5: the fixed point is repelling, and only the damped series converges to 1 / 2.5."""
    for damping, good in ((1.0, False), (0.5, True)):
        c = torch.ones(1, 1).double().requires_grad_()
        F = FixedPoint(lambda z, t, c=c: -1.5 * z + c)
        z, _, _ = Phantom(30, damping, "neumann")(F, f64([[0.4]]), root(Picard(), FixedSteps(1)), ())
        z.sum().backward()
        assert (abs(float(c.grad) - 0.4) < 1e-6) == good


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(("mode", "calls"), [("unroll", None), ("neumann", 1)])
def test_the_log_counts_every_call_and_every_vjp(mode, calls, steps):
    W = contraction(4, 0.8).requires_grad_()
    watched = Watched(tanh_map(W, X).f)
    z, solution, log = Phantom(steps, 0.5, mode)(FixedPoint(watched), ZERO, root(), ())
    assert (log.vjps, log.calls) == (0, 0)
    assert log.forward_calls == (calls or steps) == watched.calls - solution.stats.calls
    z.sum().backward()
    assert log.vjps == watched.vjps == steps
    assert log.calls == 0
    assert watched.calls == solution.stats.calls + log.forward_calls


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Phantom(steps=0), "adjoint.steps=0 must be at least 1"),
        (lambda: Phantom(damping=0.0), r"adjoint.damping=0.0 must lie in \(0, 1\]"),
        (lambda: Phantom(damping=1.5), r"adjoint.damping=1.5 must lie in \(0, 1\]"),
        (lambda: Phantom(mode="damped"), "adjoint.mode='damped' must be unroll or neumann"),
    ],
)
def test_an_impossible_setting_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
