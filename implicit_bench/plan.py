"""`plan=true`: what a command would do, what of it is done, and about how long the rest takes here."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import config, machine, record
from .bench.command import agreed
from .bench.rows import labels, steps_a_round, warm_steps
from .device import Device
from .report import tables
from .terminal import Bar, count, duration, say
from .train import Step, checkpoint

STEPS = 4  # the first of them warms up


def plan_training(jobs: Sequence[config.Composed]) -> int:
    """A line a job: done, begun, failed or to do; steps left, ms a step and where that figure is from, time left."""
    clock, rows, waits = Pace(jobs), [], list[float | None]()
    todo: list[config.Composed] = []
    for job in jobs:
        device: Device = config.make(job.config["gpu"], "gpu")
        cfg = {**job.config, "gpu": device.settings()}
        run_id = "?" if job.alike else record.run_id(cfg)
        folder = record.lookup(cfg["paths"]["runs"], run_id)
        rec = record.peek(folder) if folder and (folder / "record.json").exists() else {}
        state = "to do" if not rec else "begun" if rec["status"] == "running" else rec["status"]
        name = record.folder_name(cfg["model"]["name"], job.choices["dataset"], cfg["seed"], run_id)
        name = folder.name if folder else name
        if state == "done" and not cfg["force"]:
            rows.append([name, "done", 0, None, "", 0.0])
            continue
        steps = clock.steps(job)
        taken = _saved(folder) if folder and state != "done" else 0
        left = None if steps is None else steps - taken
        ms, source = clock.step_ms(job, device)
        todo.append(job)
        waits.append(None if left is None else left * ms / 1e3)
        rows.append([name, state, left, ms, source, waits[-1]])
    clock.close()
    time_left = {"time": lambda s: "–" if s is None else duration(s) if s else ""}
    tables.show(["job", "state", "steps left", "ms/step", "from", "time"], rows, time_left, spare=["from", "ms/step"])
    total, unknown = sum(wait or 0.0 for wait in waits), waits.count(None)
    how_long = f": about {duration(total)} of training here, one after the other" if len(todo) > unknown else ""
    how_long += f"; of {unknown} not known before the data are here" if unknown else ""
    for line in _absent(todo):
        say("data", line)
    done = len(jobs) - len(todo)
    say("plan", f"{count(len(jobs), 'job')}, {done} done, {len(todo)} to do{how_long}; nothing was run")
    return 0


def _absent(jobs: Sequence[config.Composed]) -> list[str]:
    """How to have each data set that is not here, each looked at once: a folder of pictures takes its time."""
    sets = {json.dumps([job.config["dataset"], job.config["paths"]["data"]], sort_keys=True, default=str): job
            for job in jobs}  # fmt: skip
    lines = []
    for job in sets.values():
        found = config.make(job.config["dataset"], "dataset").describe(Path(job.config["paths"]["data"]))
        if found["state"] != "present":
            size = f", {found['download_mb']:,.0f} MB" if found["download_mb"] else ""
            lines.append(f"{job.choices['dataset']} is not here yet: {found['how']}{size}")
    return list(dict.fromkeys(lines))


def plan_bench(jobs: Sequence[config.Composed], words: Sequence[str]) -> int:
    """A line a row: ms a step as measured now, and the time of training (at=), warm-up and rounds."""
    budget, rounds, devices, _ = agreed(jobs, words)
    clock = Pace(jobs)
    steps = [clock.step_ms(job, device) for job, device in zip(jobs, devices)]
    clock.close()
    k, at = steps_a_round([ms for ms, _ in steps]), jobs[0].config["at"] or [0]
    points, along = len(at), max(at)
    rows, total = [], 0.0
    for name, (ms, source) in zip(labels(jobs, words), steps):
        warm = (1 + 3 * warm_steps(ms)) * 1.5 * ms / 1e3  # three passes of steps and predictions, as a rule
        timed = budget / len(jobs) if budget else points * rounds * k * 1.5 * ms / 1e3
        spent = along * ms / 1e3 + points * warm + timed
        total += spent
        rows.append([name, "to do", ms, source, spent])
    tables.show(["row", "state", "ms/step", "from", "time"], rows, {"time": duration}, spare=["from"])
    many = f"{rounds} rounds of {k}" if budget is None else f"rounds of {k} for {duration(budget)}"
    say("plan", f"{len(jobs)} rows, {many} steps and predictions, about {duration(total)} in all; nothing was timed")
    return 0


def plan_others(command: str, jobs: Sequence[config.Composed]) -> int:
    """The jobs of eval and check, which have no long run before them."""
    rows = [[command, " ".join(job.overrides) or "(the defaults)", "to do"] for job in jobs]
    tables.show(["command", "job", "state"], rows)
    say("plan", f"{count(len(jobs), 'job')}; nothing was run")
    return 0


def _saved(folder: Path) -> int:
    """The step that the same command would go on from; the record of a killed run does not know."""
    found = checkpoint.load(folder, torch.device("cpu"), lambda line: None)
    return found["step"] if found else 0


class Pace:
    """ms a training step of jobs: what a run alike took on this machine, else a few steps on random images now."""

    def __init__(self, jobs: Sequence[config.Composed]):
        self._known: dict[str, tuple[float, str]] = {}
        known = machine.fingerprint()
        for folder in dict.fromkeys(job.config["paths"]["runs"] for job in jobs):
            for path in record.record_files(Path(folder)):
                rec = record.peek(path.parent) if path.name == "record.json" else {}
                spread = rec.get("timing", {}).get("step_ms")
                here = rec and all(rec["environment"][key] == known[key] for key in ("cpu", "gpu"))
                if here and spread and rec["command"] == "train" and rec["steps"] > rec["config"]["recipe"].get(
                        "pretrain_steps", 0):  # fmt: skip
                    self._known[_pace(rec["config"])] = spread["median"], "a run like it"
        self._bar = Bar(len(jobs), "jobs")
        self._asked = 0

    def close(self) -> None:
        self._bar.close()

    def steps(self, job: config.Composed) -> int | None:
        """Steps of the whole training; None where that takes reading a data set that is not there yet."""
        from .data import DataError

        parts = config.make(job.config["dataset"], "dataset"), config.make(job.config["recipe"], "recipe")
        try:
            n = parts[0].n_train  # all of them, where that is known before anything is read
            data = Path(job.config["paths"]["data"])
            n = len(parts[0].load(data).train) if n is None else n - parts[0].val_size
        except DataError:
            return None
        return parts[1].total_steps(n)

    def step_ms(self, job: config.Composed, device: Device) -> tuple[float, str]:
        given = job.alike or job.config
        key = _pace({**given, "gpu": device.settings()})
        if key not in self._known:
            self._known[key] = _measure(given, device), "a short trial"
        self._asked += 1
        self._bar.at(self._asked)
        return self._known[key]


def _pace(cfg: dict[str, Any]) -> str:
    """What decides how long a step takes: not the seed, nor how many steps there are."""
    kept = {k: cfg.get(k) for k in ("network", "init", "solver", "stop", "adjoint", "penalty", "field", "gpu")}
    looks = ("val_size", "val_seed", "mean", "std", "flip", "pad", "zoom", "crop", "resize")
    shape = {k: v for k, v in cfg["dataset"].items() if k not in looks}
    return json.dumps([kept, shape, cfg["recipe"]["batch"]], sort_keys=True, default=str)


def _measure(cfg: dict[str, Any], device: Device) -> float:
    device.begin()
    parts = config.build(cfg)
    model = device.place(parts.model)
    step = Step(model, parts.penalties, replace(parts.recipe, pretrain_steps=0), device, STEPS)  # most steps solve
    images = torch.randn(parts.recipe.batch, *parts.dataset.shape, device=device.torch)
    x, y = device.images(images), torch.randint(parts.dataset.classes, (len(images),), device=device.torch)
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        loss, _ = step(x, y)
        float(loss)  # waits for a GPU
        times.append(time.perf_counter() - began)
    return min(times[1:]) * 1e3
