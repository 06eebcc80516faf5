"""Image data sets as whole tensors on the device, normalised and augmented there a batch at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import sources
from .augment import flip_and_crop
from .files import Layout, describe, find_layout, lookup, read
from .mapped import mapped, one_at_a_time
from .readers import DataError, DataMissing, Raw

T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """x uint8 (N, C, H, W), y int64 (N,), both on one device; of a data set that streams, x names N files."""

    x: Any
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def first(self, n: int | None) -> Split:
        return Split(self.x[:n], self.y[:n])


@dataclass(frozen=True)
class Data:
    """A loaded data set. ``sha256`` is over all its pixels and labels, whatever the split and the files' layout; of one
    that streams from a folder, over its sorted relative file names and their sizes in bytes."""

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
    zoom: int = 0

    def facts(self) -> dict[str, str | int]:
        """What a run's record says of its data."""
        return {"name": self.name, "sha256": self.sha256, "n_train": len(self.train), "n_val": len(self.val),
                "n_test": len(self.test)}  # fmt: skip

    def batch(self, split: Split, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """x float32 (B, C, H, W) normalised and y int64 (B,) of ``index`` (B,), which lives on the data's device.

        With a ``generator`` (of the same device) they are augmented by ``flip``, ``pad`` and ``zoom``; without, never.
        """
        x = split.x.index_select(0, index)
        if generator is not None and (self.flip or self.pad or self.zoom):
            x = flip_and_crop(x, self.flip, self.pad, generator, self.zoom)
        return x.float().mul_(self.scale).add_(self.shift), split.y.index_select(0, index)

    def batches(self, split: Split, size: int, order: Tensor | None = None, first: int = 0, last: int | None = None,
                augment: tuple[int, int] | None = None) -> Generator[tuple[Tensor, Tensor], None, None]:  # fmt: skip
        """``batch`` of each ``size`` of ``order`` (all of the split as it stands), from batch ``first`` to ``last``.

        With ``augment`` (seed, epoch) the images are augmented, in a way that depends on (seed, epoch, number of the
        batch) only: who resumes in the middle of an epoch needs nothing saved. Close the iterator when leaving early.
        """
        order = torch.arange(len(split), device=split.y.device) if order is None else order
        generator = torch.Generator(split.y.device) if augment and (self.flip or self.pad or self.zoom) else None
        for k in range(first, -(-len(order) // size) if last is None else last):
            if augment and generator:
                generator.manual_seed(batch_seed(*augment, k))
            yield self.batch(split, order[k * size : (k + 1) * size], generator)

    def order(self, n: int, seed: int, epoch: int) -> Tensor:
        """A permutation of range(n) where the labels live; of (n, seed, epoch) only, so that all models share it."""
        mixed = hashlib.sha256(f"order {seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:4], "little"))
        return torch.randperm(n, generator=generator).to(self.train.y.device)


def batch_seed(seed: int, epoch: int, batch: int) -> int:
    return ((seed * 100_003 + epoch) * 1_000_003 + batch) % 2**63


def mixed(split: Split) -> Split:
    """In an order that knows no classes, always the same: the first so many have all of them, and so has a batch."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    return Split(split.x[order.numpy()], split.y[order])


class Dataset:
    """A data set to load and how to present it: derive one of your own with ``shape``, ``classes`` and ``read``.

        class Mine(Dataset):
            shape, classes = (3, 64, 64), 5

            def read(self, root):  # root: the folder paths.data
                return Raw(train_x, train_y, test_x, test_y)  # arrays or tensors: x uint8 (N, C, H, W), y 0..classes-1

    Splitting, normalising and augmenting come for free, and so does the command line: a file
    my-configs/dataset/mine.yaml that says ``_target_: my_module.Mine`` and any of the arguments, then
    ``--config-dir my-configs 'allow_targets=[my_module]' dataset=mine``. Raises ValueError for what makes no sense.

    Args:
        val_size: images taken out of the training set for validation, chosen by ``val_seed``; 0 for none.
        mean, std: a channel each, of pixels scaled to [0, 1]; null for one half.
        flip: probability of a left-right mirror image; pad: zeros on each side before a random crop, in pixels.
        zoom: pixels a side that a training image is resized to before a random crop of its own size; 0 for not.
    """

    shape: tuple[int, int, int]  # (C, H, W)
    classes: int
    peak = 255  # the value of a full-on pixel
    n_train: int | None = None  # where it is known before anything is read
    by_class = False  # whether the official order is one class after another
    name = ""  # the class's own, unless said

    def __init__(self, val_size: int = 0, mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
                 flip: float = 0.0, pad: int = 0, val_seed: int = 0, zoom: int = 0):  # fmt: skip
        self.name = self.name or type(self).__name__
        for field, count in (("shape", 3), ("classes", 1)):
            value = getattr(self, field, None)
            numbers = [value] if count == 1 else list(value or ())
            if len(numbers) != count or not all(isinstance(n, int) and n > 0 for n in numbers):
                wanted = "a whole number" if count == 1 else "(channels, height, width)"
                raise ValueError(f"{type(self).__name__}.{field} must be {wanted}, not {value!r}")
        self.shape = tuple(self.shape)  # type: ignore[assignment]
        for field, value in (("val_size", val_size), ("pad", pad), ("val_seed", val_seed), ("zoom", zoom)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"dataset.{field} must be a whole number from 0 on, not {value!r}")
        if not isinstance(flip, (int, float)) or not 0 <= flip <= 1:
            raise ValueError(f"dataset.flip must be a probability, not {flip!r}")
        if zoom and pad:
            raise ValueError(f"dataset.zoom={zoom} and dataset.pad={pad} are two ways to crop; set one of them to 0")
        if zoom and zoom < max(self.shape[1:]):
            sides = " x ".join(map(str, self.shape[1:]))
            raise ValueError(f"dataset.zoom={zoom} is smaller than the images of {self.name}, {sides}; take "
                             f"{max(self.shape[1:])} or more, or 0 for none")  # fmt: skip
        self.val_size, self.flip, self.pad, self.zoom, self.val_seed = val_size, flip, pad, zoom, val_seed
        if self.n_train is not None:
            self._leave_some(self.n_train)
        self.mean, self.std = self._by_channel("mean", mean), self._by_channel("std", std)
        if not all(value > 0 for value in self.std):
            raise ValueError(f"dataset.std must be positive, not {list(self.std)}")

    def read(self, root: Path) -> Raw:
        """The whole data set. Raises DataMissing where it is not there."""
        raise DataError(f"{type(self).__name__} has no read(root), which gives Raw(train_x, train_y, test_x, test_y)")

    def fetch(self, root: Path, report: sources.Report) -> None:
        """Bring the files under ``root`` if they can be fetched, and check them; ``report`` takes lines of text."""
        raw = self._checked(self.read(root))
        shape = " x ".join(map(str, self.shape))
        report(f"{self.name}: {len(raw.train_y):,} + {len(raw.test_y):,} images of {shape}, {self.classes} classes")

    def describe(self, root: Path) -> dict[str, Any]:
        """One row of a table: state (present | incomplete | absent), bytes there, download_mb (None: unknown), folder,
        and how to get it. Files may still be corrupt: ``fetch`` tells."""
        row = {"folder": str(root), "download_mb": None, "how": f"{type(self).__name__}.read says"}
        try:
            return row | {"state": "present", "bytes": sum(torch.as_tensor(part).nbytes for part in self.read(root))}
        except (DataMissing, OSError):
            return row | {"state": "absent", "bytes": 0}

    def load(self, root: Path | str, device: torch.device | str = "cpu", fetch: sources.Report | None = None,
             workers: int | str = "auto") -> Data:  # fmt: skip
        """Read the files under ``root`` and put everything on ``device``; only what streams needs ``workers``.

        Files that are not there are fetched first if ``fetch``, a receiver of lines of text, is given; else nothing
        touches the network. Raises DataMissing, DataCorrupt.
        """
        splits, sha256 = self._splits(Path(root), fetch)
        train, val, test = (Split(split.x.to(device), split.y.to(device)) for split in splits)
        return Data(train=train, val=val, test=test, sha256=sha256, pad=self.pad, zoom=self.zoom,
                    **self._presented(device))  # fmt: skip

    def _splits(self, root: Path, fetch: sources.Report | None) -> tuple[Sequence[Split], str]:
        """Training, validation and test images, and the hash over all of them."""
        raw = self._checked(self._fetched(self.read, root, fetch))
        return (*self._split(Split(raw.train_x, raw.train_y)), Split(raw.test_x, raw.test_y)), _sha256(raw)

    def _fetched(self, look: Callable[[Path], T], root: Path, fetch: sources.Report | None) -> T:
        """`look(root)`, the files being fetched where they are missing and `fetch` is given. Raises DataMissing."""
        try:
            return look(root)
        except DataMissing:
            if fetch is None:
                raise
            self.fetch(root, fetch)
            return look(root)

    def _presented(self, device: torch.device | str) -> dict[str, Any]:
        """What Data is told beside its images."""
        mean, std = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (self.mean, self.std))
        scale, shift = (1 / (self.peak * std)).float().to(device), (-mean / std).float().to(device)
        return {"name": self.name, "classes": self.classes, "shape": self.shape, "scale": scale, "shift": shift,
                "flip": self.flip}  # fmt: skip

    def _by_channel(self, field: str, values: Sequence[float] | None) -> tuple[float, ...]:
        channels = self.shape[0]
        values = [0.5] * channels if values is None else values
        if not isinstance(values, Sequence) or len(values) != channels or isinstance(values, str):
            raise ValueError(
                f"dataset.{field} of {self.name} must be a list, a number for each of {channels} channels"
            )
        return tuple(float(value) for value in values)

    def _leave_some(self, n_train: int) -> None:
        if self.val_size >= n_train:
            has = f"{self.name} has {n_train:,} training images"
            raise DataError(f"dataset.val_size={self.val_size}, but {has}; take fewer, or 0")

    def _checked(self, raw: Raw) -> Raw:
        """Tensors of what ``read`` gave. Raises DataError that says what is wrong with them."""
        try:
            raw = Raw(*map(torch.as_tensor, raw))
        except (TypeError, ValueError, RuntimeError) as error:
            why = f"Raw(train_x, train_y, test_x, test_y), four arrays of numbers ({error})"
            raise DataError(f"{self.name}.read must give {why}") from None
        for part, x, y in (("train", raw.train_x, raw.train_y), ("test", raw.test_x, raw.test_y)):
            problem = ""
            if x.dtype != torch.uint8:
                problem = f"{part}_x of {_spelled(x)}, but pixels must be uint8, 0 to {self.peak}"
            elif x.shape[1:] != self.shape or not len(x):
                problem = f"{part}_x of shape {[*x.shape]}, but shape says {['N', *self.shape]}"
            elif y.shape != x.shape[:1] or y.is_floating_point() or y.is_complex():
                problem = f"{part}_y of {_spelled(y)}, but {len(x)} images need as many whole numbers"
            elif not 0 <= int(y.min()) <= int(y.max()) < self.classes:
                wrong = int(y.min()) if int(y.min()) < 0 else int(y.max())
                problem = f"a label {wrong} in {part}_y, but classes says 0 to {self.classes - 1}"
            if problem:
                raise DataError(f"{self.name}.read gave {problem}")
        return Raw(raw.train_x, raw.train_y.long(), raw.test_x, raw.test_y.long())

    def _split(self, whole: Split) -> tuple[Split, Split]:
        """(train, validation): disjoint, in official order, but for validation images that would be by class."""
        self._leave_some(len(whole))
        chosen = torch.zeros(len(whole), dtype=torch.bool)
        generator = torch.Generator().manual_seed(self.val_seed)
        chosen[torch.randperm(len(chosen), generator=generator)[: self.val_size]] = True
        val = Split(whole.x[chosen], whole.y[chosen])
        val = mixed(val) if self.by_class else val
        if not self.val_size:
            return whole, val  # no copy of the whole
        return Split(whole.x[~chosen], whole.y[~chosen]), val


class ImageData(Dataset):
    """A key of KNOWN (digits, mnist, fashion_mnist, cifar10, cifar100, svhn), read from its official files."""

    def __init__(self, name: str, val_size: int, mean: Sequence[float], std: Sequence[float], flip: float = 0.0,
                 pad: int = 0, val_seed: int = 0, zoom: int = 0):  # fmt: skip
        known = lookup(name)
        self.name, self.shape, self.classes = name, known.shape, known.classes
        self.peak, self.n_train = known.peak, known.n_train
        super().__init__(val_size, mean, std, flip, pad, val_seed, zoom)

    def read(self, root: Path) -> Raw:
        return read(self.name, root)

    def fetch(self, root: Path, report: sources.Report) -> None:
        sources.fetch(self.name, root, report)

    def _splits(self, root: Path, fetch: sources.Report | None) -> tuple[Sequence[Split], str]:
        """Of the jobs of a node one fetches, checks and decodes; the images of all are the same pages of memory."""
        if not lookup(self.name).download:
            return super()._splits(root, fetch)
        if fetch is not None:
            root.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(root):
            return self._mapped(root, self._fetched(partial(find_layout, self.name), root, fetch))

    def _mapped(self, root: Path, layout: Layout) -> tuple[Sequence[Split], str]:
        """Named by the files it is made of: one that has changed is read again."""
        paths = layout.paths(root).values()
        files = [(path.name, stat.st_size, stat.st_mtime_ns) for path in paths for stat in [path.stat()]]
        key = hashlib.sha256(repr((files, self.val_size, self.val_seed)).encode()).hexdigest()[:12]

        def make() -> tuple[Sequence[Tensor], str]:
            splits, sha256 = super(ImageData, self)._splits(root, None)
            return [part for split in splits for part in (split.x, split.y)], sha256

        tensors, sha256 = mapped(root / ".mapped" / f"{self.name}-{key}.pt", make)
        return [Split(x, y) for x, y in zip(tensors[::2], tensors[1::2])], sha256

    def describe(self, root: Path) -> dict[str, Any]:
        return describe(self.name, root)


def _spelled(array: Tensor) -> str:
    return f"{str(array.dtype).removeprefix('torch.')} {[*array.shape]}"


def _sha256(raw: Raw) -> str:
    """Over train images, train labels, test images, test labels; labels as one byte each up to 256 classes."""
    digest = hashlib.sha256()
    for tensor in raw:
        narrow = tensor if tensor.dtype == torch.int64 and int(tensor.max()) > 255 else tensor.to(torch.uint8)
        digest.update(narrow.contiguous().numpy().data)
    return digest.hexdigest()
