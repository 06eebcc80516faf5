"""Which combinations a layer refuses, in which words, and how it reduces."""

import pytest
import torch
from problems import CentredCell, TanhCell, network, random

from implicit_bench.adjoints import IFT, JFB, Backsolve, Phantom, Unroll
from implicit_bench.core import EndTime, FixedSteps, Residual, Status
from implicit_bench.models import Dense, DenseCell, ImplicitLayer, SkipNet, UntiedCell, Zero
from implicit_bench.solvers import Anderson, Picard, TorchDiffeq, Tsit5


def make(solver, stop, adjoint, field="equilibrium", cell=None):
    cell = cell or TanhCell()
    return ImplicitLayer(cell, Zero(network(cell)), solver, stop, adjoint, field)


class Follows(Picard):
    """A solver that differentiates the cell to make its steps."""

    needs_map = True


UNTIED = UntiedCell([DenseCell(4) for _ in range(3)])
REFUSED = [
    (Tsit5(), Residual(), Unroll(), "ode",
     "stop=residual looks for f(z) = z, but field=ode has no equilibrium meaning; "
     "use stop=end_time or field=equilibrium"),
    (Picard(), FixedSteps(), Unroll(), "ode",
     "stop=fixed_steps looks for f(z) = z, but field=ode has no equilibrium meaning; "
     "use stop=end_time or field=equilibrium"),
    (Tsit5(), EndTime(), IFT(), "ode",
     "adjoint=ift needs a fixed point, which field=ode does not have; use adjoint=backsolve or adjoint=unroll"),
    (Tsit5(), EndTime(), JFB(), "ode",
     "adjoint=jfb needs a fixed point, which field=ode does not have; use adjoint=backsolve or adjoint=unroll"),
    (TorchDiffeq(), Residual(), IFT(), "equilibrium",
     "solver=torchdiffeq/dopri5 integrates to an end time and cannot stop at a residual; use solver=tsit5, "
     "or stop=end_time with a long stop.t1 such as 20"),
    (TorchDiffeq(), FixedSteps(), Unroll(), "equilibrium",
     "solver=torchdiffeq/dopri5 integrates to an end time and cannot stop at a residual; use solver=tsit5, "
     "or stop=end_time with a long stop.t1 such as 20"),
    (Anderson(), EndTime(), IFT(), "equilibrium",
     "solver=anderson finds roots and has no time; use stop=residual or solver=tsit5"),
    (Picard(), EndTime(), Unroll(), "ode",
     "solver=picard finds roots and has no time; use stop=residual or solver=tsit5"),
    (Tsit5(), Residual(), Backsolve(), "equilibrium",
     "adjoint=backsolve integrates back from an end time; use stop=end_time or adjoint=ift"),
    (Picard(), FixedSteps(), Backsolve(), "equilibrium",
     "adjoint=backsolve integrates back from an end time; use stop=end_time or adjoint=ift"),
    (Tsit5(), EndTime(), Phantom(), "ode",
     "adjoint=phantom needs a fixed point, which field=ode does not have; use adjoint=backsolve or adjoint=unroll"),
    (Anderson(), EndTime(), Backsolve(), "equilibrium",
     "solver=anderson finds roots and has no time; use stop=residual or solver=tsit5"),
    (Anderson(), Residual(), Backsolve(), "equilibrium",
     "adjoint=backsolve integrates back from an end time; use stop=end_time or adjoint=ift"),
    (TorchDiffeq(), EndTime(), Unroll(checkpoint=True), "ode",
     "adjoint.checkpoint=true is for our own solvers, but solver=torchdiffeq/dopri5 makes its steps "
     "itself; use solver=tsit5 "
     "or adjoint.checkpoint=false"),
    (Follows(), Residual(), Unroll(), "equilibrium",
     "solver=follows differentiates the cell to make its steps, and adjoint=unroll cannot differentiate it twice; use "
     "adjoint=ift"),
    (Picard(), Residual(), IFT(), "root", "field='root' must be equilibrium, ode or ode_then_f"),
]  # fmt: skip


@pytest.mark.parametrize(("solver", "stop", "adjoint", "field", "sentence"), REFUSED)
def test_what_makes_no_sense_is_refused_in_a_sentence(solver, stop, adjoint, field, sentence):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        make(solver, stop, adjoint, field)
    assert str(refusal.value) == sentence


@pytest.mark.parametrize(
    ("solver", "stop", "adjoint"),
    [(Anderson(), FixedSteps(3), Unroll()), (Picard(), FixedSteps(3), IFT()), (Picard(), FixedSteps(2), Unroll()),
     (Picard(), Residual(), Unroll()), (Picard(), FixedSteps(4), Unroll())],
)  # fmt: skip
def test_untied_cells_are_for_one_pass_only(solver, stop, adjoint):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        make(solver, stop, adjoint, cell=UNTIED)
    assert str(refusal.value) == ("3 untied cells are applied once each; use solver=picard adjoint=unroll "
                                  "stop=fixed_steps stop.steps=3")  # fmt: skip
    make(Picard(), FixedSteps(3), Unroll(), cell=UNTIED)
    with pytest.raises(ValueError, match=r"adjoint\.checkpoint=true applies cells again in the backward, but untied "
                                         r"cells are applied once each, in turn; use adjoint\.checkpoint=false"):
        make(Picard(), FixedSteps(3), Unroll(checkpoint=True), cell=UNTIED)


