from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf
from torch.utils.flop_counter import FlopCounterMode

from ..adjoints import BackwardLog
from ..clock import StepTimer
from ..core import Stats, Status
from ..device import Device
from ..models import Classifier, Output, Penalty
from ..world import average_gradients, gathered, world
from .recipe import Recipe


class NonFinite(RuntimeError):
    """A loss or a gradient was not finite under recipe.on_nonfinite=raise."""


class Tally:
    """Sums over samples of what steps report. `add` only keeps references, never a graph; `settle` does the sums."""

    def __init__(self, sums: Mapping[str, float] | None = None):
        self.sums: dict[str, float] = dict(sums or {})
        self._pending: list[tuple[Tensor, Tensor, Tensor, Stats, Tensor, BackwardLog, int]] = []

    def add(self, loss: Tensor, y: Tensor, out: Output, start_calls: int) -> None:
        """loss () is the batch's mean, y (B,) its labels, start_calls what the start costs in evaluations of f."""
        solution = out.layer.solution
        self._pending.append((loss.detach(), out.logits.detach(), y, solution.stats, solution.status,
                              out.layer.backward, start_calls))  # fmt: skip
        if len(self._pending) >= 64:
            self.settle()

    def settle(self) -> None:
        for loss, logits, y, stats, statuses, back, start_calls in self._pending:
            n = len(y)
            extra = start_calls + back.forward_calls
            values: dict[str, float | Tensor] = {
                "n": n, "batches": 1, "loss": loss * n, "correct": (logits.argmax(1) == y).sum(),
                "nfe_forward": stats.calls + extra, "nfe_sample": stats.nfe.sum() + extra * n,
                "nfe_backward": back.vjps, "calls_backward": back.calls, "residual": stats.residual.sum(),
                "narrow": back.narrow, "recorded": back.recorded,
            }  # fmt: skip
            if back.iterations is not None and back.rhs_norm is not None:
                values |= {"linear_iterations": back.iterations.sum(), "rhs_norm": back.rhs_norm.sum(), "linear": n}
            if back.converged is not None:
                values |= {"back": n, "back_converged": back.converged.sum() * (n / len(back.converged))}
            for status, count in enumerate(torch.bincount(statuses, minlength=len(Status)).tolist()):
                values[f"status_{Status(status).name}"] = count
            for key, value in values.items():
                self.sums[key] = self.sums.get(key, 0.0) + float(value)
        self._pending.clear()

    def of_all(self) -> Tally:
        """The sums over all processes, in each of them."""
        self.settle()
        both: dict[str, float] = {}
        for sums in gathered(self.sums):
            for key, value in sums.items():
                both[key] = both.get(key, 0.0) + value
        return Tally(both)

    def means(self) -> dict[str, float]:
        """nfe_forward, nfe_backward, calls_backward, and of these calls those `recorded` and of these VJPs the `narrow`

        ones (see BackwardLog) a batch; the rest a sample; converged_fraction if it was asked.
        """
        self.settle()
        s = self.sums
        if not s.get("n"):
            return {}
        n, batches = s["n"], s["batches"]
        out = {"loss": s["loss"] / n, "acc": s["correct"] / n, "nfe_forward": s["nfe_forward"] / batches,
               "nfe_backward": s["nfe_backward"] / batches, "nfe_sample": s["nfe_sample"] / n,
               "calls_backward": s["calls_backward"] / batches, "residual": s["residual"] / n,
               "narrow": s.get("narrow", 0.0) / batches, "recorded": s.get("recorded", 0.0) / batches}  # fmt: skip
        if "linear_iterations" in s:
            solved = s.get("linear", n)  # not those of pretraining
            out |= {"linear_iterations": s["linear_iterations"] / solved, "rhs_norm": s["rhs_norm"] / solved}
        if "back" in s:
            out["backward_converged"] = s["back_converged"] / s["back"]
        counts = self.status_counts()
        asked = n - counts.get("REACHED_END", 0)  # an end time, or a fixed depth, asks for no convergence
        if asked:
            out["converged_fraction"] = counts.get("CONVERGED", 0) / asked
        return out

    def status_counts(self) -> dict[str, int]:
        self.settle()
        return {k.removeprefix("status_"): int(v) for k, v in self.sums.items() if k.startswith("status_") and v}


