"""What records say of a table's rows: averaged over seeds, never over machines. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from .. import clock, config, record
from ..compare.figures import Trained
from ..compare.rows import Run
from ..papers import Row as PaperRow
from ..papers import Table
from ..record import CONVERGED_ENOUGH, RecordError
from ..runs import state
from ..terminal import count

Jobs = Mapping[str, Mapping[int, config.Composed]]  # a table's trainings, by row and seed


class Timed(NamedTuple):
    """A row of a bench, at the last point of training that it was timed at."""

    row: dict[str, Any]
    batch: int
    rec: dict[str, Any]
    ends_at_residual: bool
    points: Sequence[dict[str, Any]] = ()  # the row at every point that this bench timed it at, the last first
    memory_of: tuple[str, int | None] | None = None  # the other bench that its memory is of, and the step there

    @property
    def shy(self) -> bool:
        """Did fewer of its solves converge than have to?"""
        share = value_at(self.row, ("solve", "converged_fraction"))
        return self.ends_at_residual and share is not None and share < CONVERGED_ENOUGH


@dataclass
class Line:
    """A row of a table on one machine."""

    label: str
    paper: PaperRow
    machine: str = ""
    runs: dict[int, Run] = field(default_factory=dict)  # finished, by seed
    failed: dict[int, Run] = field(default_factory=dict)
    timed: Timed | None = None
    wanted: tuple[int, ...] = ()  # seeds
    target: float | None = None
    elsewhere: bool = False  # trained on another machine, and not on this one

    @cached_property
    def trained(self) -> list[Trained]:
        """The runs with their metrics.jsonl, which several columns read."""
        return [Trained(run) for run in self.runs.values()]

    @property
    def shy(self) -> dict[str, list[float]]:
        """The shares of solves that converged in the last epochs of trainings and on their test images, of the seeds
        where they are too few."""
        found = {where: [share for run in self.runs.values() if (share := value_at(run.record, path)) is not None]
                 for where, path in (("in training", ("solve", "converged_fraction")),
                                     ("at test", ("solve", "test", "converged_fraction")))}  # fmt: skip
        few = {where: [share for share in shares if share < CONVERGED_ENOUGH] for where, shares in found.items()}
        return {where: shares for where, shares in few.items() if shares}

    @property
    def n(self) -> str:
        return "" if self.elsewhere else f"{len(self.runs)}/{len(self.wanted)}"


def value_at(value: Any, path: Sequence[str]) -> Any:
    """What a record has there, or None."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def machine(rec: Mapping[str, Any]) -> str:
    """Where, and how, a record was made: what is never averaged over."""
    env, cfg = rec["environment"], rec["config"]
    rows = cfg.get("rows")  # of `compare` no list; its older records have no gpu either
    gpu = cfg.get("gpu") or (rows[0]["gpu"] if isinstance(rows, list) else {})
    dtype = gpu.get("dtype", "float32")
    words = [env["hardware"], count(env["threads"], "thread") if not env["gpu"] else "",
             dtype if dtype != "float32" else "", "compiled" if gpu.get("compile") else ""]  # fmt: skip
    return ", ".join(word for word in words if word)


def read(dirs: Sequence[Path]) -> list[Run]:
    """Every record, each run once: the finished one of two, else the one of the first folder. Raises RecordError."""
    found: dict[tuple[str, str], Run] = {}
    for top in dirs:
        if not top.is_dir():
            if top in (Path("runs"), Path("results")):
                continue
            raise RecordError(f"no folder {top} to read records from")
        for path in record.record_files(top):
            rec = {**record.read_record(path), "folder": path.parent}
            if lack := _lack(rec):
                if rec["status"] == "done":
                    raise RecordError(f"{path} has no {lack}, which a table reads; take it away, or copy it anew")
                continue  # it ended before it knew
            name = record.name_of(path)
            run = Run(name, rec, state(rec), path.parent)
            if run.key not in found or (rec["status"] == "done" and found[run.key].state != "done"):
                found[run.key] = run
    return list(found.values())


STEP = ("network", "init", "solver", "stop", "adjoint", "penalty")  # what a step's time hangs on, beside the batch


def settings(cfg: Mapping[str, Any]) -> dict[str, Any]:
    more = "dataset.name", "recipe.batch"
    return {key: value for key, value in record.flat(cfg).items() if key.split(".")[0] in STEP or key in more}


def wanted(job: config.Composed) -> dict[str, Any]:
    """A job's, the batch only where it was said: on a CPU benches have one of their own."""
    said = any(word.startswith("recipe.batch=") for word in job.overrides)
    return {key: value for key, value in settings(job.config).items() if said or key != "recipe.batch"}


