"""What records say of a table's rows: averaged over seeds, never over machines. Runs nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from .. import config, record
from ..compare.figures import Trained, Unknown
from ..compare.rows import Run
from ..papers import Row as PaperRow
from ..papers import Table
from ..record import CONVERGED_ENOUGH, RecordError
from ..runs import state
from ..terminal import count, number

Jobs = Mapping[str, Mapping[int, config.Composed]]  # a table's trainings, by row and seed


class Timed(NamedTuple):
    """A row of a bench, at the last point of training that it was timed at."""

    row: dict[str, Any]
    batch: int
    rec: dict[str, Any]
    ends_at_residual: bool
    memory_of: tuple[str, int | None] | None = None  # the other bench that its memory is of, and the step there

    @property
    def shy(self) -> bool:
        """Were its solves, most of them, ended by the cap?"""
        share = _found(self.row, ("solve", "converged_fraction"))
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
    def n(self) -> str:
        return "" if self.elsewhere else f"{len(self.runs)}/{len(self.wanted)}"


def _found(value: Any, path: Sequence[str]) -> Any:
    """What a record has there, or None."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _metric(*path: str, scale: float = 1.0) -> Callable[[Line], list[float]]:
    """Of each training's record; a training without it has none to show."""

    def of(line: Line) -> list[float]:
        values = [_found(run.record, path) for run in line.runs.values()]
        return [value * scale for value in values if value is not None]

    return of


def _bench(*path: str, scale: float = 1.0) -> Callable[[Line], list[float]]:
    """Of a bench's row."""

    def of(line: Line) -> list[float]:
        value = _found(line.timed and line.timed.row, path)
        return [] if value is None else [value * scale]

    return of


def _params(line: Line) -> list[float]:
    found = _metric("params", "total")(line) or _bench("params")(line)
    return found[:1]


def seconds(line: Line) -> tuple[list[list[float]], bool]:
    """Training time of each seed at the end of each epoch: as it was where all of them were alone on their machine, and
    each epoch was timed whole; else (True) their steps by a step of the bench, if that has their batch. Raises
    Unknown."""
    trained, why = line.trained, "not alone"
    if all(run.record["environment"]["alone"] for run in line.runs.values()):
        try:
            return [t.seconds for t in trained], False
        except Unknown as lacking:
            why = str(lacking)
    batch = {run.record["config"]["recipe"]["batch"] for run in line.runs.values()}
    if line.timed is None or batch != {line.timed.batch}:
        raise Unknown(why)
    step = line.timed.row["timing"]["train_ms"]["median"] / 1e3
    return [[row["step"] * step for row in t.epochs] for t in trained], True


def _train_min(line: Line) -> list[float]:
    spent, derived = seconds(line)
    return [each[-1] / 60 for each in spent][: 1 if derived else None]  # alike, then, for every seed


def _target_s(line: Line) -> list[float]:
    found, goal = [], line.target
    for smoothed, spent in zip([run.smoothed for run in line.trained], seconds(line)[0]):
        found += [next((s for s, acc in zip(spent, smoothed) if goal is not None and acc >= goal), None)]
    there = [s for s in found if s is not None]
    if len(there) < len(found):
        raise Unknown(f"reached by {len(there)} of {len(found)}" if there else "not reached")
    return there


class Column(NamedTuple):
    head: str
    digits: int | None  # after the point; None: three significant
    of: Callable[[Line], list[float]]
    scale: int = 1  # of what is published
    timed: bool = False  # of a bench, not of trainings
    clock: bool = False  # of a training's time


