"""The dense network's size, the cells, the classifier's ways through them."""

import pytest
import torch
from problems import TanhCell, close, counted, random

from implicit_bench.adjoints import IFT, JFB, Unroll
from implicit_bench.core import EndTime, FixedSteps, Residual
from implicit_bench.models import Classifier, Dense, DenseCell, FZero, ImplicitLayer, SkipNet, UntiedCell, Zero
from implicit_bench.solvers import Anderson, Picard, TorchDiffeq, Tsit5


def classifier(shape=(1, 4, 4), hidden=6, init=Zero, untied=0, solver=None, stop=None, adjoint=None, seed=0):
    torch.manual_seed(seed)
    net = Dense(shape, 10, hidden, untied)
    layer = ImplicitLayer(net.cell, init(net), solver or Anderson(), stop or Residual(1e-2), adjoint or IFT())
    return Classifier(net, layer).double()


IMAGES = random(5, 1, 4, 4)


@pytest.mark.parametrize(
    ("shape", "init", "total"),
    [((1, 28, 28), Zero, 134_538), ((1, 28, 28), FZero, 134_538), ((1, 28, 28), SkipNet, 151_050),
     ((1, 8, 8), SkipNet, 58_890), ((1, 8, 8), Zero, 42_378)],
)  # fmt: skip
def test_parameter_counts_are_the_papers(shape, init, total):
    model = classifier(shape, 128, init)
    parts = model.parameter_counts()
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters()) == total
    pixels = shape[1] * shape[2]
    assert parts == {"stem": pixels * 128 + 128, "cell": 2 * 128 * 128, "head": 1290,
                     "init": 128 * 128 + 128 if init is SkipNet else 0}  # fmt: skip


def test_the_saved_weights_hold_each_parameter_once():
    model = classifier(init=SkipNet)
    assert sorted(model.state_dict()) == sorted(dict(model.named_parameters()))


