"""The official file formats -> tensors."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class DataError(ValueError):
    """Something about data files that the user can mend; the message is one sentence that says how."""


class DataMissing(DataError):
    """Files of a data set are not there."""


class DataCorrupt(DataError):
    """A file is there, but is not the official one."""


class Raw(NamedTuple):
    """A whole data set in official order on the CPU: x uint8 (N, C, H, W), y int64 (N,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


Read = Callable[[str], bytearray]  # file name -> its content, whose hash has been checked
CIFAR_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def parse_idx(content: bytearray) -> Tensor:
    """An idx file of bytes -> uint8 tensor of the shape in its header, sharing memory. Raises DataCorrupt."""
    ndim = content[3]
    offset = 4 + 4 * ndim
    if content[:3] != b"\0\0\x08" or not 0 < ndim <= 4 or len(content) < offset:
        raise DataCorrupt(f"not an idx file of bytes: it begins with {bytes(content[:4]).hex(' ')}")
    shape = struct.unpack_from(f">{ndim}I", content, 4)
    if torch.Size(shape).numel() != len(content) - offset:
        raise DataCorrupt(f"not a whole idx file: the header says {shape}, {len(content) - offset:,} bytes follow")
    return torch.frombuffer(content, dtype=torch.uint8, offset=offset).view(shape)


def decode_idx(read: Read) -> Raw:
    """MNIST's four files."""

    def split(name: str) -> tuple[Tensor, Tensor]:
        images, labels = (parse_idx(read(f"{name}-{part}-ubyte")) for part in ("images-idx3", "labels-idx1"))
        return images.unsqueeze(1), labels.long()

    return Raw(*split("train"), *split("t10k"))


def decode_cifar_bin(read: Read) -> Raw:
    """CIFAR-10's binary version: an image is its label byte, then 3072 bytes of planar RGB."""
    rows = [torch.frombuffer(read(f"{name}.bin"), dtype=torch.uint8).view(-1, 3073) for name in CIFAR_BATCHES]
    return _join_cifar([row[:, 1:] for row in rows], [row[:, 0].long() for row in rows])


def decode_cifar_py(read: Read) -> Raw:
    """CIFAR-10's python version. Only because ``read`` has checked the hashes may the pickles be opened."""
    batches = [pickle.loads(read(name), encoding="bytes") for name in CIFAR_BATCHES]
    return _join_cifar([torch.from_numpy(b[b"data"]) for b in batches], [torch.tensor(b[b"labels"]) for b in batches])


def decode_cifar100(read: Read) -> Raw:
    """CIFAR-100's python version, its 100 fine labels. Pickles, as CIFAR-10's."""
    train, test = (pickle.loads(read(name), encoding="bytes") for name in ("train", "test"))
    y = [torch.tensor(batch[b"fine_labels"]) for batch in (train, test)]
    return _join_cifar([torch.from_numpy(batch[b"data"]) for batch in (train, test)], y)


def decode_svhn(read: Read) -> Raw:
    """SVHN's cropped digits: X (32, 32, 3, N); label 10 is the digit 0."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError("SVHN's files need scipy to be read: pip install 'implicit-bench[data]'") from None

    def split(name: str) -> tuple[Tensor, Tensor]:
        arrays = loadmat(BytesIO(read(f"{name}_32x32.mat")))
        y = torch.from_numpy(arrays["y"].reshape(-1).astype("int64"))
        return torch.from_numpy(arrays["X"]).permute(3, 2, 0, 1).contiguous(), y % 10

    return Raw(*split("train"), *split("test"))


def open_rgb(path: Path | str) -> Any:
    """A picture file as a PIL image in RGB, decoded. Raises DataCorrupt that names it."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except Exception as error:  # a broken file may raise anything
        raise DataCorrupt(f"{path} is no image that can be read ({error}); fetch it again or take it out") from None


def _join_cifar(x: list[Tensor], y: list[Tensor]) -> Raw:
    """The training batches and one test batch: x (N, 3072), y (N,) each."""
    return Raw(torch.cat(x[:-1]).view(-1, 3, 32, 32), torch.cat(y[:-1]), x[-1].reshape(-1, 3, 32, 32), y[-1])


def decode_digits(read: Read) -> Raw:
    """The embedded digits. Test images: of all, put in stable order by class, every fifth (360, stratified)."""
    import numpy as np

    with np.load(BytesIO(read("digits.npz")), allow_pickle=False) as arrays:
        x, y = torch.from_numpy(arrays["x"]).unsqueeze(1), torch.from_numpy(arrays["y"]).long()
    test = torch.zeros(len(y), dtype=torch.bool)
    test[y.argsort(stable=True)[::5]] = True
    return Raw(x[~test], y[~test], x[test], y[test])