GOOD = [
    (Anderson(), Residual(1e-4), IFT(), "equilibrium"),
    (Picard(), Residual(1e-4, max_steps=200), JFB(), "equilibrium"),
    (Anderson(), Residual(1e-4), Phantom(), "equilibrium"),
    (Follows(), Residual(1e-4, max_steps=200), IFT(), "equilibrium"),
    (Tsit5(), EndTime(), Unroll(checkpoint=True), "ode"),
    (Tsit5(1e-5, 1e-5), Residual(1e-4, max_steps=200), IFT(), "equilibrium"),
    (Picard(), FixedSteps(40), Unroll(), "equilibrium"),
    (Tsit5(), EndTime(), Unroll(), "ode"),
    (Tsit5(), EndTime(), Backsolve(), "ode"),
    (TorchDiffeq(), EndTime(), Backsolve(), "ode"),
    (TorchDiffeq(), EndTime(), Unroll(), "ode"),
    (Tsit5(), EndTime(), Backsolve(), "equilibrium"),
    (TorchDiffeq(), EndTime(), IFT(), "equilibrium"),
]


@pytest.mark.parametrize(("solver", "stop", "adjoint", "field"), GOOD)
def test_what_makes_sense_solves_and_learns(solver, stop, adjoint, field):
    """A gradient step along -dL/d(parameters) lowers the loss."""
    layer, x = make(solver, stop, adjoint, field), random(8, 4, seed=7)
    out = layer(x)
    good = Status.CONVERGED if isinstance(stop, Residual) else Status.REACHED_END
    assert out.solution.status.tolist() == [good] * 8
    loss = out.z.square().sum()
    loss.backward()
    assert out.backward.vjps > 0
    with torch.no_grad():
        for p in layer.parameters():
            p -= 1e-3 * p.grad
        assert float(layer(x).z.square().sum()) < float(loss.detach())


@pytest.mark.parametrize("stop", [Residual, EndTime, FixedSteps])
def test_per_sample_is_refused_where_rows_interact(stop):
    solver, adjoint = (Tsit5(), Unroll()) if stop is EndTime else (Picard(), Unroll())
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        make(solver, stop(per_sample=True), adjoint, cell=CentredCell())
    assert str(refusal.value) == (
        "per-sample stopping needs independent samples, but this network uses batch statistics; "
        "use stop.per_sample=false or network.norm=group"
    )


@pytest.mark.parametrize(
    ("per_sample", "cell", "wanted"),
    [("auto", TanhCell(), True), ("auto", CentredCell(), False), (True, TanhCell(), True), (False, TanhCell(), False),
     (False, CentredCell(), False)],
)  # fmt: skip
def test_per_sample_is_automatic(per_sample, cell, wanted):
    layer = make(Picard(), Residual(1e-4, max_steps=300, per_sample=per_sample), IFT(), cell=cell)
    x = random(6, 4, seed=7) * torch.logspace(-3, 1, 6).double()[:, None]
    steps = layer(x).solution.stats.steps.tolist()
    assert (len(set(steps)) > 1) == wanted
    assert layer.reduce.per_sample == wanted


def test_samples_do_not_see_each_other():
    """Per sample, the answer for an image is the same in any batch, and alone."""
    layer, x = make(Anderson(), Residual(1e-3), IFT()), random(6, 4, seed=7)
    z = layer(x).z.detach()
    for i in range(6):
        torch.testing.assert_close(layer(x[i : i + 1]).z.detach(), z[i : i + 1], rtol=0, atol=1e-12)
    coupled = make(Anderson(), Residual(1e-3), IFT(), cell=CentredCell())
    assert float((coupled(x).z[:1] - coupled(x[:1]).z).detach().abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"solver": "broyden"}, "ImplicitLayer wants a solver such as Broyden(), not 'broyden'"),
        ({"adjoint": IFT}, "ImplicitLayer wants an adjoint such as IFT(), not the class IFT"),
        ({"stop": 1e-3}, "ImplicitLayer wants a stop such as Residual(1e-3), not 0.001"),
        ({"solver": Picard}, "ImplicitLayer wants a solver such as Broyden(), not the class Picard"),
    ],
)
def test_what_is_no_part_of_a_layer_is_refused_at_once(wrong, said):
    cell = TanhCell()
    parts = {"solver": Picard(), "stop": Residual(), "adjoint": IFT(), **wrong}
    with pytest.raises(TypeError) as refusal:
        ImplicitLayer(cell, Zero(network(cell)), **parts)
    assert str(refusal.value) == said


def test_a_network_in_the_place_of_its_cell_is_refused():
    with pytest.raises(TypeError, match=r"ImplicitLayer wants a cell such as network\.cell, not Dense"):
        ImplicitLayer(Dense((1, 8, 8), 10), None, Picard(), Residual(), IFT())


def test_a_size_that_is_not_that_of_the_state_is_said():
    network = Dense((1, 8, 8), 10)
    network.cell.size = 100
    layer = ImplicitLayer(network.cell, SkipNet(network), Anderson(), Residual(), IFT())
    with pytest.raises(ValueError, match=r"the start has \(128,\) numbers a sample, but cell.size is 100"):
        layer(torch.randn(3, 128))
