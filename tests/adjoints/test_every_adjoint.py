"""What holds for all of them: the value, who gets a gradient, what is fixed within a solve, whose NaN is whose."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import TanhCell, close, contraction, counted, f64, network, random, root
from torch import nn

from implicit_bench.adjoints import IFT, JFB, Backsolve, Phantom, Unroll
from implicit_bench.core import EndTime, FixedPoint, FixedSteps, Residual
from implicit_bench.models import DenseCell, ImplicitLayer, SkipNet, Zero
from implicit_bench.solvers import Picard, Tsit5

X, G = random(3, 4, seed=7), random(3, 4, seed=8)

EXACT = {
    "gmres": IFT(1e-12, max_iter=60),
    "anderson": IFT(1e-12, max_iter=60, linear="anderson"),
    "picard": IFT(1e-12, max_iter=300, linear="picard"),
    "unroll": Unroll(),
    "checkpoint": Unroll(checkpoint=True),
}
BIASED = {
    "one_step": IFT(1e-12, x_gradient="one_step"),
    "jfb": JFB(),
    "phantom": Phantom(),
    "neumann": Phantom(mode="neumann"),
}
BACK = {"backsolve": Backsolve(), "seminorm": Backsolve(seminorm=True)}
ROOT, ALL = EXACT | BIASED, EXACT | BIASED | BACK


def each(adjoints):
    return pytest.mark.parametrize("name", list(adjoints))


def layer_of(name, cell, solver=None, stop=None):
    if name in BACK:
        solver, stop = Tsit5(), EndTime()
    return ImplicitLayer(cell, Zero(network(cell)), solver or Picard(), stop or FixedSteps(400), ALL[name])


# ------------------------------------------------------------------------------------------- exact and approximate


def affine(matrix, name):
    """Gradients of <g, z> at z = A z + B c + d, and what they are by dense algebra."""
    A, B = ((contraction(4, 0.9), random(4, 4, seed=2)) if matrix else (f64([[0.9]]), f64([[2.0]])))  # fmt: skip
    n = len(A)
    A, B, c, d = (v.clone().requires_grad_() for v in (A, B, random(3, n, seed=3), random(n, seed=4)))
    F = FixedPoint(lambda z, t: z @ A.T + c @ B.T + d)
    g, steps = random(3, n, seed=8), FixedSteps(400)
    z, _, _ = ALL[name](F, torch.zeros(3, n).double(), root(Picard(), steps), [c])
    got = torch.autograd.grad((z * g).sum(), [A, B, c, d])
    eye = torch.eye(n).double()
    z = torch.linalg.solve(eye - A, (c @ B.T + d).T).T.detach()
    lam = torch.linalg.solve((eye - A).T, g.T).T.detach()
    return got, [lam.T @ z, lam.T @ c.detach(), lam @ B.detach(), lam.sum(0)]


@each(EXACT)
@pytest.mark.parametrize("matrix", [False, True], ids=["scalar", "matrix"])
def test_the_exact_ones_are_the_analytic_gradient(name, matrix):
    for got, wanted in zip(*affine(matrix, name)):
        close(got, wanted, 1e-8)


@each(BIASED)
@pytest.mark.parametrize("matrix", [False, True], ids=["scalar", "matrix"])
def test_the_approximate_ones_are_not(name, matrix):
    pairs = list(zip(*affine(matrix, name)))
    to_c = pairs.pop(2)
    assert float((to_c[0] - to_c[1]).norm() / to_c[1].norm()) > 0.1
    for got, wanted in pairs:
        error = float((got - wanted).norm() / wanted.norm())
        assert error < 1e-8 if name == "one_step" else 0.03 < error < 1


def gradients(name, cell):
    x = X.clone().requires_grad_()
    return torch.autograd.grad((layer_of(name, cell)(x).z * G).sum(), [*cell.parameters(), x])


@each(EXACT)
def test_the_exact_ones_agree_on_a_nonlinear_map(name):
    cell = TanhCell()
    for a, b in zip(gradients(name, cell), gradients("unroll", cell)):
        close(a, b, 1e-8)


@each(EXACT)
def test_gradcheck(name):
    def z_of(W, ctx):
        F = FixedPoint(lambda z, t: torch.tanh(z @ W + ctx))
        return ALL[name](F, torch.zeros(2, 3).double(), root(Picard(), FixedSteps(60)), ())[0]

    inputs = [contraction(3, 0.5).requires_grad_(), random(2, 3, seed=5).requires_grad_()]
    assert torch.autograd.gradcheck(z_of, inputs, eps=1e-6, atol=1e-7)


# -------------------------------------------------------------------------------------------- values and who learns


@each(ROOT)
@pytest.mark.parametrize("stop", [FixedSteps(3), Residual(1e-2)], ids=["far", "near"])
def test_no_adjoint_touches_the_value(name, stop):
    """It is f(z) of the solve's last z, bit for bit where f is applied again; 1e-15 off where z + F(z) is."""
    cell = TanhCell()
    out = layer_of(name, cell, stop=stop)(X)
    again = cell(out.solution.value, cell.begin(X), None)
    close(out.z.detach(), again.detach(), 1e-15 if "unroll" in name or name == "checkpoint" else 0)
    assert not out.solution.value.requires_grad
    assert not out.solution.field.requires_grad


