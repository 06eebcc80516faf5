"""The multiscale network (MDEQ, Bai, Koltun & Kolter, arXiv 2006.08656) as the first paper has it (arXiv 2201.12240).

A state has n branches, branch i at half the side of branch i - 1. `norm` below is BatchNorm with the batch's own
statistics, in evaluation too, or GroupNorm (network.norm=group), everywhere but in the head's bottlenecks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.autograd import forward_ad

from .cells import make_cell


class Mdeq(nn.Module):
    """Convolutional stem, multiscale cell, bottleneck head. Every size is a setting; the defaults are mdeq_small's.

    channels, head: of each branch, in the state and in the head's bottlenecks. features: the head's last. expand: how
    many times wider a residual block is inside. downsampling: how many of the stem's two convolutions have stride 2.
    weight_norm: on both convolutions of a residual block and the one after the fusion. norm: batch statistics couple
    the samples; group (up to 8 groups) does not. residual: see Block. untied: so many different cells in turn instead
    of one (model=resnet); 0 is the tied cell.

    CIFAR-10: 163,546 parameters, 200,122 with the predictor; the paper's large settings 10,631,958 and 11,186,774; its
    ImageNet ones 17,912,456 and 18,467,272.
    """

    widths: ClassVar = ("channels", "head", "features")  # what match=params scales

    def __init__(self, shape: tuple[int, int, int], classes: int, channels: Sequence[int] = (24, 24),
                 head: Sequence[int] = (8, 16), features: int = 200, expand: int = 5, dropout: float = 0.2,
                 weight_norm: bool = False, downsampling: int = 0, norm: Literal["batch", "group"] = "batch",
                 residual: Literal["paper", "mdeq"] = "paper", untied: int = 0):  # fmt: skip
        super().__init__()
        if not channels or len(channels) != len(head):
            raise ValueError(f"network.channels={list(channels)} and network.head={list(head)} must be lists of one "
                             "length, a number for each branch")  # fmt: skip
        if min(*channels, *head, features, expand) < 1:
            raise ValueError("network.channels, network.head, network.features and network.expand must be at least 1, "
                             f"not {list(channels)}, {list(head)}, {features} and {expand}")  # fmt: skip
        if not 0 <= dropout < 1:
            raise ValueError(f"network.dropout={dropout} must be a probability below 1")
        if downsampling not in (0, 1, 2):
            raise ValueError(f"network.downsampling={downsampling} must be 0, 1 or 2")
        planes, *sides = shape
        halved = downsampling + len(channels) - 1
        if any(side % 2**halved for side in sides):
            raise ValueError(f"network.channels={list(channels)} with network.downsampling={downsampling} halves an "
                             f"image {halved} times, but {sides[0]} x {sides[1]} cannot be; use fewer")  # fmt: skip
        self.style = Style(norm, weight_norm, residual)
        self.scales = Scales([(c, *(s >> (downsampling + i) for s in sides)) for i, c in enumerate(channels)])
        first = channels[0]
        self.stem = nn.Sequential(
            *self.style.conv(planes, first, stride=2 if downsampling > 0 else 1),
            *self.style.conv(first, first, stride=2 if downsampling > 1 else 1),
            *(self.style.conv(first, first, kernel=1) if len(channels) > 2 or downsampling else ()),
        )
        self.cell = make_cell(partial(MdeqCell, self.scales, expand, dropout, self.style), untied)
        self.head = Head(self.scales, head, features, classes, self.style)

    def predictor(self) -> nn.Module:
        return Predictor(self.scales, self.style)


class Scales(nn.Module):
    """The branches (B, C, H, W) of a flat state (B, size), and their memory layout.

    A row holds branch after branch, each as C, H, W; or as H, W, C once `.to(memory_format=torch.channels_last)` has
    reached this module, so that neither way transposes anything. The cell, the head and the predictor share it.
    """

    layout: Tensor

    def __init__(self, shapes: Sequence[tuple[int, ...]]):
        super().__init__()
        self.shapes = list(shapes)
        self.sizes = [math.prod(shape) for shape in shapes]
        self.size = sum(self.sizes)
        self.register_buffer("layout", torch.empty(1, 2, 2, 2), persistent=False)  # holds nothing but its strides

    @property
    def channels_last(self) -> bool:
        return self.layout.is_contiguous(memory_format=torch.channels_last)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def unpack(self, z: Tensor) -> list[Tensor]:
        """(B, size) -> views (B, C, H, W)."""
        parts = z.split(self.sizes, 1)
        if self.channels_last:
            return [p.view(-1, h, w, c).permute(0, 3, 1, 2) for p, (c, h, w) in zip(parts, self.shapes)]
        return [p.view(-1, *shape) for p, shape in zip(parts, self.shapes)]

    def pack(self, zs: Sequence[Tensor]) -> Tensor:
        """The first branches (B, C, H, W), or all -> (B, their numbers), one copy where there are several."""
        if self.channels_last:
            zs = [z.permute(0, 2, 3, 1) for z in zs]
        flat = [z.flatten(1) for z in zs]
        return torch.cat(flat, 1) if len(flat) > 1 else flat[0]

    def spread(self, values: Tensor) -> Tensor:
        """A number for each channel of each branch -> the state (size,) that is constant over pixels."""
        parts = values.split([shape[0] for shape in self.shapes])
        return self.pack([part.view(1, -1, 1, 1).expand(1, *shape) for part, shape in zip(parts, self.shapes)])[0]

    def by_channel(self, z: Tensor) -> Tensor:
        """A state (B, size) with each branch as C, H, W, whatever the layout: what a checkpoint holds."""
        return torch.cat([part.flatten(1) for part in self.unpack(z)], 1)

    def from_channels(self, z: Tensor) -> Tensor:
        return self.pack([part.view(-1, *shape) for part, shape in zip(z.split(self.sizes, 1), self.shapes)])


class Style(NamedTuple):
    """What all parts of one network do alike."""

    norm: Literal["batch", "group"]
    weight_norm: bool
    residual: Literal["paper", "mdeq"]

    def normed(self, channels: int, running: bool = False) -> nn.Module:
        """`running`: with batch norm, running statistics in evaluation."""
        if self.norm == "group":
            return GroupNorm(math.gcd(8, channels), channels)
        return nn.BatchNorm2d(channels, track_running_stats=running)

    def conv(self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1, bias: bool = False,
             running: bool = False) -> list[nn.Module]:  # fmt: skip
        """Convolution, norm, relu."""
        return [Conv(c_in, c_out, kernel, stride, bias), self.normed(c_out, running), nn.ReLU(inplace=True)]

    def down(self, c_in: int, c_out: int, times: int) -> nn.Sequential:
        """Halved so many times; channels double each time if that ends at c_out, else they change at the last."""
        doubling = c_in << times == c_out
        widths = [*(c_in << k if doubling else c_in for k in range(times)), c_out]
        return nn.Sequential(*(layer for a, b in pairwise(widths) for layer in self.conv(a, b, stride=2)))

    def up(self, c_in: int, c_out: int, times: int) -> nn.Sequential:
        return nn.Sequential(*self.conv(c_in, c_out), nn.Upsample(scale_factor=2**times))


class GroupNorm(nn.GroupNorm):
    """torch's, which in forward-mode differentiation (solver=homotopy) takes no channels-last tensor."""

    def forward(self, a: Tensor) -> Tensor:
        return super().forward(a if forward_ad.unpack_dual(a).tangent is None else a.contiguous())


