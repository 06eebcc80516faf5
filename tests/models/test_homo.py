"""HomoODE's network and ANODE's (arXiv 2310.09583, 1904.01681): sizes, equations, stock torchdiffeq beside them."""

import pytest
import torch
import torch.nn.functional as nnf
from problems import close, cosine, counted, random
from torch import nn
from torchdiffeq import odeint

from implicit_bench.adjoints import IFT, Backsolve, Unroll
from implicit_bench.core import EndTime, FixedSteps, Residual
from implicit_bench.models import (
    Alternating,
    Classifier,
    FZero,
    HomoConv,
    ImplicitLayer,
    InitFit,
    NodeConv,
    Shared,
    Stem,
    StemZeros,
    Zero,
)  # fmt: skip
from implicit_bench.solvers import RK4, Anderson, Dopri5, Picard, TorchDiffeq

CIFAR, MNIST = (3, 32, 32), (1, 28, 28)


def model_of(net, init, solver=None, adjoint=None, field="ode", stop=None):
    init = init(net).to(next(net.parameters()).dtype)
    layer = ImplicitLayer(net.cell, init, solver or RK4(0.25), stop or EndTime(), adjoint or Unroll(), field)
    return Classifier(net, layer)


def small(seed=0, shape=(3, 8, 8), classes=5, **settings):
    """In float64 with every parameter random, those of the norms too."""
    torch.manual_seed(seed)
    net = HomoConv(shape, classes, **{"width": 8, "features": 6, "groups": 4, **settings}).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return net


IMAGES = random(4, 3, 8, 8, seed=3)


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("shape", "classes", "settings", "total"),
    [(CIFAR, 10, {}, 132_938), (CIFAR, 100, {}, 565_988), ((3, 64, 64), 200, {"groups": 8}, 617_288),
     (MNIST, 10, {}, 131_786), (CIFAR, 10, {"inject": "frozen"}, 132_938),
     (CIFAR, 10, {"inject": "state"}, 132_938 + 74_112)],
)  # fmt: skip
def test_homo_conv_has_the_parameters_of_the_released_code(shape, classes, settings, total):
    with torch.device("meta"):
        net = HomoConv(shape, classes, **settings)
    assert sum(p.numel() for p in net.parameters()) == total


def test_its_parts_and_its_state():
    net = HomoConv(CIFAR, 10)
    assert model_of(net, Shared).parameter_counts() == {"stem": 38_976, "cell": 74_112, "head": 19_850, "init": 64}
    assert net.scales.shapes == [(64, 16, 16)]
    assert HomoConv(CIFAR, 100).scales.shapes == HomoConv((3, 64, 64), 200).scales.shapes == [(128, 16, 16)]
    assert HomoConv(MNIST, 10).scales.shapes == [(64, 14, 14)]


@pytest.mark.parametrize(
    ("shape", "inject", "total"),
    [(CIFAR, "start", 173_611), (CIFAR, "state", 172_452), (MNIST, "start", 85_316), (MNIST, "state", 85_462)],
)
def test_node_conv_has_the_parameters_of_anodes_code(shape, inject, total):
    with torch.device("meta"):
        net = NodeConv(shape, 10, inject=inject)
    assert sum(p.numel() for p in net.parameters()) == total


@pytest.mark.parametrize(
    ("net", "settings", "sentence"),
    [(HomoConv, {"width": -4}, "network.width=-4, network.features=-16 and network.groups=32 must be at least 1"),
     (HomoConv, {"dropout": 1.0}, "network.dropout=1.0 must be a probability below 1"),
     (HomoConv, {"untied": 3, "inject": "state"}, "network.untied=3 is for network.inject=field, not state"),
     (NodeConv, {"extra": 0}, "network.filters=125 and network.extra=0 must be at least 1"),
     (NodeConv, {"untied": -1}, "network.untied=-1 must not be negative")],
)  # fmt: skip
def test_an_impossible_setting_is_refused_in_a_sentence(net, settings, sentence):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        net(CIFAR, 10, **settings)
    assert str(refusal.value) == sentence


# --------------------------------------------------------------------------------------------------------- equations


