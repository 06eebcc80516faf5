"""The continuous adjoint against analytic gradients, an unroll and torchdiffeq's own."""

import gc
import weakref
from typing import NamedTuple

import pytest
import torch
from problems import BATCH, PER_SAMPLE, TanhCell, Watched, close, cosine, counted, f64, network, random, to_end
from torch import nn
from torchdiffeq import odeint_adjoint

from implicit_bench.adjoints import Backsolve, Solve, Unroll
from implicit_bench.core import EndTime, FixedPoint, Status
from implicit_bench.models import ImplicitLayer, SkipNet, Zero
from implicit_bench.solvers import RK4, Bosh3, Dopri5, Euler, TorchDiffeq, Tsit5, Vcab3

X, G = random(3, 4, seed=7), random(3, 4, seed=8)


class TimedCell(TanhCell):
    """The field depends on time, so that a backward solve which forgets to turn it round is found out."""

    def forward(self, z, ctx, t):
        return super().forward(z, ctx, t) * (1 + torch.sin(3 * t))[:, None] - 0.3 * z


def layer_of(cell, adjoint, solver, field="ode", t1=1.0, init=Zero):
    return ImplicitLayer(cell, init(network(cell)), solver, EndTime(t1), adjoint, field)


def gradients(cell, adjoint, solver, **settings):
    """dL/d(W, U, b, x): W is the field's own, U and b act in `begin` alone and reach z through the context."""
    x = X.clone().requires_grad_()
    out = layer_of(cell, adjoint, solver, **settings)(x)
    return torch.autograd.grad((out.z * G).sum(), [*cell.parameters(), x])


@pytest.mark.parametrize("solver", [Tsit5(1e-10, 1e-10), TorchDiffeq(rtol=1e-10, atol=1e-10)], ids=["tsit5", "dopri5"])
def test_the_analytic_gradient_of_a_linear_field_in_time(solver):
    """z' = w z cos t + u: dz(t1)/dw and dz(t1)/du by finite differences of the closed form's quadrature."""
    w, u = f64(0.8).requires_grad_(), f64([[0.5], [-1.0]]).requires_grad_()
    z0 = f64([[1.0], [3.0]])

    def F(z, t):
        return w * z * torch.cos(t)[:, None] + u

    z, solution, log = Backsolve()(F, z0, to_end(solver, 2.0), (w, u))
    z.sum().backward()

    s = torch.linspace(0, 2, 20_001).double()

    def exact(w, u):
        growth = torch.exp(w * (torch.sin(f64(2.0)) - torch.sin(s)))  # from time s to 2
        return z0 * growth[0] + u * torch.trapezoid(growth, s)

    close(z.detach(), exact(w.detach(), u.detach()), 1e-7)
    a, b = w.detach().clone().requires_grad_(), u.detach().clone().requires_grad_()
    exact(a, b).sum().backward()
    close(w.grad, a.grad, 1e-6)
    close(u.grad, b.grad, 1e-6)
    close(solution.value, z.detach(), 0)
    assert log.vjps == log.calls > 0


@pytest.mark.parametrize(
    ("tol", "agreement", "error"), [(1e-3, 0.999, 0.05), (1e-6, 0.9999999, 1e-3), (1e-10, 0.99999999999, 1e-7)]
)
def test_agrees_with_the_unroll_ever_better(tol, agreement, error):
    for cell, t1 in ((TanhCell(), 1.0), (TimedCell(), 2.0)):
        exact = gradients(cell, Unroll(), Tsit5(1e-12, 1e-12), t1=t1)
        for solver in (Tsit5(tol, tol), TorchDiffeq(rtol=tol, atol=tol)):
            got = gradients(cell, Backsolve(), solver, t1=t1)
            assert cosine(got, exact) > agreement
            for a, b in zip(got, exact):
                assert float((a - b).norm() / b.norm()) < error


def test_torchdiffeqs_solvers_get_torchdiffeqs_adjoint_to_the_bit():
    cell = TimedCell()
    x = X.clone().requires_grad_()
    ctx = cell.begin(x)
    settings = dict(method="dopri5", rtol=1e-3, atol=1e-3, adjoint_params=(cell.W, ctx))
    zero = torch.zeros(3, 4).double()
    stock = odeint_adjoint(lambda t, z: cell(z, ctx, t.expand(3)), zero, f64([0.0, 1.0]), **settings)[-1]
    wanted = torch.autograd.grad((stock * G).sum(), [*cell.parameters(), x])
    for a, b in zip(gradients(cell, Backsolve(), TorchDiffeq("dopri5")), wanted):
        assert torch.equal(a, b)


def test_our_own_is_near_torchdiffeqs_adjoint_at_a_training_tolerance():
    cell = TimedCell()
    assert cosine(gradients(cell, Backsolve(), Tsit5()), gradients(cell, Backsolve(), TorchDiffeq())) > 0.999


