"""The columns of a table: what each shows of a line, and how."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

from ..compare.figures import Unknown
from ..terminal import number
from .cells import Line, value_at


def _metric(*path: str, scale: float = 1.0) -> Callable[[Line], list[float]]:
    """Of each training's record; a training without it has none to show."""

    def of(line: Line) -> list[float]:
        values = [value_at(run.record, path) for run in line.runs.values()]
        return [value * scale for value in values if value is not None]

    return of


def _bench(*path: str, scale: float = 1.0) -> Callable[[Line], list[float]]:
    """Of a bench's row."""

    def of(line: Line) -> list[float]:
        value = value_at(line.timed and line.timed.row, path)
        return [] if value is None else [value * scale]

    return of


def _params(line: Line) -> list[float]:
    found = _metric("params", "total")(line) or _bench("params")(line)
    return found[:1]


def seconds(line: Line) -> tuple[list[list[float]], bool]:
    """Training time of each seed at the end of each epoch: as it was where all of them were alone on their machine, and
    each epoch was timed whole; else (True) their steps by the bench's, if that has their batch. Raises Unknown."""
    trained, why = line.trained, "not alone"
    if all(run.record["environment"]["alone"] for run in line.runs.values()):
        try:
            return [t.seconds for t in trained], False
        except Unknown as lacking:
            why = str(lacking)
    batch = {run.record["config"]["recipe"]["batch"] for run in line.runs.values()}
    if line.timed is None or batch != {line.timed.batch}:
        raise Unknown(why)
    points = line.timed.points
    return [[*itertools.accumulate(_priced(points, t.epochs))] for t in trained], True


def _priced(points: Sequence[Mapping[str, Any]], epochs: Sequence[Mapping[str, Any]]) -> Iterator[float]:
    """Seconds of each epoch: its steps, each the bench's at that point of training which made the most nearly as many
    evaluations, forward and backward by those of f and of its VJPs that the epoch made. From one point of a bench to
    another this is right to a tenth where ten evaluations or more are made; from fewer it tells too much."""
    before = 0
    for epoch in epochs:
        row = min(points, key=lambda point: abs(math.log((_calls(epoch) or 1) / (_calls(point["solve"], "") or 1))))
        step = value_at(row, ("timing", "train_ms", "median"))
        for part, calls in (("forward_ms", "nfe_forward"), ("backward_ms", "nfe_backward")):
            cost, then = value_at(row, ("timing", part, "median")), value_at(row, ("solve", calls))
            if cost and then and (now := epoch.get(f"solve.{calls}")) is not None:
                step += cost * (now / then - 1)
        yield (epoch["step"] - before) * step / 1e3
        before = epoch["step"]


def _calls(of: Mapping[str, Any], section: str = "solve.") -> float:
    return sum(of.get(f"{section}{calls}") or 0 for calls in ("nfe_forward", "nfe_backward"))


def _train_min(line: Line) -> list[float]:
    spent, derived = seconds(line)
    found = [each[-1] / 60 for each in spent]
    return [statistics.fmean(found)] if derived else found  # a spread over seeds would be of evaluations alone


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
        said = f"{mean:#.3g}".rstrip(".") if 1e-5 < abs(mean) < 999.5 else number(mean)
        return said if sd is None else f"{said} ± {sd:.{len(said.partition('.')[2])}f}"
    return f"{mean:,.{digits}f}" + ("" if sd is None else f" ± {sd:,.{digits}f}")


def measured(line: Line, name: str) -> Cell:
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
