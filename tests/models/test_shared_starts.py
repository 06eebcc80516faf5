"""Starts that are the same for all images: alternating, shared, data_mean, in any layout, and how they are trained."""

import jobs
import pytest
import torch
from problems import TanhCell, close, network, random
from torch.nn import functional as nnf

from implicit_bench import config
from implicit_bench.adjoints import IFT
from implicit_bench.core import Residual
from implicit_bench.device import Device
from implicit_bench.models import Alternating, DataMean, HomoConv, ImplicitLayer, Mdeq, Shared
from implicit_bench.solvers import Anderson
from implicit_bench.train import Step

STARTS = [Alternating, Shared, DataMean]


def step_of(tmp_path, *words, steps=10):
    job = config.compose("train", jobs.words(tmp_path, "network.groups=4", "network.width=8", *words))
    parts = config.build(job.config)
    return Step(parts.model, parts.penalties, parts.recipe, Device("cpu", threads=1), steps)


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(16, 1, 8, 8, generator=g), torch.randint(10, (16,), generator=g)


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_start_is_a_number_a_channel_of_each_branch_in_any_layout(init, channels_last):
    net = Mdeq((3, 8, 8), 5, channels=(4, 6), head=(2, 2), features=4)
    start = init(net)
    if init is DataMean:
        values = torch.cat([torch.arange(4.0).repeat_interleave(64), torch.arange(6.0).repeat_interleave(16)])
        start.observe(values.expand(3, -1))  # as the state lies in the plain layout
    if channels_last:
        net.to(memory_format=torch.channels_last)
    z = start(random(5, 4, 8, 8).float(), None)
    assert z.shape == (5, net.cell.size)
    for part in net.scales.unpack(z.detach()):
        channels = torch.arange(part.shape[1]).float()
        wanted = channels if init is DataMean else channels % 2 * 2 - 1
        assert torch.equal(part, wanted.view(1, -1, 1, 1).expand_as(part))


@pytest.mark.parametrize("init", STARTS)
def test_any_network_and_any_model_can_have_it(init):
    """A state without pixels: each number is a channel."""
    cell = TanhCell()
    layer = ImplicitLayer(cell, init(network(cell)).double(), Anderson(), Residual(1e-6), IFT())
    out = layer(random(3, 4))
    wanted = torch.zeros(4) if init is DataMean else torch.tensor([-1.0, 1.0, -1.0, 1.0])
    close(out.start.detach(), wanted.double().expand(3, -1), 0)
    assert out.solution.status.eq(0).all()
    assert layer.init.calls == 0


def test_the_data_mean_is_a_running_mean_of_the_solutions_of_training():
    cell = TanhCell()
    layer = ImplicitLayer(cell, DataMean(network(cell), window=3).double(), Anderson(), Residual(1e-9), IFT())
    zs = [layer(random(5, 4, seed=k)).z.detach().mean(0) for k in range(3)]
    close(layer.init.mean, sum(zs) / 3, 1e-14)
    last = layer(random(5, 4, seed=9)).z.detach().mean(0)
    close(layer.init.mean, sum(zs) / 3 * (2 / 3) + last / 3, 1e-14)
    before = layer.init.mean.clone()
    layer.eval()(random(5, 4))
    assert torch.equal(layer.init.mean, before)
    assert set(layer.init.state_dict()) == {"mean", "batches"}


def test_a_batch_that_is_not_finite_does_not_spoil_the_data_mean():
    start = DataMean(network(TanhCell()))
    for value in (torch.nan, 1.0, torch.inf, 3.0):
        start.observe(torch.tensor([[value, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    assert start.mean.tolist() == [1.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("settings", "sentence"), [
    ((Shared, {"lr": 0}), "init.lr=0 must be positive, and init.every=20 at least 1"),
    ((Shared, {"every": 0}), "init.lr=0.04 must be positive, and init.every=0 at least 1"),
    ((DataMean, {"window": 0}), "init.window=0 must be at least 1"),
])  # fmt: skip
def test_an_impossible_setting_is_refused_in_a_sentence(settings, sentence):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        settings[0](HomoConv((3, 8, 8), 5), **settings[1])
    assert str(refusal.value) == sentence


def test_the_shared_start_moves_by_its_own_sgd_every_few_steps(tmp_path):
    step = step_of(tmp_path, "model=homo_ode", "init.lr=50.0", "init.every=3", "recipe.optimizer=adam")
    point, moved = step.model.layer.init.point, []
    assert step.stateful == [step.optimizer, step.schedule, *step.start]  # what a checkpoint holds
    assert not any(p is point for group in step.optimizer.param_groups for p in group["params"])
    for k in range(7):
        before = point.detach().clone()
        x, y = batch(k)
        torch.manual_seed(k)  # of the mask
        out = step.model(x)
        (slope,) = torch.autograd.grad(nnf.smooth_l1_loss(out.layer.start, out.layer.z.detach()), point)
        lr = step.start[0].param_groups[0]["lr"]
        torch.manual_seed(k)
        step(x, y)
        moved.append(not torch.equal(point.detach(), before))
        if moved[-1]:
            assert torch.allclose(point.detach(), before - lr * slope, atol=1e-4)
    assert moved == [True, False, False, True, False, False, True]
    assert step.start[1].T_max == 3  # of ten steps: a whole cosine
    rates = step.start[0].param_groups[0]["lr"]
    assert rates == pytest.approx(1e-6)


def test_a_model_without_one_has_no_second_optimiser(tmp_path):
    step = step_of(tmp_path, "model=homo_ode", "init=alternating", "penalty=[none]")
    assert step.stateful == [step.optimizer, step.schedule]
    step(*batch())
    assert sum(p.numel() for p in step.model.layer.init.parameters()) == 0
