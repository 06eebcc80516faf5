"""The multiscale network: the first paper's sizes (arXiv 2201.12240) and its equations, written out a second time."""

import math

import pytest
import torch
import torch.nn.functional as nnf
from problems import close, cosine, random

from implicit_bench.adjoints import IFT, Backsolve, Unroll
from implicit_bench.core import EndTime, FixedSteps, Residual
from implicit_bench.models import Classifier, FZero, ImplicitLayer, Mdeq, Skip, SkipNet, UntiedCell, Zero
from implicit_bench.models.mdeq import Conv
from implicit_bench.solvers import Anderson, Picard, Tsit5

SMALL = dict(channels=(24, 24), head=(8, 16))
LARGE = dict(channels=(32, 64, 128, 256), head=(14, 28, 56, 112), features=1680, expand=4, weight_norm=True)
IMAGENET = dict(channels=(32, 64, 128, 256), head=(24, 48, 96, 192), features=2048, weight_norm=True, downsampling=2)
TINY = dict(channels=(4, 4), head=(2, 3), features=6, expand=2)
THREE = dict(channels=(4, 6, 16), head=(1, 2, 3), features=6, expand=2)  # 0 -> 2 doubles twice
UNEVEN = dict(channels=(4, 6, 4), head=(1, 2, 3), features=6, expand=2)  # 0 -> 2 changes at the last


def network(seed=0, shape=(3, 8, 8), classes=5, **settings):
    """A small one in float64 whose parameters are all random, the affine ones of the norms and the biases too."""
    torch.manual_seed(seed)
    net = Mdeq(shape, classes, **{**TINY, **settings}).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return net


def inputs(net, batch=3, seed=1):
    """z (B, D), x (B, C, H, W)."""
    return random(batch, net.cell.size, seed=seed), random(batch, *net.scales.shapes[0], seed=seed + 1)


def times(z):
    return z.new_zeros(len(z))


def apply(net, z, x):
    return net.cell(z, net.cell.begin(x), times(z))


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("settings", "shape", "classes", "total", "with_skip_net", "state"),
    [(SMALL, (3, 32, 32), 10, 163_546, 200_122, 30_720), (LARGE, (3, 32, 32), 10, 10_631_958, 11_186_774, 61_440),
     (IMAGENET, (3, 224, 224), 1000, 17_912_456, 18_467_272, 188_160)],
    ids=["small", "large", "imagenet"],
)  # fmt: skip
def test_parameter_counts_are_the_papers(settings, shape, classes, total, with_skip_net, state):
    with torch.device("meta"):
        net = Mdeq(shape, classes, **settings)
        predictor = net.predictor()
    counts = [sum(p.numel() for p in part.parameters()) for part in (net, predictor)]
    assert (counts[0], sum(counts), net.cell.size) == (total, with_skip_net, state)


def test_the_small_networks_parts():
    net = Mdeq((3, 32, 32), 10)
    layer = ImplicitLayer(net.cell, SkipNet(net), Anderson(), Residual(), IFT())
    model = Classifier(net, layer)
    assert model.parameter_counts() == {"stem": 5_928, "cell": 116_064, "head": 41_554, "init": 36_576}
    assert net.scales.shapes == [(24, 32, 32), (24, 16, 16)]
    assert sum(p.numel() for p in model.parameters()) == 200_122
    saved = model.state_dict()
    buffers = {name.rpartition(".")[2] for name in saved.keys() - dict(model.named_parameters()).keys()}
    assert buffers == {"running_mean", "running_var", "num_batches_tracked"}
    assert all(name.startswith("head.bottlenecks.") for name in saved if "running" in name)