@pytest.mark.parametrize("equilibrium", [False, True])
@pytest.mark.parametrize("solver", [Tsit5(), TorchDiffeq()], ids=["tsit5", "dopri5"])
def test_the_log_counts_the_backward_solve(solver, equilibrium):
    w = f64([[0.8]]).requires_grad_()
    watched = Watched(lambda z, t: z @ w)
    F = FixedPoint(watched) if equilibrium else watched
    z, solution, log = Backsolve()(F, f64([[1.0]]), to_end(solver), (w,))
    output = int(equilibrium)  # f(z) of the last z
    assert watched.calls == solution.stats.calls + output
    assert (log.forward_calls, log.calls, log.vjps) == (output, 0, 0)
    z.sum().backward()
    assert log.calls == watched.calls - solution.stats.calls - output > 6
    assert log.vjps == watched.vjps == log.calls + output


def test_the_cap_on_the_backward_solve_is_seen_in_the_log():
    cell = TanhCell()
    for cap, converged in ((1, False), (1000, True)):
        out = layer_of(cell, Backsolve(max_steps=cap), Tsit5(1e-6, 1e-6))(X)
        out.z.sum().backward()
        assert out.backward.converged.tolist() == [converged] * 3
        assert out.backward.status.tolist() == [Status.REACHED_END if converged else Status.MAX_STEPS] * 3
        steps = out.backward.iterations.tolist()
        assert steps == [1] * 3 if cap == 1 else steps[0] > 1
        assert (out.backward.residual, out.backward.rhs_norm) == (None, None)


@pytest.mark.parametrize("solver", [Tsit5(1e-9, 1e-9), TorchDiffeq(rtol=1e-9, atol=1e-9)], ids=["tsit5", "dopri5"])
def test_an_equilibrium_layer_puts_out_f_of_its_last_z_in_training_and_evaluation(solver):
    """dz/dt = f - z to a finite time; trained and evaluated networks are the same function."""
    cell = TanhCell()
    layer = layer_of(cell, Backsolve(), solver, field="equilibrium", t1=2.0)
    calls = counted(cell)
    out = layer(X)
    assert len(calls) == out.calls(0)
    assert out.backward.forward_calls == 2  # f of the last z; and which parameters the cell uses was asked once
    assert layer(X).backward.forward_calls == 1
    with torch.no_grad():
        plain = layer(X)
    assert plain.backward.forward_calls == 0
    close(plain.z, out.z.detach(), 1e-13)
    close(out.z.detach(), cell(out.solution.value, cell.begin(X), None).detach(), 1e-14)
    got = gradients(cell, Backsolve(), solver, field="equilibrium", t1=2.0)
    for a, b in zip(got, gradients(cell, Unroll(), Tsit5(1e-12, 1e-12), field="equilibrium", t1=2.0)):
        close(a, b, 1e-6)


class Context(NamedTuple):
    u: torch.Tensor
    more: dict


class Strange(nn.Module):
    """Contexts of all kinds: everything from `begin`, one tensor twice, one made from another, a named tuple."""

    batch_independent, size = True, 4

    def __init__(self, kind):
        super().__init__()
        self.kind, self.U = kind, nn.Parameter(random(4, 4, seed=1, scale=0.5))

    def begin(self, x):
        u = x @ self.U
        return {"plain": u, "twice": (u, u), "nested": [u, u.tanh()], "named": Context(u, {"n": 3, "v": u * 2}),
                "parameter": (u, self.U)}[self.kind]  # fmt: skip

    def forward(self, z, ctx, t):
        if self.kind == "plain":
            return torch.tanh(z + ctx)
        if self.kind == "named":
            return torch.tanh(z + ctx.u + ctx.more["v"])
        if self.kind == "parameter":
            return torch.tanh(z @ ctx[1] + ctx[0])
        return torch.tanh(z + ctx[0] + ctx[1])


@pytest.mark.parametrize("solver", [Tsit5(1e-9, 1e-9), TorchDiffeq(rtol=1e-9, atol=1e-9)], ids=["tsit5", "dopri5"])
@pytest.mark.parametrize("kind", ["plain", "twice", "nested", "named", "parameter"])
def test_whatever_the_context_no_gradient_is_lost_or_counted_twice(kind, solver):
    cell = Strange(kind)
    for a, b in zip(gradients(cell, Backsolve(), solver), gradients(cell, Unroll(), Tsit5(1e-11, 1e-11))):
        close(a, b, 1e-6)


class Shared(Strange):
    def begin(self, x):
        return x @ self.U

    def forward(self, z, ctx, t):
        return torch.tanh(z @ self.U + ctx)


