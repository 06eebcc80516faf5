"""Tiny ImageNet as it is unzipped: read, decoded once, fetched, refused where it is not whole."""

import hashlib
import io
import os
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from implicit_bench.data import DataCorrupt, DataMissing, TinyImageNet, tiny_imagenet
from implicit_bench.data.tiny_imagenet import FOLDER

WNIDS = ["n03", "n01", "n02"]  # not in alphabetical order


def jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=95)
    return file.getvalue()


@pytest.fixture(scope="module")
def members():
    """path -> content of the official zip, with three classes of four training and two validation images."""
    rng = np.random.default_rng(0)

    def picture(k):
        small = rng.integers(0, 256, (4, 4) if k == 1 else (4, 4, 3), np.uint8)  # some of the official ones are grey
        return jpeg(np.kron(small, np.ones((16, 16) if k == 1 else (16, 16, 1), np.uint8)))

    found = {"wnids.txt": "\n".join(WNIDS).encode() + b"\n", "words.txt": b"n01\tant\n"}
    found |= {f"train/{w}/images/{w}_{k}.JPEG": picture(k) for w in WNIDS for k in range(4)}
    found |= {f"train/{w}/{w}_boxes.txt": b"" for w in WNIDS}
    found |= {f"val/images/val_{k}.JPEG": picture(k) for k in range(6)}
    found["val/val_annotations.txt"] = "".join(f"val_{k}.JPEG\t{WNIDS[k % 3]}\t0\t0\t9\t9\n" for k in range(6)).encode()
    found["test/images/test_0.JPEG"] = picture(0)
    return found


