"""The gradient at a fixed point: exact with IFT, one term of it with JFB."""

import pytest
import torch
from problems import (
    BATCH,
    PER_SAMPLE,
    TIGHT,
    CentredCell,
    TanhCell,
    Watched,
    close,
    contraction,
    counted,
    f64,
    network,
    random,
    root,
    tanh_map,
)

from implicit_bench.adjoints import IFT, JFB, Unroll
from implicit_bench.core import FixedPoint, FixedSteps, Residual
from implicit_bench.models import Dense, ImplicitLayer, Zero
from implicit_bench.solvers import Anderson, Picard, Tsit5

EXACT = IFT(rtol=1e-13, max_iter=60)
X = random(3, 4, seed=7)
G = random(3, 4, seed=8)  # dL/dz


def gradients(adjoint, cell, x=X, g=G, solver=None, stop=TIGHT):
    """dL/d(parameters, x) with L = <g, z>."""
    x = x.clone().requires_grad_()
    layer = ImplicitLayer(cell, Zero(network(cell)), solver or Anderson(ridge=1e-14), stop, adjoint)
    return torch.autograd.grad((layer(x).z * g).sum(), [*cell.parameters(), x])


def analytic(cell, x=X, g=G):
    """By dense linear algebra: lambda = (I - J^T)^-1 g, then one VJP of f."""
    z = torch.zeros_like(x)
    with torch.no_grad():
        for _ in range(2000):
            z = cell(z, cell.begin(x), None)
        slope = 1 - z * z  # tanh'
        lam = torch.stack([torch.linalg.solve(torch.eye(4).double() - cell.W * s, v) for s, v in zip(slope, g)])
        a = lam * slope
        return [z.T @ a, x.T @ a, a.sum(0), a @ cell.U.T]


def test_ift_is_the_analytic_gradient_to_parameters_and_to_x():
    cell = TanhCell()
    for got, wanted in zip(gradients(EXACT, cell), analytic(cell)):
        close(got, wanted, 1e-10)


@pytest.mark.parametrize(
    "solver", [Picard(), Anderson(ridge=1e-14), Tsit5(1e-12, 1e-12)], ids=["picard", "anderson", "tsit5"]
)
def test_ift_is_an_unroll_of_many_picard_steps_whatever_the_solver(solver):
    cell = TanhCell()
    stop = Residual(1e-12, max_steps=3000)
    unrolled = gradients(Unroll(), cell, solver=Picard(), stop=FixedSteps(400))
    for got, wanted in zip(gradients(EXACT, cell, solver=solver, stop=stop), unrolled):
        close(got, wanted, 1e-8)


def test_a_coupled_batch_needs_batch_wide_inner_products_and_gets_them():
    """J is not block-diagonal where rows interact; the layer then solves one system."""
    cell = CentredCell()
    unrolled = gradients(Unroll(), cell, solver=Picard(), stop=FixedSteps(400))
    for got, wanted in zip(gradients(EXACT, cell), unrolled):
        close(got, wanted, 1e-8)


def test_the_gradient_reaches_the_stem():
    torch.manual_seed(0)
    net = Dense((1, 4, 4), 3, hidden=6).double()
    with torch.no_grad():
        net.cell.W.weight.mul_(0.8)
    images = random(5, 1, 4, 4)

    def grads(adjoint, solver, stop):
        layer = ImplicitLayer(net.cell, Zero(net), solver, stop, adjoint)
        loss = net.head(layer(net.stem(images)).z).square().sum()
        return torch.autograd.grad(loss, list(net.parameters()))

    exact, unrolled = grads(EXACT, Anderson(ridge=1e-14), TIGHT), grads(Unroll(), Picard(), FixedSteps(400))
    for got, wanted in zip(exact, unrolled):
        close(got, wanted, 1e-8)
    biased = grads(JFB(), Anderson(ridge=1e-14), TIGHT)
    stem = [n for n, _ in net.named_parameters()].index("stem.1.weight")
    assert float((biased[stem] - exact[stem]).norm() / exact[stem].norm()) > 0.05


@pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["per_sample", "batch"])
def test_gradcheck(reduce):
    def z_of(x, W, U, b):
        ctx = x @ U + b
        F = FixedPoint(lambda z, t: torch.tanh(z @ W + ctx))
        return EXACT(F, torch.zeros(2, 3).double(), root(reduce=reduce), ())[0]

    inputs = [random(2, 3), contraction(3, 0.8), random(3, 3, seed=2), random(3, seed=3)]
    assert torch.autograd.gradcheck(z_of, [v.requires_grad_() for v in inputs], eps=1e-6, atol=1e-7)


def test_the_tolerance_of_the_linear_solve_is_the_error_of_the_gradient():
    cell = TanhCell(norm=0.98, seed=1)
    exact = analytic(cell)
    errors = []
    for rtol in (1e-1, 1e-3, 1e-6):
        got = gradients(IFT(rtol=rtol), cell)
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in zip(got, exact)))
    assert errors[2] < 1e-5 < errors[1] < 1e-2 < errors[0]


def test_jfb_drops_the_inverse():
    """f(z) = r z + c: dz*/dc is 1 / (1 - r), and one application of f knows only 1."""
    r = f64([[0.5], [0.9]])
    for adjoint, wanted in ((EXACT, [[2.0], [10.0]]), (JFB(), [[1.0], [1.0]])):
        c = f64([[1.0], [1.0]]).requires_grad_()
        z, _, _ = adjoint(FixedPoint(lambda z, t, c=c: r * z + c), torch.zeros(2, 1).double(), root(), ())
        z.sum().backward()
        close(z.detach(), 1 / (1 - r), 1e-10)
        close(c.grad, f64(wanted), 1e-8)


