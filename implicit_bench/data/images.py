"""Image data sets as whole tensors on the device, normalised and augmented there a batch at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import sources
from .augment import flip_and_crop
from .files import lookup, read
from .readers import DataMissing, Raw


@dataclass(frozen=True)
class Split:
    """x uint8 (N, C, H, W), y int64 (N,), both on one device."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def first(self, n: int | None) -> Split:
        return Split(self.x[:n], self.y[:n])


@dataclass(frozen=True)
class Data:
    """A loaded data set. ``sha256`` is over all its pixels and labels, whatever the split and the files' layout."""

    name: str
    classes: int
    shape: tuple[int, int, int]  # (C, H, W)
    train: Split
    val: Split
    test: Split
    sha256: str
    scale: Tensor  # (1, C, 1, 1): a normalised pixel is pixel * scale + shift
    shift: Tensor
    flip: float = 0.0
    pad: int = 0

    def facts(self) -> dict[str, str | int]:
        """What a run's record says of its data."""
        return {"name": self.name, "sha256": self.sha256, "n_train": len(self.train), "n_val": len(self.val),
                "n_test": len(self.test)}  # fmt: skip

    def batch(self, split: Split, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """x float32 (B, C, H, W) normalised and y int64 (B,) of ``index`` (B,), which lives on the data's device.

        With a ``generator`` (of the same device) the images are augmented by ``flip`` and ``pad``; without, never.
        """
        x = split.x.index_select(0, index)
        if generator is not None and (self.flip or self.pad):
            x = flip_and_crop(x, self.flip, self.pad, generator)
        return x.float().mul_(self.scale).add_(self.shift), split.y.index_select(0, index)

    def order(self, n: int, seed: int, epoch: int) -> Tensor:
        """A permutation of range(n) on the data's device that depends on (n, seed, epoch) only: all models share it."""
        mixed = hashlib.sha256(f"order {seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:4], "little"))
        return torch.randperm(n, generator=generator).to(self.train.x.device)


@dataclass
class ImageData:
    """What to load and how to present it. Raises ValueError for values that make no sense.

    Args:
        name: a key of KNOWN (digits, mnist, fashion_mnist, cifar10).
        val_size: images taken out of the training set for validation, chosen by ``val_seed``; 0 for none.
        mean, std: a channel each, of pixels scaled to [0, 1].
        flip: probability of a left-right mirror image; pad: zeros on each side before a random crop, in pixels.
    """

    name: str
    val_size: int
    mean: Sequence[float]
    std: Sequence[float]
    flip: float = 0.0
    pad: int = 0
    val_seed: int = 0

    def __post_init__(self) -> None:
        known = lookup(self.name)
        for field in ("val_size", "pad", "val_seed"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"dataset.{field} must be a whole number from 0 on, not {value!r}")
        if self.val_size >= known.n_train:
            raise ValueError(f"dataset.val_size={self.val_size}, but {self.name} has {known.n_train:,} training images")
        if not isinstance(self.flip, (int, float)) or not 0 <= self.flip <= 1:
            raise ValueError(f"dataset.flip must be a probability, not {self.flip!r}")
        for field in ("mean", "std"):
            values = getattr(self, field)
            if not isinstance(values, Sequence) or len(values) != known.shape[0] or isinstance(values, str):
                raise ValueError(
                    f"dataset.{field} of {self.name} must be a list, a number for each of {known.shape[0]} channels"
                )
            setattr(self, field, tuple(float(value) for value in values))
        if not all(value > 0 for value in self.std):
            raise ValueError(f"dataset.std must be positive, not {list(self.std)}")

    @property
    def classes(self) -> int:
        return lookup(self.name).classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return lookup(self.name).shape

    def load(self, root: Path | str, device: torch.device | str = "cpu", fetch: sources.Report | None = None) -> Data:
        """Read the files under ``root`` and put everything on ``device``.

        Files that are not there are fetched first if ``fetch``, a receiver of lines of text, is given; else nothing
        touches the network. Raises DataMissing, DataCorrupt.
        """
        root = Path(root)
        try:
            raw = read(self.name, root)
        except DataMissing:
            if fetch is None:
                raise
            sources.fetch(self.name, root, fetch)
            raw = read(self.name, root)
        train, val = self._split(raw)
        known = lookup(self.name)
        mean, std = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return Data(
            name=self.name,
            classes=known.classes,
            shape=known.shape,
            train=_move(train, device),
            val=_move(val, device),
            test=_move(Split(raw.test_x, raw.test_y), device),
            sha256=_sha256(raw),
            scale=(1 / (known.peak * std)).float().to(device),
            shift=(-mean / std).float().to(device),
            flip=self.flip,
            pad=self.pad,
        )

    def _split(self, raw: Raw) -> tuple[Split, Split]:
        """(train, validation): disjoint, in official order."""
        chosen = torch.zeros(len(raw.train_y), dtype=torch.bool)
        generator = torch.Generator().manual_seed(self.val_seed)
        chosen[torch.randperm(len(chosen), generator=generator)[: self.val_size]] = True
        val = Split(raw.train_x[chosen], raw.train_y[chosen])
        if not self.val_size:
            return Split(raw.train_x, raw.train_y), val  # no copy of the whole
        return Split(raw.train_x[~chosen], raw.train_y[~chosen]), val


def _move(split: Split, device: torch.device | str) -> Split:
    return Split(split.x.to(device), split.y.to(device))


def _sha256(raw: Raw) -> str:
    """Over train images, train labels, test images, test labels; labels as one byte each."""
    digest = hashlib.sha256()
    for tensor in raw:
        digest.update(tensor.to(torch.uint8).contiguous().numpy().data)
    return digest.hexdigest()
