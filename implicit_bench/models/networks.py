"""Networks: stem, cell and head of one classifier, and the predictor g(x) that a Skip model adds to it."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Protocol

from torch import nn

from .cells import DenseCell, make_cell


class Network(Protocol):
    stem: nn.Module  # images (B, C, H, W) -> x
    cell: nn.Module
    head: nn.Module  # z (B, D) -> logits (B, classes)

    def predictor(self) -> nn.Module:
        """A new module x -> z0 (B, D), for init=skip_net."""


class Dense(nn.Module):
    """The first paper's MNIST network (arXiv 2201.12240): 784 -> 128 relu, the dense cell, 128 -> 10.

    134,538 parameters on MNIST, 151,050 with the predictor 128 -> 128 relu. On other images the input is flattened.
    `untied`: so many different cells in turn instead of one (model=resnet); 0 is the tied cell.
    """

    widths: ClassVar = ("hidden",)  # what match=params scales

    def __init__(self, shape: tuple[int, int, int], classes: int, hidden: int = 128, untied: int = 0):
        super().__init__()
        if hidden < 1:
            raise ValueError(f"network.hidden={hidden} must be at least 1")
        self.hidden = hidden
        channels, height, width = shape
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, hidden), nn.ReLU())
        self.cell = make_cell(partial(DenseCell, hidden), untied)
        self.head = nn.Linear(hidden, classes)

    def predictor(self) -> nn.Module:
        return nn.Sequential(nn.Linear(self.hidden, self.hidden), nn.ReLU())
