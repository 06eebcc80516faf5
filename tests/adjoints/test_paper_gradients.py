"""What the papers' code did to a neural ODE's gradient: frozen cotangents, restarts, one step to x, one more f."""

import pytest
import torch
from numpy.polynomial.legendre import leggauss
from problems import BATCH, TanhCell, close, cosine, f64, network, random, to_end
from torch import nn

from implicit_bench.adjoints import Backsolve, Unroll
from implicit_bench.core import EndTime, solve
from implicit_bench.models import ImplicitLayer, StemZeros, Zero
from implicit_bench.solvers import RK4, TorchDiffeq, Tsit5, Vcab3

X, G = random(3, 4, seed=7), random(3, 4, seed=8)
TIGHT = {"tsit5": Tsit5(1e-10, 1e-10), "torchdiffeq": TorchDiffeq("dopri5", 1e-10, 1e-10)}


def layer_of(adjoint, solver, field="ode", init=Zero, t1=1.0):
    cell = TanhCell()
    return ImplicitLayer(cell, init(network(cell)), solver, EndTime(t1, per_sample=False), adjoint, field)


class TwoContexts(TanhCell):
    """Its context: of x alone, and of parameters alone."""

    def begin(self, x):
        return x, self.U * 1, self.b * 1

    def forward(self, z, ctx, t):
        x, U, b = ctx
        return torch.tanh(z @ self.W + x @ U + b)


def gradients(*settings, **more):
    x = X.clone().requires_grad_()
    layer = layer_of(*settings, **more)
    out = layer(x)
    return torch.autograd.grad((out.z * G).sum(), [*layer.cell.parameters(), x])


# ------------------------------------------------------------------------------------------------------------- frozen


@pytest.mark.parametrize("solver", TIGHT)
def test_a_frozen_adjoint_is_the_integral_of_the_last_cotangent(solver):
    """dL/dtheta = int (dL/dz1)^T dF/dtheta dt along z(t), by quadrature; and dL/dz0 is dL/dz1."""
    W, z0 = random(4, 4, scale=0.5).requires_grad_(), random(3, 4, seed=2).requires_grad_()

    def F(z, t):
        return torch.tanh(z @ W)

    adjoint = Backsolve(frozen=True)
    adjoint.through_start = True
    z, _, _ = adjoint(F, z0, to_end(TIGHT[solver], reduce=BATCH), (W,))
    got, start = torch.autograd.grad((z * G).sum(), (W, z0))
    close(start, G, 1e-12)
    n, total, at, before = 8, torch.zeros_like(W), z0.detach(), 0.0
    nodes, weights = (torch.from_numpy(a) for a in leggauss(8))
    for k in range(n):
        for node, weight in zip((nodes + 1) / 2, weights / 2):
            t = (k + float(node)) / n
            at, before = solve(F, at, solver=RK4(0.01), stop=EndTime(t - before)).value.detach(), t
            total += torch.autograd.grad((F(at, None) * G).sum(), W)[0] * float(weight) / n
    close(got, total, 1e-7)
    exact, _, _ = Unroll()(F, z0, to_end(Tsit5(1e-10, 1e-10), reduce=BATCH), ())
    assert cosine([got], torch.autograd.grad((exact * G).sum(), W)) < 0.999  # a bias, at any tolerance
    assert not adjoint.exact
    assert Backsolve().exact


# ----------------------------------------------------------------------------------------------------------- restarts


def test_restarts_change_the_cost_and_not_the_gradient():
    for a, b in zip(*(gradients(Backsolve(restarts=r), Tsit5(1e-9, 1e-9)) for r in (False, True))):
        close(a, b, 1e-6)


def test_a_restart_at_each_accepted_time_costs_four_evaluations():
    """An Adams method begins with one step of Bosh3, three evaluations beside the first: the papers' price."""
    for layer in (layer_of(Backsolve(restarts=r), Vcab3(1e-4, 1e-4)) for r in (False, True)):
        out = layer(X.clone().requires_grad_())
        (out.z * G).sum().backward()
        accepted = int(out.solution.stats.steps[0])  # none was rejected here: the field is smooth
        if layer.adjoint.restarts:
            assert out.backward.vjps == out.backward.calls == 4 * accepted
            assert out.backward.iterations.tolist() == [accepted] * 3
        else:
            assert out.backward.vjps < 2.5 * accepted


def test_restarts_cost_the_same_where_a_penalty_watches_the_forward():
    counts = []
    for keeps in (False, True):
        layer = layer_of(Backsolve(restarts=True), Vcab3(1e-4, 1e-4))
        layer.keep_iterates = keeps
        out = layer(X.clone().requires_grad_())
        (out.z * G).sum().backward()
        assert len(out.iterates) == keeps * (1 + int(out.solution.stats.steps[0]))
        counts.append(out.backward.vjps)
    assert counts[0] == counts[1]


