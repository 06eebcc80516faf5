"""ift.x_gradient=one_step: the linear solve reaches the cell's parameters, but not x nor what is before it."""

import pytest
import torch
from problems import TIGHT, TanhCell, Watched, close, f64, network, random, root

from implicit_bench.adjoints import IFT, JFB
from implicit_bench.core import FixedPoint, Residual
from implicit_bench.models import DenseCell, FZero, ImplicitLayer, SkipNet, Zero
from implicit_bench.solvers import Anderson, Picard

X, G, H = random(3, 4, seed=7), random(3, 4, seed=8), random(3, 4, seed=9)
EXACT, ONE_STEP = IFT(1e-13, max_iter=60), IFT(1e-13, max_iter=60, x_gradient="one_step")
LINEAR = pytest.mark.parametrize("linear", ["gmres", "anderson", "picard"])


def relu_cell():
    """The paper's cell relu(W z) + relu(U x): U is a parameter that `begin` uses."""
    torch.manual_seed(0)
    cell = DenseCell(4).double()
    with torch.no_grad():
        cell.W.weight.mul_(0.8 / torch.linalg.matrix_norm(cell.W.weight, 2))
    return cell


CELLS = pytest.mark.parametrize("cell", [TanhCell(), relu_cell()], ids=["tanh", "relu"])


def gradients(adjoint, cell, init=Zero, start_weight=0.0):
    """dL/d(cell's parameters), dL/d(stem, x) with L = <g, z> + <h, z0>."""
    torch.manual_seed(0)
    stem = torch.nn.Linear(4, 4).double()
    x = X.clone().requires_grad_()
    layer = ImplicitLayer(cell, init(network(cell)), Anderson(ridge=1e-14), TIGHT, adjoint)
    out = layer(stem(x))
    loss = (out.z * G).sum() + start_weight * (out.start * H).sum()
    got = torch.autograd.grad(loss, [*cell.parameters(), *stem.parameters(), x], allow_unused=True)
    n = len(list(cell.parameters()))
    return got[:n], got[n:], out.backward


@CELLS
@LINEAR
def test_the_cell_learns_exactly_and_the_stem_by_one_step(cell, linear):
    adjoint = IFT(1e-13, max_iter=300, linear=linear, x_gradient="one_step")
    own, stem, log = gradients(adjoint, cell)
    exact_own, exact_stem, exact_log = gradients(IFT(1e-13, max_iter=300, linear=linear), cell)
    _, one_step, _ = gradients(JFB(), cell)
    for a, b in zip(own, exact_own):
        close(a, b, 0)
    for a, b, c in zip(stem, one_step, exact_stem):
        close(a, b, 1e-13)
        assert float((a - c).norm() / c.norm()) > 0.05
    assert log.vjps == exact_log.vjps + 1


@pytest.mark.parametrize("init", [Zero, FZero, SkipNet])
@CELLS
def test_a_start_keeps_its_own_gradient(cell, init):
    """What a start f(0, x) or g(x) sends to the stem is not the linear solve's."""
    own, stem, _ = gradients(ONE_STEP, cell, init, 1.0)
    exact, _, _ = gradients(EXACT, cell, init, 1.0)
    _, one_step, _ = gradients(JFB(), cell, init, 1.0)
    for a, b in zip(own, exact):
        close(a, b, 1e-13)
    for a, b in zip(stem, one_step):
        close(a, b, 1e-13)
    if init is not Zero:
        assert float((stem[0] - gradients(ONE_STEP, cell, init)[1][0]).norm()) > 1e-3


def test_on_a_scalar_by_hand_and_to_the_count():
    """f = r z + u x: dz/du = x / (1 - r) exactly, dz/dx = u instead of u / (1 - r)."""
    r = f64([[0.5], [0.9]])
    for adjoint, more, wanted in ((EXACT, 0, 1 / (1 - r)), (ONE_STEP, 1, torch.ones_like(r))):
        x, u = f64([[1.0], [2.0]]).requires_grad_(), f64(3.0).requires_grad_()
        watched = Watched(lambda z, t, x=x, u=u: r * z + u * x)
        z, solution, log = adjoint(FixedPoint(watched), torch.zeros(2, 1).double(), root(), [x])
        z.sum().backward()
        close(u.grad, (x.detach() / (1 - r)).sum(), 1e-10)
        close(x.grad, 3 * wanted, 1e-10)
        assert log.vjps == watched.vjps == 2 + int(log.iterations.max()) + more
        assert watched.calls == solution.stats.calls + 1


def test_an_x_that_needs_no_gradient_or_that_f_does_not_use_costs_nothing():
    cell = TanhCell()
    layer = ImplicitLayer(cell, Zero(network(cell)), Anderson(), TIGHT, ONE_STEP)
    out = layer(X)
    out.z.sum().backward()
    assert out.backward.vjps == 2 + int(out.backward.iterations.max())
    x, c = X.clone().requires_grad_(), X.clone().requires_grad_()
    z, _, _ = ONE_STEP(FixedPoint(lambda z, t: 0.5 * z + c), torch.zeros(3, 4).double(), root(), [x])
    (z + 0 * x).sum().backward()
    close(c.grad, torch.full_like(c, 2.0), 1e-12)
    assert float(x.grad.abs().max()) == 0


def test_a_loose_solve_without_iterations_is_jfb_for_everything():
    cell = TanhCell()
    own, stem, _ = gradients(IFT(rtol=1.0, x_gradient="one_step"), cell)
    jfb = gradients(JFB(), cell)
    for a, b in zip([*own, *stem], [*jfb[0], *jfb[1]]):
        assert torch.equal(a, b)


def test_two_backwards_through_a_kept_graph_give_the_same_gradient():
    cell, x = TanhCell(), X.clone().requires_grad_()
    layer = ImplicitLayer(cell, Zero(network(cell)), Picard(), Residual(1e-8, max_steps=200), ONE_STEP)
    loss = (layer(x).z * G).sum()
    first = torch.autograd.grad(loss, [cell.U, x], retain_graph=True)
    again = torch.autograd.grad(loss, [cell.U, x])
    assert all(torch.equal(a, b) for a, b in zip(first, again))