def test_jfb_is_biased_on_a_nonlinear_problem_and_leaves_the_value_alone():
    cell = TanhCell()
    exact, biased = gradients(EXACT, cell), gradients(JFB(), cell)
    assert all(float((a - b).norm() / a.norm()) > 0.1 for a, b in zip(exact, biased))
    layers = [ImplicitLayer(cell, Zero(network(cell)), Anderson(), TIGHT, a) for a in (EXACT, JFB())]
    assert torch.equal(layers[0](X).z, layers[1](X).z)


@pytest.mark.parametrize("none", [IFT(max_iter=0), IFT(rtol=0.0, atol=1e9), IFT(rtol=1.0)], ids=["cap", "atol", "rtol"])
def test_no_iteration_is_exactly_jfb(none):
    cell = TanhCell()
    for a, b in zip(gradients(none, cell), gradients(JFB(), cell)):
        assert torch.equal(a, b)


def watched_problem(norm=0.8):
    W = contraction(4, norm).requires_grad_()
    watched = Watched(tanh_map(W, X).f)
    return W, watched, FixedPoint(watched)


@pytest.mark.parametrize("solver", [Anderson(), Picard(), Tsit5(1e-6, 1e-6)], ids=["anderson", "picard", "tsit5"])
@pytest.mark.parametrize("rtol", [1.0, 1e-1, 1e-6])
def test_the_log_counts_every_call_and_every_vjp(solver, rtol):
    W, watched, F = watched_problem()
    z, solution, log = IFT(rtol=rtol)(F, torch.zeros(3, 4).double(), root(solver, Residual(1e-3, max_steps=200)), ())
    assert log.forward_calls == 1
    assert watched.calls == solution.stats.calls + log.forward_calls
    assert (log.vjps, log.iterations) == (0, None)  # nothing before the backward has run
    (z * G).sum().backward()
    assert watched.vjps == log.vjps == 2 + int(log.iterations.max())
    assert watched.calls == solution.stats.calls + log.forward_calls  # the backward called nothing again
    assert log.calls == 0
    assert (int(log.iterations.max()) == 0) == (rtol == 1.0)
    assert bool(log.converged.all())
    assert bool((log.residual <= rtol).all())
    zs = solution.value.requires_grad_()
    rhs = torch.autograd.grad(F.f(zs, zs.new_zeros(3)), zs, G)[0]
    close(log.rhs_norm, rhs.norm(dim=1), 1e-10)  # |J^T g|
    assert W.grad is not None


def test_the_log_says_where_the_linear_solve_stopped_short():
    _, _, F = watched_problem(norm=0.99)
    z, _, log = IFT(rtol=1e-10, max_iter=2)(F, torch.zeros(3, 4).double(), root(), ())
    z.sum().backward()
    assert log.iterations.tolist() == [2] * 3
    assert log.converged.tolist() == [False] * 3
    assert bool((log.residual > 1e-10).all())
    assert log.vjps == 4


def test_jfb_costs_one_call_and_one_vjp():
    _, watched, F = watched_problem()
    z, solution, log = JFB()(F, torch.zeros(3, 4).double(), root(), ())
    z.sum().backward()
    assert (watched.vjps, log.vjps, log.forward_calls, log.calls) == (1, 1, 1, 0)
    assert watched.calls == solution.stats.calls + 1


def test_differentiating_twice_is_a_clear_error():
    cell = TanhCell()
    layer = ImplicitLayer(cell, Zero(network(cell)), Anderson(), TIGHT, EXACT)
    (g,) = torch.autograd.grad(layer(X).z.square().sum(), cell.W, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        g.sum().backward()


@pytest.mark.parametrize("adjoint", [EXACT, JFB(), Unroll()], ids=["ift", "jfb", "unroll"])
def test_without_gradients_the_value_is_the_same_and_no_call_is_repeated(adjoint):
    cell = TanhCell()
    layer = ImplicitLayer(cell, Zero(network(cell)), Anderson(), Residual(1e-3), adjoint)
    tracked = layer(X)
    calls = counted(cell)
    with torch.no_grad():
        plain = layer(X)
    assert len(calls) == plain.solution.stats.calls == plain.calls(0)
    assert plain.backward.forward_calls == 0
    assert not plain.z.requires_grad
    close(plain.z, tracked.z.detach(), 1e-14)
    close(plain.z, cell(plain.solution.value, cell.begin(X), None).detach(), 1e-14)


def test_a_second_backward_through_a_kept_graph_gives_the_same_gradient():
    cell = TanhCell()
    layer = ImplicitLayer(cell, Zero(network(cell)), Anderson(ridge=1e-14), TIGHT, EXACT)
    out = layer(X)
    loss = (out.z * G).sum()
    (first,) = torch.autograd.grad(loss, cell.W, retain_graph=True)
    (again,) = torch.autograd.grad(loss, cell.W)
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: IFT(rtol=-1.0), "adjoint.rtol=-1.0 and adjoint.atol=0.0 must not be negative, nor both zero"),
        (lambda: IFT(rtol=0.0), "adjoint.rtol=0.0 and adjoint.atol=0.0 must not be negative, nor both zero"),
        (lambda: IFT(max_iter=-1), "adjoint.max_iter=-1 must not be negative"),
    ],
)
def test_an_impossible_setting_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
