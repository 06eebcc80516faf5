"""A trained run's weights, restored, and what passes over a split see of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from ..core import EndTime, FixedSteps, Residual, Status
from ..device import Device
from ..models import Classifier, Output
from ..schema import UsageError

Forward = Callable[[Tensor], Any]  # images (B, C, H, W) -> models.Output
COLUMNS = ["condition", "accuracy", "loss", "evaluations", "p90", "residual", "converged"]


@dataclass
class Seen:
    """What a pass over a split saw, a number a sample: (N,) each, on the CPU."""

    predicted: Tensor
    y: Tensor
    loss: Tensor
    nfe: Tensor  # evaluations of f, the start's own and the re-attaching one included
    residual: Tensor
    status: Tensor

    @property
    def right(self) -> Tensor:
        return self.predicted == self.y

    def row(self, condition: str) -> list[Any]:
        """One line of the table, in the order of COLUMNS; None for what a solve to an end time does not have."""
        residual = self.residual[self.residual.isfinite()]
        asked = self.status != Status.REACHED_END
        converged = float((self.status[asked] == Status.CONVERGED).float().mean()) if asked.any() else None
        return [condition, float(self.right.float().mean()), float(self.loss.mean()), float(self.nfe.float().mean()),
                float(self.nfe.float().quantile(0.9)), float(residual.median()) if len(residual) else None,
                converged]  # fmt: skip


def look(forward: Forward, batches: Iterable[tuple[Tensor, Tensor]], start_calls: int, device: Device) -> Seen:
    """Run the batches through `forward` without gradient. A forward without a solve (logits alone) has nfe 0."""
    parts: list[tuple[Tensor, ...]] = []
    with torch.no_grad(), device.autocast():
        for x, y in batches:
            out = forward(x)
            logits, layer = (out, None) if isinstance(out, Tensor) else (out.logits, out.layer)
            loss = nnf.cross_entropy(logits.float(), y, reduction="none")
            n = len(y)
            if layer is None:
                solved = torch.full((n,), start_calls), torch.full((n,), math.nan), torch.full((n,), Status.REACHED_END)
            else:
                stats = layer.solution.stats
                extra = start_calls + layer.backward.forward_calls
                solved = stats.nfe + extra, stats.residual, layer.solution.status
            parts.append(tuple(t.expand(n).cpu() for t in (logits.argmax(1), y, loss, *solved)))
    return Seen(*(torch.cat(column) for column in zip(*parts)))


def spectral_radius(model: Classifier, x: Tensor, iterations: int = 60) -> Tensor:
    """|largest eigenvalue| of df/dz at z*, (B,), or (1,) of the whole batch where samples interact.

    Power iteration on the transposed Jacobian by VJPs on one graph; the geometric mean growth over the last half, which
    a complex pair of eigenvalues only makes oscillate. x (B, C, H, W).
    """
    layer = model.layer
    with torch.no_grad():
        features = model.stem(x)
        ctx = layer.cell.begin(features)
        z = layer(features).z
    zs = z.detach().requires_grad_()
    with torch.enable_grad():
        out = layer.cell(zs, ctx, z.new_zeros(len(z)))
    dim = -1 if layer.cell.batch_independent else (-2, -1)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(z.shape, generator=generator).to(z)
    growth = []
    for _ in range(iterations):
        v = v / torch.linalg.vector_norm(v, dim=dim, keepdim=True).clamp_min(1e-30)
        (v,) = torch.autograd.grad(out, zs, v, retain_graph=True)
        growth.append(torch.linalg.vector_norm(v, dim=dim).reshape(-1))
    return torch.stack(growth[iterations // 2 :]).clamp_min(1e-30).log().mean(0).exp()


def within(model: Classifier, steps: int) -> Forward:
    """0 is the head on the start alone. A solver of one evaluation a step gets `steps` of them, the output's included;
    another, so many steps of its own."""
    layer = model.layer
    if steps == 0:
        return lambda x: model.within(x, 0)
    if layer.solver.one_call:
        stop: Any = FixedSteps(steps)
    else:
        stop = copy.copy(layer.stop)
        stop.max_steps = steps
    return _solved(model, layer.solver, stop)


def _solved(model: Classifier, solver: Any, stop: Any) -> Forward:
    layer = model.layer

    def forward(x: Tensor) -> Output:
        out = layer._run(model.stem(x), solver, stop, layer.adjoint, layer.field)
        return Output(model.head(out.z), out)

    return forward


def at_tolerance(model: Classifier, tol: float) -> Forward:
    """The solve to another tolerance: of the residual, an ODE solver's steps in proportion; or of the steps alone
    (rtol and atol), where they lead to an end time. Raises UsageError for a solve without one."""
    solver: Any = copy.copy(model.layer.solver)
    stop = copy.copy(model.layer.stop)
    steers = hasattr(solver, "rtol") and hasattr(solver, "atol")
    if isinstance(stop, Residual):
        if steers:
            solver.rtol, solver.atol = solver.rtol * tol / stop.tol, solver.atol * tol / stop.tol
        stop.tol = tol
    elif steers and isinstance(stop, EndTime):
        solver.rtol = solver.atol = tol
    else:
        raise UsageError(f"eval.tolerances={tol:g} is for solves that have a tolerance, and this run's has none")
    return _solved(model, solver, stop)


def noisy(model: Classifier, sd: float, std: Tensor) -> Forward:
    generator = torch.Generator(std.device).manual_seed(0)

    def forward(x: Tensor) -> Any:
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return model(x + noise * (sd / std))

    return forward


def blurred(model: Classifier, sd: float) -> Forward:
    from ..data import ensure_torchvision

    ensure_torchvision()
    from torchvision.transforms.v2.functional import gaussian_blur

    def forward(x: Tensor) -> Any:
        widest = 2 * min(x.shape[-2:]) - 1  # reflected at the border, so narrower than twice the image
        size = min(2 * math.ceil(3 * sd) + 1, widest)
        return model(gaussian_blur(x, [size, size], [sd, sd]) if sd else x)

    return forward
