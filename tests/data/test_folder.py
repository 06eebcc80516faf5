"""Folders of pictures that stream: the same batches whatever the workers, no process left, mistakes in a sentence."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import jobs
import numpy as np
import pytest
import torch
from PIL import Image

from implicit_bench.cli import main
from implicit_bench.data import DataCorrupt, DataError, DataMissing, ImageFolder
from implicit_bench.train import loop

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
WORDS = ("dataset=imagenet", "dataset.size=8", "dataset.resize=10", "dataset.val_size=5", "network=dense",
         "model=skip_deq", "recipe.batch=4", "recipe.eval_batch=4", "recipe.epochs=3")  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Three classes of 8 + 4 pictures: of many sizes, some grey, some PNG, one in a folder of its own."""
    top, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("ant", "bee", "cat"):
            for k in range(count):
                shape = (*rng.integers(12, 40, 2), 3)[: 2 if k == 1 else 3]
                path = top / split / name / ("deep" if k == 2 else "") / f"{k}.{'png' if k % 2 else 'JPEG'}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)
            (top / split / name / "notes.txt").write_text("no picture")
    return top


@pytest.fixture
def folder(shared, tmp_path):
    return shutil.copytree(shared, tmp_path / "pictures")


def load(folder, workers=0, **settings):
    given = {"val_size": 5, "mean": MEAN, "std": STD, "size": 8, "resize": 10, **settings}
    return ImageFolder(str(folder), **given).load("nowhere", workers=workers)


def equal(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs)
    return all(torch.equal(a, b) for pair in zip(ours, theirs) for a, b in zip(*pair))


def children_gone():
    for _ in range(100):
        if not multiprocessing.active_children():
            return True
        time.sleep(0.05)
    return False


def test_evaluation_sees_the_middle_of_each_picture(folder):
    data = load(folder)
    ((x, y),) = data.batches(data.test, 12)
    names = [os.fsdecode(name) for name in data.test.x]
    assert y.tolist() == [["ant", "bee", "cat"].index(name.split("/")[1]) for name in names]
    assert {*y[:6].tolist()} == {0, 1, 2}  # a part of it is of all classes
    assert x.dtype == torch.float32
    for path in ("0.JPEG", "1.png", "3.png", "deep/2.JPEG"):
        k = names.index(f"val/bee/{path}")
        picture = Image.open(folder / "val/bee" / path).convert("RGB")
        short = min(picture.size)
        picture = picture.resize([int(10 * side / short) for side in picture.size], Image.BILINEAR)
        left, top = (round((side - 8) / 2) for side in picture.size)
        pixels = np.asarray(picture.crop((left, top, left + 8, top + 8))).transpose(2, 0, 1) / 255
        expected = (pixels - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
        np.testing.assert_allclose(x[k], expected, atol=1e-5)


@pytest.mark.parametrize("crop", ["resized", "squash"])
@pytest.mark.parametrize("augment", [None, (3, 2)])
def test_batches_are_the_same_whatever_the_workers(folder, augment, crop):
    data = load(folder, crop=crop)
    order = data.order(len(data.train), 0, 1)
    alone = list(data.batches(data.train, 4, order, augment=augment))
    assert [len(y) for _, y in alone] == [4, 4, 4, 4, 3]
    for workers in (1, 2):
        other = load(folder, workers, crop=crop)
        assert equal(other.batches(other.train, 4, order, augment=augment), alone)
        assert equal(other.batches(other.train, 4, order, 2, 4, augment=augment), alone[2:4])
    assert children_gone()


def test_augmentation_is_of_seed_epoch_and_batch(folder):
    data = load(folder)
    order = torch.zeros(8, dtype=torch.int64)  # one picture, again and again

    def pictures(*augment):
        return torch.cat([x for x, _ in data.batches(data.train, 4, order, augment=augment)])

    first = pictures(0, 1)
    assert len({tuple(x.flatten().tolist()) for x in first}) == 8
    assert torch.equal(first, pictures(0, 1))
    for other in ((0, 2), (1, 1)):
        assert not torch.equal(first, pictures(*other))
    same = torch.cat([x for x, _ in data.batches(data.train, 4, order)])
    assert len({tuple(x.flatten().tolist()) for x in same}) == 1


def test_flips_as_often_as_asked(folder):
    side = load(folder, flip=0.0), load(folder, flip=1.0)
    plain, mirrored = (next(data.batches(data.train, 8, augment=(0, 1)))[0] for data in side)
    assert torch.equal(plain, mirrored.flip(3))


def test_squash_takes_the_whole_picture_whatever_its_aspect(folder):
    """In evaluation at size x size; in training a window of it at resize x resize, mirrored or not, each as likely."""
    data = load(folder, crop="squash", flip=0.5)
    paths = [folder / os.fsdecode(name) for name in data.test.x]
    wide = max(paths, key=lambda path: abs(np.log(np.divide(*Image.open(path).size))))
    picture = Image.open(wide).convert("RGB")

    def pixels(side):
        squashed = np.asarray(picture.resize((side, side), Image.BILINEAR)).transpose(2, 0, 1) / 255
        return torch.tensor((squashed - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1)))

    k = paths.index(wide)
    torch.testing.assert_close(data.batch(data.test, torch.tensor([k]))[0][0].double(), pixels(8), atol=1e-5, rtol=0)
    windows = [pixels(10)[:, top : top + 8, left : left + 8] for top in range(3) for left in range(3)]
    allowed = torch.stack([(w.flip(2) if flip else w).flatten() for w in windows for flip in (False, True)])
    n = 100 * len(allowed)
    seen, _ = next(data.batches(data.test, n, torch.full((n,), k), augment=(0, 1)))
    away = torch.cdist(seen.flatten(1).double(), allowed, p=float("inf"))
    assert float(away.min(1).values.max()) < 1e-5
    counts = torch.bincount(away.argmin(1), minlength=len(allowed))
    assert all(abs(count - 100) < 50 for count in counts.tolist())


