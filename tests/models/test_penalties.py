"""What each penalty is, in numbers worked out by hand; where its gradient goes; what it costs; whom it refuses."""

import re
from dataclasses import replace

import pytest
import torch
from problems import TIGHT, CentredCell, TanhCell, close, counted, f64, network, random

from implicit_bench.adjoints import IFT, JFB, Backsolve, Unroll
from implicit_bench.core import EndTime, FixedSteps, Residual
from implicit_bench.models import DenseCell, FZero, ImplicitLayer, Iterate, SkipNet, UntiedCell, Zero, prepare
from implicit_bench.models.penalties import Correction, InitFit, Jacobian, LocalError
from implicit_bench.solvers import RK4, Anderson, Bosh3, Dopri5, Euler, Homotopy, Picard, TorchDiffeq, Tsit5, Vcab3

X, G = random(3, 4, seed=7), random(3, 4, seed=8)
UNTIED = UntiedCell([DenseCell(4), DenseCell(4)])


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


# ------------------------------------------------------------------------------------------------------ correction


def test_the_correction_is_the_loss_of_f_at_iterates_and_so_is_its_gradient():
    layer = layer_of(Picard(), FixedSteps(7), keep=True)
    x = X.clone().requires_grad_()
    calls = counted(layer.cell)
    out = layer(x)
    penalty = Correction(0.5, n=2, gamma=0.9)(out, lambda z: (z * G).sum())
    assert len(calls) == out.calls(0) == 7 + 1 + 2  # the solve's, the re-attaching one, the penalty's
    assert int(out.solution.stats.steps[0]) == 6  # a third and two thirds of the way
    ctx, z, wanted = layer.cell.begin(x), torch.zeros(3, 4).double(), 0
    for k in range(5):
        fz = layer.cell(z, ctx, None)
        wanted = wanted + {2: 0.81, 4: 0.9}.get(k, 0.0) * 0.5 * (fz * G).sum()
        z = fz.detach()
    close(penalty, wanted, 1e-14)
    wrt = [*layer.cell.parameters(), x]
    for a, b in zip(torch.autograd.grad(penalty, wrt), torch.autograd.grad(wanted, wrt)):
        close(a, b, 1e-14)
    assert out.backward.vjps == 2