def test_convolutions_start_at_a_hundredth():
    torch.manual_seed(0)
    net = Mdeq((3, 32, 32), 10, weight_norm=True)
    convs = [m for m in [*net.modules(), *net.predictor().modules()] if isinstance(m, torch.nn.Conv2d)]
    weights = torch.cat([c.weight.detach().flatten() for c in convs])
    assert abs(float(weights.mean())) < 2e-4
    assert float(weights.std()) == pytest.approx(0.01, rel=0.01)
    assert all(float(c.weight.detach().std()) == pytest.approx(0.01, rel=0.2) for c in convs)
    assert [c.bias is not None for c in convs].count(True) == 2  # the head's way down, and its last
    assert not any(c.bias.any() for c in convs if c.bias is not None)
    close(convs[-1].weight, convs[-1].kernel(), 0)
    normed = next(c for c in convs if c.gain is not None)
    close(normed.kernel().detach(), normed.weight.detach(), 1e-8)  # weight norm does not change where it starts


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [(dict(channels=(4, 4, 4)), r"network.channels=[4, 4, 4] and network.head=[2, 3] must be lists of one length"),
     (dict(channels=(), head=()), "network.channels=[] and network.head=[] must be lists of one length"),
     (dict(expand=0), "network.features and network.expand must be at least 1, not [4, 4], [2, 3], 6 and 0"),
     (dict(dropout=1.0), "network.dropout=1.0 must be a probability below 1"),
     (dict(downsampling=3), "network.downsampling=3 must be 0, 1 or 2"),
     (dict(untied=-1), "network.untied=-1 must not be negative"),
     (dict(shape=(1, 28, 28), channels=(4, 4, 4, 4), head=(2, 2, 2, 2)),
      "network.channels=[4, 4, 4, 4] with network.downsampling=0 halves an image 3 times, but 28 x 28 cannot be; "
      "use fewer")],
)  # fmt: skip
def test_an_impossible_setting_is_refused_in_a_sentence(settings, sentence):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        Mdeq(**{"shape": (3, 8, 8), "classes": 5, **TINY, **settings})
    assert sentence in str(refusal.value)


# ------------------------------------------------------------------------------------------------------- the packing


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_row_is_its_branches_one_after_the_other(channels_last):
    net = network(**THREE)
    if channels_last:
        net.to(memory_format=torch.channels_last)
    scales, z = net.scales, inputs(net)[0]
    assert scales.channels_last == channels_last
    parts = scales.unpack(z)
    assert [tuple(p.shape) for p in parts] == [(3, 4, 8, 8), (3, 6, 4, 4), (3, 16, 2, 2)]
    assert all(p.untyped_storage().data_ptr() == z.untyped_storage().data_ptr() for p in parts)  # views
    assert torch.equal(scales.pack(parts), z)
    at = 4 * 64 + (5 * 6 + 1 if channels_last else 1 * 16 + 5)  # channel 1, pixel 5 of the second branch
    assert torch.equal(parts[1][:, 1, 1, 1], z[:, at])
    z = z.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: scales.pack([p.sin() for p in scales.unpack(v)]), z)


# ----------------------------------------------------------------------------------------- the equations, written out