class Conv(nn.Conv2d):
    """A convolution that keeps the side at stride 1, from N(0, 0.01^2).

    weight_norm: the kernel of each output channel is gain * weight / |weight| (arXiv 1602.07868).
    """

    def __init__(self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1, bias: bool = False,
                 weight_norm: bool = False):  # fmt: skip
        super().__init__(c_in, c_out, kernel, stride, kernel // 2, bias=bias)
        self.gain = nn.Parameter(self._norm().detach().clone()) if weight_norm else None

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.weight, dim=(1, 2, 3), keepdim=True)

    def kernel(self) -> Tensor:
        return self.weight if self.gain is None else self.weight * (self.gain / self._norm())

    def forward(self, a: Tensor, kernel: Tensor | None = None) -> Tensor:
        """With `kernel`, the one that `kernel()` made earlier."""
        kernel = self.kernel() if kernel is None else kernel
        return nnf.conv2d(a, kernel, self.bias, self.stride, self.padding)


class Block(nn.Module):
    """norm(relu(norm(drop(c) + x) + s)) with c = conv(relu(norm(conv z))), wider inside.

    residual=paper: s = c. The paper's code takes the shortcut after z has been overwritten, so that it is no identity.
    residual=mdeq: s = z, as Bai et al. have it.
    """

    def __init__(self, channels: int, expand: int, style: Style):
        super().__init__()
        wide = expand * channels
        self.widen = Conv(channels, wide, weight_norm=style.weight_norm)
        self.narrow = Conv(wide, channels, weight_norm=style.weight_norm)
        self.inner, self.mixed, self.outer = style.normed(wide), style.normed(channels), style.normed(channels)
        self.identity = style.residual == "mdeq"

    def forward(self, z: Tensor, widen: Tensor | None = None, narrow: Tensor | None = None,
                mask: Tensor | None = None, x: Tensor | None = None) -> Tensor:  # fmt: skip
        # in place only on what no backward reads: a norm keeps its input, not its output
        c = self.narrow(nnf.relu_(self.inner(self.widen(z, widen))), narrow)
        mixed = c if mask is None else c * mask
        mixed = self.mixed(mixed if x is None else mixed + x)
        return self.outer(nnf.relu_(mixed.add_(z if self.identity else c)))