@each(ROOT)
def test_the_start_is_detached_even_where_it_is_the_solution(name):
    """One application of the cell: the solve moves nothing."""
    cell = TanhCell()
    layer = ImplicitLayer(cell, SkipNet(network(cell)), Picard(), FixedSteps(1), ALL[name])
    out = layer(X)
    assert torch.equal(out.solution.value, out.start)
    assert not out.solution.value.requires_grad
    out.z.sum().backward()
    assert cell.W.grad is not None
    assert all(p.grad is None for p in layer.init.parameters())


@each(ALL)
def test_whose_gradient_the_output_carries(name):
    cell, x = TanhCell(), X.clone().requires_grad_()
    layer = layer_of(name, cell)
    assert layer(X).z.requires_grad
    with torch.no_grad():
        assert not layer(x).z.requires_grad
    cell.requires_grad_(False)
    out = layer(x)
    assert out.z.requires_grad
    (got,) = torch.autograd.grad((out.z * G).sum(), x)
    assert float(got.norm()) > 0


@each(ALL)
def test_a_frozen_layer_below_a_head_costs_no_more_than_an_evaluation(name):
    cell = TanhCell().requires_grad_(False)
    layer, head = layer_of(name, cell), nn.Linear(4, 2).double()
    calls = counted(cell)
    out = layer(X)
    head(out.z).sum().backward()
    assert not out.z.requires_grad
    assert len(calls) == out.calls(0) == out.solution.stats.calls
    assert out.backward.vjps == 0
    with torch.no_grad():
        assert torch.equal(layer(X).z, out.z)


@each(ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trains_from_step_0(name, dtype):
    """The paper's cell as it is initialised: every parameter has a gradient, and gradient steps lower the loss."""
    torch.manual_seed(0)
    cell = DenseCell(16).to(dtype)
    stem, head = nn.Linear(6, 16).to(dtype), nn.Linear(16, 1).to(dtype)
    layer = layer_of(name, cell, stop=FixedSteps(30))
    x, y = random(32, 6, seed=1).to(dtype), random(32, 1, seed=2).to(dtype)
    parameters = [*stem.parameters(), *cell.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-2)
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        loss = (head(layer(stem(x)).z) - y).square().mean()
        loss.backward()
        if step == 0:
            assert all(p.grad.dtype == dtype and bool(p.grad.isfinite().all()) for p in parameters)
            assert all(float(p.grad.norm()) > 1e-4 for p in parameters)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


# ----------------------------------------------------------------------------------------- fixed within one solve


class Noisy(nn.Module):
    """A dropout mask and a normed weight, made in `begin`: the same in every call of one solve, and its gradient."""

    batch_independent, size = True, 4

    def __init__(self):
        super().__init__()
        self.V = nn.Parameter(contraction(4, 1.0, 1))
        self.gain = nn.Parameter(f64(0.6))
        self.begun = 0

    def begin(self, x):
        self.begun += 1
        mask = (torch.rand(x.shape) > 0.3).to(x.dtype) / 0.7
        return mask, self.gain * self.V / torch.linalg.matrix_norm(self.V), x

    def forward(self, z, ctx, t):
        mask, W, x = ctx
        return torch.tanh(mask * (z @ W) + x)


@each(ALL)
def test_masks_and_normed_weights_are_made_once_a_solve(name):
    cell, x = Noisy(), X.clone().requires_grad_()
    layer = layer_of(name, cell)
    calls = counted(cell)
    layer(x)
    assert cell.begun == 1
    calls.clear()
    torch.manual_seed(1)
    out = layer(x)
    (out.z * G).sum().backward()
    assert cell.begun == 2
    assert len(calls) == out.calls(0) + out.backward.calls > 3
    torch.manual_seed(1)
    ctx = cell.begin(x)
    close(out.z.detach(), cell(out.solution.value, ctx, None).detach(), 1e-15)


@each(EXACT)
def test_their_gradient_is_exact_with_the_mask_held_fixed(name):
    cell = Noisy()
    layer = layer_of(name, cell)

    def loss():
        torch.manual_seed(1)
        return (layer(X).z * G).sum()

    (grad,) = torch.autograd.grad(loss(), cell.gain)
    with torch.no_grad():
        cell.gain += 1e-6
        up = loss()
        cell.gain -= 2e-6
        close(grad, (up - loss()) / 2e-6, 1e-8)


# --------------------------------------------------------------------------------------------------- twice, and NaN


ONCE = ["gmres", "anderson", "picard", "one_step", "neumann", "backsolve", "seminorm"]


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("loss", [torch.sum, lambda z: z.square().sum()], ids=["linear", "square"])
def test_what_cannot_be_differentiated_twice_says_so(name, loss):
    """Also where the cotangent is a constant, and whichever way the second derivative is asked for."""
    cell, x = TanhCell(), X.clone().requires_grad_()
    layer = layer_of(name, cell)
    known = {"neumann": "phantom", "backsolve": "backsolve", "seminorm": "backsolve"}.get(name, "ift")
    sentence = f"adjoint={known} gives first derivatives only; to differentiate twice, use adjoint=unroll"
    for wrt in (cell.W, x):
        (g,) = torch.autograd.grad(loss(layer(x).z), wrt, create_graph=True)
        with pytest.raises(RuntimeError, match=sentence):
            g.square().sum().backward()
        (g,) = torch.autograd.grad(loss(layer(x).z), wrt, create_graph=True)
        with pytest.raises(RuntimeError, match=sentence):
            torch.autograd.grad(g.square().sum(), wrt)


@pytest.mark.parametrize("name", ONCE)
def test_a_graph_of_the_gradient_that_nobody_uses_is_no_error(name):
    cell = TanhCell()
    layer = layer_of(name, cell)
    plain = torch.autograd.grad(layer(X).z.sum(), list(cell.parameters()))
    graph = torch.autograd.grad(layer(X).z.sum(), list(cell.parameters()), create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, graph))


