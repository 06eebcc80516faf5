"""The known data sets: which official files they are, and finding, checking and reading those under a data root."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .readers import (
    DataCorrupt,
    DataError,
    DataMissing,
    Raw,
    Read,
    decode_cifar100,
    decode_cifar_bin,
    decode_cifar_py,
    decode_digits,
    decode_idx,
    decode_svhn,
)

HERE = Path(__file__).resolve().parent


def _read_table() -> dict[str, tuple[int | None, str]]:
    rows = (line.split() for line in (HERE / "official.txt").read_text().splitlines() if not line.startswith("#"))
    return {name: (None if size == "-" else int(size), digest) for size, digest, name in rows}


OFFICIAL = _read_table()  # path under the data root, or package -> (bytes or None where unknown, hex hash)


@dataclass(frozen=True)
class Layout:
    """One official way of storing a data set: ``files`` (name -> bytes, hex hash) in ``folder`` under the data root."""

    folder: str
    files: dict[str, tuple[int | None, str]]
    decode: Callable[[Read], Raw]

    def paths(self, root: Path) -> dict[str, Path]:
        """File name -> its path under ``root``."""
        return {name: root / self.folder / name for name in self.files}


def _layout(folder: str, decode: Callable[[Read], Raw]) -> Layout:
    files = {Path(path).name: row for path, row in OFFICIAL.items() if path.startswith(f"{folder}/")}
    return Layout(folder, files, decode)


# An absolute folder stays what it is when joined to any data root.
_DIGITS = Layout(str(HERE), {"digits.npz": OFFICIAL["digits.npz"]}, decode_digits)
_MNIST, _FASHION = _layout("MNIST/raw", decode_idx), _layout("FashionMNIST/raw", decode_idx)
_CIFAR10 = (_layout("cifar-10-batches-bin", decode_cifar_bin), _layout("cifar-10-batches-py", decode_cifar_py))
_CIFAR100, _SVHN = _layout("cifar-100-python", decode_cifar100), _layout("SVHN", decode_svhn)


@dataclass(frozen=True)
class Known:
    """``shape`` is (C, H, W), ``peak`` the value of a full-on pixel, ``download`` the official archives' bytes."""

    shape: tuple[int, int, int]
    n_train: int
    n_test: int
    layouts: tuple[Layout, ...]  # the preferred first; the last is the one that its official archives unpack to
    download: int = 0
    peak: int = 255
    classes: int = 10

    @property
    def download_mb(self) -> float:
        return self.download / 1e6


KNOWN = {
    "digits": Known((1, 8, 8), 1_437, 360, (_DIGITS,), peak=16),
    "mnist": Known((1, 28, 28), 60_000, 10_000, (_MNIST,), 11_594_722),
    "fashion_mnist": Known((1, 28, 28), 60_000, 10_000, (_FASHION,), 30_878_645),
    "cifar10": Known((3, 32, 32), 50_000, 10_000, _CIFAR10, 170_498_071),
    "cifar100": Known((3, 32, 32), 50_000, 10_000, (_CIFAR100,), 169_001_437, classes=100),
    "svhn": Known((3, 32, 32), 73_257, 26_032, (_SVHN,), 246_316_178),
}


def lookup(name: str) -> Known:
    """The data set called ``name``. Raises DataError that names the nearest."""
    if name not in KNOWN:
        near = difflib.get_close_matches(name, KNOWN, n=1)
        raise DataError(f"no data set {name!r}; {f'nearest: {near[0]}; ' if near else ''}there are {', '.join(KNOWN)}")
    return KNOWN[name]


def read_checked(path: Path, size: int | None, digest: str, remedy: str) -> bytearray:
    """The ``size`` bytes of ``path``, of md5, sha1 or sha256 ``digest``. Raises DataCorrupt that ends in ``remedy``."""
    found = path.stat().st_size
    if size is not None and found != size:
        problem = "truncated" if found < size else "too long"
        raise DataCorrupt(f"{path} is {problem} ({found:,} bytes, expected {size:,}); {remedy}")
    content = bytearray(found)
    with path.open("rb") as file:
        file.readinto(content)
    algorithm = {32: "md5", 40: "sha1", 64: "sha256"}[len(digest)]
    actual = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if actual != digest:
        raise DataCorrupt(f"{path} is corrupt ({algorithm} {actual}, expected {digest}); {remedy}")
    return content


def command_for(name: str, root: Path) -> str:
    """What fetches a data set into this root."""
    return f"implicit-bench data dataset={name}" + ("" if str(root) == "data" else f" paths.data={root}")


def _read_official(name: str, layout: Layout, root: Path, file: str) -> bytearray:
    remedy = f"delete it and run `{command_for(name, root)}`"
    if not KNOWN[name].download:
        remedy = "it is a part of implicit-bench: install that again"
    return read_checked(root / layout.folder / file, *layout.files[file], remedy)


def find_layout(name: str, root: Path) -> Layout:
    """The first layout all of whose files are under ``root``; looks at no content. Raises DataMissing."""
    known = lookup(name)
    problem = f"is not in {root}/"
    for layout in known.layouts:
        absent = [path for path in layout.paths(root).values() if not path.is_file()]
        if not absent:
            return layout
        if len(absent) < len(layout.files):
            problem = f"is not whole, {absent[0]} is missing"
    command = command_for(name, root)
    raise DataMissing(f"data set {name!r} {problem}; fetch it with `{command}` ({known.download_mb:.0f} MB)")


def read(name: str, root: Path) -> Raw:
    """The whole data set from the files under ``root``, each checked. Raises DataMissing, DataCorrupt."""
    layout = find_layout(name, root)
    return layout.decode(lambda file: _read_official(name, layout, root, file))


def verify(name: str, root: Path | str) -> list[Path]:
    """Check size and hash of every file of the data set under ``root``, in any layout, and return their paths.

    Raises DataCorrupt for the first bad file, DataMissing where no layout is whole.
    """
    root = Path(root)
    there = [(layout, f) for layout in lookup(name).layouts for f, p in layout.paths(root).items() if p.is_file()]
    for layout, file in there:
        _read_official(name, layout, root, file)
    find_layout(name, root)
    return [root / layout.folder / file for layout, file in there]


def describe(name: str, root: Path | str) -> dict[str, Any]:
    """A row of a table, as of ``Dataset.describe``.

    Looks at names and sizes only: what is present may still be corrupt (``verify`` tells).
    """
    known, root = lookup(name), Path(root)
    found = [path for layout in known.layouts for path in layout.paths(root).values() if path.is_file()]
    try:
        folder, state = find_layout(name, root).folder, "present"
    except DataMissing:
        folder, state = known.layouts[0].folder, "incomplete" if found else "absent"
    row = {"state": state, "bytes": sum(path.stat().st_size for path in found), "download_mb": known.download_mb}
    if not known.download:
        return {**row, "folder": "implicit-bench itself", "how": "a part of implicit-bench"}
    return {**row, "folder": str(root / folder), "how": command_for(name, root)}
