"""The linear solves of ift by means other than GMRES, which has a file of its own: where they stop, what they log."""

import pytest
import torch
from problems import (
    BATCH,
    PER_SAMPLE,
    CentredCell,
    TanhCell,
    Watched,
    close,
    contraction,
    f64,
    network,
    random,
    root,
    tanh_map,
)

from implicit_bench.adjoints import IFT, JFB, Unroll
from implicit_bench.core import FixedPoint, FixedSteps, Status
from implicit_bench.models import ImplicitLayer, Zero
from implicit_bench.solvers import Picard

X, G = random(3, 4, seed=7), random(3, 4, seed=8)
ZERO = torch.zeros(3, 4).double()
LINEAR = pytest.mark.parametrize("linear", ["gmres", "anderson", "picard"])
BY_STEPS = pytest.mark.parametrize("linear", ["anderson", "picard"])
REDUCE = pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["per_sample", "batch"])


def solved(adjoint, W, reduce=PER_SAMPLE, g=G):
    """The gradient to the context, log and watched map of z = tanh(z W + X)."""
    ctx = X.clone().requires_grad_()
    watched = Watched(tanh_map(W, ctx).f)
    z, solution, log = adjoint(FixedPoint(watched), ZERO, root(reduce=reduce), ())
    before = watched.vjps
    (grad,) = torch.autograd.grad((z * g).sum(), ctx)
    assert watched.vjps - before == log.vjps
    assert watched.calls == solution.stats.calls + 1
    return grad, log, solution.value


def system(W, z, g=G):
    """By dense algebra: J^T v, and lambda = (I - J^T)^-1 J^T g, of each row."""
    slope = 1 - torch.tanh(z @ W + X).square()
    J = [(W * s).T for s in slope]  # df_i/dz_j
    rhs = torch.stack([j.T @ v for j, v in zip(J, g)])
    lam = torch.stack([torch.linalg.solve(torch.eye(4).double() - j.T, b) for j, b in zip(J, rhs)])
    return slope, J, rhs, lam


@LINEAR
@REDUCE
def test_lambda_is_that_of_dense_algebra(linear, reduce):
    W = contraction(4, 0.8)
    grad, log, z = solved(IFT(1e-13, max_iter=300, linear=linear), W, reduce)
    slope, _, rhs, lam = system(W, z)
    close(grad, (G + lam) * slope, 1e-11)
    norms = rhs.norm(dim=1) if reduce is PER_SAMPLE else rhs.norm().expand(3)
    close(log.rhs_norm, norms, 1e-12)
    assert log.status.tolist() == [Status.CONVERGED] * 3
    assert log.converged.tolist() == [True] * 3


@BY_STEPS
@REDUCE
@pytest.mark.parametrize(("rtol", "atol"), [(1e-1, 0.0), (1e-4, 0.0), (0.0, 1e-2), (1e-2, 1e-2), (1e-1, 0.5)])
def test_stops_at_the_first_lambda_within_atol_plus_rtol_of_the_right_hand_side(linear, reduce, rtol, atol):
    W = contraction(4, 0.8)
    grad, log, z = solved(IFT(rtol, atol, 300, linear), W, reduce)
    slope, J, rhs, _ = system(W, z)

    def residuals(grad):
        lam = grad / slope - G
        r = rhs + torch.stack([j.T @ v for j, v in zip(J, lam)]) - lam
        return r.norm(dim=1) if reduce is PER_SAMPLE else r.norm().expand(3)

    norms = log.rhs_norm
    assert bool((residuals(grad) <= atol + rtol * norms).all())
    close(log.residual, residuals(grad) / norms, 1e-12)
    assert log.vjps == 2 + int(log.iterations.max())
    for row, n in enumerate(log.iterations.tolist()):
        if n:
            before = residuals(solved(IFT(1e-30, 0.0, n - 1, linear), W, reduce)[0])
            assert float(before[row]) > atol + rtol * float(norms[row])


def test_picards_lambda_is_the_neumann_series():
    W = contraction(4, 0.8)
    for k in range(4):
        grad, log, z = solved(IFT(1e-30, max_iter=k, linear="picard"), W)
        slope, J, _, _ = system(W, z)
        term = total = G
        for _ in range(k):
            term = torch.stack([j.T @ v for j, v in zip(J, term)])
            total = total + term
        close(grad, total * slope, 1e-13)
        assert log.vjps == k + 2
        assert log.iterations.tolist() == [k] * 3
        assert log.status.tolist() == [Status.MAX_STEPS] * 3


@LINEAR
@pytest.mark.parametrize(
    "none", [dict(max_iter=0), dict(rtol=0.0, atol=1e9), dict(rtol=1.0)], ids=["cap", "atol", "rtol"]
)
@pytest.mark.parametrize("cell", [TanhCell(), CentredCell()], ids=["per_sample", "batch"])
def test_no_iteration_is_exactly_jfb(none, linear, cell):
    def gradients(adjoint):
        x = X.clone().requires_grad_()
        layer = ImplicitLayer(cell, Zero(network(cell)), Picard(), FixedSteps(30), adjoint)
        out = layer(x)
        return torch.autograd.grad((out.z * G).sum(), [*cell.parameters(), x]), out.backward

    got, log = gradients(IFT(**none, linear=linear))
    for a, b in zip(got, gradients(JFB())[0]):
        assert torch.equal(a, b)
    assert log.vjps == 2
    assert log.iterations.tolist() == [0] * 3
    assert log.residual.tolist() == [1.0] * 3
    assert log.converged.tolist() == [none.get("max_iter") != 0] * 3


