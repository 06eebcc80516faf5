from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..adjoints import Unroll
from ..core import FixedSteps, Residual, Status
from ..models import Classifier, ImplicitLayer, SkipNet, StemZeros, UntiedCell, Zero
from ..solvers import Anderson, Picard
from .kit import Result, check, require


class Probe:
    """A network in float64 and a batch of four through its stem; the one asked about is left as it is."""

    def __init__(self, network: Any, shape: tuple[int, int, int], classes: int):
        self.network, self.shape, self.classes = copy.deepcopy(network), shape, classes
        for part in (self.network.stem, self.network.cell, self.network.head):
            part.double()
        self.cell = self.network.cell
        self.injects: bool = getattr(self.cell, "injects", True)  # does f see x?

    @cached_property
    def images(self) -> Tensor:
        return torch.randn(4, *self.shape, dtype=torch.float64)

    @cached_property
    def x(self) -> Tensor:
        return self.network.stem(self.images).detach()

    @cached_property
    def z(self) -> Tensor:
        return torch.randn(4, self.cell.size, dtype=torch.float64)

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        """One application, with the same dropout mask each time."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            return self.cell(z, self.cell.begin(x), z.new_zeros(len(z)))

    def model(self, init: Any, *parts: Any) -> Classifier:
        return Classifier(self.network, ImplicitLayer(self.cell, init(self.network), *parts)).double()


@check
def shapes(p: Probe) -> str:
    size, net = (4, p.cell.size), p.network
    found = [("cell", p.f(p.z, p.x), size), ("head", net.head(p.z), (4, p.classes))]
    if hasattr(net, "predictor"):
        found.append(("predictor", net.predictor().double()(p.x).flatten(1), size))
    for what, got, wanted in found:
        require(got.shape == wanted, f"the {what} puts out {tuple(got.shape)}, not {wanted}")
        require(got.dtype == torch.float64, f"the {what} of a float64 network puts out {got.dtype}")
    told = f"{' x '.join(map(str, p.shape))} images, {p.cell.size} numbers of state a sample, {p.classes} logits"
    return told if len(found) == 3 else f"{told}; no predictor(), so that init=skip_net is not for it"


@check
def finite(p: Probe) -> str:
    for where, z in (("z = 0", 0 * p.z), ("random z", p.z), ("large z", 1e3 * p.z)):
        require(p.f(z, p.x).isfinite().all(), f"f is not finite at {where}")
    return "at z = 0, at random and at large z"


@check
def fixed_in_a_solve(p: Probe) -> str:
    ctx, z = p.cell.begin(p.x), p.z.clone()
    first, second = p.cell(z, ctx, z.new_zeros(4)), p.cell(z, ctx, z.new_zeros(4))
    require(torch.equal(z, p.z), "the cell writes over its state")
    require(torch.equal(first, second), "two calls with one context differ: what is drawn at random belongs to begin")
    return "two calls with one context are the same bits"


@check
def independence(p: Probe) -> str:
    """Row 0 must not notice other rows, unless the cell says so."""
    z, x = p.z.clone(), p.x.clone()
    z[1:], x[1:] = z[1:] + 1, 2 * x[1:] + 1
    with torch.no_grad():
        before, after = p.f(p.z, p.x)[0], p.f(z, x)[0]
    moved = float((before - after).norm() / before.norm())
    told = f"batch_independent is {p.cell.batch_independent}, a sample moves by {moved:.0e} when the others change"
    require(moved < 1e-12 or not p.cell.batch_independent, told)
    return told


@check
def gradient(p: Probe) -> str:
    init = StemZeros if not p.injects else SkipNet if hasattr(p.network, "predictor") else Zero
    model = p.model(init, Picard(), FixedSteps(3), Unroll())
    out = model(p.images)
    (out.logits.square().mean() + (out.layer.z - out.layer.start).square().mean()).backward()
    named = {name: w for name, w in model.named_parameters() if w.requires_grad}
    grads = {name: w.grad for name, w in named.items() if w.grad is not None}
    missed = [name for name in named if name not in grads]
    require(not missed, f"none reaches {', '.join(missed[:3])}{' ...' * (len(missed) > 3)}")
    require(all(g.isfinite().all() for g in grads.values()), "it is not finite")
    sizes = {name: float(g.abs().max()) for name, g in grads.items()}
    still = [name for name, size in sizes.items() if size <= 1e-12 * max(sizes.values())]  # a bias before a norm
    zero = f", but is zero for {', '.join(still[:3])}{' ...' * (len(still) > 3)}" if still else ""
    return f"it reaches all {len(named)} parameters{zero}"


@check
def derivative(p: Probe) -> str:
    z, x = p.z.clone().requires_grad_(), (p.x + torch.randn_like(p.x)).requires_grad_()  # off the corners of relu
    close = torch.autograd.gradcheck(p.f, (z, x), fast_mode=True, raise_exception=False, atol=1e-4)
    require(close, "the backward of f disagrees with finite differences")
    return "the backward of f agrees with finite differences"


@check
def equilibrium(p: Probe) -> str:
    """Reported, not asked for: a neural ODE's network needs no fixed point."""
    if not p.injects:
        return "for information: f does not see x, so that it has no fixed point of an image"
    layer = p.model(Zero, Anderson(), Residual(1e-4, max_steps=100), Unroll()).layer
    with torch.no_grad():
        s = layer(p.x).solution
    zs = s.value.requires_grad_()
    out, v, growth = p.f(zs, p.x), torch.randn_like(zs), []
    for _ in range(60):  # power iteration; a complex pair of eigenvalues beats, so the growth is averaged
        v = torch.autograd.grad(out, zs, v, retain_graph=True)[0]
        growth.append(v.norm().clamp_min(1e-300).log())
        v = v / v.norm().clamp_min(1e-300)
    radius = float(torch.stack(growth[30:]).mean().exp())
    share, steps = float((s.status == Status.CONVERGED).double().mean()), int(s.stats.steps.max())
    return (f"for information: spectral radius {radius:.2f}; Anderson from zero takes {share:.0%} of rows to 1e-04 in "
            f"{steps} steps")  # fmt: skip


def check_network(network: Any, shape: tuple[int, int, int], classes: int) -> list[Result]:
    """`shape` of an image, (C, H, W)."""
    missing = [name for name in ("stem", "cell", "head") if not isinstance(getattr(network, name, None), nn.Module)]
    if missing:
        return [Result("network", False, f"{' and '.join(missing)} should be a Module of {type(network).__name__}")]
    if isinstance(network.cell, UntiedCell):
        return [Result("network", False, "untied cells are applied once each, there is no one f; use network.untied=0")]
    p = Probe(network, shape, classes)
    return [each(p) for each in (shapes, finite, fixed_in_a_solve, independence, gradient, derivative, equilibrium)]
