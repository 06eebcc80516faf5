"""Where z starts. An init is made from the network and maps x (B, ...) to z0 (B, D).

The solver gets z0 detached: a start learns from its penalty, not through the solve, unless it says `through`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from ..core import Field
from ..world import stacked
from .networks import Network


class Init(Protocol):
    calls: int  # evaluations of f that the start costs
    # and, where it has them, through: bool, the task's gradient reaches z0 · every: int and optimizer(total_steps), its
    # parameters have an optimiser of their own · observe(z), called with the solutions z (B, D) of training

    def __call__(self, x: Tensor, f: Field) -> Tensor: ...


class Zero(nn.Module):
    """z0 = 0."""

    calls = 0

    def __init__(self, network: Network):
        super().__init__()
        self.size: int = network.cell.size  # type: ignore[assignment]

    def forward(self, x: Tensor, f: Field) -> Tensor:
        return x.new_zeros(len(x), self.size)


class FZero(Zero):
    """z0 = f(0, x), the start of Skip Reg. DEQ (arXiv 2201.12240): one evaluation, no parameters."""

    calls = 1

    def forward(self, x: Tensor, f: Field) -> Tensor:
        zero = super().forward(x, f)
        return f(zero, zero.new_zeros(len(zero)))


class SkipNet(nn.Module):
    """z0 = g(x) with a network of its own, the start of Skip DEQ (arXiv 2201.12240)."""

    calls = 0

    def __init__(self, network: Network):
        super().__init__()
        if not hasattr(network, "predictor"):
            raise ValueError(f"init=skip_net asks the network for predictor(), a Module from x to z0, which "
                             f"{type(network).__name__} has not; use init=f_zero or init=zero")  # fmt: skip
        self.g = network.predictor()

    def forward(self, x: Tensor, f: Field) -> Tensor:
        return self.g(x).flatten(1)


class Stem(nn.Module):
    """z0 = x, what the stem puts out: a neural ODE that starts at the image. The gradient goes through the solve to it.
    """

    calls, through = 0, True

    def __init__(self, network: Network):
        super().__init__()
        self.size: int = network.cell.size  # type: ignore[assignment]
        self.scales: Any = getattr(network.cell, "scales", None)

    def flat(self, x: Tensor) -> Tensor:
        """x as the first numbers of a state, in its layout."""
        return x.flatten(1) if self.scales is None else self.scales.pack([x])

    def forward(self, x: Tensor, f: Field) -> Tensor:
        z = self.flat(x)
        if z.shape[1] != self.size:
            raise ValueError(f"init=stem has {z.shape[1]} numbers a sample, but the state {self.size}; use "
                             "init=stem_zeros, which fills up with zeros")  # fmt: skip
        return z


class StemZeros(Stem):
    """z0 = [x, 0]: zeros in the branches that x does not fill, as augmented neural ODEs have it (arXiv 1904.01681)."""

    def forward(self, x: Tensor, f: Field) -> Tensor:
        z = self.flat(x)
        return nnf.pad(z, (0, self.size - z.shape[1]))


class Alternating(nn.Module):
    """z0 = -1 in the even channels and 1 in the odd, whatever x is: where HomoODE's point begins (arXiv 2310.09583)."""

    calls = 0
    point: Tensor  # (channels,)

    def __init__(self, network: Network):
        super().__init__()
        self.scales: Any = getattr(network.cell, "scales", None)
        counts = [network.cell.size] if self.scales is None else [shape[0] for shape in self.scales.shapes]
        signs = torch.cat([torch.arange(count) % 2 * 2.0 - 1 for count in counts])  # type: ignore[arg-type]
        self.register_buffer("point", signs, persistent=False)

    def forward(self, x: Tensor, f: Field) -> Tensor:
        z: Tensor = self.point if self.scales is None else self.scales.spread(self.point)
        return z.expand(len(x), -1)


class Shared(Alternating):
    """z0 = one learnable number a channel, for all images (HomoODE, arXiv 2310.09583); it begins as Alternating.

    It learns from penalty=[init_fit] alone, by plain SGD of its own at `lr`, cosine to 1e-6, every `every` steps.
    The released code makes the point by GroupNorm(conv1x1(1)): in groups of two channels its numbers are
    beta +- gamma whatever the convolution is, so that its lr, acting on beta and on gamma, is half of the one here.
    """

    def __init__(self, network: Network, lr: float = 0.04, every: int = 20):
        super().__init__(network)
        if not 0 < lr < float("inf") or every < 1:
            raise ValueError(f"init.lr={lr} must be positive, and init.every={every} at least 1")
        signs = self.point
        del self.point
        self.point = nn.Parameter(signs)
        self.lr, self.every = float(lr), every

    def optimizer(self, total_steps: int) -> tuple[SGD, CosineAnnealingLR]:
        sgd = SGD(self.parameters(), self.lr)
        return sgd, CosineAnnealingLR(sgd, max(1, total_steps // self.every), 1e-6)


class DataMean(nn.Module):
    """z0 = the running mean of the solutions z that training has seen, over the last `window` batches; no gradient."""

    calls = 0
    mean: Tensor  # (D,)
    batches: Tensor

    def __init__(self, network: Network, window: int = 100):
        super().__init__()
        if window < 1:
            raise ValueError(f"init.window={window} must be at least 1")
        self.scales: Any = getattr(network.cell, "scales", None)
        self.window, size = window, int(network.cell.size)  # type: ignore[arg-type]
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, z: Tensor) -> None:
        mean = stacked(z.mean(0, keepdim=True)).mean(0, keepdim=True)
        mean = mean if self.scales is None else self.scales.by_channel(mean)
        finite = mean.isfinite().all()  # else recipe.on_nonfinite=skip_step would never get out of one bad batch
        self.batches += finite
        share = 1 / self.batches.clamp(1, self.window).to(self.mean.dtype)
        new = self.mean.lerp(mean[0].to(self.mean.dtype), share)
        self.mean = torch.where(finite, new, self.mean)  # not in place: the start is a view of it

    def forward(self, x: Tensor, f: Field) -> Tensor:
        z = self.mean.unsqueeze(0)
        z = z if self.scales is None else self.scales.from_channels(z)
        return z.expand(len(x), -1)