def written_out(net, images, z, mask=None):
    """Stem, field and head in torch's functions, from homoode.md 1.2 and 2: (x, F(z; x), logits of z)."""
    p, groups = dict(net.named_parameters()), 4

    def bn(a, name):
        return nnf.batch_norm(a, None, None, p[f"{name}.weight"], p[f"{name}.bias"], training=True)

    def gn(a, name):
        return nnf.group_norm(a, groups, p[f"{name}.weight"], p[f"{name}.bias"])

    def conv(a, name, **more):
        return nnf.conv2d(a, p[f"{name}.weight"], p[f"{name}.bias"], **more)

    x = bn(conv(images, "stem.0", padding=1), "stem.1").relu()
    x = bn(conv(x, "stem.3", stride=2, padding=1), "stem.4").relu()
    z = z.view_as(x)
    a = gn(conv(z, "cell.field.first", padding=1), "cell.field.inner").relu() + x
    b = conv(a, "cell.field.second", padding=1)
    F = gn(b if mask is None else b * mask, "cell.field.outer")
    y = gn(z, "head.1").relu()
    y = bn(conv(y, "head.3"), "head.4").relu().mean((2, 3))
    return x, F.flatten(1), y @ p["head.8.weight"].T + p["head.8.bias"]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_stem_field_and_head_are_the_equations(dropout, channels_last):
    net, z = small(dropout=dropout), random(4, 8 * 16, seed=5)
    x = net.stem(IMAGES)
    ctx = net.cell.begin(x)
    wanted_x, wanted_F, wanted_y = written_out(net, IMAGES, z, ctx.masks[0])
    if channels_last:
        net.to(memory_format=torch.channels_last)
        z = net.scales.from_channels(z)
    close(net.stem(IMAGES), wanted_x, 1e-12)
    F = net.cell(z, ctx, z.new_zeros(4))
    close(net.scales.by_channel(F), wanted_F, 1e-12)
    close(net.head(z), wanted_y, 1e-12)


def test_one_channel_mask_a_solve_and_none_in_evaluation():
    net, x, z = small(dropout=0.5), random(40, 8, 4, 4), random(40, 128)
    ctx = net.cell.begin(x)
    (mask,) = ctx.masks
    assert mask.shape == (40, 8, 1, 1)
    assert set(mask.unique().tolist()) == {0.0, 2.0}  # scaled by 1 / (1 - p)
    assert 0.3 < float(mask.mean()) / 2 < 0.7
    assert torch.equal(net.cell(z, ctx, z[:, 0]), net.cell(z, ctx, z[:, 0]))  # the same in every call of a solve
    assert net.eval().cell.begin(x).masks == [None]


def test_gradients_of_the_cells():
    net = small(dropout=0.2)
    x, z = random(2, 8, 4, 4).requires_grad_(), random(2, 128).requires_grad_()
    ctx = net.cell.begin(x)
    assert torch.autograd.gradcheck(lambda z, x: net.cell(z, ctx._replace(x=x), None), (z, x), fast_mode=True)
    node = NodeConv((3, 4, 4), 5, filters=4, extra=2, inject="state").double()
    z, t = random(2, node.cell.size).requires_grad_(), random(2)
    assert torch.autograd.gradcheck(lambda z: node.cell(z, (), t), (z,), fast_mode=True)


def test_node_conv_is_the_equations():
    net = NodeConv((3, 4, 4), 5, filters=6, extra=2, inject="state").double()
    z, t = random(2, 5 * 16), torch.tensor([0.2, 0.9]).double()
    a = z.view(2, 5, 4, 4)
    for i, conv in enumerate(net.cell.convs):
        time = t.view(2, 1, 1, 1).expand(2, 1, 4, 4)
        a = nnf.conv2d(torch.cat([time, a.relu() if i else a], 1), conv.weight, conv.bias, padding=(0, 1, 0)[i])
    close(net.cell(z, (), t), a.flatten(1), 1e-14)
    images = random(2, 3, 4, 4)
    close(StemZeros(net)(net.stem(images), None), torch.cat([images.flatten(1), torch.zeros(2, 32).double()], 1), 0)
    linear = net.head[-1]
    wanted = z @ linear.weight.T + linear.bias
    close(net.head(z), wanted, 1e-14)
    net.to(memory_format=torch.channels_last)  # the weights of a run on a GPU, evaluated on a CPU
    close(net.head(net.scales.from_channels(z)), wanted, 1e-14)


# ------------------------------------------------------------------------------------- against a stock torchdiffeq