class Context(NamedTuple):
    """What one solve keeps fixed; the lists have an item a branch."""

    x: Tensor  # (B, C, H, W) of branch 0, where it is injected
    kernels: list[list[Tensor]]  # weight-normed: of the block's two convolutions and the one after the fusion
    masks: list[Tensor | None]  # variational dropout, in training


class MdeqCell(nn.Module):
    """A residual block on each branch, each branch fused with all others, and then norm(relu(conv1x1)) of each."""

    def __init__(self, scales: Scales, expand: int, dropout: float, style: Style):
        super().__init__()
        self.scales, self.size, self.dropout = scales, scales.size, dropout
        self.batch_independent = style.norm == "group"
        cs = [shape[0] for shape in scales.shapes]
        self.blocks = nn.ModuleList(Block(c, expand, style) for c in cs)
        self.fuse = nn.ModuleList(  # [j][i] takes branch i to j
            nn.ModuleList(nn.Identity() if i == j else style.down(a, b, j - i) if i < j else style.up(a, b, i - j)
                          for i, a in enumerate(cs))
            for j, b in enumerate(cs)
        )  # fmt: skip
        self.after = nn.ModuleList(Conv(c, c, 1, weight_norm=style.weight_norm) for c in cs)
        self.norms = nn.ModuleList(style.normed(c) for c in cs)

    def begin(self, x: Tensor) -> Context:
        kernels = [[b.widen.kernel(), b.narrow.kernel(), a.kernel()]  # type: ignore[operator, union-attr]
                   for b, a in zip(self.blocks, self.after)]  # fmt: skip
        return Context(x, kernels, [self._mask(x, shape) for shape in self.scales.shapes])

    def _mask(self, x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        if not (self.training and self.dropout):
            return None
        keep = 1 - self.dropout
        mask = torch.empty((len(x), *shape), dtype=x.dtype, device=x.device, memory_format=self.scales.memory_format)
        return mask.bernoulli_(keep).div_(keep)

    def forward(self, z: Tensor, ctx: Context, t: Tensor) -> Tensor:
        return self.scales.pack(self.branches(self.scales.unpack(z), ctx))

    def branches(self, zs: Sequence[Tensor], ctx: Context) -> list[Tensor]:
        """f on its native tensors, (B, C, H, W) each."""
        zs = [block(z, *kernels[:2], mask, ctx.x if i == 0 else None)
              for i, (block, z, kernels, mask) in enumerate(zip(self.blocks, zs, ctx.kernels, ctx.masks))]  # fmt: skip
        fused = [sum((paths[i](z) for i, z in enumerate(zs) if i != j), zs[j])  # type: ignore[index]
                 for j, paths in enumerate(self.fuse)]  # fmt: skip
        return [norm(nnf.relu_(conv(z, kernels[2])))
                for norm, conv, z, kernels in zip(self.norms, self.after, fused, ctx.kernels)]  # fmt: skip


class Bottleneck(nn.Module):
    """relu(body(z) + shortcut(z)), c -> 4 width channels; with batch norm the only one with running statistics."""

    def __init__(self, channels: int, width: int, style: Style):
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            *style.conv(channels, width, kernel=1, running=True),
            *style.conv(width, width, running=True),
            Conv(width, out, 1), style.normed(out, running=True),
        )  # fmt: skip
        self.shortcut = nn.Identity() if channels == out else nn.Sequential(
            Conv(channels, out, 1), style.normed(out, running=True))  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        return nnf.relu_(self.body(z).add_(self.shortcut(z)))


class Head(nn.Module):
    """A bottleneck for each branch, each added to the one before it at half the side; then conv1x1, mean, linear."""

    def __init__(self, scales: Scales, widths: Sequence[int], features: int, classes: int, style: Style):
        super().__init__()
        self.scales = scales
        self.bottlenecks = nn.ModuleList(Bottleneck(c, h, style) for (c, *_), h in zip(scales.shapes, widths))
        self.down = nn.ModuleList(
            nn.Sequential(*style.conv(4 * a, 4 * b, stride=2, bias=True)) for a, b in pairwise(widths)
        )
        self.last = nn.Sequential(*style.conv(4 * widths[-1], features, kernel=1, bias=True))
        self.linear = nn.Linear(features, classes)

    def forward(self, z: Tensor) -> Tensor:
        y, *coarser = (bottleneck(part) for bottleneck, part in zip(self.bottlenecks, self.scales.unpack(z)))
        for down, other in zip(self.down, coarser):
            y = down(y) + other
        return self.linear(self.last(y).mean((2, 3)))


class Predictor(nn.Module):
    """g(x), the start of a Skip model: a residual block on x three times as wide inside, then x halved again and again.

    36,576 parameters for the small channels, 554,816 for the large ones with weight norm.
    """

    def __init__(self, scales: Scales, style: Style):
        super().__init__()
        self.scales = scales
        first, *others = (shape[0] for shape in scales.shapes)
        self.block = Block(first, 3, style)
        self.down = nn.ModuleList(style.down(first, c, k) for k, c in enumerate(others, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scales.pack([self.block(x), *(down(x) for down in self.down)])
