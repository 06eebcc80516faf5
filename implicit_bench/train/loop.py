from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

from ..clock import StepTimer, summary
from ..data import Data
from ..device import Device
from ..jsonl import Jsonl
from ..models import Classifier
from ..terminal import Bar, duration, number, share
from ..world import any_of, gathered, mine, world
from . import checkpoint
from .evaluate import evaluate
from .recipe import Recipe
from .signals import Interrupted, finishing_on_signals
from .step import Step, Tally

KEPT_TIMES = 5000  # the latest steps' times, in the checkpoint too
COLD_STEPS = 10  # first steps, left out of the figures


@dataclass
class Progress:
    """Where a run stands, and what a checkpoint holds beside the weights."""

    epoch: int = 0  # epochs begun
    batch: int = 0  # batches of it taken
    best_epoch: int | None = None
    best_val_acc: float = -1.0
    best_test_acc: float = -1.0  # only under recipe.watch_test
    last: dict[str, Any] = field(default_factory=dict)  # the last epoch's row
    tally: dict[str, float] = field(default_factory=dict)  # of the epoch so far
    times: dict[str, list[float]] = field(default_factory=dict)
    cold_s: float | None = None


class Fit:
    """The training loop over one Step: epochs, validation, rows, checkpoints, progress. Resumes bit for bit (CPU).

    rows: called with a dict and the step, for JSONL and for every other sink; before_table: before the table of epochs
    begins on stderr.
    """

    def __init__(self, model: Classifier, step: Step, data: Data, recipe: Recipe, device: Device, seed: int,
                 folder: Path, jsonl: Jsonl, rows: Callable[[dict[str, Any], int], None], log_steps: int,
                 save_s: float, before_table: Callable[[], None] = lambda: None):  # fmt: skip
        self.model, self.step, self.data, self.recipe, self.device = model, step, data, recipe, device
        self.seed, self.folder, self.jsonl, self.rows = seed, folder, jsonl, rows
        self.log_steps, self.save_s, self.before_table = log_steps, save_s, before_table
        self.steps_an_epoch = recipe.steps_an_epoch(len(data.train))
        self.total = recipe.total_steps(len(data.train))
        self.end = self.total  # of this call of `run`
        self.at = Progress()
        self.saved_step = -1
        self._fetch = StepTimer(device.torch)

    def resume(self, say: Callable[[str], None]) -> int | None:
        """Take up the newest whole checkpoint; returns its step, None if there is none."""
        found = checkpoint.load(self.folder, self.device.torch, say)
        if found is None:
            return None
        checkpoint.put(self.model, found["model"], self.folder)
        for part, state in zip(self.step.stateful, found["step_state"]):
            part.load_state_dict(state)
        self.step.taken, self.step.nonfinite = found["step"], found["nonfinite"]
        self.at = Progress(**found["progress"])
        if world().first:
            self.jsonl.truncate(found["jsonl"])
        checkpoint.set_rng_state(found["rng"], found.get("others", ()))
        self.saved_step = self.step.taken
        return self.step.taken

    def save(self, tally: Tally | None = None) -> None:
        if tally is not None:
            self.at.tally = tally.of_all().sums
        self._collect_times()
        rng, *others = gathered(checkpoint.rng_state())
        if world().first:
            checkpoint.save(self.folder, {
                "model": self.model.state_dict(), "step_state": [part.state_dict() for part in self.step.stateful],
                "step": self.step.taken, "nonfinite": self.step.nonfinite, "progress": vars(self.at),
                "jsonl": self.jsonl.offset(), "rng": rng, "others": others,
            })  # fmt: skip
        self.saved_step = self.step.taken

    def run(self, say: Callable[[str], None], until: int | None = None) -> None:
        """Train to the end, or `until` so many steps are taken and saved. Raises Interrupted after saving, NonFinite
        without."""
        self.end = min(until or self.total, self.total)
        self._headed = False
        with Bar(self.end, "steps", self.step.taken) as bar, finishing_on_signals() as asked:
            while self.step.taken < self.end or (self.step.taken == self.total and self.at.batch):  # an open epoch
                self._epoch(bar, asked, say)

    def _epoch(self, bar: Bar, asked: Callable[[], bool], say: Callable[[str], None]) -> None:
        at, step, data, B = self.at, self.step, self.data, self.recipe.batch
        if at.batch == 0:
            at.epoch += 1
        order = data.order(len(data.train), self.seed, at.epoch)
        tally = Tally(at.tally if world().first else None)
        last_save = time.perf_counter()
        began, first, saving = last_save, step.taken, 0.0
        steps = min(self.steps_an_epoch - at.batch, self.end - step.taken)
        stream = data.batches(data.train, B, order, at.batch, at.batch + steps, augment=(self.seed, at.epoch))
        with closing(stream) as batches:
            for _ in range(steps):
                self._fetch.start()
                x, y = mine(*next(batches))
                x = self.device.images(x)
                self._fetch.lap("data")
                task, out = step(x, y)
                tally.add(task, y, out, step.start_calls)
                at.batch += 1
                if at.cold_s is None:
                    at.cold_s = time.perf_counter() - began
                bar.at(step.taken, lambda: self._live(tally, (time.perf_counter() - began) / (step.taken - first)))
                if at.epoch == 1 and at.batch == step.taken - first == COLD_STEPS:  # of a run from its beginning
                    self._warn_if_long((time.perf_counter() - began - at.cold_s) / (COLD_STEPS - 1), say)
                if step.taken % self.log_steps == 0:
                    self._row(_named(tally.of_all().means()))
                stop, due = any_of(asked(), world().first and time.perf_counter() - last_save > self.save_s)
                if stop:
                    self.save(tally)
                    raise Interrupted
                if due:
                    now = time.perf_counter()
                    self.save(tally)
                    last_save = time.perf_counter()
                    saving += last_save - now
        if step.taken < self.total and at.batch < self.steps_an_epoch:
            self.save(tally)  # in the midst of an epoch, which goes on when `run` is called again
            return
        tally = tally.of_all()
        whole = time.perf_counter() - began - saving if at.batch == steps else None  # by one call
        self._close_epoch(tally, bar, whole)

    def _close_epoch(self, tally: Tally, bar: Bar, seconds: float | None) -> None:
        at, data = self.at, self.data
        self._collect_times()
        train = tally.means()
        val: dict[str, Any] = {}
        if len(data.val):
            val = evaluate(self.model, data, data.val, self.recipe.eval_batch, self.device)
            if val["acc"] > at.best_val_acc:
                at.best_epoch, at.best_val_acc = at.epoch, val["acc"]
        times = at.times.get("step", [])[-self.steps_an_epoch :]
        ms = summary(times)["median"] if times else None  # none of this machine
        row = {
            "epoch": at.epoch,
            "lr": self.step.optimizer.param_groups[0]["lr"],
            "timing.step_ms": ms,
            "timing.epoch_s": seconds,  # None for an epoch that was interrupted
            **_named(train),
        }
        row |= {f"metrics.val_{k}": val[k] for k in ("acc", "loss") if k in val}
        if self.recipe.watch_test:
            test = evaluate(self.model, data, data.test, self.recipe.eval_batch, self.device)
            at.best_test_acc = max(at.best_test_acc, test["acc"])
            row["metrics.test_acc_best_paper_style"] = at.best_test_acc
        self._row(row)
        nfe = f"{number(train['nfe_forward'])}/{number(train['nfe_backward'])}"
        residual = number(train["residual"], 2)
        done = f"{train['converged_fraction']:.0%}" if "converged_fraction" in train else "–"
        if not self._headed:  # not sooner, so that what is said while the first epoch runs stands above the table
            self.before_table()
            bar.line(" epoch   loss   val acc   nfe f/b     residual   converged   ms/step")
            self._headed = True
        loss = f"{train['loss']:.3f}" if train["loss"] < 1e3 else number(train["loss"])
        left = f"{at.epoch:6d} {loss:>7}  {share(val.get('acc')):>6}"
        bar.line(f"{left}   {nfe:<10}  {residual:>8}   {done:>7}   {number(ms):>9}")
        at.last, at.batch, at.tally = {**row, "solve.status_counts": tally.status_counts()}, 0, {}
        self.save()

    def _row(self, row: dict[str, Any]) -> None:
        row = {"step": self.step.taken, **row}
        self.jsonl.append(row)
        self.rows(row, self.step.taken)

    def _collect_times(self) -> None:
        laps = self.step.timer.drain(wait=True)
        if not laps:
            return
        laps["step"] = [sum(parts) for parts in zip(*laps.values())]
        laps |= self._fetch.drain(wait=True)
        for name, values in laps.items():
            self.at.times[name] = [*self.at.times.get(name, ()), *values][-KEPT_TIMES:]

    def _live(self, tally: Tally, step_s: float) -> str:
        m = tally.means()
        speed = f"{number(step_s * 1e3)} ms/step"
        more = f" · acc {m['acc']:.3f} · nfe {number(m['nfe_forward'])}" if get_terminal_size().columns >= 100 else ""
        return f"{speed} · loss {m['loss']:.3f}{more}"

    def _warn_if_long(self, step_s: float, say: Callable[[str], None]) -> None:
        left = step_s * (self.end - self.step.taken)
        if left > 3600:
            short, smoke = step_s * 3 * self.steps_an_epoch, step_s * 100 * 32 / self.recipe.batch
            say(f"about {duration(left)} on this machine at {number(step_s * 1e3)} ms a step; length=short trains 3 "
                f"epochs in {duration(short)}, length=smoke 100 steps of 32 images in {duration(smoke)}")  # fmt: skip


def _named(means: Mapping[str, float]) -> dict[str, float]:
    """A tally's means under their METRICS keys."""
    solve = ("nfe_forward", "nfe_backward", "linear_iterations", "residual", "rhs_norm", "converged_fraction",
             "backward_converged")
    return {"metrics.train_loss": means["loss"], "metrics.train_acc": means["acc"],
            **{f"solve.{key}": means[key] for key in solve if key in means}}  # fmt: skip