def test_a_parameter_in_two_places_is_refused():
    sentence = "adjoint=backsolve needs each parameter in one place, but the cell's U is used by begin and by forward"
    with pytest.raises(ValueError, match=sentence):
        layer_of(Shared("plain"), Backsolve(), Tsit5())(X)


def test_frozen_parameters_need_no_gradient():
    cell = TanhCell()
    cell.W.requires_grad_(False)
    x = X.clone().requires_grad_()
    exact = torch.autograd.grad((layer_of(cell, Unroll(), Tsit5(1e-9, 1e-9))(x).z * G).sum(), [cell.U, x])
    got = torch.autograd.grad((layer_of(cell, Backsolve(), Tsit5(1e-9, 1e-9))(x).z * G).sum(), [cell.U, x])
    for a, b in zip(got, exact):
        close(a, b, 1e-6)


def test_differentiating_twice_is_a_clear_error():
    cell = TanhCell()
    (g,) = torch.autograd.grad(layer_of(cell, Backsolve(), Tsit5())(X).z.square().sum(), cell.W, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        g.sum().backward()


def test_the_start_gets_no_gradient():
    cell = TanhCell()
    layer = layer_of(cell, Backsolve(), Tsit5(), init=SkipNet)
    layer(X).z.sum().backward()
    assert all(p.grad is None for p in layer.init.parameters())
    assert cell.W.grad is not None


@pytest.mark.parametrize("max_steps", [0, -3])
def test_a_backward_of_no_step_is_refused(max_steps):
    with pytest.raises(ValueError, match=rf"adjoint.max_steps={max_steps} must be at least 1"):
        Backsolve(max_steps)


def test_no_memory_is_kept():
    cell = TanhCell()
    layer = layer_of(cell, Backsolve(), Tsit5())
    layer(X)
    gc.collect()
    gc.disable()
    try:
        for run_backward in (False, True):
            out = layer(X)
            refs = [weakref.ref(out.z), weakref.ref(out.solution.value)]
            if run_backward:
                out.z.sum().backward()
            del out
            assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()


def test_a_unit_cotangent_frees_the_gradient_from_the_scale_of_the_loss():
    def gradient(scale, unit, tol=1e-3):
        torch.manual_seed(0)
        cell, x = TimedCell(4).double(), X.clone().requires_grad_()
        out = layer_of(cell, Backsolve(unit_cotangent=unit), Tsit5(tol, tol))(x)
        (out.z * G * scale).sum().backward()
        return torch.cat([p.grad.flatten() for p in cell.parameters()]) / scale, out.backward.vjps

    exact, _ = gradient(1.0, False, 1e-10)
    small, loose = gradient(1e-6, False)  # hardly controlled at all
    unit, tight = gradient(1e-6, True)
    assert torch.allclose(unit, gradient(1.0, True)[0], rtol=1e-9)
    assert (unit - exact).norm() < (small - exact).norm() / 3
    assert tight > loose


@pytest.mark.parametrize("option", ["unit_cotangent", "seminorm"])
def test_an_option_is_refused_where_it_would_be_ignored(option):
    sentence = (f"adjoint.{option}=true is for our own solvers, but solver=torchdiffeq/dopri5 makes its "
                 "steps itself; use "
                f"solver=tsit5 or adjoint.{option}=false")  # fmt: skip
    with pytest.raises(ValueError, match=sentence):
        layer_of(TanhCell(4), Backsolve(**{option: True}), TorchDiffeq())


ODE = {
    "euler": Euler(dt=5e-3), "rk4": RK4(dt=0.05), "bosh3": Bosh3(), "dopri5": Dopri5(), "tsit5": Tsit5(),
    "vcab3": Vcab3(),
}  # fmt: skip


@pytest.mark.parametrize("seminorm", [False, True])
@pytest.mark.parametrize("name", list(ODE))
def test_every_ode_solver_integrates_back(name, seminorm):
    """At the default tolerance of 1e-3, against the unroll of a solve without error; every call is counted."""
    cell, x = TimedCell(), X.clone().requires_grad_()
    wanted = gradients(cell, Unroll(), Tsit5(1e-10, 1e-10), t1=2.0)
    layer = layer_of(cell, Backsolve(seminorm=seminorm), ODE[name], t1=2.0)
    layer(x)
    calls = counted(cell)
    out = layer(x)
    got = torch.autograd.grad((out.z * G).sum(), [*cell.parameters(), x])
    assert cosine(got, wanted) > 0.999
    log = out.backward
    assert log.status.tolist() == [Status.REACHED_END] * 3
    assert len(calls) == out.calls(0) + log.calls
    assert log.vjps == log.calls > 0


@pytest.mark.parametrize("name", ["bosh3", "dopri5", "tsit5", "vcab3"])
def test_the_seminorm_spends_nothing_on_the_error_of_the_parameters(name):
    """1,024 + 1,056 parameters and rows enough that their gradient, a sum, has the largest error."""
    solver = type(ODE[name])(1e-6, 1e-6)
    cell = TimedCell(32)
    x = random(64, 32, seed=7)

    def backward(adjoint, solver):
        out = layer_of(cell, adjoint, solver)(x)
        return torch.autograd.grad(out.z.sum(), list(cell.parameters())), out.backward.vjps

    exact, _ = backward(Unroll(), Tsit5(1e-9, 1e-9))
    whole, many = backward(Backsolve(), solver)
    semi, few = backward(Backsolve(seminorm=True), solver)
    assert few < 0.85 * many
    assert cosine(semi, exact) > 1 - 1e-8
    assert cosine(whole, exact) > 1 - 1e-8


def test_the_seminorm_sees_no_parameter():
    """The steps are the same to the bit, however many there are and however their gradients grow."""
    w, more = f64([0.7]).requires_grad_(), torch.zeros(1000).double().requires_grad_()

    def F(z, t):
        return w * torch.cos(3 * t)[:, None] * z + (t**40).unsqueeze(1) * more.sum()

    runs = {}
    for seminorm in (False, True):
        for wrt in ((w,), (w, more)):
            z, _, log = Backsolve(seminorm=seminorm)(F, f64([[1.0]]), to_end(Tsit5(1e-5, 1e-5)), wrt)
            runs[seminorm, len(wrt)] = torch.autograd.grad(z.sum(), w)[0], log.vjps
    assert runs[True, 1] == runs[True, 2]
    assert runs[False, 1][1] != runs[False, 2][1]


def test_the_seminorm_sees_the_cotangent():
    """z rests at 0 while a moves: dz(1)/du of z' = 6 cos(9 t) z + u is the integral of a."""
    u = f64([[0.0]]).requires_grad_()
    z, _, log = Backsolve(seminorm=True)(
        lambda z, t: 6 * torch.cos(9 * t)[:, None] * z + u, f64([[0.0]]), to_end(Tsit5(1e-6, 1e-6)), (u,)
    )
    z.sum().backward()
    s = torch.linspace(0, 1, 20_001).double()
    close(u.grad.squeeze(), torch.trapezoid(torch.exp(6 / 9 * (torch.sin(f64(9.0)) - torch.sin(9 * s))), s), 1e-5)
    assert log.vjps > 50


@pytest.mark.parametrize("field", ["ode", "equilibrium"])
def test_the_backward_evaluates_the_field_under_the_forwards_autocast(field):
    """A backward runs outside the forward's autocast, where float32 weights may meet a bfloat16 context."""
    cell, seen = TanhCell().float(), []
    cell.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    x = X.float().requires_grad_()
    layer = layer_of(cell, Backsolve(), Dopri5(1e-3, 1e-3), field)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x).z
    calls = len(seen)
    (z.float() * G.float()).sum().backward()
    assert len(seen) > calls
    assert all(seen)
    assert not torch.is_autocast_enabled("cpu")
    exact = gradients(TanhCell(), Backsolve(), Dopri5(1e-8, 1e-8), field=field)
    assert cosine(x.grad.double(), exact[-1]) > 0.999