COLUMNS = {
    "params": Column("params", 0, _params),
    "test_acc": Column("test acc %", 2, _metric("metrics", "test_acc", scale=100), 100),
    "test_acc5": Column("top-5 acc %", 2, lambda line: [], 100),  # published only: we measure none
    "test_acc_best": Column("best test acc %", 2, _metric("metrics", "test_acc_best_paper_style", scale=100), 100),
    "val_acc": Column("val acc %", 2, _metric("metrics", "val_acc", scale=100), 100),
    "nfe": Column("test nfe", None, _metric("solve", "test", "nfe_sample")),
    "train_min": Column("train min", None, _train_min, clock=True),
    "target_s": Column("s to target", None, _target_s, clock=True),
    "train_s": Column("train s", None, _bench("timing", "train_ms", "median", scale=1e-3), timed=True),
    "backward_s": Column("backward s", None, _bench("timing", "backward_ms", "median", scale=1e-3), timed=True),
    "predict_s": Column("predict s", None, _bench("timing", "predict_ms", "median", scale=1e-3), timed=True),
    "nfe_f": Column("f calls", None, _bench("solve", "nfe_forward"), timed=True),
    "nfe_b": Column("VJPs", None, _bench("solve", "nfe_backward"), timed=True),
    "memory_mib": Column("MiB", None, _bench("memory", "train_mib"), timed=True),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    values: list[float]
    said: str = ""  # where there are none: why
    digits: int | None = None
    mark: str = ""

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def sd(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        if self.mean is None:
            return self.said
        return self.mark + spelled(self.mean, self.sd, self.digits)


def spelled(mean: float, sd: float | None, digits: int | None) -> str:
    if digits is None:  # three significant of the mean, and as many decimals of its sd
        said = f"{mean:#.3g}".rstrip(".") if 1e-5 < abs(mean) < 1000 else number(mean)
        return said if sd is None else f"{said} ± {sd:.{len(said.partition('.')[2])}f}"
    return f"{mean:,.{digits}f}" + ("" if sd is None else f" ± {sd:,.{digits}f}")


def cell(line: Line, name: str) -> Cell:
    column = COLUMNS[name]
    if not column.timed and not line.runs and not (name == "params" and line.timed):
        return Cell([], "failed" if line.failed else "" if line.elsewhere else "not run")
    try:
        derived = column.clock and seconds(line)[1]
        values = column.of(line)
    except Unknown as why:
        return Cell([], str(why))
    if not values:
        return Cell([], "–" if not column.timed or (line.timed and name == "memory_mib") else "not timed")
    return Cell(values, "", column.digits, "~" if derived else "")


def published(line: Line, name: str) -> str:
    """The paper's, to its own last digit: [mean, sd] or one number; none where nobody could read it."""
    value = line.paper.published.get(name)
    if value is None:
        return ""
    mean, sd = (*value, None)[:2] if isinstance(value, (list, tuple)) else (value, None)
    return exactly(mean, sd, COLUMNS[name].scale)


def exactly(mean: float, sd: float | None, scale: int = 1) -> str:
    """Scaled by a power of ten, without a digit more or less."""
    said = [Decimal(str(number)).scaleb(len(str(scale)) - 1) for number in (mean, sd) if number is not None]
    digits = max(-int(number.as_tuple().exponent) for number in said)
    return " ± ".join(f"{number:,.{max(digits, 0)}f}" for number in said)


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
            key = rec["run_id"], rec["environment"]["hardware"] or ""
            if key not in found or (rec["status"] == "done" and found[key].state != "done"):
                found[key] = Run(name, rec, state(rec), path.parent)
    return list(found.values())


STEP = ("network", "init", "solver", "stop", "adjoint", "penalty")  # what a step's time hangs on, beside the batch


def settings(cfg: Mapping[str, Any]) -> dict[str, Any]:
    more = "dataset.name", "recipe.batch"
    return {key: value for key, value in record.flat(cfg).items() if key.split(".")[0] in STEP or key in more}


def _wanted(job: config.Composed) -> dict[str, Any]:
    """The batch only where it was said: on a CPU benches have one of their own."""
    said = any(word.startswith("recipe.batch=") for word in job.overrides)
    return {key: value for key, value in settings(job.config).items() if said or key != "recipe.batch"}


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
        if not isinstance(at := _found(rec, above), Mapping) or key not in at:
            return path
    if rec["command"] == "train":
        accuracies = {key: _found(rec, ("metrics", key)) for key in ("test_acc", "val_acc")}
        return next((f"number in metrics.{key}" for key, value in accuracies.items()
                     if value is not None and not isinstance(value, (int, float))), None)  # fmt: skip
    if rec["command"] != "bench":
        return None
    if not all(_found(cfg, ("recipe", "batch")) for cfg in rec["config"]["rows"] or [None]):
        return "config.rows[].recipe.batch"
    parts = ((name, each, keys) for name, keys in (("rows", ROW), ("ratios", RATIO)) for each in rec.get(name) or ())
    return next((f"{key} in its {name}" for name, each, keys in parts for key in keys if key not in each), None)


def timed(everything: Sequence[Run], table: Table, protocol: str, label: str,
          wanted: Mapping[str, Any]) -> dict[str, Timed]:  # fmt: skip
    """Of a row on each machine, as benches of the table, or of that which it has the row from, timed it furthest along
    training, and of such the latest; its memory is another bench's where that one measured none. Not of benches whose
    row had other settings than those wanted now, as far as both know them."""
    found: dict[str, Timed] = {}
    names = table.name, table.rows[label].of
    rows = [(row.get("at") or 0, record.started(run.record, run.folder), row, run.record) for run in everything
            if run.record["command"] == "bench" and run.record["config"].get("table") in names
            and run.record["protocol"] == protocol for row in run.record.get("rows") or ()
            if row["label"].partition(" ×")[0] == label]  # fmt: skip
    for *_, row, rec in sorted(rows, key=lambda each: each[:2], reverse=True):
        had = [settings(cfg) for cfg in rec["config"]["rows"]]
        if not any(all(own[key] == wanted[key] for key in own.keys() & wanted.keys()) for own in had):
            continue
        where, batch = machine(rec), rec["config"]["rows"][0]["recipe"]["batch"]
        best = found.setdefault(where, Timed(row, batch, rec, str(wanted.get("stop._target_")).endswith(".Residual")))
        known = [_found(each, ("memory", "train_mib")) for each in (row, best.row)]
        if batch == best.batch and known[0] is not None and known[1] is None:
            found[where] = best._replace(row={**best.row, "memory": row.get("memory")},
                                           memory_of=(rec["run_id"], row.get("at")))
    return found


def lines(table: Table, jobs: Jobs, everything: Sequence[Run], protocol: str) -> list[Line]:
    """The rows of a table, by the cell_id that each has for each seed; a row on several machines is several lines."""
    by_cell: dict[str, list[Run]] = {}
    for run in everything:
        if run.record["command"] == "train":
            by_cell.setdefault(record.cell_id(run.record["config"]), []).append(run)
    found = []
    for label, seeds in jobs.items():
        blank = Line(label, table.rows[label], wanted=tuple(seeds), target=table.target)
        here: dict[str, Line] = {}
        for seed, job in seeds.items():
            for run in by_cell.get(record.cell_id(job.config), ()):
                line = here.setdefault(machine(run.record), replace(blank, runs={}, failed={}))
                (line.runs if run.state == "done" else line.failed if run.state == "failed" else {})[seed] = run
        job = next(iter(seeds.values()))
        for where, timing in timed(everything, table, protocol, label, _wanted(job)).items():
            here.setdefault(where, replace(blank, runs={}, failed={})).timed = timing
        for name, line in here.items():
            line.machine, line.elsewhere = name, not line.runs and any(other.runs for other in here.values())
        found += [line for line in here.values() if line.runs or line.failed or line.timed] or [blank]
    return found
