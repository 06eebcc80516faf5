"""implicit_bench.data.mapped: what the jobs of a node share."""

import os
import select
import subprocess
import sys

import pytest
import torch

from implicit_bench.data import DataCorrupt, ImageData
from implicit_bench.data.mapped import mapped, one_at_a_time

SETTINGS = {"name": "mnist", "val_size": 5, "mean": [0.5], "std": [0.5]}
TENSORS = [torch.arange(6, dtype=torch.uint8).view(2, 3), torch.empty(0, 3, dtype=torch.uint8), torch.tensor([7, 8])]


def never():
    raise AssertionError("it was there")


def same(found, tensors=TENSORS):
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, tensors, strict=True))


def test_made_once_and_then_read(tmp_path):
    file = tmp_path / "maps/x.pt"
    first, word = mapped(file, lambda: (TENSORS, "word"))
    again, same_word = mapped(file, never)
    assert same(first)
    assert same(again)
    assert word == same_word == "word"
    assert [path.name for path in file.parent.iterdir()] == ["x.pt"]


def test_what_one_writes_into_it_stays_its_own(tmp_path):
    mapped(tmp_path / "x", lambda: (TENSORS, ""))
    mine, _ = mapped(tmp_path / "x", never)
    mine[0].zero_()
    assert same(mapped(tmp_path / "x", never)[0])


@pytest.mark.parametrize("left", [0, 2, 1_000, -1])
def test_one_that_is_not_whole_is_made_anew(tmp_path, left):
    file = tmp_path / "x"
    mapped(file, lambda: (TENSORS, ""))
    os.truncate(file, left if left >= 0 else file.stat().st_size + left)
    asked = []
    assert same(mapped(file, lambda: asked.append(1) or (TENSORS, ""))[0])
    assert asked == [1]
    assert same(mapped(file, never)[0])


def test_of_a_view_only_what_is_seen_is_kept(tmp_path):
    mapped(tmp_path / "x", lambda: ([torch.zeros(1_000_000)[:3]], ""))
    assert (tmp_path / "x").stat().st_size < 10_000


def test_where_the_disk_is_full_it_is_made(tmp_path):
    (tmp_path / f"x.{os.getpid()}.new").symlink_to("/dev/full")
    assert same(mapped(tmp_path / "x", lambda: (TENSORS, ""))[0])
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_it_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    assert same(mapped(tmp_path / "file/x", lambda: (TENSORS, ""))[0])


@pytest.fixture
def root(tiny, tmp_path):
    tiny("mnist").put(tmp_path)
    return tmp_path


def test_a_data_set_is_decoded_once(root, monkeypatch):
    first = ImageData(**SETTINGS).load(root)
    monkeypatch.setattr(ImageData, "read", lambda *_: never())
    again = ImageData(**SETTINGS).load(root)
    for a, b in ((first.train, again.train), (first.val, again.val), (first.test, again.test)):
        assert same([a.x, a.y], [b.x, b.y])
    assert first.sha256 == again.sha256
    with pytest.raises(AssertionError):
        ImageData(**{**SETTINGS, "val_size": 4}).load(root)


def test_a_file_that_has_changed_is_read_again(root):
    ImageData(**SETTINGS).load(root)
    path = next(root.glob("MNIST/raw/train-images*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataCorrupt):
        ImageData(**SETTINGS).load(root)


HOLD = """
import sys, time
from pathlib import Path
from implicit_bench.data.mapped import one_at_a_time
print("here", flush=True)
with one_at_a_time(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_the_next_one_waits_and_a_killed_one_lets_it_in(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert [holder.stdout.readline() for _ in range(2)] == ["here\n", "mine\n"]
    waiter = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert waiter.stdout.readline() == "here\n"
    assert not select.select([waiter.stdout], [], [], 1.0)[0], "it waits"
    holder.kill()
    holder.communicate()
    assert waiter.stdout.readline() == "mine\n"
    waiter.kill()
    waiter.communicate()
    with one_at_a_time(tmp_path):
        pass