@pytest.mark.parametrize("reduce", [PER_SAMPLE, BATCH], ids=["per_sample", "batch"])
def test_a_forward_cut_short_is_integrated_back_from_the_time_each_row_reached(reduce):
    """z' = w z to exp(w t): with rates of its own each row reaches another t, and dz/dw = t z there."""
    w = f64(1.0).requires_grad_()
    rates = f64([[1.0], [3.0]])
    forward = Solve(Tsit5(1e-8, 1e-8), EndTime(1.0, max_steps=6), reduce)
    z, solution, _ = Backsolve()(lambda z, t: w * rates * z, torch.ones(2, 1).double(), forward, (w,))
    assert solution.status.tolist() == [Status.MAX_STEPS] * 2
    reached = solution.stats.t.unsqueeze(1)
    assert (float(reached[0]) != float(reached[1])) == reduce.per_sample
    (grad,) = torch.autograd.grad(z.sum(), w)
    assert float(grad) == pytest.approx(float((rates * reached * torch.exp(rates * reached)).sum()), rel=1e-6)


@pytest.mark.parametrize("solver", [Dopri5(1e-6, 1e-6), Vcab3(1e-6, 1e-6)])
def test_a_solve_back_in_time_that_is_lost_gives_no_gradient(solver):
    w = f64(0.8).requires_grad_()

    class Lost(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, g):
            return g * torch.nan

    z, _, log = Backsolve()(lambda z, t: -w * Lost.apply(z), f64([[1.0]]), to_end(solver), (w,))
    z.sum().backward()
    assert log.status.item() in (Status.NONFINITE, Status.STEP_TOO_SMALL)
    assert w.grad.isnan()
