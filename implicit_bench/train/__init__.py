"""Training: the step, the loop, checkpoints, evaluation."""

from .checkpoint import CheckpointError
from .evaluate import accuracy_within, budgets, evaluate
from .loop import Fit
from .recipe import Recipe
from .signals import Interrupted
from .step import NonFinite, Step, Tally, count_flops

__all__ = ["CheckpointError", "Fit", "Interrupted", "NonFinite", "Recipe", "Step", "Tally", "accuracy_within",
           "budgets", "count_flops", "evaluate"]  # fmt: skip
