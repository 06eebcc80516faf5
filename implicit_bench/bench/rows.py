from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import clock, config
from ..core import Residual
from ..data import Data
from ..device import Device
from ..record import flat
from ..terminal import Bar, say
from ..train import Step, Tally, count_flops
from .ratios import Figures, Prices


class Row:
    """One model being timed: the same Step that trains it, on batches that every row shares."""

    def __init__(self, label: str, job: config.Composed, data: Data, device: Device):
        self.label, self.job, self.data, self.device = label, job, data, device
        parts = config.build(job.config)
        self.name: str = job.config["model"]["name"]
        self.model = device.place(parts.model)
        self.whole, self.recipe = parts.recipe, replace(parts.recipe, pretrain_steps=0)  # such steps solve nothing
        self.order = data.order(len(data.train), job.config["seed"], 1)
        self.total, self.step_ms = self.recipe.total_steps(len(data.train)), math.nan
        self.step = Step(self.model, parts.penalties, self.recipe, device, self.total)
        self.tally = Tally()
        self.batches = 0
        self.warm: clock.WarmUp | None = None
        self.val_acc: float | None = None  # at the weights that it stands at
        self.logits: torch.Tensor | None = None  # of the first batch at the initial weights
        self.peer_of = ""  # the row that another library's is beside
        self.initial = self.state()
        self.solution: torch.Tensor | None = None  # where calls are priced
        self.still: dict[str, Any] | None = None  # the state that each round begins at; None: it trains as it goes

    @property
    def parameters(self) -> int:
        return sum(self.model.parameter_counts().values())

    def figures(self, times: Mapping[str, Sequence[float]], price: Prices,
                memory: Mapping[str, Sequence[float]], own_ms: float | None = None) -> Figures:  # fmt: skip
        residual = isinstance(self.model.layer.stop, Residual)
        return Figures(self.label, self.job.label or self.name, self.name, times, self.tally.means(), price,
                       self.parameters, self.job.config["solver"], type(self.model.layer.adjoint).__name__.lower(),
                       residual, memory, self.flops(), self.val_acc, self.peer_of, own_ms,
                       self.logits)  # fmt: skip

    def flops(self) -> int:
        """Floating-point operations of a training step at these weights: with them the evaluations change."""
        return count_flops(self.step, *self.batch(0))

    def batch(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        n = self.recipe.steps_an_epoch(len(self.data.train))
        B = self.recipe.batch
        x, y = self.data.batch(self.data.train, self.order[(k % n) * B : (k % n + 1) * B])
        return self.device.images(x), y

    def measure(self, steps: int) -> dict[str, float]:
        """`steps` training steps, then as many predictions on the same batches: mean ms of each part."""
        batches = [self.batch(self.batches + i) for i in range(steps)]
        self.batches += steps
        calls = 0
        for x, y in batches:
            task, out = self.step(x, y)
            self.tally.add(task, y, out, self.step.start_calls)
            calls += out.layer.calls(self.step.start_calls)
        self.model.eval()
        timer = clock.StepTimer(self.device.torch)
        with torch.no_grad(), self.device.autocast():
            for x, _ in batches:
                timer.start()
                self.model(x)
                timer.lap("predict")
        self.model.train()
        if self.still is not None:
            self.put({**self.still, "step": self.step.taken})  # the steps go on: some do what others do not
        laps = {**self.step.timer.drain(wait=True), **timer.drain(wait=True)}
        means = {name: sum(values) / len(values) for name, values in laps.items()}
        self.tally.settle()
        return {"train": means["forward"] + means["backward"] + means["optimizer"], **means, "nfe": calls / steps}

    @torch.no_grad()
    def _see(self) -> None:
        with self.device.autocast():
            self.logits = self.model.eval()(self.batch(0)[0]).logits.float().cpu()
        self.model.train()

    def warm_up(self) -> None:
        """Settle caches and allocator, then put weights and optimiser back; learns step_ms, of a training step."""
        if self.step.taken == 0:
            self._see()

        def run() -> float:
            k = 1 if self.step_ms != self.step_ms else warm_steps(self.step_ms)
            began = time.perf_counter()
            self.step_ms = self.measure(k)["train"]
            return (time.perf_counter() - began) / k

        self.step_ms = math.nan
        with self.unchanged():
            self.warm = clock.warm_up(run)

    def pace(self) -> None:
        """Learn step_ms from the second of two steps; leaves no trace."""
        with self.unchanged():
            self.measure(1)
            self.step_ms = self.measure(1)["train"]

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Weights and optimiser are put back, and the batches begin again."""
        before = self.state()
        try:
            yield
        finally:
            self.put(before)
            self.model.train().zero_grad(set_to_none=True)
            self.batches, self.tally = 0, Tally()

    @contextlib.contextmanager
    def pretraining(self) -> Iterator[None]:
        """The recipe's first steps solve nothing, where it says so."""
        self.step.recipe = self.whole
        try:
            yield
        finally:
            self.step.recipe = self.recipe

    def state(self) -> dict[str, Any]:
        """A copy of the model's and of what is stateful in a step."""
        return copy.deepcopy({"model": self.model.state_dict(), "step": self.step.taken,
                              "step_state": [part.state_dict() for part in self.step.stateful]})  # fmt: skip

    def put(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for part, own in zip(self.step.stateful, state["step_state"]):
            part.load_state_dict(own)
        self.step.taken, self.step.nonfinite = state["step"], 0

    @property
    def cell(self) -> Any:
        """What decides the price of one f: rows that agree on it share the price."""
        return self.job.config["network"], self.job.config["gpu"]

    def prices(self) -> Prices:
        """At the solution of a real batch, which is solved for once. Leaves no trace."""
        cuda = [self.device.torch] if self.device.torch.type == "cuda" else []
        with torch.random.fork_rng(cuda), self.device.autocast():  # masks are drawn
            return self._prices(self.batch(0)[0])

    def _prices(self, x: torch.Tensor) -> Prices:
        layer = self.model.layer
        cell = getattr(layer.cell, "cells", [layer.cell])[0]  # of untied cells, which cost the same, one
        features = self.model.stem(x).detach().requires_grad_()
        ctx = cell.begin(features)
        if self.solution is None:
            with torch.no_grad():
                self.solution = layer(features).z
        zs = self.solution.detach().requires_grad_()
        t = zs.new_zeros(len(zs))
        everything = [zs, features, *(p for p in cell.parameters() if p.requires_grad)]
        out = cell(zs, ctx, t)
        v = torch.ones_like(out)

        def price(call: Callable[[], Any]) -> float:
            return clock.unit_cost(call, device=self.device.torch)

        def vjp(wrt: Sequence[torch.Tensor]) -> float:
            return price(lambda: torch.autograd.grad(out, wrt, v, retain_graph=True, allow_unused=True))

        with torch.no_grad():
            f = price(lambda: cell(zs, ctx, t))
        return Prices(f, price(lambda: cell(zs, ctx, t)), vjp([zs]), vjp(everything))


def make_rows(jobs: Sequence[config.Composed], labels: Sequence[str], data: Data,
              devices: Sequence[Device]) -> list[Row]:  # fmt: skip
    return [Row(label, job, data, device) for label, job, device in zip(labels, jobs, devices)]


def initial_ms(configs: Sequence[dict[str, Any]], seconds: float, rounds: int = 30, steps: int = 4) -> list[float]:
    """Median ms of a training step of each model at its initial weights, interleaved; all have one gpu and data set."""
    device: Device = config.make(configs[0]["gpu"], "gpu")
    device.begin()
    data = config.make(configs[0]["dataset"], "dataset").load(
        Path(configs[0]["paths"]["data"]), device.torch, fetch=lambda line: say("data", line))  # fmt: skip
    solving = [{**cfg, "recipe": {**cfg["recipe"], "pretrain_steps": 0}} for cfg in configs]
    rows = [Row("", config.Composed(cfg, {}), data, device) for cfg in solving]

    def measure(row: Row) -> dict[str, float]:
        with row.unchanged():
            return {"train": row.measure(steps)["train"]}

    for row in rows:
        measure(row)  # compilation, caches, allocator
    with Bar(rounds, "rounds") as bar:
        samples = clock.interleave({str(i): partial(measure, row) for i, row in enumerate(rows)}, rounds=rounds,
                                   seconds=seconds, on_round=lambda done, _: bar.at(done))  # fmt: skip
    if samples.interrupted:
        raise KeyboardInterrupt
    for i, error in samples.failed.items():
        raise config.UsageError(f"model={rows[int(i)].name} could not be timed: {error}")
    return [statistics.median(samples.rows[str(i)]["train"]) for i in range(len(rows))]


def steps_a_round(step_ms: Sequence[float], row_ms: float = 10.0) -> int:
    """So many steps that the fastest row works for `row_ms` a round: long enough that a clock read is nothing."""
    return max(1, min(10, math.ceil(row_ms / min(step_ms))))


def warm_steps(step_ms: float) -> int:
    """Steps in a pass of warming up: eight, of slow ones fewer, as their own noise is the smaller."""
    return max(1, min(8, math.ceil(400 / step_ms)))


def labels(jobs: Sequence[config.Composed], overrides: Sequence[str]) -> list[str]:
    """A row is called by what tells it from the others: the values of the swept keys, else the model's name."""
    swept = [o.get_key_element() for o in config.parse(overrides) if o.is_sweep_override()]
    names = []
    for job in jobs:
        values = dict(o.split("=", 1) for o in job.overrides)
        name = job.label or " ".join(_said(key, values[key]) for key in swept) or job.config["model"]["name"]
        steps = job.config["stop"].get("steps")
        names.append(name if steps is None else f"{name} ×{steps}")
    return [n if names.count(n) == 1 else f"{n} #{names[: i + 1].count(n)}" for i, n in enumerate(names)]


def _said(key: str, value: str) -> str:
    """model=deq is deq; gpu.compile=true is compile=true."""
    return value if "." not in key else f"{key.rpartition('.')[2]}={value.lower()}"


SHARED = ("dataset", "seed", "recipe.batch", "gpu.device", "gpu.dtype", "gpu.threads")


def refuse_unlike(configs: Sequence[dict[str, Any]]) -> None:
    """Rows must share data, seed, batch, dtype, threads and device."""
    first, *others = map(flat, configs)
    for other in others:
        for key in sorted(first.keys() | other.keys(), key=lambda key: not key.endswith(".name")):
            a, b = first.get(key), other.get(key)
            if a != b and any(f"{key}.".startswith(f"{shared}.") for shared in SHARED):
                raise config.UsageError(f"rows of one bench must share {key}, not {a} and {b}; bench them apart")
