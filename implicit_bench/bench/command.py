"""`implicit-bench bench`: rows, rounds, ratios, record."""

from __future__ import annotations

import contextlib
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .. import clock, config, machine, record
from ..device import Device
from ..jsonl import Jsonl
from ..lock import RunLock
from ..log import Sink
from ..sync import replay
from ..terminal import Bar, count, duration, progress, say
from ..train import Interrupted
from ..train.signals import sigterm_as_ctrl_c
from . import claims, memory, peers, show
from .arithmetic import arithmetic_ms
from .ratios import Prices, Stage, comparisons
from .rows import Row, labels, make_rows, refuse_unlike, steps_a_round, warm_steps
from .trained import lacks, put, trained, where

FILES = ("record.json", "table.md", "speedup.svg", "metrics.jsonl")
Failed = dict[str, str]  # label -> why


def seconds(text: str | int | float | None) -> float | None:
    """20s, 5m or 1h, in seconds."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", str(text))
    if not match or not float(match[1]):
        raise config.UsageError(f"time={text!r} is not a time; write 20s, 5m or 1h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def agreed(jobs: Sequence[config.Composed], words: Sequence[str]) -> tuple[float | None, int, list[Device],
                                                                           list[dict[str, Any]]]:  # fmt: skip
    """The time or the rounds that the jobs have, devices and configs. Raises UsageError where they are no bench."""
    if len(jobs) < 2:
        raise config.UsageError("bench compares two rows or more; list values, such as model=neural_ode,cdeq")
    first = jobs[0].config
    budget, rounds = seconds(first["time"]), first["rounds"]
    said = [word for word in words if word.startswith(("rounds=", "time=")) and word != "time=null"]
    if len(said) > 1:
        raise config.UsageError(f"{' and '.join(said)} both say when to end; give one of them")
    if budget is None and (not isinstance(rounds, int) or rounds < 1):
        raise config.UsageError(f"rounds={rounds!r} is not possible; write a whole number, 40 or more for an interval")
    peers.asked(first["peers"])
    claims.asked(jobs[0].table)
    if bad := [k for k in first["at"] or () if k < 0]:
        raise config.UsageError(f"at={bad[0]} is not possible; write steps of training, such as at=0,100,500")
    devices: list[Device] = [config.make(job.config["gpu"], "gpu") for job in jobs]
    configs = [{**job.config, "gpu": device.settings()} for job, device in zip(jobs, devices)]
    refuse_unlike(configs)
    return budget, rounds, devices, configs


def bench(jobs: Sequence[config.Composed], words: Sequence[str]) -> int:
    """Time the jobs against each other; 0, or 1 when a row failed. Raises UsageError before anything runs."""
    began = time.perf_counter()
    budget, rounds, devices, configs = agreed(jobs, words)
    first, table = jobs[0].config, jobs[0].table
    dropped = record.LABELS | record.MEASURING
    pruned = [{k: v for k, v in c.items() if k not in dropped} for c in configs]
    identity: dict[str, Any] = {"rows": pruned, "rounds": rounds if budget is None else None, "time": budget}
    identity |= {"at": first["at"]} if first["at"] else {}
    identity |= {"table": table.name} if table else {}
    identity |= {"peers": first["peers"]} if first["peers"] else {}
    identity |= {"runs": [job.trained.name for job in jobs if job.trained]} if jobs[0].trained else {}
    what = table.name if table else jobs[0].choices["dataset"]
    folder = Path(first["paths"]["runs"]) / record.folder_name("bench", what, None, record.run_id(identity))
    environment = devices[0].environment()
    data = config.make(first["dataset"], "dataset").load(
        Path(first["paths"]["data"]), devices[0].torch, fetch=lambda line: say("data", line))  # fmt: skip
    rows = make_rows(jobs, labels(jobs, words), data, devices)
    rows += peers.beside(rows, first["peers"])
    for k in first["at"] or ():
        if k > rows[0].total:
            raise config.UsageError(f"at={k} lies beyond the {rows[0].total:,} steps of the recipe; give fewer, or "
                                    "raise recipe.epochs")  # fmt: skip
    record.writable("paths.runs", Path(first["paths"]["runs"]))
    with sigterm_as_ctrl_c(), RunLock(folder):
        attempt = record.next_attempt(folder, FILES)
        rec = record.new_record("bench", identity, attempt=attempt, protocol=jobs[0].choices.get("protocol"),
                                experiment=jobs[0].choices.get("experiment"))  # fmt: skip
        rec["environment"], rec["data"] = environment, data.facts()
        record.write_record(folder, rec)
        sink: Sink = config.make(first["logger"], "logger")
        sink.start(rec, folder)
        try:
            sink.wait(30)  # nothing else may run while the clock does
            with contextlib.closing(Jsonl(folder / "metrics.jsonl")) as jsonl:
                timing = Timing(rows, first["at"] or [None], rounds, budget, jsonl)
                return _run(timing, rec, folder, sink, began)
        except BaseException as error:
            stopped = isinstance(error, (KeyboardInterrupt, Interrupted))  # before the first round
            rec["status"] = "interrupted" if stopped else "failed"
            rec["error"] = None if stopped else machine.told(error)
            record.write_record(folder, rec)
            sink.finish(1)
            if isinstance(error, Interrupted):
                say("train", "interrupted and saved; the same command goes on from there", err=True)
                return 130
            raise


def _run(timing: Timing, rec: dict[str, Any], folder: Path, sink: Sink, began: float) -> int:
    timing.train()
    alone = machine.Alone()  # of what is timed: a disturbed training changes no figure
    stages = timing.stages(rec["environment"])
    failed = timing.failed
    rec["environment"]["alone"] = alone.read()
    interrupted = any(stage.interrupted for stage in stages)
    rec["steps"] = sum(stage.rounds * stage.steps for stage in stages)
    rec["timing"]["cold_s"] = sum(stage.cold_s for stage in stages)
    rec["memory"]["peak_mib"] = max((m for s in stages for f in s.figures if (m := f.mib("train"))), default=None)
    rec |= {"rows": [show.row(f, s.at) for s in stages for f in s.figures], "failed_rows": failed,
            "ratios": [{"at": s.at, **c.record()} for s in stages for c in s.found],
            "rounds": sum(s.rounds for s in stages), "steps_a_round": stages[0].steps if stages else None,
            "unsettled": sorted({label for s in stages for label in s.unsettled})}  # fmt: skip
    show.show(timing.rows, stages, failed, rec, folder)
    code = 130 if interrupted else 1 if failed or not stages else 0
    rec["status"] = "interrupted" if interrupted else "failed" if code else "done"
    rec["error"] = "; ".join(f"{k}: {v}" for k, v in failed.items()) or None
    rec["timing"]["total_s"] = time.perf_counter() - began
    rec["finished_at"] = record.now()
    record.write_record(folder, rec)
    replay(sink, rec, folder)
    sink.finish(code)
    total = duration(rec["timing"]["total_s"])
    say("wrote", f"{folder}/   record.json · table.md · speedup.svg · {total} with warm-up")
    return code


@dataclass
class Timing:
    """The rows of one bench, timed at each point of their training in turn."""

    rows: list[Row]
    at: list[int | None]  # steps; [None]: as they train from the first step on
    rounds: int
    budget: float | None  # s of rounds, for all points; wins over rounds
    jsonl: Jsonl
    failed: Failed = field(default_factory=dict)

    def stages(self, environment: dict[str, Any]) -> list[Stage]:
        if not self._left():
            return []
        environment["convolution_gflops"] = machine.convolution_gflops(self.rows[0].device.torch)
        peaks = self._memory()
        found: list[Stage] = []
        for k in self.at:
            stage = self._stage(k, peaks, len(self.at) - len(found))
            found += [stage] if stage else []
            if stage is None or stage.interrupted:
                break
        return found

    def _left(self) -> list[Row]:
        fine = {row.label for row in self.rows if row.label not in self.failed}
        return [row for row in self.rows if row.label in fine and row.peer_of in (fine | {""})]

    def _each(self, what: str, work: Callable[[Row], None], rows: Sequence[Row] | None = None) -> list[Row]:
        """The rows for which the work could be done; the others are noted, and cost no other row anything."""
        rows = self._left() if rows is None else rows
        with Bar(len(rows), what) as bar:
            for done, row in enumerate(rows):
                try:
                    bar.at(done, lambda row=row: row.label)
                    work(row)
                except Interrupted:
                    raise
                except Exception as error:
                    self.failed[row.label] = machine.told(error)
        return self._left()

    def train(self) -> None:
        """Make the weights along training that are not kept yet. Raises train.Interrupted after saving."""
        at = [k for k in self.at if k]
        missing = {row.label: max(lacking) for row in self.rows if not row.peer_of and (lacking := lacks(row, at))}
        ours = [row for row in self.rows if row.label in missing]
        if ours:
            ours = [row for row in self._each("rows tried", Row.pace, ours) if row in ours]
            seconds = sum(missing[row.label] * row.step_ms for row in ours) * 1e-3
            progress("plan", f"weights of {len(ours)} rows along training, to step {max(at):,}: about "
                     f"{duration(seconds)}, kept; Ctrl-C keeps what there is")  # fmt: skip
            self._each("rows trained", lambda row: trained(row, at), ours)

    def _memory(self) -> dict[tuple[int | None, str], memory.Peak]:
        """Peaks at each point, all in one go of the process that measures them."""
        if not self.rows[0].job.config["memory"]:
            return {}
        asked = [(k, row) for k in self.at for row in self._left() if not row.peer_of]
        progress("memory", f"steps and predictions of each of {len(asked)} rows, in processes of their own")
        found, problems = memory.peaks([row for _, row in asked], [where(row, k) for k, row in asked])
        if unmeasured := " · ".join(f"{label}: {why}" for label, why in problems.items()):
            progress("note", f"memory not measured of {unmeasured}")
        return {(k, row.label): peak for (k, row), peak in zip(asked, found)}

    def _stage(self, at: int | None, peaks: dict[tuple[int | None, str], memory.Peak], left: int) -> Stage | None:
        """The rows at one point of their training, after which so many are left; None where no row is left."""
        of = {row.label: row for row in self.rows}
        if at is not None or self.rows[0].job.trained:
            self._each("rows loaded", lambda row: put(row, at, of.get(row.peer_of, row)))
        self._each("rows levelled", lambda row: peers.level(row, of[row.peer_of]) if row.peer_of else None)
        rows = self._each("rows warmed up", Row.warm_up)
        if not rows:
            return None
        k, budget = steps_a_round([row.step_ms for row in rows]), self.budget and self.budget / len(self.at)
        both = {row.label: row.warm.times[-1] for row in rows if row.warm}  # s of a step and a prediction
        expected = left * (budget or self.rounds * k * sum(both.values()))
        expected += (left - 1) * sum((1 + 3 * warm_steps(row.step_ms)) * both[row.label] for row in rows)
        many = f"{self.rounds} rounds" if budget is None else duration(budget)
        point = "" if at is None else f" at step {at:,}"
        progress("plan", f"{len(rows)} rows{point} × {many} of {count(k, 'step')}, about {duration(expected)} from "
                 "here; Ctrl-C prints what there is")  # fmt: skip
        prices = Readings(rows)

        def on_round(done: int, figures: dict[str, dict[str, float]]) -> None:
            self.jsonl.append({"step": done, **({} if at is None else {"at": at}), **figures})
            bar.at(done)
            if prices.due():
                prices.read()

        with Bar(0 if budget else self.rounds, "rounds") as bar:
            samples = clock.interleave({row.label: partial(row.measure, k) for row in rows}, on_round=on_round,
                                       rounds=self.rounds if budget is None else None, seconds=budget)  # fmt: skip
        self.failed |= samples.failed
        if not samples.interrupted:
            prices.read()
        figures = []
        for row in [row for row in rows if row.label in samples.rows and samples.rounds]:
            price, own_ms = prices.of(row)
            peak = peaks.get((at, row.label), memory.NOTHING)
            figures.append(row.figures(samples.rows[row.label], price, peak, own_ms))
        warm = {row.label: row.warm for row in rows if row.warm}
        found = comparisons(figures, rows[0].job.table) if len(figures) > 1 else []
        return Stage(at, figures, found, samples.rounds, samples.seconds, samples.interrupted, k,
                     [label for label, w in warm.items() if not w.settled],
                     sum(w.times[0] for w in warm.values()))  # fmt: skip


class Readings:
    """Unit costs, once for all rows of one cell, and each row's own arithmetic, read before, between and after the
    rounds: the machine's drift is in them as it is in the rounds."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows
        self.cells: list[Row] = []  # the first row of each
        for row in rows:
            if not any(row.cell == other.cell for other in self.cells):
                self.cells.append(row)
                row.solution = None  # that of other weights
        self.found: list[list[Prices]] = []
        self.own: dict[str, list[float]] = {row.label: [] for row in rows}
        self.read()

    def read(self) -> None:
        began = time.perf_counter()
        self.found.append([row.prices() for row in self.cells])
        for row in self.rows:
            with contextlib.suppress(Exception):  # a row that fails does so in its rounds, where it is told
                if (ms := arithmetic_ms(row)) is not None:
                    self.own[row.label].append(ms)
        self.ended = time.perf_counter()
        self.cost = self.ended - began

    def due(self) -> bool:
        """Reading takes a twentieth of the time at most."""
        return time.perf_counter() - self.ended > 20 * self.cost

    def of(self, row: Row) -> tuple[Prices, float | None]:
        """The medians."""
        i = next(i for i, other in enumerate(self.cells) if other.cell == row.cell)
        own = self.own[row.label]
        return (Prices(*map(statistics.median, zip(*(reading[i] for reading in self.found)))),
                statistics.median(own) if own else None)  # fmt: skip
