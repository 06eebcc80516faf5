"""A user's own data set: one class, and everything else for free."""

import sys

import jobs
import numpy as np
import pytest
import torch

from implicit_bench import config
from implicit_bench.bench.command import bench
from implicit_bench.cli import main
from implicit_bench.data import DataError, DataMissing, Dataset, Raw
from implicit_bench.train.command import train

MODULE = """
import numpy as np
from implicit_bench.data import DataMissing, Dataset, Raw

class Stripes(Dataset):
    shape, classes = (1, 8, 8), 2

    def __init__(self, file="stripes.npy", **rest):
        super().__init__(**rest)
        self.file = file

    def read(self, root):
        if not (root / self.file).exists():
            raise DataMissing(f"no {root / self.file}; draw it yourself")
        x = np.load(root / self.file)
        y = (x[:, 0, 0, 0] != x[:, 0, 0, 1]).astype(np.uint8)
        return Raw(x[:96], y[:96], x[96:], y[96:])
"""


def stripes():
    rng, line = np.random.default_rng(0), np.arange(8) % 2 * 200
    across = np.stack([np.broadcast_to(line if k % 2 else line[:, None], (8, 8)) for k in range(128)])
    return (across + rng.integers(0, 50, (128, 8, 8))).astype(np.uint8)[:, None]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module and a config of the user's in the working directory; the words that choose it."""
    (tmp_path / "my_stripes.py").write_text(MODULE)
    (tmp_path / "mine/dataset").mkdir(parents=True)
    (tmp_path / "mine/dataset/stripes.yaml").write_text("_target_: my_stripes.Stripes\nval_size: 16\nflip: 0.5\n")
    x = stripes()
    x[:, 0, 0, :2] = np.where(np.arange(128)[:, None] % 2, [0, 200], [0, 0])
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data/stripes.npy", x)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield ["allow_targets=[my_stripes]", "dataset=stripes"]
    sys.modules.pop("my_stripes", None)


def test_it_trains(mine, tmp_path):
    words = jobs.words(tmp_path, *mine, "model=skip_deq", "recipe.batch=8", "recipe.epochs=15")
    done = train(config.compose("train", words, ["mine"]), words)
    assert done.exit_code == 0
    assert {k: v for k, v in done.record["data"].items() if k != "sha256"} == {
        "name": "Stripes", "n_train": 80, "n_val": 16, "n_test": 32}  # fmt: skip
    assert done.record["metrics"]["test_acc"] > 0.9
    assert done.folder.name.startswith("skip_deq-stripes-s0-")


def test_it_is_timed(mine, tmp_path, capsys, brisk):
    jobs_ = [config.compose("bench", jobs.words(tmp_path, *mine, f"model={m}", "recipe.batch=8", "rounds=2"), ["mine"])
             for m in ("deq", "skip_deq")]  # fmt: skip
    assert bench(jobs_, ["model=deq,skip_deq"]) == 0
    assert "skip_deq" in capsys.readouterr().out


def test_data_goes_by_the_object(mine, capsys, tmp_path):
    assert main(["data", "--config-dir", "mine", *mine]) == 0
    assert capsys.readouterr().out == "data    Stripes: 96 + 32 images of 1 x 8 x 8, 2 classes\n"
    assert main(["data", "--config-dir", "mine", mine[0]]) == 0
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if "stripes" in line]
    assert line[:5] == ["stripes", "present", "0", "–", "data"]
    assert main(["data", "--config-dir", "mine", *mine, "+dataset.file=other.npy"]) == 2
    assert capsys.readouterr().err == "implicit-bench: no data/other.npy; draw it yourself\n"


# -- the class ---------------------------------------------------------------------------------------------------------