class Naive:
    """f(z, x) as the facts have it, on the parameters of `net` by name: no modules, nothing in place."""

    def __init__(self, net, predictor=None):
        self.p = dict(net.named_parameters())
        if predictor is not None:
            self.p |= {f"predictor.{name}": p for name, p in predictor.named_parameters()}
        self.style, self.net = net.style, net

    def conv(self, name, a, stride=1):
        w = self.p[f"{name}.weight"]
        if f"{name}.gain" in self.p:
            w = torch.stack([g * v / v.square().sum().sqrt() for g, v in zip(self.p[f"{name}.gain"], w)])
        return nnf.conv2d(a, w, self.p.get(f"{name}.bias"), stride, w.shape[-1] // 2)

    def norm(self, name, a, stats=None):
        w, b = self.p[f"{name}.weight"][:, None, None], self.p[f"{name}.bias"][:, None, None]
        if self.style.norm == "group":
            groups = next(g for g in range(8, 0, -1) if 8 % g == 0 and a.shape[1] % g == 0)
            v = a.unflatten(1, (groups, -1))
            mean, var = v.mean((2, 3, 4), keepdim=True), v.var((2, 3, 4), unbiased=False, keepdim=True)
            return ((v - mean) / (var + 1e-5).sqrt()).flatten(1, 2) * w + b
        mean, var = stats or (a.mean((0, 2, 3)), a.var((0, 2, 3), unbiased=False))
        return (a - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt() * w + b

    def cnr(self, name, a, stride=1):
        """conv, norm, relu: items 0, 1 of a Sequential, or 3, 4, ..."""
        at = int(name.rpartition(".")[2])
        prefix = name.rpartition(".")[0]
        return self.norm(f"{prefix}.{at + 1}", self.conv(name, a, stride)).relu()

    def block(self, name, z, mask=1.0, x=0.0):
        c = self.conv(f"{name}.narrow", self.norm(f"{name}.inner", self.conv(f"{name}.widen", z)).relu())
        shortcut = z if self.style.residual == "mdeq" else c
        return self.norm(f"{name}.outer", (self.norm(f"{name}.mixed", c * mask + x) + shortcut).relu())

    def down(self, name, a, times, c_out):
        widths, c_in = [], a.shape[1]
        for k in range(times):
            a = self.cnr(f"{name}.{3 * k}", a, stride=2)
            widths.append(a.shape[1])
        doubles = c_in * 2**times == c_out
        assert widths == [c_in * 2 ** (k + 1) if doubles else c_out if k == times - 1 else c_in for k in range(times)]
        return a

    def cell(self, zs, x, masks):
        n, cs = len(zs), [z.shape[1] for z in zs]
        zs = [self.block(f"cell.blocks.{i}", zs[i], masks[i], x if i == 0 else 0.0) for i in range(n)]
        out = []
        for j in range(n):
            total = zs[j]
            for i in range(n):
                if i < j:
                    total = total + self.down(f"cell.fuse.{j}.{i}", zs[i], j - i, cs[j])
                if i > j:
                    small, k = self.cnr(f"cell.fuse.{j}.{i}.0", zs[i]), 2 ** (i - j)
                    total = total + small.repeat_interleave(k, 2).repeat_interleave(k, 3)
            out.append(self.norm(f"cell.norms.{j}", self.conv(f"cell.after.{j}", total).relu()))
        return out

    def stem(self, a, downsampling):
        strides = [2 if downsampling > k else 1 for k in (0, 1)]
        a = self.cnr("stem.3", self.cnr("stem.0", a, strides[0]), strides[1])
        return self.cnr("stem.6", a) if "stem.6.weight" in self.p else a

    def predictor(self, x):
        cs = [c for c, *_ in self.net.scales.shapes]
        first = self.block("predictor.block", x)
        return [first, *(self.down(f"predictor.down.{k - 1}", x, k, cs[k]) for k in range(1, len(cs)))]

    def head(self, zs):
        def bottleneck(i, z):
            def n(at):
                bn = self.net.head.get_submodule(f"bottlenecks.{i}.{at}")
                running = self.style.norm == "batch" and not bn.training
                stats = (bn.running_mean, bn.running_var) if running else None
                return lambda a: self.norm(f"head.bottlenecks.{i}.{at}", a, stats)

            name = f"head.bottlenecks.{i}.body"
            a = n("body.1")(self.conv(f"{name}.0", z)).relu()
            a = n("body.4")(self.conv(f"{name}.3", a)).relu()
            a = n("body.7")(self.conv(f"{name}.6", a))
            short = z if z.shape[1] == a.shape[1] else n("shortcut.1")(self.conv(f"head.bottlenecks.{i}.shortcut.0", z))
            return (a + short).relu()

        y = bottleneck(0, zs[0])
        for i, z in enumerate(zs[1:], 1):
            y = self.cnr(f"head.down.{i - 1}.0", y, stride=2) + bottleneck(i, z)
        y = self.cnr("head.last.0", y).mean(3).mean(2)
        return y @ self.p["head.linear.weight"].T + self.p["head.linear.bias"]


VARIANTS = [dict(), dict(residual="mdeq"), dict(norm="group"), dict(weight_norm=True), THREE, UNEVEN,
            dict(**THREE, norm="group", weight_norm=True, residual="mdeq")]  # fmt: skip


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("settings", VARIANTS)
def test_the_cell_is_the_equations(settings, training, channels_last):
    net = network(dropout=0.3, **settings).train(training)
    if channels_last:
        net.to(memory_format=torch.channels_last)
    z, x = inputs(net)
    parts = [random(3, *shape, seed=9 + i) for i, shape in enumerate(net.scales.shapes)]
    z = net.scales.pack(parts)
    ctx = net.cell.begin(x)
    masks = [m if training else 1.0 for m in ctx.masks]
    fmt = net.scales.memory_format
    assert all(m.is_contiguous(memory_format=fmt) if training else m is None for m in ctx.masks)
    wanted = Naive(net).cell(parts, x, masks)
    got = net.cell(z, ctx, times(z))
    close(got, net.scales.pack(wanted), 1e-12)
    for a, b in zip(net.cell.branches(parts, ctx), wanted):
        close(a, b, 1e-12)
    net.float()
    ctx = ctx._replace(x=x.float(), kernels=net.cell.begin(x.float()).kernels,
                       masks=[m if m is None else m.float() for m in ctx.masks])  # fmt: skip
    close(net.cell(z.float(), ctx, None).double(), got, 2e-5)


def test_the_papers_shortcut_is_not_the_identity():
    """The residual that is added is c, the second convolution's output: z reaches a block through its convolution."""
    for residual in ("paper", "mdeq"):
        net = network(dropout=0.0, residual=residual)
        z, x = inputs(net)
        with torch.no_grad():
            for block in net.cell.blocks:
                block.widen.weight.zero_()
            gap = float((apply(net, z, x) - apply(net, random(*z.shape, seed=4), x)).abs().max())
        assert gap == 0 if residual == "paper" else gap > 0.1


def test_x_enters_the_first_branch_alone():
    """With the ways between branches cut off, x moves the first and nothing else."""
    net = network(**THREE, dropout=0.0)
    z, x = inputs(net)
    with torch.no_grad():
        for p in net.cell.fuse.parameters():
            p.zero_()
    one, other = (net.scales.unpack(apply(net, z, v).detach()) for v in (x, x + random(*x.shape, seed=5)))
    assert float((one[0] - other[0]).abs().max()) > 0.1
    assert torch.equal(one[1], other[1])
    assert torch.equal(one[2], other[2])


@pytest.mark.parametrize("downsampling", [0, 1, 2])
@pytest.mark.parametrize("settings", [dict(), dict(norm="group"), THREE, UNEVEN, dict(channels=(8, 12)),
                                      dict(weight_norm=True)])  # fmt: skip
def test_stem_predictor_and_head_are_the_equations(settings, downsampling):
    net = network(shape=(3, 16, 16), downsampling=downsampling, **settings)
    predictor = net.predictor().double()
    naive = Naive(net, predictor)
    images = random(5, 3, 16, 16, seed=3)
    assert ("stem.6.weight" in naive.p) == (downsampling > 0 or len(net.scales.shapes) > 2)
    x = net.stem(images)
    close(x, naive.stem(images, downsampling), 1e-11)
    assert tuple(x.shape[1:]) == net.scales.shapes[0]
    start = predictor(x)
    assert start.shape == (5, net.cell.size)
    close(start, net.scales.pack(naive.predictor(x)), 1e-11)
    assert sum("gain" in name for name in naive.p if name.startswith("predictor")) == 2 * net.style.weight_norm
    for training in (True, False):  # the first leaves running statistics behind, which the second uses
        net.train(training)
        z = random(5, net.cell.size, seed=8)
        close(net.head(z), naive.head(net.scales.unpack(z)), 1e-10)


# ---------------------------------------------------------------------------------------------- statistics and masks


def test_batch_statistics_in_evaluation_too():
    """Only the head's bottlenecks keep running ones: a solve's NFE must not decide how far they move."""
    net = network().eval()
    z, x = inputs(net, 4)
    images = random(4, 3, 8, 8)
    for f, a in ((lambda v: apply(net, z[: len(v)], v), x), (net.stem, images), (net.predictor().double().eval(), x)):
        assert float((f(a)[:2] - f(a[:2])).detach().abs().max()) > 1e-3
    assert not list(net.cell.named_buffers(recurse=False))
    assert {name for name, _ in net.cell.named_buffers()} == {"scales.layout"}
    ctx = net.cell.begin(x)
    close(net.cell.train()(z, ctx, None), net.cell.eval()(z, ctx, None), 0)
    net.train()
    before = {name: b.clone() for name, b in net.head.named_buffers() if "running" in name}
    net.head(z)
    moved = {name for name, b in net.head.named_buffers() if name in before and not torch.equal(b, before[name])}
    assert moved == set(before)
    assert all(name.startswith("bottlenecks.") for name in moved)
    assert len(moved) == 2 * 2 * 4


def test_one_dropout_mask_a_solve_and_none_in_evaluation():
    net = network(dropout=0.2)
    z, x = inputs(net, 64)
    ctx = net.cell.begin(x)
    for mask, shape in zip(ctx.masks, net.scales.shapes):
        assert mask.shape == (64, *shape)
        assert sorted(mask.unique().tolist()) == [0.0, 1.25]
        assert float(mask.mean()) == pytest.approx(1, abs=0.02)
        assert float(mask.flatten(1).var(0).max()) > 0  # of each sample its own
        assert float(mask[0, 0].var()) > 0  # and each pixel
    assert torch.equal(net.cell(z, ctx, None), net.cell(z, ctx, None))
    assert float((net.cell(z, ctx, None) - apply(net, z, x)).detach().abs().max()) > 0.1
    assert net.eval().cell.begin(x).masks == [None, None]
    assert torch.equal(apply(net, z, x), apply(net, z, x))
    assert network(dropout=0.0).cell.begin(x).masks == [None, None]


def test_weights_are_normed_once_a_solve(monkeypatch):
    net = network(weight_norm=True, dropout=0.0)
    z, x = inputs(net)
    made = []
    whole = Conv.kernel
    monkeypatch.setattr(Conv, "kernel", lambda self: (self.gain is not None and made.append(self), whole(self))[1])
    layer = ImplicitLayer(net.cell, Zero(net), Picard(), FixedSteps(7), Unroll())
    layer(x)
    assert len(made) == len(set(made)) == 6  # three of each branch
    with torch.no_grad():
        before = apply(net, z, x)
        for conv in made:
            conv.weight.mul_(torch.rand(len(conv.weight), 1, 1, 1).double() + 0.5)
        close(apply(net, z, x), before, 1e-12)  # only the direction of a weight counts
    for conv in made[:6]:
        close(conv.kernel().detach().square().sum((1, 2, 3), keepdim=True), conv.gain.detach().square(), 1e-12)


# ------------------------------------------------------------------------------------------------ independent samples


def layer_of(net, stop=None, init=Zero, adjoint=None, solver=None):
    return ImplicitLayer(net.cell, init(net).double(), solver or Anderson(), stop or Residual(), adjoint or IFT())


def test_per_sample_stopping_needs_group_norm():
    with pytest.raises(ValueError, match=r"per-sample stopping needs .* use stop.per_sample=false or network.norm=g"):
        layer_of(network(), Residual(per_sample=True))
    assert not layer_of(network()).reduce.per_sample
    assert layer_of(network(norm="group"), Residual(per_sample=True)).reduce.per_sample
    assert layer_of(network(norm="group")).reduce.per_sample
    assert not network(untied=2).cell.batch_independent
    assert network(untied=2, norm="group").cell.batch_independent


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_with_group_norm_an_image_is_classified_alike_in_any_batch(norm):
    net = network(norm=norm)
    model = Classifier(net, layer_of(net, Residual(1e-6, max_steps=60), SkipNet))
    images = random(6, 3, 8, 8, seed=3)
    for training in (True, False):
        model.train(training)
        model.layer.cell.eval()  # but for dropout, whose mask is of the batch
        with torch.no_grad():
            gap = float((model(images).logits[2:3] - model(images[2:3]).logits).abs().max())
        assert gap < 1e-9 if norm == "group" else gap > 1e-2


# ------------------------------------------------------------------------------------------------ gradients, training


@pytest.mark.parametrize("settings", [dict(), dict(norm="group", weight_norm=True, residual="mdeq")])
def test_gradients_of_the_cell(settings):
    """First and second derivatives in z and x against finite differences: nothing in place spoils a backward."""
    net = network(dropout=0.2, **settings)
    z, x = (v.requires_grad_() for v in inputs(net, 2))
    ctx = net.cell.begin(x)
    f = lambda z, x: net.cell(z, ctx._replace(x=x), None)  # noqa: E731
    assert torch.autograd.gradcheck(f, (z, x), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (z, x), fast_mode=True)


def test_vjps_of_one_kept_graph_repeat_to_the_bit():
    net = network(dropout=0.2)
    z, x = inputs(net)
    z.requires_grad_()
    out, v = apply(net, z, x), random(3, net.cell.size, seed=6)
    first = torch.autograd.grad(out, z, v, retain_graph=True)[0]
    torch.autograd.grad(out, z, -2 * v, retain_graph=True)
    assert torch.equal(torch.autograd.grad(out, z, v, retain_graph=True)[0], first)
    out.backward(v)
    assert torch.equal(z.grad, first)
    assert all(p.grad.any() for p in net.cell.parameters())


def test_implicit_training_lowers_the_loss():
    """Skip DEQ on random CIFAR-10, with dropout, weight norm, batch statistics: it learns the eight images by heart."""
    torch.manual_seed(0)
    net = Mdeq((3, 32, 32), 10, **{**TINY, "channels": (8, 8)}, weight_norm=True, downsampling=1)
    layer = ImplicitLayer(net.cell, SkipNet(net), Anderson(), Residual(1e-2, max_steps=12), IFT(max_iter=8))
    model, penalty = Classifier(net, layer), Skip(0.01)
    images, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    losses = []
    for _ in range(12):
        out = model(images)
        loss = nnf.cross_entropy(out.logits, y) + penalty(out.layer, None)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(10), abs=0.3)
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0]


