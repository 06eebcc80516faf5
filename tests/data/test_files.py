"""Reading official formats; refusing what is not whole."""

import hashlib
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicit_bench.data import KNOWN, DataCorrupt, DataError, DataMissing, ImageData, describe, verify
from implicit_bench.data.files import OFFICIAL, command_for, read
from implicit_bench.data.readers import parse_idx

NAMES = ["mnist", "fashion_mnist", "cifar10", "cifar100", "svhn"]


def idx(array):
    return bytearray(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes())


@pytest.mark.parametrize("name", NAMES)
def test_reads_what_was_written(tiny, tmp_path, name):
    small = tiny(name)
    small.put(tmp_path)
    raw = read(name, tmp_path)
    for split, x, y in (("train", raw.train_x, raw.train_y), ("test", raw.test_x, raw.test_y)):
        assert x.dtype == torch.uint8
        assert y.dtype == torch.int64
        assert np.array_equal(x.numpy(), small.x[split])
        assert np.array_equal(y.numpy(), small.y[split])


def test_both_cifar10_layouts_are_the_same_data(tiny, tmp_path):
    small = tiny("cifar10")
    small.put(tmp_path / "bin", layout=0)
    small.put(tmp_path / "py", layout=1)
    one, other = read("cifar10", tmp_path / "bin"), read("cifar10", tmp_path / "py")
    assert all(torch.equal(a, b) for a, b in zip(one, other))
    load = ImageData("cifar10", 5, [0.5] * 3, [0.5] * 3).load
    assert load(tmp_path / "bin").sha256 == load(tmp_path / "py").sha256


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_idx_round_trip(shape, seed):
    array = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    assert np.array_equal(parse_idx(idx(array)).numpy(), array)


@pytest.mark.parametrize(
    "content",
    [
        b"\x1f\x8b\x08\x08aaaaaaaaaaaa",  # the .gz, not unpacked
        b"\0\0\x0d\x01\0\0\0\x01aaaa",  # floats
        b"\0\0\x08\x03\0\0\0\x01",  # header cut off
        b"\0\0\x08\x01\0\0\0\x05abcd",  # one byte short
        b"\0\0\x08\x01\0\0\0\x03abcd",  # one too many
    ],
)
def test_idx_header_must_fit(content):
    with pytest.raises(DataCorrupt, match="not a"):
        parse_idx(bytearray(content))


@pytest.mark.parametrize("name", NAMES)
def test_truncated_long_and_altered_files_are_refused_by_name(tiny, tmp_path, name):
    small = tiny(name)
    path = small.put(tmp_path)[1]
    whole = path.read_bytes()
    altered = bytes([whole[-1] ^ 1])
    unsized = small.known.layouts[0].files[path.name][0] is None  # then only the hash can tell
    sizes = ("corrupt", "corrupt") if unsized else ("truncated", "too long")
    for content, word in zip((whole[:-1], whole + b"x", whole[:-1] + altered), (*sizes, "corrupt")):
        path.write_bytes(content)
        for check in (read, verify):
            with pytest.raises(DataCorrupt) as error:
                check(name, tmp_path)
            assert str(error.value).startswith(f"{path} is {word} (")
            assert str(error.value).endswith(f"; delete it and run `{command_for(name, tmp_path)}`")
        assert path.read_bytes() == content


def test_wrong_hash_is_shown_beside_the_right_one(tiny, tmp_path):
    small = tiny("mnist")
    path = small.put(tmp_path)[0]
    right = hashlib.md5(path.read_bytes()).hexdigest()
    path.write_bytes(bytes(path.stat().st_size))
    wrong = hashlib.md5(path.read_bytes()).hexdigest()
    with pytest.raises(DataCorrupt, match=rf"md5 {wrong}, expected {right}"):
        read("mnist", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_pickle_is_not_opened_before_its_hash_is_checked(tiny, tmp_path, name):
    small = tiny(name)
    path = small.put(tmp_path, layout=-1)[0]

    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'boom')!r}, 'w').close()",))

    bomb = pickle.dumps(Bomb())
    path.write_bytes(bomb + bytes(path.stat().st_size - len(bomb)))  # the right size
    with pytest.raises(DataCorrupt, match="md5"):
        read(name, tmp_path)
    assert not (tmp_path / "boom").exists()


def test_missing_and_incomplete(tiny, tmp_path):
    small = tiny("cifar10")
    with pytest.raises(DataMissing) as error:
        read("cifar10", tmp_path)
    assert str(error.value) == (
        f"data set 'cifar10' is not in {tmp_path}/; fetch it with "
            f"`implicit-bench data dataset=cifar10 paths.data={tmp_path}` (170 MB)"
    )
    small.put(tmp_path, skip=["data_batch_3.bin"])
    with pytest.raises(DataMissing, match=r"not whole, .*data_batch_3\.bin is missing; fetch it"):
        read("cifar10", tmp_path)
    with pytest.raises(DataMissing):
        verify("cifar10", tmp_path)


def test_verify_returns_what_it_checked(tiny, tmp_path):
    small = tiny("cifar10")
    paths = small.put(tmp_path) + small.put(tmp_path, layout=1)
    assert verify("cifar10", tmp_path) == paths


def test_describe(tiny, tmp_path):
    small = tiny("mnist")
    assert describe("mnist", tmp_path) == {
        "state": "absent",
        "folder": str(tmp_path / "MNIST/raw"),
        "bytes": 0,
        "download_mb": 11.594722,
        "how": f"implicit-bench data dataset=mnist paths.data={tmp_path}",
    }
    small.put(tmp_path, skip=["t10k-labels-idx1-ubyte"])
    assert describe("mnist", tmp_path)["state"] == "incomplete"
    paths = small.put(tmp_path)
    row = describe("mnist", tmp_path)
    assert (row["state"], row["bytes"]) == ("present", sum(p.stat().st_size for p in paths))


def test_official_table_is_consistent():
    """Sizes follow from the shapes, and every file has a hash of a known length."""
    for name, known in KNOWN.items():
        pixels = np.prod(known.shape)
        binary = known.layouts[0].files
        if name in ("cifar100", "svhn"):
            assert [len(digest) for _, digest in binary.values()] == [32, 32]
        elif name == "cifar10":
            assert [size for size, _ in binary.values()] == [10_000 * (1 + pixels)] * 6
            assert len(known.layouts[1].files) == 6
        elif name != "digits":
            sizes = [16 + known.n_train * pixels, 8 + known.n_train, 16 + known.n_test * pixels, 8 + known.n_test]
            assert [size for size, _ in binary.values()] == sizes
    assert {len(digest) for _, digest in OFFICIAL.values()} == {32, 40, 64}
    assert len({digest for _, digest in OFFICIAL.values()}) == len(OFFICIAL)


def test_unknown_name_gets_the_nearest():
    with pytest.raises(DataError, match=r"no data set 'cifr10'; nearest: cifar10; there are digits, mnist"):
        read("cifr10", None)


def test_svhn_without_scipy_says_what_to_install(tiny, tmp_path, monkeypatch):
    tiny("svhn").put(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match=r"^SVHN's files need scipy to be read: pip install 'implicit-bench\[data\]'$"):
        read("svhn", tmp_path)
