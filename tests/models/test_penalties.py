"""What each penalty is, in numbers worked out by hand; where its gradient goes; what it costs; whom it refuses."""

import pytest
import torch
from problems import TIGHT, TanhCell, close, counted, f64, network, random

from implicit_bench.adjoints import IFT, JFB, Backsolve, Unroll
from implicit_bench.core import EndTime, FixedSteps, Residual
from implicit_bench.models import FZero, ImplicitLayer, InitFit, Jacobian, SkipNet, Zero, prepare
from implicit_bench.solvers import Anderson, Picard, TorchDiffeq, Tsit5

X, G = random(3, 4, seed=7), random(3, 4, seed=8)


def layer_of(solver=None, stop=TIGHT, adjoint=None, field="equilibrium", cell=None, keep=False, init=Zero):
    torch.manual_seed(0)
    cell = cell or TanhCell()
    layer = ImplicitLayer(cell, init(network(cell)), solver or Anderson(ridge=1e-14), stop, adjoint or JFB(), field)
    layer.keep_iterates = keep
    return layer


# ------------------------------------------------------------------------------------------------- iterates of a solve


@pytest.mark.parametrize("adjoint", [IFT(), Unroll(), Unroll(checkpoint=True)], ids=["ift", "unroll", "checkpoint"])
def test_the_iterates_are_what_the_solver_passed(adjoint):
    layer = layer_of(Picard(), FixedSteps(6), adjoint, keep=True)
    out = layer(X)
    z, ctx = torch.zeros(3, 4).double(), layer.cell.begin(X)
    assert len(out.iterates) == 6
    for kept in out.iterates:
        close(kept.z, z.detach(), 1e-15)
        assert not kept.z.requires_grad
        assert kept.dt is None
        z = layer.cell(z, ctx, None)
    (out.z * G).sum().backward()  # a checkpointed backward makes the steps again
    assert len(out.iterates) == 6
    chosen = out.after(torch.tensor([0, 5, 2]))
    close(chosen.z, torch.stack([out.iterates[k].z[b] for b, k in enumerate((0, 5, 2))]), 0)


def test_the_iterates_of_an_ode_have_times_and_steps():
    layer = layer_of(Tsit5(1e-4, 1e-4), EndTime(1.0), Backsolve(), "ode", keep=True)
    out = layer(X)
    assert len(out.iterates) == int(out.solution.stats.steps.max()) + 1
    reached = out.after(out.solution.stats.steps)
    assert torch.equal(reached.z, out.solution.value)
    assert torch.equal(reached.t, torch.ones(3).double())
    first, second = out.iterates[:2]
    took = second.t > first.t
    close(second.t[took], (first.t + first.dt.squeeze(1))[took], 1e-15)
    before = [kept.z.clone() for kept in out.iterates]
    (out.z * G).sum().backward()  # which steps the same solver, on an augmented state
    assert len(out.iterates) == len(before)
    assert all(torch.equal(a.z, b) for a, b in zip(out.iterates, before))


def test_a_solve_made_twice_leaves_the_iterates_of_one():
    """adjoint=unroll solves again where f was not finite, so that no NaN is in its graph."""

    class Bounded(TanhCell):
        def forward(self, z, ctx, t):
            return torch.where(z > 1e6, torch.nan, super().forward(z, ctx, t))

    class Far(Zero):
        def forward(self, x, f):
            z = super().forward(x, f)
            z[0] = 1e7
            return z

    out = layer_of(Picard(), FixedSteps(4), Unroll(), cell=Bounded(), keep=True, init=Far)(X)
    assert out.backward.forward_calls > 0
    assert len(out.iterates) == 4


@pytest.mark.parametrize("keep", [False, True])
def test_iterates_are_kept_only_if_asked_and_never_in_evaluation(keep):
    layer = layer_of(Picard(), FixedSteps(3), keep=keep)
    assert len(layer(X).iterates) == 3 * keep
    with torch.no_grad():
        out = layer(X)
    assert out.iterates == []
    assert torch.equal(out.z, layer(X).z)
    with pytest.raises(ValueError, match=r"kept no iterates; set layer\.keep_iterates = True"):
        out.after(torch.zeros(3, dtype=torch.int64))
    assert type(layer.solver.step) is type(Picard().step)  # the layer's own solver is left alone


class Asks:
    iterates = True

    def __call__(self, out, loss):
        return out.z.new_zeros(())


def test_who_asks_for_iterates_gets_them_and_a_foreign_loop_has_none():
    layer = layer_of()
    prepare(layer, {"one": lambda out, loss: loss(out.z)})  # a penalty of one's own need say nothing of itself
    assert not layer.keep_iterates
    prepare(layer, {"one": Asks(), "other": lambda out, loss: loss(out.z)})
    assert layer.keep_iterates
    with pytest.raises(ValueError, match=r"^penalty=\[mine\] needs the iterates of the solve, which "
                                         r"solver=torchdiffeq/dopri5 keeps to itself; use solver=dopri5$"):  # fmt: skip
        prepare(layer_of(TorchDiffeq(), EndTime(), Unroll(), "ode"), {"mine": Asks()})


def test_an_evaluation_more_is_counted_and_so_are_its_vjps():
    layer = layer_of()
    calls = counted(layer.cell)
    out = layer(X)
    z = random(3, 4, seed=2).requires_grad_()
    fz = out.again(z, torch.zeros(3))
    close(fz, layer.cell(z, layer.cell.begin(X), None), 0)
    assert len(calls) - 1 == out.calls(0)
    torch.autograd.grad(fz, z, G, retain_graph=True)
    torch.autograd.grad(fz, z, G)
    assert out.backward.vjps == 2