def test_each_row_is_corrected_along_its_own_solve():
    layer = layer_of(Picard(), Residual(1e-3, max_steps=100), keep=True)
    with torch.no_grad():
        layer.cell.U.mul_(4)
    x = X * torch.tensor([[0.01], [1.0], [4.0]])
    out = layer(x)
    steps = out.solution.stats.steps.tolist()
    assert len(set(steps)) == 3
    seen = []
    Correction(n=3)(out, lambda z: seen.append(z.detach()) or z.sum())
    ctx = layer.cell.begin(x)
    for i, fz in enumerate(seen):
        z = torch.stack([out.iterates[(i + 1) * k // 4].z[row] for row, k in enumerate(steps)])
        close(fz, layer.cell(z, ctx, None).detach(), 1e-15)


def test_task_loss_and_correction_are_what_torchdeq_sums():
    loss = pytest.importorskip("torchdeq.loss")
    layer = layer_of(Picard(), FixedSteps(9), keep=True)
    out = layer(X)
    states = []

    def task(z):
        states.append(z)
        return ((z - G) ** 2).mean()

    ours = Correction(n=3)(out, task) + task(out.z)
    close(ours, loss.fp_correction(lambda z: ((z - G) ** 2).mean(), (states,), gamma=0.8), 1e-15)


# ------------------------------------------------------------------------------------------------------ local_error


class LinearCell(TanhCell):
    def forward(self, z, ctx, t):
        return z @ self.W + ctx


class TimedCell(TanhCell):
    def forward(self, z, ctx, t):
        return torch.tanh(z @ self.W + ctx) * torch.cos(3 * t).unsqueeze(1)


def along(layer, x, path, steps):
    """The output of a solve, as if it had passed `path`, rows of (z, t (B,), dt (R,))."""
    out = layer(x)
    iterates = [Iterate(z, f64(t), f64(dt).unsqueeze(1)) for z, t, dt in path]
    stats = replace(out.solution.stats, steps=torch.tensor(steps))
    return out._replace(iterates=iterates, solution=replace(out.solution, stats=stats))


@pytest.mark.parametrize("field", ["ode", "equilibrium"])
@pytest.mark.parametrize("solver", [Bosh3(), Vcab3()], ids=["bosh3", "vcab3"])
def test_the_local_error_of_a_linear_field_by_hand(solver, field):
    """dz/dt = A z + c with F its value at z: Bosh3's stages add up to e = -h/48 (hA)^2 (I + hA) F."""
    layer = layer_of(solver, EndTime(1.0), Unroll(), field, LinearCell())
    x = X.clone().requires_grad_()
    z = [random(3, 4, seed=k) for k in (21, 22, 23)]
    h = [[0.3, 0.1, 0.2], [0.15, 0.05, 0.4], [0.6, 0.7, 0.5]]
    t = [[0.0, 0.0, 0.0], [0.0, 0.1, 0.0], [0.15, 0.1, 0.4]]
    out = along(layer, x, [*zip(z, t, h), (z[0], [0.5, 0.8, 0.9], h[0])], [2, 1, 3])
    calls, before = counted(layer.cell), out.calls(0)
    begins = [1, 0, 2]  # row 0: its first attempt was rejected; 1: its solve ended then; 2: rejected, then either
    A = layer.cell.W - (torch.eye(4).double() if field == "equilibrium" else 0.0)

    def by_hand(begins):
        at = torch.stack([z[k][row] for row, k in enumerate(begins)])
        size = f64([h[k][row] for row, k in enumerate(begins)]).unsqueeze(1)
        once = (at @ A + layer.cell.begin(x)) @ A * size
        e = -size / 48 * (once @ A * size + once @ A @ A * size**2)
        return 2.0 * (size.squeeze(1) * e.square().mean(1).sqrt()).mean()

    either, wrt = [by_hand([1, 0, 1]), by_hand(begins)], [*layer.cell.parameters(), x]
    found = set()
    for seed in range(12):
        torch.manual_seed(seed)
        penalty = LocalError(2.0)(out, None)
        which = min((0, 1), key=lambda i: abs(float(penalty.detach() - either[i].detach())))
        found.add(which)
        close(penalty, either[which], 1e-15)
    assert found == {0, 1}
    assert len(calls) == out.calls(0) - before == 12 * 4
    got = torch.autograd.grad(penalty, wrt)
    assert out.backward.vjps == 4
    for a, b in zip(got, torch.autograd.grad(either[which], wrt)):
        close(a, b, 1e-14)
        assert b.any()


@pytest.mark.parametrize("solver", [Tsit5(), Dopri5()], ids=["tsit5", "dopri5"])
def test_its_gradient_is_that_of_a_step_written_out(solver):
    layer = layer_of(solver, EndTime(1.0), Unroll(), "ode", TimedCell())
    z, t, h = random(3, 4, seed=21), f64([0.2, 0.4, 0.1]), f64([0.5, 0.3, 0.8])
    out = along(layer, X, [(z, t.tolist(), h.tolist()), (z, (t + h).tolist(), h.tolist())], [1, 1, 1])
    penalty = LocalError(1.0)(out, None)
    a, c, e = solver.tableau
    ctx, k = layer.cell.begin(X), []
    for row, node in zip(((), *a), (0.0, *c)):
        k.append(layer.cell(z + h[:, None] * sum(w * s for w, s in zip(row, k)), ctx, t + node * h))
    error = h[:, None] * sum(w * s for w, s in zip(e, k))
    wanted = (h * error.square().mean(1).sqrt()).mean()
    close(penalty, wanted, 1e-15)
    assert out.backward.forward_calls == len(e)
    wrt = list(layer.cell.parameters())
    for p, q in zip(torch.autograd.grad(penalty, wrt), torch.autograd.grad(wanted, wrt)):
        close(p, q, 1e-15)
    assert out.backward.vjps == len(e)


def test_a_batch_that_is_one_system_has_one_error():
    layer = layer_of(Bosh3(1e-5, 1e-5), EndTime(1.0), Unroll(), "ode", CentredCell(), keep=True)
    out = layer(X)
    torch.manual_seed(0)
    first = LocalError(1.0)(out, None)
    found = set()
    for z, t, h in out.iterates[:-1]:
        F0 = out.again(z, t)
        k2 = out.again(z + h / 2 * F0, t)
        k3 = out.again(z + 0.75 * h * k2, t)
        new = z + h * (2 * F0 + 3 * k2 + 4 * k3) / 9
        e = h * (-5 / 72 * F0 + k2 / 12 + k3 / 9 - out.again(new, t) / 8)
        found.add(float((h * e.square().mean().sqrt()).detach()))
    assert len(found) > 3
    assert min(abs(value - float(first.detach())) for value in found) < 1e-15
    torch.manual_seed(0)
    assert torch.equal(LocalError(1.0)(out, None), first)


def test_each_accepted_step_is_as_likely():
    layer = layer_of(Tsit5(1e-5, 1e-5), EndTime(3.0), Unroll(), "ode", keep=True)
    out = layer(X[:1])
    z = [kept.z for kept in out.iterates]
    moved = [k for k in range(len(z) - 1) if out.iterates[k + 1].t > out.iterates[k].t]
    torch.manual_seed(0)
    values = [f"{float(LocalError(1.0)(out, None).detach()):.6e}" for _ in range(100 * len(moved))]
    counts = [values.count(value) for value in set(values)]
    assert len(counts) == len(moved) > 3
    assert min(counts) > 60
    assert max(counts) < 140


def test_no_step_and_no_ode_solver_are_no_error():
    layer = layer_of(Tsit5(), Residual(2.0), keep=True)  # the start, whose residual is 1, will do
    out = layer(X)
    assert int(out.solution.stats.steps.max()) == 0
    assert float(LocalError()(out, None).detach()) == 0
    pretrained = layer.unrolled(X, 3)
    assert float(LocalError()(pretrained, None)) == 0
    assert pretrained.backward.forward_calls == 0


def test_penalising_local_errors_saves_evaluations():
    layer = layer_of(Tsit5(1e-4, 1e-4), EndTime(1.0), Backsolve(), "ode", cell=TanhCell(norm=3.0), keep=True)
    optimizer = torch.optim.Adam(layer.cell.parameters(), 5e-2)
    torch.manual_seed(0)
    calls = []
    for _ in range(60):
        out = layer(X)
        calls.append(float(out.solution.stats.nfe.double().mean()))
        optimizer.zero_grad()
        LocalError(1e4)(out, None).backward()
        optimizer.step()
    assert sum(calls[-10:]) / 10 < 0.85 * calls[0]


REFUSED = [
    (Correction(), (Tsit5(), EndTime(), Unroll(), "ode"),
     "penalty=[correction] is for iterates of a fixed point, which field=ode does not have; "
     "use penalty=[local_error] or field=equilibrium"),
    *((LocalError(), (solver, stop, JFB()),
       f"penalty=[local_error] needs a solver that estimates its error, and solver={name} does not; "
       "use solver=tsit5 or solver=vcab3")
      for solver, stop, name in ((Picard(), Residual(), "picard"), (Anderson(), Residual(), "anderson"),
                                 (Euler(), Residual(), "euler"), (RK4(), EndTime(), "rk4"),
                                 (Homotopy(), Residual(), "homotopy"))),
    *((penalty, (Picard(), FixedSteps(2), Unroll(), "equilibrium", UNTIED),
       f"penalty=[{name}] evaluates the cell again, but untied cells are applied once each, in turn; "
       "use penalty=[none]")
      for penalty, name in ((Jacobian(), "jacobian"), (Correction(), "correction"))),
]  # fmt: skip


@pytest.mark.parametrize(("penalty", "parts", "sentence"), REFUSED)
def test_what_does_not_suit_a_layer_is_refused(penalty, parts, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        prepare(layer_of(*parts), {"mine": penalty})


@pytest.mark.parametrize(("kind", "wrong"), [
    (Jacobian, {"weight": -1}), (Jacobian, {"probes": 0}), (Jacobian, {"probability": 1.5}), (InitFit, {"weight": -1}),
    (Correction, {"weight": -1}), (Correction, {"n": 0}), (Correction, {"gamma": 0}), (LocalError, {"weight": -1}),
])  # fmt: skip
def test_settings_out_of_range(kind, wrong):
    ((key, value),) = wrong.items()
    name = {InitFit: "init_fit", LocalError: "local_error"}.get(kind, kind.__name__.lower())
    with pytest.raises(ValueError, match=rf"^penalty\.{name}\.{key}={value} must "):
        kind(**wrong)
