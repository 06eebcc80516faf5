from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layer import ImplicitLayer, LayerOutput
from .networks import Network


class Output(NamedTuple):
    logits: Tensor  # (B, classes)
    layer: LayerOutput


class Classifier(nn.Module):
    """stem -> implicit layer -> head: images (B, C, H, W) to logits (B, classes)."""

    stem: nn.Module
    layer: ImplicitLayer
    head: nn.Module

    def __init__(self, network: Network, layer: ImplicitLayer):
        super().__init__()
        self.stem, self.layer, self.head = network.stem, layer, network.head

    def forward(self, images: Tensor, depth: int = 0) -> Output:
        """With `depth`, so many plain applications of the cell instead of a solve (pretraining)."""
        x = self.stem(images)
        out = self.layer.unrolled(x, depth) if depth else self.layer(x)
        return Output(self.head(out.z), out)

    @torch.no_grad()
    def within(self, images: Tensor, steps: int) -> Tensor:
        """Logits (B, classes) when the layer may apply its cell only `steps` times; 0 = the start alone."""
        x = self.stem(images)
        if steps == 0:
            ctx = self.layer.cell.begin(x)
            return self.head(self.layer.init(x, lambda z, t: self.layer.cell(z, ctx, t)))
        return self.head(self.layer.within(x, steps).z)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part; `init` is what a learned start adds."""
        parts: dict[str, Any] = {"stem": self.stem, "cell": self.layer.cell, "head": self.head, "init": self.layer.init}
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