@LINEAR
def test_a_coupled_batch_is_one_system(linear):
    cell = CentredCell()

    def gradients(adjoint):
        x = X.clone().requires_grad_()
        out = ImplicitLayer(cell, Zero(network(cell)), Picard(), FixedSteps(300), adjoint)(x)
        return torch.autograd.grad((out.z * G).sum(), [*cell.parameters(), x])

    for a, b in zip(gradients(IFT(1e-13, max_iter=400, linear=linear)), gradients(Unroll())):
        close(a, b, 1e-9)


def test_anderson_is_faster_than_picard_and_gmres_than_both():
    W = contraction(4, 0.97, seed=3)
    counts = [int(solved(IFT(1e-8, max_iter=2000, linear=n), W)[1].iterations.max()) for n in ("picard", "anderson")]
    assert int(solved(IFT(1e-8, max_iter=2000), W)[1].iterations.max()) <= counts[1] < counts[0] / 2


def affine_rows(rates, linear, g):
    """dL/dc of f = r z + c, whose right-hand side is r g and lambda = r / (1 - r) g."""
    r = f64(rates).unsqueeze(1)
    c = torch.ones_like(r).requires_grad_()
    # solved by no solver: the value is given as the start, and one step moves nothing
    z0 = (1 / (1 - r)).detach()
    z, _, log = IFT(1e-10, max_iter=40, linear=linear)(
        FixedPoint(lambda z, t: r * z + c), z0, root(Picard(), FixedSteps(1)), ()
    )
    return torch.autograd.grad(z, c, f64(g).unsqueeze(1))[0].squeeze(1), log


def test_where_picard_diverges_the_best_lambda_is_returned_and_the_log_says_so():
    """|r| > 1: the residual of lambda = 0, r g, is the least."""
    got, log = affine_rows([0.5, -3.0, 0.1], "picard", [1.0, 1.0, 1.0])
    close(got, f64([2.0, 1.0, 1 / 0.9]), 1e-9)
    assert log.status.tolist() == [Status.CONVERGED, Status.MAX_STEPS, Status.CONVERGED]
    assert log.converged.tolist() == [True, False, True]
    for linear in ("gmres", "anderson"):
        got, log = affine_rows([0.5, -3.0, 0.1], linear, [1.0, 1.0, 1.0])
        close(got, f64([2.0, 0.25, 1 / 0.9]), 1e-9)
        assert bool(log.converged.all())


@LINEAR
def test_a_row_without_a_gradient_costs_nothing_and_one_of_nan_disturbs_nobody(linear):
    clean, log = affine_rows([0.5, 0.3, 0.1], linear, [1.0, 0.0, 1.0])
    assert int(log.iterations[1]) == 0
    assert float(clean[1]) == 0
    assert bool(log.converged.all())
    dirty, log = affine_rows([0.5, 0.3, 0.1], linear, [1.0, torch.nan, 1.0])
    assert torch.equal(clean[[0, 2]], dirty[[0, 2]])
    assert bool(dirty[1].isnan())
    assert log.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]


@LINEAR
def test_a_cotangent_whose_squares_underflow_needs_no_lambda(linear):
    """That of a sample already learned: 1e-21, whose square float32 cannot hold."""
    W, ctx = contraction(4, 0.9).float(), X.float().requires_grad_()
    z, _, log = IFT(1e-6, linear=linear)(tanh_map(W, ctx), ZERO.float(), root(Picard(), FixedSteps(50)), ())
    g = torch.tensor([[1.0], [1e-21], [1.0]]) * G.float()
    (grad,) = torch.autograd.grad(z, ctx, g)
    assert log.iterations.tolist()[1] == 0 < min(log.iterations.tolist()[::2])
    assert log.status.tolist() == [Status.CONVERGED] * 3
    assert 0 < float(grad[1].norm()) < 1e-20


@LINEAR
def test_a_map_that_does_not_depend_on_z_needs_no_lambda(linear):
    c = X.clone().requires_grad_()
    z, _, log = IFT(linear=linear)(FixedPoint(lambda z, t: c.tanh()), ZERO, root(), ())
    close(torch.autograd.grad(z.sum(), c)[0], 1 - c.tanh().square(), 1e-15)
    assert log.iterations.tolist() == [0] * 3
    assert bool(log.converged.all())


@LINEAR
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_map_under_autocast_keeps_its_lambda_in_the_states_dtype(linear, dtype):
    W, c = contraction(4, 0.5).float().requires_grad_(), X.float().requires_grad_()

    def f(z, t):
        with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            return torch.tanh(z @ W + c).to(dtype)

    z, _, log = IFT(1e-2, linear=linear)(FixedPoint(f), ZERO.float(), root(Picard(), FixedSteps(30)), ())
    assert z.dtype == dtype
    (z * G.float()).sum().backward()
    exact = solved(IFT(1e-10), W.detach().double())[0]
    assert c.grad.dtype == torch.float32
    assert float((c.grad.double() - exact).norm() / exact.norm()) < (2e-2 if dtype is torch.float32 else 5e-2)
    assert log.residual.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: IFT(linear="lu"), "adjoint.linear='lu' must be gmres, anderson or picard"),
        (lambda: IFT(x_gradient="none"), "adjoint.x_gradient='none' must be exact or one_step"),
    ],
)
def test_an_impossible_setting_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
