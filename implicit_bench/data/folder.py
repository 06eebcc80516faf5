"""Big pictures in folders, decoded and augmented by worker processes while the model computes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import sources
from .images import Data, Dataset, Split, batch_seed, mixed
from .readers import DataError, DataMissing, open_rgb
from .torchvision_shim import ensure_torchvision
from .workers import made

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

Transform = Callable[[Any], Tensor]  # PIL image -> uint8 (C, H, W)


class ImageFolder(Dataset):
    """A folder with train/ and val/ of class folders, as torchvision's ImageFolder: ImageNet's layout. val/ is the test
    split; validation images are taken out of train/.

    Training images are mirrored with probability ``flip``. ``crop`` resized: they are random resized crops; all others
    have ``resize`` pixels on the shorter side, of which the middle is seen. ``crop`` squash, as the first paper: they
    are resized to ``resize`` x ``resize`` whatever their aspect, then cropped at random; all others to ``size`` x
    ``size``. Nothing is kept in memory but the files' names.

    Args:
        folder: the one that holds train/ and val/.
        size: pixels a side of what the network sees.
    """

    by_class = True

    def __init__(self, folder: str | None, val_size: int, mean: Sequence[float], std: Sequence[float],
                 flip: float = 0.5, size: int = 224, resize: int = 256, val_seed: int = 0,
                 crop: Literal["resized", "squash"] = "resized"):  # fmt: skip
        if not 0 < size <= resize:
            raise ValueError(f"dataset.size={size} must be positive and at most dataset.resize={resize}")
        self.folder, self.shape, self.size, self.resize, self.crop = folder, (3, size, size), size, resize, crop
        self.name = Path(folder).name if folder else "imagenet"
        self.labels = {} if folder is None else {name: k for k, name in enumerate(_classes(Path(folder, "train")))}
        self.classes = len(self.labels) or 1000
        super().__init__(val_size, mean, std, flip, 0, val_seed)

    def load(self, root: Path | str, device: torch.device | str = "cpu", fetch: sources.Report | None = None,
             workers: int | str = "auto") -> Data:  # fmt: skip
        if not ensure_torchvision():
            raise DataError("images are cropped by torchvision, which is not installed: pip install torchvision")
        folder = self._named()
        digest = hashlib.sha256()
        splits = [self._split_of(folder, split, digest) for split in ("train", "val")]
        (train, val), test = self._split(splits[0]), mixed(splits[1])
        return Streamed(train=train, val=val, test=test, sha256=digest.hexdigest(), folder=folder, workers=workers,
                        size=self.size, resize=self.resize, crop=self.crop, **self._presented(device))  # fmt: skip

    def fetch(self, root: Path, report: sources.Report) -> None:
        train, test = (self._split_of(self._named(), split, hashlib.sha256()) for split in ("train", "val"))
        report(f"{self.name}: {len(train):,} + {len(test):,} images of {self.classes:,} classes in {self.folder}")

    def describe(self, root: Path) -> dict[str, Any]:
        where = "register at image-net.org, unpack, then dataset.folder=/path"
        row = {"folder": self.folder or "dataset.folder", "bytes": 0, "download_mb": None, "how": where}
        if self.folder is None:
            return row | {"state": "absent"}
        try:
            files = [entry for split in ("train", "val") for _, entry in self._entries(Path(self.folder), split)]
        except DataError:
            return row | {"state": "incomplete"}
        return row | {"state": "present", "bytes": sum(entry.stat().st_size for entry in files)}

    def _named(self) -> Path:
        if self.folder is None:
            raise DataMissing("dataset.folder names no folder; write dataset.folder=/path, which holds train/ and val/")
        return Path(self.folder).absolute()

    def _entries(self, folder: Path, split: str) -> Iterator[tuple[int, os.DirEntry[str]]]:
        """(label, file) of a split, in the order of their names. Raises DataError."""
        names = _classes(folder / split)
        if unknown := [name for name in names if name not in self.labels]:
            raise DataError(f"{folder / split} has a class {unknown[0]!r} that {folder / 'train'} lacks; both need the "
                            "same class folders")  # fmt: skip
        for name in names:
            empty = True
            for entry in _pictures(folder / split / name):
                empty = False
                yield self.labels[name], entry
            if empty and split == "train":
                raise DataError(f"{folder / split / name} has no images ({', '.join(SUFFIXES)}); fill it or remove it")

    def _split_of(self, folder: Path, split: str, digest: Any) -> Split:
        import numpy as np

        paths, labels = [], []
        for label, entry in self._entries(folder, split):
            name = os.path.relpath(entry.path, folder)
            digest.update(f"{name} {entry.stat().st_size}\n".encode(errors="surrogateescape"))
            paths.append(os.fsencode(name))
            labels.append(label)
        return Split(np.array(paths), torch.tensor(labels))  # bytes of one width: a list would be copied by workers


@dataclass(frozen=True)
class Streamed(Data):
    """``split.x`` names files under ``folder``. Batches are made ahead in ``workers`` processes and are the same
    whatever their number. Splits lie on the CPU, batches on the device."""

    folder: Path = Path()
    workers: int | str = "auto"
    size: int = 224
    resize: int = 256
    crop: Literal["resized", "squash"] = "resized"

    def batch(self, split: Split, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        drawn = () if generator is None else torch.randint(2**62, (1,), generator=generator, device=generator.device)
        seed = next((int(number) for number in drawn), None)
        return self._present(*_decode(self.folder, split, index.cpu(), self._transform(seed is not None), seed))

    def batches(self, split: Split, size: int, order: Tensor | None = None, first: int = 0, last: int | None = None,
                augment: tuple[int, int] | None = None) -> Generator[tuple[Tensor, Tensor], None, None]:  # fmt: skip
        order = torch.arange(len(split)) if order is None else order.cpu()
        last = -(-len(order) // size) if last is None else last
        ahead = _Batches(self.folder, split, order, size, self._transform(augment is not None), augment)
        with closing(made(ahead, range(first, last), self.workers, pin=self.scale.is_cuda)) as items:
            for x, y in items:
                yield self._present(x, y)

    def _present(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = (part.to(self.scale.device, non_blocking=True) for part in (x, y))
        return x.float().mul_(self.scale).add_(self.shift), y

    def _transform(self, augment: bool) -> Transform:
        from torchvision.transforms import v2

        random = [v2.RandomResizedCrop(self.size), v2.RandomHorizontalFlip(self.flip)]
        fixed = [v2.Resize(self.resize), v2.CenterCrop(self.size)]
        if self.crop == "squash":
            whole = v2.Resize((self.resize, self.resize))
            random = [whole, v2.RandomHorizontalFlip(self.flip), v2.RandomCrop(self.size)]
            fixed = [v2.Resize((self.size, self.size))]
        return v2.Compose([*(random if augment else fixed), v2.PILToTensor()])


@dataclass
class _Batches:
    """Whole batches by number; augmented as (seed, epoch) and the number say."""

    folder: Path
    split: Split
    order: Tensor
    size: int
    transform: Transform
    augment: tuple[int, int] | None

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        index = self.order[k * self.size : (k + 1) * self.size]
        seed = batch_seed(*self.augment, k) if self.augment else None
        return _decode(self.folder, self.split, index, self.transform, seed)


def _decode(folder: Path, split: Split, index: Tensor, transform: Transform, seed: int | None) -> tuple[Tensor, Tensor]:
    """x uint8 (B, C, H, W), y (B,). The transform draws from torch's global generator, which is put back after."""
    paths = [folder / os.fsdecode(name) for name in split.x[index.numpy()]]
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU too
        return torch.stack([transform(open_rgb(path)) for path in paths]), split.y[index]


def _classes(folder: Path) -> list[str]:
    """The names of the class folders in train/ or val/. Raises DataError."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        why = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise DataError(f"{folder} {why}; dataset.folder must hold train/ and val/, each of class folders") from None
    if not names:
        raise DataError(f"{folder} has no class folders; sort its images into one folder a class")
    return names


def _pictures(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); mend its permissions") from None
    for entry in entries:
        if entry.is_dir():
            yield from _pictures(entry.path)
        elif entry.name.lower().endswith(SUFFIXES):
            yield entry
