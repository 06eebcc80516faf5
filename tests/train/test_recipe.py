import math

import pytest
import torch

from implicit_bench.schema import UsageError
from implicit_bench.train import Recipe


def lrs(recipe, total):
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = recipe.make_optimizer([p])
    schedule = recipe.make_schedule(optimizer, total)
    seen = []
    for _ in range(total + 1):
        seen.append(optimizer.param_groups[0]["lr"])
        p.grad = torch.ones(1)
        optimizer.step()
        schedule.step()
    return seen


def test_cosine_goes_from_lr_to_lr_min_along_a_half_cosine():
    seen = lrs(Recipe(lr=1e-2, lr_min=1e-4, schedule="cosine"), 10)
    expected = [1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(11)]
    assert seen == pytest.approx(expected, rel=1e-9)


def test_step_schedule_multiplies_at_its_milestones():
    seen = lrs(Recipe(lr=1.0, schedule="step", milestones=[2, 4], gamma=0.1), 5)
    assert seen == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_constant_schedule_is_constant():
    assert set(lrs(Recipe(lr=0.3, schedule="constant"), 5)) == {0.3}


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        (dict(optimizer="adam", weight_decay=0.1), lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1)),
        (dict(optimizer="adamw", weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
        (
            dict(optimizer="sgd", momentum=0.8, nesterov=True),
            lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.8, nesterov=True),
        ),
    ],
)
def test_optimisers_update_as_torch_documents_them(settings, reference):
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    a, b = Recipe(lr=0.01, **settings).make_optimizer([ours]), reference([theirs])
    for k in range(5):
        ours.grad, theirs.grad = torch.cos(ours.detach() * k), torch.cos(theirs.detach() * k)
        a.step()
        b.step()
    assert torch.allclose(ours, theirs, atol=1e-7)
    assert not torch.allclose(ours, torch.linspace(-1, 1, 7))


def test_steps():
    recipe = Recipe(epochs=3, batch=32)
    assert recipe.steps_an_epoch(100) == 3
    assert recipe.total_steps(100) == 9
    assert Recipe(epochs=3, batch=32, max_steps=4).total_steps(100) == 4
    assert Recipe(epochs=3, batch=32, epoch_images=70).total_steps(100) == 6
    assert Recipe(epochs=3, batch=32, epoch_images=1000).total_steps(100) == 9
    with pytest.raises(UsageError, match=r"recipe.batch=32 is more than the 20 training images"):
        recipe.steps_an_epoch(20)


@pytest.mark.parametrize("bad", [dict(epochs=0), dict(batch=0), dict(lr=-1.0), dict(clip=0.0), dict(max_steps=0),
    dict(weight_decay=-1.0), dict(momentum=-0.1), dict(lr_min=-1e-5), dict(gamma=-1.0), dict(pretrain_steps=-1),
    dict(nesterov=True), dict(epoch_images=0), dict(epoch_images=31), dict(constant_decay=True),
    dict(constant_decay=True, optimizer="adamw", lr_min=0.0),
    dict(constant_decay=True, optimizer="adamw", schedule="step", gamma=0.0)])
def test_impossible_values_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=rf"recipe.{next(iter(bad))}"):
        Recipe(**bad)