# -------------------------------------------------------------------------------------------------------- init_fit


def test_init_fit_is_smooth_l1_and_teaches_the_start_alone():
    layer = layer_of(init=SkipNet, adjoint=IFT())
    with torch.no_grad():
        layer.init.g[0].bias.copy_(f64([0.1, 3.0, 0.2, 5.0]))
    out = layer(X)
    penalty = InitFit(0.7)(out, None)
    d = (out.start - out.z).detach()
    assert 0 < int((d.abs() < 1).sum()) < 12  # both branches
    size = [x * x / 2 if abs(x) < 1 else abs(x) - 0.5 for x in d.flatten().tolist()]
    assert penalty.shape == ()
    close(penalty.detach(), f64(0.7 * sum(size) / 12), 1e-13)
    penalty.backward()
    wanted = torch.autograd.grad(layer.init.g(X), list(layer.init.parameters()), 0.7 * d.clamp(-1, 1) / 12)
    for p, w in zip(layer.init.parameters(), wanted):
        close(p.grad, w, 1e-13)
    assert all(p.grad is None for p in layer.cell.parameters())
    assert out.backward.vjps == 0


def test_init_fit_of_f_zero_teaches_the_cell_through_the_start():
    layer = layer_of(init=FZero)
    out = layer(X)
    got = torch.autograd.grad(InitFit()(out, None), [layer.cell.U, layer.cell.b])
    start = torch.tanh(layer.cell.begin(X))
    d = (start - out.z).detach()
    wanted = torch.autograd.grad(start, [layer.cell.U, layer.cell.b], d.clamp(-1, 1) / 12)
    for a, b in zip(got, wanted):
        close(a, b, 1e-13)
    assert out.backward.vjps == 1


# -------------------------------------------------------------------------------------------------------- jacobian


def dense(cell, z, x):
    """J (B, D, D) of tanh(z W + x U + b), J[b, i, j] = df_i / dz_j, with a graph to the parameters, none to z."""
    return (1 - torch.tanh(z @ cell.W + cell.begin(x)) ** 2).unsqueeze(2) * cell.W.T


CASES = [(Anderson(ridge=1e-14), TIGHT, IFT(), "equilibrium"), (Picard(), FixedSteps(4), Unroll(), "equilibrium"),
         (Tsit5(), EndTime(1.0), Backsolve(), "ode"), (TorchDiffeq(), EndTime(1.0), Unroll(), "ode")]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=["ift", "unroll", "backsolve", "torchdiffeq"])
def test_the_jacobian_penalty_and_its_gradient_for_given_probes(case):
    layer = layer_of(*case)
    calls, x = counted(layer.cell), X.clone().requires_grad_()
    out = layer(x)
    before = out.calls(0)
    torch.manual_seed(5)
    penalty = Jacobian(0.3, probes=2)(out, None)
    assert out.calls(0) == before + 1
    assert out.backward.vjps == 2
    assert len(calls) == out.calls(0)
    wrt = [*layer.cell.parameters(), x]
    got = torch.autograd.grad(penalty, wrt)
    assert out.backward.vjps == 4  # and the derivative of each
    torch.manual_seed(5)
    z = out.z.detach()
    J = dense(layer.cell, z, x)
    v = [torch.einsum("bi,bij->bj", torch.randn_like(z), J) for _ in range(2)]
    wanted = 0.3 * (v[0] ** 2 + v[1] ** 2).sum() / 2 / 12
    close(penalty, wanted, 1e-14)
    for a, b in zip(got, torch.autograd.grad(wanted, wrt)):  # were z* followed, W, U, b and x would have more
        close(a, b, 1e-13)
        assert float(b.abs().max()) > 1e-4


def test_on_average_it_is_the_squared_frobenius_norm(monkeypatch):
    """Exactly so for probes whose outer products average to the identity: sqrt(D) times each basis vector."""
    layer = layer_of()
    out = layer(X)
    basis = iter(torch.eye(4).double() * 2)
    monkeypatch.setattr(torch, "randn_like", lambda z: next(basis).expand_as(z))
    J = dense(layer.cell, out.z.detach(), X).detach()
    close(Jacobian(1.0, probes=4)(out, None).detach(), (J**2).sum() / 3 / 4, 1e-14)
    monkeypatch.undo()
    torch.manual_seed(0)
    drawn = Jacobian(1.0, probes=2000)(out, None).detach()
    close(drawn / ((J**2).sum() / 12), f64(1.0), 0.05)


def test_a_jacobian_penalty_at_some_steps_only():
    layer = layer_of()
    torch.manual_seed(1)
    out = layer(X)
    found = [float(Jacobian(1.0, probability=0.25)(out, None).detach()) for _ in range(400)]
    hit = [value for value in found if value]
    assert 70 < len(hit) < 130
    assert out.backward.forward_calls == 1 + len(hit)  # a step without costs nothing
    torch.manual_seed(1)
    assert [float(Jacobian(1.0, probability=0.25)(out, None).detach()) for _ in range(400)] == found


def test_penalising_the_jacobian_shortens_the_solve():
    """Taught by nothing else, J shrinks, and with it plain iteration's count of steps."""
    layer = layer_of(Picard(), Residual(1e-4, max_steps=200), cell=TanhCell(norm=0.95))
    optimizer = torch.optim.Adam([layer.cell.W], 1e-2)
    torch.manual_seed(0)
    steps = []
    for _ in range(40):
        out = layer(X)
        steps.append(float(out.solution.stats.steps.double().mean()))
        optimizer.zero_grad()
        Jacobian()(out, None).backward()
        optimizer.step()
    assert steps[-1] < 0.7 * steps[0]
