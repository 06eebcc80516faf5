"""The embedded digits, fixed for ever."""

import hashlib

import torch

from implicit_bench.data import ImageData, describe, fetch, verify
from implicit_bench.data.files import HERE

DIGITS = {"name": "digits", "val_size": 180, "mean": [0.3058], "std": [0.3762]}


def test_file_is_the_one_that_was_made_from_scikit_learn():
    content = (HERE / "digits.npz").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "6f801551877abf69fbf3711373bb642a18dc933430a3385cd6febc235225ea6f"


def test_shapes_ranges_and_class_counts(tmp_path):
    data = ImageData(**DIGITS).load(tmp_path)
    assert [tuple(s.x.shape) for s in (data.train, data.val, data.test)] == [
        (1257, 1, 8, 8),
        (180, 1, 8, 8),
        (360, 1, 8, 8),
    ]
    assert data.train.x.dtype == torch.uint8
    assert data.train.y.dtype == torch.int64
    assert (data.classes, data.shape) == (10, (1, 8, 8))
    every = torch.cat([data.train.y, data.val.y, data.test.y])
    assert every.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert data.test.y.bincount().tolist() == [36, 36, 36, 36, 37, 36, 36, 36, 35, 36]
    assert max(int(s.x.max()) for s in (data.train, data.val, data.test)) == 16
    assert data.sha256 == "b086734a4c7e9fe9069104bd8f90442e31ebf255ae7dbec23a9030a760bdcc42"


def test_training_images_are_normal_after_normalisation(tmp_path):
    data = ImageData(**{**DIGITS, "val_size": 0}).load(tmp_path)
    x, _ = data.batch(data.train, torch.arange(1437))
    assert abs(float(x.mean())) < 1e-3
    assert abs(float(x.std()) - 1) < 1e-3


def test_there_is_nothing_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.run", None)
    lines = []
    fetch("digits", tmp_path, lines.append)
    assert len(lines) == 1
    assert "digits" in lines[0]
    assert verify("digits", tmp_path) == [HERE / "digits.npz"]
    row = describe("digits", tmp_path)
    assert (row["state"], row["bytes"], row["download_mb"]) == ("present", 45374, 0)
    assert not list(tmp_path.iterdir())