def as_wanted(bench: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether one of its rows has these settings, as far as both know them."""
    had = [settings(cfg) for cfg in bench["config"]["rows"]]
    return any(all(own[key] == wanted[key] for key in own.keys() & wanted.keys()) for own in had)


READ = {
    "": ["environment.hardware", "environment.threads", "environment.gpu", "environment.alone"],
    "train": ["config.gpu.dtype", "config.gpu.compile", "config.model.name", "config.recipe.batch"],
    "bench": ["config.rows"],
}
ROW = ("label", "timing", "solve")
RATIO = ("id", "numerator", "denominator", "measure", "value", "low", "high", "n", "verdict", "caveats")


def _lack(rec: Mapping[str, Any]) -> str | None:
    """The first thing that is not there, or is of another kind, of what is read here."""
    for path in READ[""] + READ.get(rec["command"], []):
        *above, key = path.split(".")
        if not isinstance(at := value_at(rec, above), Mapping) or key not in at:
            return path
    if rec["command"] == "train":
        accuracies = {key: value_at(rec, ("metrics", key)) for key in ("test_acc", "val_acc")}
        return next((f"number in metrics.{key}" for key, value in accuracies.items()
                     if value is not None and not isinstance(value, (int, float))), None)  # fmt: skip
    if rec["command"] != "bench":
        return None
    if not all(value_at(cfg, ("recipe", "batch")) for cfg in rec["config"]["rows"] or [None]):
        return "config.rows[].recipe.batch"
    parts = ((name, each, keys) for name, keys in (("rows", ROW), ("ratios", RATIO)) for each in rec.get(name) or ())
    return next((f"{key} in its {name}" for name, each, keys in parts for key in keys if key not in each), None)


def timed(everything: Sequence[Run], table: Table, protocol: str, label: str,
          wanted: Mapping[str, Any]) -> dict[str, Timed]:  # fmt: skip
    """Of a row on each machine, as benches of the table, or of that which it has the row from, timed it furthest along
    training, and of such the latest of rounds enough for an interval; its memory is another bench's where that one
    measured none. Not of benches whose row had other settings than those wanted now."""
    found: dict[str, Timed] = {}
    names = table.name, table.rows[label].of
    rows = [(row.get("at") or 0, row["timing"]["train_ms"]["n"] >= clock.MIN_ROUNDS,
             record.started(run.record, run.folder), row, run.record) for run in everything
            if run.record["command"] == "bench" and run.record["config"].get("table") in names
            and run.record["protocol"] == protocol for row in run.record.get("rows") or ()
            if row["label"].partition(" ×")[0] == label]  # fmt: skip
    for *_, row, rec in sorted(rows, key=lambda each: each[:3], reverse=True):
        if not as_wanted(rec, wanted):
            continue
        where, batch = machine(rec), rec["config"]["rows"][0]["recipe"]["batch"]
        ends_at_residual = str(wanted.get("stop._target_")).endswith(".Residual")
        points = [other for other in reversed(rec["rows"]) if other["label"] == row["label"]]
        best = found.setdefault(where, Timed(row, batch, rec, ends_at_residual, points))
        known = [value_at(each, ("memory", "train_mib")) for each in (row, best.row)]
        if batch == best.batch and known[0] is not None and known[1] is None:
            found[where] = best._replace(row={**best.row, "memory": row.get("memory")},
                                           memory_of=(rec["run_id"], row.get("at")))
    return found


def lines(table: Table, jobs: Jobs, everything: Sequence[Run], protocol: str) -> list[Line]:
    """The rows of a table, by the cell_id that each has for each seed; a row on several machines is several lines."""
    by_cell: dict[str, list[Run]] = {}
    for run in everything:
        if run.record["command"] == "train":
            by_cell.setdefault(record.cell_of(run.record), []).append(run)
    found = []
    for label, seeds in jobs.items():
        blank = Line(label, table.rows[label], wanted=tuple(seeds), target=table.target)
        here: dict[str, Line] = {}
        for seed, job in seeds.items():
            for run in by_cell.get(record.cell_id(job.config), ()):
                line = here.setdefault(machine(run.record), replace(blank, runs={}, failed={}))
                (line.runs if run.state == "done" else line.failed if run.state == "failed" else {})[seed] = run
        job = next(iter(seeds.values()))
        for where, timing in timed(everything, table, protocol, label, wanted(job)).items():
            here.setdefault(where, replace(blank, runs={}, failed={})).timed = timing
        for name, line in here.items():
            line.machine, line.elsewhere = name, not line.runs and any(other.runs for other in here.values())
        found += [line for line in here.values() if line.runs or line.failed or line.timed] or [blank]
    return found
