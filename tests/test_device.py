import os

import pytest
import torch

from implicit_bench.device import Device
from implicit_bench.models import Mdeq


def test_settings_are_resolved_for_this_machine():
    found = Device().settings()
    assert found["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["threads"] == len(os.sched_getaffinity(0))
    assert found["dtype"] == "float32"
    assert Device("cpu", threads=1, allocator="default").settings()["allocator"] == "default"


def test_threads_and_determinism_are_applied():
    before = torch.get_num_threads()
    try:
        Device("cpu", threads=1, deterministic=True).begin()
        assert torch.get_num_threads() == 1
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)


def test_a_model_is_placed_in_its_dtype_and_layout():
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.Linear(2, 2))
    assert next(Device("cpu", dtype="float64").place(net).parameters()).dtype == torch.float64
    assert next(Device("cpu", dtype="bfloat16").place(net).parameters()).dtype == torch.float32
    device = Device("cpu", channels_last=True)
    assert device.place(net)[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert device.images(torch.rand(2, 4, 5, 5)).is_contiguous(memory_format=torch.channels_last)
    assert Device("cpu", dtype="float64").images(torch.rand(1, 1, 2, 2)).dtype == torch.float64


@pytest.mark.parametrize(("asked", "mdeq", "plain"), [(None, True, False), (False, False, False), (True, True, True)])
def test_channels_last_is_for_networks_whose_flat_states_have_it(asked, mdeq, plain):
    device = Device("cpu", channels_last=asked)
    assert device.place(Mdeq((3, 8, 8), 10)).cell.scales.channels_last == mdeq
    weight = device.place(torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3)))[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == plain


def test_the_cell_is_compiled_where_that_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: asked.append(self))
    model = SimpleModel()
    assert Device("cpu").place(model) is model
    assert asked == []
    Device("cpu", compile=True).place(model)
    assert asked == [model.layer.cell]


class SimpleModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Module()
        self.layer.cell = torch.nn.Linear(2, 2)


def test_bfloat16_is_autocast():
    with Device("cpu", dtype="bfloat16").autocast():
        assert torch.nn.functional.linear(torch.rand(2, 2), torch.rand(2, 2)).dtype == torch.bfloat16
    with Device("cpu").autocast():
        assert torch.nn.functional.linear(torch.rand(2, 2), torch.rand(2, 2)).dtype == torch.float32


def test_the_environment_says_what_a_record_needs():
    found = Device("cpu", threads=1).environment()
    for key in ("hardware", "cpu", "threads", "world_size", "allocator", "torch", "python", "versions", "git", "alone"):
        assert key in found, key
    assert found["hardware"] == f"{os.cpu_count()}-core {found['cpu']}"
    assert found["versions"]["torchdiffeq"]


def test_cuda_without_a_gpu_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"gpu=cuda, but torch sees no CUDA device here; use gpu=auto or gpu=cpu"):
        Device("cuda")
