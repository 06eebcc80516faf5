from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from ..schema import UsageError


@dataclass
class Recipe:
    """How to train. Steps, not epochs, are the unit of schedules; lr falls to lr_min (cosine) or by gamma (step).

    weight_decay is decoupled under adamw, an L2 term under adam and sgd. With constant_decay (adamw) a step takes
    weight_decay * w off whatever the learning rate, where AdamW takes lr * weight_decay * w: the first paper's code
    does. clip bounds the gradient's norm.
    pretrain_steps at first use `pretrain_depth` plain applications of the cell instead of a solve, as the papers do.
    on_nonfinite: a loss or gradient that is not finite ends the run, or its step is skipped and counted.
    """

    epochs: int = 20
    batch: int = 32
    eval_batch: int = 500
    eval_images: int | None = None  # validate and test on the first so many of each split
    epoch_images: int | None = None  # an epoch sees at most so many of the training images, each epoch others
    watch_test: bool = False  # the test split after each epoch too, for the best accuracy that papers report
    max_steps: int | None = None  # ends the run early, schedule and all
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    constant_decay: bool = False
    momentum: float = 0.9  # sgd
    nesterov: bool = False
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    lr_min: float = 1e-5
    milestones: list[int] = field(default_factory=list)  # steps at which schedule=step multiplies lr by gamma
    gamma: float = 0.1
    clip: float | None = None
    pretrain_steps: int = 0
    pretrain_depth: int = 5
    on_nonfinite: Literal["raise", "skip_step"] = "raise"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "eval_batch", "pretrain_depth", "lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"recipe.{name}={getattr(self, name)} must be positive")
        for name in ("weight_decay", "momentum", "lr_min", "pretrain_steps", "gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"recipe.{name}={getattr(self, name)} must not be negative")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError("recipe.nesterov=true needs recipe.optimizer=sgd and a positive recipe.momentum")
        if self.constant_decay and self.optimizer != "adamw":
            raise ValueError(f"recipe.constant_decay=true needs recipe.optimizer=adamw, not {self.optimizer}")
        end = {"cosine": "lr_min", "step": "gamma"}.get(self.schedule, "lr")
        if self.constant_decay and getattr(self, end) == 0:
            raise ValueError(f"recipe.constant_decay=true needs a learning rate that never is 0; raise recipe.{end}=0")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"recipe.clip={self.clip} must be positive, or null for none")
        for name in ("max_steps", "eval_images", "epoch_images"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"recipe.{name}={value} must be positive, or null for no limit")
        if self.epoch_images is not None and self.epoch_images < self.batch:
            raise ValueError(f"recipe.epoch_images={self.epoch_images} must be at least recipe.batch={self.batch}")

    def steps_an_epoch(self, n_train: int) -> int:
        """Whole batches only; an incomplete last one is left out of the epoch. Raises UsageError without one."""
        if n_train < self.batch:
            raise UsageError(f"recipe.batch={self.batch} is more than the {n_train} training images")
        return min(n_train, self.epoch_images or n_train) // self.batch

    def total_steps(self, n_train: int) -> int:
        total = self.epochs * self.steps_an_epoch(n_train)
        return total if self.max_steps is None else min(total, self.max_steps)

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        settings: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay, "fused": True}
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, momentum=self.momentum, nesterov=self.nesterov, **settings)
        return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optimizer](parameters, **settings)

    def set_decay(self, optimizer: Optimizer) -> None:
        """Before each step: torch multiplies AdamW's decay by the learning rate of the moment."""
        if self.constant_decay:
            for group in optimizer.param_groups:
                group["weight_decay"] = self.weight_decay / group["lr"]

    def make_schedule(self, optimizer: Optimizer, total_steps: int) -> lr_scheduler.LRScheduler:
        if self.schedule == "cosine":
            return lr_scheduler.CosineAnnealingLR(optimizer, total_steps, self.lr_min)
        if self.schedule == "step":
            return lr_scheduler.MultiStepLR(optimizer, self.milestones, self.gamma)
        return lr_scheduler.ConstantLR(optimizer, 1.0)