def test_backsolve_reaches_every_parameter_once():
    """Kernels reach f through the context, norms directly: twice or not at all would be an error of 100 %.

    Over a short time, from a start off zero: the kinks of relu and the singular z = 0 are hard on an ODE solver.
    """
    net = network(weight_norm=True, dropout=0.0)
    x = random(2, *net.scales.shapes[0])
    init, grads = SkipNet(net).double(), []
    for adjoint in (Backsolve(), Unroll()):
        layer = ImplicitLayer(net.cell, init, Tsit5(1e-6, 1e-6), EndTime(1e-3), adjoint, "ode")
        layer(x).z.square().sum().backward()
        grads.append([p.grad for p in net.cell.parameters()])
        net.zero_grad()
    assert cosine(*grads) > 0.999
    for a, b in zip(*grads):
        close(a, b, 0.3 * float(b.abs().max()))


def test_channels_last_is_the_same_function():
    torch.manual_seed(0)
    models = []
    for last in (False, True):
        net = network(**THREE)
        torch.manual_seed(1)
        model = Classifier(net, layer_of(net, Residual(1e-8, max_steps=60), SkipNet)).eval()
        models.append(model.to(memory_format=torch.channels_last) if last else model)
    images = random(4, 3, 8, 8)
    plain, last = (m(images) for m in models)
    close(plain.logits, last.logits, 1e-6)
    scales = [m.layer.cell.scales for m in models]
    for a, b in zip(scales[0].unpack(plain.layer.start), scales[1].unpack(last.layer.start)):
        close(a, b, 1e-12)
    assert not torch.equal(plain.layer.start, last.layer.start)  # another order of numbers within a row
    for m, out in zip(models, (plain, last)):
        out.logits.square().sum().backward()
        z = out.layer.z
        parts = m.layer.cell.branches(m.layer.cell.scales.unpack(z.detach()), m.layer.cell.begin(m.stem(images)))
        fmt = m.layer.cell.scales.memory_format
        assert all(p.is_contiguous(memory_format=fmt) for p in parts)  # nothing was transposed on the way
    for a, b in zip(*([*m.stem.parameters(), *m.layer.cell.parameters(), *m.head.parameters()] for m in models)):
        close(a.grad, b.grad, 1e-5 * float(1 + a.grad.abs().max()))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_it_can_be_compiled_whole(norm):
    """aot_eager: traced, functionalised and differentiated ahead of time, without a C++ compiler."""
    net = network(dropout=0.2, norm=norm)
    z, x = inputs(net)
    z.requires_grad_()
    ctx, v = net.cell.begin(x), random(3, net.cell.size, seed=6)
    eager = net.cell(z, ctx, times(z))
    net.cell.compile(backend="aot_eager", fullgraph=True)
    out = net.cell(z, ctx, times(z))
    close(out, eager, 1e-12)
    wanted = torch.autograd.grad(eager, z, v)[0]
    for _ in range(2):
        close(torch.autograd.grad(out, z, v, retain_graph=True)[0], wanted, 1e-11)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_derivative_that_homotopy_takes_is_there_in_any_layout(norm):
    net = network(norm=norm, dropout=0.0)
    z, x = inputs(net)
    v, found = random(3, net.cell.size, seed=6), []
    for last in (False, True):
        if last:
            net.to(memory_format=torch.channels_last)
            z, v = net.scales.from_channels(z), net.scales.from_channels(v)
        ctx = net.cell.begin(x)
        found.append(torch.func.jvp(lambda z, ctx=ctx: net.cell(z, ctx, None), (z,), (v,))[1].detach())
    close(net.scales.by_channel(found[1]), found[0], 1e-10)


def test_untied_cells_and_a_start_at_f_of_zero():
    net = network(untied=3, dropout=0.0)
    assert isinstance(net.cell, UntiedCell)
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in network().parameters()) + 2 * sum(
        p.numel() for p in net.cell.cells[0].parameters()
    )
    x = inputs(net)[1]
    layer = ImplicitLayer(net.cell, Zero(net), Picard(), FixedSteps(3), Unroll())
    z = torch.zeros(3, net.cell.size).double()
    for cell in net.cell.cells:
        z = cell(z, cell.begin(x), None)
    close(layer(x).z, z, 1e-12)
    net = network(dropout=0.0)
    start = layer_of(net, init=FZero)(x).start
    close(start, apply(net, torch.zeros(3, net.cell.size).double(), x), 0)
