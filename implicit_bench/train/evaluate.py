from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as nnf

from ..clock import StepTimer
from ..core import FixedSteps
from ..data import Data, Split
from ..device import Device
from ..models import Classifier
from ..world import gathered, shares
from .step import Tally


@torch.no_grad()
def evaluate(model: Classifier, data: Data, split: Split, batch: int, device: Device) -> dict[str, Any]:
    """Accuracy, loss and solve statistics on a split, in evaluation mode: Tally.means and status_counts, predict_ms."""
    tally, timer = Tally(), StepTimer(device.torch)
    model.eval()
    for x, y, counts in shares(data.batches(split, batch)):
        x = device.images(x)
        timer.start()
        with device.autocast():
            out = model(x)
        timer.lap("predict")
        if counts:
            logits = out.logits.to(torch.promote_types(out.logits.dtype, torch.float32))
            tally.add(nnf.cross_entropy(logits, y), y, out, model.layer.init.calls)
    model.train()
    tally = tally.of_all()
    return {**tally.means(), "status_counts": tally.status_counts(), "predict_ms": timer.drain(wait=True)["predict"]}


def budgets(model: Classifier) -> tuple[int, ...]:
    """Which solver budgets `accuracy_within` can try: none for an ODE, an untied or a fixed explicit network."""
    layer = model.layer
    if layer.field != "equilibrium" or isinstance(layer.stop, FixedSteps):
        return ()
    return (0, 1, 2, 4) if layer.solver.one_call else (0,)


@torch.no_grad()
def accuracy_within(model: Classifier, data: Data, split: Split, batch: int, device: Device,
                    steps: Sequence[int]) -> dict[int, float]:  # fmt: skip
    """Test accuracy when the layer may apply its cell only so many times; 0 = the head on the start alone."""
    model.eval()
    correct = dict.fromkeys(steps, 0)
    for x, y, counts in shares(data.batches(split, batch)):
        x = device.images(x)
        with device.autocast():
            for k in steps:
                correct[k] += counts * int((model.within(x, k).argmax(1) == y).sum())
    model.train()
    every = gathered(correct)
    return {k: sum(each[k] for each in every) / len(split) for k in steps}
