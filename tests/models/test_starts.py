"""Starts and the Skip penalty (arXiv 2201.12240): what they cost, who learns from what."""

import pytest
import torch
from problems import TIGHT, TanhCell, close, counted, f64, network, random

from implicit_bench.adjoints import IFT, JFB, Unroll
from implicit_bench.core import EndTime, FixedSteps, Residual
from implicit_bench.models import FZero, ImplicitLayer, Skip, SkipNet, Zero
from implicit_bench.solvers import Anderson, Picard, TorchDiffeq, Tsit5

X, G = random(3, 4, seed=7), random(3, 4, seed=8)
EXACT = IFT(rtol=1e-13, max_iter=60)


def layer_of(init, adjoint=EXACT, solver=None, stop=TIGHT, cell=None, field="equilibrium"):
    torch.manual_seed(0)
    cell = cell or TanhCell()
    return ImplicitLayer(cell, init(network(cell)), solver or Anderson(ridge=1e-14), stop, adjoint, field)


@pytest.mark.parametrize(("init", "calls"), [(Zero, 0), (FZero, 1), (SkipNet, 0)])
def test_what_a_start_is_and_costs(init, calls):
    layer = layer_of(init)
    assert layer.init.calls == calls
    counts = counted(layer.cell)
    out = layer(X)
    assert len(counts) == out.calls(calls) == calls + out.solution.stats.calls + 1
    zero = torch.zeros(3, 4).double()
    wanted = {Zero: zero, FZero: layer.cell(zero, layer.cell.begin(X), None)}.get(init)
    close(out.start, layer.init.g(X) if wanted is None else wanted, 1e-15)


@pytest.mark.parametrize("init", [Zero, FZero, SkipNet])
def test_the_solve_begins_there(init):
    """The first state that a solver knows is the start: after one step of Picard it is f(start)."""
    layer = layer_of(init, adjoint=Unroll(), solver=Picard(), stop=FixedSteps(1))
    out = layer(X)
    close(out.solution.value, out.start, 0)
    close(out.z, layer.cell(out.start, layer.cell.begin(X), None), 1e-15)


@pytest.mark.parametrize("adjoint", [EXACT, JFB(), Unroll()], ids=["ift", "jfb", "unroll"])
def test_the_task_loss_does_not_teach_the_start(adjoint):
    layer = layer_of(SkipNet, adjoint=adjoint)
    (layer(X).z * G).sum().backward()
    assert all(p.grad is None for p in layer.init.parameters())
    assert float(layer.cell.W.grad.abs().max()) > 0


def test_the_task_loss_does_not_reach_the_cell_through_the_start():
    """With f(0, x) as the start of one unrolled cell: only the second call of f has a gradient."""
    layer = layer_of(FZero, adjoint=Unroll(), solver=Picard(), stop=FixedSteps(1))
    (got,) = torch.autograd.grad((layer(X).z * G).sum(), layer.cell.U)
    start = layer.cell(torch.zeros(3, 4).double(), layer.cell.begin(X), None).detach()
    (wanted,) = torch.autograd.grad((layer.cell(start, layer.cell.begin(X), None) * G).sum(), layer.cell.U)
    close(got, wanted, 1e-14)


