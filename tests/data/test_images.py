"""Splits, normalisation, order: ImageData and Data."""

import shutil
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from implicit_bench.data import KNOWN, ImageData
from implicit_bench.data.readers import Raw

CONFIGS = Path(__file__).parents[2] / "configs" / "dataset"
CIFAR = {"name": "cifar10", "mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616]}


@pytest.fixture
def load(tiny, tmp_path):
    """load(val_size=..., ...) -> Data of a small CIFAR-10 whose images all differ."""
    small = tiny("cifar10")
    small.put(tmp_path)
    return lambda **settings: ImageData(**CIFAR, **{"val_size": 15, **settings}).load(tmp_path)


def images_of(split):
    return [image.numpy().tobytes() + bytes([int(label)]) for image, label in zip(split.x, split.y)]


def test_validation_is_taken_out_of_train_and_test_is_left_alone(load):
    whole, data = load(val_size=0), load()
    assert [len(s) for s in (data.train, data.val, data.test)] == [35, 15, 10]
    assert [len(s) for s in (whole.train, whole.val, whole.test)] == [50, 0, 10]
    train, val = set(images_of(data.train)), set(images_of(data.val))
    assert not train & val
    assert train | val == set(images_of(whole.train))
    assert len(train | val) == 50
    assert images_of(data.test) == images_of(whole.test)


def test_validation_depends_on_its_seed_only(load):
    assert images_of(load().val) == images_of(load().val)
    torch.manual_seed(5)
    assert images_of(load(val_seed=0).val) == images_of(load().val)
    assert images_of(load(val_seed=1).val) != images_of(load().val)
    assert len(set(images_of(load(val_seed=1).val))) == 15


def test_sha256_is_of_the_data_and_not_of_its_presentation(load):
    assert load().sha256 == load(val_size=0).sha256 == load(val_seed=3, flip=0.5, pad=4).sha256


@pytest.mark.parametrize("part", range(4))
def test_sha256_shows_any_change(tiny, tmp_path, part, monkeypatch):
    """Of train images, train labels, test images, test labels."""
    small = tiny("mnist")
    small.put(tmp_path)
    settings = {"name": "mnist", "val_size": 0, "mean": [0.5], "std": [0.5]}
    before = ImageData(**settings).load(tmp_path)
    raw = [t.clone() for t in (before.train.x, before.train.y, before.test.x, before.test.y)]
    raw[part].flatten()[-1] ^= 1
    shutil.rmtree(tmp_path / ".mapped")
    monkeypatch.setattr("implicit_bench.data.images.read", lambda name, root: Raw(*raw))
    assert ImageData(**settings).load(tmp_path).sha256 != before.sha256


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_normalisation(tiny, tmp_path, name):
    small = tiny(name)
    small.put(tmp_path)
    channels = KNOWN[name].shape[0]
    mean, std = CIFAR["mean"][:channels], CIFAR["std"][:channels]
    data = ImageData(name, 15, mean, std).load(tmp_path)
    index = torch.tensor([3, 0, 3, 34])
    x, y = data.batch(data.train, index)
    m, s = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))
    torch.testing.assert_close(x.double(), (data.train.x[index].double() / 255 - m) / s, atol=2e-6, rtol=0)
    assert x.dtype == torch.float32
    assert torch.equal(y, data.train.y[index])


def test_digits_are_normalised_by_their_own_peak(tmp_path):
    data = ImageData("digits", 180, [0.25], [0.5]).load(tmp_path)
    x, _ = data.batch(data.test, torch.arange(360))
    torch.testing.assert_close(x, (data.test.x / 16 - 0.25) / 0.5)
    assert (float(x.min()), float(x.max())) == (-0.5, 1.5)


def test_a_batch_is_a_copy(load):
    data = load()
    before = data.train.x.clone()
    x, _ = data.batch(data.train, torch.arange(4))
    x.zero_()
    assert torch.equal(data.train.x, before)


@pytest.mark.parametrize("crop", [{"pad": 4}, {"zoom": 42}])
def test_augments_only_with_a_generator(load, crop):
    data, plain, index = load(**crop), load(), torch.arange(35)
    expected, _ = plain.batch(plain.train, index)
    assert torch.equal(data.batch(data.train, index)[0], expected)
    assert not torch.equal(data.batch(data.train, index, torch.Generator().manual_seed(0))[0], expected)


def test_without_augmentation_the_generator_is_not_used(load):
    data, generator = load(), torch.Generator().manual_seed(0)
    state = generator.get_state()
    x, _ = data.batch(data.train, torch.arange(35), generator)
    assert torch.equal(x, data.batch(data.train, torch.arange(35))[0])
    assert torch.equal(generator.get_state(), state)


def test_augmented_batch_depends_on_the_generator_only(load):
    data, index = load(flip=0.5, pad=4), torch.arange(35)

    def batch(seed):
        return data.batch(data.train, index, torch.Generator().manual_seed(seed))

    torch.manual_seed(1)
    x, y = batch(0)
    torch.manual_seed(2)
    assert torch.equal(x, batch(0)[0])
    assert not torch.equal(x, batch(1)[0])
    assert torch.equal(y, data.train.y[index])


