"""Random flips and crops of a whole batch at once, on the device it lives on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad as zero_pad


def flip_and_crop(x: Tensor, flip: float, pad: int, generator: torch.Generator) -> Tensor:
    """Mirror each image with probability ``flip`` and crop it at random from itself padded by ``pad`` zeros a side.

    x (B, C, H, W) of raw pixels, so that the padding is black; the same shape returns. ``generator`` lives on x's
    device and decides everything. Distributed as torchvision's RandomCrop(H, padding=pad) and
    RandomHorizontalFlip(flip) are. Costs one indexing operation and 2 (H + 2 pad)(W + 2 pad) / HW times x in memory.
    """
    batch, _, height, width = x.shape
    padded = zero_pad(x, (pad, pad, pad, pad))
    both = torch.stack([padded, padded.flip(3)])
    windows = both.unfold(3, height, 1).unfold(4, width, 1)  # (2, B, C, 2 pad + 1, 2 pad + 1, H, W), a view
    mirrored = torch.rand(batch, generator=generator, device=x.device) < flip
    top, left = torch.randint(2 * pad + 1, (2, batch), generator=generator, device=x.device)
    return windows[mirrored.long(), torch.arange(batch, device=x.device), :, top, left]