@pytest.fixture
def official(members, monkeypatch):
    """The zip's bytes; its size and hash are known."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as whole:
        for path, content in members.items():
            whole.writestr(f"{FOLDER}/{path}", content)
        whole.writestr(f"{FOLDER}/../evil", b"x")
        whole.writestr("/evil", b"x")
        whole.writestr("../evil", b"x")
    for name, value in (("classes", 3), ("n_train", 12), ("n_test", 6)):
        monkeypatch.setattr(TinyImageNet, name, value)
    monkeypatch.setattr(tiny_imagenet, "MD5", hashlib.md5(file.getvalue()).hexdigest())
    return file.getvalue()


@pytest.fixture
def root(official, members, tmp_path):
    for path, content in members.items():
        file = tmp_path / FOLDER / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path


def pixels(members, path):
    return np.asarray(Image.open(io.BytesIO(members[path])).convert("RGB")).transpose(2, 0, 1)


def test_reads_what_was_written(root, members):
    raw = TinyImageNet().read(root)
    assert raw.train_x.shape == (12, 3, 64, 64)
    assert raw.train_y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert raw.test_y.tolist() == [0, 1, 2, 0, 1, 2]
    for j, wnid in enumerate(WNIDS):
        for k in range(4):
            assert np.array_equal(raw.train_x[4 * j + k], pixels(members, f"train/{wnid}/images/{wnid}_{k}.JPEG"))
    for k in range(6):
        assert np.array_equal(raw.test_x[k], pixels(members, f"val/images/val_{k}.JPEG"))


def test_chunks_of_any_size_give_the_same(root, monkeypatch):
    whole = TinyImageNet().read(root)
    (cache,) = (root / ".mapped").iterdir()
    cache.unlink()
    monkeypatch.setattr(tiny_imagenet, "CHUNK", 5)
    assert all(torch.equal(a, b) for a, b in zip(whole, TinyImageNet().read(root)))


def test_is_decoded_once_and_again_when_a_file_changes(root, members, monkeypatch):
    first = TinyImageNet().read(root)
    (cache,) = (root / ".mapped").iterdir()
    monkeypatch.setattr(tiny_imagenet, "open_rgb", None)  # would fail
    assert all(torch.equal(a, b) for a, b in zip(first, TinyImageNet().read(root)))
    monkeypatch.undo()
    monkeypatch.setattr(TinyImageNet, "classes", 3)
    monkeypatch.setattr(TinyImageNet, "n_train", 12)
    monkeypatch.setattr(TinyImageNet, "n_test", 6)
    path = root / FOLDER / "train/n01/images/n01_2.JPEG"
    path.write_bytes(members["train/n01/images/n01_3.JPEG"])
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 10**9))
    changed = TinyImageNet().read(root)
    assert torch.equal(changed.train_x[6], first.train_x[7])
    (new,) = (root / ".mapped").iterdir()  # the old one is gone
    assert new != cache


def test_half_a_cache_is_no_cache(root):
    first = TinyImageNet().read(root)
    (cache,) = (root / ".mapped").iterdir()
    half = cache.read_bytes()[:1000]
    cache.unlink()  # `first` is mapped from it
    cache.write_bytes(half)
    assert all(torch.equal(a, b) for a, b in zip(first, TinyImageNet().read(root)))
    assert cache.stat().st_size > 1000


def test_where_nothing_can_be_kept_it_still_reads(root):
    (root / ".mapped").write_text("no folder")
    assert len(TinyImageNet().read(root).train_y) == 12
    assert (root / ".mapped").read_text() == "no folder"


def test_fetches_and_unpacks_nothing_outside(official, server, tmp_path, monkeypatch):
    server.files["tiny.zip"], server.cut = official, [1000]
    monkeypatch.setattr(tiny_imagenet, "URL", server.url("tiny.zip"))
    lines = []
    TinyImageNet().fetch(tmp_path / "data", lines.append)
    assert lines[-1] == f"tiny_imagenet: 18 images in {tmp_path / 'data' / FOLDER}"
    assert os.listdir(tmp_path) == ["data"]
    assert os.listdir(tmp_path / "data") == [FOLDER]
    assert not (tmp_path / "data" / FOLDER / "test").exists()
    assert len(TinyImageNet(val_size=3).load(tmp_path / "data").train) == 9
    server.requests.clear()
    TinyImageNet().fetch(tmp_path / "data", lines.append)
    assert not server.requests


def test_states(root, official):
    row = TinyImageNet().describe(root)
    assert (row["state"], row["folder"]) == ("present", str(root / FOLDER))
    assert row["bytes"] == sum(path.stat().st_size for path in (root / FOLDER).rglob("*") if path.is_file())
    (root / FOLDER / "train/n01/images/n01_2.JPEG").unlink()
    assert TinyImageNet().describe(root)["state"] == "incomplete"
    assert TinyImageNet().describe(root / "elsewhere") | {"how": 0} == {
        "state": "absent", "bytes": 0, "download_mb": 248.100043, "folder": str(root / "elsewhere" / FOLDER), "how": 0
    }  # fmt: skip


def test_what_is_not_whole_is_refused(root):
    images = TinyImageNet()
    with pytest.raises(DataMissing, match=r"'tiny_imagenet' is not in .*; fetch it with `implicit-bench data .*248 MB"):
        images.read(root / "elsewhere")
    path = root / FOLDER / "train/n01/images/n01_2.JPEG"
    path.write_bytes(jpeg(np.zeros((8, 9), np.uint8)))
    with pytest.raises(DataCorrupt, match=r"n01_2.JPEG has 9 x 8 pixels, not 64 x 64$"):
        images.read(root)
    path.write_bytes(b"no picture")
    with pytest.raises(DataCorrupt, match=r"n01_2.JPEG is no image that can be read"):
        images.read(root)
    path.unlink()
    sentence = r"has \(3, 11, 6\) classes, training and validation images, not \(3, 12, 6\); delete .* and run `"
    with pytest.raises(DataCorrupt, match=sentence):
        images.read(root)
    (root / FOLDER / "val/images/val_1.JPEG").unlink()
    (root / FOLDER / "wnids.txt").unlink()
    with pytest.raises(DataCorrupt, match=r"tiny-imagenet-200 is not whole \(.*wnids.txt.*\); delete"):
        images.read(root)
