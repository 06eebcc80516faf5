import random

import pytest
import torch

from implicit_bench.train import CheckpointError, checkpoint

CPU = torch.device("cpu")


def content(step):
    return {"step": step, "model": {"w": torch.full((1000,), float(step))}}


@pytest.fixture
def two(tmp_path):
    checkpoint.save(tmp_path, content(1))
    checkpoint.save(tmp_path, content(2))
    return tmp_path


def test_the_newest_is_loaded_and_two_are_kept(two):
    checkpoint.save(two, content(3))
    assert sorted(p.name for p in two.iterdir()) == ["last.pt", "previous.pt"]
    found = checkpoint.load(two, CPU, print)
    assert found["step"] == 3
    assert torch.equal(found["model"]["w"], torch.full((1000,), 3.0))
    assert checkpoint.read(two / "previous.pt", CPU)["step"] == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_is_passed_over_aloud(two, damage):
    path = two / "last.pt"
    raw = bytearray(path.read_bytes())
    if damage == "flipped":
        at = raw.find(torch.full((1000,), 2.0).numpy().tobytes())
        assert at > 0
        raw[at + 5] ^= 0x10  # a weight changes, the archive stays readable
    path.write_bytes({"truncated": raw[: len(raw) // 2], "flipped": raw, "empty": b""}[damage])
    said = []
    assert checkpoint.load(two, CPU, said.append)["step"] == 1
    assert "last.pt is damaged" in said[0]
    assert "going on from previous.pt, step 1" in said[0]


def test_no_whole_checkpoint_is_an_error_that_names_the_remedy(two):
    for name in checkpoint.NAMES:
        (two / name).write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"last.pt is damaged or truncated .*; delete .* to train afresh"):
        checkpoint.load(two, CPU, print)


def test_none_without_any(tmp_path):
    assert checkpoint.load(tmp_path, CPU, print) is None


class Evil:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('pwned').touch()",))


def test_a_checkpoint_never_runs_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"step": 1, "x": Evil()}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path, CPU, print)
    assert not (tmp_path / "pwned").exists()


def test_a_failed_write_leaves_the_old_one(two, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(two, content(3))
    assert checkpoint.load(two, CPU, print)["step"] == 2
    assert sorted(p.name for p in two.iterdir()) == ["last.pt", "previous.pt"]


def test_rng_state_comes_back(tmp_path):
    torch.manual_seed(3)
    random.seed(3)
    checkpoint.save(tmp_path, content(1))
    expected = torch.rand(3), random.random()
    torch.rand(10), random.random()
    checkpoint.set_rng_state(checkpoint.load(tmp_path, CPU, print)["rng"])
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