class Script(nn.Module):
    """HomoODE as a user of torchdiffeq would write it, on (B, C, H, W), with the condition closed over."""

    def __init__(self, net, start):
        super().__init__()
        self.net, self.start, self.nfe = net, start, 0

    def forward(self, images):
        x, cell = self.net.stem(images), self.net.cell.field

        def F(t, z):
            self.nfe += 1
            return cell.outer(cell.second(torch.relu(cell.inner(cell.first(z))) + x))

        z0 = self.start.view(1, -1, 1, 1).expand(len(x), -1, *x.shape[2:]).contiguous()
        z = odeint(F, z0, torch.tensor([0.0, 1.0], dtype=x.dtype), rtol=1e-3, atol=1e-3, method="dopri5")[-1]
        return self.net.head(z.flatten(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_homo_ode_is_a_stock_torchdiffeq_script_to_the_bit(dtype):
    net = small(dropout=0.0).to(dtype)
    start = Alternating(net).point.to(dtype)
    images, y = IMAGES.to(dtype), torch.arange(4)
    script, model = Script(net, start), model_of(net, Shared, TorchDiffeq("dopri5", 1e-3, 1e-3))
    wanted = script(images)
    grads = torch.autograd.grad(nnf.cross_entropy(wanted, y), list(net.parameters()))
    out = model(images)
    assert torch.equal(out.logits, wanted)
    nfe = out.layer.solution.stats.calls
    assert nfe == script.nfe
    assert nfe % 6 == 2
    for got, want in zip(torch.autograd.grad(nnf.cross_entropy(out.logits, y), list(net.parameters())), grads):
        assert torch.equal(got, want)


# ------------------------------------------------------------------------------------------------ ANODE, neural ODEs


@pytest.mark.parametrize("adjoint", [Unroll(), Backsolve()], ids=["unroll", "backsolve"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_anode_with_its_h_frozen_is_homo_ode_from_zero(adjoint, dropout):
    """In fixed steps, since the norm of an adaptive method would see the channels of h."""
    homo, anode = small(dropout=dropout), small(dropout=dropout, inject="frozen")
    assert anode.cell.size == 2 * homo.cell.size
    results = []
    for net, init in ((homo, Zero), (anode, StemZeros)):
        torch.manual_seed(1)  # of the masks
        out = model_of(net, init, adjoint=adjoint)(IMAGES)
        nnf.cross_entropy(out.logits, torch.arange(4)).backward()
        results.append([out.logits.detach(), *(p.grad for p in net.parameters())])
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-12)
    moving = small(dropout=dropout, inject="state")
    torch.manual_seed(1)
    assert float((model_of(moving, StemZeros)(IMAGES).logits.detach() - results[0][0]).abs().max()) > 1e-3


def test_a_moving_h_has_a_field_of_its_own():
    net, z = small(inject="state", dropout=0.5), random(4, 2 * 128)
    h, p = (part.view(4, 8, 4, 4) for part in z.split(128, 1))
    ctx = net.cell.begin(net.stem(IMAGES))
    dh, dp = net.cell(z, ctx, None).split(128, 1)
    close(dp.view_as(p), net.cell.field(p, h, ctx.masks[0]), 1e-13)
    close(dh.view_as(p), net.cell.h_field(h, p, ctx.masks[1]), 1e-13)


def solver_of(name):
    return {"rk4": RK4(0.01), "dopri5": Dopri5(1e-9, 1e-9), "torchdiffeq": TorchDiffeq("dopri5", 1e-8, 1e-8)}[name]


@pytest.mark.parametrize("solver", ["rk4", "dopri5", "torchdiffeq"])
def test_a_neural_odes_stem_learns_through_its_start(solver):
    """The only way there: x is z0 and nowhere else. The continuous adjoint's a(0) against the unrolled steps."""
    net = NodeConv((3, 4, 4), 5, filters=4, extra=1, inject="state").double()
    net.stem = nn.Conv2d(3, 3, 1).double()
    images, grads = random(4, 3, 4, 4), []
    for adjoint in (Unroll(), Backsolve(max_steps=5000)):
        out = model_of(net, StemZeros, solver_of(solver), adjoint)(images)
        loss = nnf.cross_entropy(out.logits, torch.arange(4))
        grads.append(torch.autograd.grad(loss, [*net.stem.parameters(), *net.cell.parameters()]))
    assert all(float(g.abs().max()) > 1e-4 for g in grads[0][:2])
    assert cosine(*grads) > 0.999999  # the kinks of relu cost the rest
    assert cosine(grads[0][:2], grads[1][:2]) > 0.9999


def test_pretraining_reaches_the_stem_through_the_start_too():
    net = small(inject="start", untied=0)
    model = model_of(net, Stem)
    model(IMAGES, depth=2).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.stem.parameters())


def test_a_cell_that_does_not_see_x_wants_a_start_that_does():
    net = small(inject="start")
    with pytest.raises(ValueError, match=r"^the cell does not see x, and init=zero does not either; use init=stem, "):
        model_of(net, Zero)
    with pytest.raises(ValueError, match=r"^the cell does not see x, so that stop=residual would find one "):
        model_of(net, Stem, Anderson(), IFT(), "equilibrium", Residual())
    with pytest.raises(ValueError, match=r"^the cell sees x in its start alone, to which adjoint=ift sends no gradie"):
        model_of(net, Stem, Picard(), IFT(), "equilibrium", FixedSteps(3))
    with pytest.raises(ValueError, match=r"^the cell does not see x, and init=f_zero does not either"):
        model_of(net, FZero)
    model_of(net, Stem, Picard(), Unroll(), "equilibrium", FixedSteps(3))(IMAGES)
    with pytest.raises(ValueError, match=r"^init=stem has 128 numbers a sample, but the state 256; use init="):
        model_of(small(inject="state"), Stem)(IMAGES)


def test_an_images_logits_do_not_depend_on_its_batch():
    """Batch 1 and 128 in float64: group norm, per-sample step sizes, and an evaluation with running statistics."""
    net = small(dropout=0.3)
    images = random(128, 3, 8, 8, seed=9) * torch.logspace(-2, 1, 128).double().view(-1, 1, 1, 1)
    model = model_of(net, Shared, Dopri5(1e-3, 1e-3))
    model(images)  # running statistics
    model.eval()
    with torch.no_grad():
        whole, alone = model(images), torch.cat([model(image[None]).logits for image in images])
    close(whole.logits, alone, 1e-5)
    assert len(whole.layer.solution.stats.nfe.unique()) > 1  # each in its own number of evaluations


# ------------------------------------------------------------------------------------------------- the shared start


class InitLayer(nn.Module):
    """The released code's: conv1x1 of ones, without bias, then a group norm."""

    def __init__(self, width, groups):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, width, 1, bias=False), nn.GroupNorm(groups, width)

    def forward(self, n, side):
        return self.norm(self.conv(torch.ones(n, 1, *side).to(self.conv.weight)))


def test_in_groups_of_two_the_papers_start_is_one_number_a_channel_at_twice_its_rate():
    net = small()
    theirs, ours = InitLayer(8, 4).double(), Shared(net, lr=0.1, every=1)
    with torch.no_grad():  # of each pair one below, one above: -1 and 1
        theirs.conv.weight.copy_(torch.tensor([-1.0, 1.0]).repeat(4).view(8, 1, 1, 1) * 100)
    sgd, (own, schedule) = torch.optim.SGD(theirs.parameters(), 0.05), ours.optimizer(10**9)
    for k in range(5):
        z = random(4, 8 * 16, seed=k)
        nnf.smooth_l1_loss(theirs(4, (4, 4)).flatten(1), z).backward()
        nnf.smooth_l1_loss(ours.double()(z, None), z).backward()
        for optimizer in (sgd, own):
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
    wanted = theirs(1, (4, 4))[0, :, 0, 0].detach()
    assert float((wanted - Alternating(net).point).abs().min()) > 0.005
    close(ours.point.detach(), wanted, 1e-6)


def test_the_start_learns_from_its_fit_alone():
    net = small()
    model = model_of(net, Shared, TorchDiffeq())
    calls = counted(net.cell)
    out = model(IMAGES)
    assert len(calls) == out.layer.calls(0)
    nnf.cross_entropy(out.logits, torch.arange(4)).backward(retain_graph=True)
    assert model.layer.init.point.grad is None
    before = [p.grad.clone() for p in net.parameters()]
    InitFit(3.0)(out.layer, None).backward()
    assert all(torch.equal(p.grad, b) for p, b in zip(net.parameters(), before))
    z, z0 = net.scales.unpack(out.layer.z.detach())[0], model.layer.init.point.detach().view(8, 1, 1)
    slope = (z0 - z).clamp(-1, 1).sum((0, 2, 3)) / z.numel()
    close(model.layer.init.point.grad, 3 * slope, 1e-12)
