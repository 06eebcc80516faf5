"""The real data sets, fetched if need be into data/ or IMPLICIT_BENCH_TEST_DATA: `pytest -m network` asks for them."""

import os
from pathlib import Path

import pytest
import torch

from implicit_bench.data import KNOWN, ImageData

ROOT = Path(os.environ.get("IMPLICIT_BENCH_TEST_DATA", Path(__file__).parents[2] / "data"))


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "sha256", "test_counts"),
    [
        ("mnist", "06b0d1f124c4e5fa", [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]),
        ("fashion_mnist", "ca3ab2a37f845e1b", [1000] * 10),
        ("cifar10", "32e5966899bde482", [1000] * 10),
    ],
)
def test_content(name, sha256, test_counts):
    channels = KNOWN[name].shape[0]
    data = ImageData(name, 5000, [0.5] * channels, [0.25] * channels).load(ROOT, fetch=print)
    assert data.sha256.startswith(sha256)
    assert data.test.y.bincount().tolist() == test_counts
    assert len(data.train) == KNOWN[name].n_train - 5000
    x, _ = data.batch(data.test, torch.arange(10_000))
    assert x.shape == (10_000, *data.shape)