@pytest.mark.parametrize("weight", [0.01, 5.0])
@pytest.mark.parametrize("init", [SkipNet, FZero])
def test_the_skip_penalty_is_the_papers_mean(weight, init):
    """weight mean |z* - z0| over state and batch; its gradient to z* is weight sign(z* - z0) / N, to z0 minus that."""
    layer = layer_of(init)
    out = layer(X)
    penalty = Skip(weight)(out, None)
    z, start = out.z.detach(), out.start.detach()
    assert penalty.shape == ()
    close(penalty.detach(), f64(weight * sum((z - start).abs().flatten().tolist()) / 12), 1e-13)
    sign = weight * torch.sign(z - start) / 12
    if init is SkipNet:
        got = torch.autograd.grad(penalty, list(layer.init.parameters()), retain_graph=True)
        wanted = torch.autograd.grad(layer.init.g(X), list(layer.init.parameters()), -sign)
        for a, b in zip(got, wanted):
            close(a, b, 1e-13)
        assert float(wanted[0].abs().max()) > 1e-4 * weight
    parameters = list(layer.cell.parameters())
    got = torch.autograd.grad(penalty, parameters)
    out = layer(X)
    both = [torch.autograd.grad(out.z, parameters, sign, retain_graph=True)]
    if init is FZero:
        both.append(torch.autograd.grad(out.start, parameters, -sign, allow_unused=True))
    for i, a in enumerate(got):
        close(a, sum(g[i] for g in both if g[i] is not None), 1e-12)
    assert float(got[0].norm()) > 1e-3 * weight


def test_the_default_weight_is_the_papers_text():
    assert Skip().weight == 0.01
    with pytest.raises(ValueError, match=r"penalty\.skip\.weight=-1 must not be negative"):
        Skip(-1)


def test_a_learned_start_saves_steps():
    """Taught by its penalty alone, g(x) comes near z* and the solve gets shorter: the paper's point."""
    layer = layer_of(SkipNet, solver=Picard(), stop=Residual(1e-2, max_steps=200))
    with torch.no_grad():
        layer.init.g[0].bias.fill_(1.0)
    x = random(64, 4, seed=3)
    with torch.no_grad():
        before = layer(x)
    optimizer = torch.optim.Adam(layer.init.parameters(), 3e-2)
    for _ in range(150):
        optimizer.zero_grad()
        Skip(1.0)(layer(x), None).backward()
        optimizer.step()
    with torch.no_grad():
        after = layer(x)
    close(after.z, before.z, 0.1)  # the fixed point has not moved
    assert float(Skip(1.0)(after, None)) < 0.7 * float(Skip(1.0)(before, None))
    assert float(after.solution.stats.nfe.double().mean()) < float(before.solution.stats.nfe.double().mean()) - 0.5


@pytest.mark.parametrize("init", [Zero, FZero, SkipNet])
def test_a_start_without_gradients_is_the_same(init):
    layer = layer_of(init)
    tracked = layer(X)
    with torch.no_grad():
        plain = layer(X)
    assert torch.equal(plain.start, tracked.start.detach())
    assert not plain.start.requires_grad


def test_an_ode_puts_out_its_end_and_an_equilibrium_f_of_it():
    cell = TanhCell()
    for solver in (Tsit5(1e-9, 1e-9), TorchDiffeq(rtol=1e-9, atol=1e-9)):
        for adjoint in (Unroll(), EXACT):
            layer = layer_of(Zero, adjoint, solver, EndTime(2.0), cell)
            out = layer(X)
            close(out.z, cell(out.solution.value, cell.begin(X), None), 1e-14)
            with torch.no_grad():
                close(layer(X).z, out.z.detach(), 1e-13)
        layer = layer_of(Zero, Unroll(), solver, EndTime(2.0), cell, "ode")
        out = layer(X)
        assert torch.equal(out.z, out.solution.value)
        # dz/dt = f, without the - z of an equilibrium: the two are different networks
        assert float((out.z - layer_of(Zero, Unroll(), solver, EndTime(2.0), cell)(X).z).detach().abs().max()) > 0.1


@pytest.mark.parametrize(("init", "more"), [(Zero, 0), (FZero, 1), (SkipNet, 0)])
def test_a_penaltys_vjp_through_f_at_zero_is_counted(init, more):
    layer = ImplicitLayer(cell := TanhCell(), init(network(cell)), Picard(), Residual(1e-6), JFB())
    out = layer(random(3, 4, seed=1))
    (out.z.sum() + out.start.sum()).backward()
    assert out.backward.vjps == 1 + more
