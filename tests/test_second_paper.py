"""The numbers of the second paper's experiments (arXiv 2310.09583, as in its released code), under both protocols."""

import pytest

from implicit_bench import config

CIFAR, IMAGENET = ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
EXPERIMENTS = {  # channels, groups, dropout, the start's steps and lr (2 x theirs), (mean, std), flip, pad, frozen
    "homo_cifar10": (64, 32, 0.1, 20, 0.04, IMAGENET, 0.2, 4, False),
    "homo_cifar100": (128, 32, 0.15, 5, 0.02, IMAGENET, 0.5, 4, True),
    "homo_tiny_imagenet": (128, 8, 0.15, 20, 0.1, CIFAR, 0.5, 8, True),
    "homo_svhn": (64, 32, 0.1, 20, 0.04, None, 0.0, 4, False),  # no script: CIFAR-10's without mirror images
    "homo_mnist": (64, 32, 0.1, 20, 0.04, None, 0.0, 4, False),
}
RECIPE = {"epochs": 300, "batch": 64, "optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "schedule": "cosine",
          "lr_min": 1e-6, "clip": None, "pretrain_steps": 0}  # fmt: skip


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_of_the_second_paper_has_its_numbers(name):
    channels, groups, dropout, every, lr, normal, flip, pad, frozen = EXPERIMENTS[name]
    for protocol in ("sound", "faithful"):
        cfg = config.compose("train", [f"experiment={name}", f"protocol={protocol}", "adjoint=backsolve"]).config
        assert (cfg["model"]["name"], cfg["field"]) == ("homo_ode", "ode")
        assert RECIPE.items() <= cfg["recipe"].items()
        assert (cfg["network"]["groups"], cfg["network"]["dropout"]) == (groups, dropout)
        assert (cfg["dataset"]["flip"], cfg["dataset"]["pad"]) == (flip, pad)
        assert normal is None or (cfg["dataset"]["mean"], cfg["dataset"]["std"]) == normal
        assert (cfg["solver"]["rtol"], cfg["solver"]["atol"], cfg["stop"]["t1"]) == (1e-3, 1e-3, 1.0)
        scale = channels if protocol == "sound" else 1  # sound undoes the loss's mean over channels
        assert cfg["init"]["every"] == every
        assert cfg["init"]["lr"] == pytest.approx(lr * scale)
        theirs = frozen and protocol == "faithful"
        adjoint = {"frozen": theirs, "restarts": False, "x_gradient": "exact"}
        assert adjoint.items() <= cfg["adjoint"].items()
        config.build(cfg)
