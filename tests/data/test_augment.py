"""Random flips and crops: exactly the legal outcomes, each as often as it should be."""

import collections
import itertools

import pytest
import torch

from implicit_bench.data import ensure_torchvision
from implicit_bench.data.augment import flip_and_crop


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def one_image():
    """(1, 2, 3, 4), pixels all different and none black."""
    return torch.arange(1, 25, dtype=torch.uint8).view(1, 2, 3, 4)


def legal(image, pad, flips):
    """Every outcome for ``image`` (C, H, W), by cutting windows out of the padded original one at a time."""
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * pad, width + 2 * pad, dtype=image.dtype)
    padded[:, pad : pad + height, pad : pad + width] = image
    for top, left in itertools.product(range(2 * pad + 1), repeat=2):
        window = padded[:, top : top + height, left : left + width]
        for flip in flips:
            yield tuple((window.flip(2) if flip else window).flatten().tolist())


@pytest.mark.parametrize("pad", [0, 1, 2])
@pytest.mark.parametrize(("probability", "flips"), [(0.0, [False]), (1.0, [True]), (0.5, [False, True])])
def test_outcomes_are_the_legal_ones_each_as_likely(pad, probability, flips):
    image = one_image()
    allowed = list(legal(image[0], pad, flips))
    expected = 400
    n = expected * len(allowed)
    out = flip_and_crop(image.expand(n, -1, -1, -1), probability, pad, generator())
    assert out.shape == (n, 2, 3, 4)
    assert out.dtype == torch.uint8
    counts = dict.fromkeys(allowed, 0)
    for row in out.flatten(1).tolist():
        counts[tuple(row)] += 1  # KeyError: an illegal outcome
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def resized(image, side):
    """``image`` (C, H, W) at side x side, by hand: pixels lie at their centres, the outermost ones reach out."""
    for dim in (1, 2):
        n = image.shape[dim]
        at = ((torch.arange(side, dtype=torch.float64) + 0.5) * n / side - 0.5).clamp(0, n - 1)
        low = at.floor().long()
        share = (at - low).view(1, -1, 1) if dim == 1 else at - low
        high = (low + 1).clamp(max=n - 1)
        image = image.double().index_select(dim, low) * (1 - share) + image.double().index_select(dim, high) * share
    return image


@pytest.mark.parametrize(("probability", "flips"), [(0.0, [False]), (1.0, [True]), (0.5, [False, True])])
def test_zoomed_outcomes_are_windows_of_the_resized_image_each_as_likely(probability, flips):
    image, zoom = one_image(), 6  # of 3 x 4 pixels: 4 x 3 windows
    whole = resized(image[0], zoom)
    windows = [whole[:, top : top + 3, left : left + 4] for top in range(4) for left in range(3)]
    allowed = [(window.flip(2) if flip else window).flatten() for flip in flips for window in windows]
    expected = 400
    n = expected * len(allowed)
    out = flip_and_crop(image.expand(n, -1, -1, -1), probability, 0, generator(), zoom)
    assert out.shape == (n, 2, 3, 4)
    away = torch.cdist(out.flatten(1).double(), torch.stack(allowed), p=float("inf"))
    assert float(away.min(1).values.max()) < 1e-5
    counts = torch.bincount(away.argmin(1), minlength=len(allowed))
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.tolist())


def test_a_zoom_to_its_own_size_changes_nothing():
    x = torch.randint(0, 256, (8, 3, 5, 5), dtype=torch.uint8, generator=generator())
    assert torch.equal(flip_and_crop(x, 0.0, 0, generator(1), 5), x.float())


def test_each_image_is_cut_from_itself():
    x = torch.randint(1, 256, (64, 3, 5, 5), dtype=torch.uint8, generator=generator())
    out = flip_and_crop(x, 0.5, 1, generator(1))
    for image, result in zip(x, out):
        assert tuple(result.flatten().tolist()) in set(legal(image, 1, [False, True]))


def test_images_of_a_batch_are_treated_independently():
    """The joint counts of two neighbours' flips are those of independent coins."""
    image = one_image()
    out = flip_and_crop(image.expand(8000, -1, -1, -1), 0.5, 0, generator())
    flipped = (out[:, 0, 0, 0] != image[0, 0, 0, 0]).view(4000, 2)
    both = int((flipped[:, 0] & flipped[:, 1]).sum())
    assert abs(both - 1000) < 5 * 1000**0.5


@pytest.mark.parametrize("probability", [0.2, 0.5, 0.9])
def test_flip_probability(probability):
    image = one_image()
    n = 20_000
    out = flip_and_crop(image.expand(n, -1, -1, -1), probability, 0, generator())
    flipped = (out == image.flip(3)).flatten(1).all(1)
    assert bool((flipped | (out == image).flatten(1).all(1)).all())
    spread = (probability * (1 - probability) / n) ** 0.5
    assert abs(float(flipped.float().mean()) - probability) < 5 * spread


def test_generator_decides_everything():
    x = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8, generator=generator())
    torch.manual_seed(0)
    first = flip_and_crop(x, 0.5, 2, generator(3))
    torch.manual_seed(1)
    assert torch.equal(first, flip_and_crop(x, 0.5, 2, generator(3)))
    assert not torch.equal(first, flip_and_crop(x, 0.5, 2, generator(4)))


def test_distributed_as_torchvisions_random_crop_and_flip():
    """Both draw all 2 x 9 outcomes of one image alike: two samples of 3,600, chi-squared against each other."""
    assert ensure_torchvision()
    from torchvision.transforms import v2

    image, n = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3), 3600
    torch.manual_seed(0)
    transform = v2.Compose([v2.RandomCrop(3, padding=1), v2.RandomHorizontalFlip(0.3)])
    theirs = torch.stack([transform(image[0]) for _ in range(n)])
    ours = flip_and_crop(image.expand(n, -1, -1, -1), 0.3, 1, generator())
    counts = [collections.Counter(map(tuple, x.flatten(1).tolist())) for x in (ours, theirs)]
    assert counts[0].keys() == counts[1].keys()
    assert len(counts[0]) == 18
    chi2 = sum((counts[0][key] - counts[1][key]) ** 2 / (counts[0][key] + counts[1][key]) for key in counts[0])
    assert chi2 < 40.8  # 17 degrees of freedom, p = 0.001