def dataset(shape=(1, 2, 2), classes=3, **arrays):
    good = {"train_x": np.arange(40, dtype=np.uint8).reshape(10, 1, 2, 2), "train_y": np.arange(10) % 3,
            "test_x": np.zeros((4, 1, 2, 2), np.uint8), "test_y": np.zeros(4, int)}  # fmt: skip

    class Mine(Dataset):
        def read(self, root):
            return Raw(**{**good, **arrays})

    Mine.shape, Mine.classes = shape, classes
    return Mine


def test_splits_normalises_and_augments(tmp_path):
    data = dataset()(val_size=4, mean=[0.25], std=[0.5], flip=1.0).load(tmp_path)
    assert [len(s) for s in (data.train, data.val, data.test)] == [6, 4, 4]
    assert data.train.y.dtype == torch.int64
    x, y = data.batch(data.train, torch.arange(6))
    torch.testing.assert_close(x, (data.train.x / 255 - 0.25) / 0.5)
    mirrored, _ = next(data.batches(data.train, 6, augment=(0, 1)))
    assert torch.equal(mirrored, x.flip(3))
    assert torch.equal(y, data.train.y)
    zoomed, _ = next(dataset()(zoom=5).load(tmp_path).batches(data.train, 6, augment=(0, 1)))
    assert zoomed.shape == x.shape
    plain = dataset()().load(tmp_path)
    assert len(plain.train) == 10
    torch.testing.assert_close(plain.batch(plain.train, torch.arange(10))[0], plain.train.x / 127.5 - 1)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"train_x": np.zeros((10, 1, 2, 2))}, r"train_x of float64 \[10, 1, 2, 2\], but pixels must be uint8"),
        ({"test_x": np.zeros((4, 2, 2, 1), np.uint8)}, r"test_x of shape \[4, 2, 2, 1\], but shape says \['N', 1,"),
        ({"test_x": np.zeros((0, 1, 2, 2), np.uint8)}, r"test_x of shape \[0, 1, 2, 2\]"),
        ({"train_y": np.zeros(9, int)}, r"train_y of int64 \[9\], but 10 images need as many whole numbers"),
        ({"train_y": np.zeros(10)}, r"train_y of float64 \[10\], but 10 images need as many whole numbers"),
        ({"train_y": np.arange(10)}, r"a label 9 in train_y, but classes says 0 to 2"),
        ({"test_y": np.array([0, 1, -1, 2])}, r"a label -1 in test_y, but classes says 0 to 2"),
        ({"test_y": ["a", "b", "c", "d"]}, r"must give Raw\(train_x, train_y, test_x, test_y\), four arrays"),
    ],
)
def test_mistakes_in_arrays_are_one_sentence(arrays, sentence, tmp_path):
    with pytest.raises(DataError, match=rf"^Mine\.read .*{sentence}") as error:
        dataset(**arrays)().load(tmp_path)
    assert "\n" not in str(error.value)


def test_mistakes_in_the_class_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"^Mine.shape must be \(channels, height, width\), not \(8, 8\)$"):
        dataset(shape=(8, 8))()
    with pytest.raises(ValueError, match=r"^Mine.classes must be a whole number, not None$"):
        dataset(classes=None)()
    with pytest.raises(DataError, match=r"dataset\.val_size=10, but Mine has 10 training images"):
        dataset()(val_size=10).load(tmp_path)
    with pytest.raises(DataError, match=r"has no read\(root\)"):
        type("Empty", (Dataset,), {"shape": (1, 2, 2), "classes": 2})().load(tmp_path)


def test_what_is_missing_is_said_as_the_class_says_it(tmp_path):
    class Absent(Dataset):
        shape, classes = (1, 2, 2), 2

        def read(self, root):
            raise DataMissing("ask a colleague")

    with pytest.raises(DataMissing, match="ask a colleague"):
        Absent().load(tmp_path, fetch=print)
    assert Absent().describe(tmp_path)["state"] == "absent"


def test_a_shape_may_be_a_list(tmp_path):
    assert dataset(shape=[1, 2, 2])().load(tmp_path).shape == (1, 2, 2)
