"""The second paper's network (HomoODE, arXiv 2310.09583, as in its released code) and the pixel-space one of ANODE
(arXiv 1904.01681), from which the usual neural-ODE figures of CIFAR-10 come."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from .cells import make_cell
from .mdeq import GroupNorm, Scales

Inject = Literal["field", "start", "state", "frozen"]


class HomoConv(nn.Module):
    """Two convolutions as stem, HomoCell, a head of norm, relu, conv1x1, norm, relu, mean, linear. Sized by the data:

    width: 64 channels up to 10 classes, 128 beyond; features: the head's last, 4 width; the stem halves the side once,
    from 64 pixels on twice. groups: of every GroupNorm (32; 8 on Tiny ImageNet), fewer where that does not divide the
    width. inject: where the stem's features x go. field: the
    cell's condition (HomoODE, DEQ); start: z0 and nowhere else (a neural ODE's init=stem); state: h of a state [h, p]
    that moves by a field of its own while the head reads p (ANODE: init=stem_zeros); frozen: the same with h' = 0,
    which is HomoODE from zero. untied: so many different cells in turn instead of one; 0 is the tied cell.

    CIFAR-10 and SVHN 132,938 parameters, CIFAR-100 565,988, Tiny ImageNet 617,288, MNIST 131,786.
    """

    widths: ClassVar = ("width",)

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int | None = None,
                 features: int | None = None, groups: int = 32, dropout: float = 0.1, inject: Inject = "field",
                 untied: int = 0):  # fmt: skip
        super().__init__()
        width = width or (64 if classes <= 10 else 128)
        features = features or 4 * width
        if min(width, features, groups) < 1:
            raise ValueError(f"network.width={width}, network.features={features} and network.groups={groups} must be "
                             "at least 1")  # fmt: skip
        if not 0 <= dropout < 1:
            raise ValueError(f"network.dropout={dropout} must be a probability below 1")
        if untied and inject != "field":
            raise ValueError(f"network.untied={untied} is for network.inject=field, not {inject}")
        self.width, groups = width, math.gcd(groups, width)
        planes, *sides = shape
        strides = (2 if min(sides) >= 64 else 1, 2)
        side = tuple(-(-s // math.prod(strides)) for s in sides)
        branch = (width, *side)
        self.scales = Scales([branch, branch] if inject in ("state", "frozen") else [branch])
        self.stem = nn.Sequential(*(
            layer for c, stride in zip((planes, width), strides)
            for layer in (nn.Conv2d(c, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        ))  # fmt: skip
        self.cell = make_cell(partial(HomoCell, self.scales, groups, dropout, inject), untied)
        self.head = nn.Sequential(
            LastBranch(self.scales), nn.GroupNorm(groups, width), nn.ReLU(inplace=True), nn.Conv2d(width, features, 1),
            nn.BatchNorm2d(features), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(features, classes),
        )  # fmt: skip


class LastBranch(nn.Module):
    """z (B, size) -> its last branch (B, C, H, W)."""

    def __init__(self, scales: Scales):
        super().__init__()
        self.scales = scales

    def forward(self, z: Tensor) -> Tensor:
        return self.scales.unpack(z)[-1]


class HomoContext(NamedTuple):
    x: Tensor | None  # (B, C, H, W), the condition
    masks: list[Tensor | None]  # (B, C, 1, 1), of p and of h


class HomoField(nn.Module):
    """norm(mask * conv(relu(norm(conv z)) + x)): the condition x comes after the relu, the mask before the last norm.

    That norm gives every group of channels a unit root mean square whatever z is: the field has no zero unless its
    scale shrinks.
    """

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, 1, 1) for _ in range(2))
        self.inner, self.outer = (GroupNorm(groups, width) for _ in range(2))

    def forward(self, z: Tensor, x: Tensor | None, mask: Tensor | None) -> Tensor:
        a = nnf.relu_(self.inner(self.first(z)))
        b = self.second(a if x is None else a + x)
        return self.outer(b if mask is None else b * mask)


class HomoCell(nn.Module):
    """HomoField on the state z, or on the two halves of [h, p]: p' = F(p; h) and h' = F_h(h; p). Time is not used."""

    batch_independent = True

    def __init__(self, scales: Scales, groups: int, dropout: float, inject: Inject):
        super().__init__()
        self.scales, self.size, self.dropout, self.injects = scales, scales.size, dropout, inject == "field"
        self.field = HomoField(scales.shapes[0][0], groups)
        self.h_field = HomoField(scales.shapes[0][0], groups) if inject == "state" else None

    def begin(self, x: Tensor) -> HomoContext:
        masks = [self._mask(x) for _ in range(1 if self.h_field is None else 2)]
        return HomoContext(x if self.injects else None, masks)

    def _mask(self, x: Tensor) -> Tensor | None:
        """Variational dropout: a channel of a sample, the same throughout the solve."""
        if not (self.training and self.dropout):
            return None
        keep = 1 - self.dropout
        return x.new_empty(len(x), self.scales.shapes[0][0], 1, 1).bernoulli_(keep).div_(keep)

    def forward(self, z: Tensor, ctx: HomoContext, t: Tensor) -> Tensor:
        *h, p = self.scales.unpack(z)
        dp = self.field(p, h[0] if h else ctx.x, ctx.masks[0])
        if not h:
            return self.scales.pack([dp])
        dh = torch.zeros_like(h[0]) if self.h_field is None else self.h_field(h[0], p, ctx.masks[1])
        return self.scales.pack([dh, dp])


class NodeConv(nn.Module):
    """No stem: the ODE acts on the pixels, which are its start (init=stem), by conv1x1, relu, conv3x3, relu, conv1x1,
    each with the time as one more channel; the head is a linear map (arXiv 1904.01681).

    inject: start; or state, with `extra` channels that start at zero (ANODE: init=stem_zeros). filters, extra: where
    they are null the paper's for as many planes, MNIST's 92 or 64 and 5, CIFAR-10's 125 or 64 and 10.

    CIFAR-10 173,611 parameters, with ANODE's channels 172,452; MNIST 85,316 and 85,462.
    """

    widths: ClassVar = ("filters",)

    def __init__(self, shape: tuple[int, int, int], classes: int, filters: int | None = None, extra: int | None = None,
                 inject: Literal["start", "state"] = "start", untied: int = 0):  # fmt: skip
        super().__init__()
        planes, height, width = shape
        augmented = inject == "state"
        filters = filters or (64 if augmented else 92 if planes == 1 else 125)
        extra = (5 if planes == 1 else 10) if extra is None else extra
        if min(filters, extra) < 1:
            raise ValueError(f"network.filters={filters} and network.extra={extra} must be at least 1")
        self.filters = filters
        self.scales = Scales([shape, (extra, height, width)] if augmented else [shape])
        self.stem = nn.Identity()
        self.cell = make_cell(partial(NodeCell, self.scales, filters), untied)
        self.head = nn.Sequential(ByChannel(self.scales), nn.Linear(self.scales.size, classes))


class ByChannel(nn.Module):
    """z (B, size) -> each branch as C, H, W, so that a linear map has one meaning in any layout."""

    def __init__(self, scales: Scales):
        super().__init__()
        self.scales = scales

    def forward(self, z: Tensor) -> Tensor:
        return self.scales.by_channel(z)


class NodeCell(nn.Module):
    """f(z, t), which sees x in its start alone."""

    batch_independent, injects = True, False

    def __init__(self, scales: Scales, filters: int):
        super().__init__()
        self.scales, self.size = scales, scales.size
        planes = sum(shape[0] for shape in scales.shapes)
        sizes = ((planes, filters, 1), (filters, filters, 3), (filters, planes, 1))
        self.convs = nn.ModuleList(nn.Conv2d(a + 1, b, k, padding=k // 2) for a, b, k in sizes)

    def begin(self, x: Tensor) -> tuple[()]:
        return ()

    def forward(self, z: Tensor, ctx: tuple[()], t: Tensor) -> Tensor:
        a = torch.cat(self.scales.unpack(z), 1)
        time = t.to(a.dtype).view(-1, 1, 1, 1).expand(-1, 1, *a.shape[2:])
        for i, conv in enumerate(self.convs):
            a = conv(torch.cat([time, nnf.relu_(a) if i else a], 1))
        return self.scales.pack(a.split([shape[0] for shape in self.scales.shapes], 1))
