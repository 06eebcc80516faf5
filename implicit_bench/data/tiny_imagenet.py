"""Tiny ImageNet: 120,000 small JPEGs in folders, decoded once."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import sources
from .download import download
from .files import command_for
from .images import Dataset
from .mapped import mapped
from .readers import DataCorrupt, DataMissing, Raw, open_rgb
from .workers import made

FOLDER = "tiny-imagenet-200"
CHUNK = 256  # images at a time
URL, MD5, BYTES = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de", 248_100_043


class TinyImageNet(Dataset):
    """Tiny ImageNet from tiny-imagenet-200/, the official zip unpacked; classes in the order of its wnids.txt.

    The official test images have no labels, so that the official validation images are the test split. Decoded images
    are kept in .mapped/ beside the folder, named by a hash over the names, sizes and times of all the JPEGs.
    """

    shape, classes = (3, 64, 64), 200
    n_train, n_test = 100_000, 10_000
    by_class = True
    name = "tiny_imagenet"

    def read(self, root: Path) -> Raw:
        paths, y = self._files(root)
        x = self._decoded(root, paths)
        n = self.n_train
        return Raw(x[:n], y[:n], x[n:], y[n:])

    def fetch(self, root: Path, report: sources.Report) -> None:
        folder = root / FOLDER
        if not folder.exists():
            parts = sources.parts_of(self.name, root)
            archive = download([URL], parts, MD5, lambda line: report(f"{self.name}: {line}"))
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as work:
                unzip(archive, Path(work))
                os.replace(Path(work, FOLDER), folder)
            shutil.rmtree(parts)
        paths, _ = self._files(root)
        report(f"{self.name}: {len(paths):,} images in {folder}")

    def describe(self, root: Path) -> dict[str, Any]:
        folder = root / FOLDER
        row = {"folder": str(folder), "download_mb": BYTES / 1e6, "how": command_for(self.name, root), "bytes": 0}
        if not folder.exists():
            return row | {"state": "absent"}
        row["bytes"] = sum(entry.stat().st_size for entry in _below(folder))
        try:
            self._files(root)
        except (DataCorrupt, DataMissing):
            return row | {"state": "incomplete"}
        return row | {"state": "present"}

    def _files(self, root: Path) -> tuple[list[str], Tensor]:
        """The training files by class and name, then the test files as annotated; and their labels."""
        folder, remedy = root / FOLDER, f"delete {root / FOLDER} and run `{command_for(self.name, root)}`"
        if not folder.exists():
            raise DataMissing(f"data set {self.name!r} is not in {root}/; fetch it with "
                              f"`{command_for(self.name, root)}` ({BYTES / 1e6:.0f} MB)")  # fmt: skip
        try:
            label = {wnid: k for k, wnid in enumerate((folder / "wnids.txt").read_text().split())}
            own = [(k, folder / "train" / wnid / "images") for wnid, k in label.items()]
            train = [(entry.path, k) for k, images in own for entry in _below(images)]
            rows = (line.split() for line in (folder / "val/val_annotations.txt").read_text().splitlines())
            test = [(f"{folder}/val/images/{row[0]}", label[row[1]]) for row in rows]
        except (OSError, KeyError, IndexError) as error:
            raise DataCorrupt(f"{folder} is not whole ({type(error).__name__}: {error}); {remedy}") from None
        found, wanted = (len(label), len(train), len(test)), (self.classes, self.n_train, self.n_test)
        if found != wanted:
            raise DataCorrupt(f"{folder} has {found} classes, training and validation images, not {wanted}; {remedy}")
        paths, labels = zip(*train, *test)
        return list(paths), torch.tensor(labels)

    def _decoded(self, root: Path, paths: list[str]) -> Tensor:
        """uint8 (N, C, H, W) of all files, decoded once for all processes as long as they are the very same."""
        digest = hashlib.sha256()
        for path in paths:
            try:
                facts = os.stat(path)
            except FileNotFoundError:
                raise DataCorrupt(f"{path} is missing; delete {root / FOLDER} and fetch it again") from None
            digest.update(f"{path.removeprefix(str(root))} {facts.st_size} {facts.st_mtime_ns}\n".encode())
        kept = root / ".mapped" / f"{FOLDER}-{digest.hexdigest()[:16]}.pt"

        def make() -> tuple[list[Tensor], str]:
            for old in kept.parent.glob(f"{FOLDER}-*.pt"):  # of other files
                old.unlink()
            images = torch.empty(len(paths), *self.shape, dtype=torch.uint8)
            numbers = range(-(-len(paths) // CHUNK))
            with closing(made(_Chunks(paths, self.shape), numbers, "auto")) as chunks:
                for k, chunk in zip(numbers, chunks):
                    images[k * CHUNK : (k + 1) * CHUNK] = chunk
            return [images], ""

        [[images], _] = mapped(kept, make)
        return images


@dataclass
class _Chunks:
    """CHUNK files at a time, decoded to uint8 (n, C, H, W)."""

    paths: list[str]
    shape: tuple[int, int, int]

    def __getitem__(self, k: int) -> Tensor:
        import numpy as np

        _, height, width = self.shape
        images = torch.empty(len(self.paths[k * CHUNK : (k + 1) * CHUNK]), *self.shape, dtype=torch.uint8)
        for image, path in zip(images, self.paths[k * CHUNK :]):
            picture = open_rgb(path)
            if picture.size != (width, height):
                raise DataCorrupt(f"{path} has {picture.width} x {picture.height} pixels, not {width} x {height}")
            image.copy_(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        return images


def unzip(archive: Path, work: Path) -> None:
    """Unpack what lies in FOLDER, but for the unlabelled test images; no member can name a path outside."""
    with zipfile.ZipFile(archive) as whole:
        for member in whole.infolist():
            parts = member.filename.split("/")
            if parts[0] == FOLDER and parts[1:2] != ["test"] and ".." not in parts:
                whole.extract(member, work)


def _below(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """The files under a folder, in the order of their names."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _below(entry.path)
        else:
            yield entry