class Step:
    """One training step: forward, backward, update, each timed; the statistics are taken after the clock has stopped.

    Used by training and by bench alike, so that what is timed is what trains.
    """

    def __init__(
        self, model: Classifier, penalties: Sequence[Penalty], recipe: Recipe, device: Device, total_steps: int
    ):
        self.model, self.penalties, self.recipe, self.device = model, penalties, recipe, device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        init: Any = model.layer.init
        self.every: int = getattr(init, "every", 0)  # steps between two of the start's own, if it has an optimiser
        self.start = init.optimizer(total_steps) if self.every else ()
        apart = {id(p) for p in init.parameters()} if self.every else set()
        self.optimizer = recipe.make_optimizer(p for p in self.parameters if id(p) not in apart)
        self.schedule = recipe.make_schedule(self.optimizer, total_steps)
        self.timer = StepTimer(device.torch)
        self.start_calls: int = model.layer.init.calls
        self.taken, self.nonfinite = 0, 0

    @property
    def stateful(self) -> list[Any]:
        """What a checkpoint holds of it, beside the weights."""
        return [self.optimizer, self.schedule, *self.start]

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Output]:
        """x (B, C, H, W), y (B,) -> task loss () and the model's output. Raises NonFinite."""
        depth = self.recipe.pretrain_depth if self.taken < self.recipe.pretrain_steps else 0
        self.timer.start()
        skips = self.recipe.on_nonfinite == "skip_step"
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()} if skips else {}
        with self.device.autocast():
            loss, task, out = self.loss(x, y, depth)
        self.timer.lap("forward")
        self.model.zero_grad(set_to_none=True)
        if (size := world().size) > 1:
            (loss / size).backward()
            loss = average_gradients(self.parameters, loss)
        else:
            loss.backward()
        self.timer.lap("backward")
        bound = self.recipe.clip if self.recipe.clip is not None else float("inf")
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if bound < float("inf"):
            torch.nn.utils.clip_grads_with_norm_(self.parameters, bound, norm)
        sane = self.recipe.on_nonfinite == "raise" or bool((norm + loss.detach()).isfinite())
        if sane:  # under raise the answer is read after the clock has stopped: no wait inside a step
            self.recipe.set_decay(self.optimizer)
            self.optimizer.step()
            if self.every and self.taken % self.every == 0:
                for part in self.start:
                    part.step()
        else:
            self.nonfinite += 1
            for name, buffer in self.model.named_buffers():  # statistics, which the forward has changed
                buffer.copy_(before[name])
        self.schedule.step()
        self.timer.lap("optimizer")
        self.taken += 1
        task = task.detach()
        if self.recipe.on_nonfinite == "raise" and not bool((norm + loss.detach()).isfinite()):
            self.nonfinite += 1
            raise NonFinite(
                f"the loss ({float(task):.3g}) or its gradient (norm {float(norm):.3g}) was not finite at step "
                f"{self.taken}; lower recipe.lr, set recipe.clip=1, or use recipe.on_nonfinite=skip_step"
            )
        return task, out

    def loss(self, x: Tensor, y: Tensor, depth: int = 0) -> tuple[Tensor, Tensor, Output]:
        """What is minimised, the task's part of it, and the model's output; `depth` as in models.Classifier."""
        out: Output = self.model(x, depth)
        loss = task = nnf.cross_entropy(out.logits, y)
        for penalty in self.penalties:
            loss = loss + penalty(out.layer, lambda z: self._of_state(z, y))
        return loss, task, out

    def _of_state(self, z: Tensor, y: Tensor) -> Tensor:
        """The task loss of a state that is no prediction: the head's running statistics are of those alone."""
        own = {name: buffer.clone() for name, buffer in self.model.head.named_buffers()}
        return nnf.cross_entropy(torch.func.functional_call(self.model.head, own, z), y)


def count_flops(step: Step, x: Tensor, y: Tensor) -> int:
    """Floating-point operations of one forward and backward of a step that solves, counted by torch (2 a
    multiply-add)."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter:
        step.loss(x, y)[0].backward()
    step.model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


class _NoModules:
    """Stands in for the counter's module tracker, which cannot follow a backward that solves a linear system."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
