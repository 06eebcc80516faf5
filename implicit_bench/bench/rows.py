from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
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
from ..train import Step, Tally
from .ratios import Figures


class Row:
    """One model being timed: the same Step that trains it, on batches that every row shares."""

    def __init__(self, label: str, job: config.Composed, data: Data, device: Device):
        self.label, self.job, self.data, self.device = label, job, data, device
        parts = config.build(job.config)
        self.name: str = job.config["model"]["name"]
        self.model = device.place(parts.model)
        if device.compile:
            self.model.layer.cell.compile()
        self.recipe = replace(parts.recipe, pretrain_steps=0)  # which solve nothing
        self.order = data.order(len(data.train), job.config["seed"], 1)
        try:
            total = self.recipe.total_steps(len(data.train))
        except ValueError as mistake:
            raise config.UsageError(str(mistake)) from None
        self.step = Step(self.model, parts.penalties, self.recipe, device, total)
        self.tally = Tally()
        self.batches = 0
        self.warm: clock.WarmUp | None = None

    @property
    def parameters(self) -> int:
        return sum(self.model.parameter_counts().values())

    def figures(self, times: Mapping[str, Sequence[float]], f_ms: float, vjp_ms: float) -> Figures:
        return Figures(self.label, self.name, times, self.tally.means(), f_ms, vjp_ms, self.parameters,
                       self.job.config["solver"], isinstance(self.model.layer.stop, Residual))  # fmt: skip

    def batch(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        n = self.recipe.steps_an_epoch(len(self.data.train))
        B = self.recipe.batch
        x, y = self.data.batch(self.data.train, self.order[(k % n) * B : (k % n + 1) * B])
        return self.device.images(x), y

    def measure(self, steps: int) -> dict[str, float]:
        """`steps` training steps, then as many predictions on the same batches: mean ms of each part."""
        batches = [self.batch(self.batches + i) for i in range(steps)]
        self.batches += steps
        for x, y in batches:
            task, out = self.step(x, y)
            self.tally.add(task, y, out, self.step.start_calls)
        self.model.eval()
        timer = clock.StepTimer(self.device.torch)
        with torch.no_grad(), self.device.autocast():
            for x, _ in batches:
                timer.start()
                self.model(x)
                timer.lap("predict")
        self.model.train()
        laps = {**self.step.timer.drain(wait=True), **timer.drain(wait=True)}
        means = {name: sum(values) / len(values) for name, values in laps.items()}
        self.tally.settle()
        return {"train": means["forward"] + means["backward"] + means["optimizer"], **means}

    def warm_up(self) -> float:
        """Settle caches and allocator, then put weights and optimiser back; returns ms of a training step."""
        times: list[float] = []

        def run() -> float:
            began = time.perf_counter()
            times.append(self.measure(8)["train"])
            return time.perf_counter() - began

        with self.unchanged():
            self.warm = clock.warm_up(run)
        return times[-1]

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Weights and optimiser are put back, and the batches begin again."""
        holders = [self.model, *self.step.stateful]
        state = [copy.deepcopy(holder.state_dict()) for holder in holders]
        yield
        for holder, before in zip(holders, state):
            holder.load_state_dict(before)
        self.batches, self.step.taken, self.step.nonfinite, self.tally = 0, 0, 0, Tally()

    @property
    def cell(self) -> Any:
        """What decides the price of one f: rows that agree on it share the price."""
        return self.job.config["network"], self.job.config["gpu"]

    def unit_costs(self) -> tuple[float, float]:
        """ms of one call of f, and of one VJP of f on a kept graph, at the solution of a real batch."""
        x, _ = self.batch(0)
        layer = self.model.layer
        cell = getattr(layer.cell, "cells", [layer.cell])[0]  # of untied cells, which cost the same, one
        with torch.no_grad():
            features = self.model.stem(x)
            ctx = cell.begin(features)
            z = layer(features).z.detach()
            t = z.new_zeros(len(z))
            f = clock.unit_cost(lambda: cell(z, ctx, t), device=self.device.torch)
        zs = z.requires_grad_()
        out = cell(zs, ctx, t)
        v = torch.ones_like(out)
        vjp = clock.unit_cost(lambda: torch.autograd.grad(out, zs, v, retain_graph=True), device=self.device.torch)
        return f, vjp


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
    bar = Bar(rounds, "rounds")
    with contextlib.closing(bar):
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


def labels(jobs: Sequence[config.Composed], overrides: Sequence[str]) -> list[str]:
    """A row is called by what tells it from the others: the values of the swept keys, else the model's name."""
    swept = [o.get_key_element() for o in config.parse(overrides) if o.is_sweep_override()]
    names = []
    for job in jobs:
        values = dict(o.split("=", 1) for o in job.overrides)
        name = " ".join(_said(key, values[key]) for key in swept) or job.config["model"]["name"]
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
