"""Random flips and crops of a whole batch at once, on the device it lives on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.functional import pad as zero_pad


def flip_and_crop(x: Tensor, flip: float, pad: int, generator: torch.Generator, zoom: int = 0) -> Tensor:
    """Mirror each image with probability ``flip`` and crop it at random from itself padded by ``pad`` zeros a side, or
    from itself resized to ``zoom`` x ``zoom``.

    x (B, C, H, W) of raw pixels, so that the padding is black; the same shape returns, in float32 if it was resized.
    ``generator`` lives on x's device and decides everything. Distributed as torchvision's RandomCrop(H, padding=pad)
    and RandomHorizontalFlip(flip) are. A crop is copied row by row: every run of W pixels of the padded images is a
    row of one overlapping view, and picking those is several times as fast as picking windows by index.
    """
    batch, channels, height, width = x.shape
    mirrored = torch.rand(batch, generator=generator, device=x.device) < flip
    if zoom:
        top, left = (torch.randint(zoom - side + 1, (batch,), generator=generator, device=x.device)
                     for side in (height, width))  # fmt: skip
    else:
        top, left = torch.randint(2 * pad + 1, (2, batch), generator=generator, device=x.device)
    if flip:
        x = torch.cat([x, x.flip(3)]).index_select(0, torch.arange(batch, device=x.device) + batch * mirrored)
    if not (pad or zoom):
        return x
    padded = interpolate(x.float(), (zoom, zoom), mode="bilinear") if zoom else zero_pad(x, (pad, pad, pad, pad))
    tall, wide = padded.shape[2:]
    planes = torch.arange(0, padded.numel(), tall * wide, device=x.device).view(batch, channels)
    lines = torch.arange(0, height * wide, wide, device=x.device)
    rows = (planes + (top * wide + left)[:, None])[:, :, None] + lines
    return padded.flatten().unfold(0, width, 1).index_select(0, rows.flatten()).view(x.shape)