def test_restarts_take_the_time_into_account():
    """A field that depends on time, integrated back in pieces."""
    w = f64(0.8).requires_grad_()

    def F(z, t):
        return w * z * torch.cos(3 * t)[:, None]

    z, _, _ = Backsolve(restarts=True)(F, f64([[1.0], [2.0]]), to_end(Tsit5(1e-10, 1e-10), 2.0, BATCH), (w,))
    (got,) = torch.autograd.grad(z.sum(), w)
    s = torch.sin(f64(6.0)) / 3
    close(got, 3 * s * torch.exp(w.detach() * s), 1e-8)


def test_restarts_need_one_clock_and_our_own_loop():
    cell = TanhCell()
    with pytest.raises(ValueError, match=r"^adjoint.restarts=true needs one step size for the batch; use stop.per_s"):
        ImplicitLayer(cell, Zero(network(cell)), Tsit5(), EndTime(), Backsolve(restarts=True), "ode")
    with pytest.raises(ValueError, match=r"^adjoint.restarts=true is for our own solvers, but solver=torchdiffeq/dop"):
        layer_of(Backsolve(restarts=True), TorchDiffeq())


# ------------------------------------------------------------------------------------- one more f, and one step to x


@pytest.mark.parametrize("solver", TIGHT)
@pytest.mark.parametrize("adjoint", [Backsolve, Unroll])
def test_ode_then_f_puts_out_one_more_f(solver, adjoint):
    plain, more = (layer_of(adjoint(), TIGHT[solver], field) for field in ("ode", "ode_then_f"))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            a, b = plain(X), more(X)
        close(b.z, more.cell(a.z, more.cell.begin(X), None), 1e-14)
        assert b.calls(0) == a.calls(0) + 1
        assert torch.equal(a.solution.value, b.solution.value)
    x = X.clone().requires_grad_()
    last = plain.cell(plain(x).z, plain.cell.begin(x), None)
    wanted = torch.autograd.grad((last * G).sum(), [x, *plain.parameters()])
    got = torch.autograd.grad((more(x).z * G).sum(), [x, *more.parameters()])
    for a, b in zip(wanted, got):
        close(a, b, 1e-12)


@pytest.mark.parametrize("solver", TIGHT)
def test_one_step_to_x_is_the_last_f_alone(solver):
    """The solve gets x as a constant; its parameters are taught all the same."""
    biased = gradients(Backsolve(x_gradient="one_step"), TIGHT[solver], "ode_then_f")
    exact = gradients(Backsolve(), TIGHT[solver], "ode_then_f")
    cell = TanhCell()
    z = layer_of(Backsolve(), TIGHT[solver])(X).z.detach()
    x = X.clone().requires_grad_()
    (wanted,) = torch.autograd.grad((cell(z, cell.begin(x), None) * G).sum(), x)
    close(biased[-1], wanted, 1e-8)
    assert cosine(biased[-1:], exact[-1:]) < 0.999
    close(biased[0], exact[0], 1e-8)  # W, which f itself uses
    assert not Backsolve(x_gradient="one_step").exact
    with pytest.raises(ValueError, match=r"^adjoint.x_gradient='none' must be exact or one_step"):
        Backsolve(x_gradient="none")
    with pytest.raises(ValueError, match=r"^adjoint.x_gradient=one_step leaves the stem the last f alone, which field"):
        layer_of(Backsolve(x_gradient="one_step"), TIGHT[solver])


def test_one_step_to_an_x_whose_stem_is_frozen_later():
    """What of the context is a constant of the solve is asked again."""
    grads = []
    for first in (True, False):
        cell = TwoContexts()
        layer = ImplicitLayer(cell, Zero(network(cell)), TIGHT["tsit5"], EndTime(per_sample=False),
                              Backsolve(x_gradient="one_step"), "ode_then_f")  # fmt: skip
        if first:
            layer(X.clone().requires_grad_()).z.sum().backward()
            cell.zero_grad()
        grads.append(torch.autograd.grad((layer(X).z * G).sum(), list(cell.parameters())))
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_an_image_start_is_taught_whatever_the_context_is():
    """x in both places: as z0 and as the condition."""
    cell = TanhCell()
    stem = nn.Linear(4, 4).double()
    grads = []
    for adjoint in (Unroll(), Backsolve()):
        layer = ImplicitLayer(cell, StemZeros(network(cell)), Tsit5(1e-10, 1e-10), EndTime(), adjoint, "ode")
        grads.append(torch.autograd.grad((layer(stem(X)).z * G).sum(), [*stem.parameters(), *cell.parameters()]))
        assert layer.adjoint is not adjoint  # whose own setting stays as it was
        assert not adjoint.through_start
    for a, b in zip(*grads):
        close(a, b, 1e-7)