def test_random_access_agrees_with_the_stream(folder):
    data, index = load(folder), torch.tensor([5, 0, 11])
    assert equal([data.batch(data.test, index)], data.batches(data.test, 3, index))
    generator = torch.Generator().manual_seed(0)
    a, b = (data.batch(data.train, index, generator)[0] for _ in range(2))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_drawn_from_the_global_generator(folder, workers):
    data = load(folder, workers)
    before = torch.get_rng_state()
    list(data.batches(data.train, 4, augment=(0, 1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_worker_outlives_an_epoch_that_ends_early(folder):
    data = load(folder, 2)
    batches = data.batches(data.train, 2, augment=(0, 1))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert children_gone()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_named(folder, workers):
    path = folder / "train/bee/3.png"
    path.write_bytes(path.read_bytes()[:60])
    data = load(folder, workers, val_size=0)
    with pytest.raises(DataCorrupt) as error:
        list(data.batches(data.train, 4))
    assert str(error.value).startswith(f"{path} is no image that can be read (")
    assert "\n" not in str(error.value)
    assert children_gone()


def test_sha256_is_over_names_and_sizes(folder, shared):
    before = load(folder).sha256
    assert before == load(shared).sha256 == load(folder, val_size=0).sha256
    path = folder / "val/cat/0.JPEG"
    path.write_bytes(path.read_bytes() + b"x")
    larger = load(folder).sha256
    path.rename(path.with_name("00.JPEG"))
    assert len({before, larger, load(folder).sha256}) == 3


def test_validation_is_taken_out_of_train(folder):
    data, whole = load(folder), load(folder, val_size=0)
    assert (data.facts()["n_train"], data.facts()["n_val"], data.facts()["n_test"]) == (19, 5, 12)
    assert set(data.train.x) | set(data.val.x) == set(whole.train.x)
    assert not set(data.train.x) & set(data.val.x)
    labels = dict(zip(whole.train.x, whole.train.y.tolist()))
    assert [labels[name] for name in data.val.x] == data.val.y.tolist()


# -- mistakes ----------------------------------------------------------------------------------------------------------


def spoil_class(folder):
    (folder / "val/cat").rename(folder / "val/dog")


def spoil_val(folder):
    for path in (folder / "val").iterdir():
        shutil.rmtree(path)
    (folder / "val/0.JPEG").touch()


def spoil_empty(folder):
    for path in (folder / "train/cat").rglob("*.*[gG]"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: shutil.rmtree(f / "train"), r"train is not there; dataset.folder must hold train/ and val/"),
        (lambda f: shutil.rmtree(f / "val"), r"val is not there; dataset.folder must hold train/ and val/"),
        (spoil_class, r"val has a class 'dog' that \S+train lacks"),
        (spoil_val, r"val has no class folders; sort its images into one folder a class"),
        (spoil_empty, r"train/cat has no images \(\.jpg"),
    ],
)
def test_folders_that_are_not_as_they_should_be(folder, spoil, sentence, capsys):
    spoil(folder)
    with pytest.raises(DataError, match=sentence):
        load(folder)
    assert main(["data", "dataset=imagenet", f"dataset.folder={folder}"]) > 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("implicit-bench: ")


def test_settings_that_make_no_sense(folder):
    with pytest.raises(DataError, match=r"dataset.val_size=24, but pictures has 24 training images"):
        load(folder, val_size=24)
    with pytest.raises(ValueError, match=r"dataset.size=11 must be positive and at most dataset.resize=10"):
        load(folder, size=11)
    with pytest.raises(DataMissing, match=r"dataset\.folder names no folder"):
        ImageFolder(None, 0, MEAN, STD).load("nowhere")


def test_data_verifies_a_folder(folder, capsys):
    assert main(["data", "dataset=imagenet", f"dataset.folder={folder}", "dataset.val_size=5"]) == 0
    assert capsys.readouterr().out == f"data    pictures: 24 + 12 images of 3 classes in {folder}\n"


# -- whole runs --------------------------------------------------------------------------------------------------------


def test_resumed_equals_undisturbed_bit_for_bit_whatever_the_workers(folder, tmp_path, monkeypatch):
    words = [*WORDS, f"dataset.folder={folder}"]
    whole = jobs.run(tmp_path / "a", *words, "loader.workers=0")
    assert whole.exit_code == 0
    real = loop.Step.__call__

    def stopping(self, x, y):
        if self.taken == 5:
            signal.raise_signal(signal.SIGINT)
        return real(self, x, y)

    monkeypatch.setattr(loop.Step, "__call__", stopping)
    assert jobs.run(tmp_path / "b", *words, "loader.workers=2").exit_code == 130
    assert children_gone()
    monkeypatch.setattr(loop.Step, "__call__", real)
    second = jobs.run(tmp_path / "b", *words, "loader.workers=1")
    assert second.folder.name == whole.folder.name  # the loader names no run
    assert [r["step"] for r in second.record["resumed_from"]] == [6]
    assert jobs.same_weights(whole.folder, second.folder)
    assert whole.record["metrics"] == second.record["metrics"]
    assert children_gone()


def test_a_broken_picture_ends_a_run_in_a_sentence(folder, tmp_path):
    path = folder / "val/bee/3.png"
    path.write_bytes(b"no png")
    failed = jobs.run(tmp_path, *WORDS, f"dataset.folder={folder}", "recipe.max_steps=1", "loader.workers=2")
    assert failed.exit_code == 1
    assert failed.record["error"].startswith(f"{path} is no image that can be read")
    assert not (failed.folder / "error.txt").exists()
    assert children_gone()


def test_a_stream_that_nobody_closed_does_not_keep_the_process(folder):
    code = f"""
from implicit_bench.data import ImageFolder
data = ImageFolder({str(folder)!r}, 0, {MEAN}, {STD}, size=8, resize=10).load("", workers=2)
batches = data.batches(data.train, 2)
next(batches)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def processes_of(group):
    """The processes of a group that still run."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"/proc/{entry.name}/stat") as file:
                    state, _, of = file.read().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(of) == group and state != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_saves_and_leaves_no_process(folder, tmp_path, number):
    words = jobs.words(tmp_path, *WORDS, f"dataset.folder={folder}", "loader.workers=2", "recipe.epochs=10000")
    process = subprocess.Popen([sys.executable, "-m", "implicit_bench", "train", *words], stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, start_new_session=True, text=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/last.pt")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    (rec,) = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/record.json")]
    assert rec["status"] == "interrupted"
    for _ in range(100):
        if not processes_of(process.pid):
            break
        time.sleep(0.05)
    assert not processes_of(process.pid)
