"""What each penalty is, in numbers worked out by hand; where its gradient goes; what it costs; whom it refuses."""

import pytest
import torch
from problems import TIGHT, TanhCell, close, counted, network, random

from implicit_bench.adjoints import IFT, JFB, Backsolve, Unroll
from implicit_bench.core import EndTime, FixedSteps
from implicit_bench.models import ImplicitLayer, Zero, prepare
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