def test_the_dense_cell_is_the_papers():
    """f(z, x) = relu(W z) + relu(U x), no bias, for parameters set by hand."""
    cell = DenseCell(2).double()
    with torch.no_grad():
        cell.W.weight.copy_(torch.tensor([[1.0, -2.0], [0.0, 3.0]]))
        cell.U.weight.copy_(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    z, x = torch.tensor([[1.0, 2.0], [2.0, -1.0]]).double(), torch.tensor([[5.0, -4.0], [-1.0, 7.0]]).double()
    close(cell(z, cell.begin(x), z.new_zeros(2)).detach(), torch.tensor([[0.0, 6.0], [4 + 7.0, 1.0]]).double(), 0)
    assert cell.batch_independent
    assert [n for n, _ in cell.named_parameters()] == ["W.weight", "U.weight"]


def test_stem_head_and_predictor():
    model = classifier(init=SkipNet)
    p = dict(model.named_parameters())
    x = (IMAGES.flatten(1) @ p["stem.1.weight"].T + p["stem.1.bias"]).relu()
    close(model.stem(IMAGES), x, 1e-14)
    close(model.layer.init(x, None), (x @ p["layer.init.g.0.weight"].T + p["layer.init.g.0.bias"]).relu(), 1e-14)
    out = model(IMAGES)
    close(out.logits, out.layer.z @ p["head.weight"].T + p["head.bias"], 1e-14)


def apply(cell, x, k, z=None):
    z = torch.zeros(len(x), cell.size).double() if z is None else z
    for _ in range(k):
        z = cell(z, cell.begin(x), z.new_zeros(len(z)))
    return z


@pytest.mark.parametrize("k", [1, 2, 7])
@pytest.mark.parametrize("init", [Zero, FZero, SkipNet])
def test_unrolled_is_k_nested_cells_with_ordinary_gradients(k, init):
    model = classifier(init=init, solver=Tsit5())  # pretraining ignores the solver
    calls = counted(model.layer.cell)
    out = model(IMAGES, depth=k)
    assert len(calls) == out.layer.calls(model.layer.init.calls) == k + model.layer.init.calls
    x = model.stem(IMAGES)
    z = apply(model.layer.cell, x, k, out.layer.start.detach())
    close(out.logits, model.head(z), 1e-13)
    cell = model.layer.cell.W.weight, model.stem[1].weight
    got, wanted = (torch.autograd.grad(v.square().sum(), cell, allow_unused=True) for v in (out.logits, model.head(z)))
    for a, b in zip(got, wanted):
        close(a, b, 1e-12)


def test_without_a_depth_it_is_a_solve():
    model = classifier(stop=Residual(1e-10, max_steps=200))
    out = model(IMAGES)
    close(out.layer.z, apply(model.layer.cell, model.stem(IMAGES), 300), 1e-8)
    assert float((out.logits - model(IMAGES, depth=2).logits).detach().abs().max()) > 1e-4


@pytest.mark.parametrize("init", [Zero, FZero, SkipNet])
def test_within_no_step_is_the_head_on_the_start(init):
    model = classifier(init=init)
    calls = counted(model.layer.cell)
    logits = model.within(IMAGES, 0)
    assert len(calls) == model.layer.init.calls
    x = model.stem(IMAGES)
    start = {"Zero": torch.zeros(5, 6).double(), "FZero": apply(model.layer.cell, x, 1),
             "SkipNet": model.layer.init.g(x) if init is SkipNet else None}[init.__name__]  # fmt: skip
    close(logits, model.head(start).detach(), 1e-14)
    assert not logits.requires_grad


@pytest.mark.parametrize("k", [1, 2, 4])
def test_within_k_steps_calls_the_cell_k_times(k):
    model = classifier(solver=Picard())
    calls = counted(model.layer.cell)
    logits = model.within(IMAGES, k)
    assert len(calls) == k
    close(logits, model.head(apply(model.layer.cell, model.stem(IMAGES), k)).detach(), 1e-13)
    anderson = classifier()
    calls = counted(anderson.layer.cell)
    anderson.within(IMAGES, k)
    assert len(calls) == k


@pytest.mark.parametrize(("solver", "stop"), [(Tsit5(), Residual(1e-2)), (TorchDiffeq(), EndTime())])
def test_a_solver_of_many_calls_a_step_cannot_be_held_to_k(solver, stop):
    """torchdiffeq was asked to integrate to infinity here, and did not return."""
    model = classifier(solver=solver, stop=stop)
    with pytest.raises(ValueError, match=r"solver=(tsit5|torchdiffeq/dopri5) does not make one evaluation"):
        model.within(IMAGES, 2)
    assert model.within(IMAGES, 0).shape == (5, 10)


def test_untied_cells_are_applied_once_each_and_in_turn():
    model = classifier(untied=3, solver=Picard(), stop=FixedSteps(3), adjoint=Unroll())
    cells = model.layer.cell.cells
    counts = [counted(cell) for cell in cells]
    out = model(IMAGES)
    x = model.stem(IMAGES)
    z = torch.zeros(5, 6).double()
    for cell in cells:
        z = apply(cell, x, 1, z)
    close(out.logits, model.head(z), 1e-13)
    assert [len(c) for c in counts] == [2, 2, 2]  # once in the model, once here
    assert out.layer.backward.vjps == 0
    grads = torch.autograd.grad(out.logits.sum(), [c.W.weight for c in cells[1:]])
    assert all(float(g.abs().max()) > 0 for g in grads)
    close(model.within(IMAGES, 2), model.head(apply(cells[1], x, 1, apply(cells[0], x, 1))).detach(), 1e-13)
    assert sum(p.numel() for p in model.layer.cell.parameters()) == 3 * 2 * 36


def test_an_untied_cell_too_many_is_a_sentence():
    """A start that calls the cell, or a pretraining deeper than the network, ran off its end."""
    sentence = "each of the 3 untied cells is applied once a solve, but there was one call more"
    model = classifier(untied=3, init=FZero, solver=Picard(), stop=FixedSteps(3), adjoint=Unroll())
    with pytest.raises(ValueError, match=sentence):
        model(IMAGES)
    model = classifier(untied=3, solver=Picard(), stop=FixedSteps(3), adjoint=Unroll())
    with pytest.raises(ValueError, match=sentence):
        model(IMAGES, depth=4)


def test_untied_cells_know_whether_samples_are_independent():
    coupled = TanhCell()
    coupled.batch_independent = False
    assert not UntiedCell([coupled]).batch_independent
    assert UntiedCell([TanhCell()]).batch_independent


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(hidden=0), "network.hidden=0 must be at least 1"),
        (dict(untied=-1), "network.untied=-1 must not be negative"),
    ],
)
def test_an_impossible_setting_is_refused_in_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Dense((1, 4, 4), 10, **settings)


def test_training_and_evaluation_are_the_same_function():
    for adjoint in (IFT(), JFB(), Unroll()):
        model = classifier(init=SkipNet, adjoint=adjoint)
        tracked = model(IMAGES)
        with torch.no_grad():
            plain = model(IMAGES)
        close(plain.logits, tracked.logits.detach(), 1e-13)