@pytest.mark.parametrize("crop", [{"pad": 4}, {"zoom": 42}, {}])
def test_batches_of_an_epoch(load, crop):
    data = load(flip=0.5, **crop)
    order = data.order(35, seed=3, epoch=2)
    whole = list(data.batches(data.train, 8, order, augment=(3, 2)))
    assert [len(y) for _, y in whole] == [8, 8, 8, 8, 3]
    for k, (x, y) in enumerate(whole):
        generator = torch.Generator().manual_seed((3 * 100_003 + 2) * 1_000_003 + k)  # fixed for ever, as the order is
        again = data.batch(data.train, order[8 * k : 8 * k + 8], generator)
        assert torch.equal(x, again[0])
        assert torch.equal(y, again[1])
    (x, y), (z, _) = data.batches(data.train, 8, order, 2, 4, augment=(3, 2))  # as one who resumes
    assert torch.equal(x, whole[2][0])
    assert torch.equal(z, whole[3][0])
    plain = list(data.batches(data.test, 4))
    assert torch.equal(torch.cat([y for _, y in plain]), data.test.y)
    assert torch.equal(torch.cat([x for x, _ in plain]), data.batch(data.test, torch.arange(10))[0])


def test_padding_is_black_before_normalisation(load):
    """A corner that is padding has the value of a black pixel, not the mean."""
    data = load(pad=32)
    x, _ = data.batch(data.train, torch.zeros(200, dtype=torch.int64), torch.Generator().manual_seed(0))
    black = (0 - torch.tensor(CIFAR["mean"])) / torch.tensor(CIFAR["std"])
    corners = torch.stack([x[..., 0, 0], x[..., 0, -1], x[..., -1, 0], x[..., -1, -1]], 1)  # (200, 4, 3)
    is_black = (corners - black).abs().amax(2) < 1e-5
    assert bool(is_black.any(1).all())  # a crop out of 96 x 96 with a 32 x 32 image in its middle


def test_a_zoomed_image_is_normalised_as_any_other(load):
    """One of a single colour stays that colour, wherever it is cut."""
    data = load(zoom=42)
    data.train.x[0] = torch.tensor([10, 100, 250], dtype=torch.uint8).view(3, 1, 1)
    plain, _ = data.batch(data.train, torch.tensor([0]))
    x, _ = data.batch(data.train, torch.zeros(20, dtype=torch.int64), torch.Generator().manual_seed(0))
    torch.testing.assert_close(x, plain.expand(20, -1, -1, -1))


def test_order_is_a_permutation_of_its_own_seed(load, tmp_path):
    data, other = load(), ImageData("digits", 180, [0.3], [0.3]).load(tmp_path)
    state = torch.get_rng_state()
    order = data.order(1000, seed=0, epoch=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(order.sort().values, torch.arange(1000))
    torch.manual_seed(9)
    assert torch.equal(order, other.order(1000, seed=0, epoch=1))
    seen = {tuple(data.order(1000, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(seen) == 25  # (0, 1) and (1, 0) among them


def test_order_is_fixed_for_ever(load):
    """Else an old run's figures could not be had again."""
    assert load().order(8, 0, 0).tolist() == [4, 3, 0, 7, 5, 6, 1, 2]


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_config_builds_what_its_name_says(name):
    config = OmegaConf.load(CONFIGS / f"{name}.yaml")
    images = instantiate(config)
    assert isinstance(images, ImageData)
    assert images.name == name
    assert (images.flip, images.pad, images.zoom) == (0, 0, 0)
    assert 0 < images.val_size < KNOWN[name].n_train / 5
    assert (images.classes, images.shape) == (KNOWN[name].classes, KNOWN[name].shape)
    assert type(images.mean) is tuple


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "cifar"}, "no data set 'cifar'; nearest: cifar10"),
        ({"val_size": -1}, "val_size must be a whole number from 0 on, not -1"),
        ({"val_size": "5000"}, "val_size must be a whole number from 0 on, not '5000'"),
        ({"val_size": 50_000}, "dataset.val_size=50000, but cifar10 has 50,000 training images"),
        ({"mean": [0.5]}, "mean of cifar10 must be a list, a number for each of 3 channels"),
        ({"std": 0.5}, "std of cifar10 must be a list, a number for each of 3 channels"),
        ({"std": [0.2, 0.0, 0.2]}, r"std must be positive, not \[0.2, 0.0, 0.2\]"),
        ({"flip": 1.5}, "flip must be a probability, not 1.5"),
        ({"flip": "yes"}, "flip must be a probability, not 'yes'"),
        ({"pad": -1}, "pad must be a whole number from 0 on, not -1"),
        ({"pad": 0.5}, "pad must be a whole number from 0 on, not 0.5"),
        ({"val_seed": -1}, "val_seed must be a whole number from 0 on, not -1"),
        ({"zoom": 4.5}, "zoom must be a whole number from 0 on, not 4.5"),
        ({"zoom": 42, "pad": 4}, "dataset.zoom=42 and dataset.pad=4 are two ways to crop; set one of them to 0"),
        ({"zoom": 31}, "dataset.zoom=31 is smaller than the images of cifar10, 32 x 32; take 32 or more, or 0"),
    ],
)
def test_values_that_make_no_sense(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        ImageData(**{**CIFAR, "val_size": 5000, **settings})