@pytest.mark.parametrize("name", ["gmres", "one_step", "backsolve"])
def test_a_parameter_changed_in_place_before_the_backward_is_noticed(name):
    cell, x = TanhCell(), X.clone().requires_grad_()
    layer = layer_of(name, cell)
    layer.field = "ode" if name == "backsolve" else "equilibrium"  # whose graph no application of f is part of
    z = layer(x).z
    with torch.no_grad():
        cell.W.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
@each(ROOT)
def test_a_row_of_nan_disturbs_no_neighbour(name, data):
    """Per sample: the other rows' values, gradients and log are the same bits, whether x or the cotangent has NaN."""
    rows, size = data.draw(st.integers(2, 5), "rows"), data.draw(st.integers(1, 6), "size")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]), "dtype")
    bad = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows - 1, unique=True), "bad rows")
    where = data.draw(st.sampled_from(["x", "cotangent", "both"]), "where")
    stop = data.draw(st.sampled_from([FixedSteps(1), FixedSteps(4), Residual(1e-3, max_steps=40)]), "stop")
    cell = TanhCell(size, 0.7).to(dtype)
    layer = layer_of(name, cell, stop=stop)
    good = [i for i in range(rows) if i not in bad]

    def run(dirty):
        x, g = random(rows, size, seed=7).to(dtype), random(rows, size, seed=8).to(dtype)
        if dirty and where != "cotangent":
            x[bad, data.draw(st.integers(0, size - 1), "column")] = torch.nan
        if dirty and where != "x":
            g[bad] = torch.nan
        out = layer(x.requires_grad_())
        (grad,) = torch.autograd.grad(out.z, x, g)
        log = out.backward
        kept = [] if log.status is None else [log.status, log.iterations, log.residual, log.rhs_norm]
        return [v.detach()[good] for v in (out.z, grad, out.solution.status, *kept)]

    for a, b in zip(run(True), run(False)):
        assert torch.equal(a, b)
        assert a.dtype in (dtype, torch.int64)


def test_a_parameter_frozen_or_freed_between_two_steps():
    """Backsolve integrates the gradient of the parameters that need one now."""
    cell = TanhCell()
    layer = layer_of("backsolve", cell)
    for names in (["W", "U", "b"], ["U"], ["W", "b"], ["W", "U", "b"]):
        for name, p in cell.named_parameters():
            p.grad = None
            p.requires_grad_(name in names)
        layer(X).z.sum().backward()
        assert [name for name, p in cell.named_parameters() if p.grad is not None] == names
