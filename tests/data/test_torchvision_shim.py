"""In processes of their own: what the shim changes lasts as long as the process."""

import subprocess
import sys


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_importing_the_data_package_imports_nothing_slow():
    code = """
import sys, torch
before = set(sys.modules)
import implicit_bench.data
slow = {"torchvision", "PIL", "pandas", "hydra", "urllib.request"} & (set(sys.modules) - before)
assert not slow, slow
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_torchvision_imports_and_transforms_work():
    code = """
from implicit_bench.data import ensure_torchvision
assert ensure_torchvision()
assert ensure_torchvision()  # twice does no harm
import torch, torchvision
from torchvision.transforms import v2
assert v2.RandomCrop(4, padding=1)(torch.zeros(3, 4, 4)).shape == (3, 4, 4)
assert torchvision.datasets.CIFAR10 and torchvision.models.resnet18
assert ensure_torchvision()
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_absent_torchvision_is_told():
    code = """
import importlib.util
importlib.util.find_spec = lambda name: None
from implicit_bench.data import ensure_torchvision
assert ensure_torchvision() is False
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
